"""Synthetic images with many labels: their distribution, their looks, and what names state."""

import pickle

import numpy as np
import pytest

from vit_jax.data import images, jft_like, sources
from vit_jax.errors import UserError


def test_drawn_examples_are_sparse_and_long_tailed_over_30000_classes():
    source = sources.load(name='jft_like:3000000000x30000@32')
    assert len(source) == 3_000_000_000 and len(set(source.classes)) == 30_000
    assert len({jft_like.design(c) for c in range(jft_like.MOST_CLASSES)}) == jft_like.MOST_CLASSES
    drawn = source.records
    labels = [drawn.labels(drawn.rng(i)) for i in range(0, len(source), 750_000)]  # 4,000
    counts = np.bincount([len(one) for one in labels])
    assert len(counts) == 5 and not counts[0] and (counts[1:] > 100).all()
    assert all(len(set(one)) == len(one) for one in labels)
    flat = np.concatenate(labels)
    assert flat.min() == 0 and 25_000 < flat.max() < 30_000
    harmonic = (1 / np.arange(1, 30_001)).sum()
    for low, high in ((0, 1), (1, 10), (10, 100), (100, 1000), (1000, 30_000)):
        share = (1 / np.arange(low + 1, high + 1)).sum() / harmonic
        assert abs(((flat >= low) & (flat < high)).mean() - share) < 0.03
    data, label = drawn[2_999_999_999].values()
    assert images.decode(data).shape == (32, 32, 3)
    assert label.dtype == np.int32 and label.shape == (4,) and label[0] >= 0
    image = drawn[5]['image']
    assert image == pickle.loads(pickle.dumps(drawn))[5]['image'] != drawn[6]['image']
    test = sources.load(name='jft_like:1000x50@32', split='test')
    train = sources.load(name='jft_like:1000x50@32')
    assert len(test) == 100 and test.records[0]['image'] != train.records[0]['image']
    with pytest.raises(IndexError):
        test.records[100]


@pytest.mark.parametrize('cells, low, high', [(1, 0.52, 1.0), (2, 0.26, 0.5), (3, 0.15, 0.34)])
def test_a_drawn_object_fills_its_cell(cells, low, high):
    black, white = (list(jft_like.COLOURS).index(name) for name in ('black', 'white'))
    label = jft_like.PAIRS.index((white, black))  # the ground is darker than white
    sides = []
    for i in range(200):
        image = jft_like.draw(np.random.default_rng(i), [label], 96, cells)
        y, x = np.nonzero(image.min(axis=2) > 225)
        sides.append(max(np.ptp(y), np.ptp(x)) / 96)
    assert low < min(sides) and max(sides) < high


def test_grey_images_have_the_labels_and_shades_of_the_coloured():
    coloured, grey = (jft_like.Drawn(20, 100, image_size=64, grey=grey) for grey in (False, True))
    for i in range(20):
        (data, labels), (shades, same) = coloured[i].values(), grey[i].values()
        shades = images.decode(shades).astype(np.float32)
        assert np.ptp(shades, axis=2).max() == 0 and shades.shape == (64, 64, 3)
        luma = images.decode(data) @ np.float32([0.299, 0.587, 0.114])  # ITU-R BT.601
        assert abs(shades[..., 0] - luma).mean() < 4  # both are JPEG
        np.testing.assert_array_equal(labels, same)


def test_drawn_classes_can_be_learned():
    """Least squares on histograms of colour: most frequent classes are ranked far above chance."""
    def read(split, count):
        drawn = jft_like.Drawn(count, 1000, split=split, image_size=64)
        x, y = [], np.zeros((count, 20))
        for i in range(count):
            data, labels = drawn[i].values()
            bins = (images.decode(data) >> 6) @ np.array([16, 4, 1])
            x.append(np.sqrt(np.bincount(bins.ravel(), minlength=64) / bins.size))
            y[i, [k for k in labels if 0 <= k < 20]] = 1
        return np.c_[x, np.ones(count)], y

    (x, y), (x_test, y_test) = read('train', 2000), read('test', 600)
    weights = np.linalg.solve(x.T @ x + 0.1 * np.eye(x.shape[1]), x.T @ y)
    order = np.argsort(-(x_test @ weights), axis=0)
    hits = np.take_along_axis(y_test, order, axis=0)
    precision = hits.cumsum(0) / np.arange(1, len(hits) + 1)[:, None]
    average = (precision * hits).sum(0) / hits.sum(0)
    assert ((average > 4 * y_test.mean(0)) | (average > 0.5)).sum() >= 15
    shuffled = np.take_along_axis(y_test, np.random.default_rng(0).permutation(order), axis=0)
    precision = shuffled.cumsum(0) / np.arange(1, len(hits) + 1)[:, None]
    chance = (precision * shuffled).sum(0) / shuffled.sum(0)
    assert average.mean() > 3 * chance.mean()


def test_a_name_states_what_determines_the_examples():
    def records(settings='', split='train'):
        return jft_like.load(f'jft_like:40x20@16{settings}', split)[0]

    plain = records()
    for settings, argument in {
        ',seed=3': {'seed': 3}, ',cells=1': {'cells': 1}, ',grey=true': {'grey': True},
        ',max_labels=1': {'max_labels': 1}, ',max_labels=2': {'max_labels': 2},
    }.items():  # fmt: skip
        found = records(settings)
        assert found.traits() == jft_like.Drawn(40, 20, image_size=16, **argument).traits()
        assert found.traits() != plain.traits()
        assert any(found[i]['image'] != plain[i]['image'] for i in range(9)), settings
    assert type(records(',max_labels=1')[0]['label']) is int
    test = records(',test_examples=7,seed=0', 'test')
    assert len(test) == 7 and len(records(',test_examples=7')) == 40
    assert test[0]['image'] == records(split='test')[0]['image'] and len(records(split='test')) == 4


@pytest.mark.parametrize('settings, words', [
    (',colour=true', "no key of jft_like 'colour'; there are seed, max_labels, cells, grey, test"),
    (',seed=-1', r'seed of jft_like:9x3,seed=-1 is -1, not int in \[0, 4294967295\]'),
    (',grey=1', 'grey of .* is 1, not bool'), (',grey=yes', "grey of .* is 'yes', not bool"),
    (',cells=0', r'cells of .* is 0, not int in \[1, 64\]'), (',cells=', 'not of the form'),
    (',max_labels=17', r'max_labels of .* is 17, not int in \[1, 16\]'),
    (',max_labels=4', 'jft_like: 4 labels of an image of 3 classes'),
    (',split=test', "no key of jft_like 'split'"), ('@7', r'image_size of .* \[8, 9999\]'),
    (',test_examples=0', 'test_examples of .* is 0, not int above 0'), (';seed=1', 'not of the fo'),
])  # fmt: skip
def test_a_name_of_another_form_is_refused_with_the_setting(settings, words):
    with pytest.raises(UserError, match=words):
        jft_like.load(f'jft_like:9x3{settings}', 'train')
