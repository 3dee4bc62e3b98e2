"""Folders of images: path/class/**, or path/train/class/** and path/val/class/**.

Class folders are searched recursively. One line reports what is skipped: files that are no images,
images outside of class folders, links that are dangling or circular, workdirs of runs.
"""

import concurrent.futures
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from etils import epath

from vit_jax.data.readers import facts, names, records, shares, splits, walk
from vit_jax.data.readers.record import Record
from vit_jax.errors import UserError
from vit_jax.io import storage
from vit_jax.io.text import printable


class Files:
    """Records of image files below a folder: `image`, `label`."""

    def __init__(self, root: str, paths: Sequence[str], labels: Sequence[int]):
        self.root, self.paths, self.labels = root, paths, labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Record:
        return Record({'image': file_bytes(self.paths[i]), 'label': self.labels[i]})

    def traits(self) -> facts.Traits:
        """See `facts`."""
        order = [np.array(self.labels, np.int32), relative(self.root, self.paths)]
        return facts.Traits(order, *file_contents(self.paths))

    def name(self, i: int) -> str:
        """Path of example i."""
        return self.paths[i]


def file_bytes(path: str) -> bytes:
    """Bytes of a file at a path or an address; raises OSError, or UserError for a pipe."""
    return epath.Path(path).read_bytes() if '://' in path else storage.read_local(path)


def relative(root: str, paths: Sequence[str]) -> str:
    """Paths from root, as a trait of their order."""
    return '\0'.join(path.removeprefix(root) for path in paths)


def file_contents(paths: Sequence[str]) -> tuple[list, list]:
    """(sizes, sample of the bytes) of local files, see `facts.Traits`; both empty at an address."""
    if not paths or '://' in paths[0]:  # one request per file
        return [], []
    with concurrent.futures.ThreadPoolExecutor(facts.THREADS) as pool:
        sizes = list(pool.map(size_of, (paths[i] for i in facts.spaced(len(paths)))))
    digest = facts.sample_digest(lambda i: file_bytes(paths[i]), len(paths))
    return [np.array(sizes, np.int64)], [digest]


def size_of(path: str) -> int:
    """Size of a file in bytes, -1 if it is missing."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def split_folders(path: str) -> list[str] | None:
    """Split folders of a folder, `train` among them; None if the folder has only classes."""
    inner = walk.visible(walk.list_folder(path)[1])
    if 'train' in inner and walk.visible(walk.list_folder(f'{path}/train')[1]):
        return inner
    others = [name for name in inner if name.casefold() in splits.WORDS]
    if len(inner) > 1 and len(others) == len(inner):
        raise UserError(
            f'{path} has folders {", ".join(map(printable, inner))}, which are splits by their '
            'names, but no folder train; rename the one to train on'
        )
    return None


def read(path: str, split: str) -> tuple[Files, tuple[str, ...]]:
    """(Files, names of the classes) of a split of a folder, or of a share of one.

    A share is chosen by a hash of the file names, class by class. A class of two or more images has
    at least one on both sides of each bound.
    """
    path = path.rstrip('/')
    if not (epath.Path(path).is_dir() if '://' in path else os.path.isdir(path)):
        raise UserError(f'no folder {path}')
    part, low, high = splits.parse(split)
    parts = split_folders(path)
    if parts is None and part != 'train':
        raise UserError(
            f'{path} is not divided into train and {part}; name a share of it as source.split, '
            'train[:90%] or train[90%:]'
        )
    if parts is not None and part not in parts:
        raise splits.missing(path, part, parts)
    top, root = (f'{path}/train', f'{path}/{part}') if parts else (path, path)
    inner = walk.visible(walk.list_folder(top)[1])
    own = [name for name in inner if walk.is_class(f'{top}/{name}')]
    if len(own) < 2:
        raise UserError(
            f'{top} has {len(own)} class folders; a data set needs two or more, or else '
            f'{records.MANIFEST}, *.tar or *.parquet'
        )
    classes, skipped = names.sort_classes(own, top), walk.Skipped()
    found = images_of(root, skipped)
    if part == 'train' and (empty := [name for name in own if not found[name]]):
        raise UserError(
            f'no images in {top}/{empty[0]} ({", ".join(walk.SUFFIXES)}); remove the folder of a '
            'class that has none'
        )
    paths, labels, lacking = [], [], set(range(len(classes)))
    for name, label in zip(found, names.match(list(found), classes), strict=True):
        if label is None and found[name]:
            raise UserError(f'{root}/{name} is a class that is missing in {top}')
        chosen = [f'{root}/{file}' for file in shares.chosen(found[name], low, high)]
        paths += chosen
        labels += [label] * len(chosen)
        lacking -= {label} if chosen else set()
    if not paths:
        raise UserError(f'no images in {root}/*/ for split {split!r} ({", ".join(walk.SUFFIXES)})')
    skipped.report(root)
    if lacking:
        some = names.join_names([classes[label] for label in sorted(lacking)])
        names.print_once(f'{path}: split {split} has no images of {some}')
    return Files(root, paths, labels), tuple(classes)


def images_of(root: str, skipped: walk.Skipped) -> dict[str, list[str]]:
    """{class: paths from root} of the class folders in a folder; reads each real folder once."""
    files, folders, odd = walk.list_folder(root)
    for file in walk.visible(files):
        if file.lower().endswith(walk.SUFFIXES):
            skipped.add('images outside of class folders', f'{root}/{file}')
    for name in walk.visible(odd):
        skipped.add('dangling links', f'{root}/{name}')
    classes = []
    for name in walk.visible(folders):
        if walk.is_class(f'{root}/{name}'):
            classes.append(name)
        else:
            skipped.add('workdirs of runs', f'{root}/{name}')
    seen = set()
    if '://' not in root:
        above = pathlib.Path(os.path.realpath(root))
        seen = {walk.identity(path) for path in (above, *above.parents)}
        seen |= {walk.identity(f'{root}/{name}') for name in classes}
    return {name: list(walk.walk(root, name, skipped, seen)) for name in classes}
