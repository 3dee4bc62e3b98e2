"""Writes a self-contained HTML page of tables and pictures about a run or a checkpoint.

A part of a page is (heading, note on how to read it, content). The content is the path of a PNG, or
a list of rows of text, of which the first is the head of a table.
"""

import base64
import html
import os
from collections.abc import Iterable, Sequence
from typing import Any

from vit_jax.io import storage
from vit_jax.io.text import number, printable

Part = tuple[str, str, os.PathLike | Sequence[Sequence[str]]]
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .2rem }
p { margin: .2rem 0 .8rem; color: #555 } img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: .9rem }
td, th { text-align: left; padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid #ddd;
         overflow-wrap: anywhere; vertical-align: top }
th { white-space: nowrap } td + td { font-variant-numeric: tabular-nums }
.bad { color: #b04a00; font-weight: 600 }
@media print { body { max-width: none; margin: 0 } h2 { break-after: avoid }
               img, tr { break-inside: avoid } }
"""
BAD = 'FAIL'  # cells with this text are highlighted


def escaped(text: str) -> str:
    """Escapes text for HTML and makes control characters visible."""
    return html.escape(printable(text))


def format_value(value: Any) -> str:
    """Formats a value of a table: a number as `text.number`, anything else as str."""
    return number(value) if type(value) in (int, float) else str(value)


def picture(path: os.PathLike, alt: str) -> str:
    """An <img> with its PNG embedded; `alt` is its alternative text."""
    data = base64.b64encode(storage.read(path)).decode()
    return f'<img alt="{escaped(alt)}" src="data:image/png;base64,{data}">'


def table(rows: Sequence[Sequence[str]]) -> str:
    """A <table> of rows of text, the first of which is the head."""

    def line(cells, tag):
        html_cells = ''.join(
            f'<{tag}{" class=bad" if cell == BAD else ""}>{escaped(cell)}</{tag}>'
            for cell in cells
        )
        return f'<tr>{html_cells}</tr>'

    head, *body = rows
    return f'<table>{line(head, "th")}{"".join(line(row, "td") for row in body)}</table>'


def document(title: str, subtitle: str, parts: Iterable[Part]) -> str:
    """The HTML of a page with parts (heading, note, content)."""
    lines = [
        '<!doctype html><html lang=en><meta charset=utf-8>',
        '<meta name=viewport content="width=device-width">',
        f'<title>{escaped(title)}</title><style>{STYLE}</style>',
        f'<h1>{escaped(title)}</h1><p>{escaped(subtitle)}</p>',
    ]
    for heading, note, content in parts:
        lines.append(f'<h2>{escaped(heading)}</h2><p>{escaped(note)}</p>')
        is_path = isinstance(content, os.PathLike)
        lines.append(picture(content, f'{heading}. {note}') if is_path else table(content))
    return '\n'.join(lines) + '\n'
