"""Lists runs of a sweep: python -m vit_jax.sweep --config FILE --workdir DIR KEY=VALUE,VALUE ...

A sweep has a run for each combination of the values, in DIR/KEY=VALUE,KEY=VALUE; the last key
varies fastest. Prints a table with the state and the results of each run. `bash launch.sh COMMAND
--sweep ...` starts the runs, which it reads from --plan; --plan checks the config of each.
"""

import itertools
import re
from collections.abc import Sequence

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from vit_jax import cli, config
from vit_jax.errors import UserError
from vit_jax.io.text import aligned, number, printable
from vit_jax.run import changes, history, workdir


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


def folder(combination: Sequence[tuple[str, str]]) -> str:
    """Name of a run's workdir, valid in any file system and object store."""
    return ','.join(key + '=' + re.sub(r'[^\w.+-]+', '_', value) for key, value in combination)


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
        return 'finished', result
    return f'step {max((x["step"] for x in history.read_lines(path)), default=0):,}', None


def main(argv: Sequence[str], overrides: Sequence[tuple[str, str]]) -> None:
    words = combinations(argv[1:])
    names = [folder(combination) for combination in words]
    if len(set(names)) < len(names):
        raise UserError(f'two runs would share a folder; their names: {", ".join(names)}')
    rows = []
    for combination, name in zip(words, names, strict=True):
        path = workdir.located(WORKDIR.value) / name
        settings = config.load(CONFIG.value, [*overrides, *combination])
        state, result = state_of(path, settings)
        if PLAN.value:
            changes = (f'--config.{key}={value}' for key, value in combination)
            print(state, f'{WORKDIR.value}/{name}', *changes, sep='\t')
        rows.append((combination, state, result))
    if not PLAN.value:
        print(printable(table(rows), keep='\n'))


def table(rows: Sequence[tuple[Sequence[tuple[str, str]], str, dict | None]]) -> str:
    """Formats a table: values, state and metrics of each (combination, state, result)."""
    keys = [key for key, _ in rows[0][0]]
    found = [result['metrics'] if result else {} for *_, result in rows]
    names = list(dict.fromkeys(k for metrics in found for k in metrics if '/' in k))
    cells = [(*keys, 'state', *names)]
    for (combination, state, _), metrics in zip(rows, found, strict=True):
        values = (number(metrics[k]) if k in metrics else '' for k in names)
        cells.append((*(value for _, value in combination), state, *values))
    return aligned(cells)


if __name__ == '__main__':
    CONFIG = flags.DEFINE_string(
        'config', None, 'Experiment file, as for vit_jax.main. --config.KEY=VALUE sets all runs.',
        required=True,
    )  # fmt: skip
    WORKDIR = flags.DEFINE_string(
        'workdir', None, 'Folder of the sweep, local or on gs://.', required=True
    )
    PLAN = flags.DEFINE_bool(
        'plan', False, 'Print a line per run instead: state, workdir and flags, separated by tabs.'
    )
    cli.run(main, 'config')
