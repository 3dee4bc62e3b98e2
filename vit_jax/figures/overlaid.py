"""Draws what is over an image, `data.overlays`: boxes with names, and a legend of classes."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from vit_jax.data import overlays
from vit_jax.data.overlays import Picture
from vit_jax.figures import style

MOST = 30  # classes in a legend
DPI = 100
LEAST = 480  # pixels of a picture's longer side; a smaller image is enlarged by a whole number
LINE = 0.2  # inches of a line of a legend
SIZE = 8  # of text
LUMA, DARK = (0.299, 0.587, 0.114), 0.35  # brightness of a colour, below which text is white
LARGE = 700  # pixels of an image's longer side, for which lines are wider by one pixel


def draw_boxes(
    axis: Axes, picture: Picture, words: Sequence[str], size: float = 6, framed: bool = True
) -> None:
    """Draws the boxes of a picture, each with its words; without frames, the words alone."""
    for (x0, y0, x1, y1), number, text in zip(
        picture.boxes - 0.5, picture.classes, words, strict=True
    ):
        colour = overlays.colour(number)
        if framed:
            axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=colour))
        axis.text(
            x0, y0, text, fontsize=size, va='bottom', parse_math=False, clip_on=True,
            color='black' if np.dot(colour, LUMA) > DARK else 'white',
            bbox=dict(facecolor=colour, edgecolor='none', pad=0.5, alpha=0.8),
        )  # fmt: skip


def draw_legend(figure: Figure, entries: Mapping[int, str], **place: object) -> None:
    """Names classes beside their colours, {class: text}, the first `MOST`."""
    shown = list(entries.items())[:MOST]
    if shown:
        legend = figure.legend(
            [Patch(color=overlays.colour(k)) for k, _ in shown], [text for _, text in shown],
            frameon=False, **{'fontsize': 7} | place,
        )  # fmt: skip
        style.disable_math(legend)


def enlarged(image: np.ndarray) -> int:
    """By which whole number an image is enlarged in its picture."""
    return -(-LEAST // max(image.shape[:2]))


def write(
    path: os.PathLike,
    example: Mapping[str, np.ndarray],
    names: Sequence[str],
    words: Sequence[str],
    entries: Mapping[int, str],
) -> None:
    """Writes an image with what is over it as a PNG, pixel by pixel, above a legend.

    Args:
      path: the PNG.
      example: what `overlays.picture` draws.
      names: names of all classes.
      words: beside each box, or each object with a mask.
      entries: of the legend, {class: text}.
    """
    times = enlarged(example['image'])
    larger = {
        key: x.repeat(times, -2 - (key == 'image')).repeat(times, -1 - (key == 'image'))
        if key in ('image', 'label_map', 'masks') else x
        for key, x in example.items()
    }  # fmt: skip
    height, width = larger['image'].shape[:2]
    made = overlays.picture(larger, names, 1 + max(height, width) // LARGE)
    across = max(width, LEAST // 2) / DPI
    texts = [style.shorten(text, across - 0.5, SIZE) for text in list(entries.values())[:MOST]]
    room = max((style.text_width(text, SIZE) for text in texts), default=0) + 0.45
    columns = max(int(across / room), 1)
    strip = LINE * -(-len(texts) // columns) + (0.1 if texts else 0)
    figure = Figure((across, height / DPI + strip))
    share = strip / (height / DPI + strip)
    axis = figure.add_axes((0, share, width / DPI / across, 1 - share))
    axis.imshow(made.image, interpolation='nearest')
    axis.axis('off')
    draw_boxes(axis, made, words, SIZE, 'masks' not in example)
    draw_legend(
        figure, dict(zip(entries, texts, strict=False)), loc='lower left', ncols=columns,
        fontsize=SIZE, borderaxespad=0.2, columnspacing=1.0, handlelength=1.2,
    )  # fmt: skip
    style.save(path, figure, DPI)
