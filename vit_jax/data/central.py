"""Views without chance, those of evaluation: a central window, or the whole image, padded.

Signatures and settings are those of `augment`.
"""

from typing import Annotated, Literal

import numpy as np

from vit_jax.data.geometry import Geometry
from vit_jax.data.images import Size
from vit_jax.errors import UserError
from vit_jax.io.bounds import Pixels, Range

Method = Literal['bilinear', 'bicubic', 'area']
Rounding = Literal['tensorflow', 'torchvision', 'transformers']
Place = Literal['corner', 'centre']
Crop = Annotated[float, Range(0, 1, '(]')]
Part = Annotated[float, Range(0.1, 1)]  # of a side: the whole is resized first, and takes memory
Generator = np.random.Generator


def resize(
    shape: Size,
    rng: Generator | None,
    *,
    size: Size,
    crop: Part = 1.0,
    method: Method = 'bilinear',
    antialias: bool = True,
    rounding: Rounding = 'tensorflow',
) -> Geometry:
    """Resizes the image to size / crop, whatever its aspect ratio, and takes the central window.

    Args:
      crop: side of the window as a share of the side of the resized image.
      method: interpolation: 'area' averages the pixels that an output pixel covers.
      antialias: whether to widen the filter where the image shrinks, as Pillow does. Published
        recipes of TensorFlow have False.
      rounding: library whose rounding of the window's place is used, see `small_central`.
    """
    whole = round(size[0] / crop), round(size[1] / crop)
    return middle(shape, whole, size, method, antialias, rounding)


def central(
    shape: Size,
    rng: Generator | None,
    *,
    size: Size,
    crop: Crop = 0.875,
    method: Method = 'bilinear',
    antialias: bool = True,
) -> Geometry:
    """Resizes a central window that has the aspect ratio of the size.

    Args:
      crop: side of the window as a share of the largest that fits.
      method: interpolation: 'area' averages the pixels that an output pixel covers.
      antialias: whether to widen the filter where the image shrinks, as Pillow does. Published
        recipes of TensorFlow have False.
    """
    h, w = shape
    ch, cw = window(h, w, size, crop)
    box = (h - ch) // 2, (w - cw) // 2, ch, cw
    return Geometry(box, size, size, method=method, antialias=antialias)


def small_central(
    shape: Size,
    rng: Generator | None,
    *,
    size: Size,
    smaller: Pixels = 256,
    method: Method = 'area',
    antialias: bool = False,
    rounding: Rounding = 'tensorflow',
) -> Geometry:
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
    whole = shrunk(shape, smaller, size, rounding)
    return middle(shape, whole, size, method, antialias, rounding)


def fit(
    shape: Size,
    rng: Generator | None,
    *,
    size: Size,
    smaller: Pixels | None = None,
    place: Place = 'corner',
    method: Method = 'bilinear',
    antialias: bool = True,
) -> Geometry:
    """Resizes the whole image to fit into the size at its aspect ratio, and pads it with black.

    Args:
      smaller: bound of its smaller side in pixels. None: the size alone bounds it.
      place: where the image is: in the upper left corner, or in the centre.
      method: interpolation: 'area' averages the pixels that an output pixel covers.
      antialias: whether to widen the filter where the image shrinks, as Pillow does.
    """
    scale = min(n / side for n, side in zip(size, shape, strict=True))
    whole = fitted(shape, size, 1.0 if smaller is None else min(smaller / min(shape) / scale, 1.0))
    centre = place == 'centre'
    y, x = ((part - n) // 2 if centre else 0 for n, part in zip(whole, size, strict=True))
    return Geometry((0, 0, *shape), whole, size, (-y, -x), method=method, antialias=antialias)


def fitted(shape: Size, size: Size, scale: float = 1.0) -> Size:
    """Largest size of an image [H, W] that fits into size * scale, at its aspect ratio."""
    factor = scale * min(size[0] / shape[0], size[1] / shape[1])
    return max(1, round(shape[0] * factor)), max(1, round(shape[1] * factor))


def shrunk(shape: Size, smaller: int, size: Size, rounding: str) -> Size:
    """Size of an image [H, W] whose smaller side is made `smaller`, see `small_central`."""
    h, w = shape
    # the smaller side to the pixel, whatever the rounding of the product
    larger = smaller * max(h, w) / min(h, w)
    larger = round(larger) if rounding == 'tensorflow' else int(larger)
    whole = (smaller, larger) if h < w else (larger, smaller)
    if whole[0] < size[0] or whole[1] < size[1]:
        raise UserError(f'smaller is {smaller}, less than the image size {size[0]} x {size[1]}')
    return whole


def middle(
    shape: Size, whole: Size, size: Size, method: str, antialias: bool, rounding: str
) -> Geometry:
    """Resizes an image to `whole` and takes the central window of a size, see `small_central`."""
    half = round if rounding == 'torchvision' else int
    offset = half((whole[0] - size[0]) / 2), half((whole[1] - size[1]) / 2)
    return Geometry((0, 0, *shape), whole, size, offset, method=method, antialias=antialias)


def window(h: int, w: int, size: Size, crop: float) -> Size:
    """Sides of the largest window of the size's aspect in an image [h, w], times `crop`."""
    scale = crop * min(h / size[0], w / size[1])
    return min(max(round(size[0] * scale), 1), h), min(max(round(size[1] * scale), 1), w)
