"""Indices of files that are slow to scan, stored in sidecars beside them or in the cache."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import sys
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from vit_jax.data.readers import ranges
from vit_jax.errors import UserError
from vit_jax.io import addresses, atomic
from vit_jax.io.text import printable

THREADS = 8  # to index files; they wait for the disk or the network
SLACK = 2**20  # bytes by which an index may be larger than its file
Index = dict[str, np.ndarray]
Scan = Callable[[BinaryIO, str, int], Index]


def build(
    files: Sequence[str], scan: Scan, settings: Mapping[str, Any], *, beside: bool
) -> list[Index]:
    """Dict of arrays that scan(stream, file, size) returns, for each file in order.

    Earlier results are read from the files' sidecars if these have the same `settings` and the
    files have not changed. `beside`: sidecars are written beside the files where possible.
    """
    work = partial(
        index_file, scan=scan, settings=settings, beside=beside, announce=Announce(len(files))
    )
    pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    try:
        return list(pool.map(work, files))
    finally:
        pool.shutdown(cancel_futures=True)  # if one fails, no others start


class Announce:
    """Reports once that files are being indexed, which takes a while the first time."""

    def __init__(self, count: int):
        self.count, self.lock = count, threading.Lock()

    def __call__(self, file: str) -> None:
        with self.lock:
            if self.count:
                more = f' and {self.count - 1} more files' if self.count > 1 else ''
                print(printable(f'indexing {file}{more}'), file=sys.stderr)
            self.count = 0


def index_file(
    file: str,
    *,
    scan: Scan,
    settings: Mapping[str, Any],
    beside: bool,
    announce: Callable[[str], None],
) -> Index:
    """Index of one file: from its sidecar, or made and stored now."""
    with ranges.reading(file):
        version = ranges.identity(file)
        stamp = json.dumps({**version, **settings}, sort_keys=True)
        places = sidecars(file, beside)
        if len(version) > 1:  # a size alone does not show that a file has changed
            for place in places:
                found = load(place, stamp, version['size'])
                if found is not None:
                    return found
        announce(file)
        size = version.get('size')
        if size is None:
            raise UserError(f'{file}: the server does not report its size')
        with ranges.open_stream(file) as stream:
            found = scan(stream, file, size)
    for place in places if len(version) > 1 else ():
        with contextlib.suppress(OSError):  # the disk is full or read-only
            store(place, stamp, found)
            break
    return found


def sidecars(file: str, beside: bool) -> list[pathlib.Path]:
    """Paths where the index of a file may be."""
    if '://' in file:
        return [addresses.cache_folder(file) / 'index.npz']
    cached = addresses.cache_folder(os.path.abspath(file)) / 'index.npz'
    return [pathlib.Path(f'{file}.index.npz'), cached] if beside else [cached]


def store(place: pathlib.Path, stamp: str, arrays: Index) -> None:
    """Writes an index atomically; raises OSError if the disk refuses."""
    if place.name == 'index.npz':
        place.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replace_file(place, sync=False) as part, part.open('wb') as out:
        np.savez(out, stamp=np.frombuffer(stamp.encode(), np.uint8), **arrays)


def load(place: pathlib.Path, stamp: str, size: int) -> Index | None:
    """Arrays of a sidecar; None if it is of another file or another format, or damaged."""
    try:
        with zipfile.ZipFile(place) as file:
            if sum(entry.file_size for entry in file.infolist()) > size + SLACK:
                return None  # an index is smaller than its file; this one would take memory
        with np.load(place, allow_pickle=False) as file:
            if file['stamp'].tobytes() != stamp.encode():
                return None
            arrays = {key: file[key] for key in file.files if key != 'stamp'}
        sound = within(arrays['offsets'], arrays['sizes'], size)
        if 'member_offsets' in arrays:
            sound &= within(arrays['member_offsets'], arrays['member_sizes'], size)
        return arrays if sound else None
    except Exception:  # NumPy and zipfile raise any for damaged data
        return None


def within(offsets: np.ndarray, sizes: np.ndarray, size: int) -> bool:
    """Whether all byte ranges lie within a file of `size` bytes."""
    return bool(((offsets >= 0) & (sizes >= 0) & (offsets <= size - sizes)).all())
