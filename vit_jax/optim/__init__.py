"""Optimizers: schedules, weight decay by name, layer-wise rates, freezing, averaged parameters.

A frozen leaf is None in every tree of this module: it has no gradient and no optimizer state.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vit_jax.errors import UserError
from vit_jax.io.bounds import Float, NonNegative, Pattern, Positive, Range, Rate, Share
from vit_jax.models.parameters import map_by_name, named_leaves
from vit_jax.optim.adafactor import scale_by_factored_rms
from vit_jax.optim.clipping import clip_each
from vit_jax.optim.decay import (
    add_decays,
    check_patterns,
    decay_factor,
    decay_strengths,
    matches,
)
from vit_jax.optim.holding import begin_late, rise_after
from vit_jax.optim.layerwise import layers, rate_multipliers, scale_by_name, span
from vit_jax.optim.muon import scale_by_muon
from vit_jax.optim.schedules import Schedule, make_schedule
from vit_jax.optim.trust import scale_by_trust_ratio


class Optimizer(NamedTuple):
    """An optax transformation of the trainable leaves, with its schedule and a table of leaves."""

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    schedule: optax.Schedule  # step -> learning rate
    trainable: Callable[[Any], Any]  # parameters -> the same tree, None at frozen leaves
    table: tuple[tuple, ...]  # by leaf: name, shape, count, rate multiplier, weight decay, frozen
    sam_rho: float = 0.0  # distance of the parameters at which step.train_step takes the gradient


class AveragedParams(NamedTuple):
    """Exponential moving average of the trainable parameters."""

    average: Any


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
    """The moving average of the parameters if a step.State has one, else the parameters.

    A method has its own as `average` in what it keeps (objectives.Objective.extra).
    """
    if isinstance(state.extra, dict) and 'average' in state.extra:
        return state.extra['average']
    nodes = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, AveragedParams))
    found = [x for x in nodes if isinstance(x, AveragedParams)]
    return merge(found[0].average, state.params) if found else state.params


def matching(
    setting: str, patterns: tuple[str, ...] | str, names: Collection[str]
) -> set[str]:
    """Names that a setting's patterns match; raises UserError if one matches none."""
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    check_patterns(setting, patterns, names)
    return {name for name in names if matches(patterns, name)}


def stacks_of(leaves: Mapping[str, Any], rules: tuple) -> set[str]:
    """Names of the parameters [L, ...] that are stacks of L layers."""
    return {name for name, layer in layers(leaves, rules).items() if layer == 'blocks'}


def clipping_of(
    clip: float, clip_by: str, leaves: Mapping[str, Any], rules: tuple
) -> optax.GradientTransformation:
    """Clips gradients as the settings `clip` and `clip_by` of `make` say."""
    if clip_by == 'global':
        return optax.clip_by_global_norm(clip)
    return clip_each(clip, stacks_of(leaves, rules))


def frozen_names(
    names: Collection[str], freeze: tuple[str, ...] | str, only: tuple[str, ...] | str
) -> set[str]:
    """Names that `freeze` matches, or `only` does not.

    Raises UserError if they are all, or if a pattern matches none.
    """
    frozen, trained = matching('freeze', freeze, names), matching('only', only, names)
    frozen |= set(names) - trained if only else set()
    if frozen == set(names):
        raise UserError(f'optim.freeze {freeze!r} leaves no parameter to train')
    return frozen


def update_rule(
    leaves: Mapping[str, Any],
    rules: tuple,
    *,
    name: str,
    b1: float,
    b2: float,
    eps: float,
    momentum: float,
    nesterov: bool,
    momentum_dtype: str | None,
    b2_cap: float,
    clip_update: float | None,
    trust: Collection[str],
    trust_coefficient: float,
) -> optax.GradientTransformation:
    """The algorithm alone, without learning rate, weight decay and clipping of the gradient.

    Args:
      leaves: parameters by name.
      rules: the objective's own rows of `models.parameters.RULES`.
      name: optimization algorithm. adafactor is the variant of arXiv:2106.04560 section 3.4. lamb
        (arXiv:1904.00962) is adamw with a trust ratio, which its weight decay is inside of. lars is
        that of facebookresearch/mae util/lars.py: the trust ratio, then the momentum. lion is the
        sign of a mixture of momentum and gradient (arXiv:2302.06675 algorithm 2). muon
        orthogonalises the momentum of kernels in the blocks (optim/muon.py), adamw does the rest.
        In all of them each layer of stacked blocks is an array of its own.
      b1: decay of the first moment in adamw, lamb and muon's adamw; share of the momentum in the
        mixture of lion.
      b2: decay of the second moment in adamw, lamb and muon's adamw; of lion's momentum, which is
        0.99 in its paper.
      eps: term added to the denominator in adamw, lamb and muon's adamw.
      momentum: decay of the momentum in sgd, adafactor, lars and muon, where it is Nesterov's.
      nesterov: whether the momentum of sgd is Nesterov's.
      momentum_dtype: dtype in which the first moment or momentum is stored. None: that of the
        parameters.
      b2_cap: upper bound of the decay 1 - t^-0.8 of the second moment in adafactor, at update t.
      clip_update: maximum root mean square of the update of an array in adafactor; larger updates
        are scaled down to it. None: no clipping.
      trust: names of the parameters whose updates have a trust ratio in lars.
      trust_coefficient: factor of the trust ratio in lars.
    """
    trace = optax.trace(momentum, nesterov and name == 'sgd', momentum_dtype)
    if name == 'sgd':
        return trace
    if name == 'lars':
        return optax.chain(
            scale_by_trust_ratio(trust, stacks_of(leaves, rules), trust_coefficient), trace
        )
    if name == 'adafactor':
        return optax.chain(
            scale_by_factored_rms(stacks_of(leaves, rules), b2_cap=b2_cap, clip_update=clip_update),
            optax.ema(momentum, debias=False, accumulator_dtype=momentum_dtype),
        )
    if name == 'lion':
        return optax.scale_by_lion(b1, b2, mu_dtype=momentum_dtype)
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=momentum_dtype)
    if name != 'muon':
        return adam
    stacks = stacks_of(leaves, rules)
    return scale_by_muon(stacks, adam, momentum=momentum, momentum_dtype=momentum_dtype)


def make(
    params: Any, steps: int, rules: tuple = (), *,
    name: Literal['adamw', 'sgd', 'adafactor', 'lamb', 'lars', 'lion', 'muon'] = 'adamw',
    lr: Positive[float] = 1e-3, schedule: Schedule = 'cosine', end_lr: NonNegative[float] = 0.0,
    warmup: NonNegative[int] = 0, cooldown: NonNegative[int] = 0,
    power: Positive[float] = 0.9, timescale: Positive[int] = 10_000,
    boundaries: tuple[Share, ...] = (), step_factor: Annotated[float, Range(0, 1, '(]')] = 0.1,
    weight_decay: NonNegative[float] = 0.0, decay_kind: Literal['decoupled', 'l2'] = 'decoupled',
    decay: tuple[Pattern, ...] | Pattern = ('kernel$',),
    decay_factors: tuple[tuple[Pattern, NonNegative[float]], ...] = (),
    weight_decay_end: NonNegative[float] | None = None,
    clip: Positive[float] | None = None, clip_by: Literal['global', 'array'] = 'global',
    clip_update: Positive[float] | None = None,
    layer_decay: Annotated[float, Range(0, 1, '(]')] = 1.0,
    layer_decay_from: Literal['head', 'block'] = 'head',
    rate_factors: tuple[tuple[Pattern, NonNegative[float]], ...] = (),
    freeze: tuple[Pattern, ...] | Pattern = (), only: tuple[Pattern, ...] | Pattern = (),
    hold: tuple[Pattern, ...] | Pattern = (), hold_steps: NonNegative[int] = 0,
    hold_warmup: NonNegative[int] = 0, ema: Rate | None = None,
    b1: Rate = 0.9, b2: Rate = 0.999, eps: Positive[float] = 1e-8,
    momentum: Rate = 0.9, nesterov: bool = False, momentum_dtype: Float | None = None,
    b2_cap: Share = 0.999,
    trust: tuple[Pattern, ...] | Pattern = ('kernel$',),
    trust_coefficient: Positive[float] = 0.001, sam_rho: NonNegative[float] = 0.0,
) -> Optimizer:  # fmt: skip
    """Makes the optimizer of a run.

    With the learning rate `rate` of a step and the algorithm `update`, decoupled weight decay is
    p -= rate * (update(g) + weight_decay * p), and l2 is p -= rate * update(g + weight_decay * p).

    Patterns are regular expressions, searched for in parameter names such as
    'encoder/attn/qkv/kernel'; one that matches no parameter raises UserError.

    Args:
      params: tree of parameters, or of their shapes.
      steps: length of the run in updates.
      rules: the objective's own rows of `models.parameters.RULES`.
      decay_kind: decoupled, or l2: in the gradient, before clipping and momentum.
      clip: maximum norm of the gradient; larger gradients are scaled down to it. None: no clipping.
      clip_by: the norm that is clipped: the global one, or that of each array by itself, where each
        layer of stacked blocks is an array of its own.
      freeze: patterns of the parameters that stay as they are.
      only: patterns of the parameters to train; all others stay as they are. 'head' trains a
        linear probe. Empty: all.
      hold: patterns of the parameters that stay as they are for the first `hold_steps` updates; the
        algorithm's state for them begins after these.
      hold_steps: see `hold`.
      hold_warmup: updates after these in which their rate rises linearly from 0.
      ema: decay of an exponential moving average of the parameters, which evaluations then use.
        None: no average.
      trust: patterns of the parameters whose updates have a trust ratio in lamb and lars. In lamb
        an array grows by at most its rate a step, so one that starts at zero, as a head, is late.
      sam_rho: distance uphill at which the gradient is taken, as in sharpness-aware minimisation
        (arXiv:2010.01412), see optim/sharpness.py; an update then costs two gradients, of which
        reported FLOPs count one. 0: none.

    `update_rule`, `make_schedule`, `decay_strengths`, `decay_factor` and `rate_multipliers`
    document the others.
    """
    leaves = named_leaves(params)
    frozen = frozen_names(leaves, freeze, only)
    strengths = decay_strengths(leaves, frozen, weight_decay, decay, decay_factors)
    multipliers = rate_multipliers(leaves, rules, layer_decay, layer_decay_from, rate_factors)
    rate = make_schedule(
        steps, lr=lr, schedule=schedule, end_lr=end_lr, power=power, timescale=timescale,
        boundaries=boundaries, step_factor=step_factor, warmup=warmup, cooldown=cooldown,
    )  # fmt: skip
    trusted = matching('trust', trust, leaves) if name in ('lamb', 'lars') else set()
    rule = update_rule(
        leaves, rules, name=name, b1=b1, b2=b2, eps=eps, momentum=momentum,
        nesterov=nesterov, momentum_dtype=momentum_dtype, b2_cap=b2_cap, clip_update=clip_update,
        trust=trusted, trust_coefficient=trust_coefficient,
    )  # fmt: skip
    held = matching('hold', hold, leaves) if hold_steps or hold_warmup else set()
    rule = begin_late(rule, held, hold_steps) if held else rule
    clipping = [clipping_of(clip, clip_by, leaves, rules)] if clip is not None else []
    decays = add_decays(strengths, decay_factor(steps, weight_decay, weight_decay_end))
    if name == 'lars' and decays and decay_kind != 'l2':
        raise UserError(
            'optim.name lars adds weight decay to the gradient, inside of the trust ratio: set '
            "optim.decay_kind to 'l2', or optim.weight_decay to 0"
        )
    parts = [*clipping, rule, *decays] if decay_kind == 'decoupled' else [*decays, *clipping, rule]
    parts += [scale_by_trust_ratio(trusted, stacks_of(leaves, rules))] if name == 'lamb' else []
    parts += [scale_by_name(multipliers)] if multipliers else []
    parts += [optax.scale_by_learning_rate(rate)]
    parts += [rise_after(held, hold_steps, hold_warmup)] if held else []
    parts += [average_params(ema)] if ema is not None else []
    tx = optax.chain(*parts)
    table = table_of(leaves, multipliers, strengths, frozen)
    return Optimizer(tx.init, tx.update, rate, partial(without, frozen), table, sam_rho)


def without(frozen: Collection[str], params: Any) -> Any:
    """A tree of parameters with None in the place of the frozen ones."""
    return map_by_name(lambda name, x: None if name in frozen else x, params)


def table_of(
    leaves: Mapping[str, Any], multipliers: Mapping, strengths: Mapping, frozen: Collection[str]
) -> tuple[tuple, ...]:
    """The rows of `Optimizer.table`."""
    return tuple(
        (name, tuple(x.shape), int(x.size), span(multipliers.get(name, 1.0)), strengths[name],
         name in frozen)
        for name, x in leaves.items()
    )  # fmt: skip
