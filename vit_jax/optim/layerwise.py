"""Learning rates by name: layer-wise decay (arXiv:2106.08254 section 3.1), factors by pattern."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax.errors import UserError
from vit_jax.models import parameters
from vit_jax.optim.decay import check_patterns


def layers(leaves: Mapping[str, Any], rules: tuple) -> dict[str, parameters.Layer]:
    """{name: layer} of leaves by name. Raises ValueError if a leaf has no rule."""
    return {n: parameters.find_rule(n, tuple(x.shape), rules).layer for n, x in leaves.items()}


def rate_multiplier(
    layer: parameters.Layer, ndim: int, depth: int, layer_decay: float, layer_decay_from: str
) -> jax.Array | float:
    """Multiplier of the learning rate of a leaf, see `rate_multipliers`.

    It is an array [L, 1, ...] of `ndim` dimensions for `depth` L stacked blocks, a float for every
    other leaf.
    """
    last, stem = (1, depth + 1) if layer_decay_from == 'head' else (0, depth - 1)
    if layer == 'blocks':
        rates = layer_decay ** jnp.arange(depth - 1 + last, last - 1, -1)
        return rates.reshape(depth, *[1] * (ndim - 1)).astype(jnp.float32)
    return layer_decay**stem if layer == 'stem' else 1.0


def rate_multipliers(
    leaves: Mapping[str, Any],
    rules: tuple,
    layer_decay: float,
    layer_decay_from: str = 'head',
    rate_factors: tuple[tuple[str, float], ...] = (),
) -> dict[str, jax.Array | float]:
    """{name: multiplier of the learning rate} of parameters by name, {} if all have one rate.

    Args:
      leaves: parameters by name.
      rules: the objective's own rows of `models.parameters.RULES`.
      layer_decay: factor of the learning rate from each block to the one before it
        (arXiv:2106.08254 section 3.1). 1: the same rate for all.
      layer_decay_from: what has the full rate: the 'head' alone, so that of L blocks the last has
        layer_decay times it, the first layer_decay^L and the stem layer_decay^(L + 1); or the last
        'block', too, and the stem that of the first block (tue-mps/eomt lightning_module.py).
      rate_factors: (pattern, factor) pairs; the first pattern found in the name of a parameter
        multiplies its rate: (('^image/', 0.1),) gives one of two towers a tenth.

    Each of two towers has its own depth.

    Raises:
      UserError: the parameters have no stacked blocks, or stacks of several depths in one tower; a
        pattern matches no parameter.
      ValueError: a parameter has no rule.
    """
    check_patterns('rate_factors', [pattern for pattern, _ in rate_factors], leaves)
    factors = {
        name: next((f for pattern, f in rate_factors if re.search(pattern, name)), 1.0)
        for name in leaves
    }
    if layer_decay == 1:
        return factors if rate_factors else {}
    found = layers(leaves, rules)
    depths = depths_of_towers(leaves, found)
    stacked = {tower: sorted(several) for tower, several in depths.items() if several}
    wrong = next((several for several in stacked.values() if len(several) > 1), None)
    if wrong or not stacked:
        blocks = f'stacks of {wrong} blocks' if wrong else 'no encoder blocks'
        raise UserError(f'optim.layer_decay is {layer_decay}, but the model has {blocks}')
    return {
        n: factors[n] * rate_multiplier(
            found[n], len(x.shape), *stacked.get(parameters.tower_of(n), [0]), layer_decay,
            layer_decay_from,
        )
        for n, x in leaves.items()
    }  # fmt: skip


def depths_of_towers(
    leaves: Mapping[str, Any], found: Mapping[str, parameters.Layer]
) -> dict[str, set[int]]:
    """{tower, '' outside of two towers: depths of its stacked blocks} of leaves by name."""
    depths = {}
    for name, leaf in leaves.items():
        own = depths.setdefault(parameters.tower_of(name), set())
        if found[name] == 'blocks':
            own.add(leaf.shape[0])
    return depths


def scale_by_name(multipliers: Mapping[str, Any]) -> optax.GradientTransformation:
    """Scales each update by the multiplier of its name."""

    def update(updates, state, params=None):
        return parameters.map_by_name(
            lambda name, u: (u * multipliers[name]).astype(u.dtype), updates
        ), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def span(multiplier: jax.Array | float) -> str:
    """Formats a rate multiplier: '0.75', or '0.056 ... 0.75' for an array."""
    values = jnp.ravel(jnp.asarray(multiplier))
    low, high = f'{float(values.min()):.3g}', f'{float(values.max()):.3g}'
    return low if low == high else f'{low} ... {high}'
