"""Recipes of the numbers of published tables: experiments, their arguments and their commands."""

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from vit_jax.io import experiment
from vit_jax.run import workdir

EXPERIMENTS = pathlib.Path(__file__).parents[2] / 'experiments'
Key = tuple[str, tuple, str]  # (table, label, column) of a number


class Recipe(NamedTuple):
    """An experiment and its argument."""

    file: str  # experiments/finetune.py
    arg: str
    begins: tuple[str, ...]  # workdirs of the runs that it starts from
    selects: bool  # whether its settings are chosen, see the section `select`

    @property
    def config(self) -> str:
        return f'{self.file}:{self.arg}'

    @property
    def workdir(self) -> str:
        return f'runs/{pathlib.PurePath(self.file).stem}/{workdir.folder_of(self.arg)}'

    def words(self, launcher: str | None = None, options: Sequence[str] = ()) -> list[str]:
        """Words of the command: of launch.sh with `launcher` and its `options`.

        Without a launcher, of vit_jax.main, or of launch.sh on this machine for a selection.
        """
        if launcher is None and not self.selects:
            start = ['python', '-m', 'vit_jax.main', '--config']
        else:
            select = ['--select'] if self.selects else []
            start = ['bash', 'launch.sh', launcher or 'local', *options, *select]
        return [*start, self.config, '--workdir', self.workdir]


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
            select = config.get('select') or {}
            starts = [config.get('init_from')]
            starts += [point.get('init_from') for point in select.get('grid', ())]
            begins = tuple(dict.fromkeys(x for x in starts if x and x.startswith('runs/')))
            found = Recipe(f'experiments/{file.name}', arg, begins, bool(select))
            places[found.workdir] = found
            for row in config.get('expected', ()):
                if 'cell' in row:
                    cells.setdefault(key_of(row['cell']), found)
    return cells, places


def in_order(chosen: Iterable[Recipe], places: Mapping[str, Recipe]) -> list[Recipe]:
    """Recipes, each once, after those without a result that they start from."""
    found = {}

    def add(recipe):
        for begin in recipe.begins:
            before = places.get(begin)
            if before and not (workdir.located(begin) / 'result.json').exists():
                add(before)
        found[recipe.workdir] = recipe

    for recipe in chosen:
        add(recipe)
    return list(found.values())
