"""Prepares a folder: locks it, writes the missing shards, then the manifest."""

import collections
import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.data.prepare import duplicates, journal, plan, pool, worker
from vit_jax.data.prepare.worker import Job
from vit_jax.data.readers import records
from vit_jax.errors import UserError
from vit_jax.io import storage
from vit_jax.io.progress import Bar


def prepare(
    src: str,
    dst: str,
    *,
    splits: Sequence[str] | None = None,
    fields: Mapping[str, Any] | None = None,
    max_side: int = 512,
    quality: int = 92,
    shard_examples: int = 8192,
    shards: int | None = None,
    against: Sequence[str] = (),
    keep: Sequence[str] = (),
    distance: int = duplicates.DISTANCE,
    tolerance: float = 0.0,
    workers: int = 1,
) -> dict[str, Any]:
    """Prepares a data set, or what is missing of it, and returns its manifest.

    Args:
      src: name of the data set, as `sources.load` takes it.
      dst: local folder.
      splits: splits to write. None: train, and those for validation and test.
      fields: other arguments of `sources.load`.
      max_side: most pixels of the longer side. 0: images are copied.
      quality: of the JPEGs that are encoded.
      shard_examples: examples of a shard.
      shards: shards of a split, in place of `shard_examples`. None: as many as it takes.
      against: test sets whose images are left out, see `plan.load_test_sets`.
      keep: fields of the records that are written beside image, label and name.
      distance: most bits of 255 in which near duplicates differ. -1: exact duplicates only.
      tolerance: share of the images of a split that may be unreadable.
      workers: processes.

    Raises:
      UserError: the options, the data set or the disk do not allow it.
    """
    if '://' in dst:
        raise UserError(f'{dst} is an address; write to a local folder and copy it there')
    folder, fields = pathlib.Path(dst).expanduser(), fields or {}
    splits = splits or plan.default_splits(src, fields.get('data_dir'))
    loaded = plan.load_splits(src, splits, fields)
    sizes = {
        split: -(-len(source) // shards) if shards else shard_examples
        for split, source in loaded.items()
    }
    plan.check_fields(src, loaded, keep, max_side)
    options = dict(max_side=max_side, quality=quality, shard_examples=sizes,
                   against=list(against), distance=distance)  # fmt: skip
    options |= {'keep': list(keep)} if keep else {}
    wanted = plan.describe(src, loaded, fields, options)
    facts = {'classes': list(loaded[splits[0]].classes), 'max_labels': plan.max_labels(loaded)}
    limits = {split: tolerance * len(source) for split, source in loaded.items()}
    job = Job(folder, loaded, plan.load_test_sets(against), wanted['options'], limits)
    with lock(folder):
        if (folder / records.MANIFEST).exists():
            return finished(folder, wanted)
        try:
            return finish(job, wanted, facts, write_shards(job, wanted, workers))
        except OSError as e:
            raise UserError(f'cannot write to {folder}: {e.strerror or e}') from e


def finished(folder: pathlib.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the manifest of a finished folder; raises UserError if it differs from `wanted`."""
    manifest = records.read_manifest(folder)
    changed = plan.difference(manifest, wanted)
    if changed:
        raise UserError(f'{folder} is finished, but {changed}; name a new folder')
    remove_leftovers(folder)
    return manifest


@contextlib.contextmanager
def lock(folder: pathlib.Path) -> Iterator[None]:
    """Makes a folder and locks it; raises UserError if another process is preparing it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as e:
        raise UserError(f'cannot make the folder {folder}: {e.strerror or e}') from e
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'another process is preparing {folder}') from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def write_shards(job: Job, wanted: Mapping[str, Any], workers: int) -> list[dict[str, Any]]:
    """Writes all missing shards and returns the journal's entries of all shards, in their order.

    Raises UserError, also if too many images are unreadable.
    """
    entries = journal.resume(job, wanted)
    hash_test_sets(job, workers)
    complete = {(entry['split'], entry['shard']) for entry in entries}
    order = {(task.key, task.index): k for k, task in enumerate(job.shard_tasks())}
    tasks = [task for task in job.shard_tasks() if (task.key, task.index) not in complete]
    unreadable = collections.Counter()
    for entry in entries:
        unreadable[entry['split']] += len(entry['unreadable'])
    total = sum(map(len, job.sources.values()))
    with (
        Bar('images', total, sum(entry['read'] for entry in entries)) as bar,
        (job.folder / records.JOURNAL).open('a') as file,
    ):
        for entry in pool.results(worker.work, job, tasks, workers, bar):
            split, bad = entry['split'], entry['unreadable']
            unreadable[split] += len(bad)
            if bad:
                worker.check_unreadable(
                    unreadable[split], job.limits[split], len(job.sources[split]), bad[-1]
                )
            file.write(json.dumps(entry) + '\n')
            file.flush()
            os.fsync(file.fileno())
            entries.append(entry)
    return sorted(entries, key=lambda entry: order[entry['split'], entry['shard']])


def hash_test_sets(job: Job, workers: int) -> None:
    """Writes names, digests and hashes of the test sets, unless they are written."""
    path = job.folder / worker.HASHES
    if not job.test_sets or path.exists():
        return
    tasks, total = job.hash_tasks(), sum(map(len, job.test_sets.values()))
    with Bar('test images', total) as bar:
        results = list(pool.results(worker.work, job, tasks, workers, bar))
    results.sort(key=lambda result: tasks.index(result['task']))
    rows = [row for result in results for row in result['rows']]
    if len(rows) < total:
        print(f'{total - len(rows):,} test images are unreadable and are not searched for')
    names, digests, hashes = zip(*rows, strict=True) if rows else ((), (), ())
    duplicates.save(path, names, digests, np.array(hashes, np.uint64))


def finish(
    job: Job, wanted: Mapping[str, Any], facts: Mapping[str, Any], entries: list[dict[str, Any]]
) -> dict[str, Any]:
    """Writes the lists of images left out, then the manifest, and returns it.

    Removes empty shards, and what only an unfinished folder needs.
    """
    splits, counts = {}, {}
    for split in job.sources:
        own = [entry for entry in entries if entry['split'] == split]
        splits[split] = [
            {'file': job.path(split, entry['shard']).name}
            | {key: entry[key] for key in ('examples', 'bytes', 'sha256')}
            for entry in own
            if entry['examples']
        ]
        if not splits[split]:
            raise UserError(f'split {split}: every image is unreadable or a duplicate')
        counts[split] = {'examples': sum(entry['examples'] for entry in own)}
        for key in ('removed', 'unreadable'):
            counts[split][key] = sum(len(entry[key]) for entry in own)
    for entry in entries:
        if not entry['examples']:
            job.path(entry['split'], entry['shard']).unlink(missing_ok=True)
    for key in ('removed', 'unreadable'):
        rows = [{'split': entry['split'], **row} for entry in entries for row in entry[key]]
        if rows:
            text = ''.join(json.dumps(row) + '\n' for row in rows)
            storage.write(job.folder / f'{key}.jsonl', text.encode(), sync=True)
    manifest = {
        'format': records.FORMAT, 'version': records.VERSION, **facts, 'counts': counts, **wanted,
        'splits': splits,
    }  # fmt: skip
    text = json.dumps(manifest, indent=1) + '\n'
    storage.write(job.folder / records.MANIFEST, text.encode(), sync=True)
    remove_leftovers(job.folder)
    return manifest


def remove_leftovers(folder: pathlib.Path) -> None:
    """Removes files that a finished folder does not need."""
    for path in (folder / records.JOURNAL, folder / worker.HASHES, *folder.glob('.*.part')):
        path.unlink(missing_ok=True)
