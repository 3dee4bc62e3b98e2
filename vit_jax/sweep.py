"""Lists the runs of a sweep, and chooses the best one.

    python -m vit_jax.sweep --config FILE --workdir DIR KEY=VALUE,VALUE ...
    python -m vit_jax.sweep select --config FILE --workdir DIR [KEY=VALUE,VALUE ...]
    python -m vit_jax.sweep best --config FILE --workdir DIR [KEY=VALUE,VALUE ...]

A sweep has a run for each combination of the values, in DIR/KEY=VALUE,KEY=VALUE; the last key
varies fastest. Prints a table with the state and the results of each run. `bash launch.sh COMMAND
--sweep ...` starts the runs, which it reads from --plan; --plan checks the config of each.

`select` lists the development runs of the experiment's section `select`, in DIR/select, one for
each point of its grid or for each combination. `best` chooses the best of them by the metric of the
section, and says what is left to do: the final run, in DIR, with the settings of the chosen point.
When that has finished, `best` adds to its result.json the key `selection`: the metric, the
development results and the chosen point. `bash launch.sh COMMAND --select` does all of it.
"""

import hashlib
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from vit_jax import cli, config
from vit_jax.config import selection
from vit_jax.errors import UserError
from vit_jax.io import experiment
from vit_jax.io.text import aligned, number, printable
from vit_jax.run import changes, choice, history, report, workdir

Pairs = Sequence[tuple[str, str]]  # of a dotted key and the text of its value
ACTIONS = ('select', 'best')
LONGEST = 200  # bytes of a folder's name; file systems take 255


class Run(NamedTuple):
    """A run of a sweep or of a selection."""

    point: dict[str, Any]  # its settings by dotted key
    config: str  # FILE or FILE:ARG
    workdir: str
    overrides: Pairs  # beside those of the command line

    def line(self, state: str) -> str:
        """State, workdir, config and flags, separated by tabs."""
        settings = (f'--config.{key}={text}' for key, text in self.overrides)
        return '\t'.join([state, self.workdir, self.config, *settings])


def split(text: str) -> list[str]:
    """Splits a text at commas outside of brackets: ['(2, 4)', 'a'] for '(2, 4),a'."""
    parts, depth = [''], 0
    for character in text:
        depth += (character in '([{') - (character in ')]}')
        if character == ',' and depth <= 0:
            parts.append('')
        else:
            parts[-1] += character
    return parts


def combinations(words: Sequence[str]) -> list[tuple[tuple[str, str], ...]]:
    """[((key, text), ...), ...] for words KEY=VALUE,VALUE; the last key varies fastest."""
    axes = {}
    for word in words:
        key, _, text = word.partition('=')
        values = split(text)
        if not key or '' in values or re.search(r'[\t\n]', word):
            raise UserError(f'{word!r} is not of the form KEY=VALUE,VALUE')
        if key in axes:
            raise UserError(f'{key} is swept twice; give its values as one list')
        if len(set(values)) < len(values):
            raise UserError(f'{word} has a value twice')
        axes[key] = values
    if not axes:
        raise UserError('no key to sweep; give KEY=VALUE,VALUE')
    pairs = ([(key, value) for value in values] for key, values in axes.items())
    return list(itertools.product(*pairs))


def folder(combination: Pairs) -> str:
    """Name of a run's workdir, valid in any file system and object store; a long one is cut."""
    name = ','.join(key + '=' + re.sub(r'[^\w.+-]+', '_', value) for key, value in combination)
    if len(name.encode()) <= LONGEST:
        return name
    digest = hashlib.sha256(repr(combination).encode()).hexdigest()[:12]
    return f'{name[: LONGEST // 4]}...{digest}'


def text_of(value: Any) -> str:
    """Text that `config.parse_value` reads as the value."""
    return value if isinstance(value, str) and config.parse_value(value) == value else repr(value)


def pairs_of(point: Mapping[str, Any]) -> Pairs:
    """The settings of a point as overrides of a config."""
    return tuple((key, text_of(value)) for key, value in point.items())


def runs_of_sweep(path: str, root: str, combinations: Sequence[Pairs]) -> list[Run]:
    """Runs below the folder `root` of an experiment with each combination."""
    return [Run(dict(pairs), path, f'{root}/{folder(pairs)}', pairs) for pairs in combinations]


def runs_of_selection(
    path: str, root: str, select: ConfigDict, combinations: Sequence[Pairs]
) -> list[Run]:
    """Development runs of an experiment whose final run is in the folder `root`.

    They have the points of `combinations`, or else those of the grid of the section `select`. The
    point of another argument is a run of its own, in the folder beside `root` that `tables` gives
    it.
    """
    points = [
        {key: config.parse_value(text) for key, text in pairs} for pairs in combinations
    ] or select.grid
    if not points:
        raise UserError('config select.grid is empty; give it, or --sweep KEY=VALUE,VALUE')
    runs = []
    for point in points:
        if 'arg' not in point:
            pairs = pairs_of(point)
            overrides = (('select.development', 'true'), *pairs)
            runs.append(Run(point, path, f'{root}/select/{folder(pairs)}', overrides))
            continue
        if len(point) > 1 or selection.retrains(select):
            raise UserError(
                f'config select.grid has the point {point}: an argument of the experiment file is '
                'the only key of a point, and goes with neither select.split nor select.evals'
            )
        place = f'{root.rpartition("/")[0] or "."}/{workdir.folder_of(point["arg"])}'
        if place == root:
            raise UserError(f'config select.grid has {point["arg"]}, whose workdir is that of all')
        runs.append(Run(point, f'{experiment.split(path)[0]}:{point["arg"]}', place, ()))
    return runs


def state_of(path: epath.Path, settings: ConfigDict) -> tuple[str, dict | None]:
    """(state in words, result.json or None) of the run with these settings in `path`."""
    saved = workdir.read_json(path / 'config.json')
    result = workdir.read_result(path)
    if saved is None:
        return 'not started', None
    differing = changes.differences(saved, settings.to_dict(), config.may_change)
    if any(change.matters for change in differing):
        return 'another config', None
    if result is not None:
        return choice.FINISHED, result
    lines = history.read_lines(path)
    state = f'step {max((x["step"] for x in lines), default=0):,}'
    diverged = any(lines and lines[-1].get(key, 0) is None for key in report.CHECKED)
    return f'{state}, {choice.NOT_FINITE}' if diverged else state, None


def table(rows: Sequence[tuple[Mapping[str, Any], str, dict | None]]) -> str:
    """Formats a table: values, state and metrics of each (point, state, result)."""
    keys = list(dict.fromkeys(key for point, *_ in rows for key in point))
    found = [result['metrics'] if result else {} for *_, result in rows]
    names = list(dict.fromkeys(k for metrics in found for k in metrics if '/' in k))
    cells = [(*keys, 'state', *names)]
    for (point, state, _), metrics in zip(rows, found, strict=True):
        values = (number(metrics[k]) if k in metrics else '' for k in names)
        cells.append((*(str(point.get(key, '')) for key in keys), state, *values))
    return aligned(cells)


def best(
    path: str, root: str, overrides: Pairs, runs: Sequence[Run],
    rows: Sequence[tuple[Mapping[str, Any], str, dict | None]], *, skip_unfinished: bool = False,
) -> tuple[Run, str, dict[str, Any]]:  # fmt: skip
    """Chooses the best of an experiment's runs: (final run, its state, record of the selection).

    If the final run has finished, its result.json gets the record. Where development runs are as
    the final run, the best of them is copied to its folder, `root`.

    Args:
      path: the experiment, FILE or FILE:ARG.
      root: workdir of the final run.
      overrides: settings of all runs.
      runs: the development runs.
      rows: (point, state, result) of each, as in `table`.
      skip_unfinished: whether to choose although runs have neither finished nor diverged.
    """
    trial = config.load(path, [*overrides, ('select.development', 'true')])
    outcomes = [
        choice.Outcome(point, run.workdir, state, result and result['metrics'])
        for run, (point, state, result) in zip(runs, rows, strict=True)
    ]
    metric = trial.select.metric
    record = choice.record(
        metric, config.metrics(trial.evals)[metric], outcomes, skip_unfinished=skip_unfinished
    )
    run = next(run for run in runs if run.point == record['chosen'])
    pairs = () if 'arg' in run.point else pairs_of(run.point)
    plain = config.load(path, [*overrides, *pairs])
    settings = config.load(run.config, [*overrides, *pairs])
    settings.expected, settings.select = plain.expected, plain.select
    place = workdir.located(root)
    state, _ = state_of(place, settings)
    if state == 'another config':
        raise UserError(
            f'{root} has a run with other settings than the chosen ones; name another --workdir'
        )
    if state != choice.FINISHED and not selection.retrains(plain.select):
        choice.copy_run(workdir.located(run.workdir), place, settings, config.better(settings))
        state = choice.FINISHED
    if state == choice.FINISHED:
        choice.add_record(place, record)
    return Run(run.point, run.config, root, pairs), state, record


def chosen_text(final: Run, state: str, record: Mapping[str, Any]) -> str:
    """A line on the chosen point."""
    named = ', '.join(f'{key}={value}' for key, value in final.point.items())
    return f'Best by {record["metric"]}: {named}. Final run: {final.workdir} ({state})'


def main(argv: Sequence[str], overrides: Pairs) -> None:
    """Runs the command."""
    action = argv[1] if argv[1:2] and argv[1] in ACTIONS else None
    words = argv[2:] if action else argv[1:]
    pairs = combinations(words) if words or not action else []
    if action:
        select = config.load(CONFIG.value, overrides).select
        if not select:
            raise UserError(
                f'{CONFIG.value} has no section select, which says how to choose; give '
                '--config.select.metric=METRIC, and --sweep KEY=VALUE,VALUE'
            )
        runs = runs_of_selection(CONFIG.value, WORKDIR.value, select, pairs)
    else:
        runs = runs_of_sweep(CONFIG.value, WORKDIR.value, pairs)
    names = [run.workdir for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f'two runs would share a folder; their names: {", ".join(names)}')
    rows = []
    for run in runs:
        settings = config.load(run.config, [*overrides, *run.overrides])
        rows.append((run.point, *state_of(workdir.located(run.workdir), settings)))
    if action == 'best':
        final, state, record = best(
            CONFIG.value, WORKDIR.value, overrides, runs, rows, skip_unfinished=SKIP.value
        )
        for row in record['results']:
            if row['value'] is None:
                print(f'# {printable(row["run"])} ({row["state"]}) is not chosen', file=sys.stderr)
        text = f'{table(rows)}\n{chosen_text(final, state, record)}'
        text = final.line(state) if PLAN.value else text
    elif PLAN.value:
        text = '\n'.join(run.line(row[1]) for run, row in zip(runs, rows, strict=True))
    else:
        text = table(rows)
    print(printable(text, keep='\n\t'))


if __name__ == '__main__':
    CONFIG = flags.DEFINE_string(
        'config', None, 'Experiment file, as for vit_jax.main. --config.KEY=VALUE sets all runs.',
        required=True,
    )  # fmt: skip
    WORKDIR = flags.DEFINE_string(
        'workdir', None, 'Folder of the sweep or of the final run, local or on gs://.',
        required=True,
    )  # fmt: skip
    PLAN = flags.DEFINE_bool(
        'plan', False, 'Print a line per run instead: state, workdir, config and flags, separated '
        'by tabs. With best: that of the final run.',
    )  # fmt: skip
    SKIP = flags.DEFINE_bool(
        'skip_unfinished', False, 'With best: choose although development runs are unfinished.'
    )
    cli.run(main, 'config')
