"""Published tables beside the results of runs: python -m vit_jax.tables NAME --runs DIR ...

Beside each number that an experiment reproduces (the `cell` of a line of its `expected`), shows the
results of the runs below the folders: mean, deviation, number of seeds and difference. Numbers
without a run stay as they are. Without a name, or with --list, lists the tables.

    python -m vit_jax.tables vit.table5 --runs runs --out tables    # .md, .csv, .tex and .html too
    python -m vit_jax.tables vit.table5 --missing                   # commands of missing runs
    python -m vit_jax.tables vit.table5 --row CIFAR-10 --column ViT-B/16 --run slurm \\
        --launch '--nodes=2 --gpus-per-node=8'                      # starts them by launch.sh

--missing also says what each command costs and what it needs that can't simply be downloaded. A
run that a recipe starts from is started first. Where a recipe's settings are chosen, its command
does the whole selection, see `python -m vit_jax.sweep`. Each run has its own workdir,
runs/EXPERIMENT/ARGUMENT.
"""

import shlex
import subprocess
from collections.abc import Mapping, Sequence

from absl import flags
from ml_collections import ConfigDict
from rich import box
from rich.table import Table as Grid

from vit_jax import cli, config, sweep
from vit_jax.config import selection
from vit_jax.errors import UserError
from vit_jax.io import storage
from vit_jax.io.text import printable
from vit_jax.run import workdir
from vit_jax.tables import costs, published, typeset
from vit_jax.tables.cells import Cell, Measure, grid_of, measured, select_cells
from vit_jax.tables.recipes import EXPERIMENTS, Key, Recipe, in_order, recipes

LAUNCHERS = ('local', 'hosts', 'slurm')  # those with workdirs on a local file system
EFFICIENCY = 0.5  # share of a chip's peak, as in python -m vit_jax.plan


def configs_of(recipe: Recipe) -> list[ConfigDict]:
    """Configs of the runs of a recipe: the development runs of its selection, and the final run."""
    path = str(EXPERIMENTS.parent / recipe.config)
    final = config.load(path, absent=True)
    if not recipe.selects:
        return [final]
    runs = sweep.runs_of_selection(path, recipe.workdir, final.select, [])
    tried = [config.load(run.config, run.overrides, absent=True) for run in runs]
    return [*tried, final] if selection.retrains(final.select) else tried


def print_missing(chosen: Sequence[Recipe], cells: Sequence[Cell], place: costs.Slice) -> None:
    """Prints the command of each recipe below its cells without a run, its cost and its needs."""
    total, unknown = 0.0, 0
    for recipe in chosen:
        configs = configs_of(recipe)
        flops = [costs.training_flops(one) for one in configs]
        if None in flops:
            cost, unknown = 'cost unknown', unknown + 1
        else:
            hours = place.hours(sum(flops), EFFICIENCY)
            cost, total = f'{costs.hours_text(hours * place.chips)} chip-hours', total + hours
        if len(configs) > 1:
            cost = f'{len(configs)} runs, {cost}'
        needs = costs.needs(configs)
        for cell in cells:
            if cell.recipe == recipe and not cell.found:
                print(f'# {", ".join(map(str, cell.label))}; {cell.column}: {cell.text}')
        print(f'# {cost}' + ('; needs ' + ', '.join(needs) if needs else ''))
        print(shlex.join(recipe.words()), flush=True)
    print(
        f'# In all {costs.hours_text(total * place.chips)} chip-hours, {costs.hours_text(total)} '
        f'hours on {place.name} at {EFFICIENCY:.0%} of its peak'
        + (f'; {unknown} commands of unknown cost are not counted' if unknown else '')
    )


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
        cells = select_cells(table, rows, options.row, options.column)
        chosen = in_order((cell.recipe for cell in cells if not cell.found), places)
        if not chosen:
            print('All of these numbers that a recipe reproduces are measured.')
        elif not options.run:
            print_missing(chosen, cells, costs.slice_of(options.slice))
            return 0
        for recipe in chosen:
            words = recipe.words(options.run, launch) + (['--dry-run'] if options.dry_run else [])
            print(shlex.join(words), flush=True)
            status = subprocess.run(words, cwd=EXPERIMENTS.parent, check=False).returncode
            if status:
                return status
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
    flags.DEFINE_bool(
        'missing', False, 'Print the commands for numbers without a result, their costs and needs.'
    )
    flags.DEFINE_string(
        'slice', 'v4:4x4x8', 'With --missing: TPU chips to state costs for, such as v3:16x16.'
    )
    flags.DEFINE_enum('run', None, LAUNCHERS, 'Start these commands with launch.sh, in sequence.')
    flags.DEFINE_string(
        'launch', '', "With --run: options for launch.sh, such as '--nodes=2 --gpus-per-node=8'."
    )
    flags.DEFINE_bool('dry_run', False, 'With --run: only print the commands of launch.sh.')
    flags.DEFINE_string('row', None, 'With --missing, --run: rows that this text names, or is in.')
    flags.DEFINE_string('column', None, 'With --missing, --run: columns that it names, or is in.')
    cli.run(main)
