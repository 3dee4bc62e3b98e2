"""softmax(q k^T) v by the ways that are fastest where it runs: XLA's, cuDNN's, a kernel for TPUs.

Shapes: B batch, T tokens, H heads, C channels of a head.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError

KINDS = ('auto', 'xla', 'cudnn', 'pallas')
ROWS = 256  # queries at a time: what lies between the products stays on the chip
MIB = 2**20
SMALL = {'TPU v4': 16 * MIB}  # memory beside the vector unit that a kernel may take, else LARGE
LARGE = 32 * MIB


def chosen(kind, platform, device, *, tokens, width, heads, dtype, dropout, capture):
    """The kind that 'auto' stands for; UserError where another one can't be.

    `platform` and `device` are JAX's names of what the step is for: 'tpu', 'TPU v4'.
    """
    obstacles = {'xla': None}
    obstacles['pallas'] = obstacles['cudnn'] = (
        'it never has the probabilities, which are asked for' if capture
        else f'it can not drop probabilities, and model.attention_dropout is {dropout}'
        if dropout else None
    )  # fmt: skip
    needed, memory = block_bytes(tokens, width, dtype), SMALL.get(device, LARGE)
    channels = width // heads
    if platform != 'tpu':
        obstacles['pallas'] = f'it is a kernel for TPUs, and this is for {platform}'
    elif device in ('TPU v2', 'TPU v3'):
        obstacles['pallas'] = f'a kernel can not multiply bfloat16 on {device}'
    elif needed > memory:
        obstacles['pallas'] = (
            f'{tokens} tokens of width {width} need {needed / MIB:.0f} MiB on the chip, where '
            f'{device} has {memory / MIB:.0f}'
        )
    if 'NVIDIA' not in device:
        obstacles['cudnn'] = f'it is for NVIDIA GPUs, and this is for {device}'
    elif dtype == jnp.float32:
        obstacles['cudnn'] = 'it computes in bfloat16 or float16, and model.dtype is float32'
    elif channels % 8 or channels > 128:
        obstacles['cudnn'] = f'{channels} channels of a head are no multiple of 8 up to 128'
    if kind == 'auto':
        return next(k for k in ('pallas', 'cudnn', 'xla') if not obstacles[k])
    if obstacles[kind]:
        raise UserError(f"model.attention is {kind!r}, but {obstacles[kind]}; 'auto' chooses")
    return kind


def block_bytes(tokens, width, dtype):
    """What the backward kernel holds on the chip, nearly: two images in and out, ten matrices."""
    rows, lanes = -(-tokens // 16) * 16, -(-tokens // 128) * 128
    return 14 * rows * width * jnp.dtype(dtype).itemsize + 40 * min(ROWS, rows) * lanes


def target():
    """(platform, kind of device) that the traced function is for: by the mesh, where one is set."""
    device = getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None)
    if device is None:
        device = jax.devices()[0]
    return device.platform, device.device_kind


def products(q, k, dims):
    """q k^T or the like of two matrices, summed in float32."""
    return jax.lax.dot_general(q, k, ((dims[:1], dims[1:]), ((), ())),
                               preferred_element_type=jnp.float32)  # fmt: skip


def probabilities(q, k):
    """softmax(q k^T / sqrt(C)) in float32: [R, C], [T, C] -> [R, T]."""
    logits = products(q, k, (1, 1)) * q.shape[-1] ** -0.5
    e = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return e / jnp.sum(e, axis=-1, keepdims=True)


def pieces(shape, heads):
    """(lanes of q, k and v of a head, some queries) for all heads and queries of [1, T, 3 D]."""
    _, tokens, width = shape
    c = width // 3 // heads
    for h in range(heads):
        lanes = [slice(i * width // 3 + h * c, i * width // 3 + (h + 1) * c) for i in range(3)]
        for start in range(0, tokens, ROWS):
            yield lanes, slice(start, min(start + ROWS, tokens))


def forward_kernel(qkv, out, *, heads):
    """qkv [1, T, 3 D] -> out [1, T, D], of one image."""
    for (q, k, v), rows in pieces(qkv.shape, heads):
        probs = probabilities(qkv[0, rows, q], qkv[0, :, k])
        values = qkv[0, :, v]
        out[0, rows, q] = products(probs.astype(values.dtype), values, (1, 0)).astype(out.dtype)


def backward_kernel(qkv, d_out, d_qkv, *, heads):
    """The gradient [1, T, 3 D] of `forward_kernel`; probabilities are computed anew."""
    tokens, dtype, d_k, d_v = qkv.shape[1], qkv.dtype, 0, 0
    for (q, k, v), rows in pieces(qkv.shape, heads):
        queries, keys, d_o = qkv[0, rows, q], qkv[0, :, k], d_out[0, rows, q]
        probs = probabilities(queries, keys)
        d_probs = products(d_o, qkv[0, :, v], (1, 1))
        d_logits = probs * (d_probs - jnp.sum(probs * d_probs, axis=-1, keepdims=True))
        d_logits = (d_logits * queries.shape[-1] ** -0.5).astype(dtype)
        d_qkv[0, rows, q] = products(d_logits, keys, (1, 0)).astype(dtype)
        d_k += products(d_logits, queries, (0, 0))
        d_v += products(probs.astype(dtype), d_o, (0, 0))
        if rows.stop == tokens:
            d_qkv[0, :, k], d_qkv[0, :, v] = d_k.astype(dtype), d_v.astype(dtype)
            d_k = d_v = 0


def call(kernel, heads, interpret, width, matmuls, *arrays):
    """A kernel over all images, [B, T, *] -> [B, T, width]; its cost is stated for XLA."""
    b, t, _ = arrays[0].shape
    out = jax.ShapeDtypeStruct((b, t, width), arrays[0].dtype)
    vmem = SMALL.get(target()[1], LARGE)
    specs = [pl.BlockSpec((1, *x.shape[1:]), lambda i: (i, 0, 0)) for x in (*arrays, out)]
    return pl.pallas_call(
        functools.partial(kernel, heads=heads),
        grid=(b,),
        in_specs=specs[:-1],
        out_specs=specs[-1],
        out_shape=out,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel',), vmem_limit_bytes=vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * matmuls * b * t * t * arrays[0].shape[-1] // 3,
            transcendentals=b * heads * t * t,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, out)),
        ),
        interpret=interpret,
    )(*arrays)  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def fused(qkv, heads, interpret=False):
    """Attention of qkv [B, T, 3 H C] -> [B, T, H C], reading and writing nothing else."""
    return call(forward_kernel, heads, interpret, qkv.shape[-1] // 3, 2, qkv)


def forward(qkv, heads, interpret):
    return fused(qkv, heads, interpret), qkv


def backward(heads, interpret, qkv, d_out):
    return (call(backward_kernel, heads, interpret, qkv.shape[-1], 5, qkv, d_out),)


fused.defvjp(forward, backward)


def pallas(qkv, interpret=False):
    """[B, T, 3, H, C] -> [B, T, H, C] by the kernel, on each device its own images and heads."""

    def local(qkv):
        b, t, _, h, c = qkv.shape
        return fused(qkv.reshape(b, t, 3 * h * c), h, interpret).reshape(b, t, h, c)

    if not {'data', 'fsdp'} <= set(jax.sharding.get_abstract_mesh().axis_names):
        return local(qkv)
    batch = ('data', 'fsdp')
    return jax.shard_map(
        local, in_specs=P(batch, None, None, 'tensor'), out_specs=P(batch, None, 'tensor'),
        check_vma=False,
    )(qkv)  # fmt: skip
