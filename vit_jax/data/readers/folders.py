"""Folders of images: path/class/**, or path/train/class/** and path/val/class/**.

Class folders are searched recursively. One line reports what is skipped: files that are no images,
images outside of class folders, links that are broken or circular, workdirs of runs.
"""

import bisect
import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import os
import pathlib

import numpy as np
from etils import epath

from vit_jax.data.readers import facts, formats, names, ranges, records, splits
from vit_jax.errors import UserError
from vit_jax.io import fetch, storage
from vit_jax.io.text import printable

SUFFIXES = tuple(f'.{suffix}' for suffix in formats.SUFFIXES)
DEEPEST = 32  # levels of folders
MOST_NAMED = 4  # suffixes in the message about skipped files


class Files:
    """Image files below a folder, and their labels."""

    def __init__(self, root, paths, labels):
        self.root, self.paths, self.labels = root, paths, labels

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        path = self.paths[i]  # may have become a pipe, which local_bytes refuses
        data = epath.Path(path).read_bytes() if '://' in path else storage.local_bytes(path)
        return {'image': data, 'label': self.labels[i]}

    def traits(self):
        names = [path.removeprefix(self.root) for path in self.paths]
        order = [np.array(self.labels, np.int32), '\0'.join(names)]
        if '://' in self.root:  # one request per file
            return order, []
        with concurrent.futures.ThreadPoolExecutor(ranges.THREADS) as pool:
            sizes = list(pool.map(size_of, (self.paths[i] for i in facts.sample(len(self)))))
        return order, [np.array(sizes, np.int64)]

    def name(self, i):
        return self.paths[i]


def size_of(path):
    """Size of a file in bytes, -1 if it is missing."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


class Passed:
    """Counts what is skipped, by kind, and keeps the first path of each."""

    def __init__(self):
        self.counts, self.first = collections.Counter(), {}

    def add(self, kind, path):
        self.counts[kind] += 1
        self.first.setdefault(kind, path)

    def tell(self, root):
        """Reports it in one line, if there is any."""
        others = {kind: n for kind, n in self.counts.items() if kind[0] == '.'}
        parts = [f'{n:,} {kind} ({self.first[kind]})' for kind, n in self.counts.items()
                 if kind not in others]  # fmt: skip
        if others:
            some = sorted(others, key=others.get, reverse=True)
            kinds = ', '.join(f'{others[kind]:,} {kind[1:]}' for kind in some[:MOST_NAMED])
            more = ', ...' if len(some) > MOST_NAMED else ''
            first = self.first[next(iter(others))]
            parts.insert(0, f'{sum(others.values()):,} files that are no images by their names, '
                            f'{kinds}{more} ({first})')  # fmt: skip
        if parts:
            names.say(f'{root}: passed over {"; ".join(parts)}')


def listed(folder):
    """(names of files, names of folders, other names) in a folder, sorted."""
    files, folders, odd = [], [], []
    if '://' in folder:
        with fetch.explained(folder):
            fs, path = fetch.backend(folder)
            for entry in fs.ls(path, detail=True):  # one request for all of them
                name = entry['name'].rstrip('/')
                if name != path.rstrip('/'):
                    kind = folders if entry['type'] == 'directory' else files
                    kind.append(name.rpartition('/')[2])
        return sorted(files), sorted(folders), odd
    with readable(folder), os.scandir(folder) as entries:
        for entry in entries:
            kind = odd
            with contextlib.suppress(OSError):  # a link to itself
                kind = folders if entry.is_dir() else files if entry.is_file() else odd
            kind.append(entry.name)
    return sorted(files), sorted(folders), odd


def is_run(folder):
    """Whether a folder is the workdir of a run, even of one that has just begun."""
    inside = os.path.exists(f'{folder}/config.json') and os.path.isdir(f'{folder}/checkpoints')
    return inside or os.path.exists(f'{folder}/.lock')


def is_class(folder):
    """Whether a folder in a data set is a class: neither a workdir nor a folder of workdirs."""
    if '://' in folder:
        return True
    if is_run(folder):
        return False
    with readable(folder), os.scandir(folder) as entries:
        inner = [entry.path for entry in itertools.islice(entries, DEEPEST)]
    return not inner or not all(map(is_run, inner))


@contextlib.contextmanager
def readable(folder):
    """Turns an error of the file system into UserError with the folder's name."""
    try:
        yield
    except OSError as e:
        raise UserError(f'can not read folder {folder}: {e.strerror or e}') from e


def identity(folder):
    """Identifies a folder, whatever the path to it."""
    with readable(folder):
        status = os.stat(folder)
    return status.st_dev, status.st_ino


def walked(root, name, passed, seen, depth=1):
    """Yields the images below root/name, as paths from root.

    `seen` holds the identities of folders that are not entered again.
    """
    folder = f'{root}/{name}'
    if '://' not in root:
        if depth > DEEPEST:
            return passed.add(f'folders more than {DEEPEST} deep', folder)
        if is_run(folder):
            return passed.add('workdirs of runs', folder)
    files, folders, odd = listed(folder)
    for file in shown(files):
        if file.lower().endswith(SUFFIXES):
            yield f'{name}/{file}'
        else:
            suffix = os.path.splitext(file)[1].lower() or 'without suffix'
            passed.add(f'.{suffix}', f'{folder}/{file}')
    for other in shown(odd):
        link = os.path.islink(f'{folder}/{other}')
        kind = 'links that lead nowhere' if link else 'names that are no files'
        passed.add(kind, f'{folder}/{other}')
    for inner in shown(folders):
        if '://' not in root:
            here = identity(f'{folder}/{inner}')
            if here in seen:
                passed.add('links to folders that are read already', f'{folder}/{inner}')
                continue
            seen.add(here)
        yield from walked(root, f'{name}/{inner}', passed, seen, depth + 1)


def divided(path):
    """Split folders of a folder, `train` among them; None if the folder has only classes."""
    inner = shown(listed(path)[1])
    if 'train' in inner and shown(listed(f'{path}/train')[1]):
        return inner
    others = [name for name in inner if name.casefold() in splits.WORDS]
    if len(inner) > 1 and len(others) == len(inner):
        raise UserError(
            f'{path} has folders {", ".join(map(printable, inner))}, no classes by their names, '
            'and no folder train; rename the one to train on'
        )
    return None


def shown(found):
    """Names that are not hidden."""
    return [name for name in found if not name.startswith('.')]


def read(path, split):
    """(Files, names of the classes) of a split of a folder, or of a share of one.

    A share is chosen by a hash of the file names, class by class. A class of two or more images has
    at least one on both sides of each bound.
    """
    path = path.rstrip('/')
    if not (epath.Path(path).is_dir() if '://' in path else os.path.isdir(path)):
        raise UserError(f'no folder {path}')
    part, low, high = splits.share(split)
    known = divided(path)
    if known is None and part != 'train':
        raise UserError(
            f'{path} is not divided into train and {part}; name a share of it as source.split, '
            'train[:90%] or train[90%:]'
        )
    if known is not None and part not in known:
        raise splits.missing(path, part, known)
    top, root = (f'{path}/train', f'{path}/{part}') if known else (path, path)
    own = [name for name in shown(listed(top)[1]) if is_class(f'{top}/{name}')]
    if len(own) < 2:
        raise UserError(
            f'{top} has {len(own)} class folders; a data set needs two or more, or else '
            f'{records.MANIFEST}, *.tar or *.parquet'
        )
    classes, passed = names.in_order(own, top), Passed()
    found = images_of(root, passed)
    if part == 'train' and (empty := [name for name in own if not found[name]]):
        raise UserError(
            f'no images in {top}/{empty[0]} ({", ".join(SUFFIXES)}); remove the folder of a class '
            'that has none'
        )
    paths, labels, lacking = [], [], set(range(len(classes)))
    for name, label in zip(found, names.matched(list(found), classes), strict=True):
        if label is None and found[name]:
            raise UserError(f'{root}/{name} is a class that {top} does not have')
        chosen = [f'{root}/{file}' for file in chosen_of(found[name], low, high)]
        paths += chosen
        labels += [label] * len(chosen)
        lacking -= {label} if chosen else set()
    if not paths:
        raise UserError(f'no images in {root}/*/ for split {split!r} ({", ".join(SUFFIXES)})')
    passed.tell(root)
    if lacking:
        some = names.listed([classes[label] for label in sorted(lacking)])
        names.say(f'{path}: split {split} has no images of {some}')
    return Files(root, paths, labels), tuple(classes)


def images_of(root, passed):
    """{class: paths from root} of the class folders in a folder; reads each real folder once."""
    files, folders, odd = listed(root)
    for file in shown(files):
        if file.lower().endswith(SUFFIXES):
            passed.add('images outside of class folders', f'{root}/{file}')
    for name in shown(odd):
        passed.add('links that lead nowhere', f'{root}/{name}')
    classes = []
    for name in shown(folders):
        if is_class(f'{root}/{name}'):
            classes.append(name)
        else:
            passed.add('workdirs of runs', f'{root}/{name}')
    seen = set()
    if '://' not in root:
        above = pathlib.Path(os.path.realpath(root))
        seen = {identity(path) for path in (above, *above.parents)}
        seen |= {identity(f'{root}/{name}') for name in classes}
    return {name: list(walked(root, name, passed, seen)) for name in classes}


def chosen_of(files, low, high):
    """Files of a class in a share from `low` to `high` percent, in their order.

    The hash of its name places a file, so that it keeps its place when others are added; but each
    bound has at least one file on both sides. Shares that do not overlap have no file in common.
    """
    if (low, high) == (0, 100):
        return files
    order = sorted(files, key=percentile)
    hashes = [percentile(file) for file in order]

    def place(bound):
        if bound in (0, 100):
            return len(files) if bound else 0
        k = bisect.bisect_left(hashes, bound)
        return min(max(k, 1), len(files) - 1) if len(files) > 1 else k

    within = set(order[place(low) : place(high)])
    return [file for file in files if file in within]


def percentile(name):
    """Hash of a file's name as a number in [0, 100)."""
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return int.from_bytes(digest[:8], 'big') / 2**64 * 100
