"""Parameters that training begins to change only after a number of updates."""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vit_jax.models.parameters import map_by_name


class Count(NamedTuple):
    """Number of updates."""

    count: jax.Array


class Held(NamedTuple):
    """Number of updates, and the states of a rule for all other parameters and for the held."""

    count: jax.Array
    others: Any
    held: Any


def begin_late(
    rule: optax.GradientTransformation, names: Collection[str], steps: int
) -> optax.GradientTransformation:
    """`rule`, whose state for the parameters `names` begins after `steps` updates, as if new.

    Their moments and the count that corrects these for their start do not see earlier gradients.
    """
    held = optax.masked(rule, lambda tree: map_by_name(lambda name, _: name in names, tree))
    others = optax.masked(rule, lambda tree: map_by_name(lambda name, _: name not in names, tree))

    def init(params: Any) -> Held:
        return Held(jnp.int32(0), others.init(params), held.init(params))

    def update(updates: Any, state: Held, params: Any = None) -> tuple[Any, Held]:
        updates, others_state = others.update(updates, state.others, params)
        updates, begun = held.update(updates, state.held, params)
        waiting = state.count < steps
        kept = jax.tree.map(lambda old, new: jnp.where(waiting, old, new), state.held, begun)
        return updates, Held(optax.safe_increment(state.count), others_state, kept)

    return optax.GradientTransformation(init, update)


def rise_after(
    names: Collection[str], steps: int, warmup: int
) -> optax.GradientTransformation:
    """Scales updates of the parameters `names`: by 0 for `steps`, then linearly to 1 in `warmup`.

    In the first of the latter the factor is 0, as in the warm-up of a schedule.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        waiting = state.count < steps
        factor = jnp.minimum((state.count - steps) / max(warmup, 1), 1) if warmup else 1
        updates = map_by_name(
            lambda name, u: jnp.where(waiting, 0, u * factor).astype(u.dtype)
            if name in names
            else u,
            updates,
        )
        return updates, Count(optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda params: Count(jnp.int32(0)), update)
