"""RandAugment as timm has it: magnitudes that are drawn, and operations that not all images get.

Its signature is that of distort.AUGMENTATIONS: (uint8 [H, W, 3], rng, settings) -> same. Numbers
are those of timm/data/auto_augment.py with `inc1`, where a level from 0 to 10 always strengthens an
operation.
"""

from functools import partial

import numpy as np
from PIL import Image

from vit_jax.data import operations as ops
from vit_jax.data.randaugment import Layers
from vit_jax.io.bounds import NonNegative, Share

FILL = (124, 116, 104)  # ImageNet's mean colour, as bytes
METHOD = Image.Resampling.BICUBIC  # DeiT's: --train-interpolation bicubic


def affine(image: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
    """Warps the image by Pillow: output (x, y) is the input at (a x + b y + c, d x + e y + f)."""
    picture, kind = Image.fromarray(image), Image.Transform.AFFINE
    return np.asarray(picture.transform(picture.size, kind, matrix, METHOD, fillcolor=FILL))


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates the image about its centre by Pillow."""
    return np.asarray(Image.fromarray(image).rotate(degrees, METHOD, fillcolor=FILL))


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the upper `bits` of each value; none at 0."""
    return image & np.uint8(256 - 2 ** (8 - bits))


# Functions from a level to an operation's argument.


def _either(top):
    """Maps a level to level / 10 * top, with a random sign."""
    return lambda level, rng, shape: level / 10 * top * (1 if rng.integers(2) else -1)


def _pixels(axis):
    """Maps a level to pixels, up to 0.45 of the image, with a random sign."""
    return lambda level, rng, shape: _either(0.45)(level, rng, shape) * shape[axis]


def _factor(level, rng, shape):
    """Maps a level to an enhancement factor: 1 +- up to 0.9."""
    return max(0.1, 1 + _either(0.9)(level, rng, shape))


TIMM = {
    'AutoContrast': (partial(ops.autocontrast, dtype=np.float64), None),
    'Equalize': (ops.equalize, None),
    'Invert': (ops.invert, None),
    'Rotate': (rotate, _either(30.0)),
    'Posterize': (posterize, lambda level, rng, shape: 4 - int(level / 10 * 4)),
    'Solarize': (ops.solarize, lambda level, rng, shape: 256 - int(level / 10 * 256)),
    'SolarizeAdd': (ops.solarize_add, lambda level, rng, shape: int(level / 10 * 110)),
    'Color': (lambda image, x: ops.enhance(image, 'Color', x), _factor),
    'Contrast': (lambda image, x: ops.enhance(image, 'Contrast', x), _factor),
    'Brightness': (lambda image, x: ops.enhance(image, 'Brightness', x), _factor),
    'Sharpness': (lambda image, x: ops.enhance(image, 'Sharpness', x), _factor),
    'ShearX': (lambda image, slope: affine(image, (1, slope, 0, 0, 1, 0)), _either(0.3)),
    'ShearY': (lambda image, slope: affine(image, (1, 0, 0, slope, 1, 0)), _either(0.3)),
    'TranslateX': (lambda image, x: affine(image, (1, 0, x, 0, 1, 0)), _pixels(1)),
    'TranslateY': (lambda image, y: affine(image, (1, 0, 0, 0, 1, y)), _pixels(0)),
}


def randaugment_timm(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    layers: Layers = 2,
    magnitude: NonNegative[float] = 9,
    deviation: NonNegative[float] = 0.5,
    probability: Share = 0.5,
) -> np.ndarray:
    """Applies random operations, drawn with replacement from 15, each with a probability.

    The defaults are timm's `rand-m9-mstd0.5-inc1` as DeiT, MAE and later papers have it: warps are
    bicubic and fill with ImageNet's mean colour.

    Args:
      layers: operations that are drawn for an image.
      magnitude: mean of the level of an operation, which is clipped to [0, 10].
      deviation: standard deviation of the level, which is normal.
      probability: probability that a drawn operation is applied.
    """
    names = list(TIMM)
    for i in rng.integers(len(names), size=layers):
        if rng.random() >= probability:
            continue
        operation, argument = TIMM[names[i]]
        level = min(max(rng.normal(magnitude, deviation), 0.0), 10.0)
        given = () if argument is None else (argument(level, rng, image.shape),)
        image = operation(image, *given)
    return image
