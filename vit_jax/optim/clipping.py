"""Clipping of gradients by their norm: all together, or each array by itself."""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax

from vit_jax.models.parameters import map_by_name


def clip_each(limit: float, stacks: Collection[str]) -> optax.GradientTransformation:
    """Scales each gradient down to the norm `limit`; of `stacks` [L, ...], that of each layer.

    The factor is limit / (norm + 1e-6) where it is below 1 (facebookresearch/dino utils.py,
    clip_gradients).
    """

    def clipped(name: str, grad: jax.Array) -> jax.Array:
        axes = tuple(range(int(name in stacks), grad.ndim))
        norm = jnp.sqrt(jnp.sum(grad**2, axes, keepdims=True))
        return grad * jnp.minimum(limit / (norm + 1e-6), 1)

    return optax.stateless(lambda grads, params: map_by_name(clipped, grads))
