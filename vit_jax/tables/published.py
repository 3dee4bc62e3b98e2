"""Published tables as data, with their sources, for comparison with the results of runs."""

import functools
import importlib.resources
import json
import re
from typing import Any, NamedTuple

from vit_jax.errors import check_choice


class Table(NamedTuple):
    """A published table; the leading cells of a row are its label."""

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
def tables() -> dict[str, Table]:
    """{id: Table} of all tables; their numbers were read in the named sources."""
    file = importlib.resources.files('vit_jax.tables') / 'published.json'
    return {
        t['id']: Table(
            t['id'], t['table'], t['source'], tuple(t['columns']), tuple(map(tuple, t['rows'])),
            t.get('notes', ''),
        )
        for t in json.loads(file.read_text(encoding='utf-8'))
    }  # fmt: skip


def table(name: str) -> Table:
    """The table with that id; raises UserError, with the nearest ids, if there is none."""
    known = tables()
    check_choice('table', name, known)
    return known[name]


def number(cell: Any) -> Number | None:
    """Parses a cell such as 84.15, '99.50±0.06', '83.73%' or '2.5k'; None for words and blanks."""
    if isinstance(cell, bool) or cell is None:
        return None
    if isinstance(cell, (int, float)):
        return Number(float(cell))
    found = re.fullmatch(r'([\d.]+)(?:±([\d.]+))?(%|k)?', cell.strip())
    if not found:
        return None
    factor = 1000 if found[3] == 'k' else 1
    return Number(float(found[1]) * factor, found[2] and float(found[2]) * factor)


def row_of(found: Table, label: str | tuple) -> tuple:
    """The only row that starts with the cells of `label`; raises LookupError otherwise."""
    label = label if isinstance(label, tuple) else (label,)
    rows = [row for row in found.rows if row[: len(label)] == label]
    if len(rows) != 1:
        raise LookupError(f'{len(rows)} rows of {found.id} begin with {label}')
    return rows[0]


def expected(
    name: str,
    label: str | tuple,
    column: str,
    metric: str,
    *,
    scale: float = 0.01,
    tolerance: float = 0.005,
) -> dict[str, Any]:
    """Makes a line of an experiment's `expected` from a cell of a published table.

    Args:
      name: id of the table.
      label: first cell of the row, or a tuple of its first cells.
      column: name of the column.
      metric: metric of the run to compare, such as 'test/accuracy'.
      scale: factor from the units of the table to those of the metric; 0.01 for percent.
      tolerance: largest difference that passes; raised to two published deviations if given.
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
