"""Restores runs of any objective, for commands that evaluate, predict or export."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from vit_jax import assembly, sharding, step
from vit_jax import config as configs
from vit_jax.convert import run
from vit_jax.errors import UserError
from vit_jax.models import parameters


def config_of_method(address: str, with_model: bool) -> ConfigDict | None:
    """The complete config, for one device, of a run of another objective than `supervised`.

    None for any other checkpoint and, unless `with_model`, for a run of a model of the package.
    """
    given = run.config_of(address)[1] if run.is_run(address) else {}
    objective, model = given.get('objective', {}), given.get('model', {})
    classifies = objective.get('name', 'supervised') == 'supervised'
    if classifies or (model.get('name') and not with_model):
        return None
    return configs.complete(given | {'mesh': {}})


def parts_and_params(
    address: str,
    config: ConfigDict,
    ema: bool | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[assembly.Parts, Any]:
    """Restores a run of any objective from one of its checkpoints: (its parts, its parameters).

    Args:
      address: a run or one of its checkpoints, see `convert.run`.
      config: complete config, that of the run or another one with the same parameters.
      ema: whether to read the moving average of the parameters. None: if the run saved one.
      devices: devices of the mesh. None: all.

    Raises:
      UserError: the checkpoint is damaged, or its parameters are not those of the objective.
    """
    root, _ = run.config_of(address)
    parts = assembly.of_run(config, root, begun=True, devices=devices)
    params = unflatten_dict(run.arrays_of(address, ema), sep='/')
    parameters.check_same(params, parts.abstract.params, address)
    return parts, step.on_devices(params, sharding.shardings_of(parts.abstract.params))


def predict_images(config: ConfigDict, parts: assembly.Parts) -> Callable[[Any, jax.Array], dict]:
    """Makes a function (params, images uint8 [B, H, W, C]) -> {name: array [B, ...]}.

    It is the objective's `predict`, on batches of images alone. Raises UserError if that reads more
    of an example than its image, or predicts anything but a row for each image.
    """
    name = config.objective.name
    image = parts.inputs.get('image')
    if image is None:
        raise UserError(f'objective {name} learns from {", ".join(parts.inputs)}, not from images')

    def predict(params, images):
        count = images.shape[0]
        marks = {'mask': jnp.ones(count, jnp.float32), 'id': jnp.zeros(count, jnp.int32)}
        return parts.objective.predict(params, {'image': images, **marks})

    two = jax.ShapeDtypeStruct((2, *image.shape), image.dtype)
    try:
        outputs = jax.eval_shape(predict, parts.abstract.params, two)
    except KeyError as e:
        if e.args[0] not in parts.inputs:
            raise
        raise UserError(
            f'objective {name} predicts from {e.args[0]}, too, which an image file does not have; '
            'python -m vit_jax.evaluate runs its evaluations'
        ) from e
    for key, x in outputs.items():
        if x.shape[:1] != (2,):
            raise UserError(
                f'objective {name} predicts {key}, which is not an array with a row an image: it '
                f'is {list(x.shape)} for two images'
            )
    return predict
