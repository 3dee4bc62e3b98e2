"""Boxes [..., 4], in shares of an image's width and height: corners (x0, y0, x1, y1), or centres.

The latter are (centre x, centre y, width, height).
"""

import jax
import jax.numpy as jnp

SMALLEST = 1e-9  # area by which a box without one is divided


def to_centres(corners: jax.Array) -> jax.Array:
    """Boxes by their corners to boxes by their centres."""
    low, high = corners[..., :2], corners[..., 2:]
    return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def to_corners(centres: jax.Array) -> jax.Array:
    """Boxes by their centres to boxes by their corners."""
    middle, half = centres[..., :2], centres[..., 2:] / 2
    return jnp.concatenate([middle - half, middle + half], axis=-1)


def generalised_iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Generalised intersection over union (arXiv:1902.09630 algorithm 1) of boxes by corners.

    Leading axes of [..., 4] broadcast. It is in [-1, 1]; of two boxes without area that are one
    point or lie on one line, it is 0.
    """
    inside = area(jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:]))
    hull = area(jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - inside
    iou = inside / jnp.maximum(union, SMALLEST)
    return iou - (hull - union) / jnp.maximum(hull, SMALLEST)


def area(low: jax.Array, high: jax.Array) -> jax.Array:
    """Area [...] between corners [..., 2]; 0 where they are not in order."""
    sides = jnp.maximum(high - low, 0)
    return sides[..., 0] * sides[..., 1]
