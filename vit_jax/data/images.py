"""Decodes image files to arrays, as an image viewer would show them, and resizes windows of them.

The extension `_jpeg.c` decodes a JPEG as far as a window needs it. Pillow decodes all other files,
and JPEGs where the extension is not built, as a whole.
"""

from typing import Any

import numpy as np

from vit_jax.data import entropy, metadata
from vit_jax.data.decoding import FORMATS, Unreadable, decode, naming
from vit_jax.errors import UserError

try:
    from vit_jax.data import _jpeg
except ImportError:
    _jpeg = None

if not hasattr(_jpeg, 'warp'):  # it is not built, or from another version of its source
    _jpeg = None
OWN_ENTROPY = _jpeg is not None and entropy.is_exact(_jpeg)

__all__ = ['FORMATS', 'Unreadable', 'decode', 'naming', 'read', 'resized']
CUT = 2**-10  # added before truncation, so that 255 less a rounding error stays 255
METHODS = ('bilinear', 'bicubic', 'area')
Box = tuple[int, int, int, int]  # (y, x, height, width) in pixels
Size = tuple[int, int]  # (height, width)


class Encoded:
    """A JPEG of shape [height, width, 3] that is decoded when a window of it is requested."""

    def __init__(self, data: bytes, height: int, width: int) -> None:
        self.data, self.shape = data, (height, width, 3)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return decode(self.data)

    def resized(
        self, box: Box, size: Size, method: str, antialias: bool, flip: bool, out: np.ndarray
    ) -> np.ndarray:
        """Same as `resized`; Pillow decodes what the extension finds damaged."""
        denominator = shrink(box, size) if antialias else 1
        try:
            _jpeg.view(
                self.data, out, *scaled(box, denominator), denominator, METHODS.index(method),
                antialias, flip, OWN_ENTROPY,
            )  # fmt: skip
        except ValueError:
            return resized(decode(self.data), box, size, method, antialias, flip, out)
        return out


def shrink(box: Box, size: Size) -> int:
    """Factor by which JPEG's own scaling may reduce a window, leaving twice the size or more."""
    least = min(box[2] / size[0], box[3] / size[1])
    return max((d for d in (2, 4, 8) if least >= 2 * d), default=1)


def scaled(box: Box, denominator: int) -> tuple[Box, tuple[float, float, float, float]]:
    """Maps a window (y, x, height, width) to an image reduced by a denominator.

    Returns the box of whole pixels that it touches, and its place in the box in fractional pixels.
    """
    y, x, h, w = box
    top, left = y // denominator, x // denominator
    bottom, right = -(-(y + h) // denominator), -(-(x + w) // denominator)
    part = y / denominator - top, x / denominator - left, h / denominator, w / denominator
    return (top, left, bottom - top, right - left), part


def read(data: bytes) -> np.ndarray | Encoded:
    """Reads an image file to something of shape [H, W, 3] that `resized` takes.

    Raises Unreadable.
    """
    if _jpeg is not None and data[:2] == b'\xff\xd8':
        try:
            height, width, exif = _jpeg.size(data)
        except ValueError:
            return decode(data)
        if not exif or metadata.orientation(exif) == 1:
            return Encoded(data, height, width)
    return decode(data)


def resized(
    image: np.ndarray | Encoded,
    box: Box,
    size: Size,
    method: str = 'bilinear',
    antialias: bool = True,
    flip: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Resizes a window (y, x, height, width) of an image [H, W, 3] to uint8 [*size, 3].

    Args:
      method: 'bilinear', 'bicubic' (Keys, a = -0.5) or 'area'.
      antialias: whether to make the filter as wide as an output pixel where the image shrinks, as
        Pillow does. False is what published recipes use of TensorFlow: the filter is never widened,
        values are truncated instead of rounded, and JPEGs decoded with the fast inverse DCT (by the
        extension alone: Pillow has only the accurate one, some 0.8 grey levels away).
      flip: whether to mirror left to right.
      out: contiguous uint8 [*size, 3] that may be filled and returned. None: a new array is.
    """
    if method not in METHODS:
        raise UserError(f'method is {method!r}, not one of {", ".join(METHODS)}')
    out = np.empty((*size, 3), np.uint8) if out is None else out
    if isinstance(image, Encoded):
        return image.resized(box, size, method, antialias, flip, out)
    if _jpeg is not None:
        kind = METHODS.index(method)
        _jpeg.resize(np.ascontiguousarray(image), out, box, kind, antialias, flip)
        return out
    return resized_by_numpy(image, box, size, method, antialias, flip)


def whole(image: np.ndarray | Encoded) -> np.ndarray:
    """All pixels of what `read` returned, uint8 [H, W, 3]."""
    shape = tuple(image.shape[:2])
    return resized(image, (0, 0, *shape), shape)


def resized_by_numpy(
    image: np.ndarray, box: Box, size: Size, method: str, antialias: bool, flip: bool
) -> np.ndarray:
    """`resized` without the extension: one product with a matrix of weights per axis."""
    y, x, h, w = box
    down = weights(h, size[0], method, antialias)
    across = weights(w, size[1], method, antialias)
    window = image[y : y + h, x : x + w].astype(np.float32)
    out = np.einsum('ih,hwc->iwc', down, window, optimize=True)
    out = np.einsum('jw,iwc->ijc', across, out, optimize=True)
    out = np.clip(out + (0.5 if antialias else CUT), 0, 255).astype(np.uint8)
    return out[:, ::-1] if flip else out


def weights(length: int, size: int, method: str, antialias: bool) -> np.ndarray:
    """Weight of each pixel of a row in each output pixel: float32 [size, length]."""
    scale = length / size
    edges, j = np.arange(size)[:, None] * scale, np.arange(length)
    if method == 'area':
        overlap = np.clip(np.minimum(edges + scale, j + 1) - np.maximum(edges, j), 0, None)
    elif method == 'bilinear':
        x = np.abs(j + 0.5 - edges - scale / 2)
        overlap = np.clip(1 - (x / max(scale, 1) if antialias else x), 0, None)
    elif antialias:
        overlap = keys_cubic(np.abs(j + 0.5 - edges - scale / 2) / max(scale, 1))
    else:
        overlap = keys_cubic(np.abs(j + 0.5 - tabulated_centres(length, size)))
    return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)


def tabulated_centres(length: int, size: int) -> np.ndarray:
    """Centre of each output pixel in a row of `length` pixels, [size, 1], for TensorFlow's bicubic.

    They are in float32, with the fraction of the pixel in steps of 1/1024: without antialias it
    looks up the kernel in a table.
    """
    half = np.float32(0.5)
    place = (np.arange(size, dtype=np.float32) + half) * np.float32(length / size) - half
    fraction = np.rint((place - np.floor(place)).astype(np.float64) * 1024) / 1024
    return (np.floor(place) + fraction + 0.5)[:, None]


def keys_cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic kernel (a = -0.5) at distances x."""
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))
