"""Views: (shape (H, W) of an image, rng, size=(height, width), settings) -> geometry.Geometry.

A view draws all random numbers from `rng` (numpy.random.Generator), so that it is a function of the
example and the generator alone; views of evaluation ignore it. The geometry then applies it to the
image and to all that has a place in it.

`method` and `antialias` are those of images.resized. Published recipes of TensorFlow have
antialias=False; True improves images that are cropped from large windows.
"""

from typing import Annotated

import numpy as np

from vit_jax.data.central import (
    Crop,
    Generator,
    Method,
    central,
    fit,
    resize,
    shrunk,
    small_central,
    window,
)
from vit_jax.data.geometry import Geometry
from vit_jax.data.images import Box, Size
from vit_jax.data.jitter import large_scale_jitter, mirror, resize_or_crop, scale_crop
from vit_jax.errors import UserError
from vit_jax.io.bounds import Interval, NonNegative, Pixels, Positive, Range, Share

Shift = Annotated[int, Range(0, 1024)]


def random_crop(
    shape: Size,
    rng: Generator,
    *,
    size: Size,
    crop: Crop = 0.875,
    flip: bool = True,
    method: Method = 'bilinear',
    antialias: bool = True,
) -> Geometry:
    """Resizes a window at a random place, as large as that of `central`.

    Args:
      crop: side of the window as a share of the largest that fits.
      flip: whether to mirror left to right with probability 1/2.
      method: interpolation: 'area' averages the pixels that an output pixel covers.
      antialias: whether to widen the filter where the image shrinks, as Pillow does. Published
        recipes of TensorFlow have False.
    """
    h, w = shape
    ch, cw = window(h, w, size, crop)
    box = int(rng.integers(h - ch + 1)), int(rng.integers(w - cw + 1)), ch, cw
    mirrored = mirror(rng, flip)
    return Geometry(box, size, size, flip=mirrored, method=method, antialias=antialias)


def resize_crop(
    shape: Size,
    rng: Generator,
    *,
    size: Size,
    resize: Pixels = 448,
    flip: bool = True,
    method: Method = 'bilinear',
    antialias: bool = True,
) -> Geometry:
    """Resizes the image to a square, whatever its aspect ratio, and takes a window at random.

    BiT trains so: 448 and windows of 384 pixels, or 160 and 128 for images smaller than 96 x 96
    pixels (arXiv:1912.11370 section 3.3).

    Args:
      resize: side of the square, in pixels. If it is the image size, the whole image is taken.
      flip: whether to mirror left to right with probability 1/2.
      method: interpolation: 'area' averages the pixels that an output pixel covers.
      antialias: whether to widen the filter where the image shrinks, as Pillow does. Published
        recipes of TensorFlow have False.
    """
    if resize < max(size):
        raise UserError(f'resize is {resize}, less than the image size {size[0]} x {size[1]}')
    return part_of(shape, (resize, resize), rng, size, flip, method, antialias)


def small_crop(
    shape: Size,
    rng: Generator,
    *,
    size: Size,
    smaller: Pixels = 448,
    flip: bool = True,
    method: Method = 'area',
    antialias: bool = False,
) -> Geometry:
    """Resizes the image so that its smaller side is `smaller`, and takes a window at random.

    The training view beside `small_central` (resmall_crop, big_vision configs/transfer.py:103).

    Args:
      smaller: smaller side of the resized image, in pixels.
      flip: whether to mirror left to right with probability 1/2.
      method: interpolation: 'area' averages the pixels that an output pixel covers.
      antialias: whether to widen the filter where the image shrinks, as Pillow does. Published
        recipes of TensorFlow have False.
    """
    whole = shrunk(shape, smaller, size, 'tensorflow')
    return part_of(shape, whole, rng, size, flip, method, antialias)


def part_of(
    shape: Size, whole: Size, rng: Generator, size: Size, flip: bool, method: str, antialias: bool
) -> Geometry:
    """Resizes an image to `whole`, takes a window of a size at random and mirrors it at random."""
    y, x = (int(rng.integers(n - part + 1)) for n, part in zip(whole, size, strict=True))
    box, mirrored = (0, 0, *shape), mirror(rng, flip)
    return Geometry(box, whole, size, (y, x), flip=mirrored, method=method, antialias=antialias)


def random_box(
    shape: Size,
    rng: Generator,
    *,
    area: tuple[float, float] = (0.05, 1.0),
    aspect: tuple[float, float] = (0.75, 1.33),
) -> Box:
    """A random window (y, x, height, width) of an image [H, W].

    `area` is the range of its share of the image, `aspect` that of width / height. The distribution
    is that of TensorFlow's sample_distorted_bounding_box, which published recipes use: the aspect
    ratio is uniform, then the height among those that fit, then the place, but never the very last
    row or column. After a hundred misses it is the whole image.
    """
    h, w = shape
    least, most = (share * h * w for share in area)
    for _ in range(100):
        ratio = aspect[0] + (aspect[1] - aspect[0]) * rng.random()
        low, high = round((least / ratio) ** 0.5), round((most / ratio) ** 0.5)
        if round(high * ratio) > w:
            high = int((w + 0.4999999) / ratio)
        high = min(high, h)
        low = min(low, high)
        ch = int(rng.integers(low, high + 1))
        # rounding may leave the range by a pixel
        ch += (round(ch * ratio) * ch < least) - (round(ch * ratio) * ch > most)
        cw = round(ch * ratio)
        if 0 < ch <= h and 0 < cw <= w and least <= ch * cw <= most:
            return int(rng.integers(max(h - ch, 1))), int(rng.integers(max(w - cw, 1))), ch, cw
    return 0, 0, h, w


def inception(
    shape: Size,
    rng: Generator,
    *,
    size: Size,
    area: Interval[Share] = (0.05, 1.0),
    aspect: Interval[Positive[float]] = (0.75, 1.33),
    flip: bool = True,
    method: Method = 'bilinear',
    antialias: bool = True,
) -> Geometry:
    """Resizes a window of random size, aspect ratio and place: the usual ImageNet training view.

    Args:
      area: range of the window's share of the image's area.
      aspect: range of the window's aspect ratio, width / height. The default is TensorFlow's
        (big_vision pp/ops_image.py:200).
      flip: whether to mirror left to right with probability 1/2.
      method: interpolation: 'area' averages the pixels that an output pixel covers.
      antialias: whether to widen the filter where the image shrinks, as Pillow does. Published
        recipes of TensorFlow have False.
    """
    box = random_box(shape, rng, area=area, aspect=aspect)
    mirrored = mirror(rng, flip)
    return Geometry(box, size, size, flip=mirrored, method=method, antialias=antialias)


def torchvision_box(
    shape: Size, rng: Generator, *, area: tuple[float, float], aspect: tuple[float, float]
) -> Box:
    """`random_box` as torchvision's RandomResizedCrop draws it.

    The area is uniform and the aspect ratio log-uniform, then the place. After ten misses it is the
    largest central window whose aspect ratio is in the range.
    """
    h, w = shape
    for _ in range(10):
        pixels = rng.uniform(*area) * h * w
        ratio = np.exp(rng.uniform(*np.log(aspect)))
        ch, cw = round((pixels / ratio) ** 0.5), round((pixels * ratio) ** 0.5)
        if 0 < ch <= h and 0 < cw <= w:
            return int(rng.integers(h - ch + 1)), int(rng.integers(w - cw + 1)), ch, cw
    ratio = min(max(w / h, aspect[0]), aspect[1])
    ch, cw = (round(w / ratio), w) if w / h < ratio else (h, round(h * ratio))
    return (h - ch) // 2, (w - cw) // 2, ch, cw


def inception_torchvision(
    shape: Size,
    rng: Generator,
    *,
    size: Size,
    area: Interval[Share] = (0.08, 1.0),
    aspect: Interval[Positive[float]] = (3 / 4, 4 / 3),
    flip: bool = True,
    method: Method = 'bilinear',
    antialias: bool = True,
) -> Geometry:
    """Resizes a window of random size, aspect ratio and place, as torchvision draws it.

    Args:
      area: range of the window's share of the image's area.
      aspect: range of the window's aspect ratio, width / height.
      flip: whether to mirror left to right with probability 1/2.
      method: interpolation: 'area' averages the pixels that an output pixel covers.
      antialias: whether to widen the filter where the image shrinks, as Pillow does.
    """
    box = torchvision_box(shape, rng, area=area, aspect=aspect)
    mirrored = mirror(rng, flip)
    return Geometry(box, size, size, flip=mirrored, method=method, antialias=antialias)


def shift(
    shape: Size, rng: Generator, *, size: Size, pixels: Shift = 1, flip: bool = False
) -> Geometry:
    """Resizes the image and translates it at random; what comes in at the border is black.

    Args:
      pixels: largest translation along each axis, in pixels.
      flip: whether to mirror left to right with probability 1/2.
    """
    y, x = (rng.integers(2 * pixels + 1, size=2) - pixels).tolist()
    return Geometry((0, 0, *shape), size, size, (y, x), flip=mirror(rng, flip))


def affine(
    shape: Size,
    rng: Generator,
    *,
    size: Size,
    degrees: Annotated[float, Range(0, 180)] = 10.0,
    scale: Annotated[float, Range(0, 10)] = 0.1,
    shear: NonNegative[float] = 0.0,
    pixels: NonNegative[float] = 1.0,
    flip: bool = False,
) -> Geometry:
    """Resizes the image, then rotates, shears, scales and translates it at random; black outside.

    Args:
      degrees: the angle is uniform in [-degrees, degrees].
      scale: the logarithm of the scale of each axis is uniform in [-scale, scale].
      shear: the tangent of the shear angle is uniform in [-shear, shear].
      pixels: the translation along each axis is uniform in [-pixels, pixels].
      flip: whether to mirror left to right with probability 1/2.
    """
    angle = np.deg2rad(rng.uniform(-degrees, degrees))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    slant = np.array([[1, rng.uniform(-shear, shear)], [0, 1]])
    # of offsets from the centre, (x, y)
    to_input = turn @ slant * np.exp(rng.uniform(-scale, scale, 2))
    centre = np.array(size[::-1]) / 2
    start = centre - to_input @ (centre + rng.uniform(-pixels, pixels, 2))
    warp = np.concatenate([to_input, start[:, None]], axis=1)
    return Geometry((0, 0, *shape), size, size, warp=warp, flip=mirror(rng, flip))


VIEWS = {
    f.__name__: f
    for f in (
        resize, central, small_central, fit, resize_crop, small_crop, random_crop, inception,
        inception_torchvision, scale_crop, resize_or_crop, large_scale_jitter, shift, affine,
    )
}  # fmt: skip
FIXED = ('central', 'fit', 'resize', 'small_central')  # deterministic
READ_LABELS = ('scale_crop',)  # they take the label map, if there is one, as a third argument
