"""Hugging Face data sets on disk at any index: parquet files, or the arrow files of save_to_disk.

Random access to parquet is slow: to read an image, all images of its row group are decoded. The
groups used last are kept (`KEPT` bytes per process). Of images of 110 KB a random one takes 7 ms
from groups of 100 and 34 ms from groups of 1,000; in file order 0.07 ms, and from arrow files,
which are memory-mapped, 0.02 ms. To train from parquet, `prepare` the data set first.
"""

import collections
import contextlib
import json
import os
import re
import threading

import numpy as np

from vit_jax.data.readers import ranges, shards, tars
from vit_jax.errors import UserError
from vit_jax.io import fetch
from vit_jax.io.text import brief

KEPT = 2**28  # bytes of decoded row groups


def library():
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

    def __init__(self, file):
        pa = library()
        if '://' in file:
            fs, path = fetch.backend(file)
            file = fs.open(path, 'rb')
        else:
            os.stat(file)  # its errors are shorter than those of pyarrow
        self.file = pa.parquet.ParquetFile(file, pre_buffer=False)
        self.schema = self.file.schema_arrow
        self.lock = threading.Lock()

    def rows(self):
        metadata = self.file.metadata
        return [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]

    def column(self, group, path):
        """A column of a row group as one array; its path is ('image',) or ('image', 'bytes')."""
        with self.lock:
            table = self.file.read_row_group(group, columns=['.'.join(path)], use_threads=False)
        return inner(table.column(0).combine_chunks(), path[1:])


class Arrow:
    """An arrow file with the methods of Parquet; its groups are record batches, at no cost."""

    def __init__(self, file):
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

    def length(self):
        return os.fstat(self.handle.fileno()).st_size

    def rows(self):
        return [batch.num_rows for batch in self.batches]

    def column(self, group, path):
        if self.length() < self.size:  # the kernel kills a process that reads past the end
            raise UserError(f'{self.handle.name} was {self.size:,} bytes long and is shorter')
        return inner(self.batches[group].column(path[0]), path[1:])


def inner(values, path):
    """The field of a struct array at a path; a null struct has null fields."""
    pa = library()
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    for name in path:
        values = pa.compute.struct_field(values, name)
    return values


def bytes_at(values, row):
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


def opened(file):
    return Arrow(file) if file.endswith('.arrow') else Parquet(file)


class Rows:
    """Records {'image': bytes, 'label': ...} in parquet or arrow files; picklable, thread-safe.

    A label is an int, or int32 [L] padded with -1 if the column has lists. The column of labels is
    read at once, that of images by row groups.
    """

    def __init__(self, files, *, image='image', label='label'):
        self.files, self.image, self.kept_bytes = list(files), image, KEPT
        rows, labels, counts = [], [], []
        self.close()
        for k, file in enumerate(self.files):
            with ranges.reading(file):
                opened = self.opened(k)
                if k == 0:
                    self.path, self.many = columns(opened.schema, file, image, label)
                    self.names = schema_names(opened.schema, label)
                elif columns(opened.schema, file, image, label) != (self.path, self.many):
                    raise UserError(f'{file} has columns of other types than {self.files[0]}')
                elif schema_names(opened.schema, label) != self.names:
                    raise UserError(f'{file} has other names of classes than {self.files[0]}')
                rows.append(opened.rows())
                for group in range(len(rows[-1])):
                    values, sizes = numbers(opened.column(group, (label,)), file, group)
                    labels.append(values)
                    counts.append(sizes)
        self.ends = np.cumsum([n for one in rows for n in one], dtype=np.int64)
        self.first = np.cumsum([0] + [len(one) for one in rows])  # first group of each file
        self.labels = np.concatenate([np.zeros(0, np.int32), *labels])
        self.label_ends = self.max_labels = None
        if self.many:
            counts = np.concatenate([np.zeros(0, np.int64), *counts])
            self.label_ends, self.max_labels = np.cumsum(counts), max(1, int(counts.max(initial=0)))

    def close(self):
        """Closes all files and drops all row groups; the next example opens one again."""
        self.readers, self.groups = collections.OrderedDict(), collections.OrderedDict()
        self.lock, self.busy = threading.Lock(), {}

    def __getstate__(self):
        gone = ('readers', 'groups', 'lock', 'busy')
        return {key: value for key, value in self.__dict__.items() if key not in gone}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.close()

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, i):
        """(file, row group among all, row in it) of example i; raises IndexError."""
        i = int(i)
        if not 0 <= i < len(self):
            raise IndexError(f'no example {i} among {len(self)}')
        group = int(np.searchsorted(self.ends, i, side='right'))
        k = int(np.searchsorted(self.first, group, side='right')) - 1
        return k, group, i - (int(self.ends[group - 1]) if group else 0)

    def traits(self):
        ends = [] if self.label_ends is None else [self.label_ends]
        sizes = []
        for file in self.files:
            with ranges.reading(file):
                sizes.append(ranges.identity(file).get('size'))
        return [self.ends, self.labels, *ends], sizes

    def name(self, i):
        """File and row of example i."""
        k, _, _ = self.locate(i)
        first = int(self.first[k])
        return f'{self.files[k]}[{int(i) - (int(self.ends[first - 1]) if first else 0)}]'

    def __getitem__(self, i):
        k, group, row = self.locate(i)
        data = bytes_at(self.images(k, group), row)
        if data is None:
            raise UserError(f'{self.name(i)} has no image: column {self.image!r} holds no bytes')
        if self.label_ends is None:
            return {'image': data, 'label': int(self.labels[i])}
        label = tars.padded(self.labels, self.label_ends, i, self.max_labels)
        return {'image': data, 'label': label}

    def images(self, k, group):
        """Images of a row group of file k, which are in memory or decoded now, once."""
        number = group - int(self.first[k])
        if self.files[k].endswith('.arrow'):
            with ranges.reading(self.files[k]):
                return self.opened(k).column(number, self.path)
        with self.lock:
            if group in self.groups:
                self.groups.move_to_end(group)
                return self.groups[group]
            busy = self.busy.setdefault(group, threading.Lock())
        with busy:  # a second thread waits, and does not decode it again
            with self.lock:
                if group in self.groups:
                    return self.groups[group]
            with ranges.reading(f'row group {number} of {self.files[k]}'):
                images = self.opened(k).column(number, self.path)
            with self.lock:
                self.groups[group] = images
                self.busy.pop(group, None)
                while len(self.groups) > 1 and self.held() > self.kept_bytes:
                    self.groups.popitem(last=False)
        return images

    def held(self):
        return sum(images.nbytes for images in self.groups.values())

    def opened(self, k):
        """Opens file k; of many, those used last stay open."""
        with self.lock:
            if k in self.readers:
                self.readers.move_to_end(k)
                return self.readers[k]
        reader = opened(self.files[k])
        with self.lock:
            self.readers[k] = reader
            while len(self.readers) > 64:
                self.readers.popitem(last=False)
        return reader


def columns(schema, file, image, label):
    """(path of the bytes, whether labels are lists) of a schema; raises UserError without them."""
    pa = library()
    for key in (image, label):
        if key not in schema.names:
            raise UserError(f'{file} has no column {key!r}, but {brief(", ".join(schema.names))}')
    kind, path = schema.field(image).type, (image,)
    if pa.types.is_struct(kind) and kind.get_field_index('bytes') >= 0:
        kind, path = kind.field('bytes').type, (image, 'bytes')
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(f'{file}: column {image!r} is {brief(kind)}, no image files')
    kind = schema.field(label).type
    many = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not pa.types.is_integer(kind.value_type if many else kind):
        raise UserError(f'{file}: column {label!r} is {brief(kind)}, no numbers of classes')
    return path, many


def numbers(values, file, group):
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
        raise UserError(f'row group {group} of {file} has labels that are no numbers of classes')
    return found.astype(np.int32), counts


def class_names(rows, folders, label):
    """Names of a ClassLabel from the files, dataset_info.json or README.md, or None.

    Searches the folders in their order.
    """
    if rows.names:
        return rows.names
    for folder in folders:
        for name, parse in (('dataset_info.json', info_features), ('README.md', card_features)):
            text = shards.small_file(folder, name)
            if text is None:
                continue
            try:
                found = names_in(parse(text, label))
            except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
                continue
            if found:
                return found
    return None


def schema_names(schema, label):
    """Class names that Hugging Face wrote into the schema of a file, or None."""
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        info = json.loads((schema.metadata or {}).get(b'huggingface', b'{}'))
        return names_in(info.get('info', {}).get('features', {}).get(label))
    return None


def names_in(feature):
    """Class names of a Hugging Face feature, a ClassLabel or a list of them, or None."""
    if isinstance(feature, list) and len(feature) == 1:
        feature = feature[0]
    if isinstance(feature, dict) and isinstance(feature.get('feature'), dict):
        feature = feature['feature']
    found = feature.get('names') if isinstance(feature, dict) else None
    if isinstance(found, dict):  # of a README: {'0': 'ant', '1': 'bee'}
        found = [found[key] for key in sorted(found, key=int)]
    if not isinstance(found, list) or not found:
        return None
    return tuple(map(str, found))


def info_features(text, label):
    return json.loads(text)['features'][label]


def card_features(text, label):
    """Feature in the YAML at the head of a README.md."""
    import yaml

    head = re.match(r'---\r?\n(.*?)\n---', text.decode('utf-8', 'replace'), re.DOTALL)
    if not head:
        return None
    try:
        info = yaml.safe_load(head[1])['dataset_info']
    except yaml.YAMLError as e:
        raise ValueError(str(e)) from e
    for one in info if isinstance(info, list) else [info]:
        for feature in one['features']:
            if feature['name'] == label:
                kind = feature.get('dtype', feature.get('list', feature.get('sequence')))
                return kind.get('class_label', kind) if isinstance(kind, dict) else None
    return None
