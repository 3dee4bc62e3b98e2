"""Reads prepared data sets, the folders of `records` that `prepare` writes."""

import contextlib
import fcntl
import hashlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from vit_jax.data.readers import example, facts, names, open_files, records, splits
from vit_jax.data.readers.record import Record
from vit_jax.errors import UserError
from vit_jax.io import addresses, atomic, fetch
from vit_jax.io.text import brief

READER = 'readahead_buffer_size:0,max_parallelism:0'  # the defaults read ahead: 40 times slower
BUFFER = 32768  # bytes; longer reads bypass the buffer


class Prepared(open_files.OpenFiles):
    """Records of one split of a prepared folder, or of one at an address.

    They have `image`, `label`, `name` and what other features their tf.train.Example has. A label
    is an int if the data set has one per image, else int32 [max_labels], padded with -1. Memory is
    proportional to the number of shards, not of examples. A shard at an address is downloaded when
    its first record is read, and kept in the cache. Without labels (max_labels 0) they have none,
    and `labels`, those of objects, are numbers of classes.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        split: str = 'train',
        *,
        manifest: dict[str, Any] | None = None,
    ):
        folder = os.path.expanduser(os.fspath(folder))
        manifest = records.read_manifest(folder) if manifest is None else manifest
        if split not in manifest['splits']:
            raise splits.missing(folder, split, manifest['splits'])
        shards = manifest['splits'][split]
        self.folder, self.split = folder, split
        self.classes, self.max_labels = tuple(manifest['classes']), manifest['max_labels']
        self.label_fields = ('label',) if self.max_labels else ('labels',)
        self.files = [shard['file'] for shard in shards]
        self.sizes = np.array([shard['bytes'] for shard in shards], np.int64)
        self.digests = np.array([shard['sha256'] for shard in shards], 'S64')
        self.ends = np.cumsum(np.array([shard['examples'] for shard in shards], np.int64))
        self.close()

    def read_bytes(self, i: int) -> bytes:
        """The encoded record of example i; raises UserError or RuntimeError."""
        k, position = self.locate(i)
        return self.reader(k).read([position])[0]

    def decode(self, i: int) -> dict[str, Any]:
        """`image`, `label` (a tuple), `name` and other features of example i.

        Raises UserError with the shard if the record is damaged.
        """
        try:
            features = example.decode(self.read_bytes(i))
            fields = {'image': example.one_bytes(features, 'image')}
            fields['label'] = example.integers(features, 'label') if 'label' in features else ()
            name = example.one_bytes(features, 'name') if 'name' in features else b''
        except (RuntimeError, ValueError) as e:
            if isinstance(e, UserError):
                raise
            k, position = self.locate(i)
            path = records.beside(self.folder, self.files[k])
            raise UserError(f'record {position} of {path} is damaged: {brief(e)}') from e
        fields['name'] = name.decode('utf-8', 'surrogateescape')
        if len(features) > len(fields):
            others = features.keys() - fields.keys()
            fields |= {key: example.value(features[key]) for key in sorted(others)}
        return fields

    def __getitem__(self, i: int) -> Record:
        fields = self.decode(i)
        labels, count = fields['label'], len(self.classes)
        if len(labels) > self.max_labels or (self.max_labels == 1 and not labels):
            raise UserError(f'{self.place(i)} has {len(labels)} labels, not {self.max_labels}')
        if not all(0 <= label < count for label in labels):
            raise UserError(f'{self.place(i)} has labels {brief(labels)} among {count} classes')
        if self.max_labels:
            fields['label'] = names.pad_labels(labels, self.max_labels)
        else:
            del fields['label']
        return Record(fields)

    def traits(self) -> facts.Traits:
        """See `facts`."""
        local = '://' not in self.folder
        sample = [facts.sample_digest(self.read_bytes, len(self))] if local else []
        return facts.Traits([self.split, self.ends], [self.digests], sample)

    def place(self, i: int) -> str:
        """Shard and position of example i."""
        k, position = self.locate(i)
        return f'{records.beside(self.folder, self.files[k])}[{position}]'

    def name(self, i: int) -> str:
        """Shard and position of example i, and its original name if that can be read."""
        try:
            name = self.decode(i)['name']
        except UserError:
            name = ''
        return f'{self.place(i)} ({brief(name)})' if name else self.place(i)

    def open_file(self, k: int) -> ArrayRecordReader:
        """Opens a new reader of shard k; raises UserError if it is not as in the manifest."""
        name, size = self.files[k], int(self.sizes[k])
        path = pathlib.Path(records.beside(self.folder, name))
        if '://' in self.folder:
            path = cached(records.beside(self.folder, name), size, self.digests[k].decode())
        examples = int(self.ends[k]) - (int(self.ends[k - 1]) if k else 0)
        try:
            found = path.stat().st_size
        except OSError as e:
            raise UserError(f'cannot read shard {path}: {e.strerror or e}') from e
        if found != size:
            raise UserError(f'shard {path} has {found:,} bytes, {size:,} by its {records.MANIFEST}')
        reader = ArrayRecordReader(str(path), READER, file_reader_buffer_size=BUFFER)
        if not reader.ok():
            raise UserError(f'shard {path} is damaged: {reader_error(reader)}')
        if reader.num_records() != examples:
            raise UserError(
                f'shard {path} has {reader.num_records():,} records, {examples:,} by its '
                f'{records.MANIFEST}'
            )
        return reader


def reader_error(reader: ArrayRecordReader) -> str:
    """Error message of a reader that is not ok."""
    try:
        reader.read([0])
    except RuntimeError as e:
        return brief(e)
    return 'its reader gives no reason'


def cached(address: str, size: int, digest: str) -> pathlib.Path:
    """Local copy of a shard; the path exists only once it is complete and verified."""
    folder, _, name = address.rpartition('/')
    folder = addresses.cache_folder(folder) / digest  # so that another version has another path
    path = folder / name
    if path.exists():
        return path
    with addresses.explained(address):
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / '.lock'):
            if not path.exists():  # else another thread or process has just fetched it
                atomic.remove_leftovers(folder)
                download(address, path, size, digest)
    return path


@contextlib.contextmanager
def file_lock(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock file against other threads and processes."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: all download
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def download(address: str, path: pathlib.Path, size: int, digest: str) -> None:
    """Downloads a shard, verifies it against the manifest and moves it into place."""
    fs, remote = addresses.backend(address)
    file = addresses.File(path.name, remote, {'size': size})
    with atomic.replace_file(path) as part:
        fetch.download(fs, file, part, address, lambda value: None)
        with part.open('rb') as f:
            if hashlib.file_digest(f, 'sha256').hexdigest() != digest:
                raise UserError(
                    f'{address} is not the shard that its {records.MANIFEST} names (sha256)'
                )
