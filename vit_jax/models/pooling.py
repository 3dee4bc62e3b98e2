"""Pooling of tokens into one vector.

Shapes: B batch, N patches, T tokens, D width, H heads, C head width (D = H * C).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.io.bounds import Positive
from vit_jax.models.layers import Dtype, Mlp, norm
from vit_jax.models.memory import shard_batch


@dataclasses.dataclass(frozen=True)
class Pool:
    """Details of `Vit.pool`."""

    prefix: bool = False  # whether gap and map also read the tokens before the patches
    num_heads: Positive[int] | None = None  # attention heads of map; None: those of the blocks
    mlp_dim: Positive[int] | None = None  # hidden size of the MLP of map; None: that of the blocks


def pooled(model: nn.Module, out: dict[str, jax.Array], first: jax.Array) -> jax.Array:
    """Pools the tokens of a `vit.Vit`, within it, as `model.pool` says.

    Args:
      model: the `vit.Vit`.
      out: `encoded` [B, N, D] and, of a model with a class token, `cls` [B, D].
      first: tokens before the patches, [B, T - N, D].

    Returns:
      [B, D], [B, 2 D] with cls_gap, or with none all tokens, [B, T, D].
    """
    if model.pool == 'cls':
        return out['cls']
    tokens = out['encoded']
    if model.prefix and (model.pool == 'none' or model.pool_style.prefix):
        tokens = jnp.concatenate([first, tokens], axis=1)
    if model.pool == 'gap':
        return tokens.mean(axis=1)
    if model.pool == 'cls_gap':  # the linear head of DINOv2, arXiv:2304.07193 section 7.1
        return jnp.concatenate([out['cls'], out['encoded'].mean(axis=1)], axis=-1)
    if model.pool == 'map':
        return map_head(model, 'map_head')(tokens)
    return tokens


def map_head(model: nn.Module, name: str | None = None) -> 'MapHead':
    """The attention pooling of a `vit.Vit` or `text.Text`, within it under a name."""
    return MapHead(
        model.pool_style.num_heads or model.num_heads, model.pool_style.mlp_dim or model.mlp_dim,
        model.gelu, model.epsilon, model.dtype, model.style.norm, name=name,
    )  # fmt: skip


class MapHead(nn.Module):
    """Multi-head attention pooling by one learned query (arXiv:2106.04560 section 3.4).

    [B, T, D] -> [B, D]. Tokens where `real`, bool [B, T], is false are left out.
    """

    num_heads: int
    mlp_dim: int
    gelu: str = 'tanh'
    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32
    norm_kind: str = 'layer'

    @nn.compact
    def __call__(self, x: jax.Array, real: jax.Array | None = None) -> jax.Array:
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
        if real is not None:
            logits = jnp.where(real[:, None, None], logits, jnp.finfo(logits.dtype).min)
        probs = nn.softmax(logits.astype(jnp.float32)).astype(self.dtype)
        x = jnp.einsum('bhqk,bkhc->bqhc', probs, v)
        x = shard_batch(nn.DenseGeneral(width, axis=(-2, -1), **dense, name='out')(x))
        y = norm(self.norm_kind, self.epsilon, self.dtype, 'norm')(x)
        x = x + Mlp(self.mlp_dim, self.gelu, dtype=self.dtype, name='mlp')(y)
        return x[:, 0]
