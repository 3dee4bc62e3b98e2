"""Lists the image files below a folder, on disk or at an address, and reports what is skipped."""

import collections
import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator

from vit_jax.data.readers import formats, names
from vit_jax.errors import UserError
from vit_jax.io import addresses

SUFFIXES = tuple(f'.{suffix}' for suffix in formats.SUFFIXES)
DEEPEST = 32  # levels of folders
MOST_NAMED = 4  # suffixes in the message about skipped files


class Skipped:
    """Counts what is skipped, by kind, and keeps the first path of each."""

    def __init__(self):
        self.counts, self.first = collections.Counter(), {}

    def add(self, kind: str, path: str) -> None:
        """Counts a path; a kind that begins with a dot is the suffix of a file."""
        self.counts[kind] += 1
        self.first.setdefault(kind, path)

    def report(self, root: str) -> None:
        """Prints one line, if anything was skipped."""
        others = {kind: n for kind, n in self.counts.items() if kind[0] == '.'}
        parts = [f'{n:,} {kind} ({self.first[kind]})' for kind, n in self.counts.items()
                 if kind not in others]  # fmt: skip
        if others:
            some = sorted(others, key=others.get, reverse=True)
            kinds = ', '.join(f'{others[kind]:,} {kind[1:]}' for kind in some[:MOST_NAMED])
            more = ', ...' if len(some) > MOST_NAMED else ''
            first = self.first[next(iter(others))]
            parts.insert(0, f'{sum(others.values()):,} files without the suffix of an image, '
                            f'{kinds}{more} ({first})')  # fmt: skip
        if parts:
            names.print_once(f'{root}: skipped {"; ".join(parts)}')


def list_folder(folder: str) -> tuple[list[str], list[str], list[str]]:
    """(names of files, names of folders, other names) in a folder, sorted."""
    files, folders, odd = [], [], []
    if '://' in folder:
        with addresses.explained(folder):
            fs, path = addresses.backend(folder)
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


def is_run(folder: str) -> bool:
    """Whether a folder is the workdir of a run, even of one that has just begun."""
    inside = os.path.exists(f'{folder}/config.json') and os.path.isdir(f'{folder}/checkpoints')
    return inside or os.path.exists(f'{folder}/.lock')


def is_class(folder: str) -> bool:
    """Whether a folder in a data set is a class: neither a workdir nor a folder of workdirs."""
    if '://' in folder:
        return True
    if is_run(folder):
        return False
    with readable(folder), os.scandir(folder) as entries:
        inner = [entry.path for entry in itertools.islice(entries, DEEPEST)]
    return not inner or not all(map(is_run, inner))


@contextlib.contextmanager
def readable(folder: str | os.PathLike) -> Iterator[None]:
    """Turns an error of the file system into UserError with the folder's name."""
    try:
        yield
    except OSError as e:
        raise UserError(f'cannot read folder {folder}: {e.strerror or e}') from e


def identity(folder: str | os.PathLike) -> tuple[int, int]:
    """Identifies a folder, whatever the path to it."""
    with readable(folder):
        status = os.stat(folder)
    return status.st_dev, status.st_ino


def walk(
    root: str, name: str, skipped: Skipped, seen: set[tuple[int, int]], depth: int = 1
) -> Iterator[str]:
    """Yields the images below root/name, as paths from root.

    `seen` holds the identities of folders that are not entered again.
    """
    folder = f'{root}/{name}'
    if '://' not in root:
        if depth > DEEPEST:
            return skipped.add(f'folders more than {DEEPEST} deep', folder)
        if is_run(folder):
            return skipped.add('workdirs of runs', folder)
    files, folders, odd = list_folder(folder)
    for file in visible(files):
        if file.lower().endswith(SUFFIXES):
            yield f'{name}/{file}'
        else:
            suffix = os.path.splitext(file)[1].lower() or 'without suffix'
            skipped.add(f'.{suffix}', f'{folder}/{file}')
    for other in visible(odd):
        link = os.path.islink(f'{folder}/{other}')
        kind = 'dangling links' if link else 'special files'
        skipped.add(kind, f'{folder}/{other}')
    for inner in visible(folders):
        if '://' not in root:
            here = identity(f'{folder}/{inner}')
            if here in seen:
                skipped.add('links to folders that are read elsewhere', f'{folder}/{inner}')
                continue
            seen.add(here)
        yield from walk(root, f'{name}/{inner}', skipped, seen, depth + 1)


def visible(found: Iterable[str]) -> list[str]:
    """Names that are not hidden."""
    return [name for name in found if not name.startswith('.')]
