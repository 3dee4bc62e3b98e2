"""Reads examples for a task, and masks out those that can't be read."""

import errno
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging

from vit_jax.data.sources import Source
from vit_jax.data.tasks import Task
from vit_jax.errors import UserError, refusal
from vit_jax.io import reasons
from vit_jax.io.text import printable


def example(
    i: int, rng: np.random.Generator, *, source: Source, task: Task
) -> dict[str, np.ndarray | np.generic]:
    """Reads example i and makes its arrays, see `arrays_of`."""
    return arrays_of(i, *record_of(i, source), rng, task)


def record_of(i: int, source: Source) -> tuple[Mapping[str, Any] | None, str]:
    """Reads the record of example i: (record, ''), or (None, reason) of an unusable example.

    Whatever a reader raises makes its example unusable: disks and servers fail in many ways, and
    damaged files make parsers raise anything.
    """
    try:
        return source.records[i], ''
    except UserError as e:  # a damaged record
        return None, str(e)
    except Exception as e:
        return None, f'cannot be read: {why(e)}'


def arrays_of(
    i: int,
    record: Mapping[str, Any] | None,
    error: str,
    rng: np.random.Generator,
    task: Task,
    out: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray | np.generic]:
    """Makes the arrays of example i, {name: array}, of what `record_of` returned.

    An unusable one has mask 0 and a reason in `error`. What a task raises, but for UserError, is a
    bug in it and propagates. `out` is for a task that takes it, see `Task`.
    """
    arrays = task.blank
    if not error:
        try:
            arrays = task.read(record, rng, out=out) if out else task.read(record, rng)
        except UserError as e:
            error = str(e)
        else:
            check_arrays(arrays, task.blank)
    return {
        **arrays,
        'mask': np.float32(not error),
        'id': np.int64(i),
        'error': np.array(error[:200], '<U200') if error else NO_ERROR,
    }


NO_ERROR = np.array('', '<U200')


def check_arrays(arrays: Mapping[str, Any], blank: Mapping[str, Any]) -> None:
    """Raises UserError unless an example has the names, dtypes and shapes of `blank`."""
    for key in {**blank, **arrays}:
        one, other = arrays.get(key), blank.get(key)
        if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
            made, stated = (
                'none' if x is None else f'{x.dtype} {list(x.shape)}' for x in (one, other)
            )
            raise UserError(f'the task made {key} {made} of an example; its `blank` has {stated}')


def why(error: Exception) -> str:
    """Explains in a few words why a reader failed."""
    if isinstance(error, OSError) and error.strerror:
        short = error.errno in (errno.EMFILE, errno.ENFILE)  # of descriptors: not the file's fault
        return refusal(error) if short else error.strerror
    name, reason = type(error).__name__, reasons.reason(error)
    return reason if isinstance(error, OSError) or name == reason else f'{name}: {reason}'


def skip_unreadable(feed: Iterator[dict], source: Source, tolerance: float) -> Iterator[dict]:
    """Yields batches; raises UserError once more of the data set is unusable than tolerated."""
    bad = set()
    for batch in feed:
        errors = batch.pop('error')
        for k in np.flatnonzero(batch['mask'] == 0):
            i, error = int(batch['id'][k]), errors[k]
            if error and i >= 0 and i not in bad:
                bad.add(i)
                if len(bad) > tolerance * len(source):
                    raise UserError(
                        f'{name(source, i)}: {error} ({len(bad)} of {len(source)} examples '
                        f'so far; tolerance is {tolerance:g}; a larger one leaves these out)'
                    )
                logging.warning('skipped %s', printable(f'{name(source, i)}: {error}'))
        yield batch


def name(source: Source, i: int) -> str:
    """Names example i for messages, even if its reader can't tell its name."""
    try:
        return source.name(i)
    except Exception:  # the name may be in the file that can't be read
        return f'example {i}'


def continue_blank(
    feed: Iterator[dict], blank: dict, count: int, stop: Any
) -> Iterator[dict]:
    """Yields `count` batches of `feed`, and copies of `blank` once it has raised.

    Other processes wait for each batch of an evaluation. The exception is stored as `stop.trouble`,
    and with the next batch the other processes stop.
    """
    for _ in range(count):
        batch = blank
        try:
            if stop.trouble is None:
                batch = next(feed)
        except Exception as e:
            stop.trouble = e
        yield batch
