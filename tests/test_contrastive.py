"""Contrastive training of two towers: micro-batches, devices, masks, frozen towers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import models, optim, sharding, step
from vit_jax.errors import UserError
from vit_jax.objectives import Examples, contrastive

IMAGE, LENGTH, WORDS = (8, 8, 3), 6, 40
MODEL = models.build(
    'vit/4', num_classes=None, width=16, depth=1, num_heads=2, mlp_dim=32, dropout=0.0
)
TEXT = dict(vocab_size=WORDS, length=LENGTH, width=8, depth=1, num_heads=2, mlp_dim=16)
SPEC = {
    'image': jax.ShapeDtypeStruct(IMAGE, np.uint8),
    'text': jax.ShapeDtypeStruct((LENGTH,), np.int32),
}


def made(model=MODEL, **settings):
    return contrastive.contrastive(model, Examples(SPEC), text=TEXT, **settings)


def batch(size=16, seed=0):
    rng = np.random.default_rng(seed)
    return {
        'image': rng.integers(0, 256, (size, *IMAGE), dtype=np.uint8),
        'text': rng.integers(0, WORDS, (size, LENGTH), dtype=np.int32),
        'mask': (rng.random(size) < 0.8).astype(np.float32),
    }


def loss_of(objective):
    return lambda params, batch: objective.loss(params, {}, {}, batch, jax.random.key(0), 0)[0]


def updated(objective, axes, steps=2, **settings):
    """(parameters, metrics) after some updates on a mesh."""
    mesh = sharding.make_mesh(jax.devices()[: int(np.prod(list(axes.values())))], **axes)
    tx = optim.make(step.abstract_params(objective), 10, lr=1e-2, name='sgd', **settings)
    abstract = step.abstract_state(objective, tx, mesh)
    state = step.init(objective, tx, 0, abstract)
    advance = step.compiled(objective, tx, abstract, mesh)
    metrics = {}
    for seed in range(steps):
        state, metrics = advance(state, sharding.put(batch(seed=seed), mesh), {})
    return jax.tree.map(np.asarray, state.params), jax.tree.map(float, metrics)


@pytest.mark.parametrize('loss', ['sigmoid', 'softmax'])
def test_micro_batches_and_devices_change_no_update(loss):
    wanted, metrics = updated(made(loss=loss), dict(data=1))
    assert metrics['loss'] > 0 and metrics['temperature'] != 10
    axes, count = dict(sigmoid=(dict(data=1), 4), softmax=(dict(data=2, fsdp=2, tensor=2), 2))[loss]
    params, also = updated(made(loss=loss, micro_batches=count), axes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), params, wanted)
    for name in ('loss', 'accuracy', 'grad_norm'):
        assert np.isclose(also[name], metrics[name], rtol=1e-5), name


def test_micro_batches_take_the_memory_of_one():
    wide = MODEL.clone(width=128, mlp_dim=512)
    objective = [made(wide, micro_batches=count) for count in (1, 8)]

    def memory(one):
        params = jax.eval_shape(one.init, jax.random.key(0))
        compiled = jax.jit(jax.grad(loss_of(one))).lower(params, batch(1024)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, parts = map(memory, objective)
    assert parts < whole / 3


def test_a_pair_that_does_not_count_changes_nothing():
    objective = made()
    params = jax.jit(objective.init)(jax.random.key(0))
    one = batch()
    other = one | {name: x.copy() for name, x in one.items()}
    hidden = one['mask'] == 0
    assert hidden.any()
    other['image'][hidden] = 7
    other['text'][hidden] = 3
    grad = jax.jit(jax.grad(loss_of(objective)))
    both = grad(params, one), grad(params, other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *both)


def test_predictions_of_either_input_alone():
    objective = made()
    params, one = jax.jit(objective.init)(jax.random.key(0)), batch()
    predict = jax.jit(objective.predict)
    both = predict(params, one)
    images, words = (predict(params, {name: one[name]}) for name in ('image', 'text'))
    for name, alone in (('image_embedding', images), ('text_embedding', words)):
        np.testing.assert_allclose(alone[name], both[name], atol=1e-6)
    assert 'text_embedding' not in images and 'encoded' in images
    np.testing.assert_allclose(jnp.linalg.norm(both['text_embedding'], axis=1), 1, rtol=1e-6)


def test_a_frozen_image_tower_stays_as_it_is():
    before, _ = updated(made(), dict(data=1), steps=0)
    params, _ = updated(made(), dict(data=1), steps=1, freeze='^image/')
    jax.tree.map(np.testing.assert_array_equal, params['image'], before['image'])
    moved = jax.tree.map(lambda a, b: np.any(a != b), params['text'], before['text'])
    assert moved['vocabulary'] and moved['encoder']['mlp']['fc1']['kernel']


def test_wrong_settings_are_named():
    with pytest.raises(UserError, match='image_text'):
        contrastive.contrastive(MODEL, Examples({'image': SPEC['image']}), text=TEXT)
    with pytest.raises(UserError, match='in 3 micro-batches'):
        objective = made(micro_batches=3)
        jax.eval_shape(loss_of(objective), step.abstract_params(objective), batch())
    with pytest.raises(UserError, match='data.image_size'):
        contrastive.contrastive(
            MODEL, Examples(SPEC | {'image': jax.ShapeDtypeStruct((9, 8, 3), np.uint8)}), text=TEXT
        )
