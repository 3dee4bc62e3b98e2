"""What all models have in common: metadata, and checks of their inputs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError, shown

Precision = Literal['tensorfloat32', 'float32']


@dataclasses.dataclass(frozen=True)
class Metadata:
    """Images and classes of a checkpoint; no output of the model depends on them."""

    image_size: tuple[int, int] | None = None  # (height, width) in pixels; None: any size fits
    view: str | dict = 'central'  # how an image is resized to it, see data/augment.py
    classes: tuple[str, ...] | None = None  # names by label; None: unknown
    loss: str | None = None  # training loss of the head, 'softmax' or 'sigmoid'; None: unknown


def metadata() -> Any:
    """The field `metadata` of a model, which its hash and equality leave out."""
    return dataclasses.field(default=None, compare=False, repr=False)


def dtype_name(value: Any) -> Any:
    """The name of a JAX or NumPy dtype, 'bfloat16'; returns anything else unchanged."""
    scalar = isinstance(value, type) and issubclass(value, np.generic)
    if scalar or isinstance(value, (np.dtype, type(jnp.bfloat16))):
        return jnp.dtype(value).name
    return value


def computed_at(precision: Precision | None, function: Callable) -> Callable:
    """The function, with its products of float32 values at a precision; None: the device's."""
    if precision is None:
        return function

    @functools.wraps(function)
    def precise(*args, **kwargs):
        with jax.default_matmul_precision(precision):
            return function(*args, **kwargs)

    return precise


def at_precision(call: Callable) -> Callable:
    """Decorates the call of a model, or of one around `vit`, to compute at its `precision`.

    Or another function whose first argument is the model.
    """

    @functools.wraps(call)
    def precise(self, *args, **kwargs):
        return computed_at(getattr(self, 'vit', self).precision, call)(self, *args, **kwargs)

    return precise


def in_float32(model: Any) -> bool:
    """Whether all products of a model, or of one around `vit`, are of float32 values."""
    return getattr(model, 'vit', model).product_dtype == 'float32'


def exact(model: Any) -> Any:
    """The model with products of float32 values in float32, unless it has a precision."""
    names = {field.name for field in dataclasses.fields(model)} & {'vit', 'image', 'text'}
    if names:
        return model.clone(**{name: exact(getattr(model, name)) for name in names})
    stated = model.precision is not None or not in_float32(model)
    return model if stated else model.clone(precision='float32')


def computed_exactly(function: Callable, model: Any) -> Callable:
    """The function, with its products of float32 values in float32.

    Returned as it is if the model that it applies has products of another dtype. `model` is None
    for a function that applies none.
    """
    exactly = model is None or in_float32(model)
    return computed_at('float32' if exactly else None, function)


def check_precision(model: Any) -> None:
    """Raises UserError for a precision of products that are in another dtype than float32."""
    if model.precision is not None and model.product_dtype != 'float32':
        raise UserError(
            f'precision is {model.precision!r}, which is of products of float32 values, and '
            f'they are in {model.product_dtype} (model.matmul_dtype, else model.dtype)'
        )


def check_images(images: Any, channels: int) -> None:
    """Raises UserError unless images are floats [B, H, W, channels]."""
    if not hasattr(images, 'shape'):
        raise UserError(
            f'images are of type {type(images).__name__}, not an array [B, H, W, {channels}]; '
            'vit_jax.preprocess(model, images) makes one of files, PIL images and arrays'
        )
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[-1] != channels:
        raise UserError(f'images are {list(shape)}, not [B, H, W, {channels}]')
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f'images are {images.dtype}, not normalised floats; model.normalise(images) makes '
            'them of uint8, vit_jax.preprocess(model, images) of files and arrays'
        )


def check_tokens(tokens: Any, length: int) -> None:
    """Raises UserError unless tokens are int [B, L], with L from 1 to `length`."""
    if not hasattr(tokens, 'shape'):
        raise UserError(f'tokens are of type {type(tokens).__name__}, not an array of int [B, L]')
    shape = tuple(tokens.shape)
    if len(shape) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(f'tokens are {tokens.dtype} {list(shape)}, not int [B, L]')
    if not 0 < shape[1] <= length:
        raise UserError(
            f'a text has {shape[1]} tokens, and the model has positions for 1 to {length} '
            '(text.length); cut longer texts where they are tokenized'
        )


EACH_TOKEN = (
    "model.pool is 'none': the output is of each token, and none of the image; choose another, as "
    "vit_jax.load(path, pool='cls') or in a config model.pool"
)


def check_output(model: Any) -> None:
    """Raises UserError for a model with an output per token instead of one per image."""
    if getattr(model, 'pool', None) == 'none':
        raise UserError(EACH_TOKEN)


def check_reads_images(model: Any) -> None:
    """Raises UserError for a model of something else than images."""
    name = getattr(model, 'reads', 'image')
    if name != 'image':
        raise UserError(f'the model reads {name}, not images; python -m vit_jax.evaluate takes it')


def captures(capture: str | Sequence[str], valid: tuple[str, ...]) -> tuple[str, ...]:
    """`capture`, a name or several, as a tuple; raises UserError for one that is not in `valid`."""
    names = (capture,) if isinstance(capture, str) else capture
    if not isinstance(names, (tuple, list)):
        raise UserError(f'capture is {shown(capture)}, not a name or several')
    for name in names:
        if name not in valid:
            choices = f'there are {", ".join(valid)}' if valid else 'this model captures nothing'
            raise UserError(f'no capture {name!r}; {choices}')
    return tuple(names)


def check_size(
    images: jax.Array, grid: tuple[int, int], params: Mapping[str, Any], before: int = 0
) -> None:
    """Raises UserError if the parameters have positions for another grid (h, w) than the images.

    `before` is the number of prefix tokens that have positions.
    """
    h, w = grid
    encoder = params.get('encoder', {})
    tables = {**encoder, **params}
    counts = []
    if 'posemb' in tables:
        counts.append((tables['posemb'].shape[-2] - before, h * w))
    if 'posemb_y' in tables:
        counts.append((tables['posemb_y'].shape[-2], h))
        counts.append((tables['posemb_x'].shape[-2], w))
    if 'relative' in encoder.get('attn', {}):
        counts.append(((encoder['attn']['relative'].shape[-3] + 1) // 2 - before, h * w))
    if 'bias_table' in {**params, **encoder.get('attn', {})}:
        rows = {**params, **encoder.get('attn', {})}['bias_table'].shape[-2]
        if rows - 3 not in (offsets := (2 * h - 1) * (2 * w - 1), offsets - 3):
            counts.append((f'offsets of {rows} rows', offsets))
    if 'token_mixing' in encoder:
        counts.append((encoder['token_mixing']['fc1']['kernel'].shape[-2], h * w))
    for expected, count in counts:
        if expected != count:
            y, x = images.shape[1:3]
            raise UserError(
                f'images of {y} x {x} pixels are {h} x {w} patches, and the parameters have '
                f'positions for {expected} in place of {count}: '
                f'vit_jax.load(path, image_size=({y}, {x})) fits them where they can be resized'
            )
