"""Matches the labels of a data set with those of a model or a mixture, by names of classes."""

import collections
import functools
import re
import sys
import unicodedata
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from vit_jax.data.readers import facts
from vit_jax.errors import UserError
from vit_jax.io.text import printable

BY = ('by_name', 'by_number')
MOST_LISTED = 8  # names in a message
TABLE = 'label_table'  # field of a record that maps classes, see translate_record


@functools.cache
def print_once(line: str) -> None:
    """Prints a line to stderr, each line only once per process."""
    print(printable(line), file=sys.stderr, flush=True)


def are_numbers(names: Collection[str]) -> bool:
    """Whether all names are integers, with a sign or not, as folders of ImageNet V2 are."""
    return all(re.fullmatch(r'[+-]?\d{1,18}', name, re.ASCII) for name in names)


def sort_classes(names: Sequence[str], title: str) -> list[str]:
    """Sorts names of class folders; integers by value, with a message if that is not text order."""
    if not are_numbers(names):
        return sorted(names)
    found, text = sorted(names, key=lambda name: (int(name), name)), sorted(names)
    if found != text:
        k = next(k for k, (a, b) in enumerate(zip(found, text, strict=True)) if a != b)
        print_once(
            f'{title}: class folders are numbers and sorted as such: label {k} is {found[k]} '
            f'(torchvision sorts text: {text[k]})'
        )
    return found


def are_indices(names: Sequence[str]) -> bool:
    """Whether names are 0, 1, 2, ... in order, as in a data set without class names."""
    return tuple(names) == tuple(map(str, range(len(names))))


def normalize(name: str) -> str:
    """Normalizes a name: case, Unicode's composition, spaces, leading zeros.

    File systems compose letters in different ways (APFS and HFS+: Unicode's NFD).
    """
    name = ' '.join(unicodedata.normalize('NFC', name).casefold().split())
    return str(int(name)) if are_numbers([name]) else name


def match(names: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """Index in `known` of each of `names`, or None; both without duplicates.

    An equal name, or else the only one of the same normalized spelling among those that are left.
    """
    index = {name: i for i, name in enumerate(known)}
    indices = [index.get(name) for name in names]
    taken = set(indices)
    unmatched_known = {}
    for i, name in enumerate(known):
        if i not in taken:
            unmatched_known.setdefault(normalize(name), []).append(i)
    unmatched = {}
    for k, name in enumerate(names):
        if indices[k] is None:
            unmatched.setdefault(normalize(name), []).append(k)
    for spelling, places in unmatched.items():
        if len(places) == len(unmatched_known.get(spelling, ())) == 1:
            indices[places[0]] = unmatched_known[spelling][0]
    return indices


def first_duplicate(names: Sequence[str]) -> str | None:
    """First name that occurs twice, or None."""
    once = set()
    return next((name for name in names if name in once or once.add(name)), None)


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Names of metrics and columns: classes that share a name have their number after it.

    ImageNet has two of the name 'crane', 134 and 517: 'crane (134)' and 'crane (517)'.
    """
    found = tuple(names)
    while first_duplicate(found) is not None:
        counts = collections.Counter(found)
        found = tuple(f'{x} ({k})' if counts[x] > 1 else x for k, x in enumerate(found))
    return found


def join_names(names: Sequence[str]) -> str:
    """Joins names for a message; of many, the first few."""
    more = f' and {len(names) - MOST_LISTED} more' if len(names) > MOST_LISTED else ''
    return ', '.join(names[:MOST_LISTED]) + more


def label_table(
    names: Sequence[str], classes: Sequence[str], title: str, whose: str = "the model's"
) -> np.ndarray | None:
    """Maps labels of class `names` to those of `classes`: int32 [len(names)], or None.

    None: they are the same, or one of both has no names (0, 1, 2, ...), so that numbers decide.
    `names` may lack some classes. Raises UserError for other classes, or a name that occurs twice.
    """
    if tuple(names) == tuple(classes):
        return None
    if are_indices(names) and (are_indices(classes) or not are_numbers(classes)):
        if not are_indices(classes):
            print_once(f'{title} has no names of classes: its labels are compared by number')
        return None
    numbers = are_numbers(names)
    duplicate = first_duplicate(names) or first_duplicate(classes)
    indices = [None] if duplicate else match(names, classes)
    if None not in indices:
        report_mapping(names, classes, indices, title, whose)
        return np.array(indices, np.int32)
    if are_indices(classes) and (not numbers or len(names) == len(classes)):
        partial = len(names) < len(classes)
        doubt = f', though it has {len(names)} classes of {len(classes)}' if partial else ''
        print_once(
            f'{whose} classes have no names: labels of {title} are compared by number{doubt}'
        )
        return None
    advice = 'source.labels=by_number takes labels by their numbers'
    if duplicate:
        raise UserError(
            f'classes of {title} are not numbered as {whose}, and names do not tell which is '
            f'which: {duplicate!r} occurs twice; {advice}'
        )
    unknown = [name for name, i in zip(names, indices, strict=True) if i is None]
    unused = [name for i, name in enumerate(classes) if i not in set(indices)]
    lacking = f'; of {whose}, it lacks {join_names(unused)}' if unused else ''
    raise UserError(
        f'{title} has classes that are not {whose}: {join_names(unknown)}{lacking}. Labels are '
        f'compared by name; {advice}'
    )


def report_mapping(
    names: Sequence[str], classes: Sequence[str], found: Sequence[int], title: str, whose: str
) -> None:
    """Reports in one line how names and numbers differ."""
    kinds = []
    if len(names) < len(classes):
        kinds.append(f'{len(names)} of them')
    if found != sorted(found):
        k = next(k for k, i in enumerate(found) if k != i)
        kinds.append(f'in another order, label {k} ({names[k]}) being {found[k]}')
    other = [(a, classes[i]) for a, i in zip(names, found, strict=True) if a != classes[i]]
    if other:
        kinds.append(f'spelled otherwise, {other[0][0]!r} for {other[0][1]!r}')
    print_once(f'{title} has {whose} {len(classes)} classes, {", ".join(kinds)}: mapped by name')


def relabel(
    source: Any, classes: Sequence[str], title: str, whose: str = "the model's"
) -> Any:
    """A Source with the labels of `classes`, and their names if they have any."""
    kind, by, stuff = type(source), source.labels, source.stuff
    labels = None if by == 'by_number' else label_table(source.classes, classes, title, whose)
    if labels is not None:
        return kind(Relabelled(source.records, labels), tuple(classes), by, stuff)
    if are_indices(classes) or len(source.classes) > len(classes):
        return source
    return kind(source.records, tuple(classes), by, stuff)


class Relabelled:
    """Records in which label k is replaced by `labels[k]`, int32 [K]."""

    def __init__(self, records: Any, labels: np.ndarray):
        self.records, self.labels = records, labels
        self.label_fields = getattr(records, 'label_fields', ('label',))
        self.max_labels = getattr(records, 'max_labels', None)
        self.parts = getattr(records, 'parts', None)  # of a mixture, for the pipeline's order

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Any:
        return translate_record(self.records[i], self.labels, self.label_fields)

    def traits(self) -> facts.Traits:
        """See `facts`."""
        own = facts.traits(self.records)
        return own._replace(order=[self.labels, *own.order])

    def name(self, i: int) -> str:
        """Name of example i."""
        return self.records.name(i)


def translate_record(record: Any, labels: np.ndarray, fields: Sequence[str]) -> Any:
    """A record with the numbers of classes in some of its fields mapped by a table.

    The table is in its field `TABLE`, for masks whose pixels are numbers of classes.
    """
    table = translate(record[TABLE], labels) if TABLE in record else labels
    return record | {TABLE: table} | {
        name: translate(np.asarray(record[name], np.int32), labels) for name in fields
    }


def translate(label: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """Maps labels by a table (None: no change); labels out of range stay out of range."""
    if labels is None:
        return label
    inside = (label >= 0) & (label < len(labels))
    outside = np.where(label < 0, label, np.iinfo(np.int32).max)
    return np.where(inside, labels[np.where(inside, label, 0)], outside).astype(np.int32)


def pad_labels(labels: Sequence[int] | np.ndarray, most: int) -> int | np.ndarray:
    """The only label if `most` is 1; else int32 [most], padded with -1."""
    if most == 1:
        return int(labels[0])
    found = np.full(most, -1, np.int32)
    found[: len(labels)] = labels
    return found
