"""Rotary position embeddings of a grid of patches (arXiv:2104.09864; in two dimensions, DINOv3).

Shapes: h w grid of patches, N patches (h * w), T tokens, C channels of a head.
"""

import jax
import jax.numpy as jnp


def angles(grid: tuple[int, int], channels: int, base: float) -> jax.Array:
    """Angles by which the pairs of a head's channels are rotated, float32 [h * w, C / 2].

    A patch's centre lies in [-1, 1] along each side; the first half of the pairs turns with its
    row, the other with its column, by 2 pi times its place times base^(-4 i / C) for i from 0 on
    (transformers, DINOv3ViTRopePositionEmbedding; arXiv:2508.10104 section 3.2).
    """
    h, w = grid
    rows, columns = (2 * (jnp.arange(n) + 0.5) / n - 1 for n in (h, w))
    frequencies = 2 * jnp.pi * base ** -(jnp.arange(0, channels, 4) / channels)  # [C / 4]
    y, x = jnp.meshgrid(rows, columns, indexing='ij')
    return jnp.concatenate([n.reshape(-1, 1) * frequencies for n in (y, x)], axis=1)


def rotation(
    grid: tuple[int, int], before: int, channels: int, base: float
) -> tuple[jax.Array, jax.Array]:
    """(cosines, sines) float32 [T, C] for `rotate`, of `before` tokens that stay, then patches."""
    turn = jnp.pad(angles(grid, channels, base), ((before, 0), (0, 0)))
    turn = jnp.concatenate([turn, turn], axis=1)  # channels c and c + C / 2 are a pair
    return jnp.cos(turn), jnp.sin(turn)


def rotate(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Rotates queries or keys [B, T, ..., C]; in their dtype."""
    shape = (x.shape[1], *(1,) * (x.ndim - 3), x.shape[-1])
    cosines, sines = (table.astype(x.dtype).reshape(shape) for table in (cosines, sines))
    first, second = jnp.split(x, 2, axis=-1)
    return x * cosines + jnp.concatenate([-second, first], axis=-1) * sines
