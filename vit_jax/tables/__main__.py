"""Published tables beside the results of runs: python -m vit_jax.tables NAME --runs DIR ...

Beside each number that an experiment reproduces (the `cell` of a line of its `expected`), shows the
results of the runs below the folders: mean, deviation, number of seeds and difference. Numbers
without a run stay as they are. Without a name, or with --list, lists the tables.

    python -m vit_jax.tables vit.table5 --runs runs --out tables    # .md, .csv, .tex and .html too
    python -m vit_jax.tables vit.table5 --missing                   # commands of missing runs
    python -m vit_jax.tables vit.table5 --row CIFAR-10 --run slurm \\
        --launch '--nodes=2 --gpus-per-node=8'                      # starts them by launch.sh

A run that a recipe starts from is started first. Each run has its own workdir,
runs/EXPERIMENT/ARGUMENT.
"""

import os
import pathlib
import re
import shlex
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from absl import flags
from rich import box
from rich.table import Table as Grid

from vit_jax import cli
from vit_jax.data.readers import vtab
from vit_jax.errors import UserError, choices, shown
from vit_jax.io import experiment, storage
from vit_jax.io.text import printable
from vit_jax.run import workdir
from vit_jax.tables import published, typeset

EXPERIMENTS = pathlib.Path(__file__).parents[2] / 'experiments'
LAUNCHERS = ('local', 'hosts', 'slurm')  # those with workdirs on a local file system
Key = tuple[str, tuple, str]  # (table, label, column) of a number
SECOND = {  # {row of table 9: its column of table 2}
    'ViT-H/14 (JFT)': 'Ours-JFT (ViT-H/14)', 'ViT-L/16 (JFT)': 'Ours-JFT (ViT-L/16)',
    'ViT-L/16 (I21k)': 'Ours-I21k (ViT-L/16)',
}  # fmt: skip


class Recipe(NamedTuple):
    """An experiment and its argument."""

    file: str  # experiments/finetune.py
    arg: str
    begin: str | None  # workdir of the run that it starts from

    @property
    def config(self) -> str:
        return f'{self.file}:{self.arg}'

    @property
    def workdir(self) -> str:
        name = re.sub(r'[^\w.,=+-]+', '_', self.arg)
        return f'runs/{pathlib.PurePath(self.file).stem}/{name}'

    def words(self, launcher: str | None = None, options: Sequence[str] = ()) -> list[str]:
        """Words of the command: vit_jax.main, or launch.sh with `launcher` and its `options`."""
        if launcher is None:
            start = ['python', '-m', 'vit_jax.main', '--config']
        else:
            start = ['bash', 'launch.sh', launcher, *options]
        return [*start, self.config, '--workdir', self.workdir]


class Measure(NamedTuple):
    """Result of a run for a cell, in the units of the table."""

    value: float
    run: str
    seed: int | None
    result: dict


def key_of(cell: Sequence) -> Key:
    """(table, label, column) of a line of `expected`, hashable."""
    name, label, column = cell
    return name, tuple(label), column


def recipes(folder: os.PathLike = EXPERIMENTS) -> tuple[dict[Key, Recipe], dict[str, Recipe]]:
    """({cell: Recipe}, {workdir: Recipe}) of all ARGS of the experiments."""
    cells, places = {}, {}
    for file in sorted(pathlib.Path(folder).glob('*.py')):
        module = experiment.run_file(str(file))
        for arg in getattr(module, 'ARGS', ()):
            config = module.get_config(arg)
            begin = config.get('init_from')
            begin = begin if begin and begin.startswith('runs/') else None
            found = Recipe(f'experiments/{file.name}', arg, begin)
            places[found.workdir] = found
            for row in config.get('expected', ()):
                if 'cell' in row:
                    cells.setdefault(key_of(row['cell']), found)
    return cells, places


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
    """Cells with a recipe, in rows and columns whose names contain these texts.

    Raises UserError, with the known names, if no name contains a text, or if there is no such cell.
    """
    labels = [', '.join(map(str, label)) for label, _ in rows]
    for flag, text, names in ('--row', row, labels), ('--column', column, table.columns):
        if text is not None and not any(text.lower() in name.lower() for name in names):
            raise UserError(f'{flag} {shown(text)} is in none: {choices(text, map(repr, names))}')
    cells = [
        cell for cell in typeset.cells_of(rows)
        if cell.recipe
        and (row or '').lower() in ', '.join(map(str, cell.label)).lower()
        and (column or '').lower() in cell.column.lower()
    ]  # fmt: skip
    if not cells:
        raise UserError('no recipe reproduces these numbers; see python -m vit_jax.tables --list')
    return cells


def missing(cells: Sequence[Cell], places: Mapping[str, Recipe]) -> list[Recipe]:
    """Recipes of cells without a run, each once, after the recipe that it starts from."""
    chosen = {}
    for cell in cells:
        if not cell.found:
            before = places.get(cell.recipe.begin)
            if before and not (workdir.located(before.workdir) / 'result.json').exists():
                chosen[before.workdir] = before
            chosen[cell.recipe.workdir] = cell.recipe
    return list(chosen.values())


def print_list(cells: Mapping[Key, Recipe], found: Mapping[Key, Sequence[Measure]]) -> None:
    """Prints the list of tables with the counts of numbers, of recipes and of results."""
    grid = Grid('table', 'numbers', 'recipes', 'measured', 'title', 'source', box=box.SIMPLE_HEAD)
    for table in published.tables().values():
        numbers = [c for row in table.rows for c in row if published.number(c)]
        counts = [sum(key[0] == table.id for key in keys) for keys in (cells, found)]
        grid.add_row(table.id, str(len(numbers)), *map(str, counts), table.title, table.source)
    typeset.print_grid(grid, 160)


def words_of(text: str) -> list[str]:
    """Splits a text into words as a shell does; raises UserError for an open quote."""
    try:
        return shlex.split(text)
    except ValueError as e:
        raise UserError(f'--launch={text}: {e}') from e


def main(argv: Sequence[str]) -> int:
    options = flags.FLAGS
    cells, places = recipes()
    folders = [*options.runs, *argv[2:]]
    found = measured(workdir.finished(folders))
    if len(argv) < 2 or options.list:
        print_list(cells, found)
        return 0
    table = published.table(argv[1])
    rows = grid_of(table, found, cells)
    launch = words_of(options.launch)
    if launch and not options.run:
        raise UserError('--launch has options of launch.sh for --run, which is not given')
    if options.missing or options.run:
        chosen = missing(select_cells(table, rows, options.row, options.column), places)
        for recipe in chosen:
            words = recipe.words(options.run, launch) + (['--dry-run'] if options.dry_run else [])
            print(shlex.join(words), flush=True)
            if options.run:
                status = subprocess.run(words, cwd=EXPERIMENTS.parent, check=False).returncode
                if status:
                    return status
        if not chosen:
            print('All of these numbers that a recipe reproduces are measured.')
        return 0
    if options.row is not None or options.column is not None:
        raise UserError('--row and --column choose among --missing or --run; give one of these')
    typeset.print_table(table, rows)
    if options.out:
        out = storage.make_folder(workdir.located(options.out))
        for suffix, form in typeset.FORMATS.items():
            storage.write(out / f'{table.id}.{suffix}', form(table, rows).encode())
        print(f'Written: {printable(out / table.id)}.{{{",".join(typeset.FORMATS)}}}')
    return 0


if __name__ == '__main__':
    flags.DEFINE_multi_string(
        'runs', [], 'Folder with finished runs. More folders may follow NAME'
    )
    flags.DEFINE_string('out', None, 'Folder for the table as Markdown, CSV, LaTeX and HTML.')
    flags.DEFINE_bool('list', False, 'List all tables, with counts of numbers and results.')
    flags.DEFINE_bool('missing', False, 'Print the commands for numbers without a result.')
    flags.DEFINE_enum('run', None, LAUNCHERS, 'Start these commands with launch.sh, in sequence.')
    flags.DEFINE_string(
        'launch', '', "With --run: options for launch.sh, such as '--nodes=2 --gpus-per-node=8'."
    )
    flags.DEFINE_bool('dry_run', False, 'With --run: only print the commands of launch.sh.')
    flags.DEFINE_string('row', None, 'With --missing, --run: rows whose label contains this text.')
    flags.DEFINE_string('column', None, 'With --missing, --run: columns that contain this text.')
    cli.run(main)
