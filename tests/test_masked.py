"""Methods that predict patches: what is corrupted and predicted, and what is not seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learners import IMAGE, MODEL, assert_trees_close, batch

from vit_jax import models, optim, sharding, step
from vit_jax.errors import UserError
from vit_jax.objectives import Examples, corruption, masked_patch, next_patch, targets

SPEC = Examples({'image': jax.ShapeDtypeStruct(IMAGE, np.uint8)})
METHODS = {
    'masked_patch': lambda **settings: masked_patch.masked_patch(MODEL, SPEC, **settings),
    'next_patch': lambda **settings: next_patch.next_patch(
        MODEL.clone(pool='gap'), SPEC, **{'head_depth': 2, 'head_width': 16, **settings}
    ),
}  # fmt: skip


def started(objective, seed=0):
    """Parameters of an objective, none of them at zero."""
    rng = np.random.default_rng(seed)
    params = jax.jit(objective.init)(jax.random.key(seed))
    return jax.tree.map(lambda x: x + np.float32(0.1 * rng.normal(size=x.shape)), params)


@pytest.mark.parametrize('patches, corrupt', [(196, 0.5), (16, 0.5), (49, 0.15), (7, 0.9)])
def test_shares_of_corrupted_patches_are_exact(patches, corrupt):
    count = 4000
    kinds, others = corruption.draw(jax.random.key(0), (count, patches), corrupt)
    expected = np.array([0.8, 0.1, 0.1]) * corrupt * patches
    counts = np.stack([(kinds == i).sum(axis=1) for i in range(3)], axis=1)  # [images, 3]
    assert (np.abs(counts - expected) < 1).all()
    np.testing.assert_allclose(counts.mean(axis=0), expected, atol=4 * 0.5 / count**0.5)
    assert (np.abs(counts.sum(axis=1) - corrupt * patches) < 1).all()
    places = (kinds == 0).mean(axis=0)  # each patch is as likely as any other
    np.testing.assert_allclose(places, 0.8 * corrupt, atol=5 * 0.5 / count**0.5)
    assert (others != np.arange(patches)).all() and (others >= 0).all() and (others < patches).all()
    assert len(np.unique(others[:, 0])) == patches - 1


def test_only_real_tokens_are_corrupted():
    count, corrupt = 4000, 0.15
    rng = np.random.default_rng(0)
    real = rng.random((count, 30)) < rng.random((count, 1))
    kinds, _ = corruption.draw(jax.random.key(0), real.shape, corrupt, jnp.asarray(real))
    kinds = np.asarray(kinds)
    assert (kinds[~real] == 3).all()
    expected = np.array([0.8, 0.1, 0.1]) * corrupt * real.sum(axis=1, keepdims=True)
    counts = np.stack([(kinds == i).sum(axis=1) for i in range(3)], axis=1)
    assert (np.abs(counts - expected) < 1).all()
    np.testing.assert_allclose((counts - expected).mean(axis=0), 0, atol=4 * 0.5 / count**0.5)


def test_colours_are_the_upper_bits_of_means():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 8, 16, 3), dtype=np.uint8)
    mean = targets.colours(images, (4, 8), 1)
    small = targets.colours(images, (8, 8), 16)
    for b, i, j in np.ndindex(3, 2, 2):
        patch = images[b, 4 * i : 4 * i + 4, 8 * j : 8 * j + 8].reshape(-1, 3)
        red, green, blue = np.floor(patch.mean(axis=0, dtype=np.float64) / 256 * 8).astype(int)
        assert mean[b, 2 * i + j, 0] == red * 64 + green * 8 + blue
    for b, j, y, x in np.ndindex(3, 2, 4, 4):
        block = images[b, 2 * y : 2 * y + 2, 8 * j + 2 * x : 8 * j + 2 * x + 2].reshape(-1, 3)
        red, green, blue = np.floor(block.mean(axis=0, dtype=np.float64) / 32).astype(int)
        assert small[b, j, 4 * y + x] == red * 64 + green * 8 + blue
    white = targets.colours(np.full((1, 4, 4, 3), 255, np.uint8), (4, 4), 1)
    assert white.max() == 511


@pytest.mark.parametrize('target', ['mean', 'small', 'pixels'])
def test_masked_patches_count_alone_and_are_not_seen(target, monkeypatch):
    objective = METHODS['masked_patch'](target=target)
    params, examples = started(objective), batch(4) | {'mask': np.ones(4, np.float32)}
    kinds = jnp.array([[0, 0, 3, 3], [1, 3, 3, 3], [2, 3, 3, 3], [0, 3, 3, 0]])
    others = jnp.array([[1, 2, 3, 0], [2, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1]])
    monkeypatch.setattr(corruption, 'draw', lambda *_: (kinds, others))

    @jax.jit
    def loss(images, mask):
        one = {'image': images, 'mask': mask}
        return objective.loss(params, {}, {}, one, jax.random.key(0), 0)[0]

    def losses(images):
        return np.array([loss(images, mask) for mask in np.eye(4, dtype=np.float32)])

    def changed(places):
        images = examples['image'].copy()
        for i, n in enumerate(places):
            y, x = 4 * (n // 2), 4 * (n % 2)
            images[i, y : y + 4, x : x + 4] = 255 - images[i, y : y + 4, x : x + 4]
        return images

    plain, gradient = losses(examples['image']), jax.jit(jax.grad(loss))
    # The target of a corrupted patch is its own colour; one that is not corrupted is input alone.
    assert (np.abs(losses(changed([0, 0, 0, 0])) - plain) > 1e-4).all()
    assert (np.abs(losses(changed([2, 2, 2, 2])) - plain) > 1e-6).all()
    for i, n in ((0, 1), (3, 3)):  # masked ones: pixels reach the loss as the target alone
        seen = gradient(examples['image'].astype(np.float32), jnp.eye(4)[i])[i]
        y, x = 4 * (n // 2), 4 * (n % 2)
        assert np.abs(seen).max() > 1e-7
        if target != 'pixels':
            assert (seen[y : y + 4, x : x + 4] == 0).all()


def test_prefix_causal_attention():
    attend = next_patch.prefix_causal(jnp.array([1, 3]), 5, 2)
    for image, length in enumerate((1, 3)):
        for query, key in np.ndindex(7, 7):
            q, k = query - 2, key - 2
            assert attend[image, query, key] == (k < 0 or k < length or 0 <= k <= q)


def test_a_next_patch_is_predicted_from_those_before_it(monkeypatch):
    objective = METHODS['next_patch'](normalise=False)
    params, images = started(objective), batch(1)['image'].astype(np.float32)

    @jax.jit
    def loss(images, length):
        monkeypatch.setattr(jax.random, 'randint', lambda *_: length[None])
        one = {'image': images, 'mask': jnp.ones(1)}
        return objective.loss(params, {}, {}, one, jax.random.key(0), 0)[0]

    gradient = jax.jit(jax.grad(loss))
    out = jax.jit(objective.predict)(params, {'image': images})['encoded']
    for length in np.arange(1, 4):  # of 4 patches
        value = loss(images, length)
        assert out.shape == (1, 4, 16) and np.isfinite(value)
        # The last patch is a target alone: the gradient by its pixels is that of the squared error.
        seen = gradient(images, length)[0]
        last, scale = seen[4:, 4:], 1 / 127.5
        moved = images.copy()
        moved[0, 4:, 4:] += 1
        quadratic = scale**2 / (4 - length)  # of the mean over patches of the mean over pixels
        expected = np.sum(last) + quadratic
        np.testing.assert_allclose(loss(moved, length) - value, expected, rtol=1e-2, atol=2e-6)
        assert np.abs(seen[:4, :4]).max() > 1e-6


def test_pixels_are_normalised_by_patch():
    patches = np.random.default_rng(0).normal(3, 2, (2, 3, 48))
    made = targets.normalised(patches.astype(np.float32))
    deviation = np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(made, (patches - patches.mean(-1, keepdims=True)) / deviation, 1e-4)


@pytest.mark.parametrize('name', METHODS)
def test_eight_devices_learn_as_one(name):
    objective, examples = METHODS[name](), batch(16)

    def trained(devices, **mesh):
        mesh = sharding.make_mesh(jax.devices()[:devices], **mesh)
        tx = optim.make(step.abstract_params(objective), 10, objective.rules, name='sgd', lr=0.1)
        abstract = step.abstract_state(objective, tx, mesh)
        state = step.init(objective, tx, 0, abstract)
        advance = step.compiled(objective, tx, abstract, mesh)
        losses = []
        for _ in range(3):
            state, metrics = advance(state, sharding.put(examples, mesh), {})
            losses.append(float(metrics['loss']))
        return losses, jax.device_get(state.params)

    one = trained(1)
    assert one[0][-1] < one[0][0]
    assert_trees_close(trained(8, fsdp=2, tensor=2), one, rtol=1e-4, atol=1e-6)


def test_models_that_have_no_such_patches_are_refused():
    for make, words in (
        (lambda: masked_patch.masked_patch(models.build('mixer-s/16'), SPEC), 'trains a ViT'),
        (lambda: next_patch.next_patch(models.build('r50+vit-b/16'), SPEC), 'model.resnet has not'),
        (lambda: masked_patch.masked_patch(MODEL.clone(patch_size=(3, 3)), SPEC), 'not divisible'),
        (lambda: masked_patch.masked_patch(MODEL.clone(patch_size=(8, 8)), SPEC), 'several'),
        (lambda: masked_patch.masked_patch(MODEL.clone(patch_size=(2, 2)), SPEC, target='small'),
         'into 4 x 4'),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            make()
