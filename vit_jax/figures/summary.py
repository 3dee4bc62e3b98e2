"""The picture that a run ends with: its curves, its mistakes, where its class token looks.

Drawn through matplotlib's objects, never pyplot, so no global state is read or left behind.
Lengths are inches from the upper left corner of the page, font sizes are points.
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
COLUMNS, ROWS, ROWS_ALONE = 9, 4, 6  # of the grid; ROWS_ALONE where there is no attention
GAP, CAPTION, CAPTION_LINE = 0.1, 0.22, 0.12
PAIRS, PAIR_GAP = 4, 0.03  # images beside their attention maps

# Okabe and Ito's palette, told apart by colour-blind readers (jfly.uni-koeln.de/color).
RIGHT, WRONG, GREY = '#0072B2', '#D55E00', '#666666'
LINES = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#000000')
MARKERS = 'osD^vPX'  # one more than colours: names beyond the sixth differ by the pair
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def mistakes_first(labels, predictions, confidences):
    """Order of examples [N]: mistakes, the most confident first, then the rest as given."""
    wrong = predictions != labels
    mistakes = np.flatnonzero(wrong)
    by_confidence = np.argsort(-confidences[mistakes], kind='stable')
    return np.concatenate([mistakes[by_confidence], np.flatnonzero(~wrong)])


def history(lines, metric):
    """{name: (steps, values)} of a metric; '' is the training, others come before the slash.

    A value that is not finite is left out.
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

    lines: dicts as in metrics.jsonl. images: a sequence of N uint8 [H, W, 3], of which only
    those shown are read; labels and predictions int [N], confidences [N] (probability of the
    predicted class), classes: names. attended uint8 [M, H, W, 3] and their class_attention
    [M, h, w], or None without a class token.
    Equal arguments give equal bytes, and no file is left half written.
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
    mistakes = rows(wrong[order].sum(), COLUMNS)  # their rows have one line of caption more
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
    """The series of a metric over steps up to `last`, below a key `keys` inches high."""
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
    """Numbers in full: as many digits as tell the ticks apart, and no offset beside the axis."""

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
    """Whether positive values differ so much that only a log scale shows the small ones."""
    values = np.concatenate([[], *series])
    values = values[np.isfinite(values)]
    return values.size > 0 and values.min() > 0 and values.max() / values.min() > 20


def draw_series(ax, series, form):
    """Training as a thin line, evaluations marked, their last values in the legend."""
    ax.grid(color='#E5E5E5', lw=0.6)
    ax.tick_params(labelsize=8, color='#999999')
    ax.spines[['top', 'right']].set_visible(False)
    ax.yaxis.set_major_formatter(Plain())
    if not series:
        ax.text(0.5, 0.5, 'not recorded', transform=ax.transAxes, ha='center', color=GREY)
    if '' in series:
        steps, values = series['']
        marker = '.' if len(steps) == 1 else ''  # a line through one point can't be seen
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
    """An image with its prediction; `true` is None where that is right, `tail` that of names."""
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
    """Pairs of an image and its attention map over the image in grey."""
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
    """Framed axes with an image [H, W, 3]: its pixels as they are where they are few."""
    ax = axes(fig, *box)
    small = image.shape[0] < box[3] * DPI / 2 and image.shape[1] < box[2] * DPI / 2
    ax.imshow(image, interpolation='nearest' if small else 'antialiased')
    ax.set_anchor('SW')
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set(color=color, linewidth=linewidth)
    return ax


def rows(count, columns):
    """Rows that a count fills, the last one perhaps in part."""
    return -(-count // columns)


def grid_tile(images):
    """(width, height) of an image of the grid."""
    return fit(images, (WIDTH - 2 * MARGIN + GAP) / COLUMNS - GAP)


def pair_tile(images):
    """(width, height) of an image beside its attention map."""
    return fit(images, (WIDTH - 2 * MARGIN + 2 * GAP - PAIR_GAP) / (2 * PAIRS) - GAP)


def fit(images, width):
    """The width and the height that goes with it; the extremely long are made to fit."""
    h, w = images[0].shape[:2] if len(images) else (1, 1)
    return width, width * min(max(h / w, 0.3), 2)


def page(fig, left, top):
    """Inches from the upper left corner to matplotlib's fractions from the lower left one."""
    return left / WIDTH, 1 - top / fig.get_figheight()


def axes(fig, left, top, width, height):
    """Axes at a box in inches."""
    return fig.add_axes(
        (*page(fig, left, top + height), width / WIDTH, height / fig.get_figheight())
    )


def heading(fig, left, top, text, note=''):
    """The heading of a part and what is to be known to read it."""
    write(fig, left, top + 0.15, text, size=10.5, weight='bold')
    write(fig, left, top + 0.34, note, size=8, color=GREY)


def write(
    fig, left, baseline, text, *, size, room=WIDTH - 2 * MARGIN, weight='normal', tail=0, **style
):
    """A line of text, cut to `room` inches."""
    text = shorten(text, room, size, weight, tail)
    fig.text(
        *page(fig, left, baseline), text, size=size, weight=weight, parse_math=False, **style
    )


def shorten(text, room, size, weight='normal', tail=0):
    """The text in one line, cut with an ellipsis where it is wider than `room` inches.

    Its last `tail` characters stay.
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
    """Characters at the end of class names to leave when they are cut, so that they differ.

    0 where the names differ in their first ten characters, or nothing is gained.
    """
    names = [' '.join(str(name).split()) for name in names or ()]
    if len({name[:10] for name in names}) == len(names):
        return 0
    counts = {tail: len({(name[:3], name[-tail:]) for name in names}) for tail in (3, 5, 7)}
    best = max(counts, key=counts.get)
    return best if counts[best] > len({name[:10] for name in names}) else 0


def text_width(text, size, weight='normal'):
    """Inches that a line takes."""
    font = FontProperties(size=size, weight=weight)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72
