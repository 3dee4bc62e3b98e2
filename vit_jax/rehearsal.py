"""What a run would be, by its config: neither data nor checkpoint nor devices are needed."""

import jax

from vit_jax import assembly, estimate
from vit_jax import config as configs
from vit_jax.data import mixture
from vit_jax.errors import UserError


def of(config, path):
    """Text: model, data, length and cost of a run in the folder `path`; UserError for mistakes.

    Data that is not here is taken to be as large as it is known to be. The mesh is left out, as the
    devices of the run may be elsewhere; batch size and mesh are what `plan` checks.
    """
    try:
        source, note = estimate.data_set(config.data.source)
    except UserError as e:
        raise UserError(str(e).partition('; state its size')[0]) from e
    plain = configs.ConfigDict(estimate.without_evals(config).to_dict())
    plain.mesh = configs.ConfigDict(dict(data=1, fsdp=1, tensor=1))
    parts = assembly.make(plain, source, jax.devices()[:1])
    flops = parts.model.flops(parts.shape)
    images = parts.steps * config.data.batch_size
    count = sum(count for _, _, count, *_ in parts.tx.table)
    lines = [
        f'workdir  {path}',
        f'model    {config.model.name}: {count:,} parameters, {flops / 1e9:.3g} GFLOP an image '
        f'forward at {parts.shape[0]} x {parts.shape[1]}',
        f'data     {note or mixture.title(config.data.source)}: {len(source):,} images, '
        f'{len(source.classes):,} classes',
        f'length   {parts.steps:,} steps of {config.data.batch_size:,} images, '
        f'{images / len(source):.3g} epochs, {3 * flops * images / 1e18:.3g} exaFLOPs',
        f'begins   from {config.init_from or "random parameters"}',
        f'evals    {", ".join(config.evals) or "none"}',
    ]
    for row in config.expected:
        cell = row.get('cell')
        where = f', {cell[0]}: {", ".join(map(str, cell[1]))}; {cell[2]}' if cell else ''
        lines.append(f'expected {row["metric"]} {row["value"]} +- {row["tolerance"]}{where}')
    return '\n'.join(lines)
