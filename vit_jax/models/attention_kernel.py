"""A kernel for TPUs that computes softmax(q k^T) v with the probabilities on the chip.

Shapes: B batch, T tokens, H heads, C channels of a head, D width, R rows of queries, G groups of
images.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from vit_jax.models import memory

ROWS = 256  # queries at a time, so that intermediates stay on the chip
MIB = 2**20


def available(device: str) -> int:
    """Bytes of memory on the chip that a kernel may use."""
    return (16 if device == 'TPU v4' else 32) * MIB


def block_bytes(
    tokens: int, width: int, dtype: DTypeLike, biased: int = 0, buffers: int = 1
) -> int:
    """Approximate bytes on the chip of the backward kernel: images in and out, and ten matrices.

    `biased` heads have a bias of the logits and its gradient in float32 there, too.
    """
    rows, lanes = -(-tokens // 16) * 16, -(-tokens // 128) * 128
    size = jnp.dtype(dtype).itemsize
    biases = biased * rows * lanes * (size + 4)
    return 7 * buffers * rows * width * size + 40 * min(ROWS, rows) * lanes + biases


def buffers(tokens: int, width: int, dtype: DTypeLike, device: str, biased: int = 0) -> int:
    """2 if the next image can be loaded during computation, 1 if only one fits, else 0."""
    sizes = {n: block_bytes(tokens, width, dtype, biased, n) for n in (2, 1)}
    return next((n for n, size in sizes.items() if size <= available(device)), 0)


def product(a: jax.Array, b: jax.Array, dims: tuple[int, int]) -> jax.Array:
    """Product of matrices over a dimension of each: (1, 1) for a b^T; summed in float32."""
    return jax.lax.dot_general(a, b, ((dims[:1], dims[1:]), ((), ())),
                               preferred_element_type=jnp.float32)  # fmt: skip


def probabilities(q: jax.Array, k: jax.Array, shift: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(C) + shift) in float32: [R, C], [T, C], [R, T] -> [R, T]."""
    logits = product(q, k, (1, 1)) * q.shape[-1] ** -0.5
    if shift is not None:
        logits += shift.astype(jnp.float32)
    e = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return e / jnp.sum(e, axis=-1, keepdims=True)


def pieces(shape: tuple[int, ...], heads: int) -> Iterator[tuple[int, list[slice], slice]]:
    """Yields (head, its lanes of q, k and v, rows of queries) that cover [1, T, 3 D]."""
    _, tokens, width = shape
    c = width // 3 // heads
    for h in range(heads):
        lanes = [slice(i * width // 3 + h * c, i * width // 3 + (h + 1) * c) for i in range(3)]
        for start in range(0, tokens, ROWS):
            yield h, lanes, slice(start, min(start + ROWS, tokens))


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


def forward_kernel(*refs: jax.Ref, heads: int, shifted: bool) -> None:
    """Attention of one image.

    (qkv [1, T, 3 D], perhaps tables of `rotated`, shift [H, T, T] if `shifted`) -> out [1, T, D]
    """
    qkv, *tables, out = refs
    shift = tables.pop() if shifted else None
    whole = slice(0, qkv.shape[1])
    for h, (q, k, v), rows in pieces(qkv.shape, heads):
        queries = rotated(qkv[0, rows, q], tables, rows)
        keys = rotated(qkv[0, :, k], tables, whole)
        probs = probabilities(queries, keys, shift[h, rows] if shifted else None)
        values = qkv[0, :, v]
        out[0, rows, q] = product(probs.astype(values.dtype), values, (1, 0)).astype(out.dtype)


def backward_kernel(*refs: jax.Ref, heads: int, shifted: bool) -> None:
    """Gradient of `forward_kernel`, and its sum over tokens.

    (qkv [1, T, 3 D], d_out [1, T, D], perhaps tables, and shift if `shifted`) ->
    (d_qkv [1, T, 3 D], float32 [1, 1, 3 D], d_shift float32 [1, H, T, T] if `shifted`)
    Recomputes the probabilities. The sum is the gradient of a bias, which is added to every token;
    summing later would read the whole gradient again. d_shift sums over the images of a group.
    """
    refs = list(refs)
    d_shift = refs.pop() if shifted else None
    qkv, d_out, *tables, d_qkv, d_bias = refs
    shift = tables.pop() if shifted else None
    if shifted:
        pl.when(pl.program_id(1) == 0)(functools.partial(clear, d_shift))
    tokens, dtype, sums = qkv.shape[1], qkv.dtype, [0, 0, 0]
    whole = slice(0, tokens)
    for h, lanes, rows in pieces(qkv.shape, heads):
        q, k, v = lanes
        queries, d_o = rotated(qkv[0, rows, q], tables, rows), d_out[0, rows, q]
        keys = rotated(qkv[0, :, k], tables, whole)
        probs = probabilities(queries, keys, shift[h, rows] if shifted else None)
        d_probs = product(d_o, qkv[0, :, v], (1, 1))
        d_logits = probs * (d_probs - jnp.sum(probs * d_probs, axis=-1, keepdims=True))
        if shifted:
            d_shift[0, h, rows] += d_logits
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


def clear(ref: jax.Ref) -> None:
    """Sets all elements to zero."""
    ref[...] = jnp.zeros(ref.shape, ref.dtype)


def call(
    kernel: Callable[..., None], heads: int, matmuls: int, arrays: Sequence[jax.Array],
    shapes: Sequence[jax.ShapeDtypeStruct], interpret: bool, constants: Sequence[jax.Array],
    shifted: bool,
) -> Sequence[jax.Array]:  # fmt: skip
    """Runs a kernel over all images, from arrays [B, T, *] to `shapes`.

    Each image has all of the `constants`, tables [T, C] and the shift [H, T, T], after its arrays.
    A shape [G, H, T, T] is a sum over the images of each group. `matmuls` counts the products of
    T x T x C per head, for XLA's estimate of the cost. The kernel streams its inputs, so that the
    compiler need not copy them to the chip beforehand.
    """
    b, t, width = arrays[0].shape
    device = memory.target()[1]
    biased = heads if shifted else 0
    buffering = pl.Buffered(buffers(t, width // 3, arrays[0].dtype, device, biased) or 1)
    sums = [x.shape[0] for x in shapes if len(x.shape) == 4]
    grid = (sums[0], b // sums[0]) if sums else (b,)

    def block(x):
        if len(x.shape) == 4:
            return pl.BlockSpec((1, *x.shape[1:]), lambda g, _: (g, 0, 0, 0),
                                pipeline_mode=pl.Buffered(1))  # fmt: skip
        image = (lambda g, i: (g * grid[1] + i, 0, 0)) if sums else lambda i: (i, 0, 0)
        return pl.BlockSpec((1, *x.shape[1:]), image, pipeline_mode=buffering)

    def whole(x):
        return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim, pipeline_mode=pl.Buffered(1))

    if not interpret:
        arrays = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays]
    return pl.pallas_call(
        functools.partial(kernel, heads=heads, shifted=shifted),
        grid=grid,
        in_specs=[*map(block, arrays), *map(whole, constants)],
        out_specs=[*map(block, shapes)],
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary')[: len(grid)],
            vmem_limit_bytes=available(device),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * matmuls * b * t * t * width // 3,
            transcendentals=b * heads * t * t,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes, *constants)),
        ),
        interpret=interpret,
    )(*arrays, *constants)  # fmt: skip
