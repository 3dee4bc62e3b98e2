"""From a config to the parts of a run: data set, model, objective, optimizer, first state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vit_jax import config as configs
from vit_jax import models, optim, sharding, step
from vit_jax.convert import load as weights
from vit_jax.data import mixture, pipeline, sources
from vit_jax.data.readers import names
from vit_jax.errors import UserError
from vit_jax.objectives import supervised
from vit_jax.run import workdir

MOST_STEPS = 2**31 - 1  # as bounds.Steps


class Parts(NamedTuple):
    """What a config names, made; nothing of it depends on a workdir."""

    source: sources.Source
    steps: int
    mesh: jax.sharding.Mesh
    model: Any
    shape: tuple[int, int, int]  # of an image: H, W, C
    objective: Callable
    tx: optim.Optimizer
    abstract: step.State
    evals: dict[str, Any]


def make(config, source=None, devices=None, classes=None):
    """The parts of a run; every mistake in the config that can be seen beforehand is seen here.

    A plan has devices that are not here, and perhaps a `source` of which it knows the size alone.
    `classes` are the names of a head that is kept (`kept_classes`): labels of the data become its.
    """
    source = mixture.load(**config.data.source) if source is None else source
    mesh = sharding.make_mesh(devices, **config.mesh)
    sharding.check_batch(config.data.batch_size, mesh, config.accumulate)
    if config.keep_head and config.init_from and (classes or config.model.num_classes):
        classes = tuple(classes or map(str, range(config.model.num_classes)))
        title = f'data set {mixture.title(config.data.source)}'
        source = names.relabelled(source, classes, title, "the kept head's")
    classes = len(source.classes)
    model = models.build(**{**config.model, 'num_classes': config.model.num_classes or classes})
    if model.num_classes < classes:
        raise UserError(
            f'labels are out of range: data set {mixture.title(config.data.source)} has {classes} '
            f'classes, model.num_classes is {model.num_classes}'
        )
    if not len(model.mean) == len(model.std) == 3:
        raise UserError(
            f'images have 3 channels, model.mean is {model.mean}, model.std {model.std}'
        )
    check_partners(config)
    steps = steps_of(config, source)
    shape = (*pipeline.size_of(config.data.image_size), 3)
    check_patches('data', model, shape)
    objective = supervised.supervised(model, **config.objective)
    tx = optim.make(step.abstract_params(model, shape), steps, **config.optim)
    abstract = step.abstract_state(model, tx, shape, mesh)
    check_evaluations(config, model, shape, abstract.params)
    evals = {
        name: evaluation(model, mesh, source.classes, config.objective.loss, kwargs)
        for name, kwargs in config.evals.items()
    }
    if str(config.checkpoint.best).endswith('/top5') and model.num_classes <= step.TOP:
        raise UserError(
            f'checkpoint.best is {config.checkpoint.best}, which is not measured of '
            f'{model.num_classes} classes; name an accuracy'
        )
    return Parts(source, steps, mesh, model, shape, objective, tx, abstract, evals)


def check_patches(section, model, shape):
    """Raises UserError, with the key, where the model has no patches for images [H, W, C]."""
    try:
        model.grid(shape)
    except UserError as e:
        raise UserError(f'config {section}.image_size: {e}') from e


def check_evaluations(config, model, shape, params):
    """Raises UserError where an evaluation has images [H, W, C] of a size that params do not fit.

    Those of the training's `shape` they do; position tables are of one size.
    """
    for name, settings in config.evals.items():
        size = (*pipeline.size_of(settings.image_size), shape[-1])
        if size == shape:
            continue
        check_patches(f'evals.{name}', model, size)
        images = jax.ShapeDtypeStruct((1, *size), jnp.float32)
        try:
            jax.eval_shape(model.apply, {'params': params}, images)
        except UserError as e:
            raise UserError(
                f'config evals.{name}.image_size is {settings.image_size}, data.image_size '
                f'{config.data.image_size}, and the model has positions for that size alone; '
                'python -m vit_jax.evaluate takes another one'
            ) from e


def evaluation(model, mesh, classes, loss, settings):
    """An evaluation by its section of a config; `loss` is that of training, its own default."""
    settings = dict(settings)
    if settings.get('loss', loss) is None:
        settings['loss'] = loss
    return configs.EVALUATORS[settings['type']](model, mesh, classes, **settings)


def kept_classes(config, path, begun):
    """Names of the classes of the head that a run in `path` keeps; None where it has a new one.

    A run that goes on has them in classes.json, as its checkpoint `init_from` may be gone.
    """
    if not config.keep_head or config.init_from is None:
        return None
    known = workdir.read_json(path / 'classes.json') if begun else None
    return known or weights.read(config.init_from, values=False, ema=None).classes


def steps_of(config, source):
    """The length of a run."""
    if config.steps:
        return config.steps
    steps = max(1.0, config.epochs * len(source) / config.data.batch_size)
    if steps > MOST_STEPS:
        raise UserError(
            f'epochs is {config.epochs:g}, which makes {steps:g} steps, above {MOST_STEPS:,}'
        )
    return round(steps)


def check_partners(config):
    """Raises UserError where mixup would mix an image with another view of itself."""
    copies = -(-config.data.repeats // config.accumulate)  # in a row, of a micro-batch
    mixes = config.objective.mixup or config.objective.cutmix
    if mixes and config.objective.mix_shift < copies:
        raise UserError(
            f'objective.mix_shift is {config.objective.mix_shift} with data.repeats '
            f'{config.data.repeats}: images would be mixed with themselves; set it to {copies}'
        )


def first_state(config, parts):
    """(the state at step 0, the account of what was loaded): random, or from `init_from`."""
    if config.init_from is None:
        fresh = (parts.model, parts.tx, parts.shape, config.seed, parts.abstract)
        return step.init(*fresh), None
    kept = ('name', 'num_classes', 'representation_size')
    fields = {k: v for k, v in models.describe(parts.model).items() if k not in kept}
    found = weights.read(
        config.init_from, image_size=parts.shape[:2], ema=None,
        num_classes=None if config.keep_head else parts.model.num_classes,
        keep_pre_logits=config.keep_pre_logits, **fields,
    )  # fmt: skip
    optim.check_same(found.params, parts.abstract.params, config.init_from)
    return step.begin(found.params, parts.tx, parts.abstract), weights.table(found.account)
