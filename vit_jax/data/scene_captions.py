"""Captions of fashion_scenes, made of its boxes: "a sneaker above a bag"; some pairs are held out.

A data set is named scene_captions:SHARE. Of the pairs of classes that share, chosen by a hash of
their names, is held out: the split train has no scene whose caption has such a pair, `unseen` are
the test scenes that have one, `seen` the others of the test scenes and `test` both.

A caption says where the largest article of a scene is to the second largest, by their boxes; a
second one says it from the other side. The class of a scene is its first caption.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_jax.data.readers import facts, shares, tfds
from vit_jax.data.readers.record import Record
from vit_jax.errors import UserError, check_choice

SPLITS = ('train', 'test', 'seen', 'unseen')
FORM = re.compile(r'scene_captions:(0|0?\.\d{1,6}|1)')
# [the second is further right or down][across or down]: where the first one is
RELATIONS = (('right of', 'below'), ('left of', 'above'))
SCENES = 'fashion_scenes'


class Scenes:
    """Records of scenes with `captions`, a list, and `label`."""

    label_fields = ('label',)

    def __init__(
        self, records: Any, indices: Sequence[int], captions: Sequence[list[str]],
        labels: Sequence[int],
    ):  # fmt: skip
        self.records, self.indices = records, indices
        self.captions, self.labels = captions, labels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Record:
        record = self.records[self.indices[i]]
        return record | {'captions': self.captions[i], 'label': self.labels[i]}

    def traits(self) -> facts.Traits:
        """See `readers.facts`."""
        own = facts.traits(self.records)
        order = [np.array(self.indices), *itertools.chain(*self.captions), *own.order]
        return own._replace(order=order)

    def name(self, i: int) -> str:
        """Data set, split and index of example i there."""
        return self.records.name(self.indices[i])


def load(name: str, part: str, data_dir: str | None) -> tuple[Scenes, tuple[str, ...]]:
    """(records, all captions that a scene may have, in order) of a split; raises UserError."""
    found = FORM.fullmatch(name)
    if not found:
        raise UserError(f'{name} is not scene_captions:SHARE with a share such as 0.2')
    check_choice(f'split of {name}', part, SPLITS)
    scenes = 'train' if part == 'train' else 'test'
    records, classes = tfds.load(SCENES, scenes, data_dir=data_dir, label='objects/label')
    words = [word_of(one) for one in classes]
    all_captions = captions_of_classes(words)
    number = {caption: k for k, caption in enumerate(all_captions)}
    chosen, texts = [], []
    for i in range(len(records)):
        record = records[i]
        labels = np.asarray(record['objects/label'])
        order = largest(record['objects/bbox'])
        pair = [words[labels[k]] for k in order]
        unseen = is_held_out(pair, float(found[1]))
        if part == 'test' or unseen == (part == 'unseen'):
            chosen.append(i)
            texts.append(captions_of(pair, np.asarray(record['objects/bbox'])[order]))
    if not chosen:
        raise UserError(f'{name} has no scenes in split {part}: another share holds out others')
    return Scenes(records, chosen, texts, [number[own[0]] for own in texts]), all_captions


def word_of(name: str) -> str:
    """The word for a class: 't-shirt' for 'T-shirt/top'."""
    return name.partition('/')[0].lower()


def with_article(word: str) -> str:
    """'a bag', 'an ankle boot'."""
    return f'{"an" if word[0] in "aeiou" else "a"} {word}'


def largest(boxes: np.ndarray) -> np.ndarray:
    """Indices of the two largest of boxes [N, 4] (y0, x0, y1, x1), or of the only one."""
    boxes = np.asarray(boxes, np.float64)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return np.argsort(-areas, kind='stable')[:2]


def captions_of(words: Sequence[str], boxes: np.ndarray) -> list[str]:
    """The captions of one or two articles with boxes (y0, x0, y1, x1)."""
    if len(words) == 1:
        return [with_article(words[0])]
    apart = (boxes[1, :2] + boxes[1, 2:]) - (boxes[0, :2] + boxes[0, 2:])  # twice (down, right)
    down = bool(abs(apart[0]) >= abs(apart[1]))
    after = bool(apart[0 if down else 1] >= 0)
    first, second = map(with_article, words)
    return [
        f'{first} {RELATIONS[after][down]} {second}',
        f'{second} {RELATIONS[not after][down]} {first}',
    ]


def captions_of_classes(words: Sequence[str]) -> tuple[str, ...]:
    """All captions of articles, those of one article first."""
    single = [with_article(word) for word in words]
    relations = [relation for pair in RELATIONS for relation in pair]
    pairs = itertools.product(single, relations, single)
    return (*single, *(' '.join(parts) for parts in pairs))


def is_held_out(words: Sequence[str], share: float) -> bool:
    """Whether a pair of articles is held out, in either order; one article is not."""
    return len(words) == 2 and shares.percentile(' and '.join(sorted(words))) < 100 * share
