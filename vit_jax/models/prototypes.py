"""The head of self-distillation: from features to logits over prototypes.

Shapes: B batch, D width of the features, K prototypes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vit_jax.models import layers
from vit_jax.models.memory import shard_batch

RULES = (
    (r'head/fc[123]/kernel', P('fsdp', None)),
    (r'prototypes/direction', P(None, 'fsdp')),  # [bottleneck, K]
    (r'prototypes/scale', P('fsdp')),  # [K]
)


def unit(x: jax.Array, axis: int) -> jax.Array:
    """x / max(norm of x along an axis, 1e-12), in float32, with a gradient at 0 too."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis, keepdims=True), 1e-24))


class Prototypes(nn.Module):
    """Cosines of features with prototypes, float32: [B, D] -> [B, K] (arXiv:2104.14294 appendix C).

    An MLP of three layers projects to the unit sphere of `bottleneck` dimensions; the prototypes
    are unit vectors on it, or with `scaled` have lengths that are learnt too, from 1 on.
    """

    count: int = 65_536
    hidden: int = 2048
    bottleneck: int = 256
    scaled: bool = False
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, features in enumerate((self.hidden, self.hidden, self.bottleneck), start=1):
            x = layers.exact_gelu(x) if i > 1 else x
            init = nn.initializers.normal(0.02)
            x = nn.Dense(features, kernel_init=init, dtype=self.dtype, name=f'fc{i}')(x)
            x = shard_batch(x)
        kernel = Vectors(self.count, self.bottleneck, self.scaled, name='prototypes')()
        x, kernel = unit(x, -1).astype(self.dtype), kernel.astype(self.dtype)
        return shard_batch(jnp.dot(x, kernel, preferred_element_type=jnp.float32))


class Vectors(nn.Module):
    """`count` vectors [bottleneck, K] by direction and, if `scaled`, length."""

    count: int
    bottleneck: int
    scaled: bool

    @nn.compact
    def __call__(self) -> jax.Array:
        # of equal distribution in all directions but for the corners of a cube, as nn.Linear's
        init = nn.initializers.uniform(2 * self.bottleneck**-0.5)
        shape = self.bottleneck, self.count
        direction = self.param(
            'direction', lambda key, shape: init(key, shape) - self.bottleneck**-0.5, shape
        )
        vectors = unit(direction, 0)
        if self.scaled:
            vectors *= self.param('scale', nn.initializers.ones, (self.count,))
        return vectors
