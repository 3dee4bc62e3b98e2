"""A kernel for TPUs that computes softmax(q k^T) v of many tokens, by tiles.

A program has the keys and values of a few heads on the chip, as many as fill the 128 lanes of a
vector register, and passes tiles of queries by them (FlashAttention, arXiv:2205.14135; its backward
pass from the sums of the softmax, arXiv:2307.08691). Logits are transposed, keys by queries: what a
query has of its own, such as its largest logit, then lies along lanes and costs a 128th.

Shapes: B batch, T tokens, H heads, C channels of a head, R rows of queries, K keys of a slice,
L lanes, G groups of heads.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vit_jax.models import memory
from vit_jax.models.attention_kernel import available, clear, product, rotated
from vit_jax.models.tiling import Plan, buffers


def turned(
    x: jax.Array, table: jax.Ref | None, rows: slice = slice(None), sign: int = 1
) -> jax.Array:
    """Rotates x [R, C] as `rotated` does, by rows of a table [T, 2 C]: cosines, then sines."""
    if table is None:
        return x
    both = table[rows]
    c = x.shape[-1]
    return rotated(x, (both[:, :c], both[:, c:]), slice(None), sign)


def turn_keys(k: jax.Ref, table: jax.Ref, keys: jax.Ref, cut: Plan) -> None:
    """Writes the keys of a group, rotated, to `keys` [T, L] before its first tile."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        for place in cut.places():
            for part in cut.keys():
                keys[part, place] = turned(k[0, part, place], table, part)


def queries_of(q: jax.Ref, place: slice, table: jax.Ref | None, cut: Plan) -> jax.Array:
    """A head's queries [R, C], rotated and divided by sqrt(C)."""
    x = turned(q[0, :, place], table).astype(jnp.float32)
    return (x * cut.channels**-0.5).astype(q.dtype)


def forward_kernel(*refs: jax.Ref, cut: Plan, rotary: bool) -> None:
    """Attention of a tile of queries to all keys, and logarithms of the sums of the softmax.

    (q [1, R, L], k, v [1, T, L], perhaps tables [R, 2 C], [T, 2 C]) -> out [1, R, L],
    sums [1, 1, heads, R]; then a buffer [T, L] for rotated keys.
    """
    q, k, v, *refs = refs
    few, every, keys = (*refs[:2], refs.pop()) if rotary else (None, None, k.at[0])
    out, sums = refs[-2:]
    if rotary:
        turn_keys(k, every, keys, cut)
    for h, place in enumerate(cut.places()):
        x, parts = queries_of(q, place, few, cut), cut.keys()
        logits = [product(keys[part, place], x, (1, 1)) for part in parts]  # [K, R]
        largest = functools.reduce(jnp.maximum, (jnp.max(y, 0, keepdims=True) for y in logits))
        total = mixed = 0
        for y, part in zip(logits, parts, strict=True):
            e = jnp.exp(y - largest)
            total += jnp.sum(e, axis=0, keepdims=True)
            mixed += product(v[0, part, place], e.astype(v.dtype), (0, 0))  # [C, R]
        out[0, :, place] = jnp.transpose(mixed / total).astype(out.dtype)
        sums[0, 0, h : h + 1, :] = largest + jnp.log(total)


def backward_kernel(*refs: jax.Ref, cut: Plan, rotary: bool) -> None:
    """Gradient of `forward_kernel` by q, k and v, one after the other, and its sums over tokens.

    (q, k, v as there, out and d_out [1, R, L], sums, perhaps tables) -> (d_qkv [1, T, L],
    d_bias float32 [1, 1, L]); then buffers float32 [T, L] for the gradients of keys and values,
    [1, L] for the sum of that of queries, and one for rotated keys. After the tiles of a group, one
    step more writes the gradient of keys, and another that of values.
    """
    q, k, v, out, d_out, sums, *refs = refs
    few, every, keys = (*refs[:2], refs.pop()) if rotary else (None, None, k.at[0])
    d_qkv, d_bias, d_k, d_v, d_sum = refs[-5:]
    if rotary:
        turn_keys(k, every, keys, cut)
    tile, dtype = pl.program_id(2), q.dtype
    inside = functools.partial(zeroed, first=tile * cut.rows, cut=cut)

    @pl.when(tile == 0)
    def _():
        for ref in (d_k, d_v, d_sum):
            clear(ref)

    @pl.when(tile < cut.tiles)
    def _():
        for h, place in enumerate(cut.places()):
            x, d_o = inside(queries_of(q, place, few, cut)), inside(d_out[0, :, place])
            both = inside(out[0, :, place]).astype(jnp.float32) * d_o.astype(jnp.float32)
            mean = jnp.sum(jnp.transpose(both), axis=0, keepdims=True)  # of d_probs, [1, R]
            offset, d_x = inside(sums[0, 0, h : h + 1, :], axis=1), 0
            for part in cut.keys():
                probs = jnp.exp(product(keys[part, place], x, (1, 1)) - offset)  # [K, R]
                d_v[part, place] += product(probs.astype(dtype), d_o, (1, 0))
                d_logits = probs * (product(v[0, part, place], d_o, (1, 1)) - mean)
                d_logits = d_logits.astype(dtype)
                d_k[part, place] += product(d_logits, x, (1, 0))
                d_x += product(keys[part, place], d_logits, (0, 0))  # [C, R]
            d_x = turned(jnp.transpose(d_x) * cut.channels**-0.5, few, sign=-1)
            d_qkv[0, pl.ds(tile * cut.rows, cut.rows), place] = d_x.astype(dtype)
            d_sum[:, place] += jnp.sum(inside(d_x), axis=0, keepdims=True)

    @pl.when(tile == cut.tiles - 1)
    def _():
        d_bias[0] = d_sum[...]

    pl.when(tile == cut.tiles)(lambda: write(d_k, every, d_qkv, d_bias, cut))
    pl.when(tile == cut.tiles + 1)(lambda: write(d_v, None, d_qkv, d_bias, cut))


def zeroed(x: jax.Array, first: jax.Array, cut: Plan, axis: int = 0) -> jax.Array:
    """x of tokens from `first` on, zero after the last token, where what is read is undefined."""
    if cut.tokens % cut.rows == 0:
        return x
    token = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) + first
    return jnp.where(token < cut.tokens, x, jnp.zeros_like(x))


def write(
    gradient: jax.Ref, table: jax.Ref | None, d_qkv: jax.Ref, d_bias: jax.Ref, cut: Plan
) -> None:
    """Writes a gradient float32 [T, L], rotated back, and its sum over tokens."""
    for place in cut.places():
        total = 0
        for part in cut.keys():
            x = turned(gradient[part, place], table, part, -1)
            d_qkv[0, part, place] = x.astype(d_qkv.dtype)
            total += jnp.sum(x, axis=0, keepdims=True)
        d_bias[0, :, place] = total


def forward(
    qkv: jax.Array, table: jax.Array | None, cut: Plan, interpret: bool
) -> Sequence[jax.Array]:
    """Runs `forward_kernel`: qkv [B, T, 3 G L] -> out [B, T, G L], sums [B, G, heads, T].

    `table` [T, 2 C] has cosines and sines side by side.
    """
    b, t, width = qkv.shape
    out = jax.ShapeDtypeStruct((b, t, width // 3), qkv.dtype)
    sums = jax.ShapeDtypeStruct((b, cut.groups, cut.heads, t), jnp.float32)
    return call(forward_kernel, qkv, table, (), (out, sums), cut, cut.tiles, (), interpret)


def backward(
    qkv: jax.Array, table: jax.Array | None, tiles: Sequence[jax.Array], cut: Plan,
    interpret: bool,
) -> Sequence[jax.Array]:  # fmt: skip
    """Runs `backward_kernel`: -> d_qkv [B, T, 3 G L], d_bias [B, 1, 3 G L].

    `tiles` are out and d_out [B, T, G L], and sums [B, G, heads, T].
    """
    whole, lanes = (cut.tokens, cut.lanes), cut.lanes
    sums = [pltpu.VMEM(shape, jnp.float32) for shape in (whole, whole, (1, lanes))]
    shapes = [
        jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
        jax.ShapeDtypeStruct((len(qkv), 1, qkv.shape[2]), jnp.float32),
    ]
    steps = cut.tiles + 2
    return call(backward_kernel, qkv, table, tiles, shapes, cut, steps, sums, interpret)


def call(
    kernel: Callable[..., None], qkv: jax.Array, table: jax.Array | None,
    tiles: Sequence[jax.Array], shapes: Sequence[jax.ShapeDtypeStruct], cut: Plan, steps: int,
    scratch: Sequence, interpret: bool,
) -> Sequence[jax.Array]:  # fmt: skip
    """Runs a kernel over images, groups of heads and `steps`, the first for one tile each.

    The kernel reads its queries, keys and values as blocks of qkv, so that nothing is copied.
    """
    b, t, _ = qkv.shape
    rotary, last = table is not None, cut.tiles - 1
    whole = pl.Buffered(buffers(cut, qkv.dtype, memory.target()[1], rotary) or 1)

    def lanes(part):
        return pl.BlockSpec((1, t, cut.lanes), lambda i, g, s: (i, 0, part * cut.groups + g),
                            pipeline_mode=whole)  # fmt: skip

    def tile(x):
        if x.ndim == 4:
            block = (1, 1, cut.heads, cut.rows)
            return pl.BlockSpec(block, lambda i, g, s: (i, g, 0, jnp.minimum(s, last)))
        return pl.BlockSpec(
            (1, cut.rows, cut.lanes), lambda i, g, s: (i, jnp.minimum(s, last), g)
        )

    def gradient(rows):
        return pl.BlockSpec(
            (1, rows, cut.lanes), lambda i, g, s: (i, 0, jnp.maximum(s - last, 0) * cut.groups + g),
            pipeline_mode=whole,
        )  # fmt: skip

    tables, specs = [], []
    if rotary:
        tables, scratch = [table, table], [*scratch, pltpu.VMEM((t, cut.lanes), qkv.dtype)]
        two = 2 * cut.channels
        specs = [
            pl.BlockSpec((cut.rows, two), lambda i, g, s: (jnp.minimum(s, last), 0)),
            pl.BlockSpec((t, two), lambda i, g, s: (0, 0), pipeline_mode=pl.Buffered(1)),
        ]
    arrays = [qkv, *tiles]
    if not interpret:
        arrays = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays]
    products = 5 if tiles else 2
    return pl.pallas_call(
        functools.partial(kernel, cut=cut, rotary=rotary),
        grid=(b, cut.groups, steps),
        in_specs=[tile(qkv), lanes(1), lanes(2), *map(tile, tiles), *specs],
        out_specs=[*map(gradient, (cut.tiles * cut.rows, 1))] if tiles else [*map(tile, shapes)],
        out_shape=shapes,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel', 'arbitrary'),
            vmem_limit_bytes=available(memory.target()[1]),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * b * cut.groups * cut.heads * t * t * cut.channels,
            transcendentals=b * cut.groups * cut.heads * t * t,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes)),
        ),
        interpret=interpret,
    )(arrays[0], arrays[0], *arrays, *tables)  # fmt: skip
