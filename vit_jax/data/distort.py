"""Augmentations of a resized image: (uint8 [H, W, 3], rng, settings) -> uint8 [H, W, 3].

They draw all random numbers from `rng` (numpy.random.Generator) and do not modify their input.
"""

from functools import partial
from typing import Annotated, Literal

import numpy as np

from vit_jax.data import operations as ops
from vit_jax.data.randaugment import autoaugment, randaugment, randaugment_torchvision
from vit_jax.data.randaugment_timm import randaugment_timm
from vit_jax.io.bounds import Interval, NonNegative, Positive, Range, Share

MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet's pixels in [0, 1]
STD = np.array([0.229, 0.224, 0.225], np.float32)


def preset(magnitude: float, mixup: float) -> dict:
    """Settings of RandAugment with two layers at a magnitude, and of mixup with an alpha."""
    augment = (dict(name='randaugment', layers=2, magnitude=magnitude),)
    return dict(augment=augment, mixup=mixup)


# The AugReg presets (arXiv:2106.10270 section 3.3; big_vision, configs/vit_i1k.py), as values of
# data.augment and objective.mixup. Magnitude 0 changes the image, too, see `randaugment`.
AUGREG = {
    'none': dict(augment=(), mixup=0.0),
    'light1': preset(0, 0.0),
    'light2': preset(10, 0.2),
    'medium1': preset(15, 0.2),
    'medium2': preset(15, 0.5),
    'strong1': preset(20, 0.5),
    'strong2': preset(20, 0.8),
}


def missed(rng: np.random.Generator, probability: float) -> bool:
    """Draws whether to leave an image as it is; draws nothing at probability 1."""
    return probability < 1 and rng.random() >= probability


def color_jitter(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    brightness: NonNegative[float] = 0.4,
    contrast: NonNegative[float] = 0.4,
    saturation: NonNegative[float] = 0.4,
    hue: Annotated[float, Range(0, 0.5)] = 0.0,
    probability: Share = 1.0,
) -> np.ndarray:
    """Changes brightness, contrast, saturation and hue at random, in a random order.

    The definition is that of torchvision.transforms.ColorJitter on a Pillow image.

    Args:
      brightness, contrast, saturation: the factor is uniform in [max(0, 1 - value), 1 + value].
      hue: the hue is rotated by a share of the colour circle, uniform in [-hue, hue].
      probability: probability that an image is changed.
    """
    if missed(rng, probability):
        return image
    strengths = {'Brightness': brightness, 'Contrast': contrast, 'Color': saturation}
    steps = [
        partial(ops.enhance, kind=kind, factor=rng.uniform(max(0, 1 - x), 1 + x))
        for kind, x in strengths.items()
        if x
    ]
    if hue:
        steps.append(partial(ops.hue, turn=rng.uniform(-hue, hue)))
    for i in rng.permutation(len(steps)):
        image = steps[i](image)
    return image


def photometric(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    brightness: NonNegative[float] = 32.0,
    contrast: Interval[NonNegative[float]] = (0.5, 1.5),
    saturation: Interval[NonNegative[float]] = (0.5, 1.5),
    hue: Annotated[float, Range(0, 0.5)] = 0.1,
) -> np.ndarray:
    """Changes brightness, contrast, saturation and hue, each with probability 1/2.

    The photometric distortion of SSD (arXiv:1512.02325 section 2.2) as mmsegmentation has it
    (PhotoMetricDistortion): contrast is about black, and with probability 1/2 comes last instead
    of second; values are clipped and truncated after each step. Hues have Pillow's 256 steps, and
    not the 180 of OpenCV.

    Args:
      brightness: grey levels are added, uniform in [-brightness, brightness].
      contrast: the factor of all values is uniform in this range.
      saturation: the factor of the saturation (of HSV) is uniform in this range.
      hue: the hue is rotated by a share of the colour circle, uniform in [-hue, hue].
    """
    chosen = rng.integers(2, size=5)
    added = rng.uniform(-brightness, brightness) if chosen[0] else 0.0
    factor = rng.uniform(*contrast) if chosen[1] else 1.0
    vivid = rng.uniform(*saturation) if chosen[2] else 1.0
    turn = rng.uniform(-hue, hue) if chosen[3] else 0.0
    image = ops.scale_values(image, 1.0, added)
    if chosen[4]:
        return ops.scale_values(ops.hue_saturation(image, turn, vivid), factor, 0.0)
    return ops.hue_saturation(ops.scale_values(image, factor, 0.0), turn, vivid)


def three_augment(
    image: np.ndarray, rng: np.random.Generator, *, jitter: NonNegative[float] = 0.3
) -> np.ndarray:
    """Converts to greyscale, solarises or blurs, then jitters colours (3-Augment).

    One of the three is always applied, each with probability 1/3: greyscale, solarisation from 128
    on, or a Gaussian blur of radius in [0.1, 2] (arXiv:2204.07118 section 3 and its code).

    Args:
      jitter: brightness, contrast and saturation of the `color_jitter` that follows.
    """
    kind = rng.integers(3)
    if kind == 0:
        image = ops.greyscale(image)
    elif kind == 1:
        image = ops.solarize(image, 128)
    else:
        image = ops.blur(image, rng.uniform(0.1, 2.0))
    return color_jitter(image, rng, brightness=jitter, contrast=jitter, saturation=jitter)


def greyscale(
    image: np.ndarray, rng: np.random.Generator, *, probability: Share = 0.2
) -> np.ndarray:
    """Converts to grey (Pillow's luma).

    Args:
      probability: probability that an image is changed.
    """
    return image if missed(rng, probability) else ops.greyscale(image)


def blur(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    probability: Share = 0.5,
    radius: Interval[Positive[float]] = (0.1, 2.0),
) -> np.ndarray:
    """Gaussian blur, as Pillow approximates it.

    Args:
      probability: probability that an image is changed.
      radius: the standard deviation in pixels is uniform in this range.
    """
    return image if missed(rng, probability) else ops.blur(image, rng.uniform(*radius))


def solarize(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    probability: Share = 0.2,
    threshold: Annotated[int, Range(0, 256)] = 128,
) -> np.ndarray:
    """Inverts values that are not below a threshold.

    Args:
      probability: probability that an image is changed.
      threshold: the least value that is inverted.
    """
    return image if missed(rng, probability) else ops.solarize(image, threshold)


def erase(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    probability: Share = 0.25,
    area: Interval[Share] = (0.02, 1 / 3),
    aspect: Interval[Positive[float]] = (0.3, 10 / 3),
    fill: Literal['noise', 'mean', 'black'] = 'noise',
) -> np.ndarray:
    """Fills a random box of the image (random erasing, arXiv:1708.04896).

    The box is drawn up to ten times, until it is smaller than the image both ways.

    Args:
      probability: probability that an image is changed.
      area: the box's share of the image's area is uniform in this range.
      aspect: the box's height / width is log-uniform in this range.
      fill: content of the box: black, ImageNet's mean colour, or noise of ImageNet's mean and
        standard deviation by pixel and channel (timm's mode 'pixel').
    """
    if missed(rng, probability):
        return image
    height, width = image.shape[:2]
    for _ in range(10):
        pixels = rng.uniform(*area) * height * width
        ratio = np.exp(rng.uniform(*np.log(aspect)))
        h, w = round((pixels * ratio) ** 0.5), round((pixels / ratio) ** 0.5)
        if h < height and w < width:
            y, x = rng.integers(height - h + 1), rng.integers(width - w + 1)
            out = image.copy()
            out[y : y + h, x : x + w] = _filling(h, w, rng, fill)
            return out
    return image


def _filling(h, w, rng, fill):
    """Content of a box of h x w for `erase`: uint8 [h, w, 3], or one colour."""
    if fill == 'black':
        return 0
    noise = rng.standard_normal((h, w, 3), np.float32) if fill == 'noise' else 0
    return np.clip(np.rint(255 * (MEAN + STD * noise)), 0, 255).astype(np.uint8)


AUGMENTATIONS = {
    f.__name__: f
    for f in (
        randaugment, randaugment_torchvision, randaugment_timm, autoaugment, three_augment,
        color_jitter, photometric, greyscale, blur, solarize, erase,
    )
}  # fmt: skip
# Some of their operations move pixels.
MOVING = ('randaugment', 'randaugment_torchvision', 'randaugment_timm', 'autoaugment')
