"""Finds the files of a data set: folders, patterns, splits by name; on disk or at an address."""

import contextlib
import glob
import json
import os
import re
from collections.abc import Collection, Sequence
from typing import Any

from vit_jax.data.readers import names, ranges, records, splits
from vit_jax.errors import UserError
from vit_jax.io import addresses

MOST_CARD = 10_000_000  # bytes of a list of classes or of other metadata
SHARDS = ('.tar', '.parquet', '.arrow')
# finds the split in names such as imagenet-train-0001.tar
IN_NAME = re.compile(rf'(?:^|[-_.])({"|".join(splits.KNOWN)})(?=[-_.0-9])')
OF = re.compile(r'-\d+-of-(\d+)(?=[-.])')
MOST_SHARDS = 1_000_000


def list_folder(address: str) -> tuple[set[str], set[str]]:
    """(names of the files, names of the folders) in a folder; both empty if there is no folder."""
    if '://' not in address:
        try:
            with os.scandir(address) as entries:
                found = [(entry.name, os.path.isdir(entry.path)) for entry in entries]
        except OSError:  # folders.read raises
            return set(), set()
    else:
        with addresses.explained(address):
            fs, path = addresses.backend(address)
            found = []
            if fs.exists(f'{path.rstrip("/")}/{records.MANIFEST}'):  # a server may list nothing
                return {records.MANIFEST}, set()
            try:
                for entry in fs.ls(path, detail=True):
                    name = entry['name'].rstrip('/').rpartition('/')[2]
                    found.append((name, entry['type'] == 'directory' or entry['name'][-1:] == '/'))
            except FileNotFoundError:
                return set(), set()
    found = [(name, is_dir) for name, is_dir in found if not name.startswith('.')]
    return {n for n, is_dir in found if not is_dir}, {n for n, is_dir in found if is_dir}


def find_shards(
    address: str, files: Collection[str], folders: set[str]
) -> dict[str, list[str]]:
    """{split: shards} of a folder, of its folders train, val, ... or of data/; {} if none."""
    base = address.rstrip('/')
    for suffix in SHARDS:
        own = shards_in(base, files, suffix)
        # A .tar beside folders of images is what they were unpacked from.
        images = suffix == '.tar' and ('train' in folders or len(folders) > 1)
        if own and not images:
            return group_by_split(own)
        parts = {}
        known = dict_splits(base, files) if suffix == '.arrow' else splits.KNOWN
        for part in sorted(set(known) & folders):
            inner = shards_in(f'{base}/{part}', list_folder(f'{base}/{part}')[0], suffix)
            if inner:
                parts[part] = check_complete(inner)
        if parts:
            return parts
    if 'data' in folders and 'train' not in folders:
        return find_shards(f'{base}/data', *list_folder(f'{base}/data'))
    return {}


def shards_in(folder: str, files: Collection[str], suffix: str) -> list[str]:
    """Shards of a kind among the files of a folder, sorted.

    Arrow files are those that state.json of save_to_disk names. Files that map() and filter() of
    Hugging Face leave beside them (cache-*.arrow) are not part of the data set.
    """
    found = sorted(name for name in files if name.endswith(suffix))
    if suffix == '.arrow' and found:
        own = state_files(folder) if 'state.json' in files else None
        if own is None:
            own = [name for name in found if not name.startswith('cache-')]
        elif lost := [name for name in own if name not in files]:
            raise UserError(f'{folder}/state.json names {lost[0]}, which does not exist')
        if rest := sorted(set(found) - set(own)):
            names.print_once(f'{folder}: skipped {len(rest)} arrow files of a cache ({rest[0]})')
        found = own
    return [f'{folder}/{name}' for name in found]


def state_files(folder: str) -> list[str] | None:
    """Files that a state.json names, in their order; None if it is invalid."""
    state = small_json(folder, 'state.json')
    files = state.get('_data_files') if isinstance(state, dict) else None
    files = [f.get('filename') for f in files if isinstance(f, dict)] if files else None
    plain = files and all(isinstance(f, str) and '/' not in f and f for f in files)
    return files if plain else None


def dict_splits(folder: str, files: Collection[str]) -> Sequence[str]:
    """Splits that dataset_dict.json of save_to_disk names; the usual ones without it."""
    found = small_json(folder, 'dataset_dict.json') if 'dataset_dict.json' in files else None
    listed = found.get('splits') if isinstance(found, dict) else None
    if isinstance(listed, list) and all(isinstance(split, str) for split in listed):
        return listed
    return splits.KNOWN


def small_json(folder: str, name: str) -> Any:
    """Content of a JSON file, None if there is none."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(small_file(folder, name) or b'null')
    return None


def group_by_split(paths: Sequence[str]) -> dict[str, list[str]]:
    """{split: shards} by the splits in their names; all are 'train' if none has one."""
    parts = {}
    for path in paths:
        match = IN_NAME.search(path.rpartition('/')[2])
        parts.setdefault(match[1] if match else '', []).append(path)
    if len(parts) > 1 and '' in parts:
        raise UserError(f'{parts[""][0]} names no split ({", ".join(splits.KNOWN)}), as others do')
    return {part or 'train': check_complete(found) for part, found in parts.items()}


def check_complete(paths: list[str]) -> list[str]:
    """Returns the shards; raises UserError if their names say that there are more."""
    counts = {int(m[1]) for p in paths if (m := OF.search(p.rpartition('/')[2]))}
    if len(counts) == 1 and len(paths) < min(counts):
        raise UserError(f'of {min(counts)} shards there are {len(paths)}, as {paths[0]}')
    return paths


def expand(pattern: str) -> list[str]:
    """Files of a pattern: expands {000..146} and {a,b}, and searches if there is a *."""
    found = ['']
    for fixed, _, inner in re.findall(r'([^{]*)(\{([^{}]*)\})?', pattern):
        words = [''] if not inner else expand_braces(inner, pattern)
        if len(found) * len(words) > MOST_SHARDS:
            raise UserError(f'{pattern} stands for more than {MOST_SHARDS:,} files')
        found = [f'{start}{fixed}{word}' for start in found for word in words]
    if '*' in pattern:
        found = [file for one in found for file in glob_files(one)]
    if not found:
        raise UserError(f'no file matches {pattern}')
    return found


def expand_braces(inner: str, pattern: str) -> list[str]:
    """Expands a pair of braces: 08..11 to 08, 09, 10, 11, and a,b to a, b."""
    bounds = re.fullmatch(r'(\d{1,9})\.\.(\d{1,9})', inner)
    if not bounds:
        return inner.split(',')
    low, high = int(bounds[1]), int(bounds[2])
    if not low <= high < low + MOST_SHARDS:
        raise UserError(f'{{{inner}}} of {pattern} does not count up to {MOST_SHARDS:,} files')
    return [str(number).zfill(len(bounds[1])) for number in range(low, high + 1)]


def glob_files(pattern: str) -> list[str]:
    """Files that match a pattern with a *, sorted by name."""
    if '://' not in pattern:
        return sorted(glob.glob(pattern))
    with addresses.explained(pattern):
        fs, path = addresses.backend(pattern)
        start = pattern.removesuffix(path)
        return [f'{start}{found}' for found in sorted(fs.glob(path))]


def small_file(folder: str, name: str) -> bytes | None:
    """Bytes of a file in a folder (a path or an address), None if there is none."""
    where = f'{folder.rstrip("/")}/{name}'
    with ranges.reading(where):
        try:
            if '://' in where:
                fs, path = addresses.backend(where)
                return fs.cat_file(path, end=MOST_CARD)
            if os.path.getsize(where) > MOST_CARD:
                return None
            with open(where, 'rb') as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None


def listed_names(folders: Sequence[str], files: Sequence[str]) -> list[str] | None:
    """Names of classes in the first of `files` in any of the folders, or None.

    A .txt has one a line, blank lines at its end aside; a .json is a list.
    """
    for folder in folders:
        for name in files:
            text = small_file(folder, name)
            if text is None:
                continue
            try:
                words = text.decode('utf-8-sig')  # Windows editors write a byte order mark
                words = words.rstrip().splitlines() if name.endswith('.txt') else json.loads(words)
            except (ValueError, RecursionError):
                words = None
            if isinstance(words, list) and words and all(isinstance(w, str) for w in words):
                return words
            raise UserError(f'{folder}/{name} is not a list of class names')
    return None
