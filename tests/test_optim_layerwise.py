"""LAMB, LARS, Muon and SAM against NumPy in float64, where each layer of a stack is by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from learners import assert_trees_close
from least_squares import assert_close, layers_of, ours, problem, tree

from vit_jax import objectives, optim, sharding, step
from vit_jax.errors import UserError

MATRICES = ('encoder/attn/qkv/kernel', 'encoder/attn/out/kernel', 'encoder/mlp/fc1/kernel')


def by_layer(name, function, *arrays):
    """function of the layers of parameters, stacked as the parameter is."""
    made = [function(*parts) for parts in zip(*(layers_of(name, x) for x in arrays), strict=True)]
    return np.stack(made) if name.startswith('encoder/') else made[0]


def trusted(coefficient):
    """The update of an array with the trust ratio of LARS (arXiv:1708.03888 eq. 6)."""

    def scaled(update, param):
        p, u = np.linalg.norm(param), np.linalg.norm(update)
        return update * (coefficient * p / u if p and u else 1)

    return scaled


def adam(moments, g, t, eps):
    """Adam's update at t = 1, 2, ...; `moments` is changed in place."""
    moments[0] = 0.9 * moments[0] + 0.1 * g
    moments[1] = 0.999 * moments[1] + 0.001 * g**2
    return moments[0] / (1 - 0.9**t) / (np.sqrt(moments[1] / (1 - 0.999**t)) + eps)


def test_lamb_equals_numpy_layer_by_layer():
    """arXiv:1904.00962 algorithm 2, with a trust ratio where weights decay, as in apex."""
    steps = 20
    start, gradient = problem(steps)
    start['head/kernel'] *= 0  # its first update has no trust ratio
    found, _ = ours(
        start, gradient, steps, name='lamb', lr=0.01, schedule='constant', eps=1e-6,
        weight_decay=0.05,
    )  # fmt: skip
    params = {n: x.astype(float) for n, x in start.items()}
    moments = {n: [0.0, 0.0] for n in params}
    for t in range(steps):
        for n, g in gradient(t, params).items():
            update = adam(moments[n], g, t + 1, 1e-6)
            if n.endswith('kernel'):
                update = by_layer(n, trusted(1.0), update + 0.05 * params[n], params[n])
            params[n] = params[n] - 0.01 * update
        assert_close(found[t], params, start)


def test_lamb_of_a_loss_times_1000_is_lamb():
    """With epsilon and clipping times 1,000: a sum over classes in place of a mean."""
    start, gradient = problem(6)
    found = [
        ours(
            start, lambda t, p: {n: scale * g for n, g in gradient(t, p).items()},  # noqa: B023
            6, name='lamb', lr=0.01, schedule='constant', eps=1e-6 * scale, clip=scale,
            weight_decay=0.05,
        )[0][-1]
        for scale in (1.0, 1000.0)
    ]  # fmt: skip
    assert_trees_close(*found, rtol=1e-4, atol=1e-6)


def test_lars_equals_numpy_layer_by_layer():
    """facebookresearch/mae util/lars.py: decay, trust ratio, momentum, and then the rate."""
    steps = 20
    start, noisy = problem(steps)
    start = {n: x for n, x in start.items() if n.endswith('kernel') or n == 'head/bias'}

    def gradient(t, values):  # without a trust ratio, the bias has a gradient of a good size
        grads = noisy(t, values)
        return grads | {'head/bias': grads['head/bias'] * 1e-4}

    fields = dict(name='lars', lr=30.0, schedule='linear', decay_kind='l2', weight_decay=0.02)
    found, _ = ours(start, gradient, steps, **fields)
    params = {n: x.astype(float) for n, x in start.items()}
    momentum = dict.fromkeys(params, 0.0)
    for t in range(steps):
        for n, g in gradient(t, params).items():
            if n.endswith('kernel'):
                g = by_layer(n, trusted(0.001), g + 0.02 * params[n], params[n])
            momentum[n] = 0.9 * momentum[n] + g
            params[n] = params[n] - 30.0 * (1 - t / 10_000) * momentum[n]
        assert_close(found[t], params, start)
    with pytest.raises(UserError, match="optim.name lars .* optim.decay_kind to 'l2'"):
        optim.make(tree(start), 9, **fields | {'decay_kind': 'decoupled'})


def newton_schulz(x):
    """Five steps of KellerJordan/Muon muon.py on one matrix."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def matrices_of(name, array):
    """The matrices [inputs, outputs] of a kernel, as PyTorch has them as parameters."""
    for layer in array:
        if 'qkv' in name:  # [D, 3, H, C]
            yield from (layer[:, i].reshape(len(layer), -1) for i in range(3))
        else:  # [H, C, D] or [D, M]
            yield layer.reshape(-1, layer.shape[-1])


def muon_update(name, g, buffer):
    """(update, momentum) of the stacked kernel of a name."""
    buffer = 0.95 * buffer + g
    matrices = matrices_of(name, g + 0.95 * buffer)
    made = [0.2 * np.sqrt(max(x.shape)) * newton_schulz(x) for x in matrices]
    if 'qkv' in name:
        layers, d, _, heads, channels = g.shape
        parts = np.stack(made).reshape(layers, 3, d, heads, channels)
        return np.moveaxis(parts, 1, 2), buffer
    return np.stack(made).reshape(g.shape), buffer


def test_muon_equals_numpy_matrix_by_matrix():
    """Query, key and value of each layer are matrices; what is no matrix of a block has Adam."""
    steps = 10
    start, gradient = problem(steps)
    found, _ = ours(
        start, gradient, steps, name='muon', lr=0.01, schedule='constant', momentum=0.95,
        weight_decay=0.1,
    )  # fmt: skip
    params = {n: x.astype(float) for n, x in start.items()}
    moments, buffers = {n: [0.0, 0.0] for n in params}, dict.fromkeys(params, 0.0)
    for t in range(steps):
        for n, g in gradient(t, params).items():
            if n in MATRICES:
                update, buffers[n] = muon_update(n, g, buffers[n])
            else:
                update = adam(moments[n], g, t + 1, 1e-8)
            params[n] = params[n] - 0.01 * (update + 0.1 * n.endswith('kernel') * params[n])
        assert_close(found[t], params, start)


RULES = (('free', sharding.P('fsdp')), ('fixed', sharding.P()))


def cosh(model, examples):
    """Mean of sum(cosh(p - x)) over examples x [B, 8]; not linear, so a part is not the whole."""

    def loss(params, extra, frozen, batch, key, step):
        far = jnp.cosh(params['free'] - batch['x']) + jnp.cosh(3 * (params['fixed'] - batch['x']))
        value = objectives.masked_mean(jnp.sum(far, axis=1), batch['mask'])
        return value, ({'loss': value}, {})

    def init(key):
        return {'free': jnp.linspace(-1, 1, 8), 'fixed': jnp.ones(8)}

    return objectives.Objective(init, loss, None, rules=RULES)


@pytest.mark.parametrize('how', [
    dict(), dict(accumulate=4), dict(devices=8), dict(devices=8, fsdp=4, accumulate=2),
])  # fmt: skip
def test_sam_equals_numpy_on_any_devices_and_micro_batches(how):
    """arXiv:2010.01412 algorithm 1 under momentum; a frozen parameter is not in the norm."""
    rng, rho = np.random.default_rng(0), 0.5
    batches = [
        {'x': rng.normal(size=(16, 8)), 'mask': rng.integers(0, 2, 16)} for _ in range(6)
    ]
    accumulate, fsdp = how.get('accumulate', 1), how.get('fsdp', 1)
    mesh = sharding.make_mesh(jax.devices()[: how.get('devices', 1)], fsdp=fsdp)
    objective = cosh(None, None)
    tx = optim.make(
        step.abstract_params(objective), 100, RULES, name='sgd', lr=0.1, schedule='constant',
        decay=(), freeze='fixed', sam_rho=rho,
    )  # fmt: skip
    abstract = step.abstract_state(objective, tx, mesh)
    state = step.init(objective, tx, 0, abstract)
    advance = step.compiled(objective, tx, abstract, mesh, accumulate=accumulate)
    p, momentum = np.linspace(-1, 1, 8), np.zeros(8)
    for batch in batches:
        x, mask = batch['x'], batch['mask'][:, None]
        loss = np.cosh(p - x).sum(1) + np.cosh(3 * (1 - x)).sum(1)
        gradient = lambda p: (np.sinh(p - x) * mask).sum(0) / mask.sum()  # noqa: B023, E731
        g = gradient(p)
        g = gradient(p + rho * g / np.linalg.norm(g))
        momentum = 0.9 * momentum + g
        p = p - 0.1 * momentum
        given = {k: v.astype(np.float32) for k, v in batch.items()}
        state, metrics = advance(state, sharding.put(given, mesh), {})
        np.testing.assert_allclose(state.params['free'], p, rtol=1e-5, atol=1e-6)
        expected = {'loss': (loss * mask[:, 0]).sum() / mask.sum(), 'grad_norm': np.linalg.norm(g)}
        assert_trees_close({k: metrics[k] for k in expected}, expected, rtol=1e-5)
    np.testing.assert_array_equal(state.params['fixed'], np.ones(8))


def test_lamb_equals_optax_on_arrays_that_are_no_stacks():
    """An implementation that is not of these tests."""
    start, gradient = problem(4)
    alone = {n: start[n] for n in ('head/kernel', 'embedding/kernel')}
    found, _ = ours(
        alone, gradient, 4, name='lamb', lr=0.01, schedule='constant', eps=1e-6, weight_decay=0.05
    )
    peer, params = optax.lamb(0.01, weight_decay=0.05), tree(alone)
    state = peer.init(params)
    for t in range(4):
        grads = gradient(t, {n: np.asarray(params[n.split('/')[0]]['kernel']) for n in alone})
        updates, state = peer.update(tree(grads), state, params)
        params = optax.apply_updates(params, updates)
        assert_trees_close(tree(found[t]), params, rtol=1e-5, atol=1e-6)


def test_rates_are_multiplied_by_pattern():
    start, gradient = problem(1)
    settings = dict(name='sgd', lr=0.1, schedule='constant')
    factors = (('attn/', 0.1), ('^encoder/', 3.0))
    plain, _ = ours(start, gradient, 1, **settings)
    found, _ = ours(start, gradient, 1, rate_factors=factors, **settings)
    for name, x in start.items():
        factor = 0.1 if 'attn/' in name else 3.0 if name.startswith('encoder/') else 1.0
        wanted = x + factor * (plain[0][name] - x)
        np.testing.assert_allclose(found[0][name], wanted, rtol=1e-5, atol=1e-5)
        assert factor == 1 or np.abs(wanted - plain[0][name]).max() > 1e-2
    with pytest.raises(UserError, match='rate_factors'):
        ours(start, gradient, 1, rate_factors=(('nothing', 2.0),), **settings)
