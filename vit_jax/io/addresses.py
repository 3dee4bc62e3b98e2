"""Addresses (gs://, https://, hf://, ...) of files and folders, through fsspec."""

import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import fsspec

from vit_jax.errors import UserError
from vit_jax.io import storage
from vit_jax.io.reasons import is_external, is_unanswered, reason

FILES = ('.npz', '.safetensors', '.json')  # an address that ends in none of these is a folder
PICKLED = ('.bin', '.pt', '.pth', '.pkl')
COMPANIONS = ('config.json', 'preprocessor_config.json', 'processor_config.json')
TOKENIZERS = ('vocab.json', 'special_tokens_map.json', 'added_tokens.json')
REMOTE = ('gs', 'gcs', 'hf', 'http', 'https')  # protocols of the extra `remote`
# Metadata that identifies a version of a file, by the backends' names.
VERSION = 'etag ETag Last-Modified LastModified mtime modified updated created generation'.split()
VERSION += ['md5Hash', 'blob_id', 'ukey']
UNSAFE_NAME = re.compile(r'^\.|\.\.|[/\\]')


@dataclasses.dataclass(frozen=True)
class File:
    """A remote file: its name in the cached folder, its path in the backend, its `version`."""

    name: str
    path: str
    version: Mapping[str, Any]

    @property
    def size(self) -> int | None:
        """Number of bytes; None if the server does not announce it."""
        return self.version.get('size')


class Unreachable(Exception):
    """The server gave no answer, or none that says whether the file exists."""


def last_name(address: str) -> str:
    """Last component of an address, without a query."""
    return address.partition('?')[0].rstrip('/').rsplit('/', 1)[-1]


def refuse_pickle(address: str, name: str) -> None:
    """Raises UserError if the name of a file at an address is that of a pickle."""
    if name.endswith(PICKLED):
        raise UserError(
            f'{address}: {name} is a pickle, which can run code when it is read, and is refused; '
            'name a folder or file with safetensors weights'
        )


def cache_folder(address: str) -> pathlib.Path:
    """Folder of the files of an address, below `storage.cache()`."""
    tail = re.sub(r'[^\w.-]+', '_', last_name(address), flags=re.ASCII).lstrip('.')[:60]
    digest = hashlib.sha256(os.fsencode(address)).hexdigest()[:16]
    return storage.cache() / f'{tail}-{digest}'


def safe_name(name: str, address: str) -> str:
    """Returns a name that a server may have made up; raises UserError unless it is a plain one."""
    for text in (name, urllib.parse.unquote(name)):
        if UNSAFE_NAME.search(text) or not text.isprintable():
            raise UserError(f'{address}: refused a file named {name!r}: not a plain file name')
    return name


def quieten() -> None:
    """Sets up gcsfs for a command: errors are raised, and not logged with tracebacks."""
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
    # gcsfs queries a bucket's layout over gRPC, which hangs where only HTTPS gets through.
    os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')


def backend(address: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """(file system, path) of an address; raises UserError if the backend is not installed."""
    quieten()
    protocol, _, path = address.partition('://')
    if protocol in REMOTE and path[:1] in ('', '/'):  # a backend would retry
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
        remedy = 'pip install "vit_jax[remote]"' if protocol in REMOTE else e
        raise UserError(f'{address}: no backend for {protocol}:// is installed: {remedy}') from e
    fs.invalidate_cache()
    return fs, path


def version(info: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a remote file that identifies its version, from fsspec's info of it."""
    found = {key: str(info[key]) for key in VERSION if info.get(key) is not None}
    return found if info.get('size') is None else {'size': int(info['size']), **found}


def files_beside(
    fs: fsspec.AbstractFileSystem, path: str, address: str, companions: Sequence[str]
) -> list[File]:
    """Lists the file of an address and those of its companions that exist."""
    name = last_name(address)
    info = fs.info(path)
    if info.get('type') == 'directory':
        raise UserError(f'{address} is a folder; the name of a folder cannot end in a file suffix')
    files = [File(name, path, version(info))]
    beside = ('open_clip_config.json',) if name.startswith('open_clip') else COMPANIONS
    usual = {'.safetensors': beside, '.npz': (pathlib.PurePath(name).stem + '.json',)}
    others = dict.fromkeys((*usual.get(pathlib.PurePath(name).suffix, ()), *companions))
    before, mark, query = path.partition('?')
    return files + files_named(fs, before.rsplit('/', 1)[0], others, mark + query)


def files_named(
    fs: fsspec.AbstractFileSystem, folder: str, names: Iterable[str], query: str = ''
) -> list[File]:
    """Lists those of the named files that are in a folder; `query` ends each of their paths."""
    files = []
    for name in names:
        path = f'{folder}/{name}{query}'
        try:
            with unreachable():
                files.append(File(name, path, version(fs.info(path))))
        except Exception as e:
            if not is_external(e):
                raise  # else it is missing: a store may answer 404, 403 or 401
    return files


def files_in(
    fs: fsspec.AbstractFileSystem, path: str, address: str, companions: Sequence[str]
) -> list[File]:
    """Lists the weights and json files directly in the folder of an address."""
    root = path.rstrip('/')
    entries = [entry for entry in fs.ls(path, detail=True) if entry['type'] == 'file']
    files = []
    for entry in entries:
        name = entry['name'].removeprefix(root + '/')
        if is_weights_or_config(name) or name in companions:
            safe_name(name, address)
            info = entry if entry.get('size') is not None else fs.info(f'{root}/{name}')
            files.append(File(name, f'{root}/{name}', version(info)))
    if not any(file.name.endswith('.safetensors') for file in files):
        for entry in entries:
            refuse_pickle(address, last_name(entry['name']))
        raise UserError(f'{address} has no .safetensors file; name an .npz file itself')
    return files


def is_weights_or_config(name: str) -> bool:
    """Whether a file of a folder is fetched by default: safetensors and json, no tokenizer's."""
    tokenizer = name.startswith('tokenizer') or name in TOKENIZERS
    return name.endswith(('.safetensors', '.json')) and not tokenizer


@contextlib.contextmanager
def explained(address: str) -> Iterator[None]:
    """Turns an error of a backend, the network or the disk into UserError, in one line."""
    quieten()
    try:
        yield
    except Exception as e:
        if isinstance(e, UserError) or not is_external(e):
            raise
        raise UserError(f'{address}: {reason(e)}') from e


@contextlib.contextmanager
def unreachable() -> Iterator[None]:
    """Raises Unreachable for errors that mean that there was no answer."""
    try:
        yield
    except Exception as e:
        if isinstance(e, UserError) or not is_external(e) or not is_unanswered(e):
            raise
        raise Unreachable(reason(e)) from e
