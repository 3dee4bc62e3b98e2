"""Differences between two configs, such as that of a run's start and that of its resumption."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.io.text import aligned
from vit_jax.run import workdir


class Change(NamedTuple):
    """A value that differs; None where it is absent."""

    key: str
    before: Any
    now: Any
    matters: bool  # whether it changes the result of the run


def record_config(
    path: epath.Path,
    config: ConfigDict,
    begun: bool,
    *,
    may_change: Callable[[str], bool],
    allow_change: bool,
) -> list[Change]:
    """Writes config.json; returns its differences from that of the run's last start.

    Args:
      path: workdir of the run.
      config: its config.
      begun: whether it has checkpoints.
      may_change: whether a key leaves the result as it is, see `differences`.
      allow_change: whether any setting may differ.

    Raises:
      UserError: the run has begun, and the differences would change its result; with a table.
    """
    before = workdir.read_json(path / 'config.json') if begun else None
    changes = [] if before is None else differences(before, config.to_dict(), may_change)
    if any(change.matters for change in changes) and not allow_change:
        raise UserError(
            f'the config differs from the one that {path} was begun with:\n{table(changes)}\n'
            'Name another workdir, or give --allow_config_change to go on with the new values.',
            several_lines=True,
        )
    if jax.process_index() == 0:
        workdir.write_json(path / 'config.json', config.to_dict())
    return changes


def flatten(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Flattens a nested dict to {'optim.lr': 0.001}, with tuples as lists, as in JSON."""
    items = {}
    for key, value in config.items():
        if isinstance(value, dict):
            items |= flatten(value, f'{prefix}{key}.')
        else:
            items[prefix + key] = list(value) if isinstance(value, tuple) else value
    return items


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], may_change: Callable[[str], bool]
) -> list[Change]:
    """Compares two nested dicts; `may_change` says of a dotted key whether it may differ."""
    before, now = flatten(before), flatten(now)
    return [
        Change(key, before.get(key), now.get(key), matters=not may_change(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def table(changes: Sequence[Change], before: str = 'before', now: str = 'now') -> str:
    """Formats changes as a table with these titles of the columns."""
    rows = [('key', before, now, '')]
    rows += [
        (key, json.dumps(old), json.dumps(new), 'changes the result' if matters else '')
        for key, old, new, matters in changes
    ]
    return aligned(rows)
