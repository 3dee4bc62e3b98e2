"""Writes local files and folders in one step: complete, or as they were.

The content goes to a part file, `.NAME.HOST.PID.part` in the same folder, which is flushed to disk
and then renamed. `storage.write` does the same for bytes, also at an address.
"""

import contextlib
import ctypes
import glob
import os
import pathlib
import shutil
import time
import zlib
from collections.abc import Iterator

ABANDONED = 24 * 3600  # seconds after which a part file of another machine is a leftover


@contextlib.contextmanager
def replace_file(path: str | os.PathLike, sync: bool = True) -> Iterator[pathlib.Path]:
    """Yields the path of a part file to write, which replaces `path` at the end of the block.

    If the block raises, the part file is removed and `path` stays as it is.

    Args:
      path: the file. The file that replaces it has the permissions with which it was written.
      sync: whether the part file is flushed to disk first, so that a crash of the machine leaves
        one of the two files.

    Raises:
      OSError: the disk refuses.
    """
    path = pathlib.Path(path)
    part = part_path(path)
    try:
        yield part
        if sync:
            flush(part)
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a new folder to fill with files, which replaces `path` at the end of the block.

    If the block raises, the new folder is removed and `path` stays as it is.

    Raises:
      OSError: the disk refuses.
    """
    path = pathlib.Path(path).absolute()
    part = part_path(path)
    try:
        part.mkdir(parents=True)
        yield part
        for file in part.iterdir():
            flush(file)
        if path.exists():
            exchange(part, path)
        else:
            part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def part_path(path: str | os.PathLike) -> pathlib.Path:
    """Path of this process's part file of a file."""
    path = pathlib.Path(path)
    return path.with_name(f'.{path.name}.{host()}.{os.getpid()}.part')


def host() -> str:
    """An identifier of this machine, as processes of several may share a folder and an id."""
    return f'{zlib.crc32(os.uname().nodename.encode()):08x}'


def remove_leftovers(folder: str | os.PathLike, name: str | None = None) -> None:
    """Removes part files of killed processes, whose ids are unused or have become this process's.

    Those of other machines, whose processes are unknown, are removed after ABANDONED seconds.

    Args:
      folder: the folder; nothing happens if it does not exist.
      name: name of the file whose part files are removed. None: of any file.
    """
    for part in pathlib.Path(folder).glob(f'.{"*" if name is None else glob.escape(name)}.*.part'):
        where, pid = part.name.split('.')[-3:-1]
        if pid.isdecimal() and (
            is_abandoned(part) if where != host()
            else int(pid) == os.getpid() or not is_running(int(pid))
        ):  # fmt: skip
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)


def is_abandoned(part: pathlib.Path) -> bool:
    """Whether nothing was written to a part file for ABANDONED seconds."""
    try:
        return time.time() - part.stat().st_mtime > ABANDONED
    except OSError:  # it has become the file
        return False


def is_running(pid: int) -> bool:
    """Whether a process of this machine has the id."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def flush(file: str | os.PathLike) -> None:
    """Waits until the content of a file is on the disk."""
    with open(file, 'rb') as stream:
        os.fsync(stream.fileno())


def exchange(a: pathlib.Path, b: pathlib.Path) -> None:
    """Swaps the names of two folders, atomically where the system can."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # not Linux
        failed = True
    else:
        here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        failed = renameat2(here, os.fsencode(a), here, os.fsencode(b), swap)
    if failed:
        aside = b.with_name(b.name + '.old')
        b.rename(aside)
        a.rename(b)
        aside.rename(a)
