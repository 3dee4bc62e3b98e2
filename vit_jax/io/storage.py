"""Files of a run on a disk or at an address (gs://...).

An object at an address is written whole or not at all; it can neither be appended to nor locked. If
a server is unreachable, fsspec (small files) and TensorStore (arrays) retry. This module limits for
how long, and makes the error message.
"""

import concurrent.futures
import contextlib
import json
import logging
import os
import pathlib
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import fsspec
from etils import epath

from vit_jax.errors import UserError
from vit_jax.io import atomic, retries
from vit_jax.io.reasons import chain, http_status, is_external, is_unanswered, reason
from vit_jax.io.text import brief, printable

SILENCE = 30  # seconds without a byte, after which a request is retried
RETRIES = 5  # of a request, after 1, 2, 4, 8, 16 s: gcsfs' default, for TensorStore too
PERIOD = 10  # least seconds between two writes of a growing file
MOST_JSON = 10_000_000  # bytes; parsed, they take 20 times that
Path = pathlib.Path | epath.Path


def cache() -> pathlib.Path:
    """Folder for what outlasts runs: $VIT_JAX_CACHE, else one in the user's cache folder."""
    chosen = os.environ.get('VIT_JAX_CACHE')
    if not chosen:
        chosen = os.path.join(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'vit_jax')
    return pathlib.Path(chosen).expanduser().absolute()


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is an address."""
    return '://' in str(path)


def set_up() -> None:
    """Limits how long the libraries wait for an unreachable server; raises UserError."""
    # gcsfs queries a bucket's layout over gRPC, which hangs where only HTTPS gets through; it
    # reads this when it is imported.
    os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
    try:
        import aiohttp
        import gcsfs  # noqa: F401
    except ImportError as e:
        raise UserError(f'gs:// needs {e.name}: pip install "vit_jax[remote]"') from e
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # it raises what it logs
    # TensorStore writes without gcsfs, whose cached listings would be stale.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
    fsspec.config.conf['gcs'] = fsspec.config.conf.get('gcs', {}) | {
        'requests_timeout': timeout, 'use_listings_cache': False,
    }  # fmt: skip
    os.environ.setdefault('TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS', str(SILENCE))
    os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS', str(SILENCE))
    os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES', '1')
    retries.limit_retries(RETRIES)


@contextlib.contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    """Turns an error of a server into UserError, in one line; errors of a disk propagate.

    `doing` is the verb of the message: 'read', 'write'.
    """
    try:
        yield
    except Exception as e:
        if not is_remote(path) or isinstance(e, UserError) or not is_external(e):
            raise
        raise UserError(f'cannot {doing} {path}: {explain(e)}') from e


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns an error of a disk or a server, as `path` is written, into UserError, in one line."""
    try:
        with explained(path, 'write'):
            yield
    except OSError as e:
        raise UserError(f'cannot write {path}: {e.strerror or e}') from e


def check_file(path: str | Path) -> None:
    """Raises UserError if a file to be written is an existing folder or device."""
    if not is_remote(path):
        with writing(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode):
                what = 'a folder; name a file' if stat.S_ISDIR(mode) else 'not a regular file'
                raise UserError(f'cannot write {path}: it is {what}')


def check_free(path: Path, force: bool) -> None:
    """Raises UserError if `path` exists and is not an empty folder, unless `force`.

    A device or a pipe is never replaced.
    """
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty and not force:
        raise UserError(f'{printable(path)} exists; --force replaces it')
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f'cannot write {printable(path)}: it is not a regular file')


def prepare_file(path: Path) -> Path:
    """Makes the folder of a path and returns the path; raises UserError if it can't be written."""
    check_file(path)
    make_folder(path.parent, path)
    return path


def make_folder(path: Path, named: Path | None = None) -> Path:
    """Makes a folder, and its parents, checks that files can be written in it, and returns it.

    Raises UserError with the path `named`, or else with that of the folder.
    """
    if not is_remote(path):
        with writing(named or path):
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
    return path


def is_unavailable(error: BaseException) -> bool:
    """Whether a server gave no answer, or none about the file, which may be intact there."""
    words = 'UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|PERMISSION_DENIED|UNAUTHENTICATED|Forbidden'
    texts = ' '.join(str(e) for e in chain(error))
    return is_unanswered(error) or http_status(error) in (401, 403) or bool(re.search(words, texts))


def explain(error: BaseException) -> str:
    """Explains in one line why a server failed."""
    texts = [str(e) for e in chain(error)]
    for text in texts:
        if text.startswith('Forbidden'):  # gcsfs'
            return 'the server answers 403 Forbidden'
    return re.sub(r'\s*\[(source locations|tensorstore).*', '', reason(error))


def check_writable(path: Path) -> None:
    """Raises UserError unless an object can be written in the folder `path`.

    The object, .lock, names the last process that began.
    """
    bucket = str(path).partition('://')[2].partition('/')[0]
    try:
        with explained(path, 'write to'):
            (path / '.lock').write_text(f'{os.uname().nodename} {os.getpid()}\n')
    except UserError as e:
        if any(isinstance(cause, FileNotFoundError) for cause in chain(e)):
            raise UserError(f'cannot write to {path}: there is no bucket {bucket!r}') from e
        raise


def read(path: Path, most: int | None = None) -> bytes | None:
    """Bytes of a file, None if it is missing; raises UserError, also for more than `most` bytes."""
    with explained(path, 'read'):
        try:
            if not is_remote(path):
                status = os.stat(path)
                if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                    raise UserError(f'{path} is a device or a pipe, not a file')
                if most is not None and status.st_size > most:
                    raise UserError(f'{path} has more than {most:,} bytes')
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as e:
            if is_remote(path):
                raise
            raise UserError(f'cannot read {path}: {e.strerror or e}') from e


def read_json(path: Path) -> dict[str, Any]:
    """Object in a JSON file, {} if it is missing; raises UserError for any other content."""
    data = read(path, MOST_JSON)
    if data is None:
        return {}
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as e:
        raise UserError(f'{path} is not a JSON file ({brief(e)})') from e
    if not isinstance(value, dict):
        raise UserError(f'{path} is not a JSON object')
    return value


def read_local(path: str | os.PathLike, most: int = 2**30) -> bytes:
    """Bytes of a file on a disk.

    Raises OSError; UserError for more than `most` bytes, or for a pipe or a device, which may never
    end.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UserError('it is not a regular file')
    if status.st_size > most:
        raise UserError(f'{status.st_size:,} bytes are more than {most:,}')
    with open(path, 'rb', buffering=0) as file:
        return file.read()


def write(path: Path, data: bytes, sync: bool = False) -> None:
    """Writes bytes to a file in one step, flushed to disk if `sync`; raises UserError."""
    check_file(path)
    with writing(path):
        if is_remote(path):
            path.write_bytes(data)
            return
        atomic.remove_leftovers(path.parent, path.name)
        with atomic.replace_file(path, sync) as part:
            part.write_bytes(data)


class Growing:
    """A file that grows: appended to on a disk; at an address written whole, periodically."""

    def __init__(self, path: Path, data: bytes = b''):
        write(path, data)
        self.path, self.file = path, None
        if not is_remote(path):
            with writing(path):
                self.file = open(path, 'ab', buffering=0)
            return
        self.data, self.written = bytearray(data), len(data)
        self.uploads = concurrent.futures.ThreadPoolExecutor(1)
        self.running = None
        self.next = time.monotonic() + PERIOD

    def write(self, data: bytes) -> None:
        """Appends bytes: at once on a disk, at an address after a while or with `sync`.

        Raises UserError.
        """
        if self.file:
            with writing(self.path):
                while data:  # a disk that becomes full accepts a part
                    data = data[self.file.write(data) :]
            return
        self.data += data
        if time.monotonic() > self.next and (self.running is None or self.running.done()):
            # If it fails, the next one includes these bytes.
            self.running = self.uploads.submit(self.upload, bytes(self.data))

    def upload(self, data: bytes) -> None:
        """Writes the object anew, and sets when it may be written next."""
        began = time.monotonic()
        try:
            write(self.path, data)
            self.written = len(data)
        finally:
            now = time.monotonic()
            self.next = now + max(PERIOD, 20 * (now - began))

    def sync(self) -> None:
        """Waits until every byte is written; raises UserError, also if the file was removed."""
        if self.file:
            try:  # a removed file has one link less than a file in its place
                lost = os.fstat(self.file.fileno()).st_nlink < os.stat(self.path).st_nlink
            except (FileNotFoundError, NotADirectoryError):
                lost = True
            if lost:
                raise UserError(
                    f'{self.path} was removed or replaced while the run wrote it; the same command '
                    'resumes from the newest checkpoint that is left'
                )
            return
        if self.running:
            concurrent.futures.wait([self.running])
        if self.written < len(self.data):
            self.upload(bytes(self.data))

    def close(self) -> None:
        """Writes what is left; raises UserError."""
        if self.file:
            self.file.close()
            return
        try:
            self.sync()
        finally:
            self.uploads.shutdown()
