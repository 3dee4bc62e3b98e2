"""Columns of parquet and arrow files, by pyarrow."""

import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_jax.errors import UserError
from vit_jax.io import addresses
from vit_jax.io.text import brief


def library() -> Any:
    """Imports pyarrow; without it raises UserError that says how to install it."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as e:
        raise UserError(
            'parquet and arrow files need pyarrow; install it with: pip install "vit_jax[parquet]"'
        ) from e
    return pyarrow


class Parquet:
    """A parquet file: rows of its groups, and columns of a group. Reads in one thread at a time."""

    def __init__(self, file: str):
        pa = library()
        if '://' in file:
            fs, path = addresses.backend(file)
            source = fs.open(path, 'rb')
        else:
            os.stat(file)  # its errors are shorter than those of pyarrow
            source = file
        self.file = pa.parquet.ParquetFile(source, pre_buffer=False)
        self.schema = self.file.schema_arrow
        self.lock = threading.Lock()

    def rows(self) -> list[int]:
        """Number of rows of each group."""
        metadata = self.file.metadata
        return [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]

    def column(self, group: int, path: tuple[str, ...]) -> Any:
        """A column of a row group as one array; its path is ('image',) or ('image', 'bytes')."""
        with self.lock:
            table = self.file.read_row_group(group, columns=['.'.join(path)], use_threads=False)
        return inner(table.column(0).combine_chunks(), path[1:])


class Arrow:
    """An arrow file with the methods of Parquet; its groups are record batches, at no cost."""

    def __init__(self, file: str):
        pa = library()
        if '://' in file:
            raise UserError(f'{file}: arrow files are read from a local disk only')
        self.handle = open(file, 'rb', buffering=0)  # closed with this object
        self.size = self.length()
        with pa.memory_map(file) as source:
            with pa.ipc.open_stream(source) as stream:
                self.schema, self.batches = stream.schema, list(stream)
        for batch in self.batches:
            batch.validate(full=True)  # pyarrow does not check offsets later

    def length(self) -> int:
        """Bytes of the file now."""
        return os.fstat(self.handle.fileno()).st_size

    def rows(self) -> list[int]:
        """Number of rows of each group."""
        return [batch.num_rows for batch in self.batches]

    def column(self, group: int, path: tuple[str, ...]) -> Any:
        if self.length() < self.size:  # the kernel kills a process that reads past the end
            raise UserError(f'{self.handle.name} was {self.size:,} bytes long and is shorter')
        return inner(self.batches[group].column(path[0]), path[1:])


def inner(values: Any, path: Sequence[str]) -> Any:
    """The field of a struct array at a path; a null struct has null fields."""
    pa = library()
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    for name in path:
        values = pa.compute.struct_field(values, name)
    return values


def bytes_at(values: Any, row: int) -> bytes | None:
    """Bytes in a row of a binary array, None if it is null.

    Raises UserError if they lie outside of the array, as in a mapped file that was overwritten.
    """
    if values.slice(row, 1).null_count:
        return None
    kind = np.int64 if library().types.is_large_binary(values.type) else np.int32
    _, ends, data = values.buffers()
    place = (values.offset + row) * np.dtype(kind).itemsize
    start, stop = np.frombuffer(ends, kind, 2, place).tolist()
    if not 0 <= start <= stop <= (data.size if data else 0):
        raise UserError('its bytes are not where they were: the file has changed')
    return data[start:stop].to_pybytes() if data else b''


def open_file(file: str) -> Arrow | Parquet:
    """Opens a file by its suffix."""
    return Arrow(file) if file.endswith('.arrow') else Parquet(file)


def columns(
    schema: Any, file: str, image: str | None, label: str | None
) -> tuple[tuple[str, ...] | None, bool]:
    """(path of the bytes, whether labels are lists) of a schema; raises UserError without them."""
    pa = library()
    for key in (image, label):
        if key is not None and key not in schema.names:
            hint = '; source.label=None reads no labels' if key == label else ''
            raise UserError(
                f'{file} has no column {key!r}, but {brief(", ".join(schema.names))}{hint}'
            )
    path = None if image is None else bytes_path(schema, image)
    if path is None and image is not None:
        kind = brief(schema.field(image).type)
        raise UserError(f'{file}: column {image!r} is {kind}, not the bytes of images')
    if label is None:
        return path, False
    kind = schema.field(label).type
    many = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not pa.types.is_integer(kind.value_type if many else kind):
        raise UserError(f'{file}: column {label!r} is {brief(kind)}, not numbers of classes')
    return path, many


def bytes_path(schema: Any, name: str) -> tuple[str, ...] | None:
    """Path of the bytes in a column: (name,), or (name, 'bytes') in a struct; None without any."""
    pa = library()
    kind, path = schema.field(name).type, (name,)
    if pa.types.is_struct(kind) and kind.get_field_index('bytes') >= 0:
        kind, path = kind.field('bytes').type, (name, 'bytes')
    return path if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else None


def value_at(values: Any, row: int) -> Any:
    """A value as bytes or another Python object; raises an error if its file has changed."""
    pa = library()
    if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
        return bytes_at(values, row)
    one = values.slice(row, 1)
    one.validate(full=True)
    return one[0].as_py()


def labels(values: Any, file: str, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(labels int32, number of labels in each row int64 [n]) of a column of a row group."""
    pa = library()
    counts = np.ones(len(values), np.int64)
    if not pa.types.is_integer(values.type):
        counts = pa.compute.fill_null(pa.compute.list_value_length(values), -1).to_numpy(False)
        values, counts = values.flatten(), counts.astype(np.int64)
    if values.null_count or (counts < 0).any():
        raise UserError(f'row group {group} of {file} has rows without a label')
    found = values.to_numpy(zero_copy_only=False)
    if len(found) and not -(2**31) <= int(found.min()) <= int(found.max()) < 2**31:
        raise UserError(f'row group {group} of {file} has labels that are not numbers of classes')
    return found.astype(np.int32), counts
