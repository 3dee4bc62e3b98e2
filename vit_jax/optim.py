"""Optimizers: schedules, weight decay by name, layer-wise rates, freezing, averaged parameters.

A frozen leaf is None in every tree of this module: it has no gradient and no optimizer state.
"""

import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vit_jax.errors import UserError
from vit_jax.io.bounds import Float, NonNegative, Pattern, Positive, Range, Rate
from vit_jax.models import parameters

Schedule = Literal['cosine', 'linear', 'rsqrt', 'constant']


class Optimizer(NamedTuple):
    """An optax transformation of the trainable leaves, with its schedule and a table of leaves."""

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    schedule: optax.Schedule  # step -> learning rate
    trainable: Callable[[Any], Any]  # parameters -> the same tree, None at frozen leaves
    table: tuple[tuple, ...]  # by leaf: name, shape, count, rate multiplier, weight decay, frozen


class AveragedParams(NamedTuple):
    """Exponential moving average of the trainable parameters."""

    average: Any


def make_schedule(
    kind: Schedule, *, lr: float, steps: int, warmup: int = 0, cooldown: int = 0,
    timescale: int = 10_000,
) -> optax.Schedule:
    """Makes a schedule, step -> rate: linear warm-up from 0, `kind`, linear cool-down to 0.

    cosine and linear reach 0 at `steps`; rsqrt falls as 1 / sqrt(1 + t / timescale) after the
    warm-up (arXiv:2106.04560 section 3.5). Raises UserError if warm-up and cool-down exceed
    `steps`.
    """
    if warmup + cooldown > steps:
        raise UserError(f'optim.warmup {warmup} + optim.cooldown {cooldown} exceed {steps} steps')

    def rate(step):
        after = jnp.maximum(jnp.asarray(step, jnp.float32) - warmup, 0)
        progress = jnp.minimum(after / max(steps - warmup, 1), 1)
        value = {
            'cosine': lambda: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            'linear': lambda: 1 - progress,
            'rsqrt': lambda: jax.lax.rsqrt(1 + after / timescale),
            'constant': lambda: jnp.float32(1),
        }[kind]()
        if warmup:
            value *= jnp.minimum(step / warmup, 1)
        if cooldown:
            value *= jnp.clip((steps - step) / cooldown, 0, 1)
        return lr * value

    return rate


def rate_multiplier(
    layer: parameters.Layer, ndim: int, depth: int, layer_decay: float
) -> jax.Array | float:
    """Layer-wise multiplier of the learning rate of a leaf (arXiv:2106.08254 section 3.1).

    It is d^(L+1) in the stem and 1 in the head, for `layer_decay` d and `depth` L: an array
    [L, 1, ...] of `ndim` dimensions for stacked blocks, a float for every other leaf.
    """
    if layer == 'blocks':
        rates = layer_decay ** jnp.arange(depth, 0, -1)
        return rates.reshape(depth, *[1] * (ndim - 1)).astype(jnp.float32)
    return layer_decay ** (depth + 1) if layer == 'stem' else 1.0


def rate_multipliers(
    leaves: dict[str, Any], layer_decay: float, rules: tuple
) -> dict[str, jax.Array | float]:
    """{name: layer-wise multiplier} of leaves by name, {} if `layer_decay` is 1.

    Raises UserError unless the leaves have one depth, ValueError if a leaf has no rule.
    """
    if layer_decay == 1:
        return {}
    layers = {n: parameters.find_rule(n, tuple(x.shape), rules).layer for n, x in leaves.items()}
    depths = sorted({x.shape[0] for n, x in leaves.items() if layers[n] == 'blocks'})
    if len(depths) != 1:
        blocks = f'stacks of {depths} blocks' if depths else 'no encoder blocks'
        raise UserError(f'optim.layer_decay is {layer_decay}, but the model has {blocks}')
    return {
        n: rate_multiplier(layers[n], len(x.shape), depths[0], layer_decay)
        for n, x in leaves.items()
    }


def scale_by_tree(multipliers: Any) -> optax.GradientTransformation:
    """Scales each update by its own multiplier, of a tree like the updates."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda u, m: (u * m).astype(u.dtype), updates, multipliers), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def average_params(decay: float) -> optax.GradientTransformation:
    """Maintains an exponential moving average of the parameters after each update."""

    def update(updates, state, params):
        average = jax.tree.map(
            lambda a, p, u: decay * a + (1 - decay) * (p + u), state.average, params, updates
        )
        return updates, AveragedParams(average)

    return optax.GradientTransformation(
        lambda params: AveragedParams(jax.tree.map(jnp.array, params)), update
    )


def merge(trainable: Any, params: Any) -> Any:
    """Replaces leaves of `params` by those of `trainable` that are not None."""
    return jax.tree.map(
        lambda t, p: p if t is None else t, trainable, params, is_leaf=lambda x: x is None
    )


def averaged(state: Any) -> Any:
    """The moving average of the parameters if a step.State has one, else the parameters."""
    nodes = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, AveragedParams))
    found = [x for x in nodes if isinstance(x, AveragedParams)]
    return merge(found[0].average, state.params) if found else state.params


def update_rule(
    name: str, *, b1: float, b2: float, eps: float, momentum: float, momentum_dtype: str | None
) -> optax.GradientTransformation:
    """The algorithm alone, without learning rate, weight decay and clipping; see `make`."""
    if name == 'adamw':
        return optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=momentum_dtype)
    if name == 'sgd':
        return optax.trace(decay=momentum, accumulator_dtype=momentum_dtype)
    return optax.chain(  # adafactor, as modified in arXiv:2106.04560 section 3.4
        optax.scale_by_factored_rms(min_dim_size_to_factor=32),
        optax.clip_by_block_rms(1.0),
        optax.ema(momentum, debias=False, accumulator_dtype=momentum_dtype),
    )


def matches(patterns: tuple[str, ...], name: str) -> bool:
    """Whether one of the regular expressions is found in a name."""
    return any(re.search(pattern, name) for pattern in patterns)


def frozen_names(
    names: Iterable[str], freeze: tuple[str, ...], only: tuple[str, ...]
) -> set[str]:
    """Names that `freeze` matches, or `only` does not. Raises UserError if they are all."""
    names = set(names)
    frozen = {n for n in names if matches(freeze, n) or (only and not matches(only, n))}
    if frozen == names:
        raise UserError(f'optim.freeze {freeze!r} leaves no parameter to train')
    return frozen


def check_patterns(names: Iterable[str], **patterns: tuple[str, ...]) -> None:
    """Raises UserError, naming a setting, for a pattern that matches no name."""
    for setting, values in patterns.items():
        for pattern in values:
            if not any(re.search(pattern, n) for n in names):
                raise UserError(f'optim.{setting} {pattern!r} matches no parameter')


def make(
    params: Any,
    steps: int,
    rules: tuple = (),
    *,
    name: Literal['adamw', 'sgd', 'adafactor'] = 'adamw',
    lr: Positive[float] = 1e-3,
    schedule: Schedule = 'cosine',
    warmup: NonNegative[int] = 0,
    cooldown: NonNegative[int] = 0,
    timescale: Positive[int] = 10_000,
    weight_decay: NonNegative[float] = 0.0,
    decay: tuple[Pattern, ...] | Pattern = ('kernel$',),
    clip: Positive[float] | None = None,
    layer_decay: Annotated[float, Range(0, 1, '(]')] = 1.0,
    freeze: tuple[Pattern, ...] | Pattern = (),
    only: tuple[Pattern, ...] | Pattern = (),
    ema: Rate | None = None,
    b1: Rate = 0.9,
    b2: Rate = 0.999,
    eps: Positive[float] = 1e-8,
    momentum: Rate = 0.9,
    momentum_dtype: Float | None = None,
) -> Optimizer:
    """Makes the optimizer of a run.

    Weight decay is decoupled and scales with the learning rate: p -= rate * (update +
    weight_decay * p). Patterns are regular expressions, searched for in parameter names such as
    'encoder/attn/qkv/kernel'; one that matches no parameter raises UserError.

    Args:
      params: tree of parameters, or of their shapes.
      steps: length of the run in updates.
      rules: the objective's own rows of `models.parameters.RULES`.
      name: optimization algorithm. adafactor is the variant of arXiv:2106.04560 section 3.4.
      lr: peak learning rate.
      schedule: decay of the learning rate after the warm-up. cosine and linear reach 0 at the last
        step; rsqrt is 1 / sqrt(1 + t / timescale), t steps after the warm-up.
      warmup: steps in which the learning rate rises linearly from 0.
      cooldown: steps at the end in which the learning rate also falls linearly to 0.
      timescale: time constant of the schedule rsqrt, in steps.
      weight_decay: strength of the weight decay.
      decay: patterns of the parameters that weight decay applies to.
      clip: maximum global norm of the gradient; larger gradients are scaled down to it. None: no
        clipping.
      layer_decay: factor of the learning rate from each block to the one before it
        (arXiv:2106.08254 section 3.1). 1: the same rate for all.
      freeze: patterns of the parameters that stay as they are.
      only: patterns of the parameters to train; all others stay as they are. 'head' trains a
        linear probe. Empty: all.
      ema: decay of an exponential moving average of the parameters, which evaluations then use.
        None: no average.
      b1: decay of the first moment in adamw.
      b2: decay of the second moment in adamw.
      eps: term added to the denominator in adamw.
      momentum: decay of the momentum in sgd and adafactor.
      momentum_dtype: dtype in which the first moment or momentum is stored. None: that of the
        parameters.
    """
    rate = make_schedule(
        schedule, lr=lr, steps=steps, warmup=warmup, cooldown=cooldown, timescale=timescale
    )
    leaves = parameters.named_leaves(params)
    decay, freeze, only = ((p,) if isinstance(p, str) else tuple(p) for p in (decay, freeze, only))
    check_patterns(leaves, decay=decay, freeze=freeze, only=only)
    frozen = frozen_names(leaves, freeze, only)
    decayed = {n for n in leaves if weight_decay and matches(decay, n)} - frozen
    multipliers = rate_multipliers(leaves, layer_decay, rules)

    def by_name(function, tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: function(parameters.leaf_name(path), x), tree
        )

    def trainable(tree):
        return by_name(lambda name, x: None if name in frozen else x, tree)

    parts = [
        optax.clip_by_global_norm(clip) if clip is not None else None,
        update_rule(name, b1=b1, b2=b2, eps=eps, momentum=momentum, momentum_dtype=momentum_dtype),
        optax.add_decayed_weights(
            weight_decay, mask=lambda tree: by_name(lambda name, _: name in decayed, tree)
        ) if decayed else None,
        scale_by_tree(by_name(lambda name, _: multipliers[name], trainable(params)))
        if multipliers else None,
        optax.scale_by_learning_rate(rate),
        average_params(ema) if ema is not None else None,
    ]  # fmt: skip
    tx = optax.chain(*(part for part in parts if part is not None))
    table = tuple(
        (n, tuple(x.shape), int(x.size), span(multipliers.get(n, 1.0)),
         weight_decay if n in decayed else 0.0, n in frozen)
        for n, x in leaves.items()
    )  # fmt: skip
    return Optimizer(tx.init, tx.update, rate, trainable, table)


def span(multiplier: jax.Array | float) -> str:
    """Formats a rate multiplier: '0.75', or '0.056 ... 0.75' for an array."""
    values = jnp.ravel(jnp.asarray(multiplier))
    low, high = f'{float(values.min()):.3g}', f'{float(values.max()):.3g}'
    return low if low == high else f'{low} ... {high}'
