"""Draws the summary of a run: its curves, its mistakes and the attention of its class token.

Uses matplotlib's objects, never pyplot, so it neither reads nor changes global state. Lengths are
in inches from the upper left corner of the page, font sizes in points.
"""

import io
import math
import re

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from vit_jax.evaluators import classify
from vit_jax.io import storage
from vit_jax.io.text import printable

WIDTH, MARGIN, DPI = 9.0, 0.35, 200
TITLE, HEADING, KEYS, KEY, CURVES, TICKS, SPACE = 0.55, 0.5, 0.36, 0.17, 1.8, 0.45, 0.25  # heights
COLUMNS, ROWS, ROWS_ALONE = 9, 4, 6  # of the grid; ROWS_ALONE if there is no attention
GAP, CAPTION, CAPTION_LINE = 0.1, 0.22, 0.12
PAIRS, PAIR_GAP = 4, 0.03  # images beside their attention maps

# Okabe and Ito's palette, distinct to colour-blind readers (jfly.uni-koeln.de/color).
RIGHT, WRONG, GREY = '#0072B2', '#D55E00', '#666666'
LINES = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#000000')
MARKERS = 'osD^vPX'  # one more than colours, so that beyond six names the pairs differ
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def mistakes_first(labels, predictions, confidences):
    """Indices [N] of examples: mistakes, most confident first, then the others in order."""
    wrong = predictions != labels
    mistakes = np.flatnonzero(wrong)
    by_confidence = np.argsort(-confidences[mistakes], kind='stable')
    return np.concatenate([mistakes[by_confidence], np.flatnonzero(~wrong)])


def history(lines, metric):
    """{name: (steps, values)} of a metric: '' is training, other names are evaluations.

    Non-finite values are skipped.
    """
    series = {}
    for line in lines:
        for key, value in line.items():
            name, _, last = key.rpartition('/')
            if last == metric and isinstance(value, (int, float)) and math.isfinite(value):
                steps, values = series.setdefault(name, ([], []))
                steps.append(line['step'])
                values.append(value)
    return series


def draw(
    path,
    *,
    title,
    evaluation,
    lines,
    images,
    labels,
    predictions,
    confidences,
    classes,
    attention,
    attended,
):
    """Writes a PNG of a run's loss and accuracy, the images of an evaluation and its attention.

    Equal arguments give equal bytes; the file is written atomically.

    Args:
      lines: dicts as in metrics.jsonl.
      images: sequence of N uint8 [H, W, 3], of which only those shown are read.
      labels, predictions: int [N].
      confidences: probability of the predicted class [N].
      classes: names of the classes.
      attention: class_attention [M, h, w] of `attended`. None without a class token.
      attended: uint8 [M, H, W, 3].
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    confidences = np.asarray(confidences, np.float32)
    wrong = predictions != labels
    attended = () if attention is None else attended[:PAIRS]
    most = COLUMNS * (ROWS if len(attended) else ROWS_ALONE)
    order = mistakes_first(labels, predictions, confidences)[:most]

    loss, accuracy = history(lines, 'loss'), history(lines, 'accuracy')
    keys = KEY * rows(max(len(loss), len(accuracy)), 2)
    grid = TITLE + KEYS + keys + CURVES + TICKS + SPACE
    tile, pair = grid_tile(images), pair_tile(attended)
    mistakes = rows(wrong[order].sum(), COLUMNS)  # rows with one more line of caption
    tops = [
        grid + HEADING + y * (tile[1] + CAPTION) + min(y, mistakes) * CAPTION_LINE
        for y in range(rows(len(order), COLUMNS) + 1)
    ]
    maps = tops[-1] + SPACE
    height = maps + HEADING + pair[1] + MARGIN if len(attended) else maps

    fig = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor='white')
    write(fig, MARGIN, MARGIN, title, size=14, weight='bold')
    last = max([1, *(line['step'] for line in lines)])
    draw_curves(fig, MARGIN, keys, 'Loss', loss, last)
    draw_curves(fig, WIDTH / 2 + GAP, keys, 'Accuracy', accuracy, last)
    heading(
        fig, MARGIN, grid,
        f'Evaluation {evaluation}: {wrong.sum():,} of {len(labels):,} images wrong',
        'Most confident mistakes first. Below each image: the predicted class, its probability '
        'and, where wrong, \N{NOT EQUAL TO} the true class.',
    )
    tail = tail_of(classes)
    for i, n in enumerate(order):
        y, x = divmod(i, COLUMNS)
        box = (MARGIN + x * (tile[0] + GAP), tops[y], *tile)
        predicted = classify.class_name(classes, predictions[n])
        true = classify.class_name(classes, labels[n]) if wrong[n] else None
        draw_example(fig, box, images[n], predicted, confidences[n], true, tail)
    if len(attended):
        draw_attention(fig, maps, pair, attended, attention)

    png = io.BytesIO()
    fig.savefig(png, format='png', dpi=DPI, facecolor='white', metadata={'Software': None})
    storage.write(path, png.getvalue())


def draw_curves(fig, left, keys, metric, series, last):
    """Draws the series of a metric over steps up to `last`, below a legend `keys` inches high."""
    ax = axes(fig, left + 0.45, TITLE + KEYS + keys, WIDTH / 2 - MARGIN - 0.65, CURVES)
    draw_series(ax, series, '.2%' if metric == 'Accuracy' else '#.3g')
    ax.set_xlim(0, 1.02 * last)
    ax.set_xlabel('step', size=8, color=GREY)
    ax.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=(1, 2, 2.5, 5, 10), integer=True))
    ax.xaxis.set_major_formatter('{x:,.0f}')
    if metric == 'Accuracy':
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, -0.02), min(high, 1.02))
        ax.yaxis.set_major_formatter(ticker.PercentFormatter(1))
    elif spans_decades([line.get_ydata() for line in ax.lines]):
        metric += ' (log scale)'
        ax.set_yscale('log')
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
        ax.yaxis.set_major_formatter('{x:g}')
        ax.yaxis.set_minor_locator(ticker.NullLocator())
    heading(fig, left, TITLE, metric)
    if ax.lines:
        legend = ax.legend(
            loc='upper left', bbox_to_anchor=page(fig, left, TITLE + 0.27), borderaxespad=0,
            bbox_transform=fig.transFigure, ncols=2, fontsize=8, frameon=False, borderpad=0,
            labelspacing=0.35, columnspacing=1.5,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)


class Plain(ticker.Formatter):
    """Formats ticks with enough digits to distinguish them and without an offset."""

    def format_ticks(self, values):
        values = np.asarray(values, np.float64)
        gaps = np.diff(np.unique(values))
        gap = float(gaps.min()) if len(gaps) else float(np.abs(values).max(initial=0)) or 1.0
        largest = max(float(np.abs(values).max(initial=0)), gap)
        whole = math.ceil(math.log10(largest)) if 1 < largest < 1e7 else 0
        digits = max(math.ceil(math.log10(largest / gap)) + 1, 4, whole)
        return [
            re.sub(r'e([+-])0*', lambda e: 'e' + e[1].strip('+'), f'{x:.{digits}g}')
            for x in np.where(np.abs(values) < gap / 1000, 0.0, values)
        ]

    def __call__(self, x, pos=None):
        return self.format_ticks([x])[0]


def spans_decades(series):
    """Whether positive values differ so much that small ones need a log scale to be visible."""
    values = np.concatenate([[], *series])
    values = values[np.isfinite(values)]
    return values.size > 0 and values.min() > 0 and values.max() / values.min() > 20


def draw_series(ax, series, form):
    """Draws training as a thin line and evaluations with markers, last values in the legend."""
    ax.grid(color='#E5E5E5', lw=0.6)
    ax.tick_params(labelsize=8, color='#999999')
    ax.spines[['top', 'right']].set_visible(False)
    ax.yaxis.set_major_formatter(Plain())
    if not series:
        ax.text(0.5, 0.5, 'not recorded', transform=ax.transAxes, ha='center', color=GREY)
    if '' in series:
        steps, values = series['']
        marker = '.' if len(steps) == 1 else ''  # a line through one point is invisible
        ax.plot(steps, values, color='#999999', lw=0.8, marker=marker, label='training')
    for i, key in enumerate(key for key in series if key):
        steps, values = series[key]
        label = f'{shorten(key, 1.0, 8)}  {values[-1]:{form}}'
        every = -(-len(steps) // 25)
        ax.plot(
            steps, values, color=LINES[i % len(LINES)], marker=MARKERS[i % len(MARKERS)],
            markevery=((len(steps) - 1) % every, every), lw=1.3, ms=4, label=label,
            clip_on=False, zorder=3,
        )


def draw_example(fig, box, image, predicted, confidence, true, tail):
    """Draws an image with its prediction; `true`, the true class, is None if that is right.

    `tail` is the number of characters to keep at the end of long names, see `tail_of`.
    """
    color, frame = (RIGHT, 0.8) if true is None else (WRONG, 2)
    show(fig, box, image, color=color, linewidth=frame)
    left, top, width, height = box
    style = dict(size=7, color=color, tail=tail)
    share = '<1%' if confidence < 0.01 else f'{confidence:.0%}'
    room = width - text_width(share + ' ', 7)
    line = top + height + 0.13
    write(fig, left, line, predicted, room=room, **style)
    write(fig, left + width, line, share, size=7, color=color, ha='right')
    if true is not None:
        line += CAPTION_LINE
        write(fig, left, line, f'\N{NOT EQUAL TO} {true}', room=width, **style)


def draw_attention(fig, top, tile, attended, attention):
    """Draws pairs of an image and its attention map over the image in grey."""
    heading(
        fig, MARGIN, top, 'Where the class token looks',
        'Its attention in the last block, mean over heads, one square a patch: from none (dark) '
        "to each map's own maximum (bright).",
    )
    width, height = tile
    for i, image in enumerate(attended):
        left = MARGIN + i * 2 * (width + GAP)
        show(fig, (left, top + HEADING, *tile), image)
        grey = np.repeat((image @ LUMA)[..., None], 3, axis=-1).astype(np.uint8)
        ax = show(fig, (left + width + PAIR_GAP, top + HEADING, *tile), grey)
        h, w = grey.shape[:2]
        ax.imshow(
            attention[i], cmap='inferno', vmin=0, alpha=0.65, interpolation='nearest',
            extent=(-0.5, w - 0.5, h - 0.5, -0.5),
        )


def show(fig, box, image, color='#999999', linewidth=0.6):
    """Draws an image [H, W, 3] in framed axes, without interpolation if it is small."""
    ax = axes(fig, *box)
    small = image.shape[0] < box[3] * DPI / 2 and image.shape[1] < box[2] * DPI / 2
    ax.imshow(image, interpolation='nearest' if small else 'antialiased')
    ax.set_anchor('SW')
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set(color=color, linewidth=linewidth)
    return ax


def rows(count, columns):
    """Number of rows for `count` items, the last row perhaps incomplete."""
    return -(-count // columns)


def grid_tile(images):
    """(width, height) of an image in the grid."""
    return fit(images, (WIDTH - 2 * MARGIN + GAP) / COLUMNS - GAP)


def pair_tile(images):
    """(width, height) of an image beside its attention map."""
    return fit(images, (WIDTH - 2 * MARGIN + 2 * GAP - PAIR_GAP) / (2 * PAIRS) - GAP)


def fit(images, width):
    """(width, height) of an image of that width, with extreme aspect ratios clipped."""
    h, w = images[0].shape[:2] if len(images) else (1, 1)
    return width, width * min(max(h / w, 0.3), 2)


def page(fig, left, top):
    """Converts inches from the upper left corner to fractions from the lower left corner."""
    return left / WIDTH, 1 - top / fig.get_figheight()


def axes(fig, left, top, width, height):
    """Adds axes at a box in inches."""
    return fig.add_axes(
        (*page(fig, left, top + height), width / WIDTH, height / fig.get_figheight())
    )


def heading(fig, left, top, text, note=''):
    """Writes the heading of a part and a note on how to read it."""
    write(fig, left, top + 0.15, text, size=10.5, weight='bold')
    write(fig, left, top + 0.34, note, size=8, color=GREY)


def write(
    fig, left, baseline, text, *, size, room=WIDTH - 2 * MARGIN, weight='normal', tail=0, **style
):
    """Writes a line of text, truncated to `room` inches."""
    text = shorten(text, room, size, weight, tail)
    fig.text(
        *page(fig, left, baseline), text, size=size, weight=weight, parse_math=False, **style
    )


def shorten(text, room, size, weight='normal', tail=0):
    """Makes a text one line and truncates it with an ellipsis to `room` inches.

    Keeps its last `tail` characters.
    """
    text = printable(' '.join(str(text).split()))
    if text_width(text, size, weight) <= room:
        return text
    tail = min(tail, len(text) - 1)
    end = '…' + text[len(text) - tail :]
    head = text[: len(text) - tail]
    while head and text_width(head + end, size, weight) > room:
        head = head[:-1]
    return head.rstrip() + end


def tail_of(names):
    """Number of characters to keep at the end of truncated class names to distinguish them.

    0 if the names differ in their first ten characters, or if keeping an end does not help.
    """
    names = [' '.join(str(name).split()) for name in names or ()]
    if len({name[:10] for name in names}) == len(names):
        return 0
    counts = {tail: len({(name[:3], name[-tail:]) for name in names}) for tail in (3, 5, 7)}
    best = max(counts, key=counts.get)
    return best if counts[best] > len({name[:10] for name in names}) else 0


def text_width(text, size, weight='normal'):
    """Width of a line of text in inches."""
    font = FontProperties(size=size, weight=weight)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72
