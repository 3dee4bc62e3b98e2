"""A run's files at an address (gs://...): what differs there from a disk.

An object is written whole or not at all; it can neither be appended to nor locked. Where a server
is away, fsspec (small files) and TensorStore (arrays) ask again and again: here is for how long,
and what is said in the end.
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

import fsspec

from vit_jax.errors import UserError
from vit_jax.io.reasons import chain, foreign, reason, silent, status
from vit_jax.io.text import brief, printable

SILENCE = 30  # seconds without a byte, after which a request is made anew
RETRIES = 5  # of a request, after 1, 2, 4, 8, 16 s: gcsfs' own number, for TensorStore too
PERIOD = 10  # seconds between two writes of a growing file, at least
MOST_JSON = 10_000_000  # bytes; parsed, they take 20 times that


def cache():
    """The folder of what outlasts runs: $VIT_JAX_CACHE, else one in the user's for caches."""
    chosen = os.environ.get('VIT_JAX_CACHE')
    if not chosen:
        chosen = os.path.join(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'vit_jax')
    return pathlib.Path(chosen).expanduser().absolute()


def remote(path):
    return '://' in str(path)


def set_up():
    """Bounds how long the libraries wait for a server that is away. Raises UserError."""
    # gcsfs asks for a bucket's layout over gRPC, which hangs where only HTTPS gets through; it
    # reads this as it is imported.
    os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
    try:
        import aiohttp
        import gcsfs  # noqa: F401
    except ImportError as e:
        raise UserError(f'gs:// needs {e.name}: pip install "vit_jax[remote]"') from e
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # what it logs it raises as well
    # TensorStore writes behind gcsfs' back, so what gcsfs has listed once does not stay true.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
    fsspec.config.conf['gcs'] = fsspec.config.conf.get('gcs', {}) | {
        'requests_timeout': timeout, 'use_listings_cache': False,
    }  # fmt: skip
    os.environ.setdefault('TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS', str(SILENCE))
    os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS', str(SILENCE))
    os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES', '1')
    from orbax.checkpoint._src.serialization import tensorstore_utils  # takes seconds

    # TensorStore's own default is a quarter of an hour, and Orbax has no setting for it.
    retries = {'max_retries': RETRIES, 'initial_delay': '1s', 'max_delay': '16s'}
    for context in ('_BASE_TS_CONTEXT', '_DEFAULT_OCDBT_TS_CONTEXT'):
        getattr(tensorstore_utils, context)['gcs_request_retries'] = retries


@contextlib.contextmanager
def explained(path, doing):
    """Turns what a server refuses into one line for the user; a disk's errors stay as they are."""
    try:
        yield
    except Exception as e:
        if not remote(path) or isinstance(e, UserError) or not foreign(e):
            raise
        raise UserError(f'can not {doing} {path}: {why(e)}') from e


@contextlib.contextmanager
def writing(path):
    """Turns what a disk or a server refuses, as `path` is written, into one line for the user."""
    try:
        with explained(path, 'write'):
            yield
    except OSError as e:
        raise UserError(f'can not write {path}: {e.strerror or e}') from e


def check_file(path):
    """Raises UserError where a folder or a device has the place of a file to be written."""
    if not remote(path):
        with writing(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode):
                what = 'a folder; name a file' if stat.S_ISDIR(mode) else 'no regular file'
                raise UserError(f'can not write {path}: it is {what}')


def check_free(path, force):
    """Raises UserError where anything but an empty folder is at `path`, unless `force`.

    A device or a pipe is never replaced.
    """
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty and not force:
        raise UserError(f'{printable(path)} is there already; --force replaces it')
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f'can not write {printable(path)}: it is no regular file')


def file(path):
    """The path, once its folder is made and a file can be written there. Raises UserError."""
    check_file(path)
    folder(path.parent, path)
    return path


def folder(path, named=None):
    """Makes a folder, and those above it, in which files can be written.

    Raises UserError, of what is `named` if not of the folder.
    """
    if not remote(path):
        with writing(named or path):
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
    return path


def away(error):
    """Whether a server gave no answer, or none that says what it has: all may be well there."""
    words = 'UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|PERMISSION_DENIED|UNAUTHENTICATED|Forbidden'
    texts = ' '.join(str(e) for e in chain(error))
    return silent(error) or status(error) in (401, 403) or bool(re.search(words, texts))


def why(error):
    """One line on what a server said, or did not say."""
    texts = [str(e) for e in chain(error)]
    for text in texts:
        if text.startswith('Forbidden'):  # gcsfs'
            return 'the server answers 403 Forbidden'
    return re.sub(r'\s*\[(source locations|tensorstore).*', '', reason(error))


def check(path):
    """Raises UserError unless an object can be written in the folder `path`.

    The object, .lock, says which process was the last to begin.
    """
    bucket = str(path).partition('://')[2].partition('/')[0]
    try:
        with explained(path, 'write to'):
            (path / '.lock').write_text(f'{os.uname().nodename} {os.getpid()}\n')
    except UserError as e:
        if any(isinstance(cause, FileNotFoundError) for cause in chain(e)):
            raise UserError(f'can not write to {path}: there is no bucket {bucket!r}') from e
        raise


def read(path, most=None):
    """The bytes of a file; None where there is none. Raises UserError, as for more than `most`."""
    with explained(path, 'read'):
        try:
            if not remote(path):
                status = os.stat(path)
                if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                    raise UserError(f'{path} is a device or a pipe, not a file')
                if most is not None and status.st_size > most:
                    raise UserError(f'{path} has more than the {most:,} bytes that such a file may')
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as e:
            if remote(path):
                raise
            raise UserError(f'can not read {path}: {e.strerror or e}') from e


def read_json(path):
    """The object in a JSON file, {} where there is none; UserError for all else that it holds."""
    data = read(path, MOST_JSON)
    if data is None:
        return {}
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as e:
        raise UserError(f'{path} is no JSON file ({brief(e)})') from e
    if not isinstance(value, dict):
        raise UserError(f'{path} is no JSON object')
    return value


def local_bytes(path, most=2**30):
    """The bytes of a file of a disk. Raises OSError; UserError of a pipe, a device, or more than
    `most`: reading these may never end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UserError('it is not a file')
    if status.st_size > most:
        raise UserError(f'{status.st_size:,} bytes are more than {most:,}')
    return pathlib.Path(path).read_bytes()


def write(path, data):
    """Writes bytes to a file, which is complete or as it was. Raises UserError."""
    check_file(path)
    with writing(path):
        if remote(path):
            path.write_bytes(data)
            return
        part = path.with_name(path.name + '.part')
        try:
            part.write_bytes(data)
            part.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
            raise


class Growing:
    """A file that grows: appended to on a disk; elsewhere written whole, now and then."""

    def __init__(self, path, data=b''):
        write(path, data)
        self.path, self.file = path, None
        if not remote(path):
            with writing(path):
                self.file = open(path, 'ab', buffering=0)
            return
        self.data, self.written = bytearray(data), len(data)
        self.uploads = concurrent.futures.ThreadPoolExecutor(1)
        self.running = None
        self.next = time.monotonic() + PERIOD

    def write(self, data):
        """Adds bytes; they are in the file at once, elsewhere after a while, or after `sync`.

        Raises UserError.
        """
        if self.file:
            with writing(self.path):
                while data:  # a disk that becomes full takes a part
                    data = data[self.file.write(data) :]
            return
        self.data += data
        if time.monotonic() > self.next and (self.running is None or self.running.done()):
            # Where it fails the next one has these bytes, too.
            self.running = self.uploads.submit(self.upload, bytes(self.data))

    def upload(self, data):
        began = time.monotonic()
        try:
            write(self.path, data)
            self.written = len(data)
        finally:
            now = time.monotonic()
            self.next = now + max(PERIOD, 20 * (now - began))

    def sync(self):
        """Returns when every byte is written. Raises UserError, as where the file was removed."""
        if self.file:
            try:  # a file in its place has a link more than one that was removed
                lost = os.fstat(self.file.fileno()).st_nlink < os.stat(self.path).st_nlink
            except (FileNotFoundError, NotADirectoryError):
                lost = True
            if lost:
                raise UserError(
                    f'{self.path} was removed or replaced while the run wrote it; the same command '
                    'goes on from the newest checkpoint that is left'
                )
            return
        if self.running:
            concurrent.futures.wait([self.running])
        if self.written < len(self.data):
            self.upload(bytes(self.data))

    def close(self):
        if self.file:
            self.file.close()
            return
        try:
            self.sync()
        finally:
            self.uploads.shutdown()
