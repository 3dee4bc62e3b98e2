"""Biases of attention by the offset of two patches (arXiv:2106.08254; arXiv:2111.09883).

Shapes: h w grid of patches, N patches (h * w), T tokens, H heads, M hidden size.
"""

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.io.bounds import Positive


@dataclasses.dataclass(frozen=True)
class Bias:
    """A number per head and offset, added to the logits of attention.

    A table has (2 h - 1) (2 w - 1) rows, by the offset of the query from the key, rows first. A
    model with tokens before the patches has three more: from such a token to any, from any to such
    a token, and among them (BEiT, arXiv:2106.08254 section 2.2 and its code). With 'mlp', the
    numbers are those of an MLP of the offsets' logarithms, sign(n) log(1 + |n|), and 0 for tokens
    before the patches (arXiv:2111.09883 section 3.3, without its scaling).
    """

    kind: Literal['table', 'mlp'] = 'table'  # numbers by offset, or an MLP of the offset
    shared: bool = False  # one for all blocks, or one in each
    hidden: Positive[int] = 128  # hidden size of the MLP
    # how a table is resized to another image size: as BEiT's code or as transformers does it
    interpolation: Literal['geometric', 'linear'] = 'geometric'


def rows(grid: tuple[int, int], before: int) -> int:
    """Rows of the table for a grid (h, w) and a number of tokens before the patches."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + (3 if before else 0)


def square_side(count: int, before: int) -> int:
    """Side of the square grid whose table has `count` rows, if one has; else of a smaller one."""
    return (math.isqrt(max(count - 3 * bool(before), 0)) + 1) // 2


def index(grid: tuple[int, int], before: int) -> jax.Array:
    """Row of the table for each pair of query and key, int32 [T, T].

    An array of JAX, so that the shapes of a model for huge images take no memory.
    """
    h, w = grid
    y, x = (n.reshape(-1) for n in jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing='ij'))
    patches = (y[:, None] - y + h - 1) * (2 * w - 1) + x[:, None] - x + w - 1
    if not before:
        return patches
    count = (2 * h - 1) * (2 * w - 1)
    table = jnp.pad(patches, ((0, 0), (before, 0)), constant_values=count + 1)
    table = jnp.pad(table, ((before, 0), (0, 0)), constant_values=count)
    return table.at[:before, :before].set(count + 2)


def log_offsets(grid: tuple[int, int]) -> jax.Array:
    """Logarithms of all offsets, float32 [(2 h - 1) (2 w - 1), 2], in the order of the table."""
    sides = (np.arange(1 - n, n) for n in grid)
    logs = ((np.sign(n) * np.log1p(np.abs(n))).astype(np.float32) for n in sides)
    return jnp.stack([n.reshape(-1) for n in jnp.meshgrid(*logs, indexing='ij')], axis=1)


def logits(
    scope: nn.Module, bias: Bias, grid: tuple[int, int], before: int, heads: int
) -> jax.Array:
    """The biases of attention within a module, float32 [H, T, T]; parameters `bias...`."""
    place = index(grid, before)
    if bias.kind == 'table':
        table = scope.param('bias_table', nn.initializers.zeros, (rows(grid, before), heads))
        return jnp.moveaxis(table[place], -1, 0)
    x = nn.relu(nn.Dense(bias.hidden, name='bias_fc1')(log_offsets(grid)))
    table = nn.Dense(heads, name='bias_fc2')(x)
    patches = jnp.moveaxis(table[place[before:, before:]], -1, 0)
    return jnp.pad(patches, ((0, 0), (before, 0), (before, 0)))
