"""WebDataset's tar shards at any index.

The index has the places of all members, and the labels. It is built once, from the headers and
labels alone, and stored as NAME.tar.index.npz beside the shard, or in the cache where that can't be
written. It is in numpy arrays: about 50 bytes per example, 20 per member other than the image, and
the key. That is enough for millions of examples, not billions; for those, and for shards at an
address, run `prepare`.
"""

import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from vit_jax.data.readers import facts, grouping, indices, names, ranges, shards
from vit_jax.data.readers.record import Record
from vit_jax.errors import UserError
from vit_jax.io.text import brief

KEY = re.compile(r'((?:.*/)?[^./][^./]*)\.([^/]+)', re.DOTALL)  # up to the base name's first dot
MOST_TEXT = 2**20  # bytes of a label's member, and of a header's extensions
BLOCK = 512  # bytes of a tar header


class Tars(ranges.Ranges):
    """Records of tar shards; the fields beside `image` and `label` are the members by extension.

    A label is an int, or int32 [L] padded with -1. The members are bytes (`txt`, `json`, `cls`,
    `mask.png`), and each is read when a task asks for it.

    Args:
      image: extension of the image; 'image' stands for the only image among the members.
      label: field of the .json that has the label, or 'label' or 'cls' for a .cls. None: the
        examples need have no label.
    """

    def __init__(self, files: Sequence[str], *, image: str = 'image', label: str | None = 'label'):
        settings = {'format': 'tar 2', 'image': image, 'label': label}
        read = partial(scan, image=image, label=label)
        found = indices.build(files, read, settings, beside=True)
        for file, one in zip(files, found, strict=True):
            if not adds_up(one):
                raise UserError(f'the index of {file} is inconsistent; remove it')
        counts = [len(one['offsets']) for one in found]
        super().__init__(files, counts, joined(found, 'offsets'), joined(found, 'sizes'))
        self.keys, self.key_ends = joined(found, 'keys'), np.cumsum(joined(found, 'key_sizes'))
        self.labels = joined(found, 'labels') if label is not None else None
        self.label_fields = () if label is None else ('label',)
        self.label_ends = self.max_labels = None  # one label per image
        if any(one['many'] for one in found):
            label_counts = joined(found, 'label_counts')
            self.label_ends = np.cumsum(label_counts)
            self.max_labels = max(1, int(label_counts.max(initial=0)))
        self.member_offsets = joined(found, 'member_offsets')
        self.member_sizes = joined(found, 'member_sizes')
        self.member_ends = np.cumsum(joined(found, 'member_counts'))
        self.member_kinds, self.kinds = joined_kinds(found)

    def __getitem__(self, i: int) -> Record:
        fields = {'image': self.read(i)}
        if self.labels is not None:
            fields['label'] = self.label(i)
        return Record(fields, self, i)

    def label(self, i: int) -> int | np.ndarray:
        """Label of example i, or int32 [max_labels]."""
        if self.label_ends is None:
            return int(self.labels[i])
        return padded(self.labels, self.label_ends, i, self.max_labels)

    def members(self, i: int) -> range:
        """Indices of the members of example i that are not its image."""
        return range(int(self.member_ends[i - 1]) if i else 0, int(self.member_ends[i]))

    def field_names(self, i: int) -> list[str]:
        """Extensions of the members of example i that are not its image."""
        return [self.kinds[self.member_kinds[k]] for k in self.members(int(i))]

    def read_field(self, i: int, name: str) -> bytes:
        """Bytes of the member of an extension; raises UserError if they can't be read."""
        k = next(k for k in self.members(int(i)) if self.kinds[self.member_kinds[k]] == name)
        return self.read_range(i, int(self.member_offsets[k]), int(self.member_sizes[k]))

    def read_all(self, i: int) -> bytes:
        """Bytes of the image and of all other members of example i."""
        return self.read(i) + b''.join(self.read_field(i, name) for name in self.field_names(i))

    def traits(self) -> facts.Traits:
        """See `facts`."""
        arrays = [self.keys, self.key_ends, self.labels, self.label_ends]
        sample = [self.member_sizes]
        if self.is_local():
            sample.append(facts.sample_digest(self.read_all, len(self)))
        order = [array for array in arrays if array is not None]
        return facts.Traits(order, [self.sizes], sample)

    def name(self, i: int) -> str:
        """Shard, position and key of example i."""
        stop = int(self.key_ends[i])
        start = int(self.key_ends[i - 1]) if i else 0
        key = self.keys[start:stop].tobytes().decode('utf-8', 'backslashreplace')
        return f'{super().name(i)} ({brief(key)})'


def adds_up(one: indices.Index) -> bool:
    """Whether the arrays of an index have matching lengths; a sidecar is untrusted."""
    rows = ('offsets', 'sizes', 'key_sizes', 'label_counts', 'member_counts')
    members = ('member_offsets', 'member_sizes', 'member_kinds')
    sums = [('key_sizes', 'keys'), ('label_counts', 'labels')]
    sums += [('member_counts', key) for key in members]
    kinds = one['member_kinds']
    return (
        len({len(one[key]) for key in rows}) == 1
        and all((one[counts] >= 0).all() for counts, _ in sums)
        and all(one[counts].sum() == len(one[key]) for counts, key in sums)
        and bool(((kinds >= 0) & (kinds < len(kinds_of(one)))).all())
    )


def kinds_of(one: indices.Index) -> list[str]:
    """Extensions that an index names."""
    return one['kinds'].tobytes().decode('utf-8', 'surrogateescape').split('\n')


def joined(found: Sequence[indices.Index], key: str) -> np.ndarray:
    """An array of all indices, concatenated."""
    return np.concatenate([one[key] for one in found])


def joined_kinds(found: Sequence[indices.Index]) -> tuple[np.ndarray, list[str]]:
    """(extension of each member int32 [m], by its index among all extensions; all extensions)."""
    number, arrays = {}, []
    for one in found:
        table = [number.setdefault(kind, len(number)) for kind in kinds_of(one)]
        arrays.append(np.array(table, np.int32)[one['member_kinds']])
    return np.concatenate(arrays), list(number)


def padded(labels: np.ndarray, ends: np.ndarray, i: int, most: int) -> np.ndarray:
    """Labels ends[i - 1] to ends[i] as int32 [most], padded with -1."""
    own = labels[int(ends[i - 1]) if i else 0 : int(ends[i])]
    out = np.full(most, -1, np.int32)
    out[: len(own)] = own
    return out


def class_names(records: Any, folders: Sequence[str], label: str | None) -> list[str] | None:
    """Names in classes.txt (one per line) or classes.json (a list) of the folders, or None."""
    return shards.listed_names(folders, ('classes.txt', 'classes.json'))


class LimitedStream:
    """A stream that limits reads, so that sizes claimed by a header can't exhaust memory."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.seek, self.tell = stream, stream.seek, stream.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MOST_TEXT:
            raise tarfile.ReadError(f'a header claims {size:,} bytes')
        return self.stream.read(size)


def headers(stream: LimitedStream, file: str, size: int) -> Iterator[tarfile.TarInfo]:
    """Yields the headers of a tar file; raises UserError with the position if it is damaged."""
    tar, at = None, 0
    try:
        tar = tarfile.TarFile(fileobj=stream, mode='r')
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile keeps them all
            if member.size < 0 or tar.offset <= at:
                raise tarfile.ReadError('a size that leads backwards')
            if member.offset_data + member.size > size:
                raise tarfile.ReadError(f'{brief(member.name)} exceeds the end of the file')
            yield member
            at = tar.offset
        stream.seek(at)
        if stream.read(BLOCK) != bytes(BLOCK):  # tarfile silently stops at a damaged header
            raise tarfile.ReadError('no header, and no end of archive')
    except (tarfile.TarError, OverflowError, RecursionError, EOFError) as e:
        raise UserError(f'{file} is damaged at byte {at:,}: {brief(e)}') from e


def scan(
    stream: BinaryIO, file: str, size: int, *, image: str, label: str | None
) -> indices.Index:
    """Index of a tar shard, as `grouping.Grouping.arrays` has it.

    Raises UserError with shard and key.
    """
    limited, skipped = LimitedStream(stream), []
    groups = grouping.Grouping(file, image, label)
    for member in headers(limited, file, size):
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise UserError(f'{file}: {brief(member.name)} is a link or sparse file; not supported')
        match = KEY.fullmatch(member.name)
        if not match:  # skipped, as WebDataset does
            skipped.append(member.name)
            continue
        key, kind = match[1], match[2].lower()
        text = None
        if kind in ('cls', 'json') and label is not None:
            if member.size > MOST_TEXT:
                long = f'{member.size:,} bytes, more than {MOST_TEXT:,}'
                raise UserError(f'{file}: {brief(member.name)} has {long}')
            limited.seek(member.offset_data)
            text = limited.read(member.size)
        groups.add(key, kind, member.offset_data, member.size, text)
    if skipped:
        what = 'members without a key or an extension'
        names.print_once(f'{file}: skipped {len(skipped):,} {what} ({brief(skipped[0])})')
    return groups.arrays()
