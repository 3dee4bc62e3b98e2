"""Augmentations by random operations from a table: RandAugment and AutoAugment.

Their signature is that of distort.AUGMENTATIONS: (uint8 [H, W, 3], rng, settings) -> same.
"""

from functools import partial
from typing import Annotated

import numpy as np

from vit_jax.data import operations as ops
from vit_jax.errors import UserError
from vit_jax.io.bounds import NonNegative, Range

Layers = Annotated[int, Range(0, 1000)]

# Functions from a level to an operation's arguments; `top` sets the value at level 10.


def _no_arguments(image, rng, level, top):
    return ()


def _integer(image, rng, level, top):
    return (int(level / 10 * top),)


def _factor(image, rng, level, top):
    return (level / 10 * top + 0.1,)


def _signed(image, rng, level, top):
    value = level / 10 * top
    return (value if rng.integers(2) else -value,)


def _byte(image, rng, level, top):
    # The papers' code compares bytes with int(25.6 level), which wraps around: 0 at level 10.
    return (int(level / 10 * top) % 256,)


def _position(image, rng, level, top):
    return (*map(int, rng.integers(image.shape[:2])), int(level / 10 * top))


# The level functions of the TPU EfficientNet code (big_vision, pp/autoaugment.py).
RANDAUGMENT = {
    'AutoContrast': (ops.autocontrast, _no_arguments, 0),
    'Equalize': (ops.equalize, _no_arguments, 0),
    'Invert': (ops.invert, _no_arguments, 0),
    'Rotate': (ops.rotate, _signed, 30),
    'Posterize': (ops.posterize, _integer, 4),
    'Solarize': (ops.solarize, _byte, 256),
    'Color': (ops.color, _factor, 1.8),
    'Contrast': (ops.contrast, _factor, 1.8),
    'Brightness': (ops.brightness, _factor, 1.8),
    'Sharpness': (ops.sharpness, _factor, 1.8),
    'ShearX': (ops.shear_x, _signed, 0.3),
    'ShearY': (ops.shear_y, _signed, 0.3),
    'TranslateX': (ops.translate_x, _signed, 100),
    'TranslateY': (ops.translate_y, _signed, 100),
    'Cutout': (ops.cutout, _position, 40),
    'SolarizeAdd': (ops.solarize_add, _integer, 110),
}
AUTOAUGMENT = RANDAUGMENT | {
    'TranslateX': (ops.translate_x, _signed, 250),
    'TranslateY': (ops.translate_y, _signed, 250),
    'Cutout': (ops.cutout, _position, 100),
}

# Pairs of (operation, probability, level): policy v0 of that code.
POLICIES = (
    (('Equalize', 0.8, 1), ('ShearY', 0.8, 4)),
    (('Color', 0.4, 9), ('Equalize', 0.6, 3)),
    (('Color', 0.4, 1), ('Rotate', 0.6, 8)),
    (('Solarize', 0.8, 3), ('Equalize', 0.4, 7)),
    (('Solarize', 0.4, 2), ('Solarize', 0.6, 2)),
    (('Color', 0.2, 0), ('Equalize', 0.8, 8)),
    (('Equalize', 0.4, 8), ('SolarizeAdd', 0.8, 3)),
    (('ShearX', 0.2, 9), ('Rotate', 0.6, 8)),
    (('Color', 0.6, 1), ('Equalize', 1.0, 2)),
    (('Invert', 0.4, 9), ('Rotate', 0.6, 0)),
    (('Equalize', 1.0, 9), ('ShearY', 0.6, 3)),
    (('Color', 0.4, 7), ('Equalize', 0.6, 0)),
    (('Posterize', 0.4, 6), ('AutoContrast', 0.4, 7)),
    (('Solarize', 0.6, 8), ('Color', 0.6, 9)),
    (('Solarize', 0.2, 4), ('Rotate', 0.8, 9)),
    (('Rotate', 1.0, 7), ('TranslateY', 0.8, 9)),
    (('ShearX', 0.0, 0), ('Solarize', 0.8, 4)),
    (('ShearY', 0.8, 0), ('Color', 0.6, 4)),
    (('Color', 1.0, 0), ('Rotate', 0.6, 2)),
    (('Equalize', 0.8, 4), ('Equalize', 0.0, 8)),
    (('Equalize', 1.0, 4), ('AutoContrast', 0.6, 2)),
    (('ShearY', 0.4, 7), ('SolarizeAdd', 0.6, 7)),
    (('Posterize', 0.8, 2), ('Solarize', 0.6, 10)),
    (('Solarize', 0.6, 8), ('Equalize', 0.6, 1)),
    (('Color', 0.8, 6), ('Rotate', 0.4, 5)),
)


def operate(
    table: dict, name: str, image: np.ndarray, rng: np.random.Generator, level: float
) -> np.ndarray:
    """Applies an operation of a table at a level."""
    operation, arguments, top = table[name]
    return operation(image, *arguments(image, rng, level, top))


def randaugment(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    layers: Layers = 2,
    magnitude: NonNegative[float] = 10,
) -> np.ndarray:
    """Applies random operations, drawn with replacement from 16 (RandAugment, arXiv:1909.13719).

    This is the variant of the ViT papers' code: every drawn operation is applied; warps take the
    nearest pixel and fill with grey 128. A larger magnitude is not always a larger change:
    enhancements have the factor 0.1 + 0.18 * magnitude, so 0 is nearly black and 5 leaves the image
    as it is; posterizing keeps 0.4 * magnitude bits, and one bit from 22.5 on; solarizing has the
    threshold 25.6 * magnitude modulo 256, so 0, 10 and 20 invert the image (big_vision, issue 110).

    Args:
      layers: operations applied to an image.
      magnitude: strength of the operations.
    """
    names = list(RANDAUGMENT)
    for i in rng.integers(len(names), size=layers):
        image = operate(RANDAUGMENT, names[i], image, rng, magnitude)
    return image


def autoaugment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Applies one of 25 pairs of operations, each with its probability (arXiv:1805.09501).

    This is policy v0 of the TPU EfficientNet code, not that of the paper's table 9. Its levels are
    those of `randaugment`, but for translations of 25 pixels and cutouts of 10 pixels per level.
    """
    for name, probability, level in POLICIES[rng.integers(len(POLICIES))]:
        if rng.random() < probability:
            image = operate(AUTOAUGMENT, name, image, rng, level)
    return image


# torchvision.transforms.RandAugment: (operation, function from a share in [0, 1] to its magnitude).


def _either(top):
    """Maps a share to that share of `top`, with a random sign."""
    return lambda share, rng, shape: share * top * (1 if rng.integers(2) else -1)


def _pixels(axis):
    """Maps a share to whole pixels, up to 150/331 of the image, with a random sign."""
    return lambda share, rng, shape: int(_either(150 / 331 * shape[axis])(share, rng, shape))


def _around_one(share, rng, shape):
    """Maps a share to an enhancement factor: 1 +- up to 0.9."""
    return 1 + _either(0.9)(share, rng, shape)


TORCHVISION = {
    'Identity': (lambda image: image, None),
    'ShearX': (lambda image, slope: ops.pillow_affine(image, (1, slope, 0, 0, 1, 0)), _either(0.3)),
    'ShearY': (lambda image, slope: ops.pillow_affine(image, (1, 0, 0, slope, 1, 0)), _either(0.3)),
    'TranslateX': (lambda image, x: ops.pillow_affine(image, (1, 0, x, 0, 1, 0)), _pixels(1)),
    'TranslateY': (lambda image, y: ops.pillow_affine(image, (1, 0, 0, 0, 1, y)), _pixels(0)),
    'Rotate': (ops.pillow_rotate, _either(30.0)),
    'Brightness': (lambda image, x: ops.enhance(image, 'Brightness', x), _around_one),
    'Color': (lambda image, x: ops.enhance(image, 'Color', x), _around_one),
    'Contrast': (lambda image, x: ops.enhance(image, 'Contrast', x), _around_one),
    'Sharpness': (lambda image, x: ops.enhance(image, 'Sharpness', x), _around_one),
    'Posterize': (ops.posterize, lambda share, rng, shape: 8 - round(4 * share)),
    'Solarize': (ops.solarize, lambda share, rng, shape: int(np.ceil(255 * (1 - share)))),
    'AutoContrast': (partial(ops.autocontrast, dtype=np.float64), None),
    'Equalize': (ops.equalize, None),
}


def randaugment_torchvision(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    layers: Layers = 2,
    magnitude: NonNegative[int] = 9,
    bins: Annotated[int, Range(2, 65_536)] = 31,
) -> np.ndarray:
    """Applies random operations, drawn with replacement from 14, as torchvision's RandAugment does.

    The same as torchvision.transforms.RandAugment with its defaults on a Pillow image: nearest
    pixel, black fill, either sign with probability 1/2.

    Args:
      layers: operations applied to an image.
      magnitude: strength of the operations, from 0 to `bins` - 1.
      bins: number of magnitudes.
    """
    if magnitude >= bins:
        raise UserError(
            f'randaugment_torchvision: magnitude {magnitude} of {bins} bins; the highest is '
            f'{bins - 1}'
        )
    share = magnitude / (bins - 1)
    names = list(TORCHVISION)
    for i in rng.integers(len(names), size=layers):
        operation, argument = TORCHVISION[names[i]]
        image = operation(image, *(() if argument is None else [argument(share, rng, image.shape)]))
    return image
