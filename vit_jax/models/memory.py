"""Where activations lie: sharding and layout on the devices, and what is saved for the gradient."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

# Names within blocks.
SAVED = ('qkv', 'logits', 'sums', 'attended', 'projected', 'middle', 'hidden')


def target() -> tuple[str, str]:
    """(platform, device kind) that the traced function is for: of the mesh, if one is set."""
    device = getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None)
    if device is None:
        device = jax.devices()[0]
    return device.platform, device.device_kind


def keep_layout(x: jax.Array) -> jax.Array:
    """Fixes the layout of x on CPUs, whose compiler would choose slower transposes."""
    return jax.lax.optimization_barrier(x) if target()[0] == 'cpu' else x


def shard_batch(x: jax.Array, *, whole: bool = True) -> jax.Array:
    """Shards x [B, ...] by example over the mesh axes data and fsdp, if a mesh is set.

    With `whole`, no other axis is sharded: left free, the partitioner would shard activations by
    width wherever FSDP shards weights, and sum over all devices instead of gathering one layer's
    weights. Heads and the hidden layer of an MLP are not `whole`, as the weights shard them. On
    TPUs [B, T, D] is laid out in that order: the compiler may otherwise put tokens outermost, copy
    for every kernel, and no longer fuse norms with the products after them.
    """
    if not {'data', 'fsdp'} <= set(jax.sharding.get_abstract_mesh().axis_names):
        return x
    if x.ndim == 3 and target()[0] == 'tpu':  # elsewhere it makes partitioners gather
        x = with_layout_constraint(x, Layout((0, 1, 2)))
    rest = (None if whole else PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(('data', 'fsdp'), *rest))


def rounded(x: jax.Array) -> jax.Array:
    """Rounds x to its dtype on CPUs, whether x is captured or not.

    XLA on CPUs keeps float32 between fused bfloat16 operations, but not for a captured value:
    without rounding, capturing would change the output.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16) or target()[0] != 'cpu':
        return x
    return jax.lax.reduce_precision(x, jnp.finfo(x.dtype).nexp, jnp.finfo(x.dtype).nmant)


def unroll_length(unroll: int | None, depth: int, scan: bool) -> int:
    """Unroll length of the scan over depth: `unroll` or, if that is None, the fastest.

    A scan copies the weights of each block out of their stack, and saved activations into stacked
    arrays and back. So accelerators unroll all blocks, unless `scan` asks for scanned ones or FSDP
    gathers the weights of one block at a time. CPUs scan, which is as fast there and compiles
    sooner (benchmarks/RESULTS.md).
    """
    if unroll is not None:
        return unroll
    fsdp = jax.sharding.get_abstract_mesh().shape.get('fsdp', 1)
    return 1 if scan or fsdp > 1 or target()[0] == 'cpu' else depth


def saved_names(primitive: Any, *avals: Any, **params: Any) -> bool | Any:
    """Policy of `jax.checkpoint`: saves SAVED, sums of norms and softmax, outputs of cuDNN."""
    if primitive.name in ('reduce_sum', 'reduce_max', 'dot_product_attention_fwd_wrapper'):
        return True
    return jax.checkpoint_policies.save_only_these_names(*SAVED)(primitive, *avals, **params)


def recomputed(block: type[nn.Module], remat: str, scanned: bool) -> type[nn.Module]:
    """A block [B, T, D] -> [B, T, D] that recomputes activations for the gradient as `remat` says.

    'full' saves only the input. With 'none' the compiler chooses for unrolled blocks. A scan writes
    all that is saved to memory, so it saves products of matrices, and recomputes what lies between
    them (norms, GELU, softmax) as part of the products that read it.
    """
    if remat == 'none' and not scanned:
        return block
    policies = {'none': saved_names, 'full': None}
    policy = policies[remat] if remat in policies else getattr(jax.checkpoint_policies, remat)
    # Without a scan between the two passes, the compiler would merge what is computed twice.
    return nn.remat(block, policy=policy, prevent_cse=not scanned)


def stacked(
    block: type[nn.Module], depth: int, unroll: int | None, scan: bool, remat: str = 'none',
    inputs: tuple = (0,),
) -> type[nn.Module]:
    """`depth` blocks as one module, a scan over their stacked parameters [L, ...].

    Args:
      block: module, (x, *inputs) -> (x, what it captures).
      depth: number of blocks L.
      unroll: blocks per iteration of the scan; see `unroll_length`.
      scan: whether scanned blocks are the default on accelerators, too.
      remat: activations recomputed for the gradient; see `recomputed`.
      inputs: for each further input of a block, 0 if it is stacked, or nn.broadcast.
    """
    unroll = unroll_length(unroll, depth, scan)
    return nn.scan(
        recomputed(block, remat, unroll < depth),
        variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=inputs,
        length=depth,
        unroll=unroll,
    )
