"""Shares a style between all figures: colours, curves, tick labels and shortened names.

Uses matplotlib's objects, never pyplot, so it neither reads nor changes global state.
"""

import functools
import io
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib import font_manager, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ft2font import FT2Font
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.textpath import text_to_path

from vit_jax.io import storage
from vit_jax.io.text import printable

# Okabe and Ito's palette, distinct to colour-blind readers (jfly.uni-koeln.de/color).
RIGHT, WRONG, GREY = '#0072B2', '#D55E00', '#666666'
LINES = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#000000')
MARKERS = 'osD^vPX'  # one more than colours, so that beyond six names the pairs differ


def save(path: os.PathLike, figure: Figure, dpi: int = 150) -> None:
    """Writes a figure as PNG in one step; equal figures give equal bytes."""
    png = io.BytesIO()
    for text in figure.findobj(Text):
        if (drawn := drawable(text.get_text())) != text.get_text():
            text.set_text(drawn)
    figure.savefig(png, format='png', dpi=dpi, facecolor='white', metadata={'Software': None})
    storage.write(path, png.getvalue())


def drawable(text: str) -> str:
    """The text with what the font has no glyph for in words: ':grinning face:', or escaped.

    Symbols, as emoji are, have their name in Unicode.
    """
    if text.isascii():
        return text
    return ''.join(c if c == '\n' or font().get_char_index(ord(c)) else named(c) for c in text)


def named(character: str) -> str:
    """The name of a symbol, or the escape sequence of another character."""
    name = unicodedata.name(character, '') if unicodedata.category(character) == 'So' else ''
    return f':{name.lower()}:' if name else character.encode('unicode_escape').decode()


@functools.cache
def font() -> FT2Font:
    """The font of text in figures."""
    return font_manager.get_font(font_manager.findfont(FontProperties()))


def series_of(lines: Iterable[Mapping], metric: str) -> dict[str, tuple[list[int], list[float]]]:
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


class PlainFormatter(ticker.Formatter):
    """Formats ticks with enough digits to distinguish them and without an offset."""

    def format_ticks(self, values: Sequence[float] | np.ndarray) -> list[str]:
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

    def __call__(self, x: float, pos: int | None = None) -> str:
        return self.format_ticks([x])[0]


def spans_decades(series: Sequence[Sequence[float]]) -> bool:
    """Whether positive values differ so much that small ones need a log scale to be visible."""
    values = np.concatenate([[], *series])
    values = values[np.isfinite(values)]
    return values.size > 0 and values.min() > 0 and values.max() / values.min() > 20


def draw_series(
    ax: Axes, series: Mapping[str, tuple[Sequence[int], Sequence[float]]], format_spec: str
) -> None:
    """Draws training as a thin line and evaluations with markers, last values in the legend.

    `series` is what `series_of` returns; `format_spec` formats the last values.
    """
    ax.grid(color='#E5E5E5', lw=0.6)
    ax.tick_params(labelsize=8, color='#999999')
    ax.spines[['top', 'right']].set_visible(False)
    ax.yaxis.set_major_formatter(PlainFormatter())
    if not series:
        ax.text(0.5, 0.5, 'not recorded', transform=ax.transAxes, ha='center', color=GREY)
    if '' in series:
        steps, values = series['']
        marker = '.' if len(steps) == 1 else ''  # a line through one point is invisible
        ax.plot(steps, values, color='#999999', lw=0.8, marker=marker, label='training')
    for i, key in enumerate(key for key in series if key):
        steps, values = series[key]
        label = f'{shorten(key, 1.0, 8)}  {values[-1]:{format_spec}}'
        every = -(-len(steps) // 25)
        ax.plot(
            steps, values, color=LINES[i % len(LINES)], marker=MARKERS[i % len(MARKERS)],
            markevery=((len(steps) - 1) % every, every), lw=1.3, ms=4, label=label,
            clip_on=False, zorder=3,
        )


def disable_math(legend: Legend) -> None:
    """Shows the names in a legend literally, with their dollar signs."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def shorten(text: str, room: float, size: float, weight: str = 'normal', tail: int = 0) -> str:
    """Makes a text one line that is `drawable`, with an ellipsis where it is above `room` inches.

    Keeps its last `tail` characters.
    """
    text = drawable(printable(' '.join(str(text).split())))
    if text_width(text, size, weight) <= room:
        return text
    tail = min(tail, len(text) - 1)
    end = '…' + text[len(text) - tail :]
    head = text[: len(text) - tail]
    while head and text_width(head + end, size, weight) > room:
        head = head[:-1]
    return head.rstrip() + end


def distinct_tail(names: Sequence[str] | None) -> int:
    """Number of characters to keep at the end of truncated class names to distinguish them.

    0 if the names differ in their first ten characters, or if keeping an end does not help.
    """
    names = [' '.join(str(name).split()) for name in names or ()]
    if len({name[:10] for name in names}) == len(names):
        return 0
    counts = {tail: len({(name[:3], name[-tail:]) for name in names}) for tail in (3, 5, 7)}
    best = max(counts, key=counts.get)
    return best if counts[best] > len({name[:10] for name in names}) else 0


def text_width(text: str, size: float, weight: str = 'normal') -> float:
    """Width of a line of text in inches."""
    font = FontProperties(size=size, weight=weight)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72
