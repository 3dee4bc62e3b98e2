"""The workdir of a run: its lock, config and result."""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess

import jax
from etils import epath

from vit_jax.errors import UserError
from vit_jax.io import storage
from vit_jax.io.text import aligned, printable, to_json

# Settings that may differ when a run resumes: they affect neither batches, model nor optimizer.
HARMLESS = (
    'checkpoint', 'evals', 'expected', 'mesh', 'report', 'data.source.data_dir',
    'data.prefetch', 'data.threads', 'data.tolerance', 'data.workers',
)  # fmt: skip


@contextlib.contextmanager
def lock_workdir(workdir):
    """Creates the workdir and locks it; the kernel releases the lock when the process ends.

    Of several processes of a run the first takes the lock; call this after they have joined.
    Object stores (gs://) have no locks: two runs in one workdir are not detected there.
    """
    if not workdir:
        raise UserError('--workdir is empty; name the folder of the run')
    path = located(workdir)
    lock = None
    with explained(path):
        if storage.remote(path):
            storage.check(path)
        else:
            path.mkdir(parents=True, exist_ok=True)
            lock = locked(path) if jax.process_index() == 0 else None
    try:
        with explained(path):
            yield path
    finally:
        if lock is not None:
            os.close(lock)


def located(workdir):
    """The absolute path of a workdir as given by the user; addresses (gs://...) are unchanged.

    Raises UserError for an address of another kind.
    """
    if storage.remote(workdir):
        if not re.match('gs://[^/]', str(workdir)):
            raise UserError(f'{workdir}: name a path of this machine, or gs://BUCKET/PATH')
        storage.set_up()
        return epath.Path(workdir)
    return epath.Path(os.path.abspath(os.path.expanduser(workdir)))


def locked(path):
    """Locks path/.lock and returns its file descriptor; UserError if another process has it."""
    lock = os.open(path / '.lock', os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = printable(os.read(lock, 20).decode(errors='replace')) or 'unknown'
        os.close(lock)
        raise UserError(
            f'workdir {path} is in use by another run (process {pid}); '
            'wait for it, stop it, or name another workdir'
        ) from None
    os.truncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())
    return lock


@contextlib.contextmanager
def explained(path):
    """Turns an OSError about a file below `path` into UserError."""
    try:
        yield
    except OSError as e:
        if e.filename is None or not str(e.filename).startswith(str(path)):
            raise
        raise UserError(
            f'cannot write to workdir {path}: {os.strerror(e.errno)}; '
            'what was saved before is unchanged'
        ) from e


def write_json(path, value):
    """Writes an indented JSON object atomically."""
    storage.write(path, (to_json(value, indent=2) + '\n').encode())


def read_json(path, *needed, of=dict):
    """Reads one of a run's JSON files; None if it is absent.

    Raises UserError if it is damaged, which includes missing any of the keys `needed`.
    """
    data = storage.read(path, MOST_BYTES)
    if data is None:
        return None
    kinds, way_out = FILES.get(path.name, ({}, ANEW))
    try:
        value = json.loads(data)
        if not isinstance(value, of):
            raise ValueError(f'holds {brief(value)}')
        if isinstance(value, list) and not all(isinstance(name, str) for name in value):
            raise ValueError('holds something other than names')
        for key in needed:
            if key not in value:
                raise ValueError(f'has no {key}')
        for key, kind in kinds.items():
            if key in value and not kind(value[key]):
                raise ValueError(f'has {key} {brief(value[key])}')
    except (ValueError, RecursionError) as e:
        raise UserError(f'{path} is damaged ({brief(e)}); {way_out}') from e
    return value


def read_names(path):
    """Reads a list of names from a run's JSON file; None if absent, UserError if damaged."""
    return read_json(path, of=list)


def read_result(path):
    """Reads result.json of a workdir, with all keys in RESULT; None if the run has not finished."""
    return read_json(path / 'result.json', *RESULT)


def brief(value):
    return re.sub(r'\s+', ' ', str(value))[:80]


def is_number(value):
    return type(value) is float or type(value) is int and abs(value) < 2**63


def is_number_or_none(value):
    return value is None or is_number(value)


def is_whole(value):
    return type(value) is int and 0 <= value < 2**63


def is_dict(value):
    return isinstance(value, dict)


def are_metrics(value):
    return is_dict(value) and all(v is None or is_number(v) for v in value.values())


def are_judged(value):
    return isinstance(value, list) and all(map(is_judged, value))


def is_judged(row):
    """Whether a value is a row that `judged` returns."""
    if not is_dict(row) or not row.keys() >= {'metric', 'value', 'tolerance', 'measured', 'pass'}:
        return False
    numbers = [row['value'], row['tolerance'], *(x for x in [row['measured']] if x is not None)]
    cell = row.get('cell')  # of a published table, see config.expectation
    if cell is not None:
        numbers.append(row.get('scale'))
        if not (isinstance(cell, list) and [type(x) for x in cell] == [str, list, str]):
            return False
        if not all(isinstance(x, str) or is_number(x) for x in cell[1]):
            return False
    known = isinstance(row['metric'], str) and row['pass'] in (True, False, None)
    return known and all(map(is_number, numbers)) and row.get('scale', 1) != 0


SECTIONS = ('model', 'data', 'optim', 'objective', 'evals', 'checkpoint', 'report', 'mesh')
RESULT = {
    'metrics': are_metrics, 'steps': is_whole, 'examples_seen': is_whole, 'seconds': is_number,
    'flops_per_image': is_number_or_none, 'device_kind': lambda v: isinstance(v, str),
    'device_count': is_whole, 'expected': are_judged,
}  # fmt: skip
ANEW = "restore it, or remove it: the run's next start writes it anew"
FILES = {  # name: ({key: check of its value}, what to do if the file is damaged)
    'config.json': (
        dict.fromkeys(SECTIONS, is_dict),
        "restore it, or remove it: then the run's next start writes that of its command",
    ),
    'result.json': (
        RESULT | {'versions': is_dict, 'costs': are_metrics},
        "remove it: the run's next start makes it anew",
    ),
}
MOST_BYTES = 2**26  # in such a file
MOST_FOLDERS = 10_000  # that are searched for runs


def runs_below(folder):
    """Yields the workdirs at and below a folder, local or on gs://, sorted by name.

    Skips hidden folders. Raises UserError after MOST_FOLDERS folders that are not runs.
    """
    waiting, others = [folder], 0
    while waiting:
        path = waiting.pop()
        if (path / 'config.json').exists():
            yield path
            continue
        others += 1
        if others > MOST_FOLDERS:
            raise UserError(
                f'{folder} has more than {MOST_FOLDERS:,} folders that are no runs; name a folder '
                'nearer to the runs'
            )
        inner = (p for p in path.iterdir() if not p.name.startswith('.') and p.is_dir())
        waiting += sorted(inner, reverse=True)


def finished(folders):
    """[(workdir, config, result)] of all finished runs below the folders."""
    found = []
    for folder in map(located, folders):
        if not folder.exists():
            raise UserError(f'no folder {folder}')
        for path in runs_below(folder):
            result = read_result(path)
            if result is not None:
                config = read_json(path / 'config.json', 'model', 'data', 'evals')
                found.append((str(path), config, result))
    return found


def settle_config(path, config, begun, *, allow_change):
    """Writes config.json; returns its differences from that of the run's last start.

    Raises UserError, with a table, if the run has checkpoints (`begun`) and the differences would
    change its result, unless `allow_change`.
    """
    before = read_json(path / 'config.json') if begun else None
    changes = [] if before is None else differences(before, config.to_dict())
    if any(meaning for *_, meaning in changes) and not allow_change:
        raise UserError(
            f'the config differs from the one that {path} was begun with:\n{table(changes)}\n'
            'Name another workdir, or give --allow_config_change to go on with the new values.',
            several_lines=True,
        )
    if jax.process_index() == 0:
        write_json(path / 'config.json', config.to_dict())
    return changes


def flat(config, prefix=''):
    """Flattens a nested dict to {'optim.lr': 0.001}, with tuples as lists, as in JSON."""
    items = {}
    for key, value in config.items():
        if isinstance(value, dict):
            items |= flat(value, f'{prefix}{key}.')
        else:
            items[prefix + key] = list(value) if isinstance(value, tuple) else value
    return items


def differences(before, now):
    """[(key, before, now, whether it changes the result)] of two nested dicts; None: absent."""
    before, now = flat(before), flat(now)
    return [
        (key, before.get(key), now.get(key), not harmless(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def harmless(key):
    return any(key == part or key.startswith(part + '.') for part in HARMLESS)


def table(changes, before='before', now='now'):
    """Formats rows of `differences` as a table."""
    rows = [('key', before, now, '')]
    rows += [
        (key, json.dumps(old), json.dumps(new), 'changes the result' if meaning else '')
        for key, old, new, meaning in changes
    ]
    return aligned(rows)


def provenance():
    """Versions, git commit and time, for result.json."""
    names = ('vit_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')
    return {
        'versions': {name: importlib.metadata.version(name) for name in names},
        'git_commit': git_commit(),
        'finished': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    }


def git_commit():
    """The commit of this source tree, with '+' if files differ from it; None outside of git."""
    folder = pathlib.Path(__file__).parents[1]

    def git(*args):
        return subprocess.run(
            ['git', '-C', str(folder), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git('rev-parse', 'HEAD') + ('+' if git('status', '--porcelain', '.') else '')
    except (OSError, subprocess.CalledProcessError):
        return None


def judged(expected, metrics, better):
    """Adds to the rows of `expected` the measured value and whether it passes.

    Args:
      expected: rows with a metric, a value, a tolerance, a source and perhaps the cell of a
        published table.
      metrics: {metric: measured value}.
      better: {metric: 'max' or 'min'}, as declared beside the metrics' definitions. 'min' passes up
        to value + tolerance, 'max' from value - tolerance on, others within both bounds.

    Returns:
      Rows with `measured` and `pass`, both None if not measured.
    """
    rows = []
    for row in expected:
        measured, passed = metrics.get(row['metric']), None
        if measured is not None:
            value, tolerance, which = row['value'], row['tolerance'], better.get(row['metric'])
            low_enough = which == 'max' or measured <= value + tolerance
            passed = low_enough and (which == 'min' or measured >= value - tolerance)
        rows.append({**row, 'measured': measured, 'pass': passed})
    return rows
