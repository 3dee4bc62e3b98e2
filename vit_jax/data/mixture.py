"""Several data sets as one; a batch takes examples from each by its weight."""

import bisect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vit_jax.data import sources
from vit_jax.data.readers import facts, names
from vit_jax.errors import UserError
from vit_jax.io.text import printable


class Part(NamedTuple):
    """A data set in a mixture; it has the mixture's examples offset ... offset + length - 1."""

    offset: int
    length: int
    weight: float
    records: Any
    labels: Any  # int32 [classes]: maps its labels to those of the mixture; None: the same


class Mixture:
    """The records of all parts, concatenated; order.example_ids applies the weights."""

    def __init__(self, parts: Sequence[Part], max_labels: int) -> None:
        self.parts, self.max_labels = parts, max_labels
        self.offsets = [part.offset for part in parts]

    def __len__(self) -> int:
        return self.parts[-1].offset + self.parts[-1].length

    def traits(self) -> facts.Traits:
        """See `readers.facts`."""
        order, contents, sample = [], [], []
        for part in self.parts:
            own = facts.traits(part.records)
            labels = [] if part.labels is None else [part.labels]
            order += [str((part.length, part.weight)), *labels, *own.order]
            contents += own.contents
            sample += own.sample
        return facts.Traits(order, contents, sample)

    def find(self, i: int) -> tuple[Part, int]:
        """Returns the part of example i and its index there."""
        part = self.parts[bisect.bisect_right(self.offsets, i) - 1]
        return part, i - part.offset

    def __getitem__(self, i: int) -> dict[str, Any]:
        part, k = self.find(i)
        record = part.records[k]
        fields = getattr(part.records, 'label_fields', ('label',))
        if part.labels is not None:
            record = names.translate_record(record, part.labels, fields)
        if 'label' not in fields:
            return record
        label = np.asarray(record['label'], np.int32).ravel()
        return record | {'label': names.pad_labels(label, self.max_labels)}

    def name(self, i: int) -> str:
        """Names example i for messages."""
        part, k = self.find(i)
        return part.records.name(k)


def load(*, mixture: dict | None = None, **source: Any) -> sources.Source:
    """Opens one data set, as `sources.load` does, or several as one.

    The classes are those of all parts. Classes of the same name are one class; a part with
    `labels='by_number'` has the classes of the others. Where a part has several labels per example,
    all examples have as many, padded with -1.

    Args:
      mixture: {name: dict of the keys of a data set and `weight`}, in place of all other keys.
    """
    if mixture is None:
        return sources.load(**source)
    weights = {name: part['weight'] for name, part in mixture.items()}
    loaded = {
        name: sources.load(**{k: v for k, v in part.items() if k != 'weight'})
        for name, part in mixture.items()
    }
    classes = all_classes(loaded)
    parts, offset, most = [], 0, 1
    for name, source in loaded.items():
        if not len(source):
            raise UserError(f'data set {name} of the mixture is empty')
        labels = None
        if source.labels == 'by_name':
            labels = np.array(names.match(source.classes, classes), np.int32)
            labels = None if np.array_equal(labels, np.arange(len(labels))) else labels
        parts.append(Part(offset, len(source), weights[name], source.records, labels))
        offset += len(source)
        most = max(most, getattr(source.records, 'max_labels', None) or 1)
    numbered = all(source.labels == 'by_number' for source in loaded.values())
    stuff = tuple(dict.fromkeys(name for source in loaded.values() for name in source.stuff))
    by = 'by_number' if numbered else 'by_name'
    return sources.Source(Mixture(parts, most), classes, by, stuff)


def all_classes(loaded: Mapping[str, sources.Source]) -> tuple[str, ...]:
    """Merges the class names of all parts {name: Source}.

    Raises UserError if they do not identify classes. A part with labels by number has the classes
    of the others, or of the part with the most.
    """
    named = {k: source.classes for k, source in loaded.items() if source.labels == 'by_name'}
    if not named:
        return max((source.classes for source in loaded.values()), key=len)
    classes = []
    bare = [k for k, own in named.items() if names.are_indices(own)]
    for name, own in named.items():
        if twice := names.first_duplicate(own):
            raise UserError(f'data set {name} of the mixture has a class {twice!r} twice')
        if 0 < len(bare) < len(named):
            raise UserError(
                f'data set {bare[0]} of the mixture has no names of classes, others have; '
                'labels=by_number in its section says that its numbers are theirs'
            )
        places = names.match(own, classes)
        classes += [own[k] for k, i in enumerate(places) if i is None]
    for name, source in loaded.items():
        if source.labels == 'by_number' and len(source.classes) > len(classes):
            raise UserError(
                f'data set {name} of the mixture has {len(source.classes)} classes by number, '
                f'the others {len(classes)}'
            )
    return tuple(classes)


def title(source: Mapping[str, Any] | ConfigDict) -> str:
    """Names the data set of a config's section for messages, in one line."""
    names = ' + '.join(source['mixture']) if 'mixture' in source else source['name']
    return printable(names)
