"""Folders of images with captions: captions.jsonl, or the metadata.jsonl of Hugging Face.

A line is {"file_name": "a.jpg", "text": "a dog"}, or has "captions": ["a dog", ...] or other
fields; the path of the image is relative to the file's folder. The file is in the folder itself
(split train), or in its folders train, val, ... A line without a file_name is text alone. A
metadata.jsonl without captions belongs to a folder of classes.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vit_jax.data.readers import facts, folders, names, ranges, splits, walk
from vit_jax.data.readers.record import Record
from vit_jax.errors import UserError
from vit_jax.io import addresses, storage
from vit_jax.io.text import brief

FILE, METADATA = 'captions.jsonl', 'metadata.jsonl'
FIELDS = ('captions', 'caption', 'text')  # one of which a metadata.jsonl needs
MOST_BYTES = 2**32


class Captioned:
    """Records of the lines of a file: `image` (bytes), `label` if each has one, other fields.

    Args:
      root: folder of the images.
      paths: paths of the images from there; '' for text alone.
      lines: uint8, all lines concatenated.
      ends: int64, where each ends.
      labels: numbers of classes, None without labels.
    """

    def __init__(
        self, root: str, paths: Sequence[str], lines: np.ndarray, ends: np.ndarray,
        labels: Sequence[int] | None,
    ):  # fmt: skip
        self.root, self.paths, self.lines, self.ends, self.labels = root, paths, lines, ends, labels
        self.label_fields = () if labels is None else ('label',)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Record:
        start = int(self.ends[i - 1]) if i else 0
        fields = parse(self.lines[start : int(self.ends[i])].tobytes())
        fields.pop('label', None), fields.pop('file_name', None), fields.pop('image', None)
        if self.labels is not None:
            fields['label'] = self.labels[i]
        return Record(fields, self, i)

    def field_names(self, i: int) -> list[str]:
        """The image, if the line has one."""
        return ['image'] if self.paths[i] else []

    def read_field(self, i: int, name: str) -> bytes:
        """Bytes of the image; raises UserError if it can't be read."""
        with ranges.reading(self.paths[i]):
            return folders.file_bytes(self.name(i))

    def traits(self) -> facts.Traits:
        """See `facts`."""
        labels = [] if self.labels is None else [np.array(self.labels, np.int32)]
        paths = [f'{self.root}/{path}' for path in self.paths if path]
        return facts.Traits([self.lines, self.ends, *labels], *folders.file_contents(paths))

    def name(self, i: int) -> str:
        """Path of the image of example i, or the number of its line."""
        return f'{self.root}/{self.paths[i]}' if self.paths[i] else f'{self.root}: text {i}'


def find(path: str, files: Iterable[str], inner: set[str]) -> dict[str, str]:
    """{split: jsonl} of a folder with `files` and folders `inner`; {} if none."""
    path, parts = path.rstrip('/'), {}
    for part in sorted(set(splits.KNOWN) & inner):
        if name := own(f'{path}/{part}', walk.list_folder(f'{path}/{part}')[0]):
            parts[part] = f'{path}/{part}/{name}'
    name = own(path, files)
    return parts or ({'train': f'{path}/{name}'} if name else {})


def own(folder: str, files: Iterable[str]) -> str | None:
    """The name of the file with the captions among the files of a folder, None if there is none."""
    if FILE in files:
        return FILE
    if METADATA in files:
        first = read_bytes(f'{folder}/{METADATA}', 2**16).split(b'\n')[0]
        try:
            if any(name in parse(first) for name in FIELDS):
                return METADATA
        except ValueError:
            return None
    return None


def read_bytes(file: str, most: int | None = None) -> bytes:
    """Bytes of a file, or its first ones; raises UserError."""
    with ranges.reading(file):
        if '://' in file:
            fs, place = addresses.backend(file)
            if (fs.info(place).get('size') or 0) > MOST_BYTES:
                raise UserError(f'{file} has more than {MOST_BYTES:,} bytes')
            return fs.cat_file(place, end=most)
        if most is None:
            return storage.read_local(file, MOST_BYTES)
        with open(file, 'rb') as stream:
            return stream.read(most)


def parse(line: bytes) -> dict[str, Any]:
    """The object of a line; bytes that are not UTF-8 are kept as Python's surrogateescape has them.

    Raises ValueError for anything else.
    """
    try:
        found = json.loads(line.decode('utf-8', 'surrogateescape'))
    except RecursionError as e:
        raise ValueError('it is nested too deeply') from e
    if not isinstance(found, dict):
        raise ValueError(f'it is {brief(found)}, not an object')
    name = found.get('file_name')
    if name is not None and not plain(name):
        raise ValueError(f'file_name {brief(name)} is not a path below its folder')
    return found


def plain(name: Any) -> bool:
    """Whether a file name stays within its folder."""
    return isinstance(name, str) and bool(name) and not (
        name.startswith('/') or '://' in name or '..' in name.split('/') or '\0' in name
    )


def read(
    path: str, parts: dict[str, str], split: str, label: str | None
) -> tuple[Captioned, tuple[str, ...]]:
    """(Captioned, names of classes) of a split; those of labels that are text, sorted."""
    part, _, _ = splits.parse(split)
    if part not in parts:
        raise splits.missing(path, part, parts)
    file = parts[part]
    paths, lines, labels = [], [], []
    for number, line in enumerate(read_bytes(file).removeprefix(b'\xef\xbb\xbf').split(b'\n'), 1):
        if not line.strip():
            continue
        try:
            found = parse(line)
        except ValueError as e:
            raise UserError(f'line {number} of {file} is no JSON of an image: {brief(e)}') from e
        paths.append(found.get('file_name') or '')
        lines.append(line)
        labels.append(found.get(label) if label is not None else None)
    ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
    numbers, classes = numbered(labels, file)
    blob = np.frombuffer(b''.join(lines), np.uint8)
    return Captioned(file.rpartition('/')[0], paths, blob, ends, numbers), classes


def numbered(labels: Sequence[Any], file: str) -> tuple[list[int] | None, tuple[str, ...]]:
    """(number of each label, names of classes); (None, ()) unless all lines have one."""
    if not labels or any(label is None for label in labels):
        return None, ()
    kinds = {type(label) for label in labels}
    if kinds == {str}:
        classes = names.sort_classes(sorted(set(labels)), file)
        number = {name: k for k, name in enumerate(classes)}
        return [number[label] for label in labels], tuple(classes)
    if kinds == {int} and all(0 <= label < 2**20 for label in labels):
        return list(labels), tuple(map(str, range(max(labels) + 1)))
    wrong = next((one for one in labels if type(one) is not str), None)
    raise UserError(f'{file} has a label {brief(wrong)}; labels are all names, or all numbers')
