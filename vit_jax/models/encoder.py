"""The stacked blocks of a `vit.Vit`.

Shapes: B batch, h w grid of patches, T tokens, N last ones of them, D width, H heads, L depth.
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


def ends_apart(model: nn.Module, scan: bool, train: bool) -> bool:
    """Whether the last block follows the others, its MLP by parts of the tokens: if blocks are
    unrolled, and neither a random draw nor a scale of products is common to all tokens."""
    unrolled = not scan and memory.unroll_length(model.unroll, model.depth, scan) == model.depth
    draws = train and (model.dropout or model.attention_dropout or model.drop_path)
    return (
        unrolled and model.depth > 1 and not draws and model.quantize == 'none'
        and model.style.order != 'parallel'
    )  # fmt: skip


def apply_apart(
    stack: type[nn.Module], fields: dict[str, Any], params: Any, n: int, x: jax.Array,
    rates: jax.Array, *others: Any,
) -> tuple[tuple[jax.Array, jax.Array], Any]:  # fmt: skip
    """`encode` with the MLP of the last block by parts: `stack` are the blocks before it.

    `params` are those of all blocks, `others` the inputs that all share.
    """
    first = jax.tree.map(lambda p: p[:-1], params)
    last = jax.tree.map(lambda p: p[-1], params)
    x, captured = stack(**fields, parent=None).apply({'params': first}, x, rates[:-1], *others)
    attention, mlp = (
        block.Block(**fields, branches=(name,), parent=None) for name in ('attention', 'mlp')
    )
    x, (probabilities, _) = attention.apply({'params': last}, x, rates[-1], *others)
    parts = [mlp.apply({'params': last}, x, rates[-1])[0] for x in (x[:, :-n], x[:, -n:])]
    ends = probabilities, jnp.concatenate(parts, axis=1) if fields['keep'] else None
    return parts, jax.tree.map(lambda xs, x: jnp.concatenate([xs, x[None]]), captured, ends)


def encode(
    model: nn.Module, x: jax.Array, n: int, grid: tuple[int, int], attend: jax.Array | None,
    train: bool, capture: tuple[str, ...],
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """Applies L blocks, their parameters stacked on a leading axis, to tokens [B, T, D].

    Returns (the first tokens [B, T - N, D], the last `n` [B, N, D], {name: array} of what is
    captured). Unrolled blocks compute the last MLP of the two apart, so that jit drops it for those
    that nobody reads, such as the patches of a model that pools by its class token.
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
    fields = fields_of_blocks(model, grid, train) | dict(
        relative=model.posemb == 'relative',
        positions=table if model.posemb_at == 'layers' else None,
        relative_std=model.posemb_std,
        capture='attention' in capture,
        keep=bool({'tokens_by_block', 'normed_by_block'} & set(capture)),
    )
    inputs = (0, *(nn.broadcast,) * 3)
    first = 0 if model.drop_path_rises else model.drop_path
    rates = jnp.linspace(first, model.drop_path, model.depth)
    if x.shape[1] > n and ends_apart(model, scan, train):
        stack = memory.stacked(block.Block, model.depth - 1, model.depth - 1, scan, inputs=inputs)
        params = model.variables['params']['encoder']
        parts, captured = apply_apart(stack, fields, params, n, x, rates, shared, rotation, bias)
    else:
        stack = memory.stacked(
            block.Block, model.depth, model.unroll, scan, model.remat, inputs
        )
        y, captured = stack(**fields, name='encoder')(x, rates, shared, rotation, bias)
        parts = y[:, :-n], y[:, -n:]
    probabilities, tokens = captured
    arrays = {'attention': probabilities}
    if tokens is not None:
        tokens = jnp.concatenate([x[None], tokens])
        arrays |= {'tokens_by_block': tokens, 'normed_by_block': tokens}
    return *parts, {name: arrays[name] for name in capture}
