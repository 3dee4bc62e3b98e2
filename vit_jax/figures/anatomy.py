"""Analyses of a Vision Transformer as arrays: filters, position embeddings, attention, patches.

All but the last are those of arXiv:2010.11929 figures 6, 7 and 14. Shapes: L layers, B batch, H
heads, T tokens, of which the last N = h w are the patches; P patch, C channels, D width. Computed
in float64.
"""

import numpy as np


def filter_components(kernel: np.ndarray, count: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """Principal components [count, P, P, C] of patch filters [P, P, C, D], and their shares.

    The filters are D points in P * P * C dimensions; a share is that of the variance about their
    mean (figure 7, left). Each component has the sign that makes its largest value positive.
    """
    points = np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]).T  # [D, P * P * C]
    rows, shares = principal(points)
    return rows[:count].reshape(-1, *kernel.shape[:3]), shares[:count]


def patch_components(
    features: np.ndarray, kept: np.ndarray, count: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """The first principal components of patches [B, h, w, count], and their shares.

    They are those of the patches `kept`, bool [B, h, w], of all images together, features being
    [B, h, w, D] (arXiv:2304.07193 figure 1). Each is scaled so that 96% of these are in [0, 1].
    """
    features = np.asarray(features, np.float64)
    points = features[kept]
    rows, shares = principal(points)
    found = (features - points.mean(axis=0)) @ rows[:count].T
    low, high = np.percentile(found[kept], (2, 98), axis=0)
    scaled = (found - low) / np.maximum(high - low, np.finfo(np.float64).tiny)
    return scaled.clip(0, 1), shares[:count]


def principal(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Principal components [C, D] of points [N, D], and their shares of the variance [C].

    Each has the sign that makes its largest value positive.
    """
    _, scale, rows = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)
    return rows * np.sign(largest), scale**2 / np.sum(scale**2)


def position_similarity(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Cosine similarity [h, w, h, w] between the position embeddings of all patches.

    `table` is [1, prefix + N, D] (figure 7, middle).
    """
    h, w = grid
    patches = np.asarray(table, np.float64)[0, -h * w :]
    unit = patches / np.linalg.norm(patches, axis=1, keepdims=True)
    return (unit @ unit.T).reshape(h, w, h, w)


def attention_distance(
    attention: np.ndarray, grid: tuple[int, int], stride: tuple[int, int]
) -> np.ndarray:
    """Mean distance [L, H] in pixels between a patch and those it attends to (figure 7, right).

    `attention` is [L, B, H, T, T]; weights are restricted to patches and normalized to sum to 1.
    `stride` is the distance of patches in pixels, (vertical, horizontal).
    """
    h, w = grid
    y, x = (a.reshape(-1) for a in np.mgrid[:h, :w] * np.reshape(stride, (2, 1, 1)))
    distance = np.hypot(y[:, None] - y, x[:, None] - x)  # [N, N]
    patches = np.asarray(attention, np.float64)[..., -h * w :, -h * w :]
    total = np.maximum(patches.sum(axis=-1), np.finfo(np.float64).tiny)
    return ((patches * distance).sum(axis=-1) / total).mean(axis=(1, 3))


def rollout(attention: np.ndarray, grid: tuple[int, int], token: int = 0) -> np.ndarray:
    """Attention rollout [B, h, w] to a token (figures 6 and 14; arXiv:2005.00928 section 3).

    Averages heads, gives half of the weight to the residual connection and multiplies the layers.
    Returns the row of `token`, restricted to patches and normalized to sum to 1.
    """
    h, w = grid
    heads = np.asarray(attention, np.float64).mean(axis=2)  # [L, B, T, T]
    eye = np.eye(heads.shape[-1])
    flow = eye
    for layer in heads:
        flow = (layer + eye) / 2 @ flow
    row = flow[:, token, -h * w :]
    return (row / row.sum(axis=1, keepdims=True)).reshape(-1, h, w)


def head_maps(
    attention: np.ndarray, grid: tuple[int, int], layer: int = -1, token: int = 0
) -> np.ndarray:
    """Attention [B, H, h, w] of a token to the patches by head, in one layer, not normalized."""
    h, w = grid
    rows = np.asarray(attention, np.float64)[layer][:, :, token, -h * w :]
    return rows.reshape(*rows.shape[:2], h, w)
