"""Examples that are byte ranges of files, local or at an address, and indices of them."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import sys
import threading
import time
import zipfile
from functools import partial

import numpy as np

from vit_jax.data.readers import records
from vit_jax.errors import UserError
from vit_jax.io import atomic, fetch, reasons
from vit_jax.io.text import brief, printable

THREADS = 8  # to index files; they wait for the disk or the network
ATTEMPTS = 4  # to read from an address, one, two and four seconds apart
SLACK = 2**20  # bytes by which an index may be larger than its file


class Ranges(records.OpenFiles):
    """Byte ranges of many files (paths or addresses); picklable, thread-safe.

    File k has examples ends[k - 1] to ends[k]; example i is `sizes[i]` bytes at `offsets[i]`. Only
    these bytes are fetched from an address.
    """

    def __init__(self, files, counts, offsets, sizes):
        self.files, self.ends = files, np.cumsum(np.asarray(counts, np.int64))
        self.offsets, self.sizes = offsets, sizes
        self.close()

    def __len__(self):
        return len(self.offsets)

    def name(self, i):
        k, position = self.locate(i)
        return f'{self.files[k]}[{position}]'

    def read(self, i):
        """Bytes of example i; raises UserError with its name if they can't be read."""
        k, _ = self.locate(i)
        start, size = int(self.offsets[i]), int(self.sizes[i])
        for attempt in range(ATTEMPTS):
            try:
                data = self.reader(k)(start, size)
                break
            except Exception as e:
                if isinstance(e, UserError) or not reasons.foreign(e):
                    raise
                if attempt + 1 == ATTEMPTS or not reasons.silent(e):
                    raise UserError(f'can not read {self.name(i)}: {reasons.reason(e)}') from e
                time.sleep(2**attempt)
        if len(data) != size:
            raise UserError(
                f'{self.name(i)}: {len(data):,} bytes came of {size:,} at {start:,}: the file has '
                'changed, or its server gives no parts of files'
            )
        return data

    def reader(self, k):
        """Function (start, size) -> bytes of file k; of many, those used last stay open."""
        with self.lock:
            if k not in self.readers:
                self.readers[k] = reader(self.files[k])
                while len(self.readers) > records.most_open():
                    self.readers.popitem(last=False)  # closed with the last thread that reads
            self.readers.move_to_end(k)
            return self.readers[k]


def reader(file):
    """Function (start, size) -> bytes of a file, at a path or an address."""
    if '://' in file:
        fs, path = fetch.backend(file)
        return lambda start, size: fs.cat_file(path, start=start, end=start + size) if size else b''
    handle = open(file, 'rb', buffering=0)  # owned by the function, and closed with it
    return lambda start, size: os.pread(handle.fileno(), size, start)


def index(files, scan, settings, *, beside):
    """Dict of arrays that scan(stream, file, size) returns, for each file in order.

    Earlier results are read from the files' sidecars if these have the same `settings` and the
    files have not changed. `beside`: sidecars are written beside the files where possible.
    """
    work = partial(indexed, scan=scan, settings=settings, beside=beside, told=Told(len(files)))
    pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    try:
        return list(pool.map(work, files))
    finally:
        pool.shutdown(cancel_futures=True)  # if one fails, no others start


class Told:
    """Reports once that files are being indexed, which takes a while the first time."""

    def __init__(self, count):
        self.count, self.lock = count, threading.Lock()

    def __call__(self, file):
        with self.lock:
            if self.count:
                said = f'indexing {file} and the like, {self.count} in all'
                print(printable(said), file=sys.stderr)
            self.count = 0


def indexed(file, *, scan, settings, beside, told):
    """Index of one file: from its sidecar, or made and stored now."""
    with reading(file):
        known = identity(file)
        stamp = json.dumps({**known, **settings}, sort_keys=True)
        places = sidecars(file, beside)
        if len(known) > 1:  # a size alone does not show that a file has changed
            for place in places:
                found = load(place, stamp, known['size'])
                if found is not None:
                    return found
        told(file)
        size = known.get('size')
        if size is None:
            raise UserError(f'{file}: the server does not say how long it is')
        with opened(file) as stream:
            found = scan(stream, file, size)
    for place in places if len(known) > 1 else ():
        with contextlib.suppress(OSError):  # the disk is full or read-only
            store(place, stamp, found)
            break
    return found


@contextlib.contextmanager
def reading(file):
    """Turns an error of the disk or a server into UserError with the file's name."""
    try:
        yield
    except Exception as e:
        if isinstance(e, UserError) or not reasons.foreign(e):
            raise
        reason = getattr(e, 'strerror', None) or reasons.reason(e)
        raise UserError(f'can not read {file}: {brief(reason)}') from e


def identity(file):
    """Identifies a version of a file: its size and time, or what its server reports."""
    if '://' in file:
        fs, path = fetch.backend(file)
        return fetch.said(fs.info(path))
    stat = os.stat(file)
    return {'size': stat.st_size, 'mtime_ns': stat.st_mtime_ns}


def opened(file):
    """Opens a binary stream of a file for scattered reads."""
    if '://' in file:
        fs, path = fetch.backend(file)
        return fs.open(path, 'rb')
    return open(file, 'rb', buffering=4096)  # a header, a label and the next header


def sidecars(file, beside):
    """Paths where the index of a file may be."""
    if '://' in file:
        return [fetch.cache_folder(file) / 'index.npz']
    cached = fetch.cache_folder(os.path.abspath(file)) / 'index.npz'
    return [pathlib.Path(f'{file}.index.npz'), cached] if beside else [cached]


def store(place, stamp, arrays):
    """Writes an index atomically; raises OSError if the disk refuses."""
    if place.name == 'index.npz':
        place.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replace_file(place, sync=False) as part, part.open('wb') as out:
        np.savez(out, stamp=np.frombuffer(stamp.encode(), np.uint8), **arrays)


def load(place, stamp, size):
    """Arrays of a sidecar; None if it is of another file or another format, or damaged."""
    try:
        with zipfile.ZipFile(place) as file:
            if sum(entry.file_size for entry in file.infolist()) > size + SLACK:
                return None  # an index is smaller than its file; this one would take memory
        with np.load(place, allow_pickle=False) as file:
            if file['stamp'].tobytes() != stamp.encode():
                return None
            arrays = {key: file[key] for key in file.files if key != 'stamp'}
        within = (arrays['offsets'] >= 0) & (arrays['sizes'] >= 0)
        within &= arrays['offsets'] <= size - arrays['sizes']
        return arrays if within.all() else None
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile):
        return None
