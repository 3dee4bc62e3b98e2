"""Splits of a data set: parses texts such as 'train[10%:90%]', and finds those that validate."""

import re
from collections.abc import Collection

from vit_jax.errors import UserError
from vit_jax.io.text import printable

VALIDATION = ('val', 'valid', 'validation', 'dev')
KNOWN = ('train', *VALIDATION, 'test')
WORDS = (*KNOWN, 'training', 'testing', 'eval')  # names of folders that are no classes
PERCENT = r'\d{1,3}(?:\.\d{1,9})?'
FORM = re.compile(rf'([^\[\]]+)(?:\[(?:({PERCENT})%)?:(?:({PERCENT})%)?\])?', re.ASCII)


def parse(split: str) -> tuple[str, float, float]:
    """Parses 'train[10%:90%]' to ('train', 10, 90); raises UserError for any other form."""
    match = FORM.fullmatch(split)
    low, high = (float(match[2] or 0), float(match[3] or 100)) if match else (0, 0)
    if not low < high <= 100:
        counts = re.fullmatch(r'[^\[\]]+\[\d*:\d*\]', split)
        why = '; only TFDS data sets take counts of examples' if counts else ''
        raise UserError(f'split {split!r} is not of the form train or train[10%:90%]{why}')
    return match[1], low, high


def size(split: str, whole: int) -> tuple[str, int]:
    """(part, number of examples) of a split, whose part has `whole`; 'full[51200:]' is one too."""
    counts = re.fullmatch(r'([^\[\]]+)\[(\d*):(\d*)\]', split, re.ASCII)
    if counts and (counts[2] or counts[3]):
        return counts[1], len(range(whole)[int(counts[2] or 0) : int(counts[3] or whole)])
    part, low, high = parse(split)
    return part, round(whole * (high - low) / 100)


def missing(where: str, split: str, known: Collection[str]) -> UserError:
    """Error for a split that a data set does not have."""
    listed = ', '.join(map(printable, known))
    return UserError(f'{where} has no split {split!r}; it has {listed} (source.split)')


def held_out(known: Collection[str]) -> tuple[str, dict[str, str]]:
    """(training split, {evaluation: split}) of a data set with the splits `known`.

    Evaluates on its validation set, its test set or both; without any, on a tenth of train.
    """
    val = next((split for split in VALIDATION if split in known), None)
    found = {'val': val} if val else {}
    found |= {'test': 'test'} if 'test' in known else {}
    return ('train', found) if found else ('train[:90%]', {'val': 'train[90%:]'})
