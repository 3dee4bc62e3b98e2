"""Weights of interpolation, and what they resize: position tables, kernels of patches, maps.

Shapes: h w grid of patches, N patches (h * w), P patch, C channels, D width.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def linear_aligned(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of linear interpolation, aligned corners: scipy.ndimage.zoom(order=1)."""
    position = np.linspace(0, old - 1, new) if new > 1 else np.zeros(1)
    low = np.minimum(np.floor(position).astype(int), max(old - 2, 0))
    weights = np.zeros((new, old))
    weights[np.arange(new), low] = 1 - (position - low)
    weights[np.arange(new), np.minimum(low + 1, old - 1)] += position - low
    return weights


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic kernel (doi:10.1109/TASSP.1981.1163711 eq. 4)."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def bicubic(old: int, new: int, offset: float = 0.0) -> np.ndarray:
    """Weights [new, old] of PyTorch's bicubic interpolation: a = -3/4, borders repeated.

    It is that to a size or, with an offset, that by the scale (new + offset) / old.
    """
    position = (np.arange(new) + 0.5) * old / (new + offset) - 0.5
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        index = np.floor(position).astype(int) + tap
        np.add.at(
            weights, (np.arange(new), np.clip(index, 0, old - 1)), cubic(position - index, -0.75)
        )
    return weights


def bicubic_antialias(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of PyTorch's antialiased bicubic interpolation: a = -1/2."""
    return antialiased(old, new, lambda x: cubic(x, -0.5), 2)


def linear_antialias(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of PyTorch's antialiased linear interpolation."""
    return antialiased(old, new, lambda x: np.maximum(1 - np.abs(x), 0), 1)


def antialiased(
    old: int, new: int, kernel: Callable[[np.ndarray], np.ndarray], reach: int
) -> np.ndarray:
    """Weights [new, old] of interpolation by a kernel that is 0 beyond `reach`.

    The kernel widens by old / new where the table shrinks. Taps outside the table are dropped and
    the others rescaled to sum to 1.
    """
    scale = max(old / new, 1)
    centre = (np.arange(new)[:, None] + 0.5) * old / new
    low = np.maximum((centre - reach * scale + 0.5).astype(int), 0)
    high = np.minimum((centre + reach * scale + 0.5).astype(int), old)
    index = np.arange(old)[None]
    weights = kernel((index - centre + 0.5) / scale)
    weights = np.where((index >= low) & (index < high), weights, 0)
    return weights / weights.sum(axis=1, keepdims=True)


def linear(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of PyTorch's linear interpolation without aligned corners."""
    position = (np.arange(new) + 0.5) * old / new - 0.5
    return interpolation(np.arange(old), np.clip(position, 0, old - 1))


def interpolation(places: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Weights [wanted, places] of linear interpolation; the outermost values hold beyond."""
    return np.stack([np.interp(wanted, places, row) for row in np.eye(len(places))], axis=1)


METHODS = {
    'linear': linear_aligned, 'bilinear': linear, 'bilinear_antialias': linear_antialias,
    'bicubic': bicubic, 'bicubic_antialias': bicubic_antialias,
}  # fmt: skip


def positions(
    table: jax.Array, old: tuple[int, int], new: tuple[int, int], method: str, **how: float
) -> jax.Array:
    """Resizes a position table [1, prefix + h * w, D] from the grid `old` (h, w) to `new`.

    Rows of prefix tokens stay as they are. Equal grids return the table itself. `method` is a key
    of METHODS, `how` are arguments of its function.
    """
    if tuple(old) == tuple(new):
        return table
    prefix = table.shape[1] - old[0] * old[1]
    rows, columns = (METHODS[method](n, m, **how) for n, m in zip(old, new, strict=True))
    patches = table[0, prefix:].reshape(*old, -1)
    patches = jnp.einsum('yh,xw,hwd->yxd', rows, columns, patches, precision='highest')
    patches = patches.reshape(1, new[0] * new[1], -1).astype(table.dtype)
    return jnp.concatenate([table[:, :prefix], patches], axis=1)


def maps(x: jax.Array, new: tuple[int, int]) -> jax.Array:
    """Resizes maps [B, h, w, C] bilinearly, without aligned corners and antialias."""
    if x.shape[1:3] == tuple(new):
        return x
    rows, columns = (linear(n, m).astype(x.dtype) for n, m in zip(x.shape[1:3], new, strict=True))
    x = jnp.einsum('yh,bhwc->bywc', rows, x, precision='highest')
    return jnp.einsum('xw,bywc->byxc', columns, x, precision='highest')


def kernel_weights(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of `kernel` along one side."""
    return np.linalg.pinv(linear(old, new).T)


def kernel(kernel: jax.Array, new: tuple[int, int]) -> jax.Array:
    """Resizes a kernel of patches [P, P, C, D] to sides `new` (FlexiViT, arXiv:2212.08013 eq. 3).

    The embedding of a patch is then nearest to that of the patch resized, by linear interpolation,
    between the sides: equal where the patch grows. The pseudo-inverse of a Kronecker product is
    that of its factors.
    """
    old = kernel.shape[:2]
    if tuple(old) == tuple(new):
        return kernel
    rows, columns = (kernel_weights(n, m) for n, m in zip(old, new, strict=True))
    resized = jnp.einsum('yh,xw,hwcd->yxcd', rows, columns, kernel, precision='highest')
    return resized.astype(kernel.dtype)


def with_patches(
    model: nn.Module, params: Mapping[str, Any], side: int, image_shape: tuple[int, ...]
) -> tuple[nn.Module, dict[str, Any]]:
    """A `vit.Vit` with patches of `side` pixels for images [H, W, C], and its parameters.

    Resizes the kernel and a square table of positions of the model's own parameters.
    """
    resized = model.clone(patch_size=(side, side))
    embedding = params['embedding']
    embedding = dict(embedding, kernel=kernel(embedding['kernel'], resized.patch_size))
    params = dict(params, embedding=embedding)
    if 'posemb' in params:
        old = math.isqrt(params['posemb'].shape[1] - sum(model.prefix_posemb.values()))
        params['posemb'] = positions(
            params['posemb'], (old, old), resized.grid(image_shape), model.interpolation
        )
    return resized, params
