"""Implementations of softmax(q k^T) v: XLA's, by chunks, cuDNN's, and two kernels for TPUs.

Shapes: B batch, T tokens, H heads, C channels of a head, D width.
"""

import functools
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from vit_jax.errors import UserError
from vit_jax.models import attention_kernel as kernel
from vit_jax.models import attention_tiled, memory, tiling

# Names of NVIDIA's GPUs of Pascal, Volta and Turing.
BEFORE_AMPERE = re.compile(r'\b(GTX|TITAN|RTX 20\d\d|Quadro|Tesla|[PT]\d+G?|V100)\b')
MANY = 2048  # tokens from which on no [B, H, T, T] is in memory, but where it is captured


def chosen(
    kind: str, platform: str, device: str, *, tokens: int, width: int, heads: int,
    dtype: DTypeLike, dropout: float, capture: bool, relative: bool, bias: tuple[int, ...] = (),
) -> str:  # fmt: skip
    """Resolves 'auto' to the fastest implementation; raises UserError if `kind` does not apply.

    `platform` and `device` are JAX's names of what the step is compiled for: 'tpu', 'TPU v4'.
    `bias` is the shape of what is added to the logits: [H, T, T], a shape with images, or ().
    """
    found = {'xla': None}
    found['chunked'] = (
        'it does not return the probabilities, which are captured' if capture
        else "it has no keys by offset, and model.posemb is 'relative'" if relative else None
    )  # fmt: skip
    dropped = f'it cannot drop probabilities, and model.attention_dropout is {dropout}'
    common = found['chunked'] or (dropped if dropout else None)
    added = 'it adds nothing to the logits, and model.style.bias or a mask does' if bias else None
    found['cudnn'] = common or added or cudnn_obstacle(device, width // heads, dtype)
    tpu = common or (
        f'it is a kernel for TPUs, and this is for {platform}' if platform != 'tpu'
        else f'a kernel cannot multiply bfloat16 on {device}' if device in ('TPU v2', 'TPU v3')
        else None
    )  # fmt: skip
    mask = 'it adds no mask to the logits' if len(bias) > 3 else None
    found['pallas'] = tpu or mask or size_obstacle(tokens, width, heads, dtype, device, bias)
    cut = tiling.plan(tokens, heads, width // heads)
    fits = tiling.buffers(cut, dtype, device, rotary=True)
    large = f'keys and values of {tokens} tokens do not fit on the chip of {device}'
    found['tiled'] = tpu or added or (None if fits else large)
    if kind == 'auto':
        plain = ('chunked', 'xla') if tokens >= MANY else ('xla',)
        return next(k for k in ('pallas', 'tiled', 'cudnn', *plain) if not found[k])
    if found[kind]:
        raise UserError(f"model.attention is {kind!r}, but {found[kind]}; 'auto' chooses")
    return kind


def size_obstacle(
    tokens: int, width: int, heads: int, dtype: DTypeLike, device: str, bias: tuple[int, ...]
) -> str | None:
    """Why an image with all its heads, and biases of the logits, do not fit on a TPU's chip."""
    biased = heads if bias else 0
    if kernel.buffers(tokens, width, dtype, device, biased):
        return None
    needed = kernel.block_bytes(tokens, width, dtype, biased) / kernel.MIB
    biases = f' with biases of {heads} heads' if bias else ''
    return (
        f'{tokens} tokens of width {width}{biases} need {needed:.0f} MiB on the chip, where '
        f'{device} has {kernel.available(device) / kernel.MIB:.0f}'
    )


def cudnn_obstacle(device: str, channels: int, dtype: DTypeLike) -> str | None:
    """Why cuDNN does not apply to a device and heads of these channels."""
    if 'NVIDIA' not in device:
        return f'it is for NVIDIA GPUs, and this is for {device}'
    if BEFORE_AMPERE.search(device):
        return f'it is for NVIDIA GPUs from Ampere on, and this is for {device}'
    if dtype == jnp.float32:
        return (
            'it computes in bfloat16 or float16, and products are in float32 (model.matmul_dtype, '
            'else model.dtype)'
        )
    if channels % 8 or channels > 128:
        return f'{channels} channels of a head are not a multiple of 8 up to 128'
    return None


def masked(bias: jax.Array | None, attend: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Adds to `bias` [H, T, T] of logits the least number where `attend` [B, T, T] is false.

    Returns [B, H, T, T], or [B, 1, T, T] of no bias.
    """
    mask = jnp.where(attend, 0, jnp.finfo(dtype).min).astype(dtype)[:, None]
    return mask if bias is None else bias.astype(dtype) + mask


@jax.custom_jvp
def normalised(logits: jax.Array, most: jax.Array, total: jax.Array) -> jax.Array:
    """Softmax over the last axis, given the maxima and sums that belong to the logits."""
    return jnp.exp(logits - most) / total


@normalised.defjvp
def normalised_derivative(
    primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    """That of the whole softmax: p (d - sum(p d)), p the probabilities."""
    p, d = normalised(*primals), tangents[0]
    return p, p * (d - jnp.sum(p * d, axis=-1, keepdims=True))


def softmax(logits: jax.Array) -> jax.Array:
    """Softmax over the last axis; on CPUs its gradient reads the probabilities alone."""
    if memory.target()[0] != 'cpu':
        return jax.nn.softmax(logits)
    fixed = jax.lax.stop_gradient(logits)
    most = jnp.max(fixed, axis=-1, keepdims=True)
    return normalised(logits, most, jnp.sum(jnp.exp(fixed - most), axis=-1, keepdims=True))


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention by cuDNN: q, k, v [B, T, H, C] -> [B, T, H, C].

    JAX (0.10 and 0.11) refuses gradients for an odd T, as it checks even an absent bias, which
    needs an even T. So an odd T is padded by one token, which the sequence lengths exclude.
    """
    attend = functools.partial(jax.nn.dot_product_attention, implementation='cudnn')
    b, t = q.shape[:2]
    if t % 2 == 0:
        return attend(q, k, v)
    q, k, v = (jnp.pad(x, [(0, 0), (0, 1), (0, 0), (0, 0)]) for x in (q, k, v))
    lengths = memory.shard_batch(jnp.full(b, t, jnp.int32))
    return attend(q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths)[:, :t]


def on_each_device(
    function: Callable, arrays: Sequence[tuple[int | None, int]],
    results: Sequence[tuple[int | None, int]],
) -> Callable:  # fmt: skip
    """Maps the function over devices, each with its own images and heads, if a mesh is set.

    `arrays` and `results` have, for each argument and result, the dimension of its images (None
    without images) and that of its heads (-1 without heads).
    """
    if not {'data', 'fsdp'} <= set(jax.sharding.get_abstract_mesh().axis_names):
        return function

    def spec(images, heads):
        axes = {images: ('data', 'fsdp'), heads: 'tensor'}
        return P(*(axes.get(k) for k in range(heads + 1)))

    specs = [tuple(spec(*dims) for dims in places) for places in (arrays, results)]
    return jax.shard_map(function, in_specs=specs[0], out_specs=specs[1], check_vma=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def pallas(
    qkv: jax.Array, bias: jax.Array, tables: tuple[jax.Array, ...] = (),
    shift: jax.Array | None = None, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Attention by the kernel: qkv [B, T, 3, H, C] and bias [3, H, C] -> [B, T, H, C].

    `tables`, cosines and sines [T, C] of rotary.rotation with pairs 'halves', rotate queries and
    keys. `shift` [H, T, T], rounded to the dtype of qkv, is added to the logits of every image.
    Only these arrays cross main memory. The gradients of bias and shift cost no pass of their own.
    """
    return forward(qkv, bias, tables, shift, interpret)[0]


def places(tables: Sequence[jax.Array], shift: jax.Array | None) -> list[tuple[int | None, int]]:
    """Dimensions, as in `on_each_device`, of the images and heads of tables and shift."""
    return [(None, -1)] * len(tables) + [(None, 0)] * (shift is not None)


def forward(
    qkv: jax.Array, bias: jax.Array, tables: tuple[jax.Array, ...], shift: jax.Array | None,
    interpret: bool,
) -> tuple[jax.Array, tuple]:  # fmt: skip
    """(`pallas`, residuals: qkv [B, T, 3 D] with the bias added, bias, tables, shift)."""

    def local(qkv, bias, *constants):
        b, t, _, h, c = qkv.shape
        # As matrices, which both the projection and the kernel use, to avoid a copy.
        qkv = qkv.reshape(b, t, 3 * h * c) + bias.reshape(3 * h * c).astype(qkv.dtype)
        out = jax.ShapeDtypeStruct((b, t, h * c), qkv.dtype)
        (out,) = kernel.call(
            kernel.forward_kernel, h, 2, [qkv], [out], interpret, constants, shift is not None
        )
        return out.reshape(b, t, h, c), qkv

    constants = [*tables] if shift is None else [*tables, shift.astype(qkv.dtype)]
    arrays = [(0, 3), (None, 1), *places(tables, shift)]
    out, qkv = on_each_device(local, arrays, [(0, 2), (0, 2)])(qkv, bias, *constants)
    b, t, h, c = out.shape
    out = checkpoint_name(out.reshape(b, t, h * c), 'attended').reshape(out.shape)
    qkv = checkpoint_name(qkv, 'qkv')
    return out, (qkv, bias, tables, shift)


def backward(
    interpret: bool, residuals: tuple, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, None, jax.Array | None]:
    """Gradients of `pallas` by qkv, bias and shift; tables have none."""
    qkv, bias, tables, shift = residuals
    shifted = shift is not None

    def local(qkv, d_out, *constants):
        b, t, h, c = d_out.shape
        arrays = [qkv, d_out.reshape(b, t, h * c)]
        shapes = [
            jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
            jax.ShapeDtypeStruct((b, 1, 3 * h * c), jnp.float32),
        ]
        if shifted:
            groups = 1 if b % 2 else 2  # a chip may have two cores, each with a sum of its own
            shapes.append(jax.ShapeDtypeStruct((groups, h, t, t), jnp.float32))
        d_qkv, d_bias, *sums = kernel.call(
            kernel.backward_kernel, h, 5, arrays, shapes, interpret, constants, shifted
        )
        return d_qkv.reshape(b, t, 3, h, c), d_bias.reshape(b, 3, h, c), *sums

    constants = [*tables, shift.astype(qkv.dtype)] if shifted else [*tables]
    arrays = [(0, 2), (0, 2), *places(tables, shift)]
    results = [(0, 3), (0, 2), *[(0, 1)] * shifted]
    d_qkv, d_bias, *sums = on_each_device(local, arrays, results)(qkv, d_out, *constants)
    d_shift = jnp.sum(sums[0], axis=0).astype(shift.dtype) if shifted else None
    return d_qkv, jnp.sum(d_bias, axis=0).astype(bias.dtype), None, d_shift


pallas.defvjp(forward, backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def tiled(
    qkv: jax.Array, bias: jax.Array, tables: tuple[jax.Array, ...] = (), interpret: bool = False
) -> jax.Array:
    """`pallas` by tiles, for many tokens and without a shift."""
    return tiled_forward(qkv, bias, tables, interpret)[0]


def tiled_forward(
    qkv: jax.Array, bias: jax.Array, tables: tuple[jax.Array, ...], interpret: bool
) -> tuple[jax.Array, tuple]:
    """(`tiled`, residuals: qkv as the kernel takes it, out, its sums, bias, one table or none)."""

    def local(qkv, bias, *table):
        b, t, _, h, c = qkv.shape
        cut = tiling.plan(t, h, c)
        qkv = qkv.reshape(b, t, 3 * h * c) + bias.reshape(3 * h * c).astype(qkv.dtype)
        qkv = tiling.padded(qkv, cut, h)
        out, sums = attention_tiled.forward(qkv, *table or (None,), cut, interpret)
        return tiling.unpadded(out, cut, h)[:, :, 0], qkv, sums

    table = [jnp.concatenate(tables, axis=1)] if tables else []
    arrays = [(0, 3), (None, 1), *places(table, None)]
    out, qkv, sums = on_each_device(local, arrays, [(0, 2), (0, 2), (0, 1)])(qkv, bias, *table)
    b, t, h, c = out.shape
    out = checkpoint_name(out.reshape(b, t, h * c), 'attended').reshape(out.shape)
    qkv, sums = checkpoint_name(qkv, 'qkv'), checkpoint_name(sums, 'sums')
    return out, (qkv, out, sums, bias, table)


def tiled_backward(
    interpret: bool, residuals: tuple, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    """Gradients of `tiled` by qkv and bias; tables have none."""
    qkv, out, sums, bias, table = residuals

    def local(qkv, out, sums, d_out, *table):
        b, t, h, c = out.shape
        cut = tiling.plan(t, h, c)
        tiles = [tiling.padded(x.reshape(b, t, h * c), cut, h) for x in (out, d_out)]
        found = attention_tiled.backward(qkv, *table or (None,), (*tiles, sums), cut, interpret)
        d_qkv, d_bias = (tiling.unpadded(x, cut, h) for x in found)
        return d_qkv, jnp.squeeze(d_bias, 1)

    arrays = [(0, 2), (0, 2), (0, 1), (0, 2), *places(table, None)]
    d_qkv, d_bias = on_each_device(local, arrays, [(0, 3), (0, 2)])(qkv, out, sums, d_out, *table)
    return d_qkv, jnp.sum(d_bias, axis=0).astype(bias.dtype), None


tiled.defvjp(tiled_forward, tiled_backward)
