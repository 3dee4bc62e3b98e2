"""Implementations of softmax(q k^T) v: XLA's, cuDNN's, and a kernel for TPUs.

Shapes: B batch, T tokens, H heads, C channels of a head.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from vit_jax.errors import UserError
from vit_jax.models import memory

ROWS = 256  # queries at a time, so that intermediates stay on the chip
MIB = 2**20
SMALL = {'TPU v4': 16 * MIB}  # memory on the chip that a kernel may use, else LARGE
LARGE = 32 * MIB


def chosen(
    kind: str, platform: str, device: str, *, tokens: int, width: int, heads: int,
    dtype: DTypeLike, dropout: float, capture: bool, relative: bool, bias: bool = False,
) -> str:  # fmt: skip
    """Resolves 'auto' to the fastest implementation; raises UserError if `kind` does not apply.

    `platform` and `device` are JAX's names of what the step is compiled for: 'tpu', 'TPU v4'.
    """
    obstacles = {'xla': None}
    obstacles['pallas'] = obstacles['cudnn'] = (
        'it does not return the probabilities, which are captured' if capture
        else "it adds nothing to the logits, and model.posemb is 'relative'" if relative
        else 'it adds nothing to the logits, and model.style.bias or a mask does' if bias
        else f'it cannot drop probabilities, and model.attention_dropout is {dropout}'
        if dropout else None
    )  # fmt: skip
    channels = width // heads
    if platform != 'tpu':
        obstacles['pallas'] = f'it is a kernel for TPUs, and this is for {platform}'
    elif device in ('TPU v2', 'TPU v3'):
        obstacles['pallas'] = f'a kernel cannot multiply bfloat16 on {device}'
    elif not buffers(tokens, width, dtype, device):
        obstacles['pallas'] = (
            f'{tokens} tokens of width {width} need {block_bytes(tokens, width, dtype) / MIB:.0f} '
            f'MiB on the chip, where {device} has {SMALL.get(device, LARGE) / MIB:.0f}'
        )
    if 'NVIDIA' not in device:
        obstacles['cudnn'] = f'it is for NVIDIA GPUs, and this is for {device}'
    elif dtype == jnp.float32:
        obstacles['cudnn'] = (
            'it computes in bfloat16 or float16, and products are in float32 (model.matmul_dtype, '
            'else model.dtype)'
        )
    elif channels % 8 or channels > 128:
        obstacles['cudnn'] = f'{channels} channels of a head are not a multiple of 8 up to 128'
    if kind == 'auto':
        return next(k for k in ('pallas', 'cudnn', 'xla') if not obstacles[k])
    if obstacles[kind]:
        raise UserError(f"model.attention is {kind!r}, but {obstacles[kind]}; 'auto' chooses")
    return kind


def masked(bias: jax.Array | None, attend: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Adds to `bias` [H, T, T] of logits the least number where `attend` [B, T, T] is false.

    Returns [B, H, T, T], or [B, 1, T, T] of no bias.
    """
    mask = jnp.where(attend, 0, jnp.finfo(dtype).min).astype(dtype)[:, None]
    return mask if bias is None else bias.astype(dtype) + mask


def block_bytes(tokens: int, width: int, dtype: DTypeLike, buffers: int = 1) -> int:
    """Approximate bytes on the chip of the backward kernel: images in and out, and ten matrices."""
    rows, lanes = -(-tokens // 16) * 16, -(-tokens // 128) * 128
    images = 7 * buffers * rows * width * jnp.dtype(dtype).itemsize
    return images + 40 * min(ROWS, rows) * lanes


def buffers(tokens: int, width: int, dtype: DTypeLike, device: str) -> int:
    """2 if the next image can be loaded during computation, 1 if only one fits, else 0."""
    available = SMALL.get(device, LARGE)
    return next((n for n in (2, 1) if block_bytes(tokens, width, dtype, n) <= available), 0)


def product(a: jax.Array, b: jax.Array, dims: tuple[int, int]) -> jax.Array:
    """Product of matrices over a dimension of each: (1, 1) for a b^T; summed in float32."""
    return jax.lax.dot_general(a, b, ((dims[:1], dims[1:]), ((), ())),
                               preferred_element_type=jnp.float32)  # fmt: skip


def probabilities(q: jax.Array, k: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(C)) in float32: [R, C], [T, C] -> [R, T]."""
    logits = product(q, k, (1, 1)) * q.shape[-1] ** -0.5
    e = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return e / jnp.sum(e, axis=-1, keepdims=True)


def pieces(shape: tuple[int, ...], heads: int) -> Iterator[tuple[list[slice], slice]]:
    """Yields (lanes of q, k and v of a head, rows of queries) that cover [1, T, 3 D]."""
    _, tokens, width = shape
    c = width // 3 // heads
    for h in range(heads):
        lanes = [slice(i * width // 3 + h * c, i * width // 3 + (h + 1) * c) for i in range(3)]
        for start in range(0, tokens, ROWS):
            yield lanes, slice(start, min(start + ROWS, tokens))


def rotated(
    x: jax.Array, tables: Sequence[jax.Ref], rows: slice, sign: int = 1
) -> jax.Array:
    """Rotates x [R, C] of a head by rows of `tables`, cosines and sines [T, C]; -1: backwards.

    Channels c and c + C / 2 turn together. Without tables returns x itself.
    """
    if not tables:
        return x
    cosines, sines = (table[rows] for table in tables)
    y, half = x.astype(jnp.float32), x.shape[-1] // 2
    other = jnp.concatenate([-y[:, half:], y[:, :half]], axis=-1)
    return (y * cosines + other * (sign * sines)).astype(x.dtype)


def forward_kernel(*refs: jax.Ref, heads: int) -> None:
    """Attention of one image: qkv [1, T, 3 D], perhaps tables of `rotated` -> out [1, T, D]."""
    qkv, *tables, out = refs
    whole = slice(0, qkv.shape[1])
    for (q, k, v), rows in pieces(qkv.shape, heads):
        queries = rotated(qkv[0, rows, q], tables, rows)
        probs = probabilities(queries, rotated(qkv[0, :, k], tables, whole))
        values = qkv[0, :, v]
        out[0, rows, q] = product(probs.astype(values.dtype), values, (1, 0)).astype(out.dtype)


def backward_kernel(*refs: jax.Ref, heads: int) -> None:
    """Gradient of `forward_kernel`, and its sum over tokens.

    (qkv [1, T, 3 D], d_out [1, T, D], perhaps tables) -> (d_qkv [1, T, 3 D], float32 [1, 1, 3 D])
    Recomputes the probabilities. The sum is the gradient of a bias, which is added to every token;
    summing later would read the whole gradient again.
    """
    qkv, d_out, *tables, d_qkv, d_bias = refs
    tokens, dtype, sums = qkv.shape[1], qkv.dtype, [0, 0, 0]
    whole = slice(0, tokens)
    for lanes, rows in pieces(qkv.shape, heads):
        q, k, v = lanes
        queries, d_o = rotated(qkv[0, rows, q], tables, rows), d_out[0, rows, q]
        keys = rotated(qkv[0, :, k], tables, whole)
        probs = probabilities(queries, keys)
        d_probs = product(d_o, qkv[0, :, v], (1, 1))
        d_logits = probs * (d_probs - jnp.sum(probs * d_probs, axis=-1, keepdims=True))
        d_logits = (d_logits * queries.shape[-1] ** -0.5).astype(dtype)
        d_q = rotated(product(d_logits, keys, (1, 0)), tables, rows, -1)
        d_qkv[0, rows, q] = d_q.astype(dtype)
        sums[0] += jnp.sum(d_q, axis=0, keepdims=True)
        sums[1] += product(d_logits, queries, (0, 0))
        sums[2] += product(probs.astype(dtype), d_o, (0, 0))
        if rows.stop == tokens:
            sums[1] = rotated(sums[1], tables, whole, -1)
            d_qkv[0, :, k], d_qkv[0, :, v] = sums[1].astype(dtype), sums[2].astype(dtype)
            for part, d in zip(lanes, sums, strict=True):
                d_bias[0, :, part] = jnp.sum(d, axis=0, keepdims=True)
            sums = [0, 0, 0]


def call(
    kernel: Callable[..., None], heads: int, matmuls: int, arrays: Sequence[jax.Array],
    shapes: Sequence[jax.ShapeDtypeStruct], interpret: bool, tables: Sequence[jax.Array] = (),
) -> Sequence[jax.Array]:  # fmt: skip
    """Runs a kernel over all images, from arrays [B, T, *] to `shapes`.

    Each image has all of the `tables` [T, C], after its arrays. `matmuls` counts the products of
    T x T x C per head, for XLA's estimate of the cost. The kernel streams its inputs, so that the
    compiler need not copy them to the chip beforehand.
    """
    b, t, width = arrays[0].shape
    device = memory.target()[1]
    buffering = pl.Buffered(buffers(t, width // 3, arrays[0].dtype, device) or 1)
    specs = [
        pl.BlockSpec((1, *x.shape[1:]), lambda i: (i, 0, 0), pipeline_mode=buffering)
        for x in (*arrays, *shapes)
    ]
    specs[len(arrays) : len(arrays)] = [pl.BlockSpec(x.shape, lambda i: (0, 0)) for x in tables]
    count = len(arrays) + len(tables)
    if not interpret:
        arrays = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays]
    return pl.pallas_call(
        functools.partial(kernel, heads=heads),
        grid=(b,),
        in_specs=specs[:count],
        out_specs=specs[count:],
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel',), vmem_limit_bytes=SMALL.get(device, LARGE)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * matmuls * b * t * t * width // 3,
            transcendentals=b * heads * t * t,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes)),
        ),
        interpret=interpret,
    )(*arrays, *tables)  # fmt: skip


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def pallas(
    qkv: jax.Array, bias: jax.Array, tables: tuple[jax.Array, ...] = (), interpret: bool = False
) -> jax.Array:
    """Attention by the kernel: qkv [B, T, 3, H, C] and bias [3, H, C] -> [B, T, H, C].

    `tables`, cosines and sines [T, C] of rotary.rotation with pairs 'halves', rotate queries and
    keys. Only these arrays cross main memory. The gradient of the bias costs no pass of its own.
    """
    return forward(qkv, bias, tables, interpret)[0]


def forward(
    qkv: jax.Array, bias: jax.Array, tables: tuple[jax.Array, ...], interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """(`pallas`, residuals: qkv [B, T, 3 D] with the bias added, the bias, the tables)."""

    def local(qkv, bias, *tables):
        b, t, _, h, c = qkv.shape
        # As matrices, which both the projection and the kernel use, to avoid a copy.
        qkv = qkv.reshape(b, t, 3 * h * c) + bias.reshape(3 * h * c).astype(qkv.dtype)
        out = jax.ShapeDtypeStruct((b, t, h * c), qkv.dtype)
        (out,) = call(forward_kernel, h, 2, [qkv], [out], interpret, tables)
        return out.reshape(b, t, h, c), qkv

    places = [(0, 3), (None, 1), *((None, -1),) * len(tables)]
    out, qkv = on_each_device(local, places, [(0, 2), (0, 2)])(qkv, bias, *tables)
    b, t, h, c = out.shape
    out = checkpoint_name(out.reshape(b, t, h * c), 'attended').reshape(out.shape)
    qkv = checkpoint_name(qkv, 'qkv')
    return out, (qkv, bias, tables)


def backward(
    interpret: bool, residuals: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    """Gradients of `pallas` by qkv [B, T, 3, H, C] and bias [3, H, C]; tables have none."""

    def local(qkv, d_out, *tables):
        b, t, h, c = d_out.shape
        arrays = [qkv, d_out.reshape(b, t, h * c)]
        shapes = [
            jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
            jax.ShapeDtypeStruct((b, 1, 3 * h * c), jnp.float32),
        ]
        d_qkv, d_bias = call(backward_kernel, h, 5, arrays, shapes, interpret, tables)
        return d_qkv.reshape(b, t, 3, h, c), d_bias.reshape(b, 3, h, c)

    qkv, bias, tables = residuals
    places = [(0, 2), (0, 2), *((None, -1),) * len(tables)]
    d_qkv, d_bias = on_each_device(local, places, [(0, 3), (0, 2)])(qkv, d_out, *tables)
    return d_qkv, jnp.sum(d_bias, axis=0).astype(bias.dtype), None


pallas.defvjp(forward, backward)
