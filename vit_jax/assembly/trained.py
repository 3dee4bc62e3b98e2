"""Checkpoints that settings of an objective name, such as a teacher, made into `Trained`."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import linen as nn

from vit_jax import config as configs
from vit_jax.convert import load as weights
from vit_jax.convert import run
from vit_jax.errors import UserError
from vit_jax.io import bounds
from vit_jax.models import parameters
from vit_jax.objectives import Examples, Trained

# What is read of a checkpoint: values, for training; shapes, for a plan; or 'known': shapes, where
# that takes no download. Else the run's own model stands in for it, as only the cost of a step
# depends on it: a finished run needs no teacher.
Read = Literal['values', 'shapes', 'known']


def addresses(settings: Mapping[str, Any], function: Callable) -> dict[str, str]:
    """{setting: address} of the settings of a function that are annotated as Checkpoint."""
    known = configs.keys_of(function)
    return {
        key: value for key, value in settings.items()
        if value is not None and bounds.is_checkpoint(known[key][0])
    }  # fmt: skip


def loaded(
    settings: Mapping[str, Any],
    function: Callable,
    model: nn.Module | None,
    examples: Examples,
    read: Read,
) -> dict[str, Trained]:
    """{setting: Trained} of an objective's settings that are annotated as Checkpoint.

    Args:
      settings: the settings of the objective.
      function: what makes the objective.
      model: the model of the run, if it has one.
      examples: the training examples.
      read: what is read.
    """
    image = examples.spec.get('image')
    shape = (224, 224, 3) if image is None else image.shape
    found = {}
    for key, address in addresses(settings, function).items():
        if read == 'known' and model is not None and not is_known(address):
            shapes = parameters.abstract(model, (1, *shape))
            found[key] = Trained(model, shapes, None, None, address)
            continue
        try:
            found[key] = trained(address, shape, read == 'values')
        except UserError as e:
            raise UserError(f'config objective.{key}: {e}') from e
    return found


def is_known(address: str) -> bool:
    """Whether a checkpoint is on this machine, or a run at gs://, and its shapes can be read."""
    try:
        if '://' in weights.resolve(address) and not run.is_run(address):
            return False
        weights.read(address, values=False)
    except UserError:
        return False
    return True


def trained(address: str, shape: tuple[int, ...], values: bool) -> Trained:
    """Reads a checkpoint. If it takes images of any size, shapes are those for `shape` [H, W, C].

    Raises UserError for one that can't be read.
    """
    one = weights.read(address, values=values, as_input=True)
    size = one.image_size
    if values:
        params = jax.tree.map(np.asarray, one.params)  # on devices only as sharded
    else:
        params = parameters.abstract(one.model, (1, *(size or shape[:2]), len(one.model.mean)))
    return Trained(one.model, params, size, one.classes, address)
