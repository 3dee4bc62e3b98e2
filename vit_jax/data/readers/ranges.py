"""Examples that are byte ranges of files, local or at an address."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from vit_jax.data.readers import facts, open_files
from vit_jax.errors import UserError
from vit_jax.io import addresses, reasons
from vit_jax.io.text import brief

ATTEMPTS = 4  # to read from an address, one, two and four seconds apart
BLOCK = 2**16  # bytes, of which `blocks_digest` reads some


class Ranges(open_files.OpenFiles):
    """Byte ranges of many files (paths or addresses); picklable, thread-safe.

    Example i is `sizes[i]` bytes at `offsets[i]` of its file (int64 [n] each); file k has
    `counts[k]` of them. Only these bytes are fetched from an address.
    """

    def __init__(
        self, files: Sequence[str], counts: Sequence[int], offsets: np.ndarray, sizes: np.ndarray
    ):
        self.files, self.ends = files, np.cumsum(np.asarray(counts, np.int64))
        self.offsets, self.sizes = offsets, sizes
        self.close()

    def name(self, i: int) -> str:
        """File of example i and its position there."""
        k, position = self.locate(i)
        return f'{self.files[k]}[{position}]'

    def read(self, i: int) -> bytes:
        """Bytes of example i; raises UserError with its name if they can't be read."""
        return self.read_range(i, int(self.offsets[i]), int(self.sizes[i]))

    def read_range(self, i: int, start: int, size: int) -> bytes:
        """Other bytes of the file of example i; raises UserError with its name."""
        k, _ = self.locate(i)
        for attempt in range(ATTEMPTS):
            try:
                data = self.reader(k)(start, size)
                break
            except Exception as e:
                if isinstance(e, UserError) or not reasons.is_external(e):
                    raise
                if attempt + 1 == ATTEMPTS or not reasons.is_unanswered(e):
                    raise UserError(f'cannot read {self.name(i)}: {reasons.reason(e)}') from e
                time.sleep(2**attempt)
        if len(data) != size:
            raise UserError(
                f'{self.name(i)}: got {len(data):,} of {size:,} bytes at {start:,}: the file has '
                'changed, or its server does not serve byte ranges'
            )
        return data

    def is_local(self) -> bool:
        """Whether all files are on disks."""
        return not any('://' in file for file in self.files)

    def open_file(self, k: int) -> Callable[[int, int], bytes]:
        return reader(self.files[k])


def reader(file: str) -> Callable[[int, int], bytes]:
    """Function (start, size) -> bytes of a file, at a path or an address."""
    if '://' in file:
        fs, path = addresses.backend(file)
        return lambda start, size: fs.cat_file(path, start=start, end=start + size) if size else b''
    handle = open(file, 'rb', buffering=0)  # owned by the function, and closed with it
    return lambda start, size: os.pread(handle.fileno(), size, start)


def blocks_digest(files: Sequence[str]) -> str:
    """`facts.sample_digest` of blocks of local files, for formats that are slow by example."""
    counts = [-(-os.stat(file).st_size // BLOCK) for file in files]
    ends = np.cumsum(counts)

    def read(i):
        k = int(np.searchsorted(ends, i, side='right'))
        with open(files[k], 'rb', buffering=0) as file:
            return os.pread(file.fileno(), BLOCK, (i - int(ends[k]) + counts[k]) * BLOCK)

    return facts.sample_digest(read, int(ends[-1]) if len(ends) else 0)


@contextlib.contextmanager
def reading(file: str) -> Iterator[None]:
    """Turns an error of the disk or a server into UserError with the file's name."""
    try:
        yield
    except Exception as e:
        if isinstance(e, UserError) or not reasons.is_external(e):
            raise
        reason = getattr(e, 'strerror', None) or reasons.reason(e)
        raise UserError(f'cannot read {file}: {brief(reason)}') from e


def identity(file: str) -> dict[str, Any]:
    """Identifies a version of a file: its size and time, or what its server reports."""
    if '://' in file:
        fs, path = addresses.backend(file)
        return addresses.version(fs.info(path))
    stat = os.stat(file)
    return {'size': stat.st_size, 'mtime_ns': stat.st_mtime_ns}


def open_stream(file: str) -> BinaryIO:
    """Opens a binary stream of a file for scattered reads."""
    if '://' in file:
        fs, path = addresses.backend(file)
        return fs.open(path, 'rb')
    return open(file, 'rb', buffering=4096)  # a header, a label and the next header
