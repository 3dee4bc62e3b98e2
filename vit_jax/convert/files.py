"""Arrays in .npz and .safetensors files that nobody vouches for.

Everything that a file claims of itself is checked against its size before memory is taken; nothing
is unpickled, nothing is unpacked to disk. An array is read when it is asked for, and alone.
"""

import contextlib
import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from vit_jax.errors import UserError

MOST_EXPANSION = 4  # of a compressed .npz; random weights shrink by a tenth at most
MOST_HEADER = 100_000_000  # bytes of a safetensors header, as the format has it
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
    """An array of a file: its shape is known, its values are not read yet."""

    shape: tuple[int, ...]
    dtype: str
    fill: Callable  # (uint8 [bytes]) -> None: reads the stored bytes
    stored: np.dtype | None  # None: no floating-point numbers

    def read(self, name, out=None):
        """The values as they are stored, in `out` (float32, contiguous) where that is of use."""
        if self.stored is None:
            raise UserError(f'array {name} is of dtype {self.dtype}, which no weight is')
        direct = out is not None and out.dtype == self.stored and out.flags.c_contiguous
        values = out.reshape(-1) if direct else np.empty(math.prod(self.shape), self.stored)
        self.fill(values.view(np.uint8))
        if values.size and not (np.isfinite(values.min()) and np.isfinite(values.max())):
            raise UserError(f'array {name} has values that are no finite numbers')
        return values.reshape(self.shape)


@contextlib.contextmanager
def opened(path):
    """{name: Array} of a file, as long as it is open; UserError for what is broken or hostile."""
    try:
        with open(path, 'rb') as file:
            reader = npz if str(path).endswith('.npz') else safetensors
            yield checked(reader(file))
    except UserError as e:
        raise UserError(f'{path}: {e}') from e
    except OSError as e:
        raise UserError(f'can not read {path}: {e.strerror or e}') from e


def checked(arrays):
    """The same, if no name is one that a path would climb out with."""
    for name in arrays:
        if '..' in name or name.startswith(('/', '\\')) or '\0' in name or not name:
            raise UserError(f'array name {name!r} is refused')
    if not arrays:
        raise UserError('the file has no arrays')
    return arrays


def npz(file):
    """The arrays of an open .npz file."""
    size = os.fstat(file.fileno()).st_size
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, OSError) as e:
        raise UserError(f'no .npz file, or a damaged one ({e})') from e
    members = archive.infolist()
    if sum(m.compress_size for m in members) > size:
        raise UserError('its members claim more bytes than the file has')
    expanded = sum(m.file_size for m in members)
    if expanded > MOST_EXPANSION * size:
        raise UserError(f'its {size:,} bytes claim to hold {expanded:,}; refused')
    arrays = {}
    for member in members:
        name = member.filename.removesuffix('.npy')
        if name in arrays:
            raise UserError(f'array {name} is there twice')
        arrays[name] = npy(archive, member, name)
    return arrays


def zip_digest(path):
    """A number that changes with any bit of the arrays: of the checksums that the .npz has."""
    with zipfile.ZipFile(path) as archive:
        rows = sorted((m.filename, m.file_size, m.CRC) for m in archive.infolist())
    return zlib.crc32(repr(rows).encode())


def npy(archive, member, name):
    """One member of an .npz as an Array; only its header is read."""
    with damage(name), archive.open(member) as stream:
        shape, order, dtype = npy_header(stream)
        start = stream.tell()
    if dtype.hasobject:
        raise UserError(f'array {name} is pickled, and pickles are refused')
    if dtype.kind == 'V' and dtype.itemsize == 2:  # NumPy's name for a bfloat16 that it was given
        dtype = np.dtype(ml_dtypes.bfloat16)
    count = math.prod(shape) * dtype.itemsize
    if count != member.file_size - start:
        raise UserError(
            f'array {name} claims {count:,} bytes {list(shape)} {dtype}, it has '
            f'{member.file_size - start:,}'
        )

    def fill(out):
        with damage(name), archive.open(member) as stream:
            stream.read(start)
            whole = np.empty_like(out) if order else out
            fully(stream, whole)
            if stream.read(1):
                raise UserError(f'array {name} is longer than it claims')
        if order:  # Fortran's, first axis fastest
            values = whole.view(dtype).reshape(shape[::-1]).T
            out.view(dtype).reshape(shape)[...] = values

    stored = dtype.newbyteorder('=') if dtype.kind == 'f' and dtype.isnative else None
    if dtype == ml_dtypes.bfloat16:
        stored = dtype
    if stored is not None and stored.itemsize > 8:
        stored = None
    return Array(tuple(shape), str(dtype), fill, stored)


def npy_header(stream):
    """(shape, whether in Fortran order, dtype) at the start of a .npy stream."""
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)  # fmt: skip
    if read is None:
        raise UserError(f'.npy format {version} is unknown')
    shape, order, dtype = read(stream)
    if any(not isinstance(n, int) or n < 0 for n in shape):
        raise UserError(f'shape {shape} is impossible')
    return shape, order, dtype


@contextlib.contextmanager
def damage(name):
    """Turns whatever a broken member makes zipfile and NumPy raise into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError) as e:
        raise UserError(f'array {name} is damaged ({e})') from e
    except Exception as e:  # NumPy parses headers as Python literals: any error can come
        raise UserError(f'array {name} can not be read ({type(e).__name__}: {e})') from e


def fully(stream, out):
    """Fills uint8 [n] from a stream; UserError where it ends before."""
    view, done = memoryview(out), 0
    while done < len(view):
        count = stream.readinto(view[done : done + 2**24])
        if not count:
            raise UserError(f'the data ends after {done:,} of {len(view):,} bytes')
        done += count


def safetensors(file):
    """The arrays of an open .safetensors file.

    The format's own library maps a file, whose pages then count beside the arrays made of them; so
    the header is read here, by the format's rules: offsets in order, without gap and overlap.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), 'little')
    if size < 8 or length > min(size - 8, MOST_HEADER):
        raise UserError(f'its header claims {length:,} bytes, the file has {size:,}')
    try:
        header = json.loads(file.read(length), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise UserError(f'no .safetensors file, or a damaged one (header: {e})') from e
    if not isinstance(header, dict):
        raise UserError('no .safetensors file: its header is no object')
    header.pop('__metadata__', None)
    spans, arrays = [], {}
    for name, entry in header.items():
        shape, dtype, (begin, end) = safetensors_entry(name, entry)
        spans.append((begin, end, name))
        arrays[name] = Array(shape, dtype, reader(file, 8 + length + begin), FLOATS.get(dtype))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise UserError(f'array {name} begins at byte {begin:,} in place of {at:,}')
        at = end
    room = size - 8 - length
    if at != room:
        raise UserError(f'its arrays take {at:,} bytes, the file has {room:,} for them')
    return arrays


def unique(pairs):
    """A dict of pairs whose names differ."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError('a name is there twice')
    return dict(pairs)


def safetensors_entry(name, entry):
    """(shape, dtype, offsets) of an entry of the header; UserError where it contradicts itself."""
    try:
        shape, dtype, offsets = entry['shape'], entry['dtype'], entry['data_offsets']
        numbers = [*shape, *offsets]
        sound = len(offsets) == 2 and all(type(n) is int and n >= 0 for n in numbers)
        sound = sound and isinstance(dtype, str)
    except (TypeError, KeyError):
        sound = False
    if not sound:
        raise UserError(f'the entry of array {name} is not as the format has it')
    if dtype not in SIZES:
        raise UserError(f'array {name} is of an unknown dtype {dtype!r}')
    if math.prod(shape) * SIZES[dtype] != offsets[1] - offsets[0]:
        raise UserError(
            f'array {name} {shape} {dtype} does not fit its {offsets[1] - offsets[0]:,} bytes'
        )
    return tuple(shape), dtype, offsets


def reader(file, offset):
    """A function that fills an array from a place in the file."""

    def fill(out):
        file.seek(offset)
        fully(file, out)

    return fill
