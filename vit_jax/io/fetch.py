"""Downloads weights from addresses (gs://, https://, hf://, ...) to local paths, through fsspec.

Every address has its own folder in the cache. A file in it is complete or does not exist;
`.fetched` has the metadata of each from the server; one process at a time checks and downloads.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import time
import urllib.parse

import fsspec
import rich.console
from fsspec.callbacks import Callback
from rich import progress

from vit_jax.errors import UserError
from vit_jax.io import atomic, storage
from vit_jax.io.reasons import foreign, reason, silent
from vit_jax.io.text import printable

FILES = ('.npz', '.safetensors', '.json')  # an address that ends in none of these is a folder
PICKLED = ('.bin', '.pt', '.pth', '.pkl')
COMPANIONS = ('config.json', 'preprocessor_config.json', 'processor_config.json')
TOKENIZERS = ('vocab.json', 'special_tokens_map.json', 'added_tokens.json')
REMOTE = ('gs', 'gcs', 'hf', 'http', 'https')  # protocols of the extra `remote`
# Metadata that identifies a version of a file, by the backends' names.
VERSION = 'etag ETag Last-Modified LastModified mtime modified updated created generation'.split()
VERSION += ['md5Hash', 'blob_id', 'ukey']
NO_PLAIN_NAME = re.compile(r'^\.|\.\.|[/\\]')


@dataclasses.dataclass(frozen=True)
class File:
    """A remote file: its name in the cached folder, its path in the backend, its metadata."""

    name: str
    path: str
    said: dict

    @property
    def size(self):
        return self.said.get('size')


class Unreachable(Exception):
    """The server gave no answer, or none that says whether the file exists."""


def local(address, companions=()):
    """Local path of an address: itself, or a cached copy that is up to date with the server.

    An address in .npz, .safetensors or .json is a file; its usual companions (config.json, ...) and
    those named are put beside it if they exist. Any other address is a folder, of which
    *.safetensors, *.json and the companions are fetched. If the server announces no size, the end
    of the connection counts as the end of the file.
    """
    address = os.fspath(address)
    if '://' not in address:
        path = pathlib.Path(address).expanduser()
        if not path.exists():
            raise UserError(f'no such file or folder: {path}')
        return path
    name = last_name(address)
    if name.endswith(PICKLED):
        raise UserError(pickled(address, name))
    is_file = name.endswith(FILES)
    for chosen in (*companions, *([name] if is_file else [])):
        safe_name(chosen, address)
    folder = cache_folder(address)
    with explained(address):
        fs, path = backend(address)
        folder.mkdir(parents=True, exist_ok=True)
        with held(folder, address):
            atomic.remove_leftovers(folder)
            try:
                find = files_beside if is_file else files_in
                with unreachable():
                    files = find(fs, path, address, companions)
            except Unreachable as e:
                use_cached(folder, name if is_file else None, address, e)
            else:
                update(fs, files, folder, address)
    return folder / name if is_file else folder


def last_name(address):
    """Last component of an address, without a query."""
    return address.partition('?')[0].rstrip('/').rsplit('/', 1)[-1]


def pickled(address, name):
    return (
        f'{address}: {name} is a pickle, which can run code when it is read, and is refused; '
        'name a folder or file with safetensors weights'
    )


def cache_folder(address):
    """Folder of the files of an address, below `storage.cache()`."""
    tail = re.sub(r'[^\w.-]+', '_', last_name(address), flags=re.ASCII).lstrip('.')[:60]
    digest = hashlib.sha256(os.fsencode(address)).hexdigest()[:16]
    return storage.cache() / f'{tail}-{digest}'


def safe_name(name, address):
    """Returns a name that a server may have made up; raises UserError unless it is a plain one."""
    for text in (name, urllib.parse.unquote(name)):
        if NO_PLAIN_NAME.search(text) or not text.isprintable():
            raise UserError(f'{address}: refused a file named {name!r}: no plain file name')
    return name


def quieten():
    """Sets up gcsfs for a command: errors are raised, and not logged with tracebacks."""
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
    # gcsfs queries a bucket's layout over gRPC, which hangs where only HTTPS gets through.
    os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')


def backend(address):
    """(file system, path) of an address; raises UserError if the backend is not installed."""
    quieten()
    protocol, _, place = address.partition('://')
    if protocol in REMOTE and place[:1] in ('', '/'):  # a backend would retry
        kind = {'http': 'host', 'https': 'host', 'hf': 'repository'}.get(protocol, 'bucket')
        raise UserError(f'{address} has no {kind}')
    options = {}
    try:
        if protocol in ('http', 'https'):
            import aiohttp

            # By default a file has five minutes to arrive, and $HTTPS_PROXY is ignored.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
            options['client_kwargs'] = {'timeout': timeout, 'trust_env': True}
        fs, path = fsspec.core.url_to_fs(address, **options)
    except ImportError as e:
        way_out = 'pip install "vit_jax[remote]"' if protocol in REMOTE else e
        raise UserError(f'{address}: no backend for {protocol}:// is installed: {way_out}') from e
    fs.invalidate_cache()
    return fs, path


def files_beside(fs, path, address, companions):
    """Lists the file of an address and those of its companions that exist."""
    name = last_name(address)
    info = fs.info(path)
    if info.get('type') == 'directory':
        raise UserError(f'{address} is a folder; the name of a folder can not end in a file suffix')
    files = [File(name, path, said(info))]
    usual = {'.safetensors': COMPANIONS, '.npz': (pathlib.PurePath(name).stem + '.json',)}
    for other in dict.fromkeys((*usual.get(pathlib.PurePath(name).suffix, ()), *companions)):
        before, mark, query = path.partition('?')
        sibling = before.rsplit('/', 1)[0] + f'/{other}{mark}{query}'
        try:
            with unreachable():
                files.append(File(other, sibling, said(fs.info(sibling))))
        except Exception as e:
            if not foreign(e):
                raise  # else it is missing: a store may answer 404, 403 or 401
    return files


def files_in(fs, path, address, companions):
    """Lists the weights and json files directly in the folder of an address."""
    root = path.rstrip('/')
    entries = [entry for entry in fs.ls(path, detail=True) if entry['type'] == 'file']
    files = []
    for entry in entries:
        name = entry['name'].removeprefix(root + '/')
        if wanted(name) or name in companions:
            safe_name(name, address)
            info = entry if entry.get('size') is not None else fs.info(f'{root}/{name}')
            files.append(File(name, f'{root}/{name}', said(info)))
    if not any(file.name.endswith('.safetensors') for file in files):
        for entry in entries:
            if entry['name'].endswith(PICKLED):
                raise UserError(pickled(address, last_name(entry['name'])))
        raise UserError(f'{address} holds no .safetensors file; an .npz file is named by itself')
    return files


def wanted(name):
    """Whether a file of a folder is fetched by default: weights and json, no tokenizer's."""
    tokenizer = name.startswith('tokenizer') or name in TOKENIZERS
    return name.endswith(('.safetensors', '.json')) and not tokenizer


def said(info):
    """Metadata of a remote file that identifies its version."""
    result = {key: str(info[key]) for key in VERSION if info.get(key) is not None}
    return result if info.get('size') is None else {'size': int(info['size']), **result}


@contextlib.contextmanager
def held(folder, address):
    """Locks a cached folder; a second process waits, and then finds the files there."""
    lock = os.open(folder / '.lock', os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = printable(f'{address}: waiting for another process that is fetching it')
            print(said, file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise  # else a file system without locks: both download, the last one wins
        yield
    finally:
        os.close(lock)


def stamp(path):
    """Size and time of a file, which identify the one that was downloaded."""
    stat = path.stat()
    return {'size': stat.st_size, 'mtime_ns': stat.st_mtime_ns}


def complete(folder):
    """{name: metadata} of the cached files, None for those that changed after the download."""
    try:
        entries = json.loads((folder / '.fetched').read_text())
        return {
            name: entry['said'] if stamp(folder / name) == entry['file'] else None
            for name, entry in entries.items()
        }
    except (FileNotFoundError, ValueError):
        return {}


def use_cached(folder, name, address, reason):
    """Falls back to the cached copy and reports it; raises UserError if there is none."""
    files = complete(folder)
    if not files or None in files.values() or (name and name not in files):
        raise UserError(f'{address} can not be reached ({reason}), and no copy is in the cache')
    date = time.strftime('%Y-%m-%d', time.localtime((folder / '.fetched').stat().st_mtime))
    said = f'{address} can not be reached ({reason}); using the copy of {date}'
    print(printable(said), file=sys.stderr)


def update(fs, files, folder, address):
    """Downloads missing and changed files; all new files are moved into place at the end."""
    cached = complete(folder)
    late = [f for f in files if not f.said or cached.get(f.name) != f.said]
    if not late and cached.keys() == {f.name for f in files}:
        return
    size = sum(f.size or 0 for f in late)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f'{address} has {size:,} bytes, and {folder} has room for {free:,}')
    with contextlib.ExitStack() as replaced, shown(address, late, size) as show:
        for file in late:
            part = replaced.enter_context(atomic.replace_file(folder / file.name))
            download(fs, file, part, address, functools.partial(show, file))
    entries = {f.name: {'said': f.said, 'file': stamp(folder / f.name)} for f in files}
    with atomic.replace_file(folder / '.fetched', sync=False) as part:
        part.write_text(json.dumps(entries, indent=2) + '\n')
    for name in cached.keys() - entries.keys():  # gone from the server
        (folder / safe_name(name, address)).unlink(missing_ok=True)


def download(fs, file, path, address, show):
    """Downloads a file to a path; raises UserError if its size is not as announced."""
    meter = Meter(file, address, show)
    try:
        fs.get_file(file.path, str(path), callback=meter)
    except Exception as e:
        if isinstance(e, UserError) or not foreign(e):
            raise
        raise UserError(
            f'{address}: {file.name} broke off after {meter.value:,} bytes: {reason(e)}'
        ) from e
    got = path.stat().st_size
    if file.size not in (None, got):
        raise UserError(f'{address}: {file.name} has {got:,} bytes of {file.size:,} announced')


class Meter(Callback):
    """Counts and shows the bytes of a file; raises UserError if there are more than announced."""

    def __init__(self, file, address, show):
        super().__init__()
        self.file, self.address, self.show = file, address, show

    def call(self, *args, **kwargs):
        if self.file.size is not None and self.value > self.file.size:
            raise UserError(
                f'{self.address}: {self.file.name} has more than the {self.file.size:,} bytes '
                'announced'
            )
        self.show(self.value)


@contextlib.contextmanager
def shown(address, files, size):
    """Yields `show(file, bytes)`: a progress bar per file on a terminal; else prints one line."""
    if not files or not sys.stderr.isatty():
        if files:
            names = ', '.join(f.name for f in files)
            said = f'fetching {address}: {names} ({size:,} bytes)'
            print(printable(said), file=sys.stderr)
        yield lambda file, value: None
        return
    bar = progress.Progress(
        progress.TextColumn('{task.description}', markup=False),
        progress.BarColumn(bar_width=24),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(compact=True),
        progress.TextColumn('left'),
        console=rich.console.Console(stderr=True),
    )
    with bar:
        tasks = {f.name: bar.add_task(printable(f.name), total=f.size, start=False) for f in files}

        def show(file, value):
            bar.start_task(tasks[file.name])
            bar.update(tasks[file.name], completed=value)

        yield show


@contextlib.contextmanager
def explained(address):
    """Turns an error of a backend, the network or the disk into UserError, in one line."""
    quieten()
    try:
        yield
    except Exception as e:
        if isinstance(e, UserError) or not foreign(e):
            raise
        raise UserError(f'{address}: {reason(e)}') from e


@contextlib.contextmanager
def unreachable():
    """Raises Unreachable for errors that mean that there was no answer."""
    try:
        yield
    except Exception as e:
        if isinstance(e, UserError) or not foreign(e) or not silent(e):
            raise
        raise Unreachable(reason(e)) from e
