"""Which tokens of an example are corrupted, and how (arXiv:1810.04805 section 3.1).

Shapes: B batch, N tokens.
"""

import jax
import jax.numpy as jnp

SHARES = (0.8, 0.1, 0.1)  # of the corrupted tokens: masked, replaced, kept
CORRUPT = 0x636F72  # folded into the key for corruption; dropout uses the key itself


def draw(
    key: jax.Array, shape: tuple[int, int], corrupt: float, real: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Draws what happens to each token: int [B, N], and the index of another token, int [B, N].

    0: masked, 1: replaced, 2: kept and predicted, 3: not corrupted. The counts of an example are
    its shares of N, rounded up or down by one number that is drawn for the example: their
    expectation is exact, and they add up.

    Args:
      key: that of the step, for all devices.
      shape: (B, N).
      corrupt: share of the tokens that are corrupted.
      real: bool [B, N], false for tokens that are not to be corrupted, of which no share is. None:
        all are.
    """
    b, n = shape
    order, offset, other = jax.random.split(jax.random.fold_in(key, CORRUPT), 3)
    noise, counts = jax.random.uniform(order, shape), n
    if real is not None:
        noise, counts = jnp.where(real, noise, 2), jnp.sum(real, axis=1, keepdims=True)
    ranks = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)  # [B, N]
    ends, end = [], 0.0
    for share in SHARES:
        end += share
        ends.append(counts * corrupt * end * jnp.ones((b, 1)))
    ends = jnp.floor(jnp.concatenate(ends, axis=1) + jax.random.uniform(offset, (b, 1)))  # [B, 3]
    kinds = jnp.sum(ranks[:, :, None] >= ends[:, None], axis=-1)
    if real is not None:
        kinds = jnp.where(real, kinds, 3)
    others = (jnp.arange(n) + jax.random.randint(other, shape, 1, n)) % n
    return kinds, others


def of_each(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Means over tokens by weights: [B, N] -> [B]; 0 where no token has any."""
    return jnp.sum(values * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1)
