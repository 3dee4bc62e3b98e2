"""The values that a setting may have, declared by its annotation: `lr: Positive[float] = 1e-3`.

An annotation is a type, a Literal, a union, a tuple of these, or Annotated with a Range (numbers)
or Ascending (pairs). A dataclass is a group of settings: a section, {field: value}, stands for it.
A float is always finite, and an int always fits 64 bits. An int is also a float, a bool is neither.
A list counts as a tuple, as JSON has no tuples.
"""

import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from vit_jax.errors import UserError, shown

T = TypeVar('T')


class Range(NamedTuple):
    """Numbers from `low` to `high`; a round bracket in `ends` leaves that end out."""

    low: float = -math.inf
    high: float = math.inf
    ends: str = '[]'

    def __repr__(self):  # as help() shows it within an annotation
        return str(self).strip() or 'finite'

    def has(self, number: float) -> bool:
        """Whether a number is in the range."""
        above = number > self.low if self.ends[0] == '(' else number >= self.low
        return above and (number < self.high if self.ends[1] == ')' else number <= self.high)

    def __str__(self):
        if self.high < math.inf:
            return f' in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}'
        if self.low > -math.inf:
            return f' above {self.low}' if self.ends[0] == '(' else f' of {self.low} or above'
        return ''


class Ascending(NamedTuple):
    """Numbers in ascending order; equal neighbours are allowed."""

    def has(self, values: Sequence[float]) -> bool:
        """Whether values are in order."""
        return all(a <= b for a, b in zip(values, values[1:], strict=False))

    def __str__(self):
        return ' in ascending order'


class Regex(NamedTuple):
    """Text that Python's `re` compiles."""

    def has(self, text: str) -> bool:
        """Whether a text is a regular expression."""
        try:
            re.compile(text)
        except (re.error, OverflowError, RecursionError):
            return False
        return True

    def __str__(self):
        return ' that is a regular expression'


class MayChange(NamedTuple):
    """Marks a setting that may differ when a run resumes, as it doesn't affect the result."""

    def has(self, value: object) -> bool:
        """True for any value."""
        return True

    def __str__(self):
        return ''


class Loads(NamedTuple):
    """Marks the address of a checkpoint, which a training method gets loaded."""

    def has(self, address: str) -> bool:
        """Whether an address is not empty."""
        return bool(address)

    def __str__(self):
        return ' that is a checkpoint'


Finite = Annotated[T, Range()]  # Finite[float]: any number, explicitly
Positive = Annotated[T, Range(0, ends='(]')]
NonNegative = Annotated[T, Range(0)]
Share = Annotated[float, Range(0, 1)]
Rate = Annotated[float, Range(0, 1, '[)')]  # of dropout, of a moving average: below 1
Interval = Annotated[tuple[T, T], Ascending()]
Pixels = Annotated[int, Range(1, 65_536)]  # of a side of an image
Size = Pixels | tuple[Pixels, Pixels]  # of both sides, or (height, width)
Seed = Annotated[int, Range(0, 2**32 - 1)]
Steps = Annotated[int, Range(1, 2**31 - 1)]
Pattern = Annotated[str, Regex()]
Checkpoint = Annotated[str, Loads()]  # a method gets an objectives.Trained in its place
Float = Literal['float32', 'bfloat16', 'float16']
Threads = Annotated[int, Range(1, 1024), MayChange()]
Workers = Annotated[int, Range(0, 1024), MayChange()]
Prefetch = Annotated[int, Range(1, 65_536), MayChange()]


def check(name: str, value: Any, annotation: Any) -> None:
    """Raises UserError with the setting's name unless the annotation allows the value."""
    group = group_of(annotation)
    if group is not None and is_section(value):
        known = {field.name: field.type for field in dataclasses.fields(group)}
        for key, inner in value.items():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1, cutoff=0)[0]
                raise UserError(f'{name} has no key {shown(key)}; the nearest is {near!r}')
            check(f'{name}.{key}', inner, known[key])
        return
    if group is not None and isinstance(value, group):
        check_fields(name, value)
        return
    if not allows(annotation, value):
        wanted = describe(annotation)
        if type(value) is int and not -(2**63) <= value < 2**63 and ' in ' not in wanted:
            wanted += ', of at most 64 bits'
        raise UserError(f'{name} is {shown(value)}, not {wanted}')


def check_fields(section: str, values: Any) -> None:
    """Checks each field of a dataclass, except those that flax adds to a module."""
    for field in dataclasses.fields(values):
        if field.name not in ('parent', 'name'):
            check(f'{section}.{field.name}', getattr(values, field.name), field.type)


def group_of(annotation: Any) -> type | None:
    """The dataclass that an annotation, or a member of its union, is; None if there is none."""
    if dataclasses.is_dataclass(annotation):
        return annotation
    unions = types.UnionType, typing.Union
    members = typing.get_args(annotation) if typing.get_origin(annotation) in unions else ()
    return next(filter(None, map(group_of, members)), None)


def grouped(annotation: Any, value: Any) -> Any:
    """The dataclass in `annotation` made of a section, and likewise the groups within it.

    A list becomes a tuple; returns other values unchanged. The value has passed `check`.
    """
    group = group_of(annotation)
    if group is not None and is_section(value):
        known = {field.name: field.type for field in dataclasses.fields(group)}
        return group(**{key: grouped(known[key], inner) for key, inner in value.items()})
    return tuple(value) if isinstance(value, list) else value


def is_section(value: Any) -> bool:
    """Whether a value has keys and values: a dict, or a ConfigDict, which is no Mapping."""
    return isinstance(value, Mapping) or hasattr(value, 'items') and hasattr(value, 'keys')


def section(value: Any) -> Any:
    """The section {field: value} of a dataclass, groups within it too; else the value itself."""
    if dataclasses.is_dataclass(value):
        return {f.name: section(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


def allows(annotation: Any, value: Any) -> bool:
    """Whether an annotation allows a value."""
    kind, of = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind is Annotated:
        return allows(of[0], value) and all(bound.has(value) for bound in of[1:])
    if kind in (types.UnionType, typing.Union):
        return any(allows(one, value) for one in of)
    if kind is Literal:
        return any(type(value) is type(one) and value == one for one in of)
    if kind in (None, types.NoneType):
        return value is None
    if dataclasses.is_dataclass(kind):
        known = {f.name: f.type for f in dataclasses.fields(kind)}
        values = section(value) if isinstance(value, kind) else value
        return is_section(values) and all(
            key in known and allows(known[key], inner) for key, inner in values.items()
        )
    if kind is int:
        return type(value) is int and -(2**63) <= value < 2**63
    if kind is float:
        return allows(int, value) or isinstance(value, float) and abs(value) <= sys.float_info.max
    if kind is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        if of and of[-1] is not ...:
            return len(value) == len(of) and all(map(allows, of, value))
        return not of or all(allows(of[0], one) for one in value)
    return isinstance(value, kind)


def may_change(annotation: object) -> bool:
    """Whether an annotation has the mark MayChange."""
    return isinstance(annotation, MayChange) or any(map(may_change, typing.get_args(annotation)))


def is_checkpoint(annotation: object) -> bool:
    """Whether an annotation is Checkpoint, or has it as a member."""
    return isinstance(annotation, Loads) or any(map(is_checkpoint, typing.get_args(annotation)))


def describe(annotation: Any) -> str:
    """Describes an annotation: 'int above 0 or None' for Positive[int] | None."""
    kind, of = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind is Annotated:
        return describe(of[0]) + ''.join(map(str, of[1:]))
    if kind in (types.UnionType, typing.Union):
        return ' or '.join(map(describe, of))
    if kind is Literal:
        return ('one of ' if len(of) > 1 else '') + ', '.join(map(str, of))
    if kind is tuple and of:
        inner = [describe(one) for one in of if one is not ...]
        return f'tuple of {inner[0]}' if of[-1] is ... else f'({", ".join(inner)})'
    if dataclasses.is_dataclass(kind):
        return f'a section with keys {", ".join(f.name for f in dataclasses.fields(kind))}'
    names = {None: 'None', types.NoneType: 'None', dict: 'a section with keys'}
    return names.get(kind) or kind.__name__
