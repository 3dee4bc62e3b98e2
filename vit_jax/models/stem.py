"""What comes before the first block of a `vit.Vit`: patches, positions and the other tokens.

Shapes: B batch, H W image, C channels, N patches, D width.
"""

import flax.linen as nn
import jax

from vit_jax.models import embedding, layers, resnet


def embed(model: nn.Module, images: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Embeds patches with positions: [B, H, W, C] -> [B, N, D], and positions of the prefix."""
    h, w = model.grid(images.shape[1:])
    dtypes = model.dtype, model.product_dtype
    x = images.astype(model.dtype)
    if model.resnet is not None:
        epsilon = resnet.EPSILONS[model.resnet_epsilon]
        x = resnet.ResNet(model.resnet, model.resnet_width, *dtypes, epsilon, name='resnet')(x)
    x = embedding.patches(x, model.width, model.patch_size, model.product_dtype)
    x = x.astype(model.dtype)
    if model.patch_norm:
        x = layers.norm(model.style.norm, model.epsilon, model.dtype, 'patch_norm')(x)
    if model.posemb_at != 'stem' or model.posemb in ('none', 'relative'):
        return x, None
    if model.posemb == 'sincos2d':
        return x + embedding.sincos2d(h, w, model.width).astype(model.dtype), None
    before = sum(model.prefix_posemb.values())
    table = embedding.positions(
        model, model.posemb, (h, w), before, model.width, model.posemb_std
    )
    table = table.astype(model.dtype)
    return x + table[:, before:], table[:, :before]


def prefix_tokens(model: nn.Module, positions: jax.Array | None) -> list[jax.Array]:
    """Class token, distillation token and registers, as the model has them: each [1, *, D]."""
    tokens, start = [], 0
    for name, count in model.prefix.items():
        init = nn.initializers.zeros if name == 'cls' else nn.initializers.normal(0.02)
        token = model.param(name, init, (1, count, model.width)).astype(model.dtype)
        if positions is not None and name in model.prefix_posemb:
            token = token + positions[:, start : start + count]
            start += count
        tokens.append(token)
    return tokens
