"""Splits of a data set: what a text like 'train[10%:90%]' names, and which of them validate."""

import re

from vit_jax.errors import UserError
from vit_jax.io.text import printable

VALIDATION = ('val', 'valid', 'validation', 'dev')
KNOWN = ('train', *VALIDATION, 'test')
WORDS = (*KNOWN, 'training', 'testing', 'eval')  # of folders that are no classes
PERCENT = r'\d{1,3}(?:\.\d{1,9})?'
FORM = re.compile(rf'([^\[\]]+)(?:\[(?:({PERCENT})%)?:(?:({PERCENT})%)?\])?', re.ASCII)


def share(split: str) -> tuple[str, float, float]:
    """'train[10%:90%]' to ('train', 10, 90); UserError for all that is of no such form."""
    match = FORM.fullmatch(split)
    low, high = (float(match[2] or 0), float(match[3] or 100)) if match else (0, 0)
    if not low < high <= 100:
        counts = re.fullmatch(r'[^\[\]]+\[\d*:\d*\]', split)
        why = '; counts of examples are read of TFDS alone' if counts else ''
        raise UserError(f'split {split!r} is not of the form train or train[10%:90%]{why}')
    return match[1], low, high


def missing(where: str, split: str, known) -> UserError:
    """The error that a data set has no such split."""
    listed = ', '.join(map(printable, known))
    return UserError(f'{where} has no split {split!r}; it has {listed} (source.split)')


def held_out(known) -> tuple[str, dict[str, str]]:
    """(training split, {evaluation: split}) of a data set with the splits `known`.

    A validation set, a test set or both where it has them; else a tenth of what it trains on.
    """
    val = next((split for split in VALIDATION if split in known), None)
    found = {'val': val} if val else {}
    found |= {'test': 'test'} if 'test' in known else {}
    return ('train', found) if found else ('train[:90%]', {'val': 'train[90%:]'})
