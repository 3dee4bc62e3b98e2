"""Loads weights from the project's own checkpoints: a workdir, or one of its checkpoints.

RUN is the newest checkpoint, RUN@12000 (or RUN/checkpoints/12000) that of a step, and RUN@best the
best saved one by the metric in the run's setting checkpoint.best. Of a run of a method that keeps
its model beside other parameters, in a subtree, the model alone is loaded.
"""

import functools
import os
import re
import sys
from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath

from vit_jax import models
from vit_jax.convert import run_text
from vit_jax.convert.documents import class_names
from vit_jax.convert.files import array_in_memory, brief
from vit_jax.convert.pieces import Piece
from vit_jax.convert.stages import Around, Parsed
from vit_jax.errors import Damaged, UserError
from vit_jax.io import addresses, storage
from vit_jax.io.text import printable
from vit_jax.models import detector, mae, masks, patch_classifier, segmenter
from vit_jax.models.parameters import abstract, named_leaves
from vit_jax.run import history, weights, workdir

HEADS = ('head', 'dist_head', 'pre_logits')  # parameters that a model may lack in a method
NUMBER = re.compile('[0-9]{1,18}')


def split_address(address: str) -> tuple[epath.Path, str | None] | None:
    """Splits the address of a run into (workdir, checkpoint): a step as text, 'best' or None.

    A run is a workdir, its folder `checkpoints` or a checkpoint in that folder. Returns None for
    any other address. Raises UserError for a run that is followed by @ and neither 'best' nor a
    step.
    """
    address = address.rstrip('/')
    if (location := split_path(address)) is not None:
        return location
    before, _, name = address.rpartition('@')
    location = split_path(before) if before else None
    if location is None or location[1] is not None:
        return None
    if name != 'best' and not NUMBER.fullmatch(name):
        raise UserError(f'{address}: after the @ comes best or the number of a step')
    return location[0], name if name == 'best' else str(int(name))


def split_path(address: str) -> tuple[epath.Path, str | None] | None:
    """(workdir, step as text or None) of a path without @; None if it is not in a run."""
    path = workdir.located(address)
    for root, step in ((path, None), (path.parent, None), (path.parent.parent, path.name)):
        inside = root / 'checkpoints'
        if path in (root, inside, inside / str(step)):
            if (root / 'config.json').exists() and inside.exists() and inside.is_dir():
                return (root, step) if step is None or step.isdigit() else None
    return None


def is_run(address: str) -> bool:
    """Whether the address is a run of this project, on a disk or on gs://."""
    if address.endswith(addresses.FILES) or ('://' in address and not address.startswith('gs://')):
        return False
    with addresses.explained(address):
        return split_address(address) is not None


def parse_run(address: str, ema: bool | None, values: bool = True) -> Parsed:
    """Reads a checkpoint of a run as `Parsed`: the newest intact one if none is named.

    Without `values` its arrays are shapes and dtypes, which can't be read further.
    """
    root, config = config_of(address)
    arrays = arrays_of(address, ema, values)
    try:
        if config['model']['name'] is None:
            raise UserError(
                f'{address}: objective {config["objective"]["name"]} has a network of its own, '
                'which is not a model of this package; evaluate, predict and export take its runs'
            )
        text = run_text.tower(config, arrays)
        name = config['model']['name']
        if text is not None and name.startswith('text'):
            names = class_names(workdir.read_names(root / 'classes.json'))
            return Parsed(
                'vit_jax', 'text', {}, {}, lambda model: [], None, {}, None, names, config,
                text=text,
            )  # fmt: skip
        size = config['data']['image_size']
        values = {k: v for k, v in config['model'].items() if k != 'name'}
        size = (size, size) if isinstance(size, int) else tuple(size)
        if config['objective'].get('patch_sides'):
            size = None  # positions are a square table of their own
        prefix = ''
        if config['objective']['name'] != 'supervised':
            model = models.build(name, **{**values, 'num_classes': 1})
            subject = f'{address}: objective {config["objective"]["name"]}'
            prefix = only_prefix(model, size, arrays, subject)
        bias = arrays.get(f'{prefix}head/bias')
        values['num_classes'] = None if bias is None else bias.shape[0]
        model = models.build(name, **values)
        classes = class_names(workdir.read_names(root / 'classes.json'))
        around = around_of(config, arrays, prefix, classes, ema)
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f'{root / "config.json"} is not the config of a run ({brief(e)})') from e
    fields = {k: v for k, v in models.describe(model).items() if k != 'name'}
    entries = {name: array_in_memory(value) for name, value in arrays.items()}
    tables = (f'{prefix}posemb', f'{prefix}encoder/posemb')
    rows = next(((name, arrays[name].shape[-2]) for name in tables if name in arrays), None)
    others = {n: 'beside the model' for n in arrays if not n.startswith(prefix)}
    return Parsed(
        'vit_jax', models.KINDS[type(model)], fields, entries,
        lambda m: run_pieces(m, arrays, prefix), rows, others, size, classes, config,
        around=around, text=text,
    )  # fmt: skip


def around_of(
    config: dict[str, Any], arrays: dict[str, np.ndarray], prefix: str,
    classes: tuple[str, ...] | None, ema: bool | None,
) -> Around | None:  # fmt: skip
    """The model around the encoder of a run, whose parameters have this prefix; None if none is."""
    settings, own = config['objective'], [n for n in arrays if not n.startswith(prefix)]
    if settings['name'] == 'mae':
        fields = {k: v for k, v in settings.items() if k.startswith('decoder_')}
        fields |= dict(hide=settings['hide'], normalised=settings['normalise'])
        fields |= dict(mask_tokens=settings['mask_tokens'])
        build = functools.partial(mae.around_encoder, **fields)
        name, free, classes = 'a masked autoencoder', mae.FIELDS, None
    elif settings['name'] == 'detect':
        count = arrays['class_head/fc3/bias'].shape[0] - 1
        fields = dict(queries=settings['queries'], num_classes=count)
        build = functools.partial(detector.around_encoder, **fields)
        name, free = 'a detector', ()
    elif settings['name'] == 'masks':
        fields = {name: settings[name] for name in ('queries', 'query_blocks')} | dict(
            num_classes=arrays['class_head/bias'].shape[0] - 1,
            upscales=sum(n.endswith('larger/bias') for n in own),
        )
        build = functools.partial(masks.around_encoder, **fields)
        name, free = 'a mask classifier', ('masked',)
    elif settings['name'] == 'segment':
        name, free, build = 'a segmenter', (), segmenter_of(settings, arrays, ema)
    else:
        return None
    return Around(name, build, free, [Piece(name, name) for name in own], classes)


def segmenter_of(
    settings: dict[str, Any], arrays: dict[str, np.ndarray], ema: bool | None
) -> Callable[..., nn.Module]:
    """What builds the segmenter of a run around its encoder; see `objectives.segment`."""
    if settings['head'] == 'segmenter':
        fields = {name: settings[f'decoder_{name}'] for name in ('depth', 'dropout')}
        count = arrays['class_tokens'].shape[1]
        return functools.partial(segmenter.around_encoder, num_classes=count, **fields)
    count, batch_norm = arrays['head/bias'].shape[0], settings.get('batch_norm', True)

    def build(model):
        if ema is False and batch_norm:
            raise UserError(
                'ema=False (--noema): the batch norm of a linear segmenter is by its moving '
                "averages alone; part='encoder' has the ViT without them"
            )
        return patch_classifier.around_encoder(
            model, num_classes=count, blocks=settings.get('blocks', 1), batch_norm=batch_norm
        )

    return build


def only_prefix(
    model: nn.Module, size: tuple[int, int], names: Collection[str], subject: str
) -> str:
    """The prefix of a model's parameters in a checkpoint; UserError unless there is one."""
    found = prefixes(model, size, names)
    if len(found) != 1:
        count, places = ('several', f' ({", ".join(found)})') if found else ('none', '')
        raise UserError(
            f'{subject} has {count} of the model that its config names{places}; python -m '
            'vit_jax.predict --out=FILE.npz and vit_jax.evaluate run the method'
        )
    return found[0]


def prefixes(model: nn.Module, size: tuple[int, int], names: Collection[str]) -> list[str]:
    """Prefixes of names under which all parameters of a model but its head lie.

    '' if the model's parameters are those of the checkpoint, 'encoder/' if they are in a subtree.
    """
    own = named_leaves(abstract(model, (1, *size, len(model.mean))))
    own = [name for name in own if name.split('/')[0] not in HEADS]
    starts = [n.removesuffix(own[0]) for n in names if f'/{n}'.endswith(f'/{own[0]}')]
    return sorted(p for p in starts if all(f'{p}{name}' in names for name in own))


def config_of(address: str) -> tuple[epath.Path, dict]:
    """(workdir, contents of its config.json) of the run at an address."""
    root, _ = split_address(address)
    return root, workdir.read_json(root / 'config.json')


def arrays_of(address: str, ema: bool | None, values: bool = True) -> dict[str, np.ndarray]:
    """{name: array} of the parameters in the checkpoint at an address.

    Arguments, and the choice of the checkpoint, are as in `parse_run`.
    """
    root, step = split_address(address)
    if step == 'best':
        step = best_step(root, workdir.read_json(root / 'config.json'))
    return read_arrays(root, step, ema, values)


def best_step(root: str | os.PathLike, config: dict[str, Any]) -> str:
    """The step, as text, of the best saved checkpoint of a run.

    Raises UserError if the run has no checkpoint.best, or no checkpoint a value of that metric.
    """
    settings = config.get('checkpoint') or {}
    metric, steps = settings.get('best'), steps_in(epath.Path(root) / 'checkpoints')
    advice = f'name a step, {root}@STEP: {", ".join(map(str, steps)) or "none is saved yet"}'
    if metric is None:
        raise UserError(
            f'{root}@best: the run has no checkpoint.best; {advice}'
        )
    scores = history.scores_of(root, metric)
    step = history.best(steps, scores, largest=settings.get('mode') != 'min')
    if step is None:
        raise UserError(f'{root}@best: no checkpoint has a {metric} yet; {advice}')
    words = f'{root}@best is step {step}, with {metric} {scores[step]:.4g}'
    print(printable(words), file=sys.stderr, flush=True)
    return str(step)


def run_pieces(model: nn.Module, arrays: Collection[str], prefix: str) -> list[Piece]:
    """A `Piece` for each array of the checkpoint that the model has, by its name after `prefix`."""
    absent = set()
    if model.num_classes is None:
        absent |= {'head', 'dist_head'}
    if getattr(model, 'representation_size', None) is None:
        absent.add('pre_logits')
    names = [n.removeprefix(prefix) for n in arrays if n.startswith(prefix)]
    return [Piece(f'{prefix}{n}', n) for n in names if n.split('/')[0] not in absent]


def read_arrays(
    root: str | os.PathLike, step: str | None, ema: bool | None, values: bool = True
) -> dict[str, np.ndarray]:
    """{name: array} of the checkpoint at `step` or, if that is None, of the newest intact one.

    Raises UserError if there is none.
    """
    folder = epath.Path(root) / 'checkpoints'
    steps = steps_in(folder)
    if step is not None and int(step) not in steps:
        saved = ', '.join(map(str, steps)) or 'none yet'
        raise UserError(f'{folder} has no checkpoint {step}, but {saved}')
    if not steps:
        raise UserError(f'{root} has no checkpoint yet')
    for n in [int(step)] if step is not None else steps:
        try:
            return weights.read_params(folder / str(n), average=ema, values=values)
        except Damaged as e:
            message = f'checkpoint {folder / str(n)} is damaged: {e}'
            if step is not None:
                raise UserError(message) from e
            if steps_in(folder)[:1] != steps[:1]:  # the run goes on and deletes checkpoints
                return read_arrays(root, step, ema, values)
            print(printable(message), file=sys.stderr, flush=True)
    raise UserError(f'none of the {len(steps)} checkpoints in {folder} is intact')


def steps_in(folder: epath.Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, newest first."""
    steps = [p for p in folder.iterdir() if p.name.isdigit()]
    if storage.is_remote(folder):  # Orbax' marker; on a disk the name is enough
        steps = [p for p in steps if (p / 'commit_success.txt').exists()]
    return sorted((int(p.name) for p in steps), reverse=True)
