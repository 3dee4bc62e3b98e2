"""Tasks of the workers of `prepare`: write a shard of records, or hash a part of a test set."""

import contextlib
import io
import time
import traceback

import numpy as np
from PIL import Image

from vit_jax.data import images, reading
from vit_jax.data.prepare import duplicates
from vit_jax.data.readers import example, records
from vit_jax.data.workers import end_with_parent
from vit_jax.errors import UserError

KNOWN = '.against.npz'  # hashes of the test sets, until DST is finished
EVERY = 0.2  # seconds between a worker's reports of its progress


def converted(data, side, quality):
    """(bytes to write, decoded image) of an encoded image; raises Unreadable."""
    image = images.decode(data)
    small = max(image.shape[:2]) <= side
    if not side or small and data[:3] == b'\xff\xd8\xff':
        return data, image
    picture = Image.fromarray(image)
    if not small:
        scale = side / max(picture.size)
        size = [max(1, round(pixels * scale)) for pixels in picture.size]
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    picture.save(out, 'JPEG', quality=quality)
    return out.getvalue(), image


def raw(source, i):
    """(bytes, label) of an example; turns whatever its reader raises into images.Unreadable."""
    try:
        record = source.records[i]
        return record['image'], record['label']
    except UserError as e:
        raise images.Unreadable(str(e)) from e
    except Exception as e:
        raise images.Unreadable(reading.why(e)) from e


def labels_of(label, source, i):
    """Converts a label, or an array padded with -1, to a list; raises UserError if out of range."""
    numbers = np.atleast_1d(label)
    numbers = [int(n) for n in numbers if n >= 0 or np.ndim(label) == 0]
    for number in numbers:
        if not 0 <= number < len(source.classes):
            raise UserError(
                f'label {number} of {source.name(i)} is out of range: '
                f'the data set has {len(source.classes)} classes'
            )
    return numbers


class Job:
    """What workers share: sources by split, test sets, options and limits; picklable."""

    def __init__(self, dst, loaded, against, options, limits):
        self.dst, self.sources, self.against = dst, loaded, against
        self.options, self.limits = options, limits

    def shards(self, split):
        count = len(self.sources[split])
        return -(-count // self.options['shard_examples'][split])

    def file(self, split, k):
        return records.shard_name(split, k, self.shards(split))

    def range(self, split, k):
        """Indices of the examples of shard k."""
        each = self.options['shard_examples'][split]
        return range(k * each, min((k + 1) * each, len(self.sources[split])))

    def tasks(self):
        return [('shard', split, k) for split in self.sources for k in range(self.shards(split))]


def work(job, pipe):
    """Runs a worker, which answers tasks from a pipe until the pipe or its parent is gone."""
    end_with_parent()
    known, said = None, 0.0

    def progress(done):
        nonlocal said
        if time.time() - said > EVERY:
            said = time.time()
            pipe.send(('at', done))

    try:
        while True:
            kind, key, k = pipe.recv()
            if kind == 'shard' and known is None and job.against:
                known = duplicates.read(job.dst / KNOWN)
            function = shard if kind == 'shard' else hashed
            pipe.send(('done', function(job, key, k, known, progress)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    except UserError as e:
        pipe.send(('refused', str(e)))
    except BaseException:
        pipe.send(('broken', traceback.format_exc()))


def shard(job, split, k, known, progress):
    """Writes shard k of a split and returns its line of the journal."""
    source, options = job.sources[split], job.options
    removed, unreadable, span = [], [], job.range(split, k)

    def kept():
        for done, i in enumerate(span):
            progress(done)
            try:
                data, label = raw(source, i)
                data, image = converted(data, options['max_side'], options['quality'])
            except images.Unreadable as e:
                unreadable.append({'name': reading.name(source, i), 'why': str(e)})
                check(len(unreadable), job.limits[split], len(source), unreadable[-1])
                continue
            found = known and known.find(image, options['distance'])
            if found:
                removed.append({'name': source.name(i), **found})
            else:
                yield example.encode(data, labels_of(label, source, i), source.name(i))

    path = job.dst / job.file(split, k)
    examples, size, digest = records.write_shard(path, kept())
    return {
        'split': split, 'shard': k, 'read': len(span), 'examples': examples, 'bytes': size,
        'sha256': digest, 'removed': removed, 'unreadable': unreadable,
    }  # fmt: skip


def hashed(job, which, k, known, progress):
    """Names, digests and hashes of a part of a test set, without unreadable images."""
    source = job.against[which]
    rows = []
    for done, i in enumerate(piece(source, k)):
        progress(done)
        with contextlib.suppress(images.Unreadable):
            rows.append((source.name(i), *duplicates.described(raw(source, i)[0])))
    return {'which': which, 'shard': k, 'read': len(piece(source, k)), 'rows': rows}


def piece(source, k, each=1024):
    return range(k * each, min((k + 1) * each, len(source)))


def check(bad, limit, count, last):
    """Raises UserError if more images are unreadable than the limit."""
    if bad > limit:
        raise UserError(
            f'unreadable image {last["name"]}: {last["why"]} ({bad} of {count:,} images so far; '
            f'--tolerance={limit / count:g})'
        )
