"""Evaluators measure a run while it trains, or a checkpoint.

An evaluator is a function or class of (subject, *, settings). Its settings are in a section of
`evals`, with `type`, its name, and `every`, the steps between evaluations. It returns a callable of
(params, stop, set_phase, advance) that returns {metric: number}, or None once `stop` is true. The
callable has `sources`, {name: Source}: the data sets that it reads. The evaluator's module declares
whether more or less is better, as METRICS = {metric: 'max' or 'min'} or as a function `metrics` of
the settings.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax import sharding
from vit_jax.data import mixture, pipeline
from vit_jax.data.readers import names
from vit_jax.data.sources import Source
from vit_jax.data.tokenizers import Named
from vit_jax.distributed.stop import Stop
from vit_jax.models.parameters import named_leaves
from vit_jax.objectives import Objective
from vit_jax.step import stop_votes


class Subject(NamedTuple):
    """The model to evaluate.

    Attributes:
      predict: (params, batch) -> {name: array}, see objectives.Objective.
      mesh: devices of the batches and parameters.
      outputs: {name: ShapeDtypeStruct} of what `predict` returns for a batch of one example.
      names: meaning of numbers in outputs, {'classes': (...)}; None or () if unknown.
      settings: those of the objective, for settings of an evaluation that are not given.
      tokenizer: that of the training examples, see data.tokenizers.Named; None without texts.
    """

    predict: Callable
    mesh: Mesh
    outputs: dict
    names: dict
    settings: dict
    tokenizer: Any = None


def one_example(spec: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch of one example, whose own shapes are in `spec`."""
    batch = {k: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for k, x in spec.items()}
    marks = {'mask': np.float32, 'id': np.int32}
    return batch | {k: jax.ShapeDtypeStruct((1,), dtype) for k, dtype in marks.items()}


def subject(
    objective: Objective,
    params: Any,
    spec: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mesh,
    names: dict,
    tokenizer: Any = None,
) -> Subject:
    """Makes the Subject of an objective.

    Args:
      objective: what was trained, an objectives.Objective.
      params: its parameters, or their shapes.
      spec: {name: ShapeDtypeStruct} of one training example.
      mesh: where batches and parameters lie.
      names: names of what is numbered, {'classes': (...)}.
      tokenizer: that of the training examples, see data.tokenizers.Named.
    """
    example = one_example(objective.inputs or spec)
    outputs = jax.eval_shape(objective.predict, params, example)
    sizes = [x.shape[0] for name, x in named_leaves(params).items() if name.endswith('vocabulary')]
    if tokenizer is not None and sizes:
        tokenizer = Named(tokenizer.address, tokenizer.length, (min(sizes), tokenizer.length))
    return Subject(objective.predict, mesh, outputs, names, objective.settings, tokenizer)


class Opened(NamedTuple):
    """The data set of an evaluation.

    Attributes:
      own: as it is.
      source: with the labels of the model's classes.
      classes: names of the model's classes, made `distinct`; numbers where there are none.
      title: its name in messages.
    """

    own: Source
    source: Source
    classes: tuple[str, ...]
    title: str


def open_source(
    subject: Subject, settings: Mapping[str, Any], count: int, first: int = 0
) -> Opened:
    """Opens a data set and matches its labels with the model's classes, see `names.relabel`.

    Args:
      subject: the model.
      settings: those of the data set, see `mixture.load`.
      count: number of the model's classes.
      first: number of classes before those of the data set, such as a background.
    """
    own, title = mixture.load(**settings), f'data set {mixture.title(settings)}'
    classes = subject.names.get('classes') or tuple(map(str, range(count)))
    both = count and own.classes
    source = names.relabel(own, classes[first:], title) if both else own
    return Opened(own, source, names.distinct(classes), title)


def reader(mesh: Mesh, batch_size: int, **settings: Any) -> Callable:
    """Reads data sets on a mesh: (source, task, stop=None) -> batches, see `pipeline.examples`.

    Args:
      mesh: where batches lie.
      batch_size: examples in a batch; raises UserError unless the devices divide it.
      **settings: threads, workers, prefetch and tolerance.
    """
    sharding.check_batch(batch_size, mesh)
    rows = sharding.rows(batch_size, mesh)
    return partial(pipeline.examples, rows=rows, batch_size=batch_size, **settings)


def compiled(sums: Callable, mesh: Mesh) -> Callable:
    """Jits `sums`, (params, batch) -> {name: array}, with a replicated result.

    The result includes the votes to stop that processes put in the batch, see distributed.stop.
    """
    return jax.jit(
        sharding.with_mesh(mesh, lambda params, batch: sums(params, batch) | stop_votes(batch)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


def results(
    step: Callable,
    feed: Callable,
    params: Any,
    mesh: Mesh,
    stop: Stop,
    set_phase: Callable[[str], None],
    advance: Callable[[int], None],
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the results of `step` for each batch of a data set; ends early if `stop` becomes true.

    Args:
      step: what `compiled` returns.
      feed: (stop=...) -> iterator over batches.
      params: parameters of the objective.
      mesh: where batches and parameters lie.
      stop: what ends the evaluation early.
      set_phase: receives the phase of each batch, as for hosts.join.
      advance: receives the number of images in each batch.
    """
    for i, batch in enumerate(feed(stop=stop)):
        set_phase(f'evaluation, batch {i}' if i else 'compile, of an evaluation')
        found = stop.read_votes(step(params, sharding.put(stop.add_vote(batch), mesh)))
        if stop:
            return
        yield {k: np.asarray(v) for k, v in found.items()}
        advance(int(np.sum(batch['mask'] > 0)))


def totals(
    step: Callable,
    feed: Callable,
    params: Any,
    mesh: Mesh,
    stop: Stop | None,
    set_phase: Callable[[str], None],
    advance: Callable[[int], None],
) -> dict[str, np.ndarray | np.float64] | None:
    """Sums the `results` of a data set: {name: float64 array or number}.

    With a `stop` that becomes true the sums are None; without one, nothing ends the evaluation.
    """
    stop, total = Stop() if stop is None else stop, {}
    for sums in results(step, feed, params, mesh, stop, set_phase, advance):
        total = {k: total.get(k, 0) + v.astype(np.float64) for k, v in sums.items()}
    return None if stop else total


def is_due(every: int, n: int, steps: int) -> bool:
    """Whether an evaluation is due after step n of `steps`; `every` 0 means at the end only."""
    return n == steps or (n > 0 and every > 0 and n % every == 0)
