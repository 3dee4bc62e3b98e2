"""Reads arrays from untrusted .npz and .safetensors files.

Whatever a file claims is checked against its size before memory is allocated. Nothing is unpickled
and nothing is extracted to disk. Arrays are read on demand, one at a time.
"""

import contextlib
import io
import json
import math
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from vit_jax.errors import UserError
from vit_jax.io.text import brief

MOST_EXPANSION = 4  # of a compressed .npz; random weights shrink by a tenth at most
MOST_HEADER = 10_000_000  # bytes of a file's list of arrays; parsed, it takes 20 times that
MOST_NAME = 500  # characters of an array's name
MOST_AXES = 32
MOST_VALUES = 2**63  # of an axis, and of an array: 64-bit sizes
MOST_VALUE = float(np.finfo(np.float32).max)  # parameters are float32
CHUNK = 2**22  # bytes read at once
FLOATS = {
    'F64': np.dtype('float64'), 'F32': np.dtype('float32'), 'F16': np.dtype('float16'),
    'BF16': np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
SIZES = {
    **{kind: dtype.itemsize for kind, dtype in FLOATS.items()},
    'I64': 8, 'U64': 8, 'I32': 4, 'U32': 4, 'I16': 2, 'U16': 2, 'I8': 1, 'U8': 1, 'BOOL': 1,
    'F8_E4M3': 1, 'F8_E5M2': 1, 'C64': 8,
}  # fmt: skip


class Array(NamedTuple):
    """An array in a file: its shape is known, its values are not read yet."""

    shape: tuple[int, ...]
    dtype: str
    fill: Callable[[np.ndarray], None]  # reads the stored bytes into uint8 [bytes]
    stored: np.dtype | None  # None: not floating-point

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """Reads the values in their stored dtype, into `out` if its dtype and layout allow it.

        Raises UserError for damaged data and for values that are not finite or too large for
        float32.
        """
        if self.stored is None:
            raise UserError(f'array {name} has dtype {self.dtype}, which no weight has')
        direct = out is not None and out.dtype == self.stored and out.flags.c_contiguous
        values = out.reshape(-1) if direct else np.empty(math.prod(self.shape), self.stored)
        with explain_damage(name):
            self.fill(values.view(np.uint8))
        if values.size:
            with np.errstate(invalid='ignore'):
                low, high = float(values.min()), float(values.max())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise UserError(f'array {name} has values that are not finite')
            if low < -MOST_VALUE or high > MOST_VALUE:
                raise UserError(f'array {name} has values that are too large for float32')
        return values.reshape(self.shape)


def array_in_memory(value: np.ndarray) -> Array:
    """Wraps an array in memory as an `Array`."""

    def fill(out: np.ndarray) -> None:
        out[...] = value.reshape(-1).view(out.dtype)

    return Array(value.shape, str(value.dtype), fill, value.dtype)


class LimitedReader(io.BufferedReader):
    """A file that limits the size of a read: a false size in it cannot exhaust memory."""

    def read(self, size: int = -1) -> bytes:
        if size > max(MOST_HEADER, CHUNK):
            raise UserError(f'its list of arrays claims {size:,} bytes; refused')
        return super().read(size)


@contextlib.contextmanager
def open_arrays(path: str | os.PathLike) -> Iterator[dict[str, Array]]:
    """Opens a file as {name: Array}, which can be read while the context is open.

    Raises UserError for a damaged or hostile file.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
            raise UserError('it is not a regular file')
        with LimitedReader(io.FileIO(path)) as file:
            read = read_npz if str(path).endswith('.npz') else read_safetensors
            arrays = read(file)
            if not arrays:
                raise UserError('the file has no arrays')
            yield arrays
    except UserError as e:
        raise UserError(f'{path}: {e}') from e
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror or e}') from e


def check_name(name: str) -> str:
    """Returns the name of an array.

    Raises UserError if it is empty or too long, leads out of a folder, or has control characters.
    """
    invalid = not name or '..' in name or name.startswith(('/', '\\')) or not name.isprintable()
    if invalid or len(name) > MOST_NAME:
        raise UserError(f'array name {brief(ascii(name))} is refused')
    return name


def count_bytes(name: str, shape: Sequence[Any], itemsize: int) -> int:
    """Size of an array in bytes; raises UserError for an impossible shape."""
    valid = len(shape) <= MOST_AXES and all(type(n) is int and 0 <= n < MOST_VALUES for n in shape)
    if not valid or math.prod(shape) >= MOST_VALUES:
        raise UserError(f'array {name} claims an impossible shape {brief(list(shape[:MOST_AXES]))}')
    return math.prod(shape) * itemsize


def read_npz(file: BinaryIO) -> dict[str, Array]:
    """{name: Array} of an open .npz file."""
    size = os.fstat(file.fileno()).st_size
    try:
        archive = zipfile.ZipFile(file)
    except UserError:
        raise
    except Exception as e:  # zipfile trusts what the file states: any error may result
        raise UserError(f'not an .npz file, or a damaged one ({brief(e)})') from e
    members = archive.infolist()
    expanded = sum(m.file_size for m in members)
    if expanded > MOST_EXPANSION * size:
        raise UserError(f'its {size:,} bytes claim to hold {expanded:,}; refused')
    check_no_overlap(file, members, archive.start_dir)
    arrays = {}
    for member in members:
        name = check_name(member.filename.removesuffix('.npy'))
        if name in arrays:
            raise UserError(f'array {name} occurs twice')
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f'array {name} is compressed in a way that NumPy does not write')
        arrays[name] = read_npy(archive, member, name)
    return arrays


def check_no_overlap(file: BinaryIO, members: Sequence[zipfile.ZipInfo], end: int) -> None:
    """Raises UserError if members overlap or extend past `end`, where the zip directory starts."""
    for member in sorted(members, key=lambda m: m.header_offset, reverse=True):
        start = member.header_offset
        if start >= 0:
            file.seek(start + 26)  # lengths of the text after the 30-byte local header
            text = sum(struct.unpack('<HH', file.read(4).ljust(4, b'\xff')))
        if start < 0 or start + 30 + text + member.compress_size > end:
            name = check_name(member.filename.removesuffix('.npy'))
            raise UserError(f'array {name} claims bytes that are not its own')
        end = start


def zip_digest(path: str | os.PathLike) -> int:
    """Checksum of all arrays of an .npz, computed from the checksums that the file stores."""
    with zipfile.ZipFile(path) as archive:
        rows = sorted((m.filename, m.file_size, m.CRC) for m in archive.infolist())
    return zlib.crc32(repr(rows).encode())


def read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> Array:
    """A member of an .npz as an Array; reads only its header."""
    with explain_damage(name), archive.open(member) as stream:
        shape, fortran, dtype = read_npy_header(stream)
        start = stream.tell()
    if dtype.hasobject:
        raise UserError(f'array {name} is pickled, and pickles are refused')
    if dtype == np.dtype('V2'):  # as NumPy saves bfloat16
        dtype = np.dtype(ml_dtypes.bfloat16)
    count = count_bytes(name, shape, dtype.itemsize)
    if count != member.file_size - start:
        raise UserError(
            f'array {name} claims {count:,} bytes {list(shape)} {brief(dtype)}, but has '
            f'{member.file_size - start:,}'
        )

    def fill(out: np.ndarray) -> None:
        with archive.open(member) as stream:
            stream.read(start)
            values_read = np.empty_like(out) if fortran else out
            read_fully(stream, values_read)
        if fortran:  # Fortran order: the first axis varies fastest
            values = values_read.view(dtype).reshape(shape[::-1]).T
            out.view(dtype).reshape(shape)[...] = values

    is_float = dtype.kind == 'f' and dtype.isnative and dtype.itemsize <= 8
    stored = dtype if is_float or dtype == ml_dtypes.bfloat16 else None
    return Array(tuple(shape), brief(dtype), fill, stored)


def read_npy_header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads (shape, whether in Fortran order, dtype) from the start of a .npy stream."""
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)  # fmt: skip
    if read is None:
        raise UserError(f'.npy format {version} is unknown')
    return read(stream)


@contextlib.contextmanager
def explain_damage(name: str) -> Iterator[None]:
    """Turns any error of zipfile and NumPy over a damaged array into UserError."""
    try:
        yield
    except (UserError, zipfile.BadZipFile, zlib.error, EOFError) as e:
        raise UserError(f'array {name} is damaged ({brief(e)})') from e
    except Exception as e:  # NumPy parses headers as Python literals: any error may result
        raise UserError(f'array {name} cannot be read ({type(e).__name__}: {brief(e)})') from e


def read_fully(stream: BinaryIO, out: np.ndarray) -> None:
    """Fills `out`, uint8 [n], from a stream; raises UserError if the stream ends early."""
    view, done = memoryview(out), 0
    while done < len(view):
        count = stream.readinto(view[done : done + CHUNK])
        if not count:
            raise UserError(f'the data ends after {done:,} of {len(view):,} bytes')
        done += count


def read_safetensors(file: BinaryIO) -> dict[str, Array]:
    """{name: Array} of an open .safetensors file.

    The header is parsed here, by the rules of the format: offsets in order, without gaps or
    overlaps. The format's own library maps the file, whose pages then count in addition to the
    arrays.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), 'little')
    if size < 8 or length > size - 8:
        raise UserError(f'its header claims {length:,} bytes, but the file has {size:,}')
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=unique_dict)
    except UserError:
        raise
    except (ValueError, RecursionError) as e:
        raise UserError(f'not a .safetensors file, or a damaged one (header: {brief(e)})') from e
    if not isinstance(header, dict):
        raise UserError('not a .safetensors file: its header is not an object')
    header.pop('__metadata__', None)
    spans, arrays = [], {}
    for name, entry in header.items():
        shape, dtype, (begin, end) = parse_entry(name, entry)
        spans.append((begin, end, name))
        arrays[name] = Array(shape, dtype, reader_from(file, 8 + length + begin), FLOATS.get(dtype))
    offset = 0
    for begin, end, name in sorted(spans):
        if begin != offset:
            raise UserError(f'array {name} begins at byte {begin:,} instead of {offset:,}')
        offset = end
    available = size - 8 - length
    if offset != available:
        raise UserError(f'its arrays take {offset:,} bytes, the file has {available:,} for them')
    return arrays


def unique_dict(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a dict from pairs; raises ValueError for a repeated name."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError('a name occurs twice')
    return dict(pairs)


def parse_entry(name: str, entry: Any) -> tuple[tuple[int, ...], str, tuple[int, int]]:
    """(shape, dtype, offsets) of a header entry; raises UserError if it is inconsistent."""
    check_name(name)
    entry = entry if isinstance(entry, dict) else {}
    shape, dtype, offsets = (entry.get(key) for key in ('shape', 'dtype', 'data_offsets'))
    valid = isinstance(shape, list) and isinstance(dtype, str) and isinstance(offsets, list)
    if not valid or len(offsets) != 2:
        raise UserError(f'the header has an invalid entry for array {name}')
    if dtype not in SIZES:
        raise UserError(f'array {name} has an unknown dtype {brief(repr(dtype))}')
    count = count_bytes(name, shape, SIZES[dtype])
    begin, end = offsets
    if not all(type(n) is int and 0 <= n < MOST_VALUES for n in offsets) or end - begin != count:
        raise UserError(
            f'array {name} {shape} {dtype} takes {count:,} bytes, but claims those from '
            f'{brief(begin)} to {brief(end)}'
        )
    return tuple(shape), dtype, (begin, end)


def reader_from(file: BinaryIO, offset: int) -> Callable[[np.ndarray], None]:
    """Makes a function that fills an array from `offset` in the file."""

    def fill(out: np.ndarray) -> None:
        file.seek(offset)
        read_fully(file, out)

    return fill
