"""Draws curves, confusion matrices and the arrays of `anatomy` as PNGs.

The pictures are readable in print and by colour-blind readers.
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vit_jax.figures import style

MAP = 'cividis'  # looks the same to colour-blind readers (doi:10.1371/journal.pone.0199239)
SHOWN = 7  # positions along a side, at most
NAMED, WRITTEN = 40, 20  # classes of a confusion matrix up to which names and shares are legible
UNDRAWN = ('step', 'seconds', 'examples')  # keys of a line of metrics


def hide_axes(axes: Axes | np.ndarray) -> None:
    """Draws no frame, ticks or labels of one or several axes."""
    for ax in np.ravel(axes):
        ax.set_axis_off()


def scaled(values: np.ndarray) -> np.ndarray:
    """Scales values to [0, 1], with 0 in the middle and the largest magnitude at an end."""
    return 0.5 + values / (2 * np.abs(values).max() or 1)


def curves(path: os.PathLike, lines: Sequence[Mapping]) -> bool:
    """Draws all metrics of metrics.jsonl over the steps, a panel for each; returns False if none.

    A metric is drawn once it has two points in training or in an evaluation.
    """
    keys = dict.fromkeys(key.rpartition('/')[2] for line in lines for key in line)
    found = {key: style.series_of(lines, key) for key in keys if key not in UNDRAWN}
    names = [key for key, all_of in found.items() if any(len(s) > 1 for s, _ in all_of.values())]
    if not names:
        return False
    columns = 3
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(9, 2.3 * rows), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    for ax, name in zip(axes, names, strict=False):
        style.draw_series(ax, found[name], '#.3g')
        ax.set_title(name.replace('_', ' '), fontsize=9, loc='left')
        ax.tick_params(labelsize=7)
        ax.set_xlim(0, 1.02 * lines[-1]['step'])
        ax.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
        ax.xaxis.set_major_formatter('{x:,.0f}')
        legend = ax.legend(  # below the axes, where no line is
            loc='upper left', bbox_to_anchor=(0, -0.14), borderaxespad=0, frameon=False, fontsize=6,
            ncols=2, columnspacing=1,
        )  # fmt: skip
        style.disable_math(legend)
    style.save(path, figure)
    return True


def confusion(path: os.PathLike, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Draws a confusion matrix [K, K] of counts as shares of each true class (row)."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    k = len(counts)
    side = min(2.2 + 0.32 * k, 8)
    figure = Figure(figsize=(side + 0.6, side), layout='constrained')
    ax = figure.subplots()
    drawn = ax.imshow(shares, cmap=MAP, vmin=0, vmax=1)
    if k <= NAMED:
        tail = style.distinct_tail(classes)
        words = [style.shorten(name, 1.3, 7, tail=tail) for name in classes]
        ax.set_xticks(range(k), words, rotation=90, fontsize=7, parse_math=False)
        ax.set_yticks(range(k), words, fontsize=7, parse_math=False)
    if k <= WRITTEN:
        for i, j in zip(*np.nonzero(counts), strict=True):
            colour = 'black' if shares[i, j] > 0.5 else 'white'
            ax.text(j, i, f'{100 * shares[i, j]:.0f}', color=colour, fontsize=7,
                    ha='center', va='center')  # fmt: skip
    ax.set_xlabel('predicted', fontsize=8)
    ax.set_ylabel('true class', fontsize=8)
    bar = figure.colorbar(drawn, ax=ax, shrink=0.7, aspect=25)
    bar.set_label('share of the true class', fontsize=8)
    bar.ax.tick_params(labelsize=7)
    style.save(path, figure)


def filters(path: os.PathLike, components: np.ndarray, shares: np.ndarray) -> None:
    """Draws the first principal components [K, P, P, C] of patch filters; C is 1 or 3."""
    columns = 7
    rows = -(-len(components) // columns)
    figure = Figure(figsize=(6.3, 0.5 + 0.9 * rows), layout='constrained')
    axes = np.reshape(figure.subplots(rows, columns), -1)
    hide_axes(axes)
    for ax, component in zip(axes, components, strict=False):
        image = scaled(component)
        ax.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap='gray', vmin=0, vmax=1)
    figure.suptitle(
        f'Patch filters: the first {len(components)} principal components, '
        f'{shares.sum():.0%} of the variance', fontsize=9,
    )  # fmt: skip
    style.save(path, figure)


def positions(path: os.PathLike, similarity: np.ndarray) -> None:
    """Draws maps of the similarity [h, w, h, w] of some patches' positions to all others."""
    h, w = similarity.shape[:2]
    ys, xs = (np.unique(np.linspace(0, n - 1, min(n, SHOWN)).round().astype(int)) for n in (h, w))
    figure = Figure(figsize=(6.3, 0.6 + 5.4 * len(ys) / len(xs)), layout='constrained')
    axes = figure.subplots(len(ys), len(xs), squeeze=False)
    for i, y in enumerate(ys):
        for j, x in enumerate(xs):
            ax = axes[i, j]
            drawn = ax.imshow(similarity[y, x], cmap=MAP, vmin=-1, vmax=1)
            ax.set_xticks([])
            ax.set_yticks([])
            if j == 0:
                ax.set_ylabel(int(y) + 1, fontsize=7)
            if i == len(ys) - 1:
                ax.set_xlabel(int(x) + 1, fontsize=7)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.6, aspect=25)
    bar.set_label('cosine similarity', fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle('Position embeddings, by row and column of the patch', fontsize=9)
    style.save(path, figure)


def distances(path: os.PathLike, distance: np.ndarray) -> None:
    """Draws attention distance [L, H] in pixels by depth, with a point per head."""
    layers, heads = distance.shape
    figure = Figure(figsize=(6.3, 3.6), layout='constrained')
    ax = figure.subplots()
    depth = np.arange(1, layers + 1)
    for head in range(heads):
        ax.plot(depth, distance[:, head], 'o', ms=4, mew=0, color=style.RIGHT, alpha=0.5)
    ax.plot(depth, distance.mean(axis=1), color=style.WRONG, lw=1.5, label='mean of heads')
    ax.set_xlabel('layer')
    ax.set_ylabel('mean attention distance, pixels')
    ax.set_ylim(0, 1.15 * distance.max() or 1)
    ax.set_xticks(depth if layers <= 16 else depth[:: layers // 12])
    ax.spines[['top', 'right']].set_visible(False)
    figure.legend(loc='outside upper right', frameon=False, fontsize=8)
    style.save(path, figure)


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Darkens an image [H, W, 3] where a map [h, w] is low (arXiv:2010.11929 figure 6).

    The highest 5% have full brightness. In large models a few uninformative patches may have most
    of the weight (arXiv:2309.16588 section 2), which would make all others black.
    """
    h, w = image.shape[:2]
    full = max(np.quantile(heat, 0.95), np.finfo(np.float32).tiny)
    weights = Image.fromarray(np.minimum(heat / full, 1).astype(np.float32))
    weights = np.array(weights.resize((w, h), Image.Resampling.BICUBIC)).clip(0, 1)
    return (image * weights[..., None]).astype(np.uint8)


def rollouts(path: os.PathLike, images: Sequence[np.ndarray], maps: np.ndarray) -> None:
    """Draws images beside their attention rollout [B, h, w], in one to four columns of pairs."""
    columns = min(4, -(-len(images) // 4))
    rows = -(-len(images) // columns)
    side = 2.3 if columns == 1 else 1.5
    figure = Figure(figsize=(2 * side * columns, 0.3 + side * rows), layout='constrained')
    axes = figure.subplots(rows, 2 * columns, squeeze=False)
    hide_axes(axes)
    for pair, image, heat in zip(axes.reshape(-1, 2), images, maps, strict=False):
        pair[0].imshow(image)
        pair[1].imshow(overlay(image, heat))
    for pair in axes[0].reshape(-1, 2):
        pair[0].set_title('input', fontsize=9)
        pair[1].set_title('attention rollout', fontsize=9)
    style.save(path, figure)


def heads(path: os.PathLike, images: Sequence[np.ndarray], maps: np.ndarray) -> None:
    """Draws each image and the class token's attention by head [B, H, h, w] in one layer."""
    count = maps.shape[1]
    figure = Figure(figsize=(1.05 * (count + 1), 0.4 + 1.05 * len(images)), layout='constrained')
    axes = figure.subplots(len(images), count + 1, squeeze=False)
    hide_axes(axes)
    for row, image, by_head in zip(axes, images, maps, strict=True):
        row[0].imshow(image)
        for ax, heat in zip(row[1:], by_head, strict=True):
            ax.imshow(heat, cmap=MAP)
    for head in range(count):
        axes[0, head + 1].set_title(f'head {head + 1}', fontsize=8)
    style.save(path, figure)
