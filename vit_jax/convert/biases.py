"""Biases that a model lacks (`style.unbiased`), and those that the file of a format lacks."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import numpy as np

from vit_jax.models import block


def whole_groups(model: nn.Module, *groups: Sequence[str]) -> tuple[str, ...]:
    """Names of those groups in `style.unbiased` whose biases are all absent.

    A format with one flag for a group has either all of its biases or none.
    """
    absent = set(model.style.unbiased)
    return tuple(name for group in groups if set(group) <= absent for name in group)


def with_zeros(
    model: nn.Module, params: dict[str, np.ndarray], lacking: tuple[str, ...]
) -> tuple[nn.Module, dict[str, np.ndarray]]:
    """(model, params) with zeros for absent biases other than those that the file is `lacking`."""
    whole = model.clone(style=dataclasses.replace(model.style, unbiased=lacking))
    kernels = {
        'attn/qkv': (2, () if set(block.PROJECTIONS) <= set(lacking) else block.PROJECTIONS),
        'attn/out': (3, ('out',)),
        **{f'mlp/{name}': (2, ('mlp',)) for name in ('fc1', 'gate', 'fc2')},
    }
    for name, (axis, parts) in kernels.items():
        kernel = params.get(f'encoder/{name}/kernel')
        if kernel is None or not set(parts) - set(lacking):
            continue
        zeros = np.zeros((kernel.shape[0], *kernel.shape[axis:]), np.float32)
        bias = np.array(params.get(f'encoder/{name}/bias', zeros))
        for i, part in enumerate(block.PROJECTIONS if name == 'attn/qkv' else ()):
            if part in model.style.unbiased:  # masked in the model, whatever it is
                bias[:, i] = 0
        params = params | {f'encoder/{name}/bias': bias}
    return whole, params
