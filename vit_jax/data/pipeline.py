"""Batches as a function of (seed, step), on any number of processes.

A batch has the task's arrays, each with a leading axis [B], `id` int64 [B] and `mask` float32 [B],
which is 0 for padding and for unreadable examples.
"""

import collections
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any

import grain
import numpy as np

from vit_jax.data.order import example_ids
from vit_jax.data.reading import (
    NO_ERROR,
    arrays_of,
    continue_blank,
    record_of,
    skip_unreadable,
)
from vit_jax.data.sources import Source
from vit_jax.data.tasks import Task
from vit_jax.data.workers import prefetched
from vit_jax.errors import UserError
from vit_jax.io.bounds import MayChange, Positive, Prefetch, Rate, Threads, Workers


def batches(
    source: Source,
    task: Task,
    seed: int,
    start: int = 0,
    rows: np.ndarray | None = None,
    *,
    batch_size: Positive[int],
    repeats: Positive[int] = 1,
    threads: Threads | None = None,
    workers: Workers | None = None,
    prefetch: Prefetch = 8,
    tolerance: Annotated[Rate, MayChange()] = 0.0,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields training batches without end.

    The examples of a batch and their augmentation are functions of the seed and the step: they
    depend neither on the number of processes nor on where a run was resumed.

    Args:
      source: the data set.
      task: what an example is, a tasks.Task.
      seed: seed of the order and of all random numbers.
      start: step of the first batch.
      rows: rows of the global batch that this process needs. None: all.
      batch_size: examples in a batch, over all devices and processes.
      repeats: how many times each example comes in succession, augmented independently each time
        (repeated augmentation, arXiv:1902.05509). At the end of a batch the next one goes on.
      threads: threads that read and decode in each worker process, or in the main process without
        any. None: one per core, divided among the workers.
      workers: processes that read and decode. 0: the main process does. None: 0 on up to four
        cores, else one per four cores and at most 16; threads of one process limit each other from
        about 4,000 images/s on.
      prefetch: batches to read ahead.
      tolerance: largest share of the data set that may be unreadable. Unreadable examples are
        masked out; more of them than this end the run.
    """
    if seed < 0:
        raise UserError(f'seed is {seed}; it must not be negative')
    if repeats > batch_size:
        raise UserError(f'data.repeats is {repeats}, more than the batch_size {batch_size}')
    make = partial(
        training_batch, source=source, task=task, seed=seed, batch_size=batch_size,
        repeats=repeats, rows=np.arange(batch_size) if rows is None else rows,
    )  # fmt: skip
    data = grain.MapDataset.range(start, sys.maxsize).map(make)
    if workers is None:
        workers = min(cores() // 4, 16) if cores() > 4 else 0
    return skip_unreadable(stream(data, threads, workers, prefetch), source, tolerance)


def training_batch(
    step: int,
    *,
    source: Source,
    task: Task,
    seed: int,
    batch_size: int,
    repeats: int,
    rows: np.ndarray,
) -> dict[str, np.ndarray]:
    """Makes rows of the global batch of a step, together: the overhead of Python is low."""
    places = step * batch_size + rows
    chosen = example_ids(source, places // repeats, seed).tolist()
    bits = np.random.Philox()
    rng = np.random.Generator(bits)

    def make(k, found, out):
        bits.state = fresh_state(seed, places[k])
        return arrays_of(chosen[k], *found, rng, task, out)

    return collect(lambda k: record_of(chosen[k], source), make, task, len(places))


def fresh_state(seed: int, place: int | np.int64) -> dict:
    """Returns the state of the Philox generator for a place in the order of a seed."""
    key = np.array([seed, place], np.uint64)
    return {
        'bit_generator': 'Philox', 'state': {'counter': ZEROS, 'key': key}, 'buffer': ZEROS,
        'buffer_pos': 4, 'has_uint32': 0, 'uinteger': 0,
    }  # fmt: skip


ZEROS = np.zeros(4, np.uint64)
MASKED = {'mask': np.float32(0), 'id': np.int64(-1)}
MOST_RECORDS, MOST_BYTES = 32, 2**23  # of images, that are read before their examples are made


def collect(
    read: Callable[[int], tuple],
    make: Callable[[int, tuple, dict[str, np.ndarray]], Mapping[str, np.ndarray]],
    task: Task,
    size: int,
) -> dict[str, np.ndarray]:
    """Makes a batch of examples make(k, read(k), out) for k below `size`.

    `out` has the places of the task's arrays in the batch, if it takes them (see `Task`). Arrays
    that are elsewhere are copied at once: the next example reuses their memory while it is in the
    cache. So is the code that reads records, as it reads several in turn.
    """
    blank = {**task.blank, **MASKED, 'error': NO_ERROR}
    batch = {name: np.empty((size, *x.shape), x.dtype) for name, x in blank.items()}
    takes_out = 'out' in inspect.signature(task.read).parameters
    for group in grouped(read, size):
        for k, found in group:
            out = {name: batch[name][k, ...] for name in task.blank} if takes_out else {}
            for name, value in make(k, found, out).items():
                if value is not out.get(name):
                    batch[name][k] = value
    return batch


def grouped(read: Callable[[int], tuple], size: int) -> Iterator[list[tuple[int, tuple]]]:
    """Yields lists of (k, read(k)) for k below `size`, within MOST_RECORDS and about MOST_BYTES.

    A list is emptied before the next one is read.
    """
    group, held = [], 0
    for k in range(size):
        found = read(k)
        group.append((k, found))
        fields = getattr(found[0], 'fields', found[0])  # of a Record: those that have been read
        image = fields.get('image') if isinstance(fields, dict) else None
        held += len(image) if isinstance(image, bytes) else 0
        if len(group) == MOST_RECORDS or held >= MOST_BYTES or k + 1 == size:
            yield group
            group.clear()
            held = 0


def examples(
    source: Source,
    task: Task,
    rows: np.ndarray | None = None,
    *,
    batch_size: int,
    threads: int | None = None,
    workers: int = 0,
    prefetch: int = 8,
    tolerance: float = 0.0,
    stop: Any = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of one pass, each example once; the last one is padded with mask 0.

    `rows` are the rows of the global batch that this process needs (None: all). With a `stop`
    (distributed.stop.Stop) that is shared with other processes, an error is passed to it and the
    remaining batches are blank.
    """
    rows = np.arange(batch_size) if rows is None else rows
    make = partial(evaluation_batch, source=source, task=task, batch_size=batch_size, rows=rows)
    count = -(-len(source) // batch_size)
    data = grain.MapDataset.range(count).map(make)
    feed = skip_unreadable(stream(data, threads, workers, prefetch), source, tolerance)
    if stop is None or not stop.shared:
        return feed
    return continue_blank(feed, blank(task, len(rows)), count, stop)


def blank(task: Task, size: int) -> dict[str, np.ndarray]:
    """Makes a batch of `size` examples with mask 0."""
    one = task.blank | MASKED
    return {name: np.stack([x] * size) for name, x in one.items()}


def evaluation_batch(
    step: int, *, source: Source, task: Task, batch_size: int, rows: np.ndarray
) -> dict[str, np.ndarray]:
    """Makes rows of a global batch, in the order of the data set; past its end, mask is 0."""
    rng = np.random.default_rng(0)

    chosen = [i if i < len(source) else 0 for i in (step * batch_size + rows).tolist()]

    def make(k, found, out):
        arrays = arrays_of(chosen[k], *found, rng, task, out)
        past = step * batch_size + rows[k] >= len(source)
        return arrays | MASKED if past else arrays

    return collect(lambda k: record_of(chosen[k], source), make, task, len(rows))


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def stream(
    data: grain.MapDataset, threads: int | None, workers: int, prefetch: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches in order, read ahead by threads of this process or of worker processes.

    Raises UserError with the exit code of a worker that dies.
    """
    threads = threads or max(1, cores() // max(workers, 1))
    ahead = max(threads, prefetch // max(workers, 1))  # batches per worker
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    batches = data.to_iter_dataset(options)
    return prefetched(batches, workers) if workers else iter(batches)


def read_ahead(feed: Iterator, stop: Any, ahead: int = 2) -> Iterator:
    """Yields the batches of `feed`; sets `stop.trouble` to an error up to `ahead` batches early.

    A process that ended at once would be missing in the step that the others have begun. They read
    its vote to stop once they have begun the step after the next.
    """
    waiting = collections.deque()
    while True:
        while stop.trouble is None and len(waiting) <= ahead:
            try:
                waiting.append(next(feed))
            except StopIteration:
                break
            except Exception as e:
                stop.trouble = e
        if not waiting:
            return
        yield waiting.popleft()
