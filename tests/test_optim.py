"""Optimizers against optax, and against NumPy in float64."""

import typing

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from learners import IMAGE, MODEL, assert_trees_close
from least_squares import SHAPES, assert_close, layers_of, ours, problem, tree

from vit_jax import optim
from vit_jax.errors import UserError
from vit_jax.models import parameters


def separate(name, values, fused=False):
    """The arrays that are one parameter here and several in big_vision: by layer, and q, k, v."""
    layers = values if name.startswith('encoder/') else [values]
    if 'qkv' in name and not fused:
        return [part for layer in layers for part in np.moveaxis(layer, 1, 0)]
    return [*layers]


class Adafactor:
    """arXiv:1804.04235 algorithm 4, with sums, as arXiv:2106.04560 section 3.4 changes it."""

    def __init__(self, shape, b2_cap, clip_update, momentum_dtype):
        order = np.argsort(shape, kind='stable')
        self.axes = order[-2:] if len(shape) > 1 and shape[order[-2]] >= 32 else ()
        self.sums = [0.0, 0.0] if len(self.axes) else [0.0]
        self.b2_cap, self.clip_update, self.dtype = b2_cap, clip_update, momentum_dtype
        self.momentum = np.zeros(shape)

    def update(self, g, t):
        b2 = min(self.b2_cap, 1 - t**-0.8)
        square = g**2 + 1e-30
        seen = [square.sum(axis, keepdims=True) for axis in self.axes] or [square]
        self.sums = [b2 * old + (1 - b2) * new for old, new in zip(self.sums, seen, strict=True)]
        moment = self.sums[0]
        if len(self.axes):
            moment = self.sums[0] * self.sums[1] / self.sums[1].sum(self.axes[0], keepdims=True)
        u = g / np.sqrt(moment)
        if self.clip_update:
            u = u / max(1, np.sqrt(np.mean(u**2)) / self.clip_update)
        decay = float(self.dtype(0.9))  # 0.898 in bfloat16, in which optax multiplies
        update = decay * self.momentum + 0.1 * u
        self.momentum = update.astype(self.dtype).astype(float)
        return update


@pytest.mark.parametrize('kind', typing.get_args(optim.Schedule))
def test_schedules(kind):
    rate = optim.make_schedule(
        100, lr=2.0, schedule=kind, warmup=10, cooldown=20, timescale=50, boundaries=(0.3, 0.8),
    )  # fmt: skip
    assert float(rate(0)) == 0 and float(rate(100)) == 0
    np.testing.assert_allclose(rate(5), 1.0)
    np.testing.assert_allclose(rate(10), 2.0)
    expected = {
        'cosine': (1 + np.cos(np.pi * 45 / 90), 1 + np.cos(np.pi * 80 / 90)),
        'linear': (1.0, 2 * 10 / 90),
        'poly': (2 * 0.5**0.9, 2 * (10 / 90) ** 0.9),
        'rsqrt': (2 / np.sqrt(1 + 45 / 50), 2 / np.sqrt(1 + 80 / 50)),
        'constant': (2.0, 2.0),
        'step': (0.2, 0.02),
    }[kind]
    np.testing.assert_allclose([rate(55), 2 * rate(90)], expected, rtol=1e-5)


def test_steps_and_ends_of_published_schedules():
    rate = optim.make_schedule(
        10_000, lr=3e-3, schedule='step', warmup=500, boundaries=(0.3, 0.6, 0.9)
    )  # big_transfer bit_hyperrule.py:47
    steps = [250, 3_000, 3_001, 6_000, 6_001, 9_000, 9_001]
    expected = [1.5e-3, 3e-3, 3e-4, 3e-4, 3e-5, 3e-5, 3e-6]
    np.testing.assert_allclose([rate(t) for t in steps], expected, rtol=1e-6)
    for kind, half in ('linear', (1e-3 + 1e-5) / 2), ('cosine', (1e-3 + 1e-5) / 2):
        rate = optim.make_schedule(110, lr=1e-3, schedule=kind, warmup=10, end_lr=1e-5)
        np.testing.assert_allclose([rate(10), rate(60), rate(110)], [1e-3, half, 1e-5], rtol=1e-5)
    rate = optim.make_schedule(160_000, lr=1e-3, schedule='poly', power=2.0, end_lr=1e-5)
    steps = np.array([0, 1, 70_000, 159_999, 160_000])  # rstrudel/segmenter scheduler.py
    expected = (1e-3 - 1e-5) * (1 - steps / 160_000) ** 2 + 1e-5
    np.testing.assert_allclose([rate(t) for t in steps], expected, rtol=1e-5)


@pytest.mark.parametrize('fields, peer', [
    (dict(weight_decay=0.1, clip=0.5),
     optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.1, mask=lambda p:
     jax.tree_util.tree_map_with_path(lambda k, _: k[-1].key == 'kernel', p)))),
    (dict(name='sgd', momentum=0.8), optax.sgd(1e-2, momentum=0.8)),
    (dict(name='sgd', nesterov=True), optax.sgd(1e-2, momentum=0.9, nesterov=True)),
])
def test_optimizer_equals_optax(fields, peer):
    params = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, *IMAGE)))['params']
    tx = optim.make(params, steps=10, lr=1e-2, schedule='constant', **fields)
    ours, theirs = tx.init(params), peer.init(params)
    for i in range(3):
        noise = jax.tree.map(lambda x: np.cos(x * 9 + i) * 0.3, params)  # noqa: B023
        a, ours = jax.jit(tx.update)(noise, ours, params)
        b, theirs = jax.jit(peer.update)(noise, theirs, params)
        assert_trees_close(a, b, rtol=1e-5, atol=1e-9)
        params = optax.apply_updates(params, a)


@pytest.mark.parametrize('kind', ['decoupled', 'l2'])
def test_weight_decay_under_momentum_equals_numpy(kind):
    lr, wd, steps = 0.01, 0.05, 30  # wd as in big_vision: p -= schedule * (lr * update + wd * p)
    start, gradient = problem(steps)
    found, _ = ours(
        start, gradient, steps, name='sgd', lr=lr, schedule='linear', clip=300.0, decay_kind=kind,
        weight_decay=wd / lr, decay_factors=(('^head/', 4.0), ('kernel', 2.0)),
    )  # fmt: skip
    params = {n: x.astype(float) for n, x in start.items()}
    momentum = dict.fromkeys(params, 0.0)
    factors = {n: 4 if n == 'head/kernel' else 2 * n.endswith('kernel') for n in params}
    for t in range(steps):
        grads, decay = gradient(t, params), {n: factors[n] * wd * p for n, p in params.items()}
        if kind == 'l2':
            grads = {n: g + decay[n] / lr for n, g in grads.items()}
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        for n, g in grads.items():
            momentum[n] = 0.9 * momentum[n] + g * min(1, 300 / norm)
            step = lr * momentum[n] + (decay[n] if kind == 'decoupled' else 0)
            params[n] -= (1 - t / 10_000) * step
        assert_close(found[t], params, start)


def test_lion_equals_numpy():
    """arXiv:2302.06675 algorithm 2, with the decay of big_vision."""
    steps, lr = 12, 1e-3
    start, gradient = problem(steps)
    found, _ = ours(
        start, gradient, steps, name='lion', lr=lr, schedule='constant', b1=0.8, b2=0.99,
        weight_decay=0.1,
    )  # fmt: skip
    params, momentum = {n: x.astype(float) for n, x in start.items()}, dict.fromkeys(start, 0.0)
    for t in range(steps):
        for n, g in gradient(t, params).items():
            sign = np.sign(0.8 * momentum[n] + 0.2 * g)
            momentum[n] = 0.99 * momentum[n] + 0.01 * g
            params[n] = params[n] - lr * (sign + 0.1 * n.endswith('kernel') * params[n])
        assert_close(found[t], params, start)


@pytest.mark.parametrize('late', [0, 5])
def test_adamw_of_dino_equals_numpy(late):
    """By array: clipping, a decay on a cosine, moments and their count that begin late.

    With `late`, so do rates that rise in as many steps.

    PyTorch's AdamW skips a parameter without a gradient altogether (facebookresearch/dino utils.py,
    clip_gradients, cancel_gradients_last_layer and cosine_scheduler).
    """
    steps, held, until, limit = 12, 'head/kernel', 4, 3.0
    start, gradient = problem(steps)
    params = tree(start)
    tx = optim.make(
        params, steps, lr=0.01, warmup=3, end_lr=1e-4, weight_decay=0.04, weight_decay_end=0.4,
        decay=('kernel$', 'posemb$'), clip=limit, clip_by='array', hold='^head/kernel$',
        hold_steps=until, hold_warmup=late,
    )  # fmt: skip
    state, update = tx.init(params), jax.jit(tx.update)
    exact = {n: x.astype(float) for n, x in start.items()}
    moments, counts = {n: [0.0, 0.0] for n in start}, dict.fromkeys(start, 0)
    for t in range(steps):
        updates, state = update(tree(gradient(t, parameters.named_leaves(params))), state, params)
        params = jax.device_get(optax.apply_updates(params, updates))
        cosine = 0.5 * (1 + np.cos(np.pi * max(t - 3, 0) / (steps - 3)))
        rate = 0.01 * t / 3 if t < 3 else 1e-4 + (0.01 - 1e-4) * cosine
        decay = 0.4 + (0.04 - 0.4) * 0.5 * (1 + np.cos(np.pi * t / steps))
        for n, g in gradient(t, exact).items():
            if n == held and t < until:
                continue
            norms = np.array([np.linalg.norm(x) for x in layers_of(n, g)])
            factors = np.minimum(1, limit / (norms + 1e-6))
            assert n == 'head/bias' or (factors < 1).any()
            g = g * (factors.reshape(-1, *[1] * (g.ndim - 1)) if len(factors) > 1 else factors[0])
            counts[n] += 1
            first, second = moments[n]
            moments[n] = first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
            first, second = first / (1 - 0.9 ** counts[n]), second / (1 - 0.999 ** counts[n])
            own = rate * (min(1, (t - until) / late) if n == held and late else 1)
            exact[n] *= 1 - own * decay * (n.endswith('kernel') or n == 'posemb')
            exact[n] -= own * first / (np.sqrt(second) + 1e-8)
        found = parameters.named_leaves(params)
        if t < until:
            np.testing.assert_array_equal(found[held], start[held])
        if t:  # the first rate is 0
            moving = {n: x for n, x in exact.items() if n != held or t >= until + bool(late)}
            assert_close(found, moving, start)


def test_the_first_factor_that_matches_multiplies_the_decay():
    params = tree({n: jnp.ones(s) for n, s in SHAPES.items()})
    factors = (('^head/', 100.0), ('mlp|head', 0.5))
    tx = optim.make(
        params, 9, weight_decay=0.03, decay_factors=factors, freeze=('^embedding',),
        decay_kind='l2', name='sgd', lr=1.0, schedule='constant',
    )  # fmt: skip
    expected = {n: 0.03 * n.endswith('kernel') for n in SHAPES}
    expected |= {'head/kernel': 3.0, 'encoder/mlp/fc1/kernel': 0.015, 'embedding/kernel': 0}
    assert {name: decay for name, *_, decay, _ in tx.table} == expected
    params = tx.trainable(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = parameters.named_leaves(tx.update(zeros, tx.init(params), params)[0])
    assert updates.keys() == SHAPES.keys() - {'embedding/kernel'}
    for name, update in updates.items():
        np.testing.assert_allclose(update, -expected[name], rtol=1e-6)


@pytest.mark.parametrize('fields, words', [
    (dict(decay_factors=(('^had/', 2.0),)), "optim.decay_factors '\\^had/' matches no parameter"),
    (dict(decay_factors=(('bias$', 2.0),)), "decay_factors 'bias\\$' matches no parameter that"),
    (dict(schedule='step'), "optim.schedule 'step' needs optim.boundaries"),
    (dict(weight_decay_end=0.4), 'weight_decay_end is 0.4, but optim.weight_decay, from .*, is 0'),
    (dict(hold='^had/', hold_steps=2), "optim.hold '\\^had/' matches no parameter"),
])
def test_mistakes_are_named(fields, words):
    with pytest.raises(UserError, match=words):
        optim.make(tree({n: jnp.ones(s) for n, s in SHAPES.items()}), 9, **fields)


@pytest.mark.parametrize('count, clip_update, dtype', [
    (0, None, 'bfloat16'),  # as published
    (6_000, 16.0, None),  # b2_cap acts from update 5,624 on, clip_update in the first four here
])
def test_adafactor_equals_numpy_layer_by_layer(count, clip_update, dtype):
    steps = 50
    start, gradient = problem(steps)
    found, state = ours(
        start, gradient, steps, count, name='adafactor', lr=0.1, schedule='constant', clip=300.0,
        momentum_dtype=dtype, clip_update=clip_update, weight_decay=0.03,
        decay_factors=(('^head/', 100.0),),
    )  # fmt: skip
    momentum = [x for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16]
    assert len(momentum) == (len(SHAPES) if dtype else 0)
    params = {n: x.astype(float) for n, x in start.items()}
    stored, fused = ml_dtypes.bfloat16 if dtype else float, clip_update is not None
    rules = {
        n: [Adafactor(part.shape, 0.999, clip_update, stored) for part in separate(n, x, fused)]
        for n, x in params.items()
    }
    for t in range(steps):
        grads = gradient(t, params)
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        for name, g in grads.items():
            decay = 0.03 * name.endswith('kernel') * (100 if name.startswith('head') else 1)
            clipped = g * min(1, 300 / norm)
            parts = (separate(name, x, fused) for x in (clipped, params[name]))
            for rule, g, p in zip(rules[name], *parts, strict=True):
                p -= 0.1 * (rule.update(g, count + t + 1) + decay * p)
        assert_close(found[t], params, start)
