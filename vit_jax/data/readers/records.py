"""A data set as shards of records at random access: ArrayRecord files and a manifest.json.

A record is a serialized tf.train.Example (`image` and `name`: bytes, `label`: int64s), which any
tool reads. A shard has one record per chunk, uncompressed: image files do not shrink, and 110 KB
are read in 36 us (compressed 40 to 45). `prepare` writes such folders.
"""

import collections
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import re
import resource
import stat
import threading

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from vit_jax.data.readers import example, names, splits
from vit_jax.errors import UserError
from vit_jax.io import atomic, fetch
from vit_jax.io.text import brief

FORMAT, VERSION = 'vit_jax records', 1
MANIFEST = 'manifest.json'
JOURNAL = 'prepare.jsonl'  # exists until a folder is finished
MOST_MANIFEST = 200_000_000  # bytes; 100,000 shards take 20 million
MOST_OPEN = 256  # open shards, each with a file descriptor and the index of its records
WRITER = 'group_size:1,uncompressed'
READER = 'readahead_buffer_size:0,max_parallelism:0'  # the defaults read ahead: 40 times slower
BUFFER = 32768  # bytes; longer reads bypass the buffer


def shard_name(split, index, count):
    """File name of a shard."""
    return f'{split}-{index:05d}-of-{count:05d}.array_record'


def write_shard(path, records):
    """Writes records (bytes) as one shard; returns (records, bytes of the file, sha256).

    The shard is complete or does not exist. Raises UserError if the disk refuses.
    """
    count = 0
    try:
        with atomic.replace_file(path) as part:
            writer = ArrayRecordWriter(str(part), WRITER)
            for record in records:
                writer.write(record)
                count += 1
            writer.close()
            with part.open('rb') as file:
                digest = hashlib.file_digest(file, 'sha256').hexdigest()
            size = part.stat().st_size
    except (RuntimeError, OSError) as e:
        raise UserError(f'can not write {path}: {brief(getattr(e, "strerror", None) or e)}') from e
    return count, size, digest


def beside(folder, name):
    """Path or address of a file in a folder."""
    return f'{str(folder).rstrip("/")}/{name}'


def read_manifest(folder):
    """Reads and checks the manifest of a prepared folder (a path or an address); it is untrusted.

    Raises UserError, in one line with the name of the file, if it is missing or invalid.
    """
    where = beside(folder, MANIFEST)
    try:
        manifest = json.loads(manifest_text(str(folder), where))
    except (ValueError, RecursionError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f'{where} is no JSON file ({brief(e)})') from e
    problem = wrong(manifest)
    if problem:
        raise UserError(f'{where}: {problem}')
    return manifest


def manifest_text(folder, where):
    """Bytes of a manifest.json; raises UserError if there is none."""
    lacks = (
        f'{folder} has no {MANIFEST}: it is no prepared data set, or one that is not finished; '
        'run python -m vit_jax.data.prepare again, which goes on where it stopped'
    )
    if '://' in folder:
        with fetch.explained(where):
            fs, path = fetch.backend(where)
            try:
                if (fs.info(path).get('size') or 0) > MOST_MANIFEST:
                    raise UserError(f'{where} has more than {MOST_MANIFEST:,} bytes')
                return fs.cat_file(path)
            except FileNotFoundError:
                raise UserError(lacks) from None
    path = pathlib.Path(where).expanduser()
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_MANIFEST:
            raise UserError(f'{path} is no file of less than {MOST_MANIFEST:,} bytes')
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(lacks) from None
    except OSError as e:
        raise UserError(f'can not read {path}: {e.strerror or e}') from e


def wrong(manifest):
    """What is wrong with a manifest, None if it is valid."""
    if not isinstance(manifest, dict) or manifest.get('format') != FORMAT:
        return f'it does not say that its format is {FORMAT!r}'
    if manifest.get('version') != VERSION:
        return f'version {brief(manifest.get("version"))} is not {VERSION}, which is read here'
    classes = manifest.get('classes')
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return 'classes is no list of texts'
    if type(manifest.get('max_labels')) is not int or not 0 < manifest['max_labels'] < 2**16:
        return f'max_labels is {brief(repr(manifest.get("max_labels")))}, not a number above 0'
    splits = manifest.get('splits')
    if not isinstance(splits, dict) or not splits:
        return 'splits is no object with splits in it'
    seen = set()
    for split, shards in splits.items():
        if not isinstance(shards, list) or not shards:
            return f'split {brief(repr(split))} has no shards'
        for i, shard in enumerate(shards):
            problem = wrong_shard(shard, seen)
            if problem:
                return f'shard {i} of split {brief(repr(split))}: {problem}'
    return None


def wrong_shard(shard, seen):
    """What is wrong with the entry of a shard, or None; adds its file to those `seen`."""
    if not isinstance(shard, dict):
        return 'no object'
    name = shard.get('file')
    if not isinstance(name, str) or not re.fullmatch(r'\w[\w.=+-]{0,200}', name, re.ASCII):
        return f'file is {brief(repr(name))}, which is no plain name'
    if name in seen:
        return f'file {name} is there twice'
    seen.add(name)
    for key in ('examples', 'bytes'):
        if type(shard.get(key)) is not int or not 0 < shard[key] < 2**45:
            return f'{key} is {brief(repr(shard.get(key)))}, not a number above 0'
    digest = shard.get('sha256')
    if not isinstance(digest, str) or not re.fullmatch('[0-9a-f]{64}', digest):
        return f'sha256 is {brief(repr(digest))}'
    return None


class OpenFiles:
    """Examples in several files, of which some stay open; thread-safe.

    Pickled without the open files: another process opens them again. `ends` int64 [files] counts
    the examples up to the end of each file, `readers` are the open files by index, under `lock`.
    """

    def close(self):
        """Closes all files; the next example opens one again."""
        self.readers, self.lock = collections.OrderedDict(), threading.Lock()

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ('readers', 'lock')}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.close()

    def locate(self, i):
        """(index of the file, position in it) of example i; raises IndexError."""
        i = int(i)
        if not 0 <= i < len(self):
            raise IndexError(f'no example {i} among {len(self)}')
        k = int(np.searchsorted(self.ends, i, side='right'))
        return k, i - (int(self.ends[k - 1]) if k else 0)


class Records(OpenFiles):
    """Records {'image': bytes, 'label': ...} of one split of a prepared folder, or an address.

    A label is an int if the data set has one per image, else int32 [max_labels], padded with -1.
    Memory is proportional to the number of shards, not of examples. A shard at an address is
    downloaded when its first record is read, and kept in the cache.
    """

    def __init__(self, folder, split='train', *, manifest=None):
        folder = os.path.expanduser(os.fspath(folder))
        manifest = read_manifest(folder) if manifest is None else manifest
        if split not in manifest['splits']:
            raise splits.missing(folder, split, manifest['splits'])
        shards = manifest['splits'][split]
        self.folder, self.split = folder, split
        self.classes, self.max_labels = tuple(manifest['classes']), manifest['max_labels']
        self.files = [shard['file'] for shard in shards]
        self.sizes = np.array([shard['bytes'] for shard in shards], np.int64)
        self.digests = np.array([shard['sha256'] for shard in shards], 'S64')
        self.ends = np.cumsum(np.array([shard['examples'] for shard in shards], np.int64))
        self.close()

    def __len__(self):
        return int(self.ends[-1])

    def read(self, i):
        """(bytes, labels, name) of example i; raises UserError with the shard if it is damaged."""
        k, position = self.locate(i)
        try:
            features = example.decode(self.reader(k).read([position])[0])
            labels = example.integers(features, 'label') if 'label' in features else ()
            name = example.one_bytes(features, 'name') if 'name' in features else b''
            image = example.one_bytes(features, 'image')
            return image, labels, name.decode('utf-8', 'surrogateescape')
        except (RuntimeError, ValueError) as e:
            if isinstance(e, UserError):
                raise
            raise UserError(
                f'record {position} of {beside(self.folder, self.files[k])} is damaged: {brief(e)}'
            ) from e

    def __getitem__(self, i):
        image, labels, _ = self.read(i)
        count = len(self.classes)
        if len(labels) > self.max_labels or (self.max_labels == 1 and not labels):
            raise UserError(f'{self.place(i)} has {len(labels)} labels of {self.max_labels}')
        if not all(0 <= label < count for label in labels):
            raise UserError(f'{self.place(i)} has labels {brief(labels)} among {count} classes')
        return {'image': image, 'label': names.padded(labels, self.max_labels)}

    def traits(self):
        return [self.split, self.ends], [self.digests]

    def place(self, i):
        k, position = self.locate(i)
        return f'{beside(self.folder, self.files[k])}[{position}]'

    def name(self, i):
        """Shard and position of example i, and its original name if that can be read."""
        try:
            name = self.read(i)[2]
        except UserError:
            name = ''
        return f'{self.place(i)} ({brief(name)})' if name else self.place(i)

    def reader(self, k):
        """Reader of shard k; of many, those used last stay open."""
        with self.lock:
            if k in self.readers:
                self.readers.move_to_end(k)
                return self.readers[k]
        reader = self.opened(k)  # not under the lock: it may be downloaded first
        with self.lock:
            self.readers[k] = reader
            while len(self.readers) > most_open():
                self.readers.popitem(last=False)  # closed with the last thread that reads from it
        return reader

    def opened(self, k):
        """Opens a new reader of shard k; raises UserError if it is not as in the manifest."""
        name, size = self.files[k], int(self.sizes[k])
        path = pathlib.Path(beside(self.folder, name))
        if '://' in self.folder:
            path = cached(beside(self.folder, name), size, self.digests[k].decode())
        examples = int(self.ends[k]) - (int(self.ends[k - 1]) if k else 0)
        try:
            found = path.stat().st_size
        except OSError as e:
            raise UserError(f'can not read shard {path}: {e.strerror or e}') from e
        if found != size:
            raise UserError(f'shard {path} has {found:,} bytes, {size:,} by its {MANIFEST}')
        reader = ArrayRecordReader(str(path), READER, file_reader_buffer_size=BUFFER)
        if not reader.ok():
            raise UserError(f'shard {path} is damaged: {refusal(reader)}')
        if reader.num_records() != examples:
            raise UserError(
                f'shard {path} has {reader.num_records():,} records, {examples:,} by its {MANIFEST}'
            )
        return reader


def refusal(reader):
    """Error message of a reader that is not ok."""
    try:
        reader.read([0])
    except RuntimeError as e:
        return brief(e)
    return 'its reader gives no reason'


def most_open():
    """Number of shards to keep open: a quarter of the process's file descriptors at most."""
    return min(MOST_OPEN, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))


def cached(address, size, digest):
    """Local copy of a shard; the path exists only once it is complete and verified."""
    folder, _, name = address.rpartition('/')
    folder = fetch.cache_folder(folder) / digest  # so that another version has another path
    path = folder / name
    if path.exists():
        return path
    with fetch.explained(address):
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder / '.lock'):
            if not path.exists():  # else another thread or process has just fetched it
                atomic.remove_leftovers(folder)
                download(address, path, size, digest)
    return path


@contextlib.contextmanager
def alone(lock):
    """Holds a lock file against other threads and processes."""
    file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: all download
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def download(address, path, size, digest):
    """Downloads a shard, verifies it against the manifest and moves it into place."""
    fs, remote = fetch.backend(address)
    file = fetch.File(path.name, remote, {'size': size})
    with atomic.replace_file(path) as part:
        fetch.download(fs, file, part, address, lambda value: None)
        with part.open('rb') as f:
            if hashlib.file_digest(f, 'sha256').hexdigest() != digest:
                raise UserError(f'{address} is not the shard that its {MANIFEST} names (sha256)')
