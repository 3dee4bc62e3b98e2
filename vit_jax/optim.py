"""Optimizers: schedules, weight decay by name, layer-wise rates, freezing, averaged parameters.

A frozen leaf is None in every tree of this module: it has no gradient and no optimizer state.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vit_jax.errors import UserError
from vit_jax.io.bounds import Float, NonNegative, Pattern, Positive, Range, Rate

Schedule = Literal['cosine', 'linear', 'rsqrt', 'constant']
FIRST = (  # before block 1
    'embedding', 'posemb', 'posemb_y', 'posemb_x', 'cls', 'dist', 'registers', 'resnet', 'pre_norm',
)  # fmt: skip


class Optimizer(NamedTuple):
    """An optax transformation of the trainable leaves, with its schedule and a table of leaves."""

    init: Callable
    update: Callable
    schedule: Callable  # step -> learning rate
    trainable: Callable  # parameters -> the same tree, None at frozen leaves
    table: tuple  # a row per leaf: name, shape, count, rate multiplier, weight decay, frozen


class AveragedParams(NamedTuple):
    """Exponential moving average of the trainable parameters."""

    average: Any


def leaf_name(path):
    """Name of a leaf, such as 'encoder/attn/qkv/kernel', from its path in jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def make_schedule(kind, *, lr, steps, warmup=0, cooldown=0, timescale=10_000):
    """Makes a schedule, step -> rate: linear warm-up from 0, `kind`, linear cool-down to 0.

    cosine and linear reach 0 at `steps`; rsqrt falls as 1 / sqrt(1 + t / timescale) after the
    warm-up (arXiv:2106.04560 section 3.5).
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


def rate_multiplier(name, leaf, depth, layer_decay):
    """Layer-wise multiplier of the learning rate of a leaf (arXiv:2106.08254 section 3.1).

    It is d^(L+1) at the embedding and 1 at the head, for `layer_decay` d and `depth` L: an array
    [L, 1, ...] for stacked blocks, a float for every other leaf.
    """
    if name.startswith('encoder/'):
        rates = layer_decay ** jnp.arange(depth, 0, -1)
        return rates.reshape(depth, *[1] * (len(leaf.shape) - 1)).astype(jnp.float32)
    if name.split('/')[0] in FIRST:
        return layer_decay ** (depth + 1)
    return 1.0


def scale_by_tree(multipliers):
    """Scales each update by its own multiplier."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda u, m: (u * m).astype(u.dtype), updates, multipliers), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def average_params(decay):
    """Maintains an exponential moving average of the parameters after each update."""

    def update(updates, state, params):
        average = jax.tree.map(
            lambda a, p, u: decay * a + (1 - decay) * (p + u), state.average, params, updates
        )
        return updates, AveragedParams(average)

    return optax.GradientTransformation(
        lambda params: AveragedParams(jax.tree.map(jnp.array, params)), update
    )


def merge(trainable, params):
    """Replaces leaves of `params` by those of `trainable` that are not None."""
    return jax.tree.map(
        lambda t, p: p if t is None else t, trainable, params, is_leaf=lambda x: x is None
    )


def check_same(params, wanted, origin):
    """Raises UserError, naming a parameter, unless names and shapes equal those of `wanted`."""
    here, there = (
        {leaf_name(path): list(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, wanted)
    )
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise UserError(
                f'{origin}: parameter {name} is {here.get(name, "absent")}, the model of the '
                f'config has {there.get(name, "none")}'
            )


def averaged(state):
    """The moving average of the parameters if the state has one, else the parameters."""
    nodes = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, AveragedParams))
    found = [x for x in nodes if isinstance(x, AveragedParams)]
    return merge(found[0].average, state.params) if found else state.params


def core(name, *, b1, b2, eps, momentum, momentum_dtype):
    """The optimizer itself, without learning rate, weight decay and clipping."""
    if name == 'adamw':
        return optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=momentum_dtype)
    if name == 'sgd':
        return optax.trace(decay=momentum, accumulator_dtype=momentum_dtype)
    return optax.chain(  # adafactor, as modified in arXiv:2106.04560 section 3.4
        optax.scale_by_factored_rms(min_dim_size_to_factor=32),
        optax.clip_by_block_rms(1.0),
        optax.ema(momentum, debias=False, accumulator_dtype=momentum_dtype),
    )


def make(
    params,
    steps,
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
):
    """Makes the optimizer of a run.

    Weight decay is decoupled and scales with the learning rate: p -= rate * (update +
    weight_decay * p). Patterns are regular expressions, searched for in parameter names such as
    'encoder/attn/qkv/kernel'; one that matches no parameter raises UserError.

    Args:
      params: parameters, or their shapes.
      steps: length of the run in updates.
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
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    decay, freeze, only = ((p,) if isinstance(p, str) else p for p in (decay, freeze, only))
    for field, patterns in (('decay', decay), ('freeze', freeze), ('only', only)):
        for pattern in patterns:
            if not any(re.search(pattern, n) for n in leaves):
                raise UserError(f'optim.{field} {pattern!r} matches no parameter')
    frozen = {n for n in leaves if any(re.search(pattern, n) for pattern in freeze)}
    frozen |= {n for n in leaves if only and not any(re.search(p, n) for p in only)}
    decayed = {n for n in leaves if weight_decay and any(re.search(p, n) for p in decay)} - frozen
    if len(frozen) == len(leaves):
        raise UserError(f'optim.freeze {tuple(freeze)!r} leaves no parameter to train')
    depth = next((x.shape[0] for n, x in leaves.items() if n.startswith('encoder/')), 0)
    if layer_decay != 1 and not depth:
        raise UserError(f'optim.layer_decay is {layer_decay}, but the model has no encoder blocks')

    def trainable(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: None if leaf_name(path) in frozen else x, tree
        )

    def multipliers(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: rate_multiplier(leaf_name(path), x, depth, layer_decay), tree
        )

    def decay_mask(tree):
        return jax.tree_util.tree_map_with_path(lambda path, _: leaf_name(path) in decayed, tree)

    parts = [
        core(name, b1=b1, b2=b2, eps=eps, momentum=momentum, momentum_dtype=momentum_dtype),
    ]
    if clip is not None:
        parts.insert(0, optax.clip_by_global_norm(clip))
    if decayed:
        parts.append(optax.add_decayed_weights(weight_decay, mask=decay_mask))
    if layer_decay != 1:
        parts.append(scale_by_tree(multipliers(trainable(params))))
    parts.append(optax.scale_by_learning_rate(rate))
    if ema is not None:
        parts.append(average_params(ema))
    tx = optax.chain(*parts)
    table = tuple(
        (
            n,
            tuple(x.shape),
            int(x.size),
            span(rate_multiplier(n, x, depth, layer_decay)),
            weight_decay if n in decayed else 0.0,
            n in frozen,
        )
        for n, x in leaves.items()
    )
    return Optimizer(tx.init, tx.update, rate, trainable, table)


def span(multiplier):
    """Formats a rate multiplier: '0.75', or '0.056 ... 0.75' for an array."""
    values = jnp.ravel(jnp.asarray(multiplier))
    low, high = f'{float(values.min()):.3g}', f'{float(values.max()):.3g}'
    return low if low == high else f'{low} ... {high}'
