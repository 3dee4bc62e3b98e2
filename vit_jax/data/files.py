"""Finds and reads the image files that a user names on a command line, by paths or addresses."""

import os
import pathlib
import stat
import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from vit_jax.data import images
from vit_jax.data.readers import formats
from vit_jax.errors import UserError
from vit_jax.io import addresses, fetch, storage
from vit_jax.io.text import printable

DEFAULT_SIZE = 224  # pixels per side, for a model that accepts any
MOST_BYTES = 2**30  # of an image file
MOST_FILES = 2**20  # in folders
DEEPEST = 32  # levels of folders
SUFFIXES = tuple(f'.{suffix}' for suffix in formats.SUFFIXES)


def find_images(paths: list[str | os.PathLike], *, skip: os.PathLike | None = None) -> list[str]:
    """Lists image files: those named, and those in folders and their sub-folders, sorted.

    A name is a path, or an address that fsspec supports: gs://, https://, hf://. An http(s) address
    is a folder if it ends in a slash. Images in the folder `skip`, a command's own output, are left
    out. Raises UserError if a name is missing or a folder has no images, or too many.
    """
    files, above = [], set() if skip is None or not os.path.exists(skip) else {identity(skip)}
    for name in paths:
        name = os.path.expanduser(os.fspath(name))
        remote = '://' in name
        images = find_in_address(name) if remote else find_in_folder(name, above)
        if images is None:
            files.append(name)
        elif not images:
            raise UserError(f'no images in {printable(name)} ({", ".join(SUFFIXES)})')
        files += images or []
        if len(files) > MOST_FILES:
            raise UserError(f'{name} has more than {MOST_FILES:,} images; name a part of them')
    return files


def identity(path: str | os.PathLike) -> tuple[int, int]:
    """Identifies a file or folder, whatever the path to it."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def find_in_folder(name: str, above: set) -> list[str] | None:
    """Lists image files below a folder; None for a file. Raises UserError if there is neither."""
    try:
        if stat.S_ISDIR(os.stat(name).st_mode):
            return list(walk(name, above))
    except FileNotFoundError as e:
        if e.filename == name:
            raise UserError(f'no image {printable(name)}') from e
        raise UserError(f'cannot read folder {e.filename}: {e.strerror}') from e
    except (OSError, ValueError) as e:  # ValueError: a null byte
        reason = getattr(e, 'strerror', None) or e
        raise UserError(f'cannot read {getattr(e, "filename", None) or name}: {reason}') from e
    return None


def walk(folder: str, above: set) -> Iterator[str]:
    """Yields the image files below a folder, sorted; follows links, but not in cycles.

    `above` holds the identities of the folders that contain it, and of those to leave out.
    """
    here = above | {identity(folder)}
    if len(here) == len(above) or len(here) > DEEPEST:
        return
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith('.'):
            continue
        if os.path.isdir(entry.path):
            yield from walk(entry.path, here)
        elif entry.name.lower().endswith(SUFFIXES):
            yield entry.path


def find_in_address(address: str) -> list[str] | None:
    """Lists image files below a folder at an address, or None for a file."""
    with addresses.explained(address):
        fs, path = addresses.backend(address)
        if address.startswith(('http://', 'https://')):
            is_folder = addresses.last_name(address) == '' or address.partition('?')[0][-1:] == '/'
        else:
            is_folder = fs.info(path)['type'] == 'directory'
        if not is_folder:
            fs.info(path)  # raises where there is none
            return None
        names = sorted(fs.find(path, maxdepth=DEEPEST))
        return [
            fs.unstrip_protocol(name) for name in names
            if addresses.last_name(name).lower().endswith(SUFFIXES)
            and '/.' not in name.removeprefix(path)
        ]  # fmt: skip


def pixels(path: str | os.PathLike, view: Callable) -> np.ndarray:
    """Reads an image file at a path or an address through `view`: uint8 [H, W, 3].

    `view` is what tasks.fixed_view returns. Raises images.Unreadable, a UserError, with its name.
    """
    path = os.fspath(path)
    try:
        return view(images.read(content(path)), None)
    except images.Unreadable as e:
        raise images.Unreadable(f'unreadable image {printable(path)}: {e}') from e


def content(path: str) -> bytes:
    """Reads a file at a path or an address; raises images.Unreadable if it can't be read."""
    try:
        return downloaded(path) if '://' in path else storage.read_local(path, MOST_BYTES)
    except images.Unreadable:
        raise
    except (OSError, UserError) as e:
        raise images.Unreadable(getattr(e, 'strerror', None) or str(e)) from e


def downloaded(address: str) -> bytes:
    """Downloads a file at an address; raises UserError if it is missing, too large or truncated."""

    def check(size):
        if size > MOST_BYTES:
            raise UserError(f'{address} has more than {MOST_BYTES:,} bytes')

    with addresses.explained(address), tempfile.TemporaryDirectory(prefix='vit_jax_') as folder:
        fs, path = addresses.backend(address)
        file = addresses.File(addresses.last_name(address), path, addresses.version(fs.info(path)))
        check(file.size or 0)
        to = pathlib.Path(folder) / 'image'
        fetch.download(fs, file, to, address, check)
        return to.read_bytes()
