"""Augmentations of a resized image: (uint8 [H, W, 3], rng, settings) -> uint8 [H, W, 3].

They draw all random numbers from `rng` (numpy.random.Generator) and do not modify their input.
"""

from functools import partial
from typing import Annotated, Literal

import numpy as np

from vit_jax.data import operations as ops
from vit_jax.errors import UserError
from vit_jax.io.bounds import Interval, NonNegative, Positive, Range, Share

Layers = Annotated[int, Range(0, 1000)]
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet's pixels in [0, 1]
STD = np.array([0.229, 0.224, 0.225], np.float32)


def preset(magnitude, mixup):
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


# Functions from a level to an operation's arguments; `top` sets the value at level 10.


def nothing(image, rng, level, top):
    return ()


def whole(image, rng, level, top):
    return (int(level / 10 * top),)


def factor(image, rng, level, top):
    return (level / 10 * top + 0.1,)


def signed(image, rng, level, top):
    value = level / 10 * top
    return (value if rng.integers(2) else -value,)


def byte(image, rng, level, top):
    # The papers' code compares bytes with int(25.6 level), which wraps around: 0 at level 10.
    return (int(level / 10 * top) % 256,)


def anywhere(image, rng, level, top):
    return (*map(int, rng.integers(image.shape[:2])), int(level / 10 * top))


# The level functions of the TPU EfficientNet code (big_vision, pp/autoaugment.py).
RANDAUGMENT = {
    'AutoContrast': (ops.autocontrast, nothing, 0),
    'Equalize': (ops.equalize, nothing, 0),
    'Invert': (ops.invert, nothing, 0),
    'Rotate': (ops.rotate, signed, 30),
    'Posterize': (ops.posterize, whole, 4),
    'Solarize': (ops.solarize, byte, 256),
    'Color': (ops.color, factor, 1.8),
    'Contrast': (ops.contrast, factor, 1.8),
    'Brightness': (ops.brightness, factor, 1.8),
    'Sharpness': (ops.sharpness, factor, 1.8),
    'ShearX': (ops.shear_x, signed, 0.3),
    'ShearY': (ops.shear_y, signed, 0.3),
    'TranslateX': (ops.translate_x, signed, 100),
    'TranslateY': (ops.translate_y, signed, 100),
    'Cutout': (ops.cutout, anywhere, 40),
    'SolarizeAdd': (ops.solarize_add, whole, 110),
}
AUTOAUGMENT = RANDAUGMENT | {
    'TranslateX': (ops.translate_x, signed, 250),
    'TranslateY': (ops.translate_y, signed, 250),
    'Cutout': (ops.cutout, anywhere, 100),
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


def operate(table, name, image, rng, level):
    """Applies an operation of a table at a level."""
    operation, arguments, top = table[name]
    return operation(image, *arguments(image, rng, level, top))


def randaugment(image, rng, *, layers: Layers = 2, magnitude: NonNegative[float] = 10):
    """Applies random operations, drawn with replacement from 16 (RandAugment, arXiv:1909.13719).

    This is the variant of the ViT papers' code: every drawn operation is applied; warps take the
    nearest pixel and fill with grey 128. A larger magnitude is not always a larger change:
    enhancements have the factor 0.1 + 0.18 * magnitude, so 0 is nearly black and 5 leaves the image
    as it is; posterizing keeps 0.4 * magnitude bits; solarizing has the threshold 25.6 * magnitude
    modulo 256, so 0, 10 and 20 invert the image (big_vision, issue 110).

    Args:
      layers: operations applied to an image.
      magnitude: strength of the operations.
    """
    names = list(RANDAUGMENT)
    for i in rng.integers(len(names), size=layers):
        image = operate(RANDAUGMENT, names[i], image, rng, magnitude)
    return image


def autoaugment(image, rng):
    """Applies one of 25 pairs of operations, each with its probability (arXiv:1805.09501).

    This is policy v0 of the TPU EfficientNet code, not that of the paper's table 9. Its levels are
    those of `randaugment`, but for translations of 25 pixels and cutouts of 10 pixels per level.
    """
    for name, probability, level in POLICIES[rng.integers(len(POLICIES))]:
        if rng.random() < probability:
            image = operate(AUTOAUGMENT, name, image, rng, level)
    return image


# torchvision.transforms.RandAugment: (operation, function from a share in [0, 1] to its magnitude).


def either(top):
    """Maps a share to that share of `top`, with a random sign."""
    return lambda share, rng, shape: share * top * (1 if rng.integers(2) else -1)


def pixels(axis):
    """Maps a share to whole pixels, up to 150/331 of the image, with a random sign."""
    return lambda share, rng, shape: int(either(150 / 331 * shape[axis])(share, rng, shape))


def around_one(share, rng, shape):
    """Maps a share to an enhancement factor: 1 +- up to 0.9."""
    return 1 + either(0.9)(share, rng, shape)


TORCHVISION = {
    'Identity': (lambda image: image, None),
    'ShearX': (partial(ops.shear_x, centre=0, fill=0), either(0.3)),
    'ShearY': (partial(ops.shear_y, centre=0, fill=0), either(0.3)),
    'TranslateX': (partial(ops.translate_x, fill=0), pixels(1)),
    'TranslateY': (partial(ops.translate_y, fill=0), pixels(0)),
    'Rotate': (partial(ops.rotate, fill=0), either(30.0)),
    'Brightness': (lambda image, x: ops.enhance(image, 'Brightness', x), around_one),
    'Color': (lambda image, x: ops.enhance(image, 'Color', x), around_one),
    'Contrast': (lambda image, x: ops.enhance(image, 'Contrast', x), around_one),
    'Sharpness': (lambda image, x: ops.enhance(image, 'Sharpness', x), around_one),
    'Posterize': (ops.posterize, lambda share, rng, shape: 8 - round(4 * share)),
    'Solarize': (ops.solarize, lambda share, rng, shape: int(np.ceil(255 * (1 - share)))),
    'AutoContrast': (partial(ops.autocontrast, dtype=np.float64), None),
    'Equalize': (ops.equalize, None),
}


def randaugment_torchvision(
    image,
    rng,
    *,
    layers: Layers = 2,
    magnitude: NonNegative[int] = 9,
    bins: Annotated[int, Range(2, 65_536)] = 31,
):
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


def color_jitter(
    image,
    rng,
    *,
    brightness: NonNegative[float] = 0.4,
    contrast: NonNegative[float] = 0.4,
    saturation: NonNegative[float] = 0.4,
    hue: Annotated[float, Range(0, 0.5)] = 0.0,
):
    """Changes brightness, contrast, saturation and hue at random, in a random order.

    The definition is that of torchvision.transforms.ColorJitter on a Pillow image.

    Args:
      brightness, contrast, saturation: the factor is uniform in [max(0, 1 - value), 1 + value].
      hue: the hue is rotated by a share of the colour circle, uniform in [-hue, hue].
    """
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


def three_augment(image, rng, *, jitter: NonNegative[float] = 0.3):
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


def erase(
    image,
    rng,
    *,
    probability: Share = 0.25,
    area: Interval[Share] = (0.02, 1 / 3),
    aspect: Interval[Positive[float]] = (0.3, 10 / 3),
    fill: Literal['noise', 'mean', 'black'] = 'noise',
):
    """Fills a random box of the image (random erasing, arXiv:1708.04896).

    The box is drawn up to ten times, until it is smaller than the image both ways.

    Args:
      probability: probability that an image is changed.
      area: the box's share of the image's area is uniform in this range.
      aspect: the box's height / width is log-uniform in this range.
      fill: content of the box: black, ImageNet's mean colour, or noise of ImageNet's mean and
        standard deviation by pixel and channel (timm's mode 'pixel').
    """
    if rng.random() >= probability:
        return image
    height, width = image.shape[:2]
    for _ in range(10):
        pixels = rng.uniform(*area) * height * width
        ratio = np.exp(rng.uniform(*np.log(aspect)))
        h, w = round((pixels * ratio) ** 0.5), round((pixels / ratio) ** 0.5)
        if h < height and w < width:
            y, x = rng.integers(height - h + 1), rng.integers(width - w + 1)
            out = image.copy()
            out[y : y + h, x : x + w] = filling(h, w, rng, fill)
            return out
    return image


def filling(h, w, rng, fill):
    """Content of a box of h x w for `erase`: uint8 [h, w, 3], or one colour."""
    if fill == 'black':
        return 0
    noise = rng.standard_normal((h, w, 3), np.float32) if fill == 'noise' else 0
    return np.clip(np.rint(255 * (MEAN + STD * noise)), 0, 255).astype(np.uint8)


AUGMENTATIONS = {
    f.__name__: f
    for f in (
        randaugment, randaugment_torchvision, autoaugment, three_augment, color_jitter, erase
    )
}  # fmt: skip
MOVING = ('randaugment', 'randaugment_torchvision', 'autoaugment')  # some operations move pixels
