"""Exports a model to one file that runs without this package: uint8 images to probabilities.

jax.export serialises the file (StableHLO with the weights) for several platforms at once, and for
any number and size of images: the view of an evaluation is part of the function, as products with
two matrices of weights that are computed from the sizes. A zip archive at the end holds
`metadata.json`, for which JAX has no place (names of classes, origin). JAX does not read it; any
zip reader finds it.

Shapes: B batch, H W image, C channels, T tokens, K classes, D width.
"""

import inspect
import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.data import augment
from vit_jax.errors import UserError
from vit_jax.io.text import to_json
from vit_jax.models import interface
from vit_jax.objectives import losses

PLATFORMS = ('cpu', 'cuda', 'tpu')
VIEWS = ('central', 'resize', 'small_central')
LIMIT = 2**31 - 2**24  # bytes of weights: the format addresses two gigabytes
CUT = 2**-10  # as in data/images.py


def exported(
    model: nn.Module,
    params: Any,
    size: tuple[int, int],
    *,
    view: str | Mapping[str, Any] = 'central',
    loss: str | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> jax.export.Exported:
    """Exports a model: uint8 [B, H, W, C] -> probabilities, float32 [B, K].

    Without a head, the output is pre_logits [B, D]; with pool='none' both are per token, [B, T, K]
    and [B, T, D]. Attention is XLA's on all platforms, as a kernel runs on one alone. Blocks are
    scanned unless `model.unroll` is set, as unrolled ones are slow on CPUs.

    Args:
      model: the model.
      params: its parameters.
      size: (height, width) to which the view resizes images.
      view: a view of data/augment.py, one of VIEWS: a name or dict(name=..., its arguments).
      loss: training loss of the head, which selects a softmax or a sigmoid.
      platforms: where the file is to run, of PLATFORMS.

    Raises:
      UserError: the view, a platform or the model can't be exported.
    """
    interface.check_reads_images(model)
    if hasattr(model, 'attention'):
        model = model.clone(attention='xla')
    if hasattr(model, 'unroll'):
        model = model.clone(unroll=model.unroll or 1)

    def classify(params, images):
        output, _ = model.apply({'params': params}, model.normalise(images))
        if model.num_classes is None:
            return output.astype(jnp.float32)
        return losses.probabilities(output, loss)

    channels = len(model.mean)
    return exported_function(classify, params, size, channels, view=view, platforms=platforms)


def exported_function(
    function: Callable[[Any, jax.Array], Any],
    params: Any,
    size: tuple[int, int],
    channels: int,
    *,
    view: str | Mapping[str, Any],
    platforms: Sequence[str] = PLATFORMS,
) -> jax.export.Exported:
    """Exports uint8 [B, H, W, channels] -> function(params, what the view makes of it).

    B, H and W are symbolic. `function` takes uint8 [B, *size, channels]; other arguments are as in
    `exported`.
    """
    platforms = check_platforms(platforms)
    num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    if num_bytes > LIMIT:
        raise UserError(
            f'the weights are {num_bytes / 1e9:.1f} GB; an exported file holds {LIMIT / 1e9:.1f}'
        )
    name, arguments = checked_view(view, size)

    def call(images):
        return function(params, squared(images, size, name, **arguments))

    shape = jax.export.symbolic_shape(f'b, h, w, {channels}')
    images = jax.ShapeDtypeStruct(shape, jnp.uint8)
    return jax.export.export(jax.jit(call), platforms=platforms)(images)


def check_platforms(platforms: Sequence[str]) -> list[str]:
    """`platforms` as a list without duplicates; raises UserError unless all are in PLATFORMS."""
    for platform in platforms:
        if platform not in PLATFORMS:
            raise UserError(f'no platform {platform!r}; there are {", ".join(PLATFORMS)}')
    if not platforms:
        raise UserError(f'no platform is named; there are {", ".join(PLATFORMS)}')
    return list(dict.fromkeys(platforms))


def serialised(exported: jax.export.Exported, metadata: Mapping[str, Any]) -> bytes:
    """Bytes for jax.export.deserialize, with `metadata` as JSON in a zip archive at the end."""
    file = io.BytesIO(exported.serialize(vjp_order=0))
    with zipfile.ZipFile(file, 'a') as archive:
        entry = zipfile.ZipInfo('metadata.json')  # dated 1980: the same model gives the same bytes
        archive.writestr(entry, to_json(metadata, indent=2) + '\n')
    return file.getvalue()


def checked_view(
    view: str | Mapping[str, Any], size: tuple[int, int]
) -> tuple[str, dict[str, Any]]:
    """(name, {argument: value}) of a view, with defaults; raises UserError if not exportable."""
    given = dict(name=view) if isinstance(view, str) else dict(view)
    name = given.pop('name', None)
    values = {}
    if name in VIEWS:
        parameters = inspect.signature(augment.VIEWS[name]).parameters
        values = {k: p.default for k, p in parameters.items() if p.kind == p.KEYWORD_ONLY} | given
        values.pop('size')
    ways = (('bilinear', True), ('bilinear', False), ('bicubic', True))
    if (values.get('method'), values.get('antialias')) not in ways:
        text = ', '.join(f'{k}={v!r}' for k, v in {'name': name, **(values or given)}.items())
        raise UserError(
            f'the view {text} cannot be exported; {", ".join(VIEWS)} can, bilinear or, '
            'antialiased, bicubic (--view=central)'
        )
    if values.get('smaller', max(size)) < max(size):
        raise UserError(f'smaller is {values["smaller"]}, less than the image size {size}')
    return name, values


def squared(
    images: jax.Array,
    size: tuple[int, int],
    name: str,
    *,
    crop: float = 1.0,
    smaller: int | None = None,
    method: str,
    antialias: bool,
    rounding: str | None = None,
) -> jax.Array:
    """Applies the view `name`: uint8 [B, H, W, C] -> uint8 [B, *size, C].

    H and W may be symbolic. All but the products is constant, and computed, at compile time.
    """
    b, h, w, c = images.shape
    sides = jnp.asarray(h, jnp.int32), jnp.asarray(w, jnp.int32)
    windows = window(*sides, size, crop) if name == 'central' else sides
    whole = size  # size of the resized window, whose centre is taken
    if name == 'resize':
        whole = tuple(round(side / crop) for side in size)
    elif name == 'small_central':
        whole = tuple(quotient(smaller * side, jnp.minimum(*sides), rounding) for side in sides)
    down, across = (
        weights(side, length, n, pixels, method, antialias, rounding)
        for side, length, n, pixels in zip((h, w), windows, whole, size, strict=True)
    )
    out = images.astype(jnp.float32).reshape(b, h, w * c)  # [B, H, W C]
    exact = jax.lax.Precision.HIGHEST  # a TPU would otherwise round operands to bfloat16
    out = jnp.einsum('ih,bhk->bik', down, out, precision=exact)
    out = jnp.einsum('jw,biwc->bijc', across, out.reshape(b, size[0], w, c), precision=exact)
    return jnp.clip(out + (0.5 if antialias else CUT), 0, 255).astype(jnp.uint8)


def quotient(number: Any, by: Any, rounding: str | None) -> Any:
    """Integer division, rounded half to even if `rounding` is 'tensorflow', else down."""
    down, rest = number // by, number % by
    if rounding != 'tensorflow':
        return down
    return down + ((2 * rest > by) | ((2 * rest == by) & (down % 2 == 1)))


def window(
    h: jax.Array, w: jax.Array, size: tuple[int, int], crop: float
) -> tuple[jax.Array, jax.Array]:
    """central.window, in float64 like there, for sides that are known at compile time.

    For every eighth side, the value to be rounded lies halfway between two pixels. XLA folds
    constants exactly, even for devices without float64.
    """
    with jax.enable_x64(True):
        sides = h.astype(jnp.float64), w.astype(jnp.float64)
        scale = crop * jnp.minimum(sides[0] / size[0], sides[1] / size[1])
        return tuple(
            jnp.clip(jnp.round(n * scale), 1, side).astype(jnp.int32)
            for n, side in zip(size, sides, strict=True)
        )


def weights(
    side: Any,
    length: jax.Array | int,
    whole: jax.Array | int,
    size: int,
    method: str,
    antialias: bool,
    rounding: str | None,
) -> jax.Array:
    """Weights, float32 [size, side], of one axis: images.weights for the view's windows.

    The central `length` of `side` pixels are resized to `whole`, of which the central `size` are
    taken. Distances are exact: integers over a common denominator.
    """
    beside = jnp.asarray(whole - size, jnp.int32)
    corner = quotient(beside, 2, 'tensorflow') if rounding == 'torchvision' else beside // 2
    i = corner + jnp.arange(size, dtype=jnp.int32)[:, None]
    j = jnp.arange(side, dtype=jnp.int32) - (side - length) // 2
    if antialias:
        distance, reach = (2 * j + 1) * whole - (2 * i + 1) * length, jnp.maximum(length, whole)
    else:  # positions outside are clamped to the border
        place = jnp.clip((2 * i + 1) * length - whole, 0, 2 * whole * (length - 1))
        distance, reach = 2 * whole * j - place, whole
    x = jnp.abs(distance).astype(jnp.float32) / (2 * reach)
    near = cubic(x) if method == 'bicubic' else jnp.maximum(1 - x, 0)
    near = jnp.where((j >= 0) & (j < length), near, 0)
    return near / jnp.sum(near, axis=1, keepdims=True)


def cubic(x: jax.Array) -> jax.Array:
    """Keys' cubic kernel (a = -0.5) at distances x, as images.keys_cubic."""
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))
