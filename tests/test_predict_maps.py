"""Predicted label maps by windows, and panoptic segments: known ones, and those of transformers."""

import types

import numpy as np
import predicting
import pytest
import tiny_dense
import tiny_segment
from PIL import Image

from vit_jax.data import tasks
from vit_jax.data.segments import VOID
from vit_jax.errors import UserError
from vit_jax.evaluators import places
from vit_jax.predict import Predictor, dense, findings, read_ahead, windowed

RNG = np.random.default_rng(5)


def place_in(shape, size):
    geometry = tasks.make_view('fit', size).place(shape, None)
    return places.Place(shape, size, tasks.place_of(geometry, shape))


def test_segments_are_those_of_transformers(monkeypatch):
    torch = pytest.importorskip('torch')
    eomt = pytest.importorskip('transformers.models.eomt.image_processing_pil_eomt')
    monkeypatch.setattr(places, 'BLOCK', 2000)  # a few rows at a time
    rng, counts = np.random.default_rng(1), []
    logits, coarse = 2 * rng.normal(size=(20, 4)), rng.normal(size=(20, 2, 2))
    masks = 4 * coarse.repeat(4, 1).repeat(4, 2) + rng.normal(size=(20, 8, 8)) - 2
    outputs = types.SimpleNamespace(
        class_queries_logits=torch.tensor(logits)[None],
        masks_queries_logits=torch.tensor(masks)[None], patch_offsets=None,
    )  # fmt: skip
    for stuff, overlap in (((), 0.3), ((0, 2), 0.3), ((0, 1, 2), 0.0)):
        theirs = eomt.EomtImageProcessorPil().post_process_panoptic_segmentation(
            outputs, [(61, 37)], 0.4, 0.5, overlap, list(stuff),
            dict(shortest_edge=32, longest_edge=32),
        )[0]  # fmt: skip
        found = places.segments(logits, masks, place_in((61, 37), (32, 32)), 0.4, overlap, stuff)
        numbers, labels, scores = found
        rows = theirs['segments_info']
        assert labels.tolist() == [row['label_id'] for row in rows]
        counts.append(len(rows))
        wanted = np.asarray(theirs['segmentation'])
        np.testing.assert_array_equal(numbers, np.where(wanted < 0, VOID, wanted))
        assert 0.05 < np.mean(numbers == VOID) < 0.6
        things = ~np.isin(labels, stuff)
        first = np.array([row['score'] for row in rows])
        np.testing.assert_allclose(scores[things], first[things], atol=1e-5)
        assert (scores > first - 1e-5).all()
    assert counts[0] > counts[1] > 1, counts


@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('windows', [(16, 5, None), (16, 16, ['0.5', '1', '2']), (16, None, None)])
def test_windows_and_mirrored_ones_find_what_is_there(windows, flip, tmp_path, monkeypatch):
    """Each pixel of large blocks has the class of its colour, but along their edges."""
    monkeypatch.setattr(windowed, 'STEP', 64)  # of programs, of which three are
    size, stride, scales = windows

    def compute(params, images):
        bright = images.astype(np.float32).mean(-1) - 127
        return {'semantic': np.sign([-1, 1])[:, None, None] * bright[:, None]}

    predictor = Predictor(compute, {}, (size, size), 'fit', ['dark', 'bright'])
    shapes = ((48, 96), (120, 48), (200, 30))
    paths, truth = [tmp_path / f'{i}.png' for i in range(3)], []
    for path, shape in zip(paths, shapes, strict=True):
        grid = RNG.integers(0, 2, (shape[0] // 24 + 1, shape[1] // 24 + 1), np.uint8)
        truth.append(grid.repeat(24, 0).repeat(24, 1)[: shape[0], : shape[1]])
        Image.fromarray(255 * truth[-1]).convert('RGB').save(path)
    (tmp_path / '3.png').write_bytes(b'no image')
    found = windowed.windows_of((size, size), stride, scales)
    view = windowed.cutter(tasks.whole_view('fit', size), found)
    pairs = dense.keyed(read_ahead([*map(str, paths), str(tmp_path / '3.png')], view, 2))
    *made, (_, error) = windowed.predicted(predictor, pairs, found, flip)
    assert isinstance(error, UserError) and len(made) == 3
    for ((path, place), outputs), labels in zip(made, truth, strict=True):
        assert outputs['label_map'].shape == labels.shape == place.shape, path
        least = 0.9 if stride else 0.6  # a view of 16 pixels shows no more of them
        assert np.mean(outputs['label_map'] == labels) > least


@pytest.mark.parametrize('stride, scales, words', [
    (None, ['2'], '--scales is a setting of windows; give their stride'),
    (99, None, '--stride 99 leaves gaps'), (4, ['a'], '--scales=a are not numbers above 0'),
    (4, ['-1'], '--scales=-1 are not numbers'),
])  # fmt: skip
def test_windows_that_are_none_are_named(stride, scales, words):
    with pytest.raises(UserError, match=words):
        windowed.windows_of((16, 16), stride, scales)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = predicting.launched.write_images(tmp_path_factory.mktemp('images'), {'train': 3})
    objective = dict(name='masks', queries=5, query_blocks=1, points=20)
    return predicting.a_run(tmp_path_factory.mktemp('run'), tiny_segment, objective, folder)


def test_segments_of_a_run_that_are_known(run, tmp_path):
    """Two things and stuff in two parts, of an image of which the view has a margin."""
    masks = np.full((5, 4, 4), -9.0)
    masks[0, :2, :2] = masks[1, :2, 2:] = masks[2, 2:, :1] = masks[3, 2:, 3:] = 9
    masks[4] = 8  # of no object
    logits = 9 * np.eye(3)[[0, 0, 1, 1, 2]]
    place = place_in((32, 64), (64, 64))
    place = place._replace(place=np.float32([[2, 0], [1, 0]]))  # stretched to the view
    finder = dense.finder(str(run), masks='panoptic', stuff=['bright'])
    found = finder.find({'logits': logits, 'masks': masks}, place)
    names = finder.predictor.classes
    record = findings.record('x.png', found, names)
    assert [one['name'] for one in record['segments']] == ['dark', 'dark', 'bright']
    coco = pytest.importorskip('pycocotools.mask')
    covered = np.array([coco.decode(one['segmentation']) for one in record['segments']])
    assert [covered[k, y, x] for k, y, x in ((0, 5, 10), (1, 5, 50), (2, 28, 5), (2, 28, 60))] == [
        1, 1, 1, 1
    ]  # fmt: skip
    assert not covered[:, 28, 32].any() and covered.sum(0).max() == 1
    for one, mask in zip(record['segments'], covered, strict=True):
        assert one['share'] == pytest.approx(mask.mean()) and one['score'] > 0.99
    assert findings.lines(found, names)[2][1:] == ('bright', f'{covered[2].mean():.2%} of it')
    findings.draw(tmp_path / 'x.png', np.full((32, 64, 3), 90, np.uint8), found, names)
    picture = np.asarray(Image.open(tmp_path / 'x.png').convert('RGB'))
    assert (picture[5 * 8, 10 * 8] != 90).any() and (picture[28 * 8, 32 * 8] < 90).all()


@pytest.mark.slow
def test_the_command_draws_segments_and_windows(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(windowed, 'STEP', 128)
    photos = predicting.photos(tmp_path)
    same = dict(out=str(tmp_path / 'out'), threshold=0.0)
    rows = predicting.predicted(capsys, run, photos, masks='panoptic', stuff=[], **same)
    assert all({'image', 'width', 'height', 'segments'} == row.keys() for row in rows)
    assert sum(len(row['segments']) for row in rows) > 0
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['0.png', '1.png', '2.png']
    plain, windows = (
        predicting.predicted(capsys, run, photos, **given)
        for given in ({}, dict(stride=8, scales=['0.5', '1'], flip=True))
    )
    for row, other, shape in zip(plain, windows, predicting.SHAPES, strict=True):
        assert sum(one['share'] for one in other['classes']) == pytest.approx(1)
        assert {one['segmentation']['size'][0] for one in other['classes']} == {shape[0]}
        assert row['image'] == other['image']
    assert plain != windows
    with pytest.raises(UserError, match='--stride and --flip are for label maps'):
        predicting.predicted(capsys, run, photos, masks='instances', flip=True)
    with pytest.raises(UserError, match="--stuff: there is no class 'mud'"):
        predicting.predicted(capsys, run, photos, masks='panoptic', stuff=['mud'])


def test_a_data_set_says_what_is_stuff(tmp_path):
    folder = tiny_dense.write(tmp_path)
    section = tiny_dense.get_config(str(folder)).evals.panoptic.to_dict()
    for change, given, wanted in (
        ({}, None, {0}), ({}, ['blue'], {2}), ({}, [], set()), (dict(stuff=('green',)), None, {1})
    ):
        config = {'evals': {'other': dict(type='segment'), 'x': section | change}}
        assert dense.stuff_of(given, config, tiny_dense.CLASSES) == wanted
    names = ('background', *tiny_dense.CLASSES)
    config = {'evals': {'x': section | dict(zero='background')}}
    assert dense.stuff_of(None, config, names) == {0, 1}
    assert dense.stuff_of(None, {}, names) == set()
    config['evals']['x']['source'] = dict(name=str(tmp_path / 'gone'))
    with pytest.raises(UserError, match='which classes are stuff is not here .*--stuff=NAME'):
        dense.stuff_of(None, config, names)
