"""Makes the evaluations of a run and checks what they need of it."""

from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from vit_jax import config as configs
from vit_jax import evaluators
from vit_jax.data import tasks
from vit_jax.errors import UserError, choices
from vit_jax.io.text import brief
from vit_jax.objectives import Objective


def make(subject: evaluators.Subject, settings: Mapping | ConfigDict) -> Any:
    """Makes the evaluation of a Subject that a section of `evals` describes."""
    function = configs.named('evals.type', settings['type']).function
    return function(subject, **configs.settings_of(settings, function))


def check_image_sizes(
    config: ConfigDict, objective: Objective, spec: dict[str, jax.ShapeDtypeStruct], params: Any
) -> None:
    """Raises UserError if the parameters don't fit the image size of an evaluation.

    A table of position embeddings fits one size only, that of training. `spec` is that of the
    examples.
    """
    spec = objective.inputs or spec
    for name, settings in config.evals.items():
        if 'image' not in spec or 'image_size' not in settings:
            continue
        image = spec['image']
        size = (*tasks.size_of(settings.image_size), image.shape[-1])
        if size == image.shape:
            continue
        resized = spec | {'image': jax.ShapeDtypeStruct(size, image.dtype)}
        try:
            jax.eval_shape(objective.predict, params, evaluators.one_example(resized))
        except (UserError, TypeError, ValueError) as e:  # the last two where shapes do not fit
            resizes = config.objective.name == 'supervised'
            raise UserError(
                f'config evals.{name}.image_size is {settings.image_size}, data.image_size '
                f'{config.data.image_size}: {brief(e)}'
                + (' (python -m vit_jax.evaluate resizes positions)' if resizes else '')
            ) from e


def check_measured(best: str | None, name: str, metrics: Mapping[str, Any] | None) -> None:
    """Raises UserError if checkpoint.best names a metric that is not in an evaluation's result."""
    owner, _, metric = str(best).rpartition('/')
    if metrics is not None and owner == name and metric not in metrics:
        raise UserError(
            f'checkpoint.best is {best}, which {name} does not measure; {choices(metric, metrics)}'
        )


def check_best(best: str | None, evals: Mapping[str, Any]) -> None:
    """Raises UserError if the evaluation that checkpoint.best names has no such metric."""
    name, _, metric = str(best).rpartition('/')
    measured = getattr(evals.get(name), 'metrics', None)
    if measured is not None and metric not in measured:
        raise UserError(
            f'checkpoint.best is {best}, which is not measured here; {choices(metric, measured)}'
        )
