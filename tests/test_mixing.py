"""Mixup and CutMix: against NumPy by hand, their draws against SciPy, one device against eight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from learners import IMAGE, MODEL, assert_trees_close, batch, classifier, loss_of
from scipy import stats

from vit_jax import sharding, step
from vit_jax.objectives import losses, mixing, supervised

MIX = jax.jit(mixing.mix, static_argnames=('mixup', 'cutmix', 'by', 'shift'))


def plain(count=16, size=(12, 10)):
    """Images that are constant and labels that are one-hot, both by the example's index."""
    images = np.broadcast_to(np.arange(count)[:, None, None, None], (count, *size, 1))
    return images.astype(np.float32), np.eye(count, dtype=np.float32)


def shares(labels, shift=1):
    """The partner's weight in the labels that `plain` gives, [B]."""
    count = len(labels)
    return np.asarray(labels)[np.arange(count), (np.arange(count) - shift) % count]


@pytest.mark.parametrize('alphas, by', [
    (dict(mixup=0.4), 'batch'), (dict(cutmix=1.0), 'example'),
    (dict(mixup=1.0, cutmix=1.0), 'example'),
])
def test_images_and_labels_are_mixed_alike(alphas, by):
    images, labels = plain()
    partner = np.roll(images, 3, axis=0)
    different = set()
    for seed in range(12):
        mixed, weights = MIX(images, labels, jax.random.key(seed), by=by, shift=3, **alphas)
        assert mixed.dtype == weights.dtype == jnp.float32
        share = shares(weights, 3)
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
        np.testing.assert_allclose(np.diag(weights) + share, 1, rtol=1e-6)
        own = np.isclose(mixed, images)
        from_partner = np.isclose(mixed, partner)
        boxed = (own | from_partner).all((1, 2, 3))
        expected = images + share[:, None, None, None] * (partner - images)
        blend = np.isclose(mixed, expected, atol=1e-5).all((1, 2, 3))
        assert (boxed | blend).all()
        pasted = boxed & ~blend  # the label's weight is the share of the pixels
        np.testing.assert_allclose(share[pasted], from_partner.mean((1, 2, 3))[pasted], rtol=1e-6)
        if 'cutmix' not in alphas:
            assert blend.all() and (share <= 0.5).all()
        if 'mixup' not in alphas:
            assert boxed.all()
        different.add(len(np.unique(share.round(6))))
    assert (max(different) == 1) if by == 'batch' else (max(different) > 8)


def test_mixup_draws_the_larger_half_of_beta(alpha=0.2):
    _, weights = MIX(*plain(3000, (1, 1)), jax.random.key(1), mixup=alpha, by='example')
    share = shares(weights)
    # max(x, 1 - x) of a symmetric Beta: its distribution function is 2 F(x) - 1 from 1/2 on
    kept = stats.kstest(1 - share, lambda x: 2 * stats.beta(alpha, alpha).cdf(x) - 1)
    assert kept.pvalue > 1e-3
    assert share.min() >= 0 and share.max() <= 0.5


def test_boxes_have_the_area_of_beta_and_a_uniform_centre():
    count, size = 3000, (64, 96)
    drawn = np.random.default_rng(0).beta(0.7, 0.7, count).astype(np.float32)
    box, share = jax.jit(mixing.box_mask, static_argnums=2)(jax.random.key(2), drawn, size)
    box = np.asarray(box)[..., 0].astype(bool)
    rows, columns = box.any(2), box.any(1)
    np.testing.assert_allclose(share, box.mean((1, 2)), rtol=1e-6)
    np.testing.assert_array_equal(rows[:, :, None] & columns[:, None], box)
    inside = ~(rows[:, 0] | rows[:, -1] | columns[:, 0] | columns[:, -1]) & rows.any(1)
    assert inside.sum() > 500
    for marked, side in (rows, 64), (columns, 96):
        half = np.floor(side * np.sqrt(drawn)) // 2
        np.testing.assert_allclose(marked.sum(1)[inside], 2 * half[inside], atol=2)
        # The far end is centre + half, of a centre uniform over the image, or the image's end.
        far = np.array([np.flatnonzero(m).max(initial=-1) + 1 for m in marked])
        small = rows.any(1) & (half < side // 4)  # the end of a centre in the first half is seen
        centre = (far - half)[small & (far < side)]
        first = centre[centre < side // 2]
        assert abs(len(first) / small.sum() - 0.5) < 4 * 0.5 / np.sqrt(small.sum())
        assert stats.kstest(first + 0.5, stats.uniform(0, side // 2).cdf).pvalue > 1e-3


def test_cutmix_draws_areas_of_beta():
    _, weights = MIX(*plain(2000, (48, 48)), jax.random.key(3), cutmix=1.0, by='example')
    # A box of side s is at least s - s^2 / 4 wide: of area a, between a / 4 and a.
    share = shares(weights)
    side = np.sqrt(np.random.default_rng(0).random((200_000, 1)))
    centre = np.random.default_rng(1).random((200_000, 2))
    ends = np.minimum(centre + side / 2, 1) - np.maximum(centre - side / 2, 0)
    expected = ends.prod(1)
    assert abs(share.mean() - expected.mean()) < 4 * expected.std() / np.sqrt(2000) + 0.02
    assert stats.ks_2samp(share, expected).statistic < 1.95 / np.sqrt(2000) + 0.05  # whole pixels


def test_of_both_one_is_taken_by_even_chance():
    images, labels = plain(1000, (8, 8))
    mixed, weights = MIX(
        images, labels, jax.random.key(0), mixup=1.0, cutmix=1.0, by='example'
    )
    share = shares(weights)
    # constant images blend into constant ones; a box may also be empty or everything
    cut = (np.ptp(mixed, axis=(1, 2, 3)) > 0) | (share == 0) | (share == 1)
    assert abs(cut.mean() - 0.5) < 4 * 0.5 / np.sqrt(1000)


@pytest.mark.parametrize('alphas, by', [
    (dict(mixup=0.4), 'batch'), (dict(cutmix=1.0), 'example'),
])
def test_masked_examples_are_mixed_into_none(alphas, by):
    images, labels = plain()
    mask = np.ones(16, np.float32)
    mask[[3, 9, 10]] = 0
    images = np.where(mask[:, None, None, None] == 0, 1e9, images)
    whole = (mask * np.roll(mask, 1)) == 0
    mixed, weights = MIX(images, labels, jax.random.key(5), by=by, mask=mask, **alphas)
    np.testing.assert_array_equal(np.asarray(mixed)[whole], images[whole])
    np.testing.assert_array_equal(np.asarray(weights)[whole], labels[whole])
    assert whole.sum() == 5 and (shares(weights)[~whole] > 0).any()
    assert np.asarray(mixed)[mask == 1].max() < 16


class Linear:
    """A model that compiles at once: logits are linear in the pixels, plus noise by the key."""

    num_classes = 4
    mean = std = (0.5,) * 3

    def flops(self, shape):
        return 0

    def normalise(self, images):
        return images.astype(jnp.float32) / 255 - 0.5

    def apply(self, variables, images, *, train, rngs):
        logits = images.reshape(len(images), -1) @ variables['params']
        return logits + jax.random.normal(rngs['dropout'], logits.shape) * train, {}


PARAMS = np.random.default_rng(5).normal(size=(np.prod(IMAGE), 4)).astype(np.float32)


def objective(model=None, **fields):
    return loss_of(classifier(model or Linear(), IMAGE, **fields))


def test_eight_devices_mix_as_one_in_micro_batches():
    mixing_objective = objective(mixup=0.8, cutmix=1.0, mix_by='example')
    examples, key = batch(), jax.random.key(3)

    def forward(params, batch, key):  # in the place of a function that has gradients
        value, metrics = mixing_objective(params, batch, key)
        return (value, (metrics, {})), value

    def both(params, batch, key):
        metrics, _, value = step.accumulated(forward, params, batch, key, 2)
        return {'mean': value, **metrics}

    one = jax.jit(both)(PARAMS, examples, key)
    eight = jax.jit(both)(PARAMS, sharding.put(examples, sharding.make_mesh(fsdp=2)), key)
    assert_trees_close(one, eight, rtol=1e-5)
    assert float(one['accuracy']) == float(eight['accuracy'])
    total = 0
    for i in range(2):
        micro = {k: v[i::2] for k, v in examples.items()}
        value, _ = jax.jit(mixing_objective)(PARAMS, micro, jax.random.fold_in(key, i))
        total += value * micro['mask'].sum() / examples['mask'].sum()
    np.testing.assert_allclose(total, one['mean'], rtol=1e-5)


def test_the_objective_is_that_of_the_mixed_batch():
    examples, key = batch(), jax.random.key(7)
    fields = dict(cutmix=1.0, mix_by='example', mix_shift=2, label_smoothing=0.1)
    value, metrics = jax.jit(objective(**fields))(PARAMS, examples, key)
    images, weights = MIX(
        Linear().normalise(examples['image']), jax.nn.one_hot(examples['label'], 4),
        jax.random.fold_in(key, supervised.MIX), cutmix=1.0, by='example', shift=2,
        mask=examples['mask'],
    )  # fmt: skip
    logits, _ = Linear().apply({'params': PARAMS}, images, train=True, rngs={'dropout': key})
    by_example = optax.softmax_cross_entropy(logits, optax.smooth_labels(weights, 0.1))
    mask = examples['mask'] == 1
    np.testing.assert_allclose(value, by_example[mask].mean(), rtol=1e-5)
    right = np.take_along_axis(
        np.asarray(weights), np.argmax(logits, 1)[:, None], 1
    )[:, 0] == np.max(weights, 1)
    np.testing.assert_allclose(metrics['accuracy'], right[mask].mean(), rtol=1e-6)
    assert 0.2 < shares_of(weights, examples['label']).max()  # the draw did mix
    unmixed, _ = jax.jit(objective(label_smoothing=0.1))(PARAMS, examples, key)
    assert abs(unmixed - value) > 1e-3


def shares_of(weights, labels):
    """What of the weights is on classes other than the example's own, [B]."""
    return 1 - np.take_along_axis(np.asarray(weights), labels[:, None], 1)[:, 0]


def test_several_labels_are_a_set_or_shared_out():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
    sparse = jnp.array([[2, -1, -1], [0, 4, -1], [3, 1, 3], [-1, -1, -1]])
    many = np.array([[0, 0, 1, 0, 0], [1, 0, 0, 0, 1], [0, 1, 0, 1, 0], [0] * 5], np.float32)
    np.testing.assert_array_equal(losses.targets(sparse, 5), many)
    np.testing.assert_allclose(
        losses.sigmoid_xent(logits, sparse),
        optax.sigmoid_binary_cross_entropy(logits, many).sum(-1), rtol=1e-5,
    )  # fmt: skip
    shared = many / np.array([1, 2, 2, 1], np.float32)[:, None]
    np.testing.assert_allclose(
        losses.softmax_xent(logits, sparse), optax.softmax_cross_entropy(logits, shared), rtol=1e-5
    )
    np.testing.assert_allclose(  # weights [B, K] stay as they are, whatever their sum
        losses.softmax_xent(logits, 2 * many), optax.softmax_cross_entropy(logits, 2 * many),
        rtol=1e-5,
    )  # fmt: skip
    best = jnp.eye(5)[jnp.array([2, 4, 0, 1])]
    np.testing.assert_array_equal(losses.hits(best, sparse), [1, 1, 0, 0])


def test_several_labels_are_mixed_as_distributions():
    params = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, *IMAGE)))['params']
    examples = batch() | {'label': np.tile([[0, 2, -1], [3, -1, -1]], (8, 1))}
    value, _ = jax.jit(objective(MODEL, mixup=1.0))(params, examples, jax.random.key(0))
    np.testing.assert_allclose(value, np.log(4), rtol=1e-5)  # logits 0, weights of sum 1


def test_the_heaviest_class():
    weights = jnp.array([[0.2, 0.8, 0], [0.5, 0, 0.5], [0, 0, 0]])
    np.testing.assert_array_equal(losses.heaviest(weights), [[0, 1, 0], [1, 0, 1], [0, 0, 0]])


def test_without_mixing_the_key_is_the_dropouts():
    examples, key = batch(), jax.random.key(3)
    value, _ = jax.jit(objective())(PARAMS, examples, key)
    images = Linear().normalise(examples['image'])
    logits, _ = Linear().apply({'params': PARAMS}, images, train=True, rngs={'dropout': key})
    by_example = losses.softmax_xent(logits, examples['label'])
    assert_trees_close(value, supervised.masked_mean(by_example, examples['mask']), rtol=1e-5)


def test_union_has_the_labels_of_both_in_full():
    """The target of arXiv:2110.00476 section 2.1; PyTorch: targets.gt(0)."""
    one, key = batch() | {'mask': np.ones(16, np.float32)}, jax.random.key(0)
    how = dict(model=MODEL, loss='sigmoid', mixup=1.0, cutmix=0.0, mix_by='batch', mix_shift=3)
    images, weights = supervised.model_inputs(one, key, **how)
    same, union = supervised.model_inputs(one, key, **how, mix_union=True)
    np.testing.assert_array_equal(same, images)
    both = np.eye(4)[one['label']] + np.eye(4)[np.roll(one['label'], 3)]
    assert 0 < float(weights[both > 0].min()) < 0.5
    np.testing.assert_array_equal(union, np.minimum(both, 1))
    logits = jnp.linspace(-2, 2, 64).reshape(16, 4)
    objective = classifier(MODEL, IMAGE, loss='sigmoid', mixup=1.0, mix_shift=3, mix_union=True)
    params = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, *IMAGE)))['params']
    params['head']['bias'] = logits[3]  # the kernel is zero
    expected = optax.sigmoid_binary_cross_entropy(jnp.tile(logits[3], (16, 1)), union).sum(-1)
    loss, _ = loss_of(objective)(params, one, key)
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
