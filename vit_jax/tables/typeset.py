"""Formats a published table with results beside it: as text, Markdown, CSV, LaTeX or HTML.

Rows are those of tables.grid_of: (label, [Cell or text per column]).
"""

import csv
import html
import io
import re
import statistics
from collections.abc import Sequence
from typing import Any

from rich import box, console
from rich.table import Table as Grid

from vit_jax.io import text as texts
from vit_jax.run import results
from vit_jax.tables.published import Table

Rows = Sequence[tuple[tuple, list[Any]]]  # Any: a Cell or text
COSTS = ('exaflops', 'device_hours', 'tpu_core_days')
RUNS = ('run', 'seed', 'steps', 'images/s', 'exaFLOPs', 'device-hours', 'TPU-core-days')


def cells_of(rows: Rows) -> list[Any]:
    """All Cells of a grid, row by row."""
    return [cell for _, row in rows for cell in row if not isinstance(cell, str)]


def runs_of(rows: Rows) -> list[list[Any]]:
    """Rows of the list of runs of a grid: workdir, seed, steps, images/s and costs."""
    runs = {m.run: m for cell in cells_of(rows) for m in cell.found}
    lines = []
    for path, one in sorted(runs.items()):
        costs = results.costs(one.result)
        lines.append([
            path, one.seed, one.result['steps'], one.result['images_per_s'],
            *(costs.get(name) for name in COSTS),
        ])  # fmt: skip
    return lines


def plain(value: Any) -> str:
    """Formats a cell of the list of runs."""
    if value is None:
        return ''
    return f'{value:,.4g}' if isinstance(value, float) else texts.printable(value)


def head(table: Table) -> str:
    """The line above a table."""
    return f'{table.title}. Published: {table.source}. Below each number: measured here.'


def markdown(table: Table, rows: Rows) -> str:
    """A table in Markdown: published and, below, measured ± deviation (seeds), difference."""

    def text(cell):
        return cell if isinstance(cell, str) else f'{cell.text}<br>{cell.beside()}'.rstrip()

    rule = '|---' * len(table.columns) + '|'
    lines = [head(table), '', '| ' + ' | '.join(table.columns) + ' |', rule]
    lines += ['| ' + ' | '.join(map(text, row)) + ' |' for _, row in rows]
    runs = runs_of(rows)
    if runs:
        lines += ['', '| ' + ' | '.join(RUNS) + ' |', '|---' * len(RUNS) + '|']
        cells = [[re.sub(r'([|<\\`*_\[])', r'\\\1', plain(value)) for value in run] for run in runs]
        lines += ['| ' + ' | '.join(run) + ' |' for run in cells]
    return '\n'.join(lines) + '\n'


def comma_separated(table: Table, rows: Rows) -> str:
    """CSV with a line per number: published, measured, deviation, difference, seeds, costs ..."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator='\n')
    write.writerow([
        'table', 'row', 'column', 'published', 'measured', 'deviation', 'difference', 'seeds',
        *COSTS, 'images_per_s', 'runs', 'recipe',
    ])  # fmt: skip
    for cell in cells_of(rows):
        costs = [results.costs(m.result) for m in cell.found]
        sums = [sum(c[n] for c in costs if n in c) if costs else '' for n in COSTS]
        rates = [m.result['images_per_s'] for m in cell.found if m.result['images_per_s']]
        write.writerow([
            table.id, ', '.join(map(str, cell.label)), cell.column, cell.text, cell.mean,
            cell.deviation, cell.difference, len(cell.found), *sums,
            statistics.median(rates) if rates else '',
            texts.cell(' '.join(m.run for m in cell.found)),
            cell.recipe.config if cell.recipe else '',
        ])  # fmt: skip
    return out.getvalue()


def latex(table: Table, rows: Rows) -> str:
    """A LaTeX tabular; results follow the published numbers after a slash."""

    def text(cell):
        words = cell if isinstance(cell, str) else f'{cell.text} / {cell.beside()}'.rstrip(' /')
        words = re.sub(r'([&%$#_{}])', r'\\\1', words).replace('^', r'\^{}')
        return words.replace('±', r'$\pm$')

    lines = [r'\begin{tabular}{' + 'l' + 'r' * (len(table.columns) - 1) + '}', r'\hline']
    lines += [' & '.join(map(text, table.columns)) + r' \\', r'\hline']
    lines += [' & '.join(map(text, row)) + r' \\' for _, row in rows]
    return f'% {head(table)}\n' + '\n'.join([*lines, r'\hline', r'\end{tabular}']) + '\n'


STYLE = (
    'body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}'
    'td,th{border-bottom:1px solid #ccc;padding:.3em .8em;text-align:right;white-space:nowrap}'
    'td:first-child,th:first-child{text-align:left}small{color:#0072B2;display:block}'
)


def web(table: Table, rows: Rows) -> str:
    """An HTML page."""

    def text(cell):
        if isinstance(cell, str):
            return html.escape(cell)
        return f'{html.escape(cell.text)}<small>{html.escape(cell.beside())}</small>'

    def lines(cells, tag='td'):
        return '<tr>' + ''.join(f'<{tag}>{cell}</{tag}>' for cell in cells) + '</tr>'

    body = [lines(map(html.escape, table.columns), 'th'), *(lines(map(text, r)) for _, r in rows)]
    runs = runs_of(rows)
    below = [lines(RUNS, 'th'), *(lines(html.escape(plain(v)) for v in run) for run in runs)]
    return (
        f'<!doctype html><meta charset=utf-8><title>{html.escape(table.id)}</title>'
        f'<style>{STYLE}</style><p>{html.escape(head(table))}</p>'
        f'<table>{"".join(body)}</table>'
        + (f'<p>Runs</p><table>{"".join(below)}</table>' if runs else '') + '\n'
    )  # fmt: skip


FORMATS = {'md': markdown, 'csv': comma_separated, 'tex': latex, 'html': web}


def print_table(table: Table, rows: Rows) -> None:
    """Prints a table."""
    grid = Grid(*table.columns, box=box.SIMPLE_HEAD, title=head(table), title_justify='left')
    for _, row in rows:
        texts = (c if isinstance(c, str) else f'{c.text}\n{c.beside()}'.rstrip() for c in row)
        grid.add_row(*texts)
    print_grid(grid, 200)


def print_grid(grid: Grid, width: int) -> None:
    """Prints a grid as wide as the terminal, or `width` characters wide if there is none."""
    out = console.Console(highlight=False, emoji=False, markup=False)
    if not out.is_terminal:
        out = console.Console(highlight=False, emoji=False, markup=False, width=width)
    out.print(grid)
