"""The workdir of a run: its lock, config and result."""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from vit_jax.errors import UserError
from vit_jax.io import storage
from vit_jax.io.text import printable, to_json
from vit_jax.run.history import is_number


@contextlib.contextmanager
def lock_workdir(workdir: os.PathLike | str) -> Iterator[epath.Path]:
    """Creates the workdir, locks it and yields its path.

    The kernel releases the lock when the process ends.
    Of several processes of a run the first takes the lock; call this after they have joined.
    Object stores (gs://) have no locks: two runs in one workdir are not detected there.
    """
    if not workdir:
        raise UserError('--workdir is empty; name the folder of the run')
    path = located(workdir)
    lock = None
    with explain_errors(path):
        if storage.is_remote(path):
            storage.check_writable(path)
        else:
            path.mkdir(parents=True, exist_ok=True)
            lock = take_lock(path) if jax.process_index() == 0 else None
    try:
        with explain_errors(path):
            yield path
    finally:
        if lock is not None:
            os.close(lock)


def located(workdir: os.PathLike | str) -> epath.Path:
    """The absolute path of a workdir as given by the user; addresses (gs://...) are unchanged.

    Raises UserError for an address of another kind.
    """
    if storage.is_remote(workdir):
        if not re.match('gs://[^/]', str(workdir)):
            raise UserError(f'{workdir}: name a path of this machine, or gs://BUCKET/PATH')
        storage.set_up()
        return epath.Path(workdir)
    return epath.Path(os.path.abspath(os.path.expanduser(workdir)))


def folder_of(arg: str) -> str:
    """Name of the workdir of an experiment's argument: 'cifar10,b_16' for 'cifar10,b/16'."""
    return re.sub(r'[^\w.,=+-]+', '_', arg)


def take_lock(path: epath.Path) -> int:
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
def explain_errors(path: epath.Path) -> Iterator[None]:
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


def write_json(path: epath.Path, value: Any) -> None:
    """Writes an indented JSON object atomically."""
    storage.write(path, (to_json(value, indent=2) + '\n').encode())


def read_json(path: epath.Path, *needed: str, of: type = dict) -> Any:
    """Reads one of a run's JSON files, a dict or else what `of` says; None if it is absent.

    Raises UserError if it is damaged, which includes missing any of the keys `needed`.
    """
    data = storage.read(path, MOST_BYTES)
    if data is None:
        return None
    checks, remedy = FILES.get(path.name, ({}, ANEW))
    try:
        value = json.loads(data)
        if not isinstance(value, of):
            raise ValueError(f'holds {brief(value)}')
        if isinstance(value, list) and not all(isinstance(name, str) for name in value):
            raise ValueError('holds something other than names')
        for key in needed:
            if key not in value:
                raise ValueError(f'has no {key}')
        for key, is_valid in checks.items():
            if key in value and not is_valid(value[key]):
                raise ValueError(f'has {key} {brief(value[key])}')
    except (ValueError, RecursionError) as e:
        raise UserError(f'{path} is damaged ({brief(e)}); {remedy}') from e
    return value


def read_names(path: epath.Path) -> list[str] | None:
    """Reads a list of names from a run's JSON file; None if absent, UserError if damaged."""
    return read_json(path, of=list)


def read_result(path: epath.Path) -> dict[str, Any] | None:
    """Reads result.json of a workdir, with all keys in RESULT; None if the run has not finished."""
    return read_json(path / 'result.json', *RESULT)


def brief(value: object) -> str:
    """Text of a value in one short line."""
    return re.sub(r'\s+', ' ', str(value))[:80]


def is_number_or_none(value: object) -> bool:
    return value is None or is_number(value)


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def is_dict(value: object) -> bool:
    return isinstance(value, dict)


def are_metrics(value: object) -> bool:
    return is_dict(value) and all(v is None or is_number(v) for v in value.values())


def are_judged(value: object) -> bool:
    return isinstance(value, list) and all(map(is_judged, value))


def is_judged(row: object) -> bool:
    """Whether a value is a row that `results.judge` returns."""
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
    valid = isinstance(row['metric'], str) and row['pass'] in (True, False, None)
    return valid and all(map(is_number, numbers)) and row.get('scale', 1) != 0


SECTIONS = (
    'model', 'data', 'optim', 'objective', 'evals', 'checkpoint', 'report', 'mesh', 'select',
)  # fmt: skip
RESULT = {
    'metrics': are_metrics, 'steps': is_count, 'examples_seen': is_count, 'seconds': is_number,
    'flops_per_image': is_number_or_none, 'device_kind': lambda v: isinstance(v, str),
    'device_count': is_count, 'expected': are_judged,
}  # fmt: skip
ANEW = "restore it, or remove it: the run's next start writes it anew"
FILES = {  # name: ({key: check of its value}, what to do if the file is damaged)
    'config.json': (
        dict.fromkeys(SECTIONS, is_dict),
        "restore it, or remove it: the run's next start writes that of its command",
    ),
    'result.json': (
        RESULT | {'versions': is_dict, 'costs': are_metrics},
        "remove it: the run's next start makes it anew",
    ),
}
MOST_BYTES = 2**26  # in such a file
MOST_FOLDERS = 10_000  # that are searched for runs


def runs_below(folder: epath.Path) -> Iterator[epath.Path]:
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


def finished(folders: Iterable[os.PathLike | str]) -> list[tuple[str, Mapping, Mapping]]:
    """[(workdir, config, result)] of all finished runs below the folders."""
    runs = []
    for folder in map(located, folders):
        if not folder.exists():
            raise UserError(f'no folder {folder}')
        for path in runs_below(folder):
            result = read_result(path)
            if result is not None:
                config = read_json(path / 'config.json', 'model', 'data', 'evals')
                runs.append((str(path), config, result))
    return runs
