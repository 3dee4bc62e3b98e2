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
SIDE, LEGEND = 2.6, 5  # inches of a picture in a sheet; columns of its legend
LUMA, DARK = (0.299, 0.587, 0.114), 0.35  # brightness of a colour, below which text is white
NOTHING = {'labels': np.zeros(0, int), 'boxes': np.zeros((0, 4))}  # over an image
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


def enlarged(image: np.ndarray, least: int = LEAST) -> int:
    """By which whole number an image is enlarged, to `least` pixels or more along a side."""
    return -(-least // max(image.shape[:2]))


def drawn(
    example: Mapping[str, np.ndarray], names: Sequence[str], least: int = LEAST
) -> Picture:
    """An example with what is over its image, enlarged so that lines are fine."""
    times, larger = enlarged(example['image'], least), dict(example)
    for key, axis in (('image', 0), ('label_map', 0), ('segments', 0), ('masks', 1)):
        if key in example:
            larger[key] = example[key].repeat(times, axis).repeat(times, axis + 1)
    return overlays.picture(larger, names, 1 + max(larger['image'].shape) // LARGE)


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
    made = drawn(example, names)
    height, width = made.image.shape[:2]
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


def sheet(
    path: os.PathLike,
    rows: Sequence[Sequence[tuple[Picture, Sequence[str]]]],
    heads: Sequence[str],
    captions: Sequence[str],
    entries: Mapping[int, str],
) -> None:
    """Writes rows of pictures as a PNG.

    Args:
      path: the PNG.
      rows: (picture, words beside its boxes).
      heads: above each column.
      captions: above each row.
      entries: of the legend, {class: text}.
    """
    columns = len(heads)
    shape = np.max([picture.image.shape[:2] for row in rows for picture, _ in row], axis=0)
    tall = SIDE * min(shape[0] / shape[1], 1.5) + LINE
    lines = -(-min(len(entries), MOST) // LEGEND)
    figure = Figure((SIDE * columns, tall * len(rows) + LINE * (lines + 1)), layout='constrained')
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, row, caption in zip(axes, rows, captions, strict=True):
        for axis, (picture, words) in zip(line, row, strict=True):
            axis.imshow(picture.image, interpolation='antialiased')
            axis.axis('off')
            axis.set_anchor('N')
            draw_boxes(axis, picture, words, 6)
        line[0].set_title(
            style.shorten(caption, SIDE, 7, tail=16), fontsize=7, loc='left', parse_math=False
        )
    for axis, head in zip(axes[0], heads, strict=True):
        axis.text(0.5, 1.02, head, fontsize=8, ha='center', va='bottom', transform=axis.transAxes)
    draw_legend(figure, entries, loc='outside lower left', ncols=LEGEND)
    style.save(path, figure)
