"""What comes before the first block of a `vit.Vit`: patches, positions and the other tokens.

Shapes: B batch, H W image, C channels, N patches, V visible patches, T tokens, D width.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models import embedding, layers, resnet

Corrupt = Callable[[jax.Array], jax.Array]


def sequence(
    model: nn.Module, images: jax.Array, corrupt: Corrupt | None, visible: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The patches [B, N, D], or those that are `visible` [B, V, D], and all tokens [B, T, D].

    Arguments are those of `vit.Vit.__call__`.
    """
    patches, positions = embed(model, images, corrupt)
    if visible is not None:
        check_positions(model)
        patches = jnp.take_along_axis(patches, visible[:, :, None], axis=1)
    prefix = prefix_tokens(model, positions)
    prefix = [jnp.tile(p, (patches.shape[0], 1, 1)) for p in prefix]
    return patches, jnp.concatenate([*prefix, patches], axis=1)


def check_positions(model: nn.Module) -> None:
    """Raises UserError for a model whose positions do not move with the patches."""
    style = model.style
    inside = {
        "model.posemb 'relative'": model.posemb == 'relative',
        f'model.posemb_at {model.posemb_at!r}': model.posemb_at != 'stem',
        'model.style.rope': style.rope is not None, 'model.style.bias': style.bias is not None,
    }  # fmt: skip
    for field in (name for name, given in inside.items() if given):
        raise UserError(
            f'{field} places all patches within the blocks, which read only some of them here; '
            "model.posemb 'learn', 'sincos2d' and 'sincos2d_moco' place them before"
        )


def embed(
    model: nn.Module, images: jax.Array, corrupt: Corrupt | None = None
) -> tuple[jax.Array, jax.Array | None]:
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
    if corrupt is not None:
        x = corrupt(x)
    if model.posemb_at != 'stem' or model.posemb in ('none', 'relative'):
        return x, None
    if model.posemb in embedding.FIXED:
        return x + embedding.fixed(model.posemb, h, w, model.width).astype(model.dtype), None
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
