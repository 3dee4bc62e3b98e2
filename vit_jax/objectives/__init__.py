"""Training methods, one file each: a function of keyword arguments that returns an `Objective`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError, shown
from vit_jax.models.parameters import named_leaves
from vit_jax.models.vit import Vit


class Examples(NamedTuple):
    """Describes the training examples to a method.

    Attributes:
      spec: {name: ShapeDtypeStruct} of one example, without `mask` and `id`.
      names: meaning of numbers in it: {'classes': ('cat', 'dog')}.
      tokenizer: that of its texts, see data.tokenizers.Named; None without texts.
      copies: how many times an example comes in succession within a micro-batch (data.repeats).
      steps: length of the run in updates.
    """

    spec: dict = {}
    names: dict = {}
    tokenizer: Any = None
    copies: int = 1
    steps: int = 1


class Trained(NamedTuple):
    """A checkpoint that a setting annotated as io.bounds.Checkpoint names, such as a teacher.

    Attributes:
      model: its model.
      params: its parameters, arrays of NumPy; only shapes and dtypes where no step runs, as in a
        plan.
      image_size: (height, width) of the images that it takes; None: any.
      classes: names of its classes by label; None: unknown.
      address: the setting itself.
    """

    model: Any
    params: Any
    image_size: tuple[int, int] | None = None
    classes: tuple[str, ...] | None = None
    address: str = ''


class Kept(NamedTuple):
    """What a method computes of an example's image once, and its loss then reads in place of it.

    Attributes:
      compute: (params, batch with `image`) -> {name: array [B, ...]}.
      weights: pattern of the parameters that it reads. All of them are to be frozen.
      setting: the setting that asks for it, for messages: 'objective.keep_features'.
    """

    compute: Callable
    weights: str
    setting: str


class Objective(NamedTuple):
    """Defines a training method: its loss, its predictions, and its state beside the parameters.

    `key` is a JAX key, `batch` {name: global array}: the task's arrays, `mask` float32 [B] (0 marks
    padding and unreadable examples) and `id`. Functions are pure and are traced by jit.

    Attributes:
      init: key -> params.
      loss: (params, extra, frozen, batch, key, step) -> (loss, (metrics, aux)). Loss and metrics
        are float32 scalars, means over examples with mask 1; `loss` is one of the metrics. `aux`
        is what `update` needs, {} if nothing. `step` counts updates, from 0.
      predict: (params, batch) -> {name: array}, which evaluators read. Dropout is off.
      inputs: {name: ShapeDtypeStruct} of what `predict` reads of one example, where this is not
        what `loss` reads; {}: the arrays of the training examples.
      extra: params -> tree that the method keeps beside the parameters, such as a moving average or
        a centre. It is saved with the state. Evaluations, and what loads the run, read `average` in
        place of the parameters where a dict has it, a tree of the same structure.
      update: (extra, params, aux, step) -> extra, after each update, with the new parameters.
      frozen: arrays that are read and never change, such as a teacher's. They are not saved; a
        resumed run compares them with those that it started with.
      rules: rows as in models.parameters.RULES, (pattern, spec) or (pattern, spec, layer), which
        come before those.
      indivisible: why gradients of micro-batches do not add up to those of the batch; '' if they
        do. Then `aux` is averaged over micro-batches, weighted by their examples with mask 1.
      flops: FLOPs of a forward pass over one example; None if unknown.
      settings: what evaluators use for settings of theirs that are not given: {'loss': 'softmax'}.
      warn: (step, {metric: float}) -> a warning for the log, or None. It is called at each line of
        training metrics until it warns.
      variants: {name: loss} in place of `loss`, of which each step has one, such as one for each
        patch size. Each is compiled at the first step that has it. A plan has `loss`, which is then
        the most expensive.
      variant: (seed, step) -> the name of that step's, on the host.
      kept: what is computed of each training image once, see `Kept`. None: nothing.
    """

    init: Callable
    loss: Callable
    predict: Callable
    extra: Callable = lambda params: {}
    update: Callable = lambda extra, params, aux, step: extra
    frozen: Any = {}
    rules: tuple = ()
    indivisible: str = ''
    flops: float | None = None
    settings: dict = {}
    inputs: dict = {}
    warn: Callable = lambda step, metrics: None
    variants: dict = {}
    variant: Callable | None = None
    kept: Kept | None = None


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of values [B] where mask [B] is 1; 0 if the mask is 0 everywhere."""
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)


def headless(model: Any, examples: Examples, method: str, *, pixels: bool = True) -> Vit:
    """The `Vit` of a config without a head; raises UserError for a model that `method` can't train.

    Its patches are to fill the images of the examples, and are of pixels where the method needs
    them.
    """
    if not isinstance(model, Vit):
        raise UserError(
            f'objective {method} trains a ViT, and model.name is that of a '
            f'{type(model).__name__}'
        )
    if pixels and model.resnet is not None:
        raise UserError(f'objective {method} reads pixels of patches, which model.resnet has not')
    model = model.clone(num_classes=None, representation_size=None, dist_head=False)
    try:
        model.grid(examples.spec['image'].shape)
    except UserError as e:
        raise UserError(f'config data.image_size: {e}') from e
    return model


def class_count(model: Any, examples: Examples, method: str) -> int:
    """Number of classes that a method predicts: model.num_classes, or those of the data.

    Raises UserError where neither states it.
    """
    count = getattr(model, 'num_classes', None) or len(examples.names.get('classes', ()))
    if not count:
        raise UserError(
            f'objective {method}: the data set names no classes; set model.num_classes'
        )
    return count


def check_metrics(metrics: Any) -> None:
    """Raises UserError unless metrics are {name: scalar} with a `loss`."""
    if not isinstance(metrics, dict) or 'loss' not in metrics:
        raise UserError(
            f'the loss of the objective returns the metrics {shown(metrics)}; they are '
            "{name: scalar}, with 'loss' among them"
        )
    for name, value in metrics.items():
        if jnp.shape(value):
            raise UserError(
                f'metric {name} of the objective is {list(jnp.shape(value))}, not a scalar'
            )


def check_extra(before: Any, after: Any) -> None:
    """Raises UserError unless `update` keeps names, shapes and dtypes of what the method keeps."""
    old, new = (
        {k: (jnp.result_type(x), jnp.shape(x)) for k, x in named_leaves(tree).items()}
        for tree in (before, after)
    )
    for name in [*old, *new]:
        if old.get(name) != new.get(name):
            was, now = (
                'nothing' if x is None else f'{x[0]} {list(x[1])}'
                for x in (old.get(name), new.get(name))
            )
            raise UserError(f'`update` of the objective makes extra {name} {now}; it was {was}')
