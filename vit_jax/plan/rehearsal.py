"""Describes a run by its config alone, without its data, checkpoint and devices (--dry_run)."""

import jax
from etils import epath
from ml_collections import ConfigDict

from vit_jax import assembly, step
from vit_jax import config as configs
from vit_jax.assembly import initial, trained
from vit_jax.convert import load as weights
from vit_jax.data import mixture, sources
from vit_jax.errors import UserError
from vit_jax.io.text import flop, printable
from vit_jax.plan import data_sets, estimate
from vit_jax.run import heading


def describe(config: ConfigDict, path: object) -> str:
    """Describes model, data, length and cost of a run in the folder `path`; raises UserError.

    Data that is absent has its published size, if that is known; what depends on absent data or an
    absent checkpoint is reported as unknown. One that is here is checked, its values unread. The
    mesh is ignored, as the run may have other devices; `plan` checks batch size and mesh.
    """
    title = printable(mixture.title(config.data.source))
    try:
        source, note = data_sets.load(config.data.source)
    except UserError as e:
        source, note = None, f'unknown ({str(e).partition("; state its size")[0]})'
    here = config.init_from is not None and initial.is_here(config.init_from)
    if is_model_unknown(config) and here:
        weights.read(config.init_from, part='encoder', values=False)  # says why it is unknown
    fits = here and (note is None or not config.keep_head)  # a kept head depends on the classes
    parts = None if is_model_unknown(config) else make_parts(config, source, fits)
    unit = 'images' if parts is None or 'image' in parts.spec else 'examples'
    if fits and parts is not None:
        initial.check(config, parts)
    lines = [
        f'workdir  {path}',
        f'model    {model_text(config, parts, source)}',
        f'data     {data_text(title, source, note, unit)}',
        f'length   {length_text(config, parts, source, unit)}',
        f'starts   from {start_text(config, here)}',
        f'evals    {", ".join(config.evals) or "none"}',
    ]
    lines += [f'reads    {text}' for text in checkpoints_text(config)]
    if config.select:
        count, metric = len(config.select.grid), config.select.metric
        lines.append(f'select   of {count} points by {metric}, with bash launch.sh local --select')
    for row in config.expected:
        cell = row.get('cell')
        where = f', {cell[0]}: {", ".join(map(str, cell[1]))}; {cell[2]}' if cell else ''
        lines.append(f'expected {row["metric"]} {row["value"]} +- {row["tolerance"]}{where}')
    return '\n'.join(lines)


def data_text(title: str, source: sources.Source | None, note: str | None, unit: str) -> str:
    """The data set and its size in `unit`; `note` says what stands in for it, or why it is unknown.
    """
    if source is None:
        return f'{title}: {note}'
    classes = f', {len(source.classes):,} classes' if source.classes else ''
    return f'{note or title}: {len(source):,} {unit}{classes}'


def checkpoints_text(config: ConfigDict) -> list[str]:
    """A text for each checkpoint that a setting of the objective names, such as a teacher.

    Raises UserError for one that is here and cannot be read.
    """
    settings = config.objective
    function = configs.named('objective.name', settings.name).function
    found = trained.addresses(configs.settings_of(settings, function), function)
    for key, address in found.items():
        if initial.is_here(address):
            try:
                weights.read(address, values=False, as_input=True)
            except UserError as e:
                raise UserError(f'config objective.{key}: {e}') from e
    return [
        f'objective.{key} {printable(address)}' + ('' if trained.is_known(address) else (
            ' (not read here; its cost is taken to be that of the model)'
        ))
        for key, address in found.items()
    ]  # fmt: skip


def start_text(config: ConfigDict, here: bool) -> str:
    """What the run begins from, and whether that was read."""
    if config.init_from is None:
        return 'random parameters'
    why = 'not read, as it is to be downloaded'
    if '://' not in weights.resolve(config.init_from):
        why = 'not checked, as there is no such file or folder here'
    return printable(config.init_from) + ('' if here else f' ({why})')


def is_model_unknown(config: ConfigDict) -> bool:
    """Whether the model is determined by a checkpoint that cannot be read."""
    return config.model.get('name') is None and config.init_from is not None


def make_parts(
    config: ConfigDict, source: sources.Source | None, fits: bool = False
) -> assembly.Parts:
    """Makes the run's parts on one device, without evaluations; a `source` of None is unknown.

    `fits`: whether its checkpoint, whose head it may keep, is to be read.
    """
    plain = estimate.without_evals(config)
    plain.mesh = ConfigDict(dict(data=1, fsdp=1, tensor=1))
    if source is None:
        plain.steps = plain.steps or 2**31 - 1
        classes = plain.model.num_classes or 1
        source = data_sets.stand_in(plain.data.batch_size, classes)
    classes = assembly.kept_classes(config, epath.Path(), begun=False) if fits else None
    parts = assembly.make(
        plain, source, jax.devices()[:1], classes=classes, checkpoints='known'
    )
    batch, frozen = estimate.batch_of(plain, parts), parts.objective.frozen
    step.check(parts.objective, parts.abstract, batch, frozen)
    return parts


def model_text(
    config: ConfigDict, parts: assembly.Parts | None, source: sources.Source | None
) -> str:
    """Name and size of the model, without the head if the number of classes is unknown."""
    if parts is None:
        return f'unknown, as {printable(config.init_from)} cannot be read'
    with_head = source is not None or config.model.num_classes
    leaves = [(name, count) for name, _, count, *_ in parts.tx.table]
    count = sum(count for name, count in leaves if with_head or 'head/' not in f'/{name}')
    name = heading.model_name(config)
    text = f'{name}: {count:,} parameters{"" if with_head else " without the head"}'
    if parts.objective.flops is None:
        return text
    cost = flop(parts.objective.flops)
    if 'image' not in parts.spec:
        return f'{text}, {cost} an example forward'
    height, width = parts.spec['image'].shape[:2]
    return f'{text}, {cost} an image forward at {height} x {width}'


def length_text(
    config: ConfigDict, parts: assembly.Parts | None, source: sources.Source | None, unit: str
) -> str:
    """Steps, epochs and compute of the run, as far as data and model are known."""
    if source is None:
        steps = f'{config.steps:,} steps' if config.steps else f'{config.epochs:g} epochs'
        return f'{steps} of {config.data.batch_size:,} {unit} a step'
    steps = assembly.steps_of(config, source)
    images = steps * config.data.batch_size
    epochs = images / len(source)
    text = f'{steps:,} steps of {config.data.batch_size:,} {unit}, {epochs:.3g} epochs'
    if parts is None or parts.objective.flops is None:
        return text
    return f'{text}, {3 * parts.objective.flops * images / 1e18:.3g} exaFLOPs'
