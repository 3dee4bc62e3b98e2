"""Maps of a view at the pixels of its image.

Shapes: B batch, Q maps of an example, h w of the maps, H W of the view, Y X of a canvas in whose
upper left corner images are, R some of its rows.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

ROWS = 32  # of a canvas that are in memory at once


def in_blocks(x: jax.Array, fill: float) -> jax.Array:
    """Cuts [B, Y, ...] into blocks of ROWS, the last one padded: [Y / ROWS, B, ROWS, ...]."""
    count = -(-x.shape[1] // ROWS)
    x = jnp.pad(x, ((0, 0), (0, count * ROWS - x.shape[1]), (0, 0)), constant_values=fill)
    return x.reshape(x.shape[0], count, ROWS, x.shape[2]).swapaxes(0, 1)


def weights(pixels: int, cells: int, size: int, place: jax.Array) -> jax.Array:
    """Weights [B, pixels, cells] of cells of a map in each pixel of an image along one side.

    Args:
      pixels: number of pixels of the canvas.
      cells: number of cells of the map.
      size: pixels of the view, which the map covers.
      place: [B, 2], (scale, offset) of the image in the view.
    """
    centres = jnp.arange(pixels, dtype=jnp.float32) + 0.5
    at = place[:, :1] * centres + place[:, 1:]  # [B, pixels], in the view
    return linear(jnp.clip(at * (cells / size) - 0.5, 0, cells - 1), cells)


def weights_inside(pixels: int, cells: int, size: int, place: jax.Array) -> jax.Array:
    """`weights`, but 0 in pixels whose centre is outside of the view."""
    at = place[:, :1] * (jnp.arange(pixels, dtype=jnp.float32) + 0.5) + place[:, 1:]
    inside = (at >= 0) & (at < size)
    return weights(pixels, cells, size, place) * inside[:, :, None]


def weights_by_view(
    pixels: int, cells: int, size: int, place: jax.Array, sides: jax.Array
) -> jax.Array:
    """`weights` of maps that are interpolated twice: to the view, then to the image.

    The second time the view ends where the image does in it (tue-mps/eomt lightning_module.py,
    revert_resize_and_pad_logits_instance_panoptic).

    Args:
      pixels, cells, size, place: as in `weights`.
      sides: int [B], pixels of the images.
    """
    scale, offset = place[:, :1], place[:, 1:]
    centres = jnp.arange(pixels, dtype=jnp.float32) + 0.5
    last = jnp.round(scale * sides[:, None]) - 1
    in_view = linear(jnp.clip(scale * centres - 0.5, 0, last) + offset, size)
    in_map = weights(size, cells, size, jnp.array([[1.0, 0.0]]))[0]
    return jnp.matmul(in_view, in_map, precision='highest')


class Axes(NamedTuple):
    """How maps are interpolated at the pixels of images, see `axes_of`.

    Attributes:
      rows: weights [B, Y, h].
      columns: weights [B, X, w].
      in_rows: bool [B, Y], whether a row is one of the image.
      in_columns: bool [B, X].
    """

    rows: jax.Array
    columns: jax.Array
    in_rows: jax.Array
    in_columns: jax.Array

    def values(self, maps: jax.Array, rows: jax.Array) -> jax.Array:
        """Maps [B, Q, h, w] at rows of weights [B, R, h]: [B, Q, R, X]."""
        part = jnp.einsum('brh,bqhw->bqrw', rows, maps, precision='highest')
        return jnp.einsum('bqrw,bxw->bqrx', part, self.columns, precision='highest')


def axes_of(
    maps: jax.Array, batch: Mapping[str, jax.Array], canvas: tuple[int, int]
) -> Axes:
    """The Axes of maps [B, Q, h, w] of a batch with `image`, `place` [B, 2, 2], `size` [B, 2]."""
    view, place, size = batch['image'].shape[1:3], batch['place'], batch['size']
    return Axes(*(
        weights_by_view(canvas[i], maps.shape[2 + i], view[i], place[:, i], size[:, i])
        for i in range(2)
    ), *(jnp.arange(canvas[i]) < size[:, i, None] for i in range(2)))  # fmt: skip


def linear(at: jax.Array, count: int) -> jax.Array:
    """Weights [..., count] of points 0 ... count - 1 in a linear interpolation at places [...]."""
    return jnp.maximum(1 - jnp.abs(at[..., None] - jnp.arange(count)), 0)
