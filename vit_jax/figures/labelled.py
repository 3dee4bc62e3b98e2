"""How similar images are to texts: a matrix, or maps of where in an image.

Shapes: N images, K texts, h w grid of patches.
"""

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from vit_jax.figures import style
from vit_jax.io.text import printable

MOST = 24  # images, and texts
SIDE, LEFT, TOP, RIGHT = 0.9, 1.2, 1.4, 0.9  # inches of a cell, an image, texts, the last one's end
SIZE = 8  # of text
COLOURS = 'cividis'  # for readers who are colour-blind


def draw(
    path: os.PathLike,
    images: Sequence[np.ndarray],
    labels: Sequence[str],
    cosines: np.ndarray,
    maps: np.ndarray | None = None,
) -> None:
    """Writes a PNG with a row for each image and a column for each text, MOST of each.

    A cell has the cosine of their embeddings, and its colour; the highest of a row is bold. With
    maps it has those of the patches over the image in grey, the colours of an image's maps being
    from the lowest to the highest value of all of them.

    Args:
      path: the PNG.
      images: uint8 [H, W, 3] each.
      labels: the texts.
      cosines: [N, K].
      maps: [N, K, h, w], cosines of patches. None: the matrix.
    """
    images, labels = images[:MOST], [printable(text) for text in labels[:MOST]]
    cosines = cosines[:MOST, :MOST]
    side = SIDE if maps is None else 2 * SIDE
    rows, columns = cosines.shape
    width, height = LEFT + side * columns + RIGHT, TOP + side * rows + 0.2
    figure = Figure((width, height))
    low, high = cosines.min(), cosines.max()
    for i, image in enumerate(images):
        bottom = height - TOP - side * (i + 1)
        axis = figure.add_axes([0.1 / width, bottom / height, 1 / width, side * 0.95 / height])
        axis.imshow(image)
        axis.axis('off')
        for k, text in enumerate(labels):
            left = LEFT + side * k
            place = [left / width, bottom / height, side * 0.95 / width, side * 0.95 / height]
            axis = figure.add_axes(place)
            draw_cell(axis, image, cosines[i, k], low, high, None if maps is None else maps[i], k)
            best = cosines[i, k] == cosines[i].max()
            axis.text(
                0.5, 0.5 if maps is None else 0.06, f'{cosines[i, k]:.2f}', ha='center',
                va='center', transform=axis.transAxes, fontsize=SIZE,
                weight='bold' if best else 'normal', color='white',
                bbox=dict(facecolor='black', edgecolor='none', alpha=0.5, pad=1),
            )  # fmt: skip
            if i == 0:
                figure.text(
                    (left + side / 2) / width, 1 - (TOP - 0.1) / height,
                    style.shorten(text, 1.4, SIZE), rotation=35, ha='left', va='bottom',
                    fontsize=SIZE, parse_math=False,
                )  # fmt: skip
    style.save(path, figure, dpi=100)


def draw_cell(
    axis: object, image: np.ndarray, cosine: float, low: float, high: float,
    maps: np.ndarray | None, k: int,
) -> None:  # fmt: skip
    """Draws the colour of a cosine, or map k of an image's maps [K, h, w] over the image."""
    axis.axis('off')
    if maps is None:
        axis.imshow([[cosine]], vmin=low, vmax=high, cmap=COLOURS, aspect='auto')
        return
    h, w = image.shape[:2]
    axis.imshow(image.mean(axis=-1), cmap='gray', vmin=0, vmax=255)
    axis.imshow(
        maps[k], vmin=maps.min(), vmax=maps.max(), cmap=COLOURS, alpha=0.65,
        extent=(-0.5, w - 0.5, h - 0.5, -0.5), interpolation='bilinear',
    )  # fmt: skip
