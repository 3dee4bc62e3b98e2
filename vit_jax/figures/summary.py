"""Draws the summary of a run: its curves, its mistakes and the attention of its class token.

Lengths are in inches from the upper left corner of the page, font sizes in points.
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_jax.evaluators import classify
from vit_jax.figures import style

Images = Sequence[np.ndarray] | np.ndarray  # of uint8 [H, W, 3]
WIDTH, MARGIN, DPI = 9.0, 0.35, 200
TITLE, HEADING, KEYS, KEY, CURVES, TICKS, SPACE = 0.55, 0.5, 0.36, 0.17, 1.8, 0.45, 0.25  # heights
COLUMNS, ROWS, ROWS_ALONE = 9, 4, 6  # of the grid; ROWS_ALONE if there is no attention
GAP, CAPTION, CAPTION_LINE = 0.1, 0.22, 0.12
PAIRS, PAIR_GAP = 4, 0.03  # images beside their attention maps
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def mistakes_first(
    labels: np.ndarray, predictions: np.ndarray, confidences: np.ndarray
) -> np.ndarray:
    """Indices [N] of examples: mistakes, most confident first, then the others in order."""
    wrong = predictions != labels
    mistakes = np.flatnonzero(wrong)
    by_confidence = np.argsort(-confidences[mistakes], kind='stable')
    return np.concatenate([mistakes[by_confidence], np.flatnonzero(~wrong)])


def draw(
    path: os.PathLike,
    *,
    title: str,
    evaluation: str,
    lines: Sequence[Mapping],
    images: Images,
    labels: Sequence[int] | np.ndarray,
    predictions: Sequence[int] | np.ndarray,
    confidences: Sequence[float] | np.ndarray,
    classes: Sequence[str] | None,
    attention: np.ndarray | None,
    attended: np.ndarray | None,
) -> None:
    """Writes a PNG of a run's loss and accuracy, the images of an evaluation and its attention.

    Equal arguments give equal bytes; the file is written atomically.

    Args:
      path: the file to write.
      title: title of the page.
      evaluation: name of the evaluation.
      lines: dicts as in metrics.jsonl.
      images: sequence of N uint8 [H, W, 3], of which only those drawn are read.
      labels: int [N].
      predictions: int [N].
      confidences: probability of the predicted class [N].
      classes: names of the classes.
      attention: class_attention [M, h, w] of `attended`. None without a class token.
      attended: uint8 [M, H, W, 3]; not read without `attention`.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    confidences = np.asarray(confidences, np.float32)
    wrong = predictions != labels
    attended = () if attention is None else attended[:PAIRS]
    most = COLUMNS * (ROWS if len(attended) else ROWS_ALONE)
    order = mistakes_first(labels, predictions, confidences)[:most]

    loss, accuracy = style.series_of(lines, 'loss'), style.series_of(lines, 'accuracy')
    legend = KEY * num_rows(max(len(loss), len(accuracy)), 2)
    grid = TITLE + KEYS + legend + CURVES + TICKS + SPACE
    tile, pair = grid_tile(images), pair_tile(attended)
    tops = row_tops(grid + HEADING, tile[1], len(order), int(wrong[order].sum()))
    maps = tops[-1] + SPACE
    height = maps + HEADING + pair[1] + MARGIN if len(attended) else maps

    fig = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor='white')
    write_text(fig, MARGIN, MARGIN, title, size=14, weight='bold')
    last = max([1, *(line['step'] for line in lines)])
    draw_curves(fig, MARGIN, legend, 'Loss', loss, last)
    draw_curves(fig, WIDTH / 2 + GAP, legend, 'Accuracy', accuracy, last)
    draw_examples(
        fig, grid, tops, tile, order, images, labels, predictions, confidences, classes,
        f'Evaluation {evaluation}: {wrong.sum():,} of {len(labels):,} images wrong',
    )
    if len(attended):
        draw_attention(fig, maps, pair, attended, attention)
    style.save(path, fig, DPI)


def row_tops(top: float, height: float, count: int, mistakes: int) -> list[float]:
    """Top of each row of the grid from `top` on, and that of what is below it.

    `count` images have this height; the captions of the first ones, the mistakes, have two lines.
    """
    longer = num_rows(mistakes, COLUMNS)
    return [
        top + y * (height + CAPTION) + min(y, longer) * CAPTION_LINE
        for y in range(num_rows(count, COLUMNS) + 1)
    ]


def draw_curves(
    fig: Figure, left: float, legend_height: float, metric: str,
    series: Mapping[str, tuple[Sequence[int], Sequence[float]]], last: int,
) -> None:  # fmt: skip
    """Draws the series of a metric over steps up to `last`, below their legend."""
    ax = add_axes(fig, left + 0.45, TITLE + KEYS + legend_height, WIDTH / 2 - MARGIN - 0.65, CURVES)
    style.draw_series(ax, series, '.2%' if metric == 'Accuracy' else '#.3g')
    ax.set_xlim(0, 1.02 * last)
    ax.set_xlabel('step', size=8, color=style.GREY)
    ax.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=(1, 2, 2.5, 5, 10), integer=True))
    ax.xaxis.set_major_formatter('{x:,.0f}')
    if metric == 'Accuracy':
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, -0.02), min(high, 1.02))
        ax.yaxis.set_major_formatter(ticker.PercentFormatter(1))
    elif style.spans_decades([line.get_ydata() for line in ax.lines]):
        metric += ' (log scale)'
        ax.set_yscale('log')
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
        ax.yaxis.set_major_formatter('{x:g}')
        ax.yaxis.set_minor_locator(ticker.NullLocator())
    write_heading(fig, left, TITLE, metric)
    if ax.lines:
        legend = ax.legend(
            loc='upper left', bbox_to_anchor=to_fractions(fig, left, TITLE + 0.27), borderaxespad=0,
            bbox_transform=fig.transFigure, ncols=2, fontsize=8, frameon=False, borderpad=0,
            labelspacing=0.35, columnspacing=1.5,
        )
        style.disable_math(legend)


def draw_examples(
    fig: Figure, top: float, tops: Sequence[float], tile: tuple[float, float], order: np.ndarray,
    images: Images, labels: np.ndarray, predictions: np.ndarray, confidences: np.ndarray,
    classes: Sequence[str] | None, heading: str,
) -> None:  # fmt: skip
    """Draws a grid of the examples of an evaluation with the indices `order`, and its heading.

    `top` is that of the heading, `tops` are those of the rows, `tile` is (width, height) of an
    image; the others are those of `draw`.
    """
    write_heading(
        fig, MARGIN, top, heading,
        'Most confident mistakes first. Below each image: the predicted class, its probability '
        'and, where wrong, \N{NOT EQUAL TO} the true class.',
    )
    tail = style.distinct_tail(classes)
    for i, n in enumerate(order):
        y, x = divmod(i, COLUMNS)
        box = (MARGIN + x * (tile[0] + GAP), tops[y], *tile)
        predicted = classify.class_name(classes, predictions[n])
        wrong = predictions[n] != labels[n]
        true = classify.class_name(classes, labels[n]) if wrong else None
        draw_example(fig, box, images[n], predicted, confidences[n], true, tail)


def draw_example(
    fig: Figure,
    box: tuple[float, float, float, float],
    image: np.ndarray,
    predicted: str,
    confidence: float,
    true: str | None,
    tail: int,
) -> None:
    """Draws an image with its prediction.

    Args:
      fig: the page.
      box: (left, top, width, height) of the image.
      image: uint8 [H, W, 3].
      predicted: name of the predicted class.
      confidence: its probability.
      true: name of the true class; None if it is the predicted one.
      tail: number of characters to keep at the end of long names, see `style.distinct_tail`.
    """
    color, frame = (style.RIGHT, 0.8) if true is None else (style.WRONG, 2)
    draw_image(fig, box, image, color=color, linewidth=frame)
    left, top, width, height = box
    share = '<1%' if confidence < 0.01 else f'{confidence:.0%}'
    room = width - style.text_width(share + ' ', 7)
    line = top + height + 0.13
    write_text(fig, left, line, predicted, room=room, size=7, color=color, tail=tail)
    write_text(fig, left + width, line, share, size=7, color=color, ha='right')
    if true is not None:
        text = f'\N{NOT EQUAL TO} {true}'
        line += CAPTION_LINE
        write_text(fig, left, line, text, room=width, size=7, color=color, tail=tail)


def draw_attention(
    fig: Figure,
    top: float,
    tile: tuple[float, float],
    attended: np.ndarray,
    attention: np.ndarray,
) -> None:
    """Draws pairs of an image and its attention map over the image in grey.

    `tile` is (width, height) of an image; `attended` and `attention` are those of `draw`.
    """
    write_heading(
        fig, MARGIN, top, 'Where the class token looks',
        'Its attention in the last block, mean over heads, one square a patch: from none (dark) '
        "to each map's own maximum (bright).",
    )
    width, height = tile
    for i, image in enumerate(attended):
        left = MARGIN + i * 2 * (width + GAP)
        draw_image(fig, (left, top + HEADING, *tile), image)
        grey = np.repeat((image @ LUMA)[..., None], 3, axis=-1).astype(np.uint8)
        ax = draw_image(fig, (left + width + PAIR_GAP, top + HEADING, *tile), grey)
        h, w = grey.shape[:2]
        ax.imshow(
            attention[i], cmap='inferno', vmin=0, alpha=0.65, interpolation='nearest',
            extent=(-0.5, w - 0.5, h - 0.5, -0.5),
        )


def draw_image(
    fig: Figure,
    box: tuple[float, float, float, float],
    image: np.ndarray,
    color: str = '#999999',
    linewidth: float = 0.6,
) -> Axes:
    """Draws an image [H, W, 3] in framed axes, without interpolation if it is small."""
    ax = add_axes(fig, *box)
    small = image.shape[0] < box[3] * DPI / 2 and image.shape[1] < box[2] * DPI / 2
    ax.imshow(image, interpolation='nearest' if small else 'antialiased')
    ax.set_anchor('SW')
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set(color=color, linewidth=linewidth)
    return ax


def num_rows(count: int, columns: int) -> int:
    """Number of rows for `count` items, the last row perhaps incomplete."""
    return -(-count // columns)


def grid_tile(images: Images) -> tuple[float, float]:
    """(width, height) of an image in the grid."""
    return tile_size(images, (WIDTH - 2 * MARGIN + GAP) / COLUMNS - GAP)


def pair_tile(images: Images) -> tuple[float, float]:
    """(width, height) of an image beside its attention map."""
    return tile_size(images, (WIDTH - 2 * MARGIN + 2 * GAP - PAIR_GAP) / (2 * PAIRS) - GAP)


def tile_size(images: Images, width: float) -> tuple[float, float]:
    """(width, height) of an image of that width, with extreme aspect ratios clipped."""
    h, w = images[0].shape[:2] if len(images) else (1, 1)
    return width, width * min(max(h / w, 0.3), 2)


def to_fractions(fig: Figure, left: float, top: float) -> tuple[float, float]:
    """Converts inches from the upper left corner to fractions from the lower left corner."""
    return left / WIDTH, 1 - top / fig.get_figheight()


def add_axes(fig: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Adds axes at a box in inches."""
    return fig.add_axes(
        (*to_fractions(fig, left, top + height), width / WIDTH, height / fig.get_figheight())
    )


def write_heading(fig: Figure, left: float, top: float, text: str, note: str = '') -> None:
    """Writes the heading of a part and a note on how to read it."""
    write_text(fig, left, top + 0.15, text, size=10.5, weight='bold')
    write_text(fig, left, top + 0.34, note, size=8, color=style.GREY)


def write_text(
    fig: Figure,
    left: float,
    baseline: float,
    text: str,
    *,
    size: float,
    room: float = WIDTH - 2 * MARGIN,
    weight: str = 'normal',
    tail: int = 0,
    **properties: str,
) -> None:
    """Writes a line of text, truncated to `room` inches; `properties` are those of Figure.text."""
    text = style.shorten(text, room, size, weight, tail)
    position = to_fractions(fig, left, baseline)
    fig.text(*position, text, size=size, weight=weight, parse_math=False, **properties)
