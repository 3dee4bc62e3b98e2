"""Resizes tables of positions and offsets to another image size, as the code they are from."""

import numpy as np

from vit_jax.models import resizing


def geometric(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of BEiT's interpolation of offsets (unilm, beit/run_class_finetuning.py).

    The old offsets lie on both sides of 0 at sums of a geometric series that reaches as far as the
    new ones, which are whole numbers; between them it is linear, as in timm.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (old // 2)) / (1 - ratio) > new // 2:
            high = ratio
        else:
            low = ratio
    steps = np.cumsum(ratio ** np.arange(old // 2))
    places = np.concatenate([-steps[::-1], [0], steps])
    return resizing.interpolation(places, np.arange(new) - new // 2)


def resize(
    table: np.ndarray,
    old: tuple[int, int],
    new: tuple[int, int],
    method: str,
    square: bool = False,
) -> np.ndarray:
    """Resizes a position table [1, prefix + h * w, D] from the grid `old` (h, w) to `new`.

    Rows of prefix tokens stay as they are. Equal grids return the table itself. `method` is a key
    of resizing.METHODS. With `square` the grid becomes a square, of which `new` takes the top left
    part.
    """
    if tuple(old) == tuple(new):
        return table
    prefix = table.shape[1] - old[0] * old[1]
    patches = table[0, prefix:].reshape(*old, -1).astype(np.float64)
    sides = (max(new),) * 2 if square else new
    weights = resizing.METHODS[method]
    rows, columns = (weights(n, m)[:k] for n, m, k in zip(old, sides, new, strict=True))
    patches = np.einsum('yh,xw,hwd->yxd', rows, columns, patches, optimize=True)
    patches = patches.reshape(1, new[0] * new[1], -1)
    return np.concatenate([table[:, :prefix], patches.astype(table.dtype)], axis=1)


def resize_offsets(
    table: np.ndarray, old: tuple[int, int], new: tuple[int, int], method: str
) -> np.ndarray:
    """Resizes a table of biases [..., R, H] by offset from the grid `old` (h, w) to `new`.

    The rows are those of relative.Bias; those of tokens before the patches stay as they are. Equal
    grids return the table itself. `method` is 'geometric' or 'linear'.
    """
    if tuple(old) == tuple(new):
        return table
    weights = {'geometric': geometric, 'linear': resizing.linear}[method]
    (h, w), (rows, columns) = ([2 * n - 1 for n in grid] for grid in (old, new))
    offsets, rest = table[..., : h * w, :], table[..., h * w :, :]
    offsets = offsets.reshape(*table.shape[:-2], h, w, -1).astype(np.float64)
    offsets = np.einsum('yh,xw,...hwn->...yxn', weights(h, rows), weights(w, columns), offsets)
    offsets = offsets.reshape(*table.shape[:-2], rows * columns, -1).astype(table.dtype)
    return np.concatenate([offsets, rest], axis=-2)
