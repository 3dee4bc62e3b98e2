"""Several data sets as one, of which a batch takes from each by its weight."""

import bisect
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data import facts, sources
from vit_jax.errors import UserError
from vit_jax.text import printable


class Part(NamedTuple):
    """A data set in a mixture: examples offset ... offset + length - 1 of it."""

    offset: int
    length: int
    weight: float
    records: Any
    labels: Any  # int32 [classes]: its labels to those of the mixture; None where they are the same


class Records:
    """The parts one after another; `order` of the pipeline knows of their weights."""

    def __init__(self, parts, max_labels):
        self.parts, self.max_labels = parts, max_labels
        self.offsets = [part.offset for part in parts]

    def __len__(self):
        return self.parts[-1].offset + self.parts[-1].length

    def traits(self):
        order, contents = [], []
        for part in self.parts:
            own = facts.traits(part.records)
            labels = [] if part.labels is None else [part.labels]
            order += [str((part.length, part.weight)), *labels, *own[0]]
            contents += own[1]
        return order, contents

    def find(self, i):
        part = self.parts[bisect.bisect_right(self.offsets, i) - 1]
        return part, i - part.offset

    def __getitem__(self, i):
        part, k = self.find(i)
        data, label = part.records[k]
        label = translated(np.asarray(label, np.int32), part.labels)
        if self.max_labels == 1:
            return data, label
        padded = np.full(self.max_labels, -1, np.int32)
        padded[: label.size] = label.ravel()
        return data, padded

    def name(self, i):
        part, k = self.find(i)
        return part.records.name(k)


def translated(label, labels):
    """Labels of a part as those of the mixture; what is out of range stays so."""
    if labels is None:
        return label
    inside = (label >= 0) & (label < len(labels))
    outside = np.where(label < 0, label, np.iinfo(np.int32).max)
    return np.where(inside, labels[np.where(inside, label, 0)], outside).astype(np.int32)


def load(*, mixture: dict | None = None, **source):
    """What `sources.load` takes, or `mixture`: {name: dict of that and `weight`}.

    Classes are those of all parts; what has the same name is one class. With a part of several
    labels an example, all have as many, padded with -1.
    """
    if mixture is None:
        return sources.load(**source)
    weights = {name: part['weight'] for name, part in mixture.items()}
    loaded = {
        name: sources.load(**{k: v for k, v in part.items() if k != 'weight'})
        for name, part in mixture.items()
    }
    classes = list(dict.fromkeys(c for source in loaded.values() for c in source.classes))
    number = {name: i for i, name in enumerate(classes)}
    parts, offset, most = [], 0, 1
    for name, source in loaded.items():
        if not len(source):
            raise UserError(f'data set {name} of the mixture is empty')
        labels = np.array([number[c] for c in source.classes], np.int32)
        same = np.array_equal(labels, np.arange(len(labels)))
        parts.append(
            Part(offset, len(source), weights[name], source.records, None if same else labels)
        )
        offset += len(source)
        most = max(most, getattr(source.records, 'max_labels', None) or 1)
    return sources.Source(Records(parts, most), tuple(classes))


def title(source):
    """What a person would call the data set of a config's section, in one line."""
    names = ' + '.join(source['mixture']) if 'mixture' in source else source['name']
    return printable(names)
