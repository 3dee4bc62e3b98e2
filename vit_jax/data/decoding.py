"""Decodes image files to arrays, as an image viewer would show them, by Pillow."""

import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from vit_jax.data import metadata
from vit_jax.data.readers.formats import SUFFIXES
from vit_jax.errors import UserError

FORMATS = tuple(dict.fromkeys(SUFFIXES.values()))
# TIFF tags
BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PLANES, COLOUR_MAP = 258, 259, 262, 277, 284, 320
SAMPLE_FORMAT, SUBSAMPLING = 339, 530

# Start of a JPEG scan. Each scan covers the whole image, however few bytes it has.
SCAN = re.compile(b'\xff\xda\0(?:\x08\1|\x0a\2|\x0c\3|\x0e\4)')
MAX_WORK = 2**32  # pixels times scans, as in _jpeg.c


class Unreadable(UserError):
    """An image that can't be decoded; the message says why, and its reader adds the name."""


class naming:  # takes a third of the time of a generator with contextlib
    """Adds what could not be read to the message of Unreadable."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Unreadable):
            raise Unreadable(f'unreadable {self.what}: {error}') from error


def decode(data: bytes) -> np.ndarray:
    """Decodes an image file to uint8 RGB [H, W, 3].

    Applies the orientation in EXIF, composites transparency over white, takes the first frame of
    an animation, scales more than 8 bits to 8, and converts CMYK and greyscale. Raises Unreadable
    for anything else.
    """
    try:
        data = bytes(data)
        picture, exif = metadata.apart(data)
        with Image.open(io.BytesIO(picture), formats=FORMATS) as file:
            turn = metadata.orientation(exif or file.info.get('exif', b''))
            return apply_orientation(np.asarray(load_rgb(file, picture, data)), turn)
    except Unreadable:
        raise
    except Exception as e:  # Pillow's parsers raise any exception for damaged data
        raise Unreadable(reason(e)) from e


def reason(error: Exception) -> str:
    """Explains in one line why a file can't be decoded."""
    text = str(error).replace(repr(io.BytesIO), 'the data').split(' <_io')[0]
    text = ' '.join(text.split()) or type(error).__name__
    known = isinstance(error, (OSError, ValueError, SyntaxError, Image.DecompressionBombError))
    return text if known else f'{type(error).__name__}: {text}'


def apply_orientation(image: np.ndarray, orientation: int) -> np.ndarray:
    """Applies EXIF's orientation, 1 to 8, to an array [H, W, C]."""
    if orientation > 4:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def load_rgb(file: Image.Image, picture: bytes, data: bytes) -> Image.Image:
    """Loads an opened image file as RGB over white; `picture` is `data` without metadata."""
    check_work(file, picture)
    opaque = None  # bool [H, W], with a transparent colour or a frame smaller than its canvas
    if file.format == 'PNG':
        opaque = opaque_by_key(file, picture)
    elif file.format == 'GIF':
        opaque = opaque_by_frame(file)
    elif file.format == 'TIFF':
        check_tiff(file.tag_v2)
    file.load()
    image = to_rgb(eight_bits(file, data))
    if opaque is None:
        return image
    return Image.composite(image, Image.new('RGB', image.size, 'white'), Image.fromarray(opaque))


def check_work(file: Image.Image, picture: bytes) -> None:
    """Raises Unreadable for a small file that would take minutes to decode."""
    scans = len(SCAN.findall(picture)) if file.format in ('JPEG', 'MPO') else 0
    if scans * file.width * file.height > MAX_WORK:
        raise Unreadable(f'{scans} scans of {file.width} x {file.height} pixels are too many')


def opaque_by_key(file: Image.Image, data: bytes) -> np.ndarray | None:
    """Finds the pixels of a PNG that differ from the colour that its tRNS chunk makes transparent.

    Returns bool [H, W]; None if no single colour is transparent. All bits are compared, in 16-bit
    files too.
    """
    depth, colour = data[24], data[25]
    if colour not in (0, 2) or 'transparency' not in file.info:
        return None
    key = np.asarray(file.info.pop('transparency')) & (2**depth - 1)
    if colour == 2 and depth == 16:  # Pillow decodes the high bytes, or on request the low ones
        with Image.open(io.BytesIO(data), formats=['PNG']) as low:
            low.tile = [tile._replace(args='RGB;16L') for tile in low.tile]
            low = np.asarray(low)
        file.load()
        return ((np.asarray(file) != key >> 8) | (low != (key & 255))).any(-1)
    file.load()
    values = np.asarray(file)
    if colour == 2:
        return (values != key).any(-1)
    return values != (key if depth in (1, 16) else key * (255 // (2**depth - 1)))


def opaque_by_frame(file: Image.Image) -> np.ndarray | None:
    """Finds the pixels of a GIF in its first frame: bool [H, W]; None if it fills the canvas."""
    x0, y0, x1, y1 = file.tile[0].extents
    if (x0, y0, x1, y1) == (0, 0, *file.size):
        return None
    within = np.zeros(file.size[::-1], bool)
    within[y0:y1, x0:x1] = True
    return within


def check_tiff(tags: Mapping) -> None:
    """Raises Unreadable for a TIFF whose pixels Pillow misreads."""
    grey = tags.get(PHOTOMETRIC, 0) in (0, 1)
    bits, planes = tags.get(BITS, (1,)), tags.get(PLANES, 1) == 2
    if any(kind in (2, 5, 6) for kind in tags.get(SAMPLE_FORMAT, ())):
        raise Unreadable('signed and complex pixels have no agreed range')
    raw = tags.get(COMPRESSION, 1) == 1
    if planes and (grey and tags.get(SAMPLES, 1) > 1 or raw and max(bits) > 8):
        raise Unreadable('planes of grey and alpha, or of more than 8 bits, are not read')
    if raw and tags.get(PHOTOMETRIC) == 6:
        if tuple(tags.get(SUBSAMPLING, (2, 2))) != (1, 1):
            raise Unreadable('subsampled colours without compression are not read')


def eight_bits(image: Image.Image, data: bytes) -> Image.Image:
    """Converts an image to 8 bits per channel; raises Unreadable if their range is undefined."""
    tags = image.tag_v2 if image.format == 'TIFF' else {}
    if image.mode == 'F':
        raise Unreadable('floating-point pixels have no agreed range')
    if image.mode in ('P', 'PA') and tags and max(tags[COLOUR_MAP]) < 256:
        # The values should have 16 bits, but some writers use 8; libtiff allows for it, too.
        image.putpalette(np.uint8(tags[COLOUR_MAP]).reshape(3, -1).T.tobytes())
    if image.mode == 'I' or image.mode.startswith('I;16'):
        bits = max(tags.get(BITS, (16,)))
        if bits > 16:
            raise Unreadable('32-bit integer pixels have no agreed range')
        values = np.asarray(image) >> bits - 8
        if tags and metadata.white_is_zero(data):
            values = 255 - values
        return Image.fromarray(values.astype(np.uint8))
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any of Pillow's 8-bit modes to RGB, with transparency composited over white."""
    if image.mode == 'La':
        image = image.convert('LA')
    if 'A' in image.mode or 'a' in image.mode or 'transparency' in image.info:
        image = image.convert('RGBA')
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image)
    return image.convert('RGB')
