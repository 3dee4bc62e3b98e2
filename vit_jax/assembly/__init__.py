"""Builds the parts of a run from its config: data set, model, objective, optimizer, state."""

import os
from collections.abc import Sequence, Sized
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import linen as nn
from ml_collections import ConfigDict

from vit_jax import config as configs
from vit_jax import evaluators, models, optim, sharding, step
from vit_jax.assembly import evaluations, kept, trained
from vit_jax.convert import load as weights
from vit_jax.data import mixture, order, sources, tasks
from vit_jax.data.readers import names
from vit_jax.data.tokenizers import Named, folders
from vit_jax.errors import UserError
from vit_jax.models import interface, parameters
from vit_jax.objectives import Examples, Objective
from vit_jax.run import workdir

MOST_STEPS = 2**31 - 1  # the limit of bounds.Steps


class Parts(NamedTuple):
    """The parts of a run that its config names. None of them depends on the workdir."""

    source: sources.Source
    task: tasks.Task
    steps: int
    mesh: jax.sharding.Mesh
    model: Any  # None if the objective has its own network
    spec: dict[str, jax.ShapeDtypeStruct]  # shapes and dtypes of one example
    objective: Objective
    tx: optim.Optimizer
    abstract: step.State
    evals: dict[str, Any]

    @property
    def inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of what the objective's `predict` reads of one example."""
        return self.objective.inputs or self.spec


def make(
    config: ConfigDict,
    source: sources.Source | None = None,
    devices: Sequence[jax.Device] | None = None,
    classes: Sequence[str] | None = None,
    checkpoints: trained.Read = 'shapes',
) -> Parts:
    """Builds the parts of a run; raises UserError for mistakes that show before training.

    Args:
      config: the config of the run.
      source: data set to use in place of the config's; a plan may know its size only.
      devices: devices of the mesh, which a plan only compiles for. None: all.
      classes: names of the classes of a head that is kept (`kept_classes`), to which the labels of
        the data are mapped.
      checkpoints: what is read of those that the objective's settings name, see `trained.Read`.
    """
    source = mixture.load(**config.data.source) if source is None else source
    mesh = sharding.make_mesh(devices, **config.mesh)
    sharding.check_batch(config.data.batch_size, mesh, config.accumulate)
    if config.keep_head and config.init_from and (classes or config.model.num_classes):
        classes = tuple(classes or map(str, range(config.model.num_classes)))
        title = f'data set {mixture.title(config.data.source)}'
        source = names.relabel(source, classes, title, "the kept head's")
    task = task_of(config, source)
    spec = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in task.blank.items()}
    model = model_of(config, task)
    steps = steps_of(config, source)
    objective = objective_of(config, model, task, spec, steps, checkpoints)
    tx = optim.make(step.abstract_params(objective), steps, objective.rules, **config.optim)
    abstract = step.abstract_state(objective, tx, mesh)
    if objective.kept is not None:
        objective = objective._replace(inputs=objective.inputs or spec)
        task = kept.without_image(task, objective, tx, abstract.params)
        spec = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in task.blank.items()}
    if checkpoints == 'values' and task.tokenizer is not None:
        check_vocabulary(abstract.params, task.tokenizer)
    evaluations.check_image_sizes(config, objective, spec, abstract.params)
    subject = evaluators.subject(
        objective, abstract.params, spec, mesh, task.names, task.tokenizer
    )
    evals = {name: evaluations.make(subject, settings) for name, settings in config.evals.items()}
    evaluations.check_best(config.checkpoint.best, evals)
    return Parts(source, task, steps, mesh, model, spec, objective, tx, abstract, evals)


def task_of(config: ConfigDict, source: sources.Source) -> tasks.Task:
    """Makes the task that the section `data` of a config names, for a data set."""
    function = configs.named('data.task', config.data.task).function
    return function(source, **configs.settings_of(config.data, function))


def model_of(config: ConfigDict, task: tasks.Task) -> nn.Module | None:
    """Builds the model, with an output per class of the data unless the config sets the number."""
    if config.model.name is None:
        return None
    classes = config.model.num_classes or len(task.names.get('classes', ())) or None
    return models.build(**config.model.to_dict() | {'num_classes': classes})


def objective_of(
    config: ConfigDict,
    model: nn.Module | None,
    task: tasks.Task,
    spec: dict[str, jax.ShapeDtypeStruct],
    steps: int,
    checkpoints: trained.Read = 'shapes',
) -> Objective:
    """Makes the objective that a config names, for a run of a number of steps."""
    copies = -(-config.data.repeats // config.accumulate)  # in succession, within a micro-batch
    examples = Examples(spec, task.names, task.tokenizer, copies, steps)
    function = configs.named('objective.name', config.objective.name).function
    settings = configs.settings_of(config.objective, function)
    settings |= trained.loaded(settings, function, model, examples, checkpoints)
    objective = function(model, examples, **settings)
    if config.accumulate > 1 and objective.indivisible:
        raise UserError(
            f'accumulate is {config.accumulate}, but objective {config.objective.name} takes whole '
            f'batches: {objective.indivisible}; set it to 1'
        )
    return objective._replace(predict=interface.computed_exactly(objective.predict, model))


def check_vocabulary(params: Any, tokenizer: Named) -> None:
    """Raises UserError if the model has embeddings for fewer tokens than the tokenizer has."""
    for name, x in parameters.named_leaves(params).items():
        if name.split('/')[-1] == 'vocabulary' and x.shape[0] < tokenizer.loaded.vocab_size:
            raise UserError(
                f'the model has {x.shape[0]} tokens (vocab_size), and tokenizer '
                f'{tokenizer.address} {tokenizer.loaded.vocab_size}'
            )


def of_run(
    config: ConfigDict,
    path: epath.Path,
    begun: bool,
    devices: Sequence[jax.Device] | None = None,
    checkpoints: trained.Read = 'known',
) -> Parts:
    """Builds the parts of the run in a workdir, which has checkpoints if it has `begun`."""
    classes, config = kept_classes(config, path, begun), with_kept_tokenizer(config, path, begun)
    return make(config, devices=devices, classes=classes, checkpoints=checkpoints)


def kept_classes(config: ConfigDict, path: epath.Path, begun: bool) -> Sequence[str] | None:
    """Names of the classes of the head that the run in `path` keeps; None if its head is new.

    A resumed run reads them from classes.json, as the checkpoint `init_from` may be gone.
    """
    if not config.keep_head or config.init_from is None:
        return None
    classes = workdir.read_names(path / 'classes.json') if begun else None
    if classes:
        return classes
    return weights.read(config.init_from, part='encoder', values=False, ema=None).classes


def with_kept_tokenizer(config: ConfigDict, path: epath.Path, begun: bool) -> ConfigDict:
    """The config of the run in `path`, with its copy of a tokenizer whose file is gone."""
    address, kept = config.data.get('tokenizer'), path / folders.INSIDE
    there = address is None or '://' in address or os.path.exists(os.path.expanduser(address))
    if there or not begun or not kept.exists():
        return config
    config = config.copy_and_resolve_references()
    config.data.tokenizer = os.fspath(kept)
    return config


def steps_of(config: ConfigDict, source: Sized) -> int:
    """Length of a run in steps."""
    if config.steps:
        return config.steps
    steps = max(1.0, config.epochs * len(source) / config.data.batch_size)
    if steps > MOST_STEPS:
        raise UserError(
            f'epochs is {config.epochs:g}, which makes {steps:g} steps, above {MOST_STEPS:,}'
        )
    return round(steps)


def example_ids(config: ConfigDict, parts: Parts, number: int) -> np.ndarray:
    """Indices [B] of the examples of a step, counted from 1."""
    return order.batch_ids(
        parts.source, batch_size=config.data.batch_size, seed=config.seed, step=number - 1,
        repeats=config.data.repeats,
    )  # fmt: skip
