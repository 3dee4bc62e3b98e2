"""Synthetic images with many labels, like those of JFT; example i is a function of (seed, i).

A data set is named by all that determines it:

    jft_like:EXAMPLESxCLASSES[@SIZE][,seed=0][,max_labels=4][,cells=2][,grey=true][,test_examples=N]

Images of SIZE x SIZE pixels (224) are drawn when they are read; `python -m vit_jax.data.prepare
jft_like:100000x1000@32 DST` writes them to shards. The split test has a tenth as many examples as
train, unless stated.

A class is a pair of colours, a texture, its frequency and a shape. An image shows one object per
label on a cloudy background. The probability of class c is proportional to 1 / (c + 1), that of n
labels to 1 / n^2. No class depends on left and right, so a flip keeps the labels.
"""

import functools
import inspect
import io
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from PIL import Image

from vit_jax.data.readers import facts, names, splits
from vit_jax.data.readers.record import Record
from vit_jax.errors import UserError, check_choice
from vit_jax.io import bounds
from vit_jax.io.bounds import Positive, Range, Seed

COLOURS = {
    'red': (220, 30, 30), 'blue': (40, 60, 220), 'yellow': (245, 225, 40), 'green': (30, 150, 50),
    'magenta': (220, 50, 200), 'cyan': (40, 210, 220), 'orange': (245, 140, 20),
    'purple': (110, 40, 150), 'lime': (150, 235, 60), 'brown': (110, 65, 30),
    'white': (245, 245, 245), 'black': (20, 20, 20),
}  # fmt: skip
PAIRS = [(a, b) for a in range(len(COLOURS)) for b in range(len(COLOURS)) if a != b]
RGB = np.array(list(COLOURS.values()), np.float32)
SHAPES = ('disk', 'square', 'triangle', 'diamond', 'cross')
TEXTURES = ('rows', 'columns', 'checks', 'grid', 'dots', 'rings')
CYCLES = (2, 3, 4, 5, 6, 8, 10, 13)  # across an object
MOST_CLASSES = len(PAIRS) * len(SHAPES) * len(TEXTURES) * len(CYCLES)  # 31,680
MOST_LABELS = 16
GRAIN = 6  # standard deviation of the noise; it makes files as large as those of photos
QUALITY = 90  # of the JPEGs
SPLITS = ('train', 'test')
FORM = re.compile(r'jft_like:(\d{1,18})x(\d{1,9})(?:@(\d{1,4}))?((?:,\w+=[\w.-]{1,30})*)', re.ASCII)


def design(label: int) -> tuple[int, int, int, int]:
    """(colour pair, shape, texture, cycles) of a class, as indices; unique to each class.

    The first 132, the frequent ones, each have their own colours; shapes and textures vary in all.
    """
    rest, pair = divmod(label, len(PAIRS))
    rest, shape = divmod(rest, len(SHAPES))
    cycles, texture = divmod(rest, len(TEXTURES))
    return (
        pair,
        (shape + pair) % len(SHAPES),
        (texture + pair // 5 + shape) % len(TEXTURES),
        (cycles + pair // 7 + shape + texture) % len(CYCLES),
    )


def class_name(label: int) -> str:
    """Describes a class: 'red on blue checks, 4 across, in a disk'."""
    pair, shape, texture, cycles = design(label)
    a, b = (list(COLOURS)[colour] for colour in PAIRS[pair])
    return f'{a} on {b} {TEXTURES[texture]}, {CYCLES[cycles]} across, in a {SHAPES[shape]}'


def shape_mask(shape: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Mask of a shape: bool [h, w] for y [h, 1] and x [1, w] in [-1, 1]."""
    if shape == 'disk':
        return y * y + x * x <= 1
    if shape == 'square':
        return np.maximum(abs(y), abs(x)) <= 0.88
    if shape == 'triangle':
        return 2 * abs(x) <= y + 1
    if shape == 'diamond':
        return abs(y) + abs(x) <= 1
    return np.minimum(abs(y), abs(x)) <= 0.4  # a cross


def texture_mask(texture: str, y: np.ndarray, x: np.ndarray, cycles: int) -> np.ndarray:
    """Mask of the first colour of a texture, on about two thirds of the area: bool [h, w]."""
    sy, sx = np.sin(np.pi * cycles * y), np.sin(np.pi * cycles * x)
    if texture == 'rows':
        return np.broadcast_to(sy > -0.5, (len(y), x.shape[1]))
    if texture == 'columns':
        return np.broadcast_to(sx > -0.5, (len(y), x.shape[1]))
    if texture == 'checks':
        return sy * sx > -0.2
    if texture == 'grid':
        return np.minimum(sy, sx) > -0.8
    if texture == 'dots':
        return sy + sx < 0.6
    return np.sin(np.pi * cycles * np.sqrt(y * y + x * x)) > -0.5  # rings


@functools.cache
def noise(size: int) -> np.ndarray:
    """Noise that windows are cut from: int16 [2 size, 2 size, 1]."""
    return np.random.default_rng(0).normal(0, GRAIN, (2 * size, 2 * size, 1)).astype(np.int16)


def draw(
    rng: np.random.Generator, labels: Sequence[int], size: int, cells: int = 2
) -> np.ndarray:
    """Draws an image uint8 [size, size, 3] with an object per label; objects do not overlap.

    Each object has a cell of at least `cells` x `cells`, and fills 0.65 or more of the cell's side.
    """
    ground = rng.integers(70, 170, (6, 6, 1)) + rng.integers(-20, 20, (6, 6, 3))
    ground = ground.astype(np.uint8)
    image = np.array(Image.fromarray(ground).resize((size, size), Image.Resampling.BICUBIC))
    side = max(cells, int(np.ceil(np.sqrt(len(labels)))))
    cell = size / side
    order = rng.permutation(side * side)
    for label, position in zip(labels, order, strict=False):
        pair, shape, texture, cycles = design(int(label))
        extent = int(cell * rng.uniform(0.65, 1.0))
        top, left = (int(cell * k + rng.uniform(0, cell - extent)) for k in divmod(position, side))
        axis = np.linspace(-1, 1, extent, dtype=np.float32)
        y, x = axis[:, None], axis[None]
        shift = rng.uniform(0, 1, 2).astype(np.float32)
        first = texture_mask(TEXTURES[texture], y + shift[0], x + shift[1], CYCLES[cycles])
        colours = RGB[list(PAIRS[pair])] + rng.normal(0, 8, (2, 3))
        colours = np.clip(colours, 0, 255).astype(np.uint8)
        window = image[top : top + extent, left : left + extent]
        mask = np.broadcast_to(shape_mask(SHAPES[shape], y, x), first.shape)
        np.copyto(window, colours[np.where(first, 0, 1)], where=mask[..., None])
    top, left = rng.integers(0, size, 2)
    grain = noise(size)[top : top + size, left : left + size]
    return np.clip(image + grain, 0, 255).astype(np.uint8)


class Drawn:
    """Records {'image': JPEG bytes, 'label': ...} that are drawn when they are read.

    A label is int32 [max_labels], padded with -1, or an int where max_labels is 1.

    Args:
      examples: how many examples the split has.
      classes: how many classes the data set has.
      split: 'train' or 'test', whose examples differ.
      image_size: height and width in pixels.
      seed: what example i looks like.
      max_labels: most labels of an image. None: 4, or as many as there are classes.
      cells: least number of cells along a side, with one object in each.
      grey: whether images have shades of grey, in three channels, in place of colours.
    """

    def __init__(
        self,
        examples: Positive[int],
        classes: Annotated[int, Range(2, MOST_CLASSES)],
        *,
        split: str = 'train',
        image_size: Annotated[int, Range(8, 9999)] = 224,
        seed: Seed = 0,
        max_labels: Annotated[int, Range(1, MOST_LABELS)] | None = None,
        cells: Annotated[int, Range(1, 64)] = 2,
        grey: bool = False,
    ) -> None:
        max_labels = min(4, classes) if max_labels is None else max_labels
        if max_labels > classes:
            raise UserError(f'jft_like: {max_labels} labels of an image of {classes} classes')
        self.examples, self.classes, self.split = examples, classes, split
        self.image_size, self.seed, self.max_labels = image_size, seed, max_labels
        self.cells, self.grey = cells, grey
        shares = 1 / np.arange(1, classes + 1)
        self.class_cdf = np.cumsum(shares / shares.sum())
        counts = 1 / np.arange(1, max_labels + 1) ** 2
        self.count_cdf = np.cumsum(counts / counts.sum())

    def __len__(self) -> int:
        return self.examples

    def rng(self, i: int) -> np.random.Generator:
        """Generator that draws example i; raises IndexError."""
        if not 0 <= i < self.examples:
            raise IndexError(f'no example {i} among {self.examples}')
        return np.random.default_rng((self.seed, SPLITS.index(self.split), int(i)))

    def labels(self, rng: np.random.Generator) -> list[int]:
        """Draws 1 to max_labels different labels, the frequent ones more often."""
        count = 1 + int(np.searchsorted(self.count_cdf[:-1], rng.random(), side='right'))
        drawn = []
        while len(drawn) < count:
            label = int(np.searchsorted(self.class_cdf[:-1], rng.random(), side='right'))
            if label not in drawn:
                drawn.append(label)
        return drawn

    def __getitem__(self, i: int) -> Record:
        rng = self.rng(i)
        labels = self.labels(rng)
        image = Image.fromarray(draw(rng, labels, self.image_size, self.cells))
        if self.grey:
            image = image.convert('L').convert('RGB')
        out = io.BytesIO()
        image.save(out, 'JPEG', quality=QUALITY)
        label = names.pad_labels(labels, self.max_labels)
        return Record({'image': out.getvalue(), 'label': label})

    def traits(self) -> facts.Traits:
        """See `readers.facts`."""
        settings = (self.examples, self.classes, self.split, self.image_size, self.seed,
                    self.max_labels, QUALITY, self.cells, self.grey)  # fmt: skip
        return facts.Traits([str(settings)])

    def name(self, i: int) -> str:
        """Name of example i for messages."""
        return f'jft_like:{self.examples}x{self.classes}/{self.split}[{i}]'


def parse(name: str) -> dict[str, Any]:
    """Settings that a name states: arguments of `Drawn`, and test_examples. Raises UserError."""
    match = FORM.fullmatch(name)
    if not match:
        raise UserError(
            f'{name!r} is not of the form jft_like:EXAMPLESxCLASSES[@SIZE][,KEY=VALUE]...'
        )
    settings = {'examples': int(match[1]), 'classes': int(match[2])}
    if match[3]:
        settings['image_size'] = int(match[3])
    parameters = inspect.signature(Drawn).parameters
    annotations = {key: parameter.annotation for key, parameter in parameters.items()}
    annotations['test_examples'] = Positive[int]
    keys = [key for key in annotations if key not in ('split', 'examples', 'classes', 'image_size')]
    for setting in match[4].split(',')[1:]:
        key, _, text = setting.partition('=')
        check_choice('key of jft_like', key, keys)
        try:
            settings[key] = json.loads(text.lower())
        except ValueError:
            settings[key] = text
    for key, value in settings.items():
        bounds.check(f'{key} of {name}', value, annotations[key])
    return settings


def load(name: str, split: str) -> tuple[Drawn, tuple[str, ...]]:
    """(records, class names) of a split of the data set of that name; raises UserError."""
    settings = parse(name)
    if split not in SPLITS:
        raise splits.missing(name, split, SPLITS)
    tenth = max(1, min(settings['examples'] // 10, 50_000))
    test_examples = settings.pop('test_examples', tenth)
    if split == 'test':
        settings['examples'] = test_examples
    return Drawn(**settings, split=split), tuple(map(class_name, range(settings['classes'])))
