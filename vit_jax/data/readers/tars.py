"""WebDataset's tar shards at any index: {'image': bytes, 'label': ...}.

The index has the places of the images, and their labels. It is built once, from the headers and
labels alone, and stored as NAME.tar.index.npz beside the shard, or in the cache where that can't be
written. It is in numpy arrays, about 40 bytes per example and the key: enough for millions of
examples, not billions; for those, and for shards at an address, run `prepare`.
"""

import array
import io
import json
import re
import tarfile
from functools import partial

import numpy as np

from vit_jax.data.readers import formats, names, ranges, shards
from vit_jax.errors import UserError
from vit_jax.io.text import brief

KEY = re.compile(r'((?:.*/)?[^./][^./]*)\.([^/]+)', re.DOTALL)  # up to the base name's first dot
MOST_TEXT = 2**20  # bytes of a label's member, and of a header's extensions
BLOCK = 512  # bytes of a tar header


class Tars(ranges.Ranges):
    """Examples of tar shards; a label is an int, or int32 [L] padded with -1."""

    def __init__(self, files, *, image='image', label='label'):
        settings = {'format': 'tar 1', 'image': image, 'label': label}
        read = partial(scan, image=image, label=label)
        found = ranges.index(files, read, settings, beside=True)
        for file, one in zip(files, found, strict=True):
            if not adds_up(one):
                raise UserError(f'the index of {file} does not add up; remove it')
        counts = [len(one['offsets']) for one in found]
        super().__init__(files, counts, joined(found, 'offsets'), joined(found, 'sizes'))
        self.keys, self.key_ends = joined(found, 'keys'), np.cumsum(joined(found, 'key_sizes'))
        self.labels = joined(found, 'labels')
        self.label_ends = self.max_labels = None  # one label per image
        if any(one['many'] for one in found):
            label_counts = joined(found, 'label_counts')
            self.label_ends = np.cumsum(label_counts)
            self.max_labels = max(1, int(label_counts.max(initial=0)))

    def __getitem__(self, i):
        return {'image': self.read(i), 'label': self.label(i)}

    def label(self, i):
        if self.label_ends is None:
            return int(self.labels[i])
        return padded(self.labels, self.label_ends, i, self.max_labels)

    def traits(self):
        ends = [] if self.label_ends is None else [self.label_ends]
        return [self.keys, self.key_ends, self.labels, *ends], [self.sizes]

    def name(self, i):
        """Shard, position and key of example i."""
        stop = int(self.key_ends[i])
        start = int(self.key_ends[i - 1]) if i else 0
        key = self.keys[start:stop].tobytes().decode('utf-8', 'backslashreplace')
        return f'{super().name(i)} ({brief(key)})'


def adds_up(one):
    """Whether the arrays of an index have matching lengths; a sidecar is untrusted."""
    rows = {len(one[key]) for key in ('offsets', 'sizes', 'key_sizes', 'label_counts')}
    whole = one['key_sizes'].sum() == len(one['keys'])
    return len(rows) == 1 and whole and one['label_counts'].sum() == len(one['labels'])


def joined(found, key):
    return np.concatenate([one[key] for one in found])


def padded(labels, ends, i, most):
    """Labels ends[i - 1] to ends[i] as int32 [most], padded with -1."""
    own = labels[int(ends[i - 1]) if i else 0 : int(ends[i])]
    out = np.full(most, -1, np.int32)
    out[: len(own)] = own
    return out


def class_names(found, folders, label):
    """Names in classes.txt (one per line) or classes.json (a list) of the folders, or None."""
    for folder in folders:
        for name in ('classes.txt', 'classes.json'):
            text = shards.small_file(folder, name)
            if text is None:
                continue
            try:
                words = text.decode('utf-8-sig')  # Windows editors write a byte order mark
                words = words.splitlines() if name == 'classes.txt' else json.loads(words)
            except (ValueError, RecursionError):
                words = None
            if isinstance(words, list) and words and all(isinstance(w, str) for w in words):
                return words
            raise UserError(f'{folder}/{name} is no list of class names')
    return None


class Sparing:
    """A stream that limits reads, so that sizes claimed by a header can't exhaust memory."""

    def __init__(self, stream):
        self.stream, self.seek, self.tell = stream, stream.seek, stream.tell

    def read(self, size=-1):
        if not 0 <= size <= MOST_TEXT:
            raise tarfile.ReadError(f'a header claims {size:,} bytes')
        return self.stream.read(size)


def members(stream, file, size):
    """Yields the headers of a tar file; raises UserError with the position if it is damaged."""
    tar, at = None, 0
    try:
        tar = tarfile.TarFile(fileobj=stream, mode='r')
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile keeps them all
            if member.size < 0 or tar.offset <= at:
                raise tarfile.ReadError('a size that leads backwards')
            if member.offset_data + member.size > size:
                raise tarfile.ReadError(f'{brief(member.name)} goes on past the end of the file')
            yield member
            at = tar.offset
        stream.seek(at)
        if stream.read(BLOCK) != bytes(BLOCK):  # tarfile silently stops at a damaged header
            raise tarfile.ReadError('no header, and no end of archive')
    except (tarfile.TarError, OverflowError, RecursionError, EOFError) as e:
        raise UserError(f'{file} is damaged at byte {at:,}: {brief(e)}') from e


def scan(stream, file, size, *, image, label):
    """Index of a tar shard: arrays by name.

    offsets, sizes int64 [n]; keys uint8 (concatenated), key_sizes int64 [n]; labels int32,
    label_counts int64 [n]; many: bool, whether labels are lists. Raises UserError with shard and
    key.
    """
    stream, rows, passed = Sparing(stream), Rows(file, image, label), []
    for member in members(stream, file, size):
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise UserError(f'{file}: {brief(member.name)} is a link or sparse; not read here')
        match = KEY.fullmatch(member.name)
        if not match:  # skipped, as WebDataset does
            passed.append(member.name)
            continue
        key, kind = match[1], match[2].lower()
        text = None
        if kind in ('cls', 'json'):
            if member.size > MOST_TEXT:
                raise UserError(f'{file}: {brief(member.name)} has {member.size:,} bytes; refused')
            stream.seek(member.offset_data)
            text = stream.read(member.size)
        rows.add(key, kind, member.offset_data, member.size, text)
    if passed:
        what = 'members without a key or a suffix'
        names.say(f'{file}: passed over {len(passed):,} {what} ({brief(passed[0])})')
    return rows.arrays()


class Rows:
    """Groups the members of a shard into examples; the members of a key are consecutive."""

    def __init__(self, file, image, label):
        self.file, self.image, self.wanted = file, image, label
        self.key, self.group = None, {}
        self.offsets, self.sizes, self.key_sizes, self.counts = (array.array('q') for _ in range(4))
        self.labels, self.keys, self.many = array.array('i'), io.BytesIO(), False

    def add(self, key, kind, offset, size, text):
        if key != self.key:
            self.flush()
            self.key = key
        if kind in self.group:
            raise self.error(f'there are two members .{brief(kind)}')
        self.group[kind] = offset, size, text

    def error(self, text):
        return UserError(f'{self.file}: example {len(self.offsets)} ({brief(self.key)}): {text}')

    def flush(self):
        """Adds the current group as an example."""
        if self.key is None:
            return
        kinds = [k for k in self.group if k in formats.SUFFIXES]
        kinds = kinds if self.image == 'image' else [k for k in self.group if k == self.image]
        if len(kinds) != 1:
            found = ', '.join(f'.{brief(k)}' for k in self.group)
            known = ', '.join(formats.SUFFIXES)
            what = 'several images; choose one' if kinds else f'no image ({known})'
            raise self.error(f'{what} among its members {found}')
        labels = self.label()
        offset, size, _ = self.group[kinds[0]]
        if not isinstance(labels, int):
            self.many = True
        else:
            labels = [labels]
        self.offsets.append(offset)
        self.sizes.append(size)
        self.labels.extend(labels)
        self.counts.append(len(labels))
        self.key_sizes.append(self.keys.write(self.key.encode('utf-8', 'surrogateescape')))
        self.group = {}

    def label(self):
        """Label of the group, an int or a list of ints, in the range of int32."""
        if 'cls' in self.group and self.wanted in ('label', 'cls'):
            text = self.group['cls'][2]
            if not re.fullmatch(rb'\s*-?\d{1,10}\s*', text):
                raise self.error(f'.cls is {brief(ascii(text))}, not a number')
            value = int(text)
        elif 'json' in self.group:
            value = self.field()
        else:
            raise self.error('no label: neither .cls nor .json')
        for one in value if isinstance(value, list) else [value]:
            if type(one) is not int or not -(2**31) <= one < 2**31:
                raise self.error(f'label {brief(ascii(one))} is not a number of a class')
        return value

    def field(self):
        """Label in the .json of the group."""
        try:
            value = json.loads(self.group['json'][2])
        except (ValueError, RecursionError) as e:
            raise self.error(f'.json is none ({brief(e)})') from e
        if not isinstance(value, dict) or self.wanted not in value:
            has = ', '.join(value) if isinstance(value, dict) else 'no object'
            raise self.error(f'.json has no field {self.wanted!r}, but {brief(has)}')
        return value[self.wanted]

    def arrays(self):
        """The index, as arrays."""
        self.flush()
        return {
            'offsets': np.array(self.offsets, np.int64),
            'sizes': np.array(self.sizes, np.int64),
            'keys': np.frombuffer(self.keys.getvalue(), np.uint8),
            'key_sizes': np.array(self.key_sizes, np.int64),
            'labels': np.array(self.labels, np.int32),
            'label_counts': np.array(self.counts, np.int64),
            'many': np.array(self.many),
        }
