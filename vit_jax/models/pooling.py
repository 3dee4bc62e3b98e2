"""Pooling of tokens into one vector by attention.

Shapes: B batch, T tokens, D width, H heads, C head width (D = H * C).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.layers import Dtype, Mlp
from vit_jax.models.memory import shard_batch


class MapHead(nn.Module):
    """Multi-head attention pooling by one learned query (arXiv:2106.04560 section 3.4).

    [B, T, D] -> [B, D].
    """

    num_heads: int
    mlp_dim: int
    gelu: str = 'tanh'
    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, _, width = x.shape
        xavier = nn.initializers.xavier_uniform()
        heads = (self.num_heads, width // self.num_heads)
        dense = dict(kernel_init=xavier, dtype=self.dtype)
        probe = self.param('probe', xavier, (1, 1, width)).astype(self.dtype)
        q = nn.DenseGeneral(heads, **dense, name='query')(probe)
        q = shard_batch(jnp.tile(q, (b, 1, 1, 1)), whole=False)
        k = shard_batch(nn.DenseGeneral(heads, **dense, name='key')(x), whole=False)
        v = shard_batch(nn.DenseGeneral(heads, **dense, name='value')(x), whole=False)
        logits = jnp.einsum('bqhc,bkhc->bhqk', q * q.shape[-1] ** -0.5, k)
        probs = nn.softmax(logits.astype(jnp.float32)).astype(self.dtype)
        x = jnp.einsum('bhqk,bkhc->bqhc', probs, v)
        x = shard_batch(nn.DenseGeneral(width, axis=(-2, -1), **dense, name='out')(x))
        y = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name='norm')(x)
        x = x + Mlp(self.mlp_dim, self.gelu, dtype=self.dtype, name='mlp')(y)
        return x[:, 0]
