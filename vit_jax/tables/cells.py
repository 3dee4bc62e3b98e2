"""Numbers of published tables with the results of runs beside them."""

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from vit_jax.data.readers import vtab
from vit_jax.errors import UserError, choices, shown
from vit_jax.tables import published, typeset
from vit_jax.tables.recipes import Key, Recipe, key_of

SECOND = {  # {row of table 9: its column of table 2}
    'ViT-H/14 (JFT)': 'Ours-JFT (ViT-H/14)', 'ViT-L/16 (JFT)': 'Ours-JFT (ViT-L/16)',
    'ViT-L/16 (I21k)': 'Ours-I21k (ViT-L/16)',
}  # fmt: skip


class Measure(NamedTuple):
    """Result of a run for a cell, in the units of the table."""

    value: float
    run: str
    seed: int | None
    result: dict


def measured(runs: Sequence[tuple[str, dict, dict]]) -> dict[Key, list[Measure]]:
    """{cell: [Measure]} of finished runs, with means over tasks if all of these are measured."""
    cells = {}
    for path, config, result in runs:
        for row in result['expected']:
            if row.get('cell') and row.get('measured') is not None:
                value = row['measured'] / row['scale']
                one = Measure(value, path, config.get('seed'), result)
                cells.setdefault(key_of(row['cell']), []).append(one)
    return cells | means(cells)


def means(cells: Mapping[Key, list[Measure]]) -> dict[Key, list[Measure]]:
    """Cells that are means of others: VTAB's in tables 9 and 2, the average of table 7."""
    found = {}

    def mean_of(parts, *targets):
        if all(parts):
            values = [statistics.mean(m.value for m in part) for part in parts]
            one = Measure(statistics.mean(values), parts[0][0].run, None, parts[0][0].result)
            found.update({target: [one] for target in targets})

    tasks = published.table('vit.table9').columns[1:-1]
    assert len(tasks) == len(vtab.TASKS)
    for row, column in SECOND.items():
        parts = [cells.get(('vit.table9', (row,), task)) for task in tasks]
        mean_of(parts, ('vit.table9', (row,), 'Mean'), ('vit.table2', ('VTAB (19 tasks)',), column))
    seventh = published.table('vit.table7')
    for column in seventh.columns[1:]:
        parts = [cells.get(('vit.table7', (row[0],), column)) for row in seventh.rows[:-1]]
        mean_of(parts, ('vit.table7', ('Average',), column))
    return found


class Cell(NamedTuple):
    """A number of a table and the results beside it."""

    label: tuple  # the row's
    column: str
    text: str  # as published
    value: float
    found: tuple  # Measures
    recipe: Recipe | None

    @property
    def mean(self) -> float | None:
        return statistics.mean(m.value for m in self.found) if self.found else None

    @property
    def deviation(self) -> float | None:
        return statistics.stdev(m.value for m in self.found) if len(self.found) > 1 else None

    @property
    def difference(self) -> float | None:
        return None if self.mean is None else self.mean - self.value

    def beside(self) -> str:
        """The result as text, '98.80 ± 0.10 (3), -0.15'; '' without a run."""
        if self.mean is None:
            return ''
        digits = 4 if self.value < 1.5 else 2
        text = f'{self.mean:.{digits}f}'
        if self.deviation is not None:
            text += f' ± {self.deviation:.{digits}f} ({len(self.found)})'
        return f'{text}, {self.difference:+.{digits}f}'


def grid_of(
    table: published.Table,
    found: Mapping[Key, Sequence[Measure]],
    known: Mapping[Key, Recipe],
) -> list[tuple[tuple, list[Cell | str]]]:
    """[(label, [Cell or text per column])] of a table, with results `found`, recipes `known`.

    Numbers in columns with recipes or runs are Cells, all other entries texts.
    """
    keys = {key[1:] for key in [*known, *found] if key[0] == table.id}
    columns, named = {column for _, column in keys}, {label for label, _ in keys}
    rows = []
    for row in table.rows:
        cells = []
        labels = [row[:n] for n in range(1, len(row))]
        label = next((p for p in labels if p in named), row[:1])
        for column, content in zip(table.columns, row, strict=True):
            text = '' if content is None else str(content)
            number, key = published.number(content), (table.id, label, column)
            if number is None or column not in columns:
                cells.append(text)
            else:
                ones = tuple(found.get(key, ()))
                cells.append(Cell(label, column, text, number.value, ones, known.get(key)))
        rows.append((label, cells))
    return rows


def select_cells(
    table: published.Table, rows: typeset.Rows, row: str | None = None, column: str | None = None
) -> list[Cell]:
    """Cells with a recipe, in the rows and columns that these texts name.

    A text names the labels, cells of labels or columns that are equal to it, or else those that
    contain it; case does not matter. Raises UserError, with the known names, if it names none, or
    if there is no such cell.
    """
    labels = {label: {', '.join(map(str, label)), *map(str, label)} for label, _ in rows}
    chosen_rows = named('--row', row, labels)
    chosen_columns = named('--column', column, {name: {name} for name in table.columns})
    cells = [
        cell for cell in typeset.cells_of(rows)
        if cell.recipe and cell.label in chosen_rows and cell.column in chosen_columns
    ]  # fmt: skip
    if not cells:
        raise UserError('no recipe reproduces these numbers; see python -m vit_jax.tables --list')
    return cells


def named(flag: str, text: str | None, names: Mapping[Any, Collection[str]]) -> list:
    """Keys with a name that equals a text, or else those with one that contains it; None: all."""
    if text is None:
        return list(names)
    same = [key for key, own in names.items() if text.lower() in {n.lower() for n in own}]
    found = same or [
        key for key, own in names.items() if any(text.lower() in n.lower() for n in own)
    ]
    if not found:
        known = [max(own, key=len) for own in names.values()]
        raise UserError(f'{flag} {shown(text)} is in none: {choices(text, map(repr, known))}')
    return found
