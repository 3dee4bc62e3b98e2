"""From images to tokens: normalisation, patches, position embeddings.

Shapes: B batch, H W image, C channels, h w grid of patches, N patches (h * w), D width.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models import memory
from vit_jax.models.memory import shard_batch

FIXED = ('sincos2d', 'sincos2d_moco')  # kinds of positions without parameters


def normalise(
    images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
    """Normalises uint8 [B, H, W, C] to floats; mean and std are those of images in [0, 1]."""
    return standardised(images.astype(jnp.float32) / 255, mean, std)


def standardised(
    images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
    """Normalises images [B, H, W, C] of floats in [0, 1]."""
    return (images - jnp.asarray(mean)) / jnp.asarray(std)


def grid(image_shape: tuple[int, ...], stride: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches of an image [H, W, ...]; raises UserError if not whole."""
    (h, w), (y, x) = image_shape[:2], stride
    if h % y or w % x or not h or not w:
        sizes = [f'{y * n} x {x * m}' for n, m in ((h // y, w // x), (-(-h // y), -(-w // x)))]
        raise UserError(
            f'image size {h} x {w} is not divisible by the patch size {y} x {x}; '
            f'{" and ".join(sizes if h >= y and w >= x else sizes[1:])} would be'
        )
    return h // y, w // x


def patches(
    images: jax.Array, width: int, patch_size: tuple[int, int], dtype: str
) -> jax.Array:
    """Embeds patches, within a module: [B, H, W, C] -> [B, N, D]; the parameter is `embedding`."""
    how = {}
    if memory.target()[0] == 'tpu':
        how['conv_general_dilated'] = lambda x, kernel, *_, precision, **__: convolved(
            x, kernel, precision
        )
    x = nn.Conv(
        width, patch_size, strides=patch_size, padding='VALID', dtype=dtype, name='embedding', **how
    )(images.astype(dtype))
    b, h, w, d = x.shape
    return shard_batch(x.reshape(b, h * w, d))


def product(
    images: jax.Array, kernel: jax.Array, precision: jax.lax.PrecisionLike
) -> jax.Array:
    """`convolved` as a product of matrices: images are cut into [B, N, P * C * P].

    Columns come last, as TPUs lay out uint8 images: that moves least.
    """
    (b, height, width, c), (y, x) = images.shape, kernel.shape[:2]
    h, w = height // y, width // x
    cells = images.reshape(b, h, y, w, x, c).transpose(0, 1, 3, 2, 5, 4)
    cells = shard_batch(cells.reshape(b, h * w, y * c * x))
    kernel = kernel.swapaxes(1, 2).reshape(y * c * x, -1)
    return jnp.matmul(cells, kernel, precision=precision).reshape(b, h, w, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolved(
    images: jax.Array, kernel: jax.Array, precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    """Convolution [B, H, W, C] -> [B, h, w, D] whose stride is its kernel's size [P, P, C, D].

    Where a gradient is asked for it is `product`, whose cut images the gradient reads again with
    less traffic; a forward pass alone is faster as a convolution (benchmarks/RESULTS.md).
    """
    return jax.lax.conv_general_dilated(
        images, kernel, kernel.shape[:2], 'VALID', precision=precision,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )  # fmt: skip


convolved.defvjp(
    lambda images, kernel, precision: jax.vjp(
        functools.partial(product, precision=precision), images, kernel
    ),
    lambda precision, gradient, d: gradient(d),
)


def cut(images: jax.Array, patch_size: tuple[int, int]) -> jax.Array:
    """Cuts images into patches: [B, H, W, C] -> [B, N, P * P * C], rows first."""
    b, _, _, c = images.shape
    (h, w), (y, x) = grid(images.shape[1:], patch_size), patch_size
    images = images.reshape(b, h, y, w, x, c).swapaxes(2, 3)
    return images.reshape(b, h * w, y * x * c)


def joined(patches: jax.Array, grid: tuple[int, int], patch_size: tuple[int, int]) -> jax.Array:
    """Joins patches of a grid (h, w) to images, the inverse of `cut`."""
    (h, w), (y, x) = grid, patch_size
    patches = patches.reshape(patches.shape[0], h, w, y, x, -1).swapaxes(2, 3)
    return patches.reshape(patches.shape[0], h * y, w * x, -1)


def fixed(kind: str, h: int, w: int, width: int, *, temperature: float = 10_000.0) -> jax.Array:
    """Fixed 2-D sine-cosine positions, [1, h * w, D], rows first; `kind` is one of FIXED.

    'sincos2d' (arXiv:2205.01580 section 3) has the frequencies temperature^(-i / (D / 4 - 1)), and
    'sincos2d_moco' temperature^(-i / (D / 4)), as the code of MoCo v3 (arXiv:2104.02057) and of
    MAE (arXiv:2111.06377).
    """
    if width % 4:
        raise ValueError(f'{kind} needs a width divisible by 4, not {width}')
    y, x = jnp.mgrid[:h, :w]
    last = max(width // 4 - (kind == 'sincos2d'), 1)
    omega = temperature ** -(jnp.arange(width // 4) / last)
    y = y.reshape(-1, 1) * omega  # [N, D / 4]
    x = x.reshape(-1, 1) * omega
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)[None]


def positions(
    scope: nn.Module, kind: str, grid: tuple[int, int], before: int, width: int,
    std: float | None,
) -> jax.Array:  # fmt: skip
    """Learned positions of `scope`, [1, before + h * w, D], for prefix tokens, then patches.

    'learn' has a vector per token; 'learn2d' one half of D per row and one per column of the grid,
    and zeros for the prefix (arXiv:2010.11929 appendix D.4). Initial values have the deviation
    `std`, or D^-0.5 if it is None.
    """
    h, w = grid
    init = nn.initializers.normal(width**-0.5 if std is None else std)
    if kind == 'learn':
        return scope.param('posemb', init, (1, before + h * w, width))
    y = scope.param('posemb_y', init, (1, h, width // 2))
    x = scope.param('posemb_x', init, (1, w, width - width // 2))
    table = jnp.concatenate([jnp.repeat(y, w, axis=1), jnp.tile(x, (1, h, 1))], axis=-1)
    return jnp.pad(table, ((0, 0), (before, 0), (0, 0)))
