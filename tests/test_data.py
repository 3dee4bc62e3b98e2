"""Sources and the pipeline: each example once, batches a function of (seed, step)."""

import itertools

import feeds
import numpy as np
import pytest
from PIL import Image

from vit_jax.data import order, sources
from vit_jax.errors import UserError

VIEW = dict(name='shift', pixels=1)


def write_folder(path, *, parts=('',), classes=('ant', 'bee', 'cat'), count=9):
    rng = np.random.default_rng(0)
    for part, name, i in itertools.product(parts, classes, range(count)):
        file = path / part / name / f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (10, 8, 3), dtype=np.uint8)).save(file)
    return path


@pytest.fixture
def source(tmp_path):
    return sources.load(name=str(write_folder(tmp_path)), split='train')  # 27 images


def take(feed, n):
    return list(itertools.islice(feed, n))


def train(source, **fields):
    fields = dict(view=VIEW, image_size=8, batch_size=8, seed=3) | fields
    return feeds.batches(source, **fields)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_labels_follow_the_folders(source):
    assert source.classes == ('ant', 'bee', 'cat')
    for batch in feeds.examples(source, view='resize', image_size=8, batch_size=10):
        for i, label, mask in zip(batch['id'], batch['label'], batch['mask'], strict=True):
            if mask:
                assert f'/{source.classes[label]}/' in source.name(int(i))


@pytest.mark.parametrize('processes', [1, 2, 4])
@pytest.mark.parametrize('batch_size', [4, 8, 64])
def test_one_pass_has_each_example_once(source, processes, batch_size):
    parts = [
        list(feeds.examples(
            source, rows=rows, view='central', image_size=8, batch_size=batch_size
        ))
        for rows in np.split(np.arange(batch_size), processes)
    ]  # fmt: skip
    assert len({len(f) for f in parts}) == 1
    seen = [i for f in parts for b in f for i, m in zip(b['id'], b['mask'], strict=True) if m]
    assert sorted(seen) == list(range(27))


def test_epochs_are_permutations(source):
    seen = np.concatenate([b['id'] for b in take(train(source), 27)])  # 8 epochs of 27
    epochs = seen.reshape(8, 27)
    for epoch in epochs:
        assert sorted(epoch) == list(range(27))
    assert len({tuple(e) for e in epochs}) == 8


def test_a_batch_is_a_function_of_seed_and_step(source):
    whole = take(train(source), 9)
    assert_same(take(train(source, start=6), 1)[0], whole[6])
    assert_same(take(train(source, threads=1, prefetch=1, start=2), 1)[0], whole[2])
    np.testing.assert_array_equal(
        whole[7]['id'], order.batch_ids(source, batch_size=8, seed=3, step=7)
    )
    other = take(train(source, seed=4), 1)[0]
    assert not np.array_equal(other['id'], whole[0]['id'])


def test_worker_processes_give_the_same_batches(source):
    for a, b in zip(take(train(source), 5), take(train(source, workers=2), 5), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize('processes', [2, 4, 8])
def test_processes_share_the_same_global_batch(source, processes):
    whole = take(train(source), 6)
    for start in (0, 4):
        feeds = [
            take(train(source, start=start, rows=rows), 2)
            for rows in np.split(np.arange(8), processes)
        ]
        for step in range(2):
            parts = [feed[step] for feed in feeds]
            assert_same(
                {k: np.concatenate([part[k] for part in parts]) for k in parts[0]},
                whole[start + step],
            )


def test_augmentation_differs_by_epoch(source):
    views = {}
    for batch in take(train(source), 27):
        for i, image in zip(batch['id'], batch['image'], strict=True):
            views.setdefault(int(i), set()).add(image.tobytes())
    assert np.mean([len(v) for v in views.values()]) > 4  # of 8 epochs, 9 shifts


def test_percent_splits_part_the_folder(tmp_path):
    write_folder(tmp_path, count=40)
    names = [
        set(sources.load(name=str(tmp_path), split=s).records.paths)
        for s in ('train', 'train[:70%]', 'train[70%:]')
    ]
    assert names[1] | names[2] == names[0] and not names[1] & names[2]
    assert 0.55 < len(names[1]) / len(names[0]) < 0.85


def test_train_and_val_folders(tmp_path):
    write_folder(tmp_path, parts=('train', 'val'), count=3)
    (tmp_path / 'val' / 'bee').rename(tmp_path / 'val' / 'dog')
    with pytest.raises(UserError, match='dog is a class that is missing in .*train'):
        sources.load(name=str(tmp_path), split='val')
    (tmp_path / 'val' / 'dog').rename(tmp_path / 'val' / 'bee')
    assert all('/val/' in p for p in sources.load(name=str(tmp_path), split='val').records.paths)
    assert len(sources.load(name=str(tmp_path), split='train')) == 9


def test_an_unreadable_image_is_named_and_may_be_tolerated(source):
    broken = source.records.paths[5]
    with open(broken, 'wb') as file:
        file.write(b'broken')
    with pytest.raises(UserError, match=f'{broken}: unreadable image'):
        take(train(source), 4)
    batches = take(train(source, tolerance=1 / 27), 27)  # read in every epoch, and one image
    masks = {
        int(i): m for b in batches for i, m in zip(b['id'], b['mask'], strict=True)
    }
    assert masks[5] == 0 and sum(masks.values()) == 26
    with open(source.records.paths[7], 'wb') as file:
        file.write(b'')
    with pytest.raises(UserError, match='2 of 27 examples so far; tolerance is 0.037.*; a larger'):
        take(train(source, tolerance=1 / 27), 27)


@pytest.mark.parametrize('label', [-1, 3])
def test_labels_out_of_range_are_named(source, label):
    source.records.labels[5] = label
    words = f'/ant/5.png: label {label} is out of range: the data set has 3 classes'
    with pytest.raises(UserError, match=words):
        take(train(source), 4)
    with pytest.raises(UserError, match=words):
        list(feeds.examples(source, view='resize', image_size=8, batch_size=4))
    last = list(feeds.examples(
        source, view='resize', image_size=8, batch_size=27, tolerance=1 / 27
    ))[0]  # fmt: skip
    assert last['mask'].tolist() == [i != 5 for i in range(27)] and last['label'][5] == 0


@pytest.mark.parametrize('name, split, words', [
    ('/nowhere', 'train', 'no folder /nowhere'),
    ('cifar11', 'train', "no data set 'cifar11' is prepared. Did you mean"),
    ('digits', 'validation', "data set digits has no split 'validation'; it has train, test"),
])
def test_mistakes_are_named(name, split, words, tmp_path):
    with pytest.raises(UserError, match=words):
        sources.load(name=name, split=split, data_dir=str(tmp_path))


def test_folders_that_are_no_data_set(tmp_path):
    (tmp_path / 'only').mkdir()
    with pytest.raises(UserError, match='has 1 class folders'):
        sources.load(name=str(tmp_path), split='train')
    (tmp_path / 'other').mkdir()
    with pytest.raises(UserError, match=f'no images in {tmp_path}/only '):
        sources.load(name=str(tmp_path), split='train')
    for name in ('only', 'other'):
        Image.new('RGB', (3, 3)).save(tmp_path / name / 'A.JPG')
    assert len(sources.load(name=str(tmp_path))) == 2
    (tmp_path / 'other' / 'A.JPG').rename(tmp_path / 'other' / 'A.txt')
    with pytest.raises(UserError, match=f'no images in {tmp_path}/other '):
        sources.load(name=str(tmp_path))
    with pytest.raises(UserError, match='is not divided into train and val'):
        sources.load(name=str(tmp_path), split='val')
