"""Protocols of published tables as data: what a run with their numbers has, each with its source.

protocols.json maps a protocol's name to its `settings`, {key: [value, source]}, and to the
tables that it `covers`. A setting is known by its dotted key in a complete config; `test.KEY` is
that of the evaluation which a number of the table is from, `select.KEY` says how a rate is chosen,
and `upstream` what the weights come from. A grid is its points or the product of {key: its values,
or their number}; 'KEY,KEY' vary together. `like` names a protocol to start from. `cases` change the
settings `where` a pattern is found in the name of the number or of the recipe; later ones win. A
case with a `point` adds that to the name:

    vit.table5: ImageNet-21k, CIFAR-10; ViT-B/16        table: row; column
    pretrain.py:b/16-i21k                               a recipe of pre-training
"""

import functools
import importlib.resources
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from vit_jax.errors import UserError


class Setting(NamedTuple):
    """A value and where it is from: a paper's section or table, or a file and line of its code."""

    value: Any
    source: str


class Protocol(NamedTuple):
    """A protocol as it stands in protocols.json."""

    title: str
    covers: tuple[str, ...]  # patterns of names, see above
    like: str | None
    settings: dict[str, Setting]
    cases: tuple[tuple[str, dict[str, Setting]], ...]  # (pattern, settings)


@functools.cache
def protocols() -> dict[str, Protocol]:
    """{name: Protocol} of all protocols."""
    file = importlib.resources.files('vit_jax.tables') / 'protocols.json'
    given = json.loads(file.read_text(encoding='utf-8'))
    return {
        name: Protocol(
            one['title'], tuple(one.get('covers', ())), one.get('like'),
            settings_of(one['settings']),
            tuple((case['where'], settings_of(case['settings'])) for case in one.get('cases', ())),
        )
        for name, one in given.items()
    }  # fmt: skip


def settings_of(given: dict) -> dict[str, Setting]:
    """{key: Setting} of {key: [value, source]}."""
    return {key: Setting(*pair) for key, pair in given.items()}


def cell_name(cell: Sequence) -> str:
    """Name of a number of (table, row, column), 'vit.table5: ImageNet-21k, CIFAR-10; ViT-B/16'."""
    table, label, column = cell
    return f'{table}: {", ".join(map(str, label))}; {column}'


def covering(name: str) -> str | None:
    """The protocol that covers the name of a number or of a recipe; None if there is none.

    Raises UserError if several do.
    """
    found = [
        protocol for protocol, one in protocols().items()
        if any(re.search(pattern, name) for pattern in one.covers)
    ]  # fmt: skip
    if len(found) > 1:
        raise UserError(f'{name!r} has several protocols: {", ".join(found)}')
    return found[0] if found else None


def settings(protocol: str, name: str) -> dict[str, Setting]:
    """{key: Setting} of a run by its protocol and the name of its number, or of its recipe."""
    one = protocols()[protocol]
    found = settings(one.like, name) if one.like else {}
    found |= one.settings
    for pattern, changes in one.cases:
        if re.search(pattern, name):
            found |= changes
            if 'point' in changes:
                name = f'{name}-{found.pop("point").value}'
    return found
