"""Reads JSON files beside weights. They are untrusted, so each value is checked when it is read."""


from collections.abc import Collection
from typing import Any, NamedTuple

import flax.linen as nn

from vit_jax.errors import UserError
from vit_jax.io.text import brief

KINDS = {  # checks of values in JSON files, by their name in error messages
    'anything': lambda v: True,
    'an object': lambda v: isinstance(v, dict),
    'a text': lambda v: isinstance(v, str),
    'a list': lambda v: isinstance(v, list),
    'true or false': lambda v: isinstance(v, bool),
    'a number': lambda v: type(v) in (int, float) and -1e6 < v < 1e6,
    'a number above 0': lambda v: type(v) in (int, float) and 0 < v < 1e6,
    'a whole number': lambda v: type(v) is int and 0 <= v < 2**31,
    'a number of pixels': lambda v: type(v) is int and 0 < v <= 16_384,
    'a whole number above 0': lambda v: type(v) is int and 0 < v < 2**31,
}
PROBLEMS = {  # transformers' problem_type, by the loss that a classifier is trained with
    'softmax': 'single_label_classification', 'sigmoid': 'multi_label_classification',
}  # fmt: skip


class Notes(NamedTuple):
    """What the JSON files leave open, and which of their keys have no effect."""

    guessed: dict[str, str] = {}  # {field: why}: nothing states its value
    unsettled: dict[str, str] = {}  # {field: why}: ambiguous, the caller must give it
    ignored: tuple[tuple[str, str], ...] = ()  # (key, why): stated, but without effect here
    unknown: tuple[str, ...] = ()  # keys that this package does not know

    def rows(self, model: nn.Module, given: Collection[str]) -> list[tuple[str, str, str]]:
        """Rows of the account, without guesses of fields that the caller has `given`."""
        rows = [
            ('guessed', f'{field}={getattr(model, field)!r}', f'{why}; {field}=... settles it')
            for field, why in self.guessed.items() if field not in given
        ]  # fmt: skip
        rows += [('ignored', key, why) for key, why in self.ignored]
        return rows + [('ignored', key, 'an unknown key') for key in self.unknown]


def option(
    config: dict[str, Any], key: str, kind: str, default: Any = None, file: str = 'config.json'
) -> Any:
    """A value of a JSON file, or `default` if it is absent or null.

    Raises UserError unless the value is of `kind`, a key of KINDS.
    """
    value = config.get(key)
    if value is None:
        return default
    if not KINDS[kind](value):
        raise UserError(f'{file}: {key} is {brief(repr(value))}, not {kind}')
    return value


def channel_values(
    config: dict[str, Any], key: str, kind: str, channels: int, file: str = 'config.json'
) -> tuple[float, ...] | None:
    """A number per channel, None if the key is absent; a single float applies to all channels.

    Raises UserError unless each number is of `kind`, a key of KINDS.
    """
    values = config.get(key)
    if values is None:
        return None
    values = [values] * channels if isinstance(values, float) else values
    valid = isinstance(values, list) and len(values) == channels and all(map(KINDS[kind], values))
    if not valid:
        expected = f'{kind} for each of {channels} channels'
        raise UserError(f'{file}: {key} is {brief(repr(values))}, not {expected}')
    return tuple(map(float, values))


def size_option(
    config: dict[str, Any], key: str, file: str = 'config.json'
) -> tuple[int, int] | None:
    """(height, width) from a number of pixels or a pair; None if the key is absent."""
    value = config.get(key)
    if value is None:
        return None
    pair = value if isinstance(value, list) else [value] * 2
    if len(pair) != 2 or not all(map(KINDS['a whole number above 0'], pair)):
        expected = 'a number of pixels or [height, width]'
        raise UserError(f'{file}: {key} is {brief(repr(value))}, not {expected}')
    return tuple(pair)


def stated_loss(config: dict) -> str | None:
    """The training loss that problem_type in config.json implies; None if that is unknown."""
    return {v: k for k, v in PROBLEMS.items()}.get(str(config.get('problem_type')))


def check_agreement(
    stated: dict[str, Any], inferred: dict[str, Any], file: str = 'config.json'
) -> None:
    """Raises UserError if a value stated in a JSON file differs from what the arrays imply.

    Both are {key: value}. A key that either lacks, or that is stated as None, is not compared.
    """
    for key in stated.keys() & inferred.keys():
        if stated[key] is not None and stated[key] != inferred[key]:
            raise UserError(
                f'{file}: {key} is {brief(repr(stated[key]))}, but the arrays have '
                f'{brief(repr(inferred[key]))}'
            )


def check_mlp_ratio(
    ratio: float, made: int, mlp_dim: int, key: str = 'mlp_ratio', file: str = 'config.json'
) -> None:
    """Raises UserError unless the size `made` of a ratio is the hidden size in the arrays."""
    if made != mlp_dim:
        raise UserError(
            f'{file}: {key} is {ratio}, which makes an MLP of {made}, but the arrays have {mlp_dim}'
        )


def mlp_ratio(mlp_dim: int, width: int) -> int | float:
    """A number with int(width * number) == mlp_dim, an integer if possible; raises UserError."""
    for value in (mlp_dim / width, (mlp_dim + 0.5) / width):
        if int(width * value) == mlp_dim:
            return int(value) if value == int(value) else value
    raise UserError(f'no mlp_ratio makes {mlp_dim} of width {width}')


def check_class_names(
    names: Any, count: int | None, key: str, file: str = 'config.json'
) -> tuple[str, ...] | None:
    """Class names as a tuple, None without any; raises UserError unless there is one per output."""
    if names is None or not count:
        return None
    if class_names(names) is None or len(names) != count:
        given = f'{len(names)} values' if isinstance(names, (list, dict)) else brief(repr(names))
        raise UserError(f'{file}: {key} has {given}, not a name for each of {count} outputs')
    return tuple(names)


def class_names(values: Any) -> tuple[str, ...] | None:
    """Class names as a tuple; None unless they are a non-empty list of strings."""
    valid = isinstance(values, (list, tuple)) and all(isinstance(v, str) for v in values)
    return tuple(values) if valid and values else None
