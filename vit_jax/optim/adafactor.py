"""Adafactor as arXiv:2106.04560 section 3.4 modifies it, with each layer of a stack by itself.

A stack is an array [L, ...] of L layers. Its layers share no statistic, so the updates are those of
L separate arrays.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vit_jax.models.parameters import map_by_name

EPSILON = 1e-30  # added to squared gradients; big_vision optax.py:192
MIN_FACTORED = 32  # size of the smaller factored axis; big_vision optax.py:187


class Factors(NamedTuple):
    """Factored second moment of an array: its means over the larger and the smaller axis.

    Both arrays have as many dimensions as the array itself, of size 1 where the mean is taken.
    """

    row: jax.Array
    col: jax.Array


class SecondMoments(NamedTuple):
    """Number of updates, and the Factors or the full second moment of each parameter."""

    count: jax.Array
    moments: Any


def factored_axes(shape: tuple[int, ...], stacked: bool) -> tuple[int, int] | None:
    """(smaller, larger) of the two largest axes of a layer, None if one is below MIN_FACTORED."""
    axes = sorted(range(int(stacked), len(shape)), key=lambda axis: shape[axis])[-2:]
    return tuple(axes) if len(axes) == 2 and shape[axes[0]] >= MIN_FACTORED else None


def zero_moment(param: jax.Array, stacked: bool) -> Factors | jax.Array:
    """The second moment of a parameter before the first update."""
    axes = factored_axes(param.shape, stacked)
    if axes is None:
        return jnp.zeros_like(param)
    row, col = ([1 if i == axis else n for i, n in enumerate(param.shape)] for axis in axes[::-1])
    return Factors(jnp.zeros(row, param.dtype), jnp.zeros(col, param.dtype))


def next_moment(
    grad: jax.Array, moment: Factors | jax.Array, b2: jax.Array, stacked: bool
) -> Factors | jax.Array:
    """The moving average, with decay b2, of the second moment after a gradient."""
    square = grad**2 + EPSILON
    if not isinstance(moment, Factors):
        return b2 * moment + (1 - b2) * square
    small, large = factored_axes(grad.shape, stacked)
    row = b2 * moment.row + (1 - b2) * square.mean(large, keepdims=True)
    col = b2 * moment.col + (1 - b2) * square.mean(small, keepdims=True)
    return Factors(row, col)


def normalise(grad: jax.Array, moment: Factors | jax.Array, stacked: bool) -> jax.Array:
    """Divides a gradient by the root of its second moment, row * col / mean(row) if factored."""
    if not isinstance(moment, Factors):
        return grad * jax.lax.rsqrt(moment)
    small, _ = factored_axes(grad.shape, stacked)
    row = moment.row / moment.row.mean(small, keepdims=True)
    return grad * jax.lax.rsqrt(row) * jax.lax.rsqrt(moment.col)


def clip_rms(update: jax.Array, threshold: float, stacked: bool) -> jax.Array:
    """Scales an update, or each layer of a stack, down to a root mean square of `threshold`."""
    axes = tuple(range(int(stacked), update.ndim))
    rms = jnp.sqrt(jnp.mean(update**2, axes, keepdims=True))
    return update / jnp.maximum(1, rms / threshold)


def scale_by_factored_rms(
    stacks: Collection[str], *, b2_cap: float, clip_update: float | None
) -> optax.GradientTransformation:
    """Divides gradients by the roots of their second moments, factored where arrays are large.

    The decay of the second moments at update t = 1, 2, ... is min(b2_cap, 1 - t^-0.8): a cap of
    0.999 acts from t = 5,624 on. `stacks` are the names of the parameters [L, ...]; `clip_update`
    is as in `optim.update_rule`.
    """

    def init(params):
        moments = map_by_name(lambda name, p: zero_moment(p, name in stacks), params)
        return SecondMoments(jnp.int32(0), moments)

    def update(grads, state, params=None):
        b2 = jnp.minimum(b2_cap, 1 - (state.count + 1.0) ** -0.8)
        moments = map_by_name(
            lambda name, g, m: next_moment(g, m, b2, name in stacks), grads, state.moments
        )
        updates = map_by_name(lambda name, g, m: normalise(g, m, name in stacks), grads, moments)
        if clip_update is not None:
            updates = map_by_name(lambda name, u: clip_rms(u, clip_update, name in stacks), updates)
        return updates, SecondMoments(optax.safe_increment(state.count), moments)

    return optax.GradientTransformation(init, update)
