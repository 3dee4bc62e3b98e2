"""Writes a data set as shards of records: python -m vit_jax.data.prepare SRC DST.

SRC is anything that data.source.name takes; its other fields can be given: --source.image=png. DST
is a local folder. Once it has manifest.json, the last file to be written, it is a data set, which
can be SRC too. A run that was stopped resumes where it was if it is started again with the same
arguments; the files depend neither on the number of workers nor on where it was stopped.

An image longer than --max_side is reduced to it (Pillow's bicubic filter, antialiased) and encoded
as a JPEG of --quality. A smaller image of another format is encoded, too; a smaller JPEG is copied
byte for byte. --max_side=0 copies all. Images with duplicates in the sets of --against are left out
and listed in removed.jsonl; see data/prepare/duplicates.py.
"""

import contextlib
import fcntl
import hashlib
import inspect
import json
import os
import pathlib
import re
import sys

import numpy as np
import PIL
from absl import flags

from vit_jax import cli
from vit_jax.data import sources
from vit_jax.data.prepare import crew, duplicates, writing
from vit_jax.data.readers import names, records
from vit_jax.data.readers.splits import KNOWN
from vit_jax.errors import UserError
from vit_jax.io import bounds, storage
from vit_jax.io.progress import Bar
from vit_jax.io.text import printable

SPLIT = flags.DEFINE_list(
    'split', None, 'The splits to prepare; by default train, and what SRC has to validate and test.'
)
SIDE = flags.DEFINE_integer(
    'max_side', 512, 'The most pixels of the longer side; 0: as it is.', lower_bound=0
)
QUALITY = flags.DEFINE_integer(
    'quality', 92, 'Of JPEGs that are written.', lower_bound=1, upper_bound=100
)
WORKERS = flags.DEFINE_integer('workers', os.cpu_count(), 'Processes.', lower_bound=1)
EXAMPLES = flags.DEFINE_integer('shard_examples', 8192, 'Examples a shard.', lower_bound=1)
SHARDS = flags.DEFINE_integer('shards', None, 'Shards a split, in place of that.', lower_bound=1)
AGAINST = flags.DEFINE_multi_string(
    'against', [], 'A test set, SRC or SRC:SPLIT (split test if not given), whose duplicates are '
    'left out'
)
DISTANCE = flags.DEFINE_integer(
    'distance', duplicates.DISTANCE, 'Of 255 bits, those in which near duplicates may differ; -1: '
    'exact ones alone.', lower_bound=-1, upper_bound=255,
)  # fmt: skip
TOLERANCE = flags.DEFINE_float(
    'tolerance', 0.0, 'The share of images that may be unreadable, and are left out.',
    lower_bound=0, upper_bound=1,
)  # fmt: skip

USAGE = 'usage: python -m vit_jax.data.prepare SRC DST [--split train,validation] [...]'


def split_of(address):
    """Splits 'SRC:SPLIT' into (SRC, SPLIT), which is 'test' if not given."""
    match = re.fullmatch(r'(.+):([A-Za-z_]\w*(\[[^\]]*\])?)', address)
    return (match[1], match[2]) if match else (address, 'test')


def load(name, splits, fields):
    """Loads {split: Source}, all with the same classes."""
    known = inspect.signature(sources.load).parameters
    unknown = [k for k in fields if k not in known]
    if unknown or {'name', 'split'} & fields.keys():
        raise UserError(f'--source.{(unknown or ["name or split"])[0]} is no field to be given')
    for key, value in fields.items():
        bounds.check(f'--source.{key}', value, known[key].annotation)
    loaded = {split: sources.load(name=name, split=split, **fields) for split in splits}
    for split, source in loaded.items():
        if not re.fullmatch(r'\w[\w.-]*', split, re.ASCII):
            raise UserError(f'split {split!r} can not be the name of a file; prepare a whole one')
        first = loaded[splits[0]].classes
        loaded[split] = names.relabelled(source, first, f'split {split}', f"split {splits[0]}'s")
        if not len(source):
            raise UserError(f'split {split} of {name} has no examples')
    return loaded


def usual_splits(name, data_dir=None):
    """train, and the splits of a data set for validation and test."""
    known = sources.splits_of(name, data_dir)
    return ['train', *(split for split in KNOWN[1:] if split in known)]


def most_labels(loaded):
    """Largest number of labels of an example: 1, or the length of the sources' label arrays."""
    shapes = {getattr(source.records, 'max_labels', None) or 1 for source in loaded.values()}
    if len(shapes) > 1:
        raise UserError(f'the splits have labels of different numbers: {sorted(shapes)}')
    return shapes.pop()


def names_digest(source):
    """Hash of a few names of a data set, to distinguish it from another one in the same place."""
    picked = np.linspace(0, len(source) - 1, 16).astype(int)
    return hashlib.sha256(repr([source.name(int(i)) for i in picked]).encode()).hexdigest()[:16]


def plan(src, loaded, fields):
    """Everything that determines the files; only the same plan completes an unfinished folder."""
    shard_examples = {
        split: -(-len(source) // SHARDS.value) if SHARDS.value else EXAMPLES.value
        for split, source in loaded.items()
    }
    splits = {
        split: {'examples': len(source), 'names': names_digest(source)}
        for split, source in loaded.items()
    }
    return {
        'source': {'name': src, **({'fields': fields} if fields else {}), 'splits': splits},
        'options': {
            'max_side': SIDE.value, 'quality': QUALITY.value, 'shard_examples': shard_examples,
            'against': AGAINST.value, 'distance': DISTANCE.value, 'pillow': PIL.__version__,
        },
    }  # fmt: skip


def difference(old, new):
    """First key in which two plans differ, as 'KEY is OLD, not NEW'."""
    for section in ('source', 'options'):
        before = old.get(section) if isinstance(old.get(section), dict) else {}
        for key in (*new[section], *before):
            if before.get(key) != new[section].get(key):
                return f'{section} {key} is {before.get(key)!r}, not {new[section].get(key)!r}'
    return ''


@contextlib.contextmanager
def held(dst):
    """Locks the folder; raises UserError if another process is preparing it."""
    try:
        dst.mkdir(parents=True, exist_ok=True)
        folder = os.open(dst, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as e:
        raise UserError(f'can not make the folder {dst}: {e.strerror or e}') from e
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'another process is preparing {dst}') from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(folder)


def journal(dst, wanted, job):
    """Lines of the finished shards, each verified; starts the journal if there is none.

    Raises UserError if the folder has other files, or was begun with another plan.
    """
    path = dst / records.JOURNAL
    if not path.exists():
        if any(p.name[0] != '.' for p in dst.iterdir()):
            raise UserError(f'{dst} holds other files; name a new folder')
        storage.write(path, f'{json.dumps(wanted)}\n'.encode(), sync=True)
        return []
    lines = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # truncated by a kill: done again
            lines.append(json.loads(line))
    changed = difference(lines[0] if lines and isinstance(lines[0], dict) else {}, wanted)
    if changed:
        raise UserError(
            f'{dst} is half finished and was begun in another way: {changed}; go on as it was '
            'begun, or name a new folder'
        )
    done = [line for line in lines[1:] if sound(dst / job.file(line['split'], line['shard']), line)]
    text = ''.join(json.dumps(line) + '\n' for line in (wanted, *done))
    storage.write(path, text.encode(), sync=True)
    return done


def sound(path, line):
    """Whether a shard has the size and hash of its line in the journal."""
    try:
        with path.open('rb') as file:
            if os.fstat(file.fileno()).st_size != line['bytes']:
                return False
            return hashlib.file_digest(file, 'sha256').hexdigest() == line['sha256']
    except OSError:
        return False


def know(job, workers):
    """Writes names, digests and hashes of the test sets, unless they are written."""
    path = job.dst / writing.KNOWN
    if not job.against or path.exists():
        return
    tasks = [
        ('test set', name, k)
        for name, source in job.against.items()
        for k in range(-(-len(source) // 1024))
    ]
    order = {(name, k): at for at, (_, name, k) in enumerate(tasks)}
    with Bar('test images', sum(map(len, job.against.values()))) as bar:
        found = list(crew.distributed(writing.work, job, tasks, workers, bar))
    found.sort(key=lambda result: order[result['which'], result['shard']])
    rows = [row for result in found for row in result['rows']]
    total = sum(map(len, job.against.values()))
    if len(rows) < total:
        print(f'{total - len(rows):,} test images are unreadable, and not looked for')
    names, digests, hashes = zip(*rows, strict=True) if rows else ((), (), ())
    duplicates.save(path, names, digests, np.array(hashes, np.uint64))


def write(job, wanted, classes, max_labels, workers):
    """Writes all missing shards, then the manifest; returns the manifest."""
    done = journal(job.dst, wanted, job)
    know(job, workers)
    finished = {(line['split'], line['shard']) for line in done}
    tasks = [task for task in job.tasks() if task[1:] not in finished]
    counts = {split: sum(len(line['unreadable']) for line in done if line['split'] == split)
              for split in job.sources}  # fmt: skip
    total = sum(map(len, job.sources.values()))
    with (
        Bar('images', total, sum(line['read'] for line in done)) as bar,
        (job.dst / records.JOURNAL).open('a') as file,
    ):
        for line in crew.distributed(writing.work, job, tasks, workers, bar):
            split, bad = line['split'], line['unreadable']
            counts[split] += len(bad)
            if bad:
                writing.check(counts[split], job.limits[split], len(job.sources[split]), bad[-1])
            file.write(json.dumps(line) + '\n')
            file.flush()
            os.fsync(file.fileno())
            done.append(line)
    return finish(job, wanted, classes, max_labels, done)


def finish(job, wanted, classes, max_labels, done):
    """Writes the lists and the manifest, then removes what only an unfinished folder needs."""
    splits, counts = {}, {}
    for split in job.sources:
        lines = sorted((x for x in done if x['split'] == split), key=lambda line: line['shard'])
        splits[split] = [
            {'file': job.file(split, line['shard'])}
            | {key: line[key] for key in ('examples', 'bytes', 'sha256')}
            for line in lines
            if line['examples']
        ]
        if not splits[split]:
            raise UserError(f'no image of split {split} is left')
        counts[split] = {
            'examples': sum(line['examples'] for line in lines),
            **{key: sum(len(line[key]) for line in lines) for key in ('removed', 'unreadable')},
        }
        for line in lines:
            if not line['examples']:
                (job.dst / job.file(split, line['shard'])).unlink(missing_ok=True)
    for key in ('removed', 'unreadable'):
        rows = [{'split': split, **row} for split in job.sources
                for line in sorted(done, key=lambda line: line['shard']) if line['split'] == split
                for row in line[key]]  # fmt: skip
        if rows:
            text = ''.join(json.dumps(row) + '\n' for row in rows)
            storage.write(job.dst / f'{key}.jsonl', text.encode(), sync=True)
    manifest = {
        'format': records.FORMAT, 'version': records.VERSION, 'classes': list(classes),
        'max_labels': max_labels, 'counts': counts, **wanted, 'splits': splits,
    }  # fmt: skip
    text = json.dumps(manifest, indent=1) + '\n'
    storage.write(job.dst / records.MANIFEST, text.encode(), sync=True)
    clean(job.dst)
    return manifest


def clean(dst):
    """Removes files that a finished folder does not need."""
    for path in (dst / records.JOURNAL, dst / writing.KNOWN, *dst.glob('.*.part')):
        path.unlink(missing_ok=True)


def prepare(src, dst, splits, fields, workers):
    """Prepares a data set and returns its manifest; raises UserError."""
    if '://' in str(dst):
        raise UserError(f'{dst}: write to a local folder, and copy that; it can be read from there')
    dst = pathlib.Path(dst).expanduser()
    loaded = load(src, splits, fields)
    wanted, max_labels = plan(src, loaded, fields), most_labels(loaded)
    against = {}
    for address in AGAINST.value:
        name, split = split_of(address)
        against[address] = sources.load(name=name, split=split)
    limits = {split: TOLERANCE.value * len(source) for split, source in loaded.items()}
    job = writing.Job(dst, loaded, against, wanted['options'], limits)
    with held(dst):
        if (dst / records.MANIFEST).exists():
            manifest = records.read_manifest(dst)
            changed = difference(manifest, wanted)
            if changed:
                raise UserError(f'{dst} is finished, but {changed}; name a new folder')
            clean(dst)
            return manifest
        try:
            return write(job, wanted, loaded[splits[0]].classes, max_labels, workers)
        except OSError as e:
            raise UserError(f'can not write to {dst}: {e.strerror or e}') from e


def main(argv, changes):
    if len(argv) != 3:
        raise UserError(USAGE)
    fields = {}
    if changes:
        from vit_jax import config  # takes seconds, in each worker too

        fields = {key: config.parsed(text) for key, text in changes}
    try:
        chosen = SPLIT.value or usual_splits(argv[1], fields.get('data_dir'))
        manifest = prepare(argv[1], argv[2], chosen, fields, WORKERS.value)
    except KeyboardInterrupt:
        print('stopped; the same command goes on where it was', file=sys.stderr)
        sys.exit(130)
    for split, counts in manifest.get('counts', {}).items():
        size = sum(shard['bytes'] for shard in manifest['splits'][split])
        print(
            f'{split}: {counts["examples"]:,} images, {size:,} bytes, '
            f'{len(manifest["splits"][split]):,} shards; {counts["removed"]:,} duplicates and '
            f'{counts["unreadable"]:,} unreadable left out'
        )
    print(f'Data set: {printable(argv[2])}')


if __name__ == '__main__':
    cli.run(main, 'source')
