"""Captions made of boxes say what the boxes say; held-out pairs are in no caption of train."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from vit_jax.data import scene_captions, sources
from vit_jax.data.readers import tfds
from vit_jax.data.readers.record import Record
from vit_jax.errors import UserError

CLASSES = ('T-shirt/top', 'Ankle boot', 'Bag', 'Coat', 'Dress')
SHARE = st.floats(0, 1, width=32)
BOX = st.tuples(SHARE, SHARE, SHARE, SHARE).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


def centre(box):
    return np.array([box[0] + box[2], box[1] + box[3]], np.float64) / 2


@hypothesis.given(BOX, BOX)
def test_a_caption_says_where_the_first_article_is(one, other):
    (first, second), boxes = ('bag', 'ankle boot'), np.array([one, other], np.float64)
    text, inverse = scene_captions.captions_of((first, second), boxes)
    apart = centre(one) - centre(other)
    truth = {
        'a bag above an ankle boot': apart[0] <= 0, 'a bag below an ankle boot': apart[0] >= 0,
        'a bag left of an ankle boot': apart[1] <= 0, 'a bag right of an ankle boot': apart[1] >= 0,
    }  # fmt: skip
    assert truth[text]
    larger = max(abs(apart)) - 1e-9
    assert abs(apart[0 if 'above' in text or 'below' in text else 1]) >= larger
    opposite = {'above': 'below', 'below': 'above', 'left': 'right', 'right': 'left'}
    assert inverse.split()[:2] == ['an', 'ankle'] and inverse.endswith('a bag')
    (word,) = (word for word in text.split() if word in opposite)
    assert opposite[word] in inverse.split()


class Drawn:
    """Scenes of one to three boxes, by a seed."""

    def __init__(self, seed, count=60):
        rng = np.random.default_rng(seed)
        self.rows = []
        for _ in range(count):
            number = rng.integers(1, 4)
            corners = np.sort(rng.uniform(size=(number, 2, 2)), axis=1)
            self.rows.append({
                'image': b'', 'objects/label': rng.integers(len(CLASSES), size=number),
                'objects/bbox': corners.reshape(number, 4),
            })  # fmt: skip

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return Record(self.rows[i])

    def name(self, i):
        return f'scene {i}'


@pytest.fixture
def drawn(monkeypatch):
    parts = {'train': Drawn(1), 'test': Drawn(2)}
    monkeypatch.setattr(tfds, 'load', lambda name, split, **settings: (parts[split], CLASSES))
    return parts


def pairs_in(source):
    found = set()
    for text in itertools.chain(*source.records.captions):
        words = [w for w in ('t-shirt', 'ankle boot', 'bag', 'coat', 'dress') for _ in range(
            text.split(' ').count(w) if ' ' not in w else text.count(w)
        )]  # fmt: skip
        found |= {tuple(sorted(words))} if len(words) == 2 else set()
    return found


def test_held_out_pairs_are_in_no_caption_of_train(drawn):
    train, test, seen, unseen = (
        sources.load(name='scene_captions:0.3', split=part) for part in scene_captions.SPLITS
    )
    assert not pairs_in(train) & pairs_in(unseen) and pairs_in(unseen)
    assert pairs_in(seen) | pairs_in(unseen) == pairs_in(test)
    assert len(seen) + len(unseen) == len(test) == 60 > len(train) > 20
    for source in (train, unseen):
        assert len(source.classes) == 5 + 5 * 4 * 5 == len(set(source.classes))
        record = source.records[0]
        assert source.classes[record['label']] == record['captions'][0]
        assert record['captions'] == sources.load(  # a function of the data alone
            name='scene_captions:0.3', split='train' if source is train else 'unseen'
        ).records[0]['captions']  # fmt: skip


def test_the_two_largest_articles_are_named(drawn):
    rows = drawn['test'].rows
    rows[0] = {
        'image': b'', 'objects/label': np.array([2, 3, 1]),
        'objects/bbox': np.array([[0, 0, 0.1, 0.1], [0.6, 0, 1, 0.4], [0, 0, 0.5, 0.5]]),
    }  # fmt: skip
    rows[1] = {'image': b'', 'objects/label': np.array([0]), 'objects/bbox': np.ones((1, 4))}
    source = sources.load(name='scene_captions:0', split='test')
    assert source.records[0]['captions'] == [
        'an ankle boot above a coat', 'a coat below an ankle boot'
    ]  # fmt: skip
    assert source.records[1]['captions'] == ['a t-shirt']


@pytest.mark.parametrize('name, split, error', [
    ('scene_captions:2', 'train', 'not scene_captions:SHARE'), ('scene_captions:0', 'val', 'split'),
    ('scene_captions:0', 'unseen', 'no scenes in split unseen'),
])  # fmt: skip
def test_other_names_are_refused(drawn, name, split, error):
    with pytest.raises(UserError, match=error):
        sources.load(name=name, split=split)
