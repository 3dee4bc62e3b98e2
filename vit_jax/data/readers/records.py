"""The format of a prepared data set: shards of records (ArrayRecord files) and a manifest.json.

A record is a serialized tf.train.Example (`image` and `name`: bytes, `label`: int64s), which any
tool reads. A shard has one record per chunk, uncompressed: image files do not shrink, and 110 KB
are read in 36 us (compressed 40 to 45). `prepare` writes such folders, `prepared` reads them.
"""

import hashlib
import json
import os
import pathlib
import re
import stat
from collections.abc import Iterable
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from vit_jax.errors import UserError
from vit_jax.io import addresses, atomic
from vit_jax.io.text import brief

FORMAT, VERSION = 'vit_jax records', 1
MANIFEST = 'manifest.json'
JOURNAL = 'prepare.jsonl'  # exists until a folder is finished
MOST_MANIFEST = 200_000_000  # bytes; 100,000 shards take 20 million
WRITER = 'group_size:1,uncompressed'


def shard_name(split: str, index: int, count: int) -> str:
    """File name of a shard."""
    return f'{split}-{index:05d}-of-{count:05d}.array_record'


def write_shard(
    path: str | os.PathLike, records: Iterable[bytes]
) -> tuple[int, int, str]:
    """Writes records as one shard; returns (number of records, bytes of the file, sha256).

    The shard is complete or does not exist. Raises UserError if the disk refuses.
    """
    count = 0
    try:
        with atomic.replace_file(path) as part:
            writer = ArrayRecordWriter(str(part), WRITER)
            for record in records:
                writer.write(record)
                count += 1
            writer.close()
            with part.open('rb') as file:
                digest = hashlib.file_digest(file, 'sha256').hexdigest()
            size = part.stat().st_size
    except (RuntimeError, OSError) as e:
        raise UserError(f'cannot write {path}: {brief(getattr(e, "strerror", None) or e)}') from e
    return count, size, digest


def beside(folder: str | os.PathLike, name: str) -> str:
    """Path or address of a file in a folder."""
    return f'{str(folder).rstrip("/")}/{name}'


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """Reads and checks the manifest of a prepared folder (a path or an address); it is untrusted.

    Raises UserError, in one line with the name of the file, if it is missing or invalid.
    """
    where = beside(folder, MANIFEST)
    try:
        manifest = json.loads(manifest_text(str(folder), where))
    except (ValueError, RecursionError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f'{where} is not a JSON file ({brief(e)})') from e
    problem = manifest_error(manifest)
    if problem:
        raise UserError(f'{where}: {problem}')
    return manifest


def manifest_text(folder: str, where: str) -> bytes:
    """Bytes of a manifest.json; raises UserError if there is none."""
    lacks = (
        f'{folder} has no {MANIFEST}: it is not a prepared data set, or not finished; run '
        'python -m vit_jax.data.prepare again, which resumes it'
    )
    if '://' in folder:
        with addresses.explained(where):
            fs, path = addresses.backend(where)
            try:
                if (fs.info(path).get('size') or 0) > MOST_MANIFEST:
                    raise UserError(f'{where} has more than {MOST_MANIFEST:,} bytes')
                return fs.cat_file(path)
            except FileNotFoundError:
                raise UserError(lacks) from None
    path = pathlib.Path(where).expanduser()
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_MANIFEST:
            raise UserError(f'{path} is not a file of less than {MOST_MANIFEST:,} bytes')
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(lacks) from None
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror or e}') from e


def manifest_error(manifest: Any) -> str | None:
    """Says why a manifest is invalid, None if it is valid."""
    if not isinstance(manifest, dict) or manifest.get('format') != FORMAT:
        return f'its format is not {FORMAT!r}'
    if manifest.get('version') != VERSION:
        return f'its version is {brief(repr(manifest.get("version")))}, not {VERSION}'
    classes = manifest.get('classes')
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return 'classes is not a list of strings'
    if type(manifest.get('max_labels')) is not int or not (
        0 <= manifest['max_labels'] < 2**16
    ):
        return f'max_labels is {brief(repr(manifest.get("max_labels")))}, not an integer from 0 on'
    splits = manifest.get('splits')
    if not isinstance(splits, dict) or not splits:
        return 'splits is not an object of splits'
    seen = set()
    for split, shards in splits.items():
        if not isinstance(shards, list) or not shards:
            return f'split {brief(repr(split))} has no shards'
        for i, shard in enumerate(shards):
            problem = shard_error(shard, seen)
            if problem:
                return f'shard {i} of split {brief(repr(split))}: {problem}'
    return None


def shard_error(shard: Any, seen: set[str]) -> str | None:
    """Says why the entry of a shard is invalid, or None; adds its file to those `seen`."""
    if not isinstance(shard, dict):
        return 'not an object'
    name = shard.get('file')
    if not isinstance(name, str) or not re.fullmatch(r'\w[\w.=+-]{0,200}', name, re.ASCII):
        return f'file is {brief(repr(name))}, not a plain name'
    if name in seen:
        return f'file {name} occurs twice'
    seen.add(name)
    for key in ('examples', 'bytes'):
        if type(shard.get(key)) is not int or not 0 < shard[key] < 2**45:
            return f'{key} is {brief(repr(shard.get(key)))}, not a positive integer'
    digest = shard.get('sha256')
    if not isinstance(digest, str) or not re.fullmatch('[0-9a-f]{64}', digest):
        return f'sha256 is {brief(repr(digest))}'
    return None
