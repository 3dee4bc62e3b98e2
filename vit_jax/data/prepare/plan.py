"""What `prepare` writes: the sources of all splits, and the options that determine the files."""

import hashlib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL

from vit_jax.data import captions, sources
from vit_jax.data.readers import names
from vit_jax.data.readers.splits import KNOWN
from vit_jax.errors import UserError, check_choice
from vit_jax.io import bounds


def load_splits(
    name: str, splits: Sequence[str], fields: Mapping[str, Any]
) -> dict[str, sources.Source]:
    """Opens {split: source}, all with the same classes; `fields` are arguments of `sources.load`.

    Raises UserError, also for a split without examples or with characters such as '['.
    """
    parameters = inspect.signature(sources.load).parameters
    for key, value in fields.items():
        check_choice('option --source', key, [k for k in parameters if k not in ('name', 'split')])
        bounds.check(f'--source.{key}', value, parameters[key].annotation)
    loaded = {split: sources.load(name=name, split=split, **fields) for split in splits}
    for split, source in loaded.items():
        if not re.fullmatch(r'\w[\w.-]*', split, re.ASCII):
            raise UserError(f'split {split!r} cannot be the name of a file; prepare a whole split')
        classes = loaded[splits[0]].classes
        title = f"split {splits[0]}'s"
        loaded[split] = names.relabel(source, classes, f'split {split}', title)
        if not len(source):
            raise UserError(f'split {split} of {name} has no examples')
    return loaded


def default_splits(name: str, data_dir: str | None = None) -> list[str]:
    """train, and the splits of a data set for validation and test."""
    available = sources.splits_of(name, data_dir)
    return ['train', *(split for split in KNOWN[1:] if split in available)]


def load_test_sets(addresses: Sequence[str]) -> dict[str, sources.Source]:
    """Opens {address: source} of addresses SRC or SRC:SPLIT, the split test if none is given."""
    loaded = {}
    for address in addresses:
        match = re.fullmatch(r'(.+):([A-Za-z_]\w*(\[[^\]]*\])?)', address)
        name, split = (match[1], match[2]) if match else (address, 'test')
        loaded[address] = sources.load(name=name, split=split)
    return loaded


def check_fields(
    src: str, loaded: Mapping[str, sources.Source], keep: Sequence[str], max_side: int
) -> None:
    """Raises UserError unless examples have labels or the fields to keep, at images as they are."""
    placed = [name for name in keep if name.rpartition('/')[2] not in captions.KNOWN]
    if placed and max_side:
        raise UserError(
            '--keep needs --max_side=0: masks and boxes have the pixels of their images; captions '
            f'do not, but {placed[0]} is none'
        )
    if max_labels(loaded) == 0 and not keep:
        raise UserError(f'{src} has no labels; --keep names fields to write, such as mask or boxes')


def has_labels(source: sources.Source) -> bool:
    """Whether the examples of a data set have the field label."""
    fields = getattr(source.records, 'label_fields', ('label',))
    return 'label' in fields and bool(source.classes)


def max_labels(loaded: Mapping[str, sources.Source]) -> int:
    """Most labels of an example, 0 without any; raises UserError unless all splits have as many."""
    counts = {
        (getattr(source.records, 'max_labels', None) or 1) if has_labels(source) else 0
        for source in loaded.values()
    }
    if len(counts) > 1:
        raise UserError(f'the splits have labels of different numbers: {sorted(counts)}')
    return counts.pop()


def digest_names(source: sources.Source) -> str:
    """Hash of a few names of examples, which tells data sets in the same place apart."""
    sample = np.linspace(0, len(source) - 1, 16).astype(int)
    return hashlib.sha256(repr([source.name(int(i)) for i in sample]).encode()).hexdigest()[:16]


def describe(
    src: str,
    loaded: Mapping[str, sources.Source],
    fields: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that determines the files, as JSON; an unfinished folder resumes with the same."""
    splits = {
        split: {'examples': len(source), 'names': digest_names(source)}
        for split, source in loaded.items()
    }
    return {
        'source': {'name': src, **({'fields': dict(fields)} if fields else {}), 'splits': splits},
        'options': {**options, 'pillow': PIL.__version__},
    }


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """First key in which two plans differ, as 'KEY is OLD, not NEW'; '' if none does."""
    for section in ('source', 'options'):
        before = old.get(section) if isinstance(old.get(section), dict) else {}
        for key in (*new[section], *before):
            if before.get(key) != new[section].get(key):
                return f'{section} {key} is {before.get(key)!r}, not {new[section].get(key)!r}'
    return ''
