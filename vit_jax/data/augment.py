"""Views: (image [H, W, 3], rng, size=(height, width)) -> uint8 [height, width, 3].

A view draws all random numbers from `rng` (numpy.random.Generator), so that it is a function of the
example and the generator alone; views of evaluation ignore it. The image is a uint8 array, or an
images.Encoded, which is decoded as far as the view needs it.

`method` and `antialias` are those of images.resized. Published recipes of TensorFlow have
antialias=False; True improves images that are cropped from large windows.
"""

from typing import Annotated, Literal

import numpy as np
from PIL import Image

from vit_jax.data.images import resized
from vit_jax.errors import UserError
from vit_jax.io.bounds import Interval, NonNegative, Pixels, Positive, Range, Share

Method = Literal['bilinear', 'bicubic', 'area']
Rounding = Literal['tensorflow', 'torchvision', 'transformers']
Crop = Annotated[float, Range(0, 1, '(]')]
Part = Annotated[float, Range(0.1, 1)]  # of a side: the whole is resized first, and takes memory
Shift = Annotated[int, Range(0, 1024)]


def resize(
    image,
    rng,
    *,
    size,
    crop: Part = 1.0,
    method: Method = 'bilinear',
    antialias: bool = True,
    rounding: Rounding = 'tensorflow',
):
    """Resizes the image to size / crop, whatever its aspect ratio, and takes the central window.

    Args:
      crop: side of the window as a share of the side of the resized image.
      method: interpolation: 'area' averages the pixels that an output pixel covers.
      antialias: whether to widen the filter where the image shrinks, as Pillow does. Published
        recipes of TensorFlow have False.
      rounding: library whose rounding of the window's place is used, see `small_central`.
    """
    whole = tuple(round(n / crop) for n in size)
    out = resized(image, (0, 0, *image.shape[:2]), whole, method, antialias)
    return middle(out, size, rounding)


def central(
    image, rng, *, size, crop: Crop = 0.875, method: Method = 'bilinear', antialias: bool = True
):
    """Resizes a central window that has the aspect ratio of the size.

    Args:
      crop: side of the window as a share of the largest that fits.
      method: interpolation: 'area' averages the pixels that an output pixel covers.
      antialias: whether to widen the filter where the image shrinks, as Pillow does. Published
        recipes of TensorFlow have False.
    """
    h, w = image.shape[:2]
    ch, cw = window(h, w, size, crop)
    box = (h - ch) // 2, (w - cw) // 2, ch, cw
    return resized(image, box, size, method, antialias)


def small_central(
    image,
    rng,
    *,
    size,
    smaller: Pixels = 256,
    method: Method = 'area',
    antialias: bool = False,
    rounding: Rounding = 'tensorflow',
):
    """Resizes the image so that its smaller side is `smaller`, and takes the central window.

    The code of the ViT papers evaluates ImageNet so, with 256 by area, then 224.

    Args:
      smaller: smaller side of the resized image, in pixels.
      method: interpolation: 'area' averages the pixels that an output pixel covers.
      antialias: whether to widen the filter where the image shrinks, as Pillow does. Published
        recipes of TensorFlow have False.
      rounding: library whose rounding is used. tensorflow rounds the larger side, torchvision and
        transformers truncate it; torchvision rounds the window's place half to even, the others
        truncate it.
    """
    h, w = image.shape[:2]
    # the smaller side to the pixel, whatever the rounding of the product
    larger = smaller * max(h, w) / min(h, w)
    larger = round(larger) if rounding == 'tensorflow' else int(larger)
    whole = (smaller, larger) if h < w else (larger, smaller)
    if whole[0] < size[0] or whole[1] < size[1]:
        raise UserError(f'smaller is {smaller}, less than the image size {size[0]} x {size[1]}')
    out = resized(image, (0, 0, h, w), whole, method, antialias)
    return middle(out, size, rounding)


def middle(image, size, rounding):
    """Central window of a size, at the place that `rounding` gives, see `small_central`."""
    half = round if rounding == 'torchvision' else int
    y, x = half((image.shape[0] - size[0]) / 2), half((image.shape[1] - size[1]) / 2)
    return image[y : y + size[0], x : x + size[1]]


def window(h, w, size, crop):
    """Sides of the largest window of the size's aspect in an image [h, w], times `crop`."""
    scale = crop * min(h / size[0], w / size[1])
    return min(max(round(size[0] * scale), 1), h), min(max(round(size[1] * scale), 1), w)


def random_crop(
    image,
    rng,
    *,
    size,
    crop: Crop = 0.875,
    flip: bool = True,
    method: Method = 'bilinear',
    antialias: bool = True,
):
    """Resizes a window at a random place, as large as that of `central`.

    Args:
      crop: side of the window as a share of the largest that fits.
      flip: whether to mirror left to right with probability 1/2.
      method: interpolation: 'area' averages the pixels that an output pixel covers.
      antialias: whether to widen the filter where the image shrinks, as Pillow does. Published
        recipes of TensorFlow have False.
    """
    h, w = image.shape[:2]
    ch, cw = window(h, w, size, crop)
    box = int(rng.integers(h - ch + 1)), int(rng.integers(w - cw + 1)), ch, cw
    return resized(image, box, size, method, antialias, mirror(rng, flip))


def random_box(shape, rng, *, area=(0.05, 1.0), aspect=(3 / 4, 4 / 3)):
    """A random window (y, x, height, width) of an image [H, W].

    `area` is the range of its share of the image, `aspect` that of width / height. The distribution
    is that of TensorFlow's sample_distorted_bounding_box, which published recipes use: the aspect
    ratio is uniform, then the height among those that fit, then the place, but never the very last
    row or column. After a hundred misses it is the whole image.
    """
    h, w = shape
    for _ in range(100):
        ratio = aspect[0] + (aspect[1] - aspect[0]) * rng.random()
        least, most = (share * h * w for share in area)
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
    image,
    rng,
    *,
    size,
    area: Interval[Share] = (0.05, 1.0),
    aspect: Interval[Positive[float]] = (3 / 4, 4 / 3),
    flip: bool = True,
    method: Method = 'bilinear',
    antialias: bool = True,
):
    """Resizes a window of random size, aspect ratio and place: the usual ImageNet training view.

    Args:
      area: range of the window's share of the image's area.
      aspect: range of the window's aspect ratio, width / height.
      flip: whether to mirror left to right with probability 1/2.
      method: interpolation: 'area' averages the pixels that an output pixel covers.
      antialias: whether to widen the filter where the image shrinks, as Pillow does. Published
        recipes of TensorFlow have False.
    """
    box = random_box(image.shape[:2], rng, area=area, aspect=aspect)
    return resized(image, box, size, method, antialias, mirror(rng, flip))


def shift(image, rng, *, size, pixels: Shift = 1, flip: bool = False):
    """Resizes the image and translates it at random; what comes in at the border is black.

    Args:
      pixels: largest translation along each axis, in pixels.
      flip: whether to mirror left to right with probability 1/2.
    """
    framed = np.zeros((size[0] + 2 * pixels, size[1] + 2 * pixels, 3), np.uint8)
    framed[pixels : pixels + size[0], pixels : pixels + size[1]] = resize(image, rng, size=size)
    y, x = rng.integers(2 * pixels + 1, size=2)
    return flipped(framed[y : y + size[0], x : x + size[1]], rng, flip)


def affine(
    image,
    rng,
    *,
    size,
    degrees: Annotated[float, Range(0, 180)] = 10.0,
    scale: Annotated[float, Range(0, 10)] = 0.1,
    shear: NonNegative[float] = 0.0,
    pixels: NonNegative[float] = 1.0,
    flip: bool = False,
):
    """Resizes the image, then rotates, shears, scales and translates it at random; black outside.

    Args:
      degrees: the angle is uniform in [-degrees, degrees].
      scale: the logarithm of the scale of each axis is uniform in [-scale, scale].
      shear: the tangent of the shear angle is uniform in [-shear, shear].
      pixels: the translation along each axis is uniform in [-pixels, pixels].
      flip: whether to mirror left to right with probability 1/2.
    """
    image = Image.fromarray(np.ascontiguousarray(resize(image, rng, size=size)))
    angle = np.deg2rad(rng.uniform(-degrees, degrees))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    slant = np.array([[1, rng.uniform(-shear, shear)], [0, 1]])
    # of offsets from the centre, (x, y)
    to_input = turn @ slant * np.exp(rng.uniform(-scale, scale, 2))
    centre = np.array(size[::-1]) / 2
    start = centre - to_input @ (centre + rng.uniform(-pixels, pixels, 2))
    matrix = np.concatenate([to_input, start[:, None]], axis=1).ravel()
    warped = image.transform(size[::-1], Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return flipped(np.asarray(warped), rng, flip)


def mirror(rng, flip):
    """Whether to mirror the image: with probability 1/2 where `flip` is true."""
    return bool(flip and rng.integers(2))


def flipped(image, rng, flip):
    """The image, mirrored left to right with probability 1/2 where `flip` is true."""
    return image[:, ::-1] if mirror(rng, flip) else image


VIEWS = {
    f.__name__: f
    for f in (resize, central, small_central, random_crop, inception, shift, affine)
}
FIXED = ('central', 'resize', 'small_central')  # deterministic
