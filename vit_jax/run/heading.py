"""The text that a run prints at its start, and the name of its model."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from vit_jax.data import mixture
from vit_jax.io.text import aligned, flop
from vit_jax.run import changes, determinism, origin


def model_name(config: Mapping | ConfigDict) -> str:
    """Name of a run's model, or of the objective's function if that has a network of its own."""
    return config['model']['name'] or config['objective']['name'].rpartition(':')[2]


def text(
    parts: Any,
    config: ConfigDict,
    start: int,
    account: str | None = None,
    differing: Sequence[changes.Change] = (),
) -> str:
    """Text printed at a run's start: optimizer by parameter, model, data, devices, steps.

    Args:
      parts: assembly.Parts.
      config: the config of the run.
      start: step from which the run goes on.
      account: table of what was loaded from `config.init_from`.
      differing: changes since the run's start.
    """
    params = sum(count for _, _, count, *_ in parts.tx.table)
    trained = sum(count for _, _, count, *_, frozen in parts.tx.table if not frozen)
    flops, name = parts.objective.flops, model_name(config)
    unit = 'texts' if 'text' in parts.inputs and 'image' not in parts.inputs else 'images'
    one = 'a text' if unit == 'texts' else 'an image'
    cost = '' if flops is None else f', {flop(flops)} {one} forward'
    counts = [f'{len(parts.source):,} {unit}']
    counts += [f'{len(names):,} {kind}' for kind, names in parts.task.names.items()]
    devices = jax.devices()
    lines = [
        optimizer_table(parts.tx.table),
        f'model   {name}: {params:,} parameters, {trained:,} of them trained{cost}',
        f'data    {mixture.title(config.data.source)}: {", ".join(counts)}',
        f'devices {len(devices)} x {devices[0].device_kind}, mesh '
        + ' '.join(f'{axis}={size}' for axis, size in parts.mesh.shape.items()),
        f'steps   {parts.steps:,} of {config.data.batch_size} {unit}, '
        f'{parts.steps * config.data.batch_size / len(parts.source):.1f} epochs',
    ]
    if devices[0].platform == 'gpu' and determinism.EXCLUDE not in os.environ.get('XLA_FLAGS', ''):
        lines.append('bits    another start may round otherwise (--nodeterministic)')
    if start:
        lines.append(f'resumed at step {start:,}')
    if account:
        lines.append(f'from    {config.init_from}\n{account}')
    if differing:
        lines.append(f'changed since the start of the run:\n{changes.table(differing)}')
    rounding = [change.key for change in differing if change.key.startswith(origin.BITS)]
    if rounding:
        lines.append(f'from here on the last bits may be others: {", ".join(rounding)} changed')
    return '\n'.join(lines)


def optimizer_table(rows: Iterable[tuple]) -> str:
    """Formats `optim.Optimizer.table`: shape, count, rate multiplier, decay, frozen or not."""
    cells = [('parameter', 'shape', 'count', 'rate x', 'decay', '')]
    for name, shape, count, rate, decay, frozen in rows:
        state = 'frozen' if frozen else ''
        cells.append((name, 'x'.join(map(str, shape)), f'{count:,}', rate, f'{decay:g}', state))
    return aligned(cells, right=range(2, 6))
