"""Losses of masks at points of an image (arXiv:2112.01527 section 3.3).

Shapes: B batch, Q predictions, M targets, P points. Points [..., 2] are (x, y) in shares of an
image's width and height.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vit_jax.models.memory import shard_batch


class Targets(NamedTuple):
    """True masks: that of target m is where `maps` are equal to its `ids`.

    Attributes:
      labels: int [B, M], classes; -1 for none.
      maps: integers [B, 1, Y, X], in which all targets of an example are, or [B, M, Y, X].
      ids: int [B, M].
    """

    labels: jax.Array
    maps: jax.Array
    ids: jax.Array


def of_label_map(label_map: jax.Array, classes: int, most: int) -> Targets:
    """A target for each class that is present in the label map [B, Y, X], the `most` largest."""
    flat = label_map.reshape(len(label_map), -1).astype(jnp.int32)
    areas = jax.vmap(lambda x: jnp.bincount(x, length=classes))(flat)  # larger numbers are dropped
    areas, labels = jax.lax.top_k(areas, min(most, classes))
    labels = jnp.where(areas > 0, labels, -1)
    return Targets(labels, label_map[:, None], labels)


def corners(points: jax.Array, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """(indices, weights), [..., 4] each, of the pixels from which a point is interpolated.

    Indices are those of a flattened map of `size` (height, width). Pixel centres lie at halves, and
    pixels outside have weight 0: they count as zeros.
    """
    h, w = size
    x, y = points[..., 0] * w - 0.5, points[..., 1] * h - 0.5
    left, top = jnp.floor(x), jnp.floor(y)
    indices, weights = [], []
    for i in (0, 1):
        for j in (0, 1):
            column, row = left + j, top + i
            inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
            weight = (1 - jnp.abs(x - column)) * (1 - jnp.abs(y - row))
            weights.append(jnp.where(inside, weight, 0))
            index = jnp.clip(row, 0, h - 1) * w + jnp.clip(column, 0, w - 1)
            indices.append(index.astype(jnp.int32))
    return jnp.stack(indices, axis=-1), jnp.stack(weights, axis=-1)


def gathered(maps: jax.Array, indices: jax.Array) -> jax.Array:
    """Values [B, M, P, 4] of maps [B, M, Y, X] at indices [B, M, P, 4] of pixels; M may be 1."""
    b, m = maps.shape[:2]
    flat = indices.reshape(*indices.shape[:2], -1)
    count = max(m, flat.shape[1])
    flat = jnp.broadcast_to(flat, (b, flat.shape[1], flat.shape[2]))
    values = jnp.take_along_axis(maps.reshape(b, m, -1), flat, axis=2)
    return shard_batch(values.reshape(b, count, -1, 4))


def at_points(maps: jax.Array, points: jax.Array) -> jax.Array:
    """Maps [B, M, Y, X] at points [B, M or 1, P, 2], bilinearly: float32 [B, M, P]."""
    indices, weights = corners(points, maps.shape[2:])
    return jnp.sum(gathered(maps, indices) * weights, axis=-1)


def targets_at(targets: Targets, points: jax.Array) -> jax.Array:
    """True masks at points [B, M or 1, P, 2], bilinearly: float32 [B, M, P]."""
    indices, weights = corners(points, targets.maps.shape[2:])
    equal = gathered(targets.maps, indices) == targets.ids[:, :, None, None]
    return jnp.sum(equal * weights, axis=-1)


def match_costs(logits: jax.Array, true: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Costs of each pair by cross-entropy and by dice: float32 [B, M, Q] each.

    Args:
      logits: of the predicted masks at points, [B, Q, P].
      true: the true masks there, [B, M, P].
    """
    positive, negative = jax.nn.softplus(-logits), jax.nn.softplus(logits)
    entropy = jnp.einsum('bmp,bqp->bmq', true, positive)
    entropy += jnp.einsum('bmp,bqp->bmq', 1 - true, negative)
    probabilities = jax.nn.sigmoid(logits)
    common = jnp.einsum('bmp,bqp->bmq', true, probabilities)
    total = true.sum(-1)[:, :, None] + probabilities.sum(-1)[:, None]
    return entropy / logits.shape[-1], 1 - (2 * common + 1) / (total + 1)


def losses_at(logits: jax.Array, true: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and dice loss [B, M] each, of pairs of masks at points [B, M, P]."""
    entropy = true * jax.nn.softplus(-logits) + (1 - true) * jax.nn.softplus(logits)
    probabilities = jax.nn.sigmoid(logits)
    common, total = (probabilities * true).sum(-1), (probabilities + true).sum(-1)
    return entropy.mean(-1), 1 - (2 * common + 1) / (total + 1)


def uncertain_points(
    key: jax.Array, maps: jax.Array, count: int, oversample: float, importance: float
) -> jax.Array:
    """Points [B, M, P, 2] where predicted masks are uncertain, and others (arXiv:1912.08193 3.2).

    Args:
      key: JAX key.
      maps: logits of masks, [B, M, Y, X].
      count: number of points P.
      oversample: how many times as many are drawn, uniformly.
      importance: share of `count` that are those of the drawn ones whose logits are nearest to 0;
        others are drawn uniformly.
    """
    near, shape = int(importance * count), maps.shape[:2]
    keys = jax.random.split(key)
    drawn = shard_batch(jax.random.uniform(keys[0], (*shape, int(count * oversample), 2)))
    _, best = jax.lax.top_k(-jnp.abs(at_points(maps, drawn)), near)
    chosen = jnp.take_along_axis(drawn, best[..., None], axis=2)
    others = shard_batch(jax.random.uniform(keys[1], (*shape, count - near, 2)))
    return jax.lax.stop_gradient(jnp.concatenate([chosen, others], axis=2))
