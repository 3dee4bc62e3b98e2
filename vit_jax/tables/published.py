"""The papers' tables as data: what is published, with its source, beside what a run measures."""

import functools
import importlib.resources
import json
import re
from typing import NamedTuple

from vit_jax.errors import check_choice


class Table(NamedTuple):
    """One published table; a row is named by its leading cells."""

    id: str  # 'vit.table5'
    title: str
    source: str  # 'arXiv:2010.11929 Table 5'
    columns: tuple[str, ...]
    rows: tuple[tuple, ...]
    notes: str = ''


class Number(NamedTuple):
    """A published cell: its value and deviation in the units of the table."""

    value: float
    deviation: float | None = None


@functools.cache
def tables():
    """{id: Table} of all tables that were read in their named source."""
    file = importlib.resources.files('vit_jax.tables') / 'published.json'
    return {
        t['id']: Table(
            t['id'], t['table'], t['source'], tuple(t['columns']), tuple(map(tuple, t['rows'])),
            t.get('notes', ''),
        )
        for t in json.loads(file.read_text(encoding='utf-8'))
    }  # fmt: skip


def table(name):
    """The table of that id; UserError, with the nearest ones, where there is none."""
    known = tables()
    check_choice('table', name, known)
    return known[name]


def number(cell):
    """A cell as a `Number`: 84.15, '99.50±0.06', '83.73%', '2.5k'; None for words and blanks."""
    if isinstance(cell, bool) or cell is None:
        return None
    if isinstance(cell, (int, float)):
        return Number(float(cell))
    found = re.fullmatch(r'([\d.]+)(?:±([\d.]+))?(%|k)?', cell.strip())
    if not found:
        return None
    factor = 1000 if found[3] == 'k' else 1
    return Number(float(found[1]) * factor, found[2] and float(found[2]) * factor)


def row_of(found, label):
    """The one row that begins with the cells of `label`; LookupError otherwise."""
    label = label if isinstance(label, tuple) else (label,)
    rows = [row for row in found.rows if row[: len(label)] == label]
    if len(rows) != 1:
        raise LookupError(f'{len(rows)} rows of {found.id} begin with {label}')
    return rows[0]


def expected(name, label, column, metric, *, scale=0.01, tolerance=0.005):
    """A line for an experiment's `expected`: the cell of table `name` that a run of it is for.

    `label` is the row's first cell, or several; `scale` times the cell is in the metric's units
    (a hundredth: percent). Two published deviations, where there are, are the least tolerance.
    """
    found = table(name)
    cell = number(row_of(found, label)[found.columns.index(column)])
    if cell is None:
        raise LookupError(f'{name} has no number in row {label}, column {column}')
    digits = 6 if scale < 1 else 3
    return dict(
        metric=metric, value=round(cell.value * scale, digits),
        tolerance=max(tolerance, 2 * (cell.deviation or 0) * scale), source=found.source,
        cell=(name, label if isinstance(label, tuple) else (label,), column), scale=scale,
    )  # fmt: skip
