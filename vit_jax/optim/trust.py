"""The trust ratio of LARS (arXiv:1708.03888) and LAMB (arXiv:1904.00962)."""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax

from vit_jax.models.parameters import map_by_name


def scale_by_trust_ratio(
    names: Collection[str], stacks: Collection[str], coefficient: float = 1.0
) -> optax.GradientTransformation:
    """Scales the update u of each parameter p of `names` by coefficient * norm(p) / norm(u).

    Of `stacks` [L, ...], each layer has norms of its own. The factor is 1 where a norm is 0, such
    as that of a head that starts at zero.
    """

    def scaled(name: str, update: jax.Array, param: jax.Array) -> jax.Array:
        if name not in names:
            return update
        axes = tuple(range(int(name in stacks), update.ndim))
        p, u = (jnp.sqrt(jnp.sum(x**2, axes, keepdims=True)) for x in (param, update))
        return update * jnp.where((p > 0) & (u > 0), coefficient * p / u, 1)

    return optax.stateless(lambda updates, params: map_by_name(scaled, updates, params))
