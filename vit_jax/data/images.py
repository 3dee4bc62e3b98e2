"""Image files to arrays, as a viewer would show them."""

import io

import numpy as np
from PIL import Image, ImageOps

from vit_jax.errors import UserError

FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF')


class Unreadable(UserError):
    """An image that no array can be made of; says why, its reader knows which."""


def decode(data):
    """Bytes of an image file to uint8 RGB [H, W, 3].

    The orientation in EXIF is applied, transparency laid over white, of an animation the first
    frame taken, 16 bits scaled to 8, CMYK and grey converted. Raises Unreadable for the rest.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
            return np.asarray(to_rgb(image))
    except Unreadable:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise Unreadable(str(e).replace(repr(io.BytesIO), 'the data').split(' <_io')[0]) from e


def to_rgb(image):
    """Any of Pillow's modes to RGB; Unreadable where a viewer would not know the range."""
    if image.mode.startswith('I;16'):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == 'I':  # 16-bit grey, as some versions of Pillow open it
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise Unreadable('32-bit integer pixels have no agreed range')
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == 'F':
        raise Unreadable('floating-point pixels have no agreed range')
    if 'A' in image.mode or 'a' in image.mode or 'transparency' in image.info:
        image = image.convert('RGBA')
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image)
    return image.convert('RGB')
