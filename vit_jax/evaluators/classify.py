"""Accuracy and loss over a whole data set, every example counted once."""

from functools import partial

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax import losses, sharding, step
from vit_jax.data import mixture, pipeline
from vit_jax.errors import UserError
from vit_jax.stop import Stop


class Classify:
    """An evaluation of a classifier, due every `every` steps (0: at the end alone)."""

    def __init__(
        self,
        model,
        mesh,
        *,
        type: str = 'classify',
        source: dict,
        image_size: int | tuple,
        batch_size: int,
        view: str | dict = 'resize',
        loss: str = 'softmax',
        every: int = 0,
        threads: int | None = None,
        workers: int = 0,
        prefetch: int = 8,
        tolerance: float = 0.0,
    ):
        if loss not in losses.LOSSES:
            raise UserError(f'evals: loss is {loss!r}, not one of {", ".join(losses.LOSSES)}')
        self.mesh, self.every = mesh, every
        self.source = mixture.load(**source)
        sharding.check_batch(batch_size, mesh)
        if len(self.source.classes) > (model.num_classes or 0):
            raise UserError(
                f'data set {mixture.title(source)} has {len(self.source.classes)} classes, '
                f'the model {model.num_classes or "no head"} (model.num_classes)'
            )
        self.feed = partial(
            pipeline.examples, self.source, sharding.rows(batch_size, mesh), view=view,
            image_size=image_size, batch_size=batch_size, threads=threads, workers=workers,
            prefetch=prefetch, tolerance=tolerance,
        )  # fmt: skip
        self.step = jax.jit(
            sharding.on(mesh, partial(step.eval_step, model=model, loss=loss)),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
        )

    def due(self, n, steps):
        return n == steps or (n > 0 and self.every > 0 and n % self.every == 0)

    def __call__(self, params, stop=None, at=lambda phase: None):
        """{'accuracy', 'loss', 'examples'}; None where `stop` became true before the end.

        `at` is told of each batch, as hosts.joined wants it.
        """
        stop = Stop() if stop is None else stop
        total = {'accuracy': 0.0, 'loss': 0.0, 'examples': 0.0}
        for i, batch in enumerate(self.feed()):
            at(f'evaluation, batch {i}' if i else 'compile, of an evaluation')
            sums, _ = self.step(params, sharding.put(stop.within(batch), self.mesh))
            sums = stop.hear(sums)
            if stop:
                return None
            total = {k: total[k] + float(v) for k, v in sums.items()}  # in float64
        count = total.pop('examples')
        return {k: v / count for k, v in total.items()} | {'examples': int(count)}

    def predictions(self, params):
        """One process's view of each example: {'id', 'label', 'prediction', 'confidence': [N]}."""
        parts = []
        for batch in self.feed():
            _, by_example = self.step(params, sharding.put(batch, self.mesh))
            by_example = jax.device_get(by_example) | {k: batch[k] for k in ('id', 'label')}
            parts.append({k: v[batch['mask'] > 0] for k, v in by_example.items()})
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
