"""Tasks of the workers of `prepare`: write a shard of records, or hash a part of a test set."""

import contextlib
import io
import pathlib
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from vit_jax.data import images, reading
from vit_jax.data.prepare import duplicates, plan
from vit_jax.data.readers import example, records
from vit_jax.data.readers.record import field
from vit_jax.data.sources import Source
from vit_jax.data.workers import end_with_parent
from vit_jax.errors import UserError

HASHES = '.against.npz'  # hashes of the test sets, until the folder is finished
PERIOD = 0.2  # seconds between a worker's reports of its progress
PART = 1024  # images of a test set that one task hashes


class Task(NamedTuple):
    """Shard `index` of the split `key`, or part `index` of the test set `key`."""

    kind: Literal['shard', 'test set']
    key: str
    index: int

    def __str__(self) -> str:
        return f'{self.kind} {self.index} of {self.key}'


class Job(NamedTuple):
    """What all workers share."""

    folder: pathlib.Path
    sources: Mapping[str, Source]  # by split
    test_sets: Mapping[str, Source]  # by address
    options: Mapping[str, Any]  # see `plan.describe`
    limits: Mapping[str, float]  # most unreadable images of a split

    def shards(self, split: str) -> int:
        """Number of shards of a split."""
        return -(-len(self.sources[split]) // self.options['shard_examples'][split])

    def path(self, split: str, index: int) -> pathlib.Path:
        """Path of a shard."""
        return self.folder / records.shard_name(split, index, self.shards(split))

    def examples(self, split: str, index: int) -> range:
        """Indices of the examples of a shard."""
        size = self.options['shard_examples'][split]
        return range(index * size, min((index + 1) * size, len(self.sources[split])))

    def shard_tasks(self) -> list[Task]:
        """Tasks that write all shards, in their order."""
        return [
            Task('shard', split, k) for split in self.sources for k in range(self.shards(split))
        ]

    def hash_tasks(self) -> list[Task]:
        """Tasks that hash all test sets, in their order."""
        return [
            Task('test set', address, k)
            for address, source in self.test_sets.items()
            for k in range(-(-len(source) // PART))
        ]


def work(job: Job, pipe: Connection) -> None:
    """Runs a worker: answers tasks from a pipe, as `pool` describes, until its parent is gone."""
    end_with_parent()
    known, reported = None, 0.0

    def report(count: int) -> None:
        nonlocal reported
        if time.time() - reported > PERIOD:
            reported = time.time()
            pipe.send(('progress', count))

    try:
        while True:
            task = pipe.recv()
            if task.kind == 'shard':
                if known is None and job.test_sets:
                    known = duplicates.read(job.folder / HASHES)
                result = write_shard(job, task.key, task.index, known, report)
            else:
                result = hash_part(job, task, report)
            pipe.send(('result', result))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    except UserError as e:
        pipe.send(('refusal', str(e)))
    except BaseException:
        pipe.send(('bug', traceback.format_exc()))


def write_shard(
    job: Job, split: str, index: int, known: duplicates.Index | None, report: Callable[[int], None]
) -> dict[str, Any]:
    """Writes a shard and returns its entry in the journal; reports the images read so far."""
    source, options, span = job.sources[split], job.options, job.examples(split, index)
    removed, unreadable = [], []

    def encoded() -> Iterator[bytes]:
        for count, i in enumerate(span):
            report(count)
            try:
                data, label, fields = read_example(source, i, options.get('keep', ()))
                data, image = convert(data, options['max_side'], options['quality'])
            except images.Unreadable as e:
                unreadable.append({'name': reading.name(source, i), 'why': str(e)})
                check_unreadable(len(unreadable), job.limits[split], len(source), unreadable[-1])
                continue
            duplicate = known.find(image, options['distance']) if known else None
            if duplicate:
                removed.append({'name': source.name(i), **duplicate})
            else:
                labels = [] if label is None else list_labels(label, source, i)
                yield example.encode(data, labels, source.name(i), fields)

    examples, size, digest = records.write_shard(job.path(split, index), encoded())
    return {
        'split': split, 'shard': index, 'read': len(span), 'examples': examples, 'bytes': size,
        'sha256': digest, 'removed': removed, 'unreadable': unreadable,
    }  # fmt: skip


def hash_part(job: Job, task: Task, report: Callable[[int], None]) -> dict[str, Any]:
    """Names, digests and hashes of a part of a test set, without unreadable images."""
    source = job.test_sets[task.key]
    span = range(task.index * PART, min((task.index + 1) * PART, len(source)))
    rows = []
    for count, i in enumerate(span):
        report(count)
        with contextlib.suppress(images.Unreadable):
            data, *_ = read_example(source, i)
            rows.append((source.name(i), *duplicates.fingerprint(data)))
    return {'task': task, 'read': len(span), 'rows': rows}


def read_example(
    source: Source, i: int, keep: Sequence[str] = ()
) -> tuple[bytes, Any, dict[str, Any]]:
    """(bytes of the image, label or None, fields to keep) of an example.

    Whatever its reader raises becomes Unreadable.
    """
    try:
        record = source.records[i]
        label = record['label'] if plan.has_labels(source) else None
        return record['image'], label, {name: field(record, name) for name in keep}
    except UserError as e:
        raise images.Unreadable(str(e)) from e
    except Exception as e:
        raise images.Unreadable(reading.why(e)) from e


def convert(data: bytes, max_side: int, quality: int) -> tuple[bytes, np.ndarray]:
    """(bytes to write, image uint8 [H, W, 3] as it was) of an encoded image; raises Unreadable."""
    image = images.decode(data)
    fits = max(image.shape[:2]) <= max_side
    if not max_side or fits and data[:3] == b'\xff\xd8\xff':
        return data, image
    picture = Image.fromarray(image)
    if not fits:
        scale = max_side / max(picture.size)
        size = [max(1, round(pixels * scale)) for pixels in picture.size]
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    picture.save(out, 'JPEG', quality=quality)
    return out.getvalue(), image


def list_labels(label: Any, source: Source, i: int) -> list[int]:
    """Lists a label, or those of an array padded with -1; raises UserError if out of range."""
    labels = [int(n) for n in np.atleast_1d(label) if n >= 0 or np.ndim(label) == 0]
    for number in labels:
        if not 0 <= number < len(source.classes):
            raise UserError(
                f'label {number} of {source.name(i)} is out of range: '
                f'the data set has {len(source.classes)} classes'
            )
    return labels


def check_unreadable(count: int, limit: float, total: int, last: Mapping[str, str]) -> None:
    """Raises UserError, with the last one, if more images are unreadable than the limit."""
    if count > limit:
        raise UserError(
            f'unreadable image {last["name"]}: {last["why"]} ({count} of {total:,} images so far; '
            f'--tolerance={limit / total:g})'
        )
