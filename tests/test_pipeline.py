"""Order, processes, repeats, mixtures: which example a step sees, and with which augmentation."""

import io
import itertools
import tracemalloc
from fractions import Fraction
from types import SimpleNamespace

import feeds
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vit_jax.data import mixture, order, sources
from vit_jax.errors import UserError

VIEW = dict(name='shift', pixels=2)


class Drawn:
    """Images of one colour, made when they are read."""

    def __init__(self, length, prefix='image', classes=3, labels=None):
        self.length, self.prefix, self.classes, self.labels = length, prefix, classes, labels
        self.max_labels = 1 if labels is None else len(labels[0])

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        assert 0 <= i < self.length
        colour = (int(i) * 37 % 256, int(i) // 7 % 256, int(i) // 1791 % 256)
        out = io.BytesIO()
        Image.new('RGB', (4, 4), colour).save(out, 'BMP')
        label = i % self.classes if self.labels is None else self.labels[i]
        return {'image': out.getvalue(), 'label': label}

    def name(self, i):
        return f'{self.prefix}-{i}'


def drawn(length, classes=('a', 'b', 'c'), **fields):
    return sources.Source(Drawn(length, classes=len(classes), **fields), tuple(classes))


def feed(source, seed=3, **fields):
    fields = dict(view=VIEW, image_size=6, batch_size=16, threads=1, prefetch=1) | fields
    return feeds.batches(source, seed, **fields)


def take(iterator, n):
    return list(itertools.islice(iterator, n))


def whole(parts):
    """The global batch of the parts that processes have, in their order."""
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 60), seed=st.integers(0, 2**31), repeats=st.sampled_from([1, 1, 2, 4]),
    stretches=st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(1, 2)), max_size=4),
)
def test_a_run_on_changing_processes_sees_the_same_batches(length, seed, repeats, stretches):
    source, step = drawn(length), 0
    alone = feed(source, seed, repeats=repeats)
    for processes, steps in stretches:
        parts = [
            feed(source, seed, start=step, rows=rows, repeats=repeats)
            for rows in np.split(np.arange(16), processes)
        ]
        for _ in range(steps):
            wanted, found = next(alone), whole([next(part) for part in parts])
            for key in wanted:
                np.testing.assert_array_equal(found[key], wanted[key])
            ids = order.batch_ids(source, batch_size=16, seed=seed, step=step, repeats=repeats)
            np.testing.assert_array_equal(found['id'], ids)
            step += 1


@pytest.mark.parametrize('length', [1, 2, 17, 97, 101])
def test_every_epoch_has_each_example_once(length):
    batches = take(feed(drawn(length)), 5 * length // 16 + 1)
    seen = np.concatenate([b['id'] for b in batches])[: 5 * length].reshape(5, length)
    assert all(sorted(epoch) == list(range(length)) for epoch in seen)
    assert length < 17 or len({tuple(epoch) for epoch in seen}) == 5


def test_repeats_are_neighbours_with_other_augmentations():
    source, views = drawn(40), 0
    for batch in take(feed(source, repeats=4), 10):  # an epoch, four times over
        groups = batch['id'].reshape(4, 4)
        assert (groups == groups[:, :1]).all() and len(set(groups[:, 0])) == 4
        views += sum(len({i.tobytes() for i in g}) for g in batch['image'].reshape(4, 4, -1))
    assert views > 2.5 * 40  # of 25 shifts
    once = [b['id'] for b in take(feed(source), 10)]
    four = np.concatenate([b['id'] for b in take(feed(source, repeats=4), 10)])
    np.testing.assert_array_equal(four[::4], np.concatenate(once)[:40])
    three = np.concatenate([b['id'] for b in take(feed(source, repeats=3), 6)])  # across batches
    np.testing.assert_array_equal(three, np.repeat(np.concatenate(once)[:32], 3))
    with pytest.raises(UserError, match='data.repeats is 17, more than the batch_size 16'):
        next(feed(source, repeats=17))


@pytest.fixture
def mixed(monkeypatch):
    """A mixture of three data sets that share classes."""
    parts = {
        'x': drawn(20, ('cat', 'dog'), prefix='x'), 'y': drawn(33, ('dog', 'eel'), prefix='y'),
        'z': drawn(5, ('ant', 'cat', 'dog'), prefix='z'),
    }  # fmt: skip
    monkeypatch.setattr(mixture.sources, 'load', lambda name: parts[name])
    weights = dict(x=1.0, y=2.0, z=1.0)
    section = {k: dict(name=k, weight=w) for k, w in weights.items()}
    return SimpleNamespace(source=mixture.load(mixture=section), parts=parts, weights=weights)


def test_a_mixture_takes_from_each_by_its_weight_and_maps_classes_by_name(mixed):
    source = mixed.source
    assert source.classes == ('cat', 'dog', 'eel', 'ant') and len(source) == 58
    batches = take(feed(source), 20)
    ids = np.concatenate([b['id'] for b in batches])
    names = [source.name(int(i)) for i in ids]
    for key, weight in mixed.weights.items():
        share = [np.mean([n[0] == key for n in names[:k]]) for k in (16, 160, 320)]
        np.testing.assert_allclose(share, weight / 4, atol=1 / 16)
        part = [int(n[2:]) for n in names if n[0] == key]
        length = len(mixed.parts[key])
        for epoch in range(len(part) // length):  # each part has its own epochs
            assert sorted(part[epoch * length : (epoch + 1) * length]) == list(range(length))
    for batch in batches:
        for i, label in zip(batch['id'], batch['label'], strict=True):
            part, k = source.name(int(i)).split('-')
            own = mixed.parts[part]
            assert source.classes[label] == own.classes[own.records[int(k)]['label']]


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), start=st.integers(0, 10**15),
)
def test_parts_of_a_mixture_are_taken_one_after_another_and_by_weight(weights, start):
    count = 300
    for begin in (0, start):
        which, within = order.interleaved(np.arange(begin, begin + count), weights)
        for k, weight in enumerate(weights):
            mine = within[which == k]
            if len(mine):
                np.testing.assert_array_equal(mine, mine[0] + np.arange(len(mine)))
            expected = count * weight / sum(weights)
            assert abs(len(mine) - expected) <= len(weights)
            if begin == 0:
                assert not len(mine) or mine[0] == 0
            elif len(mine):  # so many of all before came from this part
                share = Fraction(weight) / sum(map(Fraction, weights))
                assert abs(mine[0] - start * share) <= len(weights) + start * 2e-9


def test_a_mixture_with_several_labels_pads_them_all(monkeypatch):
    several = [np.array(labels, np.int32) for labels in ([0, 2], [1, -1], [2, 7])]
    parts = {'x': drawn(6, ('a', 'b')), 'y': drawn(3, ('b', 'c', 'a'), labels=several)}
    monkeypatch.setattr(mixture.sources, 'load', lambda name: parts[name])
    source = mixture.load(mixture={k: dict(name=k, weight=1.0) for k in parts})
    batch = next(feed(source, tolerance=1 / 9))
    assert batch['label'].shape == (16, 2)
    found = {
        int(i): sorted(source.classes[c] for c in row if c >= 0)
        for i, row, m in zip(batch['id'], batch['label'], batch['mask'], strict=True) if m
    }
    assert found.items() <= {
        **{i: ['ab'[i % 2]] for i in range(6)}, 6: ['a', 'b'], 7: ['c']
    }.items() and 6 in found
    with pytest.raises(UserError, match='image-2: label .* is out of range'):
        take(feed(source), 3)


def test_augmentations_follow_the_view_and_draw_from_its_generator():
    source = drawn(30)
    plain, inverted = (
        take(feed(source, augment=augment), 3)
        for augment in ((), (dict(name='erase', probability=1.0, fill='black'), 'autoaugment'))
    )
    for a, b in zip(plain, inverted, strict=True):
        np.testing.assert_array_equal(a['id'], b['id'])
        assert (a['image'] != b['image']).any(axis=(1, 2, 3)).mean() > 0.7
    again = next(feed(source, start=2, augment=('autoaugment',), rows=np.arange(1, 16, 2)))
    other = take(feed(source, augment=('autoaugment',)), 3)[2]
    np.testing.assert_array_equal(again['image'], other['image'][1::2])


def test_three_billion_examples_take_no_memory_each():
    source = drawn(3_000_000_000)
    tracemalloc.start()
    try:
        first = next(feed(source, batch_size=64))
        late = next(feed(source, start=10**8, batch_size=64))
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    for batch, step in ((first, 0), (late, 10**8)):
        ids = order.batch_ids(source, batch_size=64, seed=3, step=step)
        np.testing.assert_array_equal(batch['id'], ids)
        assert len(set(ids)) == 64 and ids.max() > 1e9 and np.ptp(ids) > 1e9
    epoch = 3_000_000_000 // 64
    ends = [order.batch_ids(source, batch_size=64, seed=3, step=epoch - k) for k in (0, 1)]
    assert all(0 <= i < 3e9 for ids in ends for i in ids)


class Damaged(Drawn):
    """Of which one record can't be read."""

    def __getitem__(self, i):
        if i == 3:
            raise UserError('record 3 of the shard is damaged')
        return super().__getitem__(i)


def test_lists_of_labels_have_one_shape_whatever_is_damaged():
    ones = drawn(6, labels=[np.array([i % 3], np.int32) for i in range(6)])
    assert next(feed(ones))['label'].shape == (16,)
    several = [np.array([i % 3, -1], np.int32) for i in range(6)]
    damaged = sources.Source(Damaged(6, labels=several), ('a', 'b', 'c'))
    for source in (damaged, sources.Source(sources.Slice(damaged.records, 1, 5), damaged.classes)):
        gone = 3 - (len(source) == 4)
        batch = next(feed(source, tolerance=1 / 4))
        assert batch['label'].shape == (16, 2)
        assert (batch['label'][batch['id'] == gone] == -1).all()
        np.testing.assert_array_equal(batch['mask'] == 0, batch['id'] == gone)
        with pytest.raises(UserError, match=r'image-3: record 3 of the shard is damaged \(1 of'):
            take(feed(source), 3)
