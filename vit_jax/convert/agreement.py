"""Checks that parameters are those of their model: names, shapes and dtype."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax.errors import UserError
from vit_jax.models import parameters
from vit_jax.models.text import Text
from vit_jax.models.two_towers import TwoTowers


def check_towers(model: TwoTowers, params: dict[str, np.ndarray]) -> None:
    """As `check_params`, for the text tower and the scalars beside an image tower."""
    shapes = {f'text/{name}': shape for name, shape in shapes_of_text(model.text).items()}
    shapes |= dict.fromkeys(('temperature', *(('bias',) if model.use_bias else ())), ())
    compare(shapes, {n: x for n, x in params.items() if not n.startswith('image/')})


def check_text(model: Text, params: dict[str, np.ndarray]) -> None:
    """As `check_params`, for a text tower alone."""
    compare(shapes_of_text(model), params)


def shapes_of_text(model: Text) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the parameters of a text tower."""
    shapes = parameters.abstract(model, (1, model.length), jnp.int32)
    return {name: x.shape for name, x in flatten_dict(shapes, sep='/').items()}


def check_params(
    model: nn.Module, params: dict[str, np.ndarray], size: tuple[int, int] | None
) -> None:
    """Raises UserError unless the parameters have the model's names and shapes, in float32."""
    if size is None:
        size = model.stride
        if 'posemb' in params:
            count = params['posemb'].shape[1] - sum(model.prefix_posemb.values())
            size = model.stride[0], model.stride[1] * count
    shapes = parameters.abstract(model, (1, *size, len(model.mean)))
    compare({k: v.shape for k, v in flatten_dict(shapes, sep='/').items()}, params)


def compare(shapes: Mapping[str, tuple[int, ...]], params: dict[str, np.ndarray]) -> None:
    """Raises UserError unless the parameters have these names and shapes, in float32."""
    for name in sorted(shapes.keys() | params.keys()):
        given = list(params[name].shape) if name in params else 'absent'
        expected = list(shapes[name]) if name in shapes else 'absent'
        if given != expected:
            raise UserError(f'parameter {name} is {given} in params, but {expected} in the model')
        if params[name].dtype != np.float32:
            raise UserError(f'parameter {name} has dtype {params[name].dtype}, not float32')
