"""The stacked blocks of a `vit.Vit`.

Shapes: B batch, h w grid of patches, T tokens, D width, H heads, L depth.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models import attention, block, embedding, memory, relative, rotary

OF_BLOCKS = (  # fields that each block has, too
    'num_heads', 'mlp_dim', 'style', 'gelu', 'glu', 'epsilon', 'layer_scale', 'dropout',
    'attention', 'attention_dropout', 'dtype', 'quantize',
)  # fmt: skip


def fields_of_blocks(model: nn.Module, grid: tuple[int, int], train: bool) -> dict[str, Any]:
    """{field: value} of each block of a `vit.Vit`, but for positions that tokens have within it."""
    return {name: getattr(model, name) for name in OF_BLOCKS} | dict(
        grid=grid, stochastic_depth=model.drop_path > 0, deterministic=not train,
        matmul_dtype=model.product_dtype,
    )  # fmt: skip


def encode(
    model: nn.Module, x: jax.Array, grid: tuple[int, int], attend: jax.Array | None, train: bool,
    capture: tuple[str, ...],
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """Applies L blocks, their parameters stacked on a leading axis: [B, T, D] -> [B, T, D].

    Also returns {name: array} of what is captured.
    """
    before = sum(model.prefix.values())
    table = (model.posemb, grid, before, model.width, model.posemb_std)
    shared = rotation = bias = None
    rope, by_offset = model.style.rotary, model.style.bias
    if rope is not None and not rope.learnt:
        rotation = rotary.rotation(rope, grid, before, model.width // model.num_heads)
    if by_offset is not None and by_offset.shared:
        bias = relative.logits(model, by_offset, grid, before, model.num_heads)
    if attend is not None:
        bias = attention.masked(bias, attend, model.product_dtype)
    if model.posemb_at == 'shared':
        shared = embedding.positions(model, *table)
    scan = model.is_initializing() or (train and model.remat != 'none')
    encoder = memory.stacked(
        block.Block, model.depth, model.unroll, scan, model.remat, (0, *(nn.broadcast,) * 3)
    )(
        **fields_of_blocks(model, grid, train),
        relative=model.posemb == 'relative',
        positions=table if model.posemb_at == 'layers' else None,
        relative_std=model.posemb_std,
        capture='attention' in capture,
        keep=bool({'tokens_by_block', 'normed_by_block'} & set(capture)),
        name='encoder',
    )
    first = 0 if model.drop_path_rises else model.drop_path
    rates = jnp.linspace(first, model.drop_path, model.depth)
    y, (probabilities, tokens) = encoder(x, rates, shared, rotation, bias)
    arrays = {'attention': probabilities}
    if tokens is not None:
        tokens = jnp.concatenate([x[None], tokens])
        arrays |= {'tokens_by_block': tokens, 'normed_by_block': tokens}
    return y, {name: arrays[name] for name in capture}
