"""Losses and the step: against optax, and one device against eight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from learners import IMAGE, MODEL, assert_trees_close, batch, classifier

from vit_jax import models, optim, sharding, step
from vit_jax.errors import UserError
from vit_jax.models import parameters
from vit_jax.objectives import losses


def random_params():
    return jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, *IMAGE)))['params']


def run(steps=5, *, model=MODEL, devices=1, mesh=None, accumulate=1, keep=None, **fields):
    """Losses and final state of a few steps on random batches."""
    mesh = sharding.make_mesh(**(mesh or {}), devices=jax.devices()[:devices])
    objective = classifier(model, IMAGE)
    tx = optim.make(step.abstract_params(objective), **{'steps': 20, 'lr': 1e-2, **fields})
    abstract = step.abstract_state(classifier(model, IMAGE), tx, mesh)
    state = step.init(classifier(model, IMAGE), tx, 0, abstract)
    if keep is not None:
        keep.append(jax.device_get(state))
    advance = step.compiled(
        classifier(model, IMAGE), tx, abstract, mesh, accumulate=accumulate
    )
    seen = []
    for i in range(steps):
        state, metrics = advance(state, sharding.put(batch(seed=i), mesh), {})
        seen.append(jax.device_get(metrics))
    return seen, jax.device_get(state)


def column(seen, name='loss'):
    return np.array([m[name] for m in seen])


def test_losses_equal_optax():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, 4)) * 5, jnp.float32)
    labels = jnp.asarray(rng.integers(0, 4, 6))
    many = jnp.asarray(rng.integers(0, 2, (6, 4)), jnp.float32)
    smooth = optax.smooth_labels(jax.nn.one_hot(labels, 4), 0.1)
    np.testing.assert_allclose(
        losses.softmax_xent(logits, labels, label_smoothing=0.1),
        optax.softmax_cross_entropy(logits, smooth),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        losses.sigmoid_xent(logits, many),
        optax.sigmoid_binary_cross_entropy(logits, many).sum(-1),
        rtol=1e-5,
    )


def test_masked_examples_count_for_nothing():
    params = random_params()
    params['head']['kernel'] += 0.1 * jax.random.normal(jax.random.key(1), (16, 4))
    whole = batch()
    part = {k: v[whole['mask'] == 1] for k, v in whole.items()}
    objective = classifier(MODEL, IMAGE)
    assert 0 < len(part['mask']) < len(whole['mask'])
    a, b = (objective.loss(params, {}, {}, x, jax.random.key(0), 0)[1][0] for x in (whole, part))
    assert_trees_close(a, b, rtol=1e-5)


def test_training_learns():
    fixed = batch()
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    tx = optim.make(step.abstract_params(classifier(MODEL, IMAGE)), steps=100, lr=1e-2)
    abstract = step.abstract_state(classifier(MODEL, IMAGE), tx, mesh)
    state = step.init(classifier(MODEL, IMAGE), tx, 0, abstract)
    advance = step.compiled(classifier(MODEL, IMAGE), tx, abstract, mesh)
    for _ in range(100):
        state, metrics = advance(state, sharding.put(fixed, mesh), {})
    assert float(metrics['accuracy']) == 1 and float(metrics['loss']) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize('name, steps, meshes', [
    ('adamw', 20, [dict(), dict(fsdp=8), dict(fsdp=2, tensor=2)]),
    ('sgd', 20, [dict(tensor=2), dict(data=1, fsdp=4, tensor=2)]),
    ('adafactor', 5, [dict(fsdp=4)]),  # 1e-7 of the weights is 4e-5 of the loss after 20 steps
])
def test_eight_devices_give_the_losses_of_one(name, steps, meshes):
    model = MODEL.clone(dropout=0.1, drop_path=0.2)
    fields = dict(name=name, weight_decay=0.1, clip=1.0, ema=0.9)
    one, _ = run(steps, model=model, **fields)
    assert column(one).std() > 1e-3
    for mesh in meshes:
        eight, _ = run(steps, model=model, devices=8, mesh=mesh, **fields)
        np.testing.assert_allclose(column(one), column(eight), rtol=1e-5)


def test_sharded_state_takes_less_memory_a_device():
    model = models.build('vit-ti/16', num_classes=8, patch_size=4)
    tx = optim.make(step.abstract_params(classifier(model, IMAGE)), steps=1)
    sizes = {}
    for fsdp in (1, 8):
        mesh = sharding.make_mesh(fsdp=fsdp)
        state = step.abstract_state(classifier(model, IMAGE), tx, mesh)
        sizes[fsdp] = sum(
            np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(state)
        )
    assert sizes[8] < sizes[1] / 7


@pytest.mark.slow
def test_accumulation_equals_the_large_batch():
    # SGD: Adam would turn the rounding of a zero gradient (the key bias) into a full step.
    fields = dict(name='sgd', lr=0.1, clip=1.0)
    seen, state = run(accumulate=1, **fields)
    for devices in (1, 2):
        parts, summed = run(accumulate=4, devices=devices, **fields)
        np.testing.assert_allclose(column(seen), column(parts), rtol=2e-5)
        assert_trees_close(state.params, summed.params, rtol=1e-4, atol=1e-6)


def test_frozen_leaves_keep_their_bits_and_cost_no_memory():
    kept = []
    _, state = run(freeze=('^encoder/', '^embedding'), weight_decay=0.1, ema=0.9, keep=kept)
    before = kept[0].params
    for name in ('encoder', 'embedding'):
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32)),
            before[name], state.params[name],
        )
    assert not np.array_equal(before['head']['kernel'], state.params['head']['kernel'])
    names = parameters.named_leaves(state.opt_state)
    assert not any('encoder' in n or 'embedding' in n for n in names)
    assert any('head' in n for n in names)


def test_layer_decay_scales_the_rate_by_depth():
    params = random_params()
    ones = jax.tree.map(jnp.ones_like, params)
    tx = optim.make(
        params, steps=1, name='sgd', lr=1.0, schedule='constant', layer_decay=0.5
    )
    updates, _ = tx.update(ones, tx.init(params), params)
    np.testing.assert_allclose(updates['head']['kernel'], -1)
    np.testing.assert_allclose(updates['norm']['scale'], -1)
    np.testing.assert_allclose(updates['encoder']['mlp']['fc1']['bias'][:, 0], [-0.25, -0.5])
    np.testing.assert_allclose(updates['embedding']['bias'], -0.125)
    np.testing.assert_allclose(updates['cls'], -0.125)


def test_moving_average():
    kept = []
    _, one = run(1, ema=0.75, lr=0.1, schedule='constant', keep=kept)
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, kept[0].params, one.params)
    assert_trees_close(optim.averaged(one), expected, rtol=1e-5, atol=1e-7)
    assert not np.allclose(optim.averaged(one)['head']['bias'], one.params['head']['bias'])


def test_momentum_in_bfloat16():
    _, state = run(1, name='sgd', momentum_dtype='bfloat16')
    trace = [x for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.bfloat16]
    assert len(trace) == len(jax.tree.leaves(state.params))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))


def test_same_seed_same_bits():
    model = MODEL.clone(dropout=0.1)
    (_, a), (_, b) = (run(model=model, devices=8) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_parameter_without_a_rule_is_an_error():
    mesh = sharding.make_mesh()
    with pytest.raises(UserError, match=r'no sharding rule for strange/weights \[3\]'):
        sharding.spec('strange/weights', (3,), mesh)


@pytest.mark.parametrize('call, words', [
    (lambda: optim.make({'kernel': jnp.ones(2)}, steps=1, freeze=('zzz',)),
     "optim.freeze 'zzz' match"),
    (lambda: optim.make_schedule(1, lr=1, warmup=2), 'warmup 2 .* exceed 1 steps'),
    (lambda: sharding.make_mesh(fsdp=3), 'fsdp=3 tensor=1 does not cover 8 devices'),
    (lambda: sharding.check_batch(12, sharding.make_mesh()), 'batch size 12 is not divisible'),
])
def test_mistakes_are_named(call, words):
    with pytest.raises(UserError, match=words):
        call()
