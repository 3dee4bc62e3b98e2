"""Prepares images of any kind for a model, and names its classes; for notebooks.

Shapes: B batch, H W image, C channels.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from PIL import Image

from vit_jax.convert import load as weights
from vit_jax.convert import views
from vit_jax.convert.stages import size_of
from vit_jax.data import decoding, files, metadata, tasks
from vit_jax.errors import UserError
from vit_jax.io.text import printable
from vit_jax.models.interface import Metadata

Source = nn.Module | tuple[nn.Module, Any] | str | os.PathLike
UNKNOWN = Metadata()
KINDS = 'give the path of a file, a PIL image (PIL.Image.open(...)) or an array'
RANGES = 'give uint8 (0 to 255), uint16 (0 to 65535) or floats from 0 to 1'


def preprocess(
    source: Source,
    images: str | os.PathLike | Image.Image | np.ndarray | Iterable,
    *,
    image_size: int | Sequence[int] | None = None,
    view: str | dict | None = None,
) -> jax.Array:
    """Prepares images for a model as `python -m vit_jax.predict` does: float32 [B, H, W, 3].

        model, params = vit_jax.load(path)
        logits, out = model.apply({'params': params}, vit_jax.preprocess(model, ['a.jpg', 'b.png']))

    Args:
      source: a model that `vit_jax.load` returned, the pair (model, parameters), or anything that
        `load` takes: a path, an address, a name of the catalogue.
      images: one image or several. An image is a file (its path or address; a folder stands for all
        images in it and its subfolders, sorted), a PIL image, or an array [H, W], [H, W, 1],
        [H, W, 3] or [H, W, 4] (with alpha) of uint8, uint16 (0 to 65535) or floats from 0 to 1. An
        array [B, H, W, C] is several images. Transparency is blended over white, EXIF orientation
        is applied, CMYK and grey become RGB.
      image_size: pixels a side, or (height, width). None: the size of `vit_jax.load`, which predict
        and every other command use, too.
      view: how an image is resized to that size: a view of data/augment.py, such as 'central',
        'resize' or dict(name='central', crop=0.9). None: as the checkpoint states.

    Raises:
      UserError: an image is none of these, or cannot be read; the message names it.
    """
    model, about = find_model(source, image_size)
    if len(model.mean) != 3:
        raise UserError(f'this model takes images of {len(model.mean)} channels, not 3')
    size = size_of(image_size) or about.image_size
    if size is None and about is UNKNOWN:
        raise UserError("nothing tells the size of this model's images; give image_size=...")
    size = size or (files.DEFAULT_SIZE,) * 2
    resize = tasks.fixed_view(
        views.check_view(view) or views.scale_view(about.view, about.image_size, size), size
    )
    pixels = [
        files.pixels(image, resize) if isinstance(image, str) else resize(to_pixels(image), None)
        for image in list_images(images)
    ]
    return model.normalise(np.stack(pixels))


def class_names(source: Source) -> tuple[str, ...] | None:
    """Class names by label, or None if the checkpoint does not state them.

    `source` is that of `preprocess`: a model from `vit_jax.load`, or anything that `load` takes.
    """
    model, about = find_model(source, whole=True)
    count = getattr(model, 'num_classes', None)  # None of a model without classes
    return about.classes if about.classes and len(about.classes) == count else None


def find_model(
    source: Any, image_size: int | Sequence[int] | None = None, whole: bool = False
) -> tuple[nn.Module, Metadata]:
    """(model, Metadata) of a model, a pair (model, parameters), or anything that `load` takes.

    Of a file or run with a model around an encoder this is the encoder unless `whole`.
    """
    if isinstance(source, tuple) and source and hasattr(source[0], 'normalise'):
        source = source[0]
    if hasattr(source, 'normalise'):
        return source, source.metadata or UNKNOWN
    if not isinstance(source, (str, os.PathLike)):
        raise UserError(f'{type(source).__name__} is neither a model nor a checkpoint to load')
    loaded = weights.read(
        source, image_size=image_size, values=False, as_input=True, whole=whole, towers=True
    )
    return loaded.model, loaded.metadata


def list_images(images: Any) -> list[Any]:
    """A list of one image or several: files as text, folders replaced by the images in them."""
    if isinstance(images, (str, os.PathLike)):
        return files.find_images([images])
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, (bytes, bytearray, Mapping)) or hasattr(images, 'read'):
        raise UserError(f'{type(images).__name__} is not an image; {KINDS}')
    if hasattr(images, '__array__'):
        return list(images) if np.ndim(images) == 4 else [images]
    if not isinstance(images, Sequence) and not hasattr(images, '__iter__'):
        raise UserError(f'{type(images).__name__} is not an image; {KINDS}')
    several = []
    for image in images:
        several += files.find_images([image]) if isinstance(image, (str, os.PathLike)) else [image]
    if not several:
        raise UserError('no image is given')
    return several


def to_pixels(image: Any) -> np.ndarray:
    """Converts a PIL image or an array to uint8 [H, W, 3]; raises UserError for anything else."""
    if isinstance(image, Image.Image):
        return from_pil(image)
    if not hasattr(image, '__array__'):
        raise UserError(f'{printable(type(image).__name__)} is not an image; {KINDS}')
    values = np.asarray(image)
    shape = list(values.shape)
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.shape[-1] not in (1, 3, 4) or not values.size:
        first = values.ndim == 3 and values.shape[0] in (1, 3, 4)
        why = '; channels come last: image.transpose(1, 2, 0)' if first else ''
        raise UserError(f'an image is {shape}, not [H, W, 3], [H, W, 4] or [H, W]{why}')
    values = to_uint8(values)
    if values.shape[-1] == 1:
        return np.repeat(values, 3, axis=-1)
    return np.asarray(decoding.to_rgb(Image.fromarray(values)))


def from_pil(image: Image.Image) -> np.ndarray:
    """Converts a PIL image to uint8 [H, W, 3], from its file if that is open and not decoded yet.

    Pillow does not keep all that determines how a file looks (`decoding`), and its EXIF parser
    fails.
    """
    if not all(image.size):
        raise UserError(f'an image is {image.width} x {image.height} pixels')
    file = getattr(image, 'fp', None)
    if file and getattr(image, 'tile', None) and image.tell() == 0:
        if image.format in (*decoding.FORMATS, 'MPO'):
            position = file.tell()
            file.seek(0)
            data = file.read()
            file.seek(position)
            return decoding.decode(data)
    if image.mode.startswith('I') and image.format is None:  # perhaps made from an array
        values = np.asarray(image)
        fits_uint16 = 0 <= values.min() and values.max() < 2**16
        values = to_uint8(values.astype(np.uint16) if fits_uint16 else values)
        pixels = np.repeat(values[..., None], 3, axis=-1)
    else:
        pixels = np.asarray(decoding.to_rgb(decoding.eight_bits(image, b'')))
    return decoding.apply_orientation(pixels, metadata.orientation(image.info.get('exif', b'')))


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Converts pixels to uint8 by dtype and range; raises UserError if these are ambiguous.

    Floats are rounded to the nearest of 256 levels. Of 16 bits the upper 8 are kept, as for files.
    """
    if values.dtype == np.uint8:
        return values
    low, high = float(values.min()), float(values.max())
    description = f'an image of dtype {values.dtype} has values from {low:g} to {high:g}'
    if values.dtype == np.uint16:
        if 0 < high < 256:
            raise UserError(f'{description}, as 8 bits have them; {RANGES}')
        return (values >> 8).astype(np.uint8)
    if not jax.numpy.issubdtype(values.dtype, np.floating):
        raise UserError(f'{description}; {RANGES}')
    if not (0 <= low and high <= 1):  # refuses NaN, too
        raise UserError(f'{description}; {RANGES}. What is normalised already goes to model.apply')
    return np.round(values.astype(np.float32) * 255).astype(np.uint8)
