"""Deterministic operations on an image: (uint8 [H, W, 3], arguments) -> uint8 [H, W, 3].

They compute what the TPU EfficientNet code computes with TensorFlow, which the ViT papers' code
adopted (big_vision, pp/autoaugment.py). Its quirks are included, since the published models were
trained with them. `pillow_affine`, `pillow_rotate`, `enhance`, `hue` and `blur` are Pillow's, which
torchvision calls. The extension `_operations.c` does the work, or Pillow wherever its arithmetic is
the same: both let other threads run meanwhile.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vit_jax.data import images

try:
    from vit_jax.data import _operations
except ImportError:
    _operations = None

# Reuses the memory of images: to return it to the system takes longer than most operations (a
# rotation at 224 x 224: 0.42 ms, with reuse 0.13 ms). At most 4 x 16 MB are kept.
Image.core.set_blocks_max(4)

GREY = (0.2989, 0.5870, 0.1140)  # TensorFlow's weights of red, green and blue


def made(operation: str, image: np.ndarray, *arguments: Any) -> np.ndarray:
    """What an operation of the extension makes of an image."""
    out = np.empty(image.shape, np.uint8)
    getattr(_operations, operation)(np.ascontiguousarray(image), out, *arguments)
    return out


def look_up(image: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Replaces values by entries of tables uint8 [256], or of one for each channel, [3, 256]."""
    tables = np.broadcast_to(tables, (3, 256))
    if _operations is None:
        return np.asarray(Image.fromarray(image).point(tables.ravel().tolist()))
    return made('look_up', image, tables.tobytes())


def autocontrast(image: np.ndarray, dtype: type = np.float32) -> np.ndarray:
    """Stretches each channel to 0..255, in float32 as TensorFlow or in float64 as Pillow does."""
    if _operations is None:
        extrema = np.array(Image.fromarray(image).getextrema(), np.uint8).T
    else:
        extrema = np.empty((2, 3), np.uint8)
        _operations.extrema(np.ascontiguousarray(image), extrema)
    low, high = extrema.astype(dtype)[..., None]  # [3, 1] each
    scale = 255 / np.maximum(high - low, 1)
    values = np.arange(256, dtype=dtype)
    table = np.where(high > low, np.clip(values * scale - low * scale, 0, 255), values)
    return look_up(image, table.astype(np.uint8))


def equalize(image: np.ndarray) -> np.ndarray:
    """Equalizes the histogram of each channel; Pillow and TensorFlow compute the same integers."""
    if _operations is None:
        return np.asarray(ImageOps.equalize(Image.fromarray(image)))
    counts = np.empty((3, 256), np.int64)
    _operations.count(np.ascontiguousarray(image), counts)
    below = counts.cumsum(1) - counts
    # without the pixels of the highest value
    step = below[np.arange(3), 255 - (counts[:, ::-1] > 0).argmax(1)][:, None] // 255
    table = np.minimum((below + step // 2) // np.maximum(step, 1), 255)
    return look_up(image, np.where(step > 0, table, np.arange(256)).astype(np.uint8))


def invert(image: np.ndarray) -> np.ndarray:
    """Inverts each value: 255 - value."""
    return 255 - image


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the upper `bits` of each value: one bit where `bits` is below 1, and above 8.

    TensorFlow takes 8 - bits for a byte, so that it wraps around, and shifts by at most 7.
    """
    dropped = min((8 - bits) % 256, 7)
    return image & np.uint8(256 - 2**dropped)


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Inverts values that are not below the threshold: all at 0, none at 256."""
    if threshold > 255:
        return image
    return image ^ ((image >= np.uint8(threshold)).view(np.uint8) * np.uint8(255))


def solarize_add(image: np.ndarray, addition: int) -> np.ndarray:
    """Adds `addition` to values below 128, up to 255."""
    added = np.minimum(255 - image, np.uint8(min(addition, 255)))
    added *= (image < 128).view(np.uint8)
    return added + image


def blend(degenerate: Image.Image, picture: Image.Image, factor: float) -> np.ndarray:
    """Computes degenerate + factor * (picture - degenerate), clipped and truncated.

    Pillow computes it in float32, as TensorFlow does.
    """
    return np.asarray(Image.blend(degenerate, picture, factor))


def blend_uniform(image: np.ndarray, value: int, factor: float) -> np.ndarray:
    """`blend` of an image with a uniform grey."""
    values = np.arange(256, dtype=np.float32)
    blended = np.float32(value) + np.float32(factor) * (values - np.float32(value))
    return look_up(image, np.clip(blended, 0, 255).astype(np.uint8))


def color(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends the image with its grey values."""
    # TensorFlow converts [0, 1] to bytes by floor(255.5 x); Pillow adds a half and truncates.
    matrix = (*(w * 255.5 / 255 for w in GREY), -0.5)
    if _operations is not None:
        return made('blend_grey', image, factor, matrix)
    picture = Image.fromarray(image)
    return blend(picture.convert('L', matrix).convert('RGB'), picture, factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends the image with a uniform grey: pixels / 256, up to 255, whatever the image shows.

    The mean was intended, but the papers' code sums a histogram's counts instead of its values.
    """
    return blend_uniform(image, int(min(image.shape[0] * image.shape[1] / 256, 255)), factor)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends the image with black."""
    return blend_uniform(image, 0, factor)


def smooth(image: np.ndarray, add: int = 0) -> np.ndarray:
    """Averages 3 x 3 pixels (centre 5, others 1), (sum + add) // 13; leaves the border as it is.

    add=0 truncates as TensorFlow does (whose float32 is occasionally one less where 13 divides the
    sum), add=6 rounds as Pillow does.
    """
    h, w, c = image.shape
    total = image.reshape(h, w * c).astype(np.uint16)
    column = total[:-2] + total[1:-1]
    column += total[2:]
    inner = total[1:-1, c:-c]  # in place from here: large temporaries cost more than the sums
    inner *= 4
    for i in range(3):
        inner += column[:, i * c : (w - 2 + i) * c]
    inner += add
    inner //= 13
    out = image.copy()
    out.reshape(h, w * c)[1:-1, c:-c] = inner
    return out


def sharpness(image: np.ndarray, factor: float, add: int = 0) -> np.ndarray:
    """Blends the image with its smoothed copy."""
    if _operations is not None:
        return made('sharpen', image, factor, add)
    return blend(Image.fromarray(smooth(image, add)), Image.fromarray(image), factor)


def warp(image: np.ndarray, matrix: Sequence[float], fill: int = 128) -> np.ndarray:
    """Takes each pixel (x, y) from the one nearest to (a x + b y + c, d x + e y + f).

    Where there is none, the pixel is `fill`. Positions are indices, in float32; halves are rounded
    away from 0, as TensorFlow's ImageProjectiveTransformV3 does, which TensorFlow Addons calls.

    Args:
      matrix: (a, b, c, d, e, f).
    """
    matrix = np.asarray(matrix, np.float32)
    if images._jpeg is None:
        return warp_by_numpy(image, matrix, fill)
    out = np.empty(image.shape, np.uint8)
    images._jpeg.warp(np.ascontiguousarray(image), out, tuple(matrix.tolist()), fill)
    return out


def warp_by_numpy(image: np.ndarray, matrix: np.ndarray, fill: int) -> np.ndarray:
    """`warp` without the extension; `matrix` is float32 [6]."""
    h, w = image.shape[:2]
    y, x = np.arange(h, dtype=np.float32)[:, None], np.arange(w, dtype=np.float32)
    columns, rows = (a * x + b * y + c for a, b, c in matrix.reshape(2, 3))
    half = np.float32(0.5)
    inside = (columns > -half) & (columns < w - half) & (rows > -half) & (rows < h - half)
    rows, columns = (np.broadcast_to(p, (h, w))[inside] + np.float64(0.5) for p in (rows, columns))
    out = np.full_like(image, fill)
    out[inside] = image[rows.astype(int), columns.astype(int)]
    return out


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates the image about its centre."""
    angle = np.float32(np.deg2rad(degrees))
    cos, sin = np.cos(angle), np.sin(angle)
    h, w = (np.float32(n - 1) for n in image.shape[:2])
    x, y = (w - (cos * w - sin * h)) / 2, (h - (sin * w + cos * h)) / 2
    return warp(image, (cos, -sin, x, sin, cos, y))


def shear_x(image: np.ndarray, slope: float) -> np.ndarray:
    """Shifts row y to the left by slope * y."""
    return warp(image, (1, slope, 0, 0, 1, 0))


def shear_y(image: np.ndarray, slope: float) -> np.ndarray:
    """Shifts column x up by slope * x."""
    return warp(image, (1, 0, 0, slope, 1, 0))


def translate_x(image: np.ndarray, pixels: float) -> np.ndarray:
    """Shifts the image to the left."""
    return warp(image, (1, 0, pixels, 0, 1, 0))


def translate_y(image: np.ndarray, pixels: float) -> np.ndarray:
    """Shifts the image up."""
    return warp(image, (1, 0, 0, 0, 1, pixels))


def cutout(image: np.ndarray, y: int, x: int, half: int, fill: int = 128) -> np.ndarray:
    """Fills the square of side 2 * half about (y, x), as far as it is inside (arXiv:1708.04552)."""
    out = image.copy()
    out[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = fill
    return out


def pillow_affine(image: np.ndarray, matrix: Sequence[float]) -> np.ndarray:
    """Same as `warp` by Pillow, with black outside, as torchvision has it.

    Positions are those of pixel centres, the first is (0.5, 0.5), in steps of 1/65536.
    """
    picture = Image.fromarray(image)
    nearest = Image.Resampling.NEAREST
    return np.asarray(picture.transform(picture.size, Image.Transform.AFFINE, matrix, nearest))


def pillow_rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates the image about its centre by Pillow, with black outside, as torchvision has it."""
    return np.asarray(Image.fromarray(image).rotate(degrees))


def enhance(image: np.ndarray, kind: str, factor: float) -> np.ndarray:
    """Applies Pillow's 'Brightness', 'Color', 'Contrast' or 'Sharpness'; blends as above.

    Here contrast is about the mean of the grey values.
    """
    if kind == 'Sharpness':
        return sharpness(image, factor, add=6)
    if kind == 'Brightness':
        return brightness(image, factor)
    return np.asarray(getattr(ImageEnhance, kind)(Image.fromarray(image)).enhance(factor))


def hue(image: np.ndarray, turn: float) -> np.ndarray:
    """Rotates the hue by a share `turn` of the circle, in steps of 1/256, truncated toward 0."""
    h, s, v = Image.fromarray(image).convert('HSV').split()
    h = Image.fromarray(np.asarray(h) + np.uint8(int(turn * 255) % 256))
    return np.asarray(Image.merge('HSV', (h, s, v)).convert('RGB'))


def scale_values(image: np.ndarray, factor: float, added: float) -> np.ndarray:
    """Computes factor * value + added, clipped and truncated."""
    if (factor, added) == (1, 0):
        return image
    return look_up(image, np.uint8(value_table(factor, added)))


def value_table(factor: float, added: float = 0.0) -> list[int]:
    """factor * value + added of the values 0 to 255, clipped and truncated."""
    values = np.clip(np.arange(256) * factor + added, 0, 255)
    return values.astype(np.uint8).tolist()


def hue_saturation(image: np.ndarray, turn: float, factor: float) -> np.ndarray:
    """Rotates the hue by a share `turn` of the circle and scales the saturation, in HSV."""
    if (turn, factor) == (0, 1):
        return image
    hues = (np.arange(256) + round(turn * 256)) % 256
    tables = [*hues.tolist(), *value_table(factor), *range(256)]
    return np.asarray(Image.fromarray(image).convert('HSV').point(tables).convert('RGB'))


def greyscale(image: np.ndarray) -> np.ndarray:
    """Converts to the luma of ITU-R 601-2 (Pillow's), in all three channels."""
    return np.asarray(Image.fromarray(image).convert('L').convert('RGB'))


def blur(image: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur with a standard deviation in pixels, which Pillow approximates by boxes."""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))
