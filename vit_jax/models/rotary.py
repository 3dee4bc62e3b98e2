"""Rotary position embeddings of a grid of patches (arXiv:2104.09864; in two dimensions, DINOv3).

Shapes: h w grid of patches, N patches (h * w), T tokens, H heads, C channels of a head.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from vit_jax.io.bounds import Finite, Positive


@dataclasses.dataclass(frozen=True)
class Rope:
    """How queries and keys of the patches turn; tokens before the patches stay.

    The first half of a head's pairs of channels turns with one coordinate, the other half with the
    other: by coordinate times base^(-4 i / C) for i from 0 on. With `learnt`, pair i of head j
    turns by y f[j, i] + x g[j, i], with f and g learnt by block (arXiv:2403.13298 eq. 13).
    """

    base: Positive[float] = 100.0  # of the geometric series of frequencies
    # of a patch: its centre in [-1, 1] times 2 pi (arXiv:2508.10104 section 3.2), or its row and
    # column (arXiv:2303.11331)
    coordinates: Literal['centre', 'index'] = 'centre'
    offset: Finite[float] = 0.0  # added to row and column
    # grid (h, w) that rows and columns are scaled to; None: they are not scaled
    reference: tuple[Positive[int], Positive[int]] | None = None
    order: Literal['yx', 'xy'] = 'yx'  # which coordinate comes first
    # channels that turn together: c and c + C / 2, or 2 c and 2 c + 1
    pairs: Literal['halves', 'neighbours'] = 'halves'
    learnt: bool = False  # whether frequencies are parameters


def coordinates(rope: Rope, grid: tuple[int, int]) -> jax.Array:
    """Both coordinates of each patch in the order of `rope`, float32 [h * w, 2]."""
    sides = []
    for i, n in enumerate(grid):
        place = jnp.arange(n, dtype=jnp.float32)
        if rope.coordinates == 'centre':
            place = 2 * jnp.pi * (2 * ((place + 0.5 + rope.offset) / n) - 1)
        else:
            place = place + rope.offset
            if rope.reference is not None:
                place = place / n * rope.reference[i]
        sides.append(place)
    y, x = (side.reshape(-1) for side in jnp.meshgrid(*sides, indexing='ij'))
    return jnp.stack([y, x] if rope.order == 'yx' else [x, y], axis=1)


def frequencies(rope: Rope, channels: int) -> jax.Array:
    """Frequencies of the pairs of one coordinate, float32 [C / 4]."""
    return rope.base ** -(jnp.arange(0, channels, 4, dtype=jnp.float32) / channels)


def init_frequencies(
    key: jax.Array, shape: tuple[int, int, int], rope: Rope
) -> jax.Array:
    """Initial learnt frequencies [2, H, C / 2]: those of a head are turned by a random angle.

    As in the code of arXiv:2403.13298 (init_random_2d_freqs).
    """
    size = frequencies(rope, 2 * shape[-1])
    angle = jax.random.uniform(key, (shape[1], 1), maxval=2 * jnp.pi)
    turned = [jnp.concatenate([size * f(angle), size * f(angle + jnp.pi / 2)], axis=-1)
              for f in (jnp.cos, jnp.sin)]  # fmt: skip
    return jnp.stack(turned)


def angles(rope: Rope, grid: tuple[int, int], channels: int) -> jax.Array:
    """Angles by which the pairs of a head's channels are rotated, float32 [h * w, C / 2]."""
    places = coordinates(rope, grid)  # [N, 2]
    return (places[:, :, None] * frequencies(rope, channels)).reshape(len(places), -1)


def tables(rope: Rope, turn: jax.Array, before: int) -> tuple[jax.Array, jax.Array]:
    """(cosines, sines) float32 [T, ..., C] for `rotate`: `before` tokens that stay, then patches.

    `turn` has the angles of the patches, [N, ..., C / 2].
    """
    turn = jnp.pad(turn, ((before, 0), *((0, 0),) * (turn.ndim - 1)))
    if rope.pairs == 'halves':
        turn = jnp.concatenate([turn, turn], axis=-1)
    else:
        turn = jnp.repeat(turn, 2, axis=-1)
    return jnp.cos(turn), jnp.sin(turn)


def rotation(
    rope: Rope, grid: tuple[int, int], before: int, channels: int
) -> tuple[jax.Array, jax.Array]:
    """(cosines, sines) float32 [T, C] of frequencies that are not learnt."""
    return tables(rope, angles(rope, grid, channels), before)


def learnt_rotation(
    rope: Rope, grid: tuple[int, int], before: int, learnt: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(cosines, sines) float32 [T, H, C] of learnt frequencies [2, H, C / 2]."""
    places = coordinates(rope, grid)  # [N, 2]
    turn = sum(places[:, i, None, None] * learnt[i] for i in (0, 1))  # [N, H, C / 2]
    return tables(rope, turn, before)


def by_halves(x: jax.Array) -> jax.Array:
    """Reorders channels [..., C]: those of even index first, then the others.

    Pairs of neighbours become those of halves. Applied to queries and keys alike, it changes no
    product of the two.
    """
    return jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)


def rotate(rope: Rope, x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Rotates queries or keys [B, T, ..., H, C] by tables [T, C] or [T, H, C]; in their dtype."""
    shape = (x.shape[1], *(1,) * (x.ndim - 1 - cosines.ndim), *cosines.shape[1:])
    cosines, sines = (table.astype(x.dtype).reshape(shape) for table in (cosines, sines))
    if rope.pairs == 'halves':
        first, second = jnp.split(x, 2, axis=-1)
        turned = jnp.concatenate([-second, first], axis=-1)
    else:
        first, second = x[..., ::2], x[..., 1::2]
        turned = jnp.stack([-second, first], axis=-1).reshape(x.shape)
    return x * cosines + turned * sines
