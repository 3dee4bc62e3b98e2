"""Label maps, masks and boxes over their images: what a look at a batch needs."""

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data import label_maps
from vit_jax.data.label_maps import BACKGROUND

STRENGTH = 0.55  # of a class's colour over the image
# Okabe and Ito's palette without black, distinct to colour-blind readers, see figures.style; then
# the same darker and lighter. Colours of more classes are not distinct to all.
PALETTE = ('E69F00', '56B4E9', '009E73', 'F0E442', '0072B2', 'D55E00', 'CC79A7')
SHADES = ((1.0, 0.0), (0.55, 0.0), (0.5, 0.5))  # factor, and share of white
TURN = 0.618034  # of the colour circle between two classes: any few in succession differ
GREY = 0.35  # brightness of ignored pixels


class Picture(NamedTuple):
    """An example as it is drawn.

    Attributes:
      image: uint8 [H, W, 3], with masks over it.
      boxes: float [n, 4], (x0, y0, x1, y1) in pixels.
      classes: class of each box.
    """

    image: np.ndarray
    boxes: np.ndarray = np.zeros((0, 4))
    classes: Sequence[int] = ()


def colour(number: int) -> tuple[float, float, float]:
    """The colour of a class, (red, green, blue) in [0, 1]."""
    shade, i = divmod(number, len(PALETTE))
    if shade >= len(SHADES):
        return colorsys.hsv_to_rgb(number * TURN % 1, 0.85 if number % 2 else 0.6, 1.0)
    factor, white = SHADES[shade]
    return tuple(factor * value / 255 + white for value in bytes.fromhex(PALETTE[i]))


def picture(
    example: Mapping[str, np.ndarray], names: Sequence[str], line: int = 1
) -> Picture:
    """Draws an example of `segment`, `panoptic` or `detect`.

    A class called background is not painted. Lines along the edges of masks have a width of `line`
    pixels.
    """
    image = example['image']
    clear = [k for k, name in enumerate(names) if name == BACKGROUND]
    if 'label_map' in example:
        return Picture(over_label_map(image, example['label_map'], clear, line))
    if 'segments' in example:
        return Picture(over_segments(image, example['segments'], example['labels'], clear, line))
    used = example['labels'] >= 0
    boxes, classes = example['boxes'][used], example['labels'][used].tolist()
    if 'masks' in example:
        for mask, number in zip(example['masks'][used], classes, strict=True):
            image = painted(image, mask > 0, colour(number), line)
    height, width = image.shape[:2]
    return Picture(image, boxes * [width, height, width, height], classes)


def over_label_map(
    image: np.ndarray, labels: np.ndarray, clear: Sequence[int], line: int = 1
) -> np.ndarray:
    """An image in the colours of its classes, but for `clear` ones; ignored pixels are dark."""
    ignored = labels == label_maps.ignored(labels.dtype)
    for number in np.setdiff1d(labels[~ignored], clear):
        image = painted(image, labels == number, colour(int(number)), line)
    return np.where(ignored[..., None], np.uint8(GREY * image), image)


def over_segments(
    image: np.ndarray, numbers: np.ndarray, labels: np.ndarray, clear: Sequence[int], line: int
) -> np.ndarray:
    """`over_label_map` of segments [H, W] with the classes `labels`, each with an edge."""
    for number in np.flatnonzero((labels >= 0) & ~np.isin(labels, clear)):
        image = painted(image, numbers == number, colour(int(labels[number])), line)
    void = numbers == label_maps.ignored(numbers.dtype)
    return np.where(void[..., None], np.uint8(GREY * image), image)


def painted(
    image: np.ndarray, mask: np.ndarray, rgb: tuple[float, float, float], line: int = 1
) -> np.ndarray:
    """An image with a colour over a mask, bool [H, W], and a stronger one along its edge."""
    inner = mask
    for _ in range(line):
        whole, inner = inner, inner.copy()
        for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
            inner &= np.roll(whole, step, axis)
    strength = np.where(mask, np.where(inner, STRENGTH, 1.0), 0.0)[..., None]
    return np.uint8(image * (1 - strength) + 255 * np.array(rgb) * strength)


def contents(example: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, Any]:
    """{class: share of the labelled pixels}, or {class: number of its objects}, the most first."""
    if 'label_map' in example:
        counts = label_maps.class_counts(example['label_map'])
        counts = counts / max(counts.sum(), 1)
    else:
        counts = np.bincount(example['labels'][example['labels'] >= 0], minlength=1)
    order = [k for k in np.argsort(-counts, kind='stable') if counts[k] > 0]
    return {names[k]: round(counts[k].item(), 4) for k in order}
