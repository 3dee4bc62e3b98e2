"""Frozen features: neighbours and a linear classifier, against scikit-learn."""

import signal

import jax
import numpy as np
import pytest
from learners import subject
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from vit_jax import config, models
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.evaluators import classifiers, probe


@pytest.fixture(scope='module')
def digits():
    """Half of the digits to learn from, half to test with: float features and labels."""
    x, y = load_digits(return_X_y=True)
    return x[:900].astype(np.float32), y[:900], x[900:].astype(np.float32), y[900:]


@pytest.mark.parametrize('k', [1, 10])
def test_nearest_votes_as_scikit_learn_does(digits, k):
    x, y, test, _ = digits
    wanted = KNeighborsClassifier(k, algorithm='brute').fit(x, y).predict(test)
    found = classifiers.nearest(x, y, test, k=k, classes=10, chunk=128)
    assert found.shape == wanted.shape and np.mean(found == wanted) > 0.995  # ties may differ
    assert np.mean(found[::-1] == wanted) < 0.5


@pytest.mark.parametrize('k', [10, 20])
def test_cosine_votes_as_scikit_learn_does(digits, k):
    x, y, test, _ = digits
    x, test = x - x.mean(axis=0), test - x.mean(axis=0)
    weighted = KNeighborsClassifier(
        k, algorithm='brute', metric='cosine', weights=lambda d: np.exp((1 - d) / 0.5)
    )
    wanted = weighted.fit(x, y).predict(test)
    found = classifiers.nearest(x, y, test, k=k, classes=10, temperature=0.5, chunk=128)
    assert np.mean(found == wanted) > 0.998
    longer = x * np.arange(1, 901)[:, None]
    scaled = classifiers.nearest(longer, y, test, k=k, classes=10, temperature=0.5)
    assert np.mean(found == scaled) > 0.998  # lengths do not count
    near = classifiers.nearest(x, y, test, k=k, classes=10, temperature=1e-3)
    # only the nearest votes
    assert np.mean(near == weighted.set_params(n_neighbors=1).fit(x, y).predict(test)) > 0.998


@pytest.mark.parametrize('n', [30, 900])  # fewer than features, and more
@pytest.mark.parametrize('l2', [0.5, 1024.0])
def test_least_squares_are_those_of_scikit_learn(digits, n, l2):
    x, y, test, _ = digits
    train, held = (a + 2 for a in classifiers.standardise(x[:n], test))  # the bias has to undo it
    targets = 2 * np.eye(10)[y[:n]] - 1
    wanted = Ridge(alpha=l2).fit(train.astype(np.float64), targets)
    weights, bias = classifiers.fit_ridge(train, y[:n], classes=10, l2=l2)
    np.testing.assert_allclose(weights, wanted.coef_.T, atol=1e-4)
    np.testing.assert_allclose(held @ weights + bias, wanted.predict(held), atol=2e-3, rtol=1e-3)


def test_shots_are_drawn_of_each_class():
    labels = np.array([3] * 50 + [0] * 2 + [1] * 20)
    five = classifiers.sample_per_class(labels, 5, seed=1)
    assert len(set(five)) == 12 and np.bincount(labels[five]).tolist() == [2, 5, 0, 5]
    assert set(five) < set(classifiers.sample_per_class(labels, 10, seed=1))
    assert set(five) != set(classifiers.sample_per_class(labels, 5, seed=2))


@pytest.mark.parametrize('l2', [0.1, 10.0])
def test_logistic_regression_is_that_of_scikit_learn(digits, l2):
    x, y, test, labels = digits
    train, held = classifiers.standardise(x, test)
    wanted = StandardScaler().fit_transform(x.astype(np.float64))
    np.testing.assert_allclose(train, wanted, atol=1e-5)
    model = LogisticRegression(C=1 / l2, max_iter=5000, tol=1e-6).fit(train, y)
    weights, bias = classifiers.fit_logistic(train, y, classes=10, l2=l2, tolerance=1e-6)
    # The same minimum: the gap to its loss is small beside the loss of no weights at all.
    np.testing.assert_allclose(weights, model.coef_.T, atol=0.02)
    predicted = np.argmax(held @ np.asarray(weights) + np.asarray(bias), axis=1)
    assert np.mean(predicted == model.predict(held)) > 0.995
    assert np.mean(predicted == labels) > 0.85


def probe_of(tmp_path, **changes):
    """A Probe of a small model on the digits, and what it works with."""
    source = dict(name='digits', split='test', data_dir=str(tmp_path))
    given = dict(
        source=source, train_source={**source, 'split': 'train'}, image_size=8,
        batch_size=64, k=(3,), pixels=True, **changes,
    )  # fmt: skip
    full = config.complete_data('evals.p', given, config.keys_of(probe.Probe))
    sizes = dict(width=16, depth=1, num_heads=2, mlp_dim=32, representation_size=12)
    model = models.build('vit-ti/2', **sizes)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 8, 3)))['params']
    return probe.Probe(subject(model, (8, 8, 3)), **full), model, params


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp('tfds')


def test_a_probe_knows_what_scikit_learn_makes_of_the_same_features(data_dir):
    evaluation, model, params = probe_of(data_dir, shots=(1, 25), seeds=2, shot_l2=1.0)
    result = evaluation(params)
    train, test = (
        evaluation.compute_features(params, source, Stop(), print)
        for source in (evaluation.train_source, evaluation.source)
    )
    declared = probe.metrics(k=(3,), pixels=True, l2=1.0, shots=(1, 25))
    assert result.keys() == {*declared, '1_shot_std', '25_shot_std', 'examples'}
    assert len(train['labels']) == 1438 and len(test['labels']) == result['examples'] == 359
    images = test['pixels'].reshape(-1, 8, 8, 3)
    _, out = jax.jit(model.apply)({'params': params}, model.normalise(images))
    both = np.concatenate([out['cls'], out['encoded'].mean(axis=1)], axis=1)
    np.testing.assert_allclose(test['both'], both, atol=1e-5)
    np.testing.assert_allclose(test['token'], both[:, :16], atol=1e-5)
    hidden = np.tanh(out['cls'] @ params['pre_logits']['kernel'] + params['pre_logits']['bias'])
    np.testing.assert_allclose(test['pre_logits'], hidden, atol=1e-5)
    for name, kind in (('3_nn', 'token'), ('3_nn_pixels', 'pixels')):
        neighbours = KNeighborsClassifier(3).fit(train[kind], train['labels'])
        assert abs(result[name] - neighbours.score(test[kind], test['labels'])) < 0.01, name
    scores = []
    for seed in range(2):
        some = classifiers.sample_per_class(train['labels'], 25, seed)
        scale = StandardScaler().fit(train['pre_logits'][some].astype(np.float64))
        model = Ridge(alpha=1.0).fit(
            scale.transform(train['pre_logits'][some]), 2 * np.eye(10)[train['labels'][some]] - 1
        )
        predicted = np.argmax(model.predict(scale.transform(test['pre_logits'])), axis=1)
        scores.append(np.mean(predicted == test['labels']))
    assert abs(result['25_shot'] - np.mean(scores)) < 0.003
    assert abs(result['25_shot_std'] - np.std(scores)) < 0.003
    assert result['1_shot'] < result['25_shot']
    assert result['3_nn_pixels'] > 0.95 > result['accuracy'] > 0.5
    stop = Stop()
    stop.signum = signal.SIGTERM
    assert evaluation(params, stop) is None


@pytest.mark.parametrize('changes, words', [
    (dict(kind='knn'), "unknown key evals.p.kind"), (dict(l2='x'), "evals.p.l2 is 'x', not float"),
    (dict(shots=(0, 5)), r'evals.p.shots is \(0, 5\), not tuple of int above 0'),
])
def test_mistakes_are_named(data_dir, changes, words):
    with pytest.raises(UserError, match=words):
        probe_of(data_dir, **changes)


def test_more_neighbours_than_images_is_a_mistake(data_dir):
    with pytest.raises(UserError, match=r'k is \(10, 5000\); there are 1438 training'):
        source = dict(name='digits', split='test', data_dir=str(data_dir))
        full = config.complete_data('evals.p', dict(
            source=source, train_source={**source, 'split': 'train'}, image_size=8,
            batch_size=64, k=(10, 5000)), config.keys_of(probe.Probe))  # fmt: skip
        probe.Probe(subject(models.build('vit-ti/2'), (8, 8, 3)), **full)
