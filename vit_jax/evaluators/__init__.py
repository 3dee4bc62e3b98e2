"""What is measured of a run while it trains and of a checkpoint.

An evaluator is a function or class of (subject, *, settings), which stand in a section of `evals`
beside `type`, its name, and `every` (steps; 0: at the end alone). What it returns is called with
(params, stop, at, advance) and gives {metric: number}, or None where `stop` became true; it has
`sources`, {name: Source}, the data sets that it reads. Beside it in its file METRICS says which is
better, {metric: 'max' or 'min'}, or `metrics`, a function of the settings that returns that.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax import sharding
from vit_jax.distributed.stop import Stop
from vit_jax.step import stop_votes


class Subject(NamedTuple):
    """What is evaluated.

    Attributes:
      predict: (params, batch) -> {name: array}, see objectives.Objective.
      mesh: where batches and parameters lie.
      outputs: {name: ShapeDtypeStruct} of what `predict` returns for a batch of one example.
      names: what numbers in outputs stand for, {'classes': (...)}; None or () where unknown.
      settings: those of the objective, for what an evaluation's own leave open.
    """

    predict: Callable
    mesh: Any
    outputs: dict
    names: dict
    settings: dict


def subject(objective, params, spec, mesh, names):
    """The Subject of an objective, of parameters or their shapes, and examples of a spec."""
    batch = {k: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for k, x in spec.items()}
    outputs = jax.eval_shape(objective.predict, params, batch)
    return Subject(objective.predict, mesh, outputs, names, objective.settings)


def compiled(sums, mesh):
    """`sums`, (params, batch) -> {name: array}, jitted; every device has the result.

    Votes to stop that processes put in the batch are among the sums, see distributed.stop.
    """
    return jax.jit(
        sharding.on(mesh, lambda params, batch: sums(params, batch) | stop_votes(batch)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


def totals(step, feed, params, mesh, stop, at, advance):
    """{name: float64 array}: sums over all batches of `feed`, by what `compiled` made.

    None where `stop` became true before the end. `at` is told of each batch, as hosts.joined wants
    it, `advance` of the images in it.
    """
    stop = Stop() if stop is None else stop
    total = {}
    for i, batch in enumerate(feed(stop=stop)):
        at(f'evaluation, batch {i}' if i else 'compile, of an evaluation')
        sums = stop.hear(step(params, sharding.put(stop.within(batch), mesh)))
        if stop:
            return None
        total = {k: total.get(k, 0) + np.asarray(v, np.float64) for k, v in sums.items()}
        advance(int(np.sum(batch['mask'] > 0)))
    return total


def is_due(every, n, steps):
    """Whether an evaluation is due after step n of `steps`: every so many, at the end if 0."""
    return n == steps or (n > 0 and every > 0 and n % every == 0)
