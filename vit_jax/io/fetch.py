"""Fetches weights from addresses (gs://, https://, hf://, ...) into a cache of local files.

Every address has its own folder in the cache. A file in it is complete or does not exist;
`.fetched` has the version of each on the server; one process at a time checks and downloads.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import fsspec
from fsspec.callbacks import Callback

from vit_jax.errors import UserError
from vit_jax.io import addresses, atomic
from vit_jax.io.addresses import File
from vit_jax.io.progress import Bar
from vit_jax.io.reasons import is_external, reason
from vit_jax.io.text import printable


def local(address: str | os.PathLike, companions: Sequence[str] = ()) -> pathlib.Path:
    """Local path of an address: itself, or a cached copy that is up to date with the server.

    An address in .npz, .safetensors or .json is a file; its usual companions (config.json, ...) and
    those named are put beside it if they exist. Any other address is a folder, of which
    *.safetensors, *.json and the companions are fetched. If the server announces no size, the end
    of the connection counts as the end of the file.

    Raises:
      UserError: nothing is there, the server does not answer and the cache has no copy, or the
        download fails.
    """
    address = os.fspath(address)
    if '://' not in address:
        path = pathlib.Path(address).expanduser()
        if not path.exists():
            raise UserError(f'no such file or folder: {path}')
        return path
    name = addresses.last_name(address)
    addresses.refuse_pickle(address, name)
    is_file = name.endswith(addresses.FILES)
    for chosen in (*companions, *([name] if is_file else [])):
        addresses.safe_name(chosen, address)
    folder = addresses.cache_folder(address)
    with addresses.explained(address):
        fs, path = addresses.backend(address)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, address):
            atomic.remove_leftovers(folder)
            try:
                list_files = addresses.files_beside if is_file else addresses.files_in
                with addresses.unreachable():
                    files = list_files(fs, path, address, companions)
            except addresses.Unreachable as e:
                check_cached(folder, name if is_file else None, address, str(e))
            else:
                update(fs, files, folder, address)
    return folder / name if is_file else folder


def named(address: str, names: Sequence[str]) -> pathlib.Path:
    """Folder with those of the named files that are in the folder of an address; cached.

    Raises UserError if none is there, or as `local` does.
    """
    folder = addresses.cache_folder(f'{address}#{",".join(names)}')
    with addresses.explained(address):
        fs, path = addresses.backend(address)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, address):
            atomic.remove_leftovers(folder)
            try:
                with addresses.unreachable():
                    files = addresses.files_named(fs, path.rstrip('/'), names)
            except addresses.Unreachable as e:
                check_cached(folder, None, address, str(e))
            else:
                if not files:
                    raise UserError(f'{address} has none of {", ".join(names)}')
                update(fs, files, folder, address)
    return folder


@contextlib.contextmanager
def locked(folder: pathlib.Path, address: str) -> Iterator[None]:
    """Locks a cached folder; a second process waits, and then finds the files there."""
    lock = os.open(folder / '.lock', os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = f'{address}: waiting for another process that is fetching it'
            print(printable(text), file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise  # else a file system without locks: both download, the last one wins
        yield
    finally:
        os.close(lock)


def stamp(path: pathlib.Path) -> dict[str, int]:
    """Size and time of a file, which identify the one that was downloaded."""
    stat = path.stat()
    return {'size': stat.st_size, 'mtime_ns': stat.st_mtime_ns}


def cached_versions(folder: pathlib.Path) -> dict[str, dict[str, Any] | None]:
    """{name: version} of the cached files, None for those that changed after the download."""
    try:
        entries = json.loads((folder / '.fetched').read_text())
        return {
            name: entry['version'] if stamp(folder / name) == entry['file'] else None
            for name, entry in entries.items()
        }
    except (FileNotFoundError, ValueError, KeyError):
        return {}


def check_cached(folder: pathlib.Path, name: str | None, address: str, reason: str) -> None:
    """Prints that the cached copy is used, as the server gave no answer, for a reason.

    Raises UserError if there is none.
    """
    files = cached_versions(folder)
    if not files or None in files.values() or (name and name not in files):
        raise UserError(f'{address} cannot be reached ({reason}), and no copy is in the cache')
    date = time.strftime('%Y-%m-%d', time.localtime((folder / '.fetched').stat().st_mtime))
    text = f'{address} cannot be reached ({reason}); using the copy of {date}'
    print(printable(text), file=sys.stderr)


def update(
    fs: fsspec.AbstractFileSystem, files: Sequence[File], folder: pathlib.Path, address: str
) -> None:
    """Downloads missing and changed files; all new files are moved into place at the end."""
    cached = cached_versions(folder)
    outdated = [f for f in files if not f.version or cached.get(f.name) != f.version]
    if not outdated and cached.keys() == {f.name for f in files}:
        return
    size = sum(f.size or 0 for f in outdated)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f'{address} has {size:,} bytes, and {folder} has room for {free:,}')
    if outdated:
        download_all(fs, outdated, folder, address)
    entries = {f.name: {'version': f.version, 'file': stamp(folder / f.name)} for f in files}
    with atomic.replace_file(folder / '.fetched', sync=False) as part:
        part.write_text(json.dumps(entries, indent=2) + '\n')
    for name in cached.keys() - entries.keys():  # gone from the server
        (folder / addresses.safe_name(name, address)).unlink(missing_ok=True)


def download_all(
    fs: fsspec.AbstractFileSystem, files: Sequence[File], folder: pathlib.Path, address: str
) -> None:
    """Downloads files into a folder, all or none, and shows the progress."""
    names = ', '.join(f.name for f in files)
    title = names if len(files) == 1 else f'{len(files)} files'
    total = None if any(f.size is None for f in files) else sum(f.size for f in files)
    with (
        contextlib.ExitStack() as parts,
        Bar(printable(title), total, unit='bytes', brief=True) as bar,
    ):
        if not bar.bar:
            size = '' if total is None else f' ({total:,} bytes)'
            print(printable(f'fetching {address}: {names}{size}'), file=sys.stderr)
        done = 0
        for file in files:
            part = parts.enter_context(atomic.replace_file(folder / file.name))
            done += download(fs, file, part, address, lambda n, done=done: bar.update(done + n))


def download(
    fs: fsspec.AbstractFileSystem,
    file: File,
    path: pathlib.Path,
    address: str,
    show: Callable[[int], None],
) -> int:
    """Downloads a file to a path and returns its size.

    Args:
      address: the address of the file or its folder, for messages.
      show: called with the number of bytes so far.

    Raises:
      UserError: the connection breaks off, or the size is not the announced one.
    """
    meter = Meter(file, address, show)
    try:
        fs.get_file(file.path, str(path), callback=meter)
    except Exception as e:
        if isinstance(e, UserError) or not is_external(e):
            raise
        raise UserError(
            f'{address}: {file.name} broke off after {meter.value:,} bytes: {reason(e)}'
        ) from e
    size = path.stat().st_size
    if file.size not in (None, size):
        raise UserError(f'{address}: {file.name} has {size:,} bytes of {file.size:,} announced')
    return size


class Meter(Callback):
    """Counts and shows the bytes of a file; raises UserError if there are more than announced."""

    def __init__(self, file: File, address: str, show: Callable[[int], None]):
        super().__init__()
        self.file, self.address, self.show = file, address, show

    def call(self, *args: Any, **kwargs: Any) -> None:
        """Called by fsspec when more bytes have arrived."""
        if self.file.size is not None and self.value > self.file.size:
            raise UserError(
                f'{self.address}: {self.file.name} has more than the {self.file.size:,} bytes '
                'announced'
            )
        self.show(self.value)
