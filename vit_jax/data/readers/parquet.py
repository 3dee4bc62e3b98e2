"""Hugging Face data sets on disk at any index: parquet files, or the arrow files of save_to_disk.

Random access to parquet is slow: to read an image, all images of its row group are decoded. The
columns of groups used last are kept (`CACHED` bytes per process). Of images of 110 KB a random one
takes 7 ms from groups of 100 and 34 ms from groups of 1,000; in file order 0.07 ms, and from arrow
files, which are memory-mapped, 0.02 ms. To train from parquet, `prepare` the data set first.
"""

import collections
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_jax.data.readers import columnar, facts, hf_metadata, ranges, tars
from vit_jax.data.readers.open_files import OpenFiles
from vit_jax.data.readers.record import Record
from vit_jax.errors import UserError

CACHED = 2**28  # bytes of decoded columns
MOST_FILES = 64  # that stay open


class Table(OpenFiles):
    """Records of parquet or arrow files; the fields beside `image` and `label` are other columns.

    A label is an int, or int32 [L] padded with -1 if the column has lists. The column of labels is
    read at once, that of images by row groups, and so is each other column when a task asks for
    it: encoded images as bytes, else as Python objects.

    Args:
      image: column with the bytes of images. None: the examples have no image.
      label: column with the numbers of classes. None: the examples have no label.
    """

    limit = MOST_FILES

    def __init__(
        self, files: Sequence[str], *, image: str | None = 'image', label: str | None = 'label'
    ):
        self.files, self.image, self.label, self.cached_bytes = list(files), image, label, CACHED
        rows, labels, counts = [], [], []
        self.close()
        for k, file in enumerate(self.files):
            with ranges.reading(file):
                reader = self.reader(k)
                columns = columnar.columns(reader.schema, file, image, label)
                names = hf_metadata.schema_names(reader.schema, label)
                if k == 0:
                    self.path, self.many = columns
                    self.names, self.columns = names, list(reader.schema.names)
                elif columns != (self.path, self.many):
                    raise UserError(f'{file} has columns of other types than {self.files[0]}')
                elif names != self.names:
                    raise UserError(f'{file} has other names of classes than {self.files[0]}')
                rows.append(reader.rows())
                for group in range(len(rows[-1]) if label is not None else 0):
                    values, sizes = columnar.labels(reader.column(group, (label,)), file, group)
                    labels.append(values)
                    counts.append(sizes)
        self.group_ends = np.cumsum([n for one in rows for n in one], dtype=np.int64)
        self.ends = np.cumsum([sum(one) for one in rows], dtype=np.int64)  # of each file
        self.first = np.cumsum([0] + [len(one) for one in rows])  # first group of each file
        self.labels = self.label_ends = self.max_labels = None
        self.label_fields = () if label is None else ('label',)
        if label is not None:
            self.labels = np.concatenate([np.zeros(0, np.int32), *labels])
        if self.many:
            counts = np.concatenate([np.zeros(0, np.int64), *counts])
            self.label_ends, self.max_labels = np.cumsum(counts), max(1, int(counts.max(initial=0)))

    def close(self) -> None:
        """Closes all files and drops all decoded columns."""
        super().close()
        self.cache, self.busy = collections.OrderedDict(), {}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k not in ('cache', 'busy')}

    def find(self, i: int) -> tuple[int, int, int]:
        """(file, row group in it, row in the group) of example i; raises IndexError."""
        k, _ = self.locate(i)
        group = int(np.searchsorted(self.group_ends, int(i), side='right'))
        row = int(i) - (int(self.group_ends[group - 1]) if group else 0)
        return k, group - int(self.first[k]), row

    def traits(self) -> facts.Traits:
        """See `facts`."""
        order = [self.group_ends, self.labels, self.label_ends]
        sizes = []
        for file in self.files:
            with ranges.reading(file):
                sizes.append(ranges.identity(file).get('size'))
        local = not any('://' in file for file in self.files)
        sample = [ranges.blocks_digest(self.files)] if local else []
        return facts.Traits([array for array in order if array is not None], sizes, sample)

    def name(self, i: int) -> str:
        """File and row of example i."""
        k, row = self.locate(i)
        return f'{self.files[k]}[{row}]'

    def __getitem__(self, i: int) -> Record:
        k, group, row = self.find(i)
        fields = {}
        if self.path is not None:
            fields['image'] = columnar.bytes_at(self.column(k, group, self.path), row)
            if fields['image'] is None:
                raise UserError(
                    f'{self.name(i)} has no image: column {self.image!r} holds no bytes'
                )
        if self.labels is not None and self.label_ends is None:
            fields['label'] = int(self.labels[i])
        elif self.labels is not None:
            fields['label'] = tars.padded(self.labels, self.label_ends, i, self.max_labels)
        return Record(fields, self, i)

    def field_names(self, i: int) -> list[str]:
        """All columns."""
        return self.columns

    def read_field(self, i: int, name: str) -> Any:
        """The value of a column; raises UserError if it can't be read."""
        k, group, row = self.find(i)
        with ranges.reading(self.files[k]):
            path = columnar.bytes_path(self.reader(k).schema, name) or (name,)
            return columnar.value_at(self.column(k, group, path), row)

    def column(self, k: int, group: int, path: tuple[str, ...]) -> Any:
        """A column of a row group of file k, which is in memory or decoded now, once."""
        if self.files[k].endswith('.arrow'):
            with ranges.reading(self.files[k]):
                return self.reader(k).column(group, path)
        key = k, group, path
        with self.lock:
            if key in self.cache:
                self.cache.move_to_end(key)
                return self.cache[key]
            busy = self.busy.setdefault(key, threading.Lock())
        with busy:  # a second thread waits, and does not decode it again
            with self.lock:
                if key in self.cache:
                    return self.cache[key]
            with ranges.reading(f'row group {group} of {self.files[k]}'):
                column = self.reader(k).column(group, path)
            with self.lock:
                self.cache[key] = column
                self.busy.pop(key, None)
                while len(self.cache) > 1 and self.cache_size() > self.cached_bytes:
                    self.cache.popitem(last=False)
        return column

    def cache_size(self) -> int:
        """Bytes of the decoded columns."""
        return sum(column.nbytes for column in self.cache.values())

    def open_file(self, k: int) -> 'columnar.Arrow | columnar.Parquet':
        return columnar.open_file(self.files[k])
