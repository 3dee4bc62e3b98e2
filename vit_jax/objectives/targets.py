"""What methods predict of the pixels of patches.

Shapes: B batch, H W image, C channels, N patches, P patch, Q colours per patch.
"""

import jax
import jax.numpy as jnp

from vit_jax.models import embedding

BITS = 3  # of each channel of a colour


def normalised(patches: jax.Array) -> jax.Array:
    """Normalises the pixels [..., P * P * C] of each patch: mean 0, unbiased variance 1."""
    mean = jnp.mean(patches, axis=-1, keepdims=True)
    variance = jnp.var(patches, axis=-1, keepdims=True, ddof=1)
    return (patches - mean) / jnp.sqrt(variance + 1e-6)


def colours(images: jax.Array, patch_size: tuple[int, int], count: int) -> jax.Array:
    """Colours of patches: uint8 [B, H, W, C] -> int [B, N, Q], Q = `count`, each a mean.

    A colour has the upper 3 bits of the mean of each channel, the first channel uppermost.
    """
    (y, x), side = patch_size, round(count**0.5)
    b, _, _, c = images.shape
    patches = embedding.cut(images.astype(jnp.float32), patch_size)
    patches = patches.reshape(b, -1, side, y // side, side, x // side, c)
    means = jnp.mean(patches, axis=(3, 5)).reshape(b, patches.shape[1], count, c)
    levels = (means / 2 ** (8 - BITS)).astype(jnp.int32)  # [B, N, Q, C]
    return jnp.sum(levels << BITS * jnp.arange(c - 1, -1, -1), axis=-1)
