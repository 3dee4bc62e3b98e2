"""Pages of segmentation and detection: their worst images, and patches beside label maps."""

import types

import jax
import launched
import numpy as np
import pytest
import scenes
import sklearn.decomposition
import sklearn.metrics
import tiny_dense
from PIL import Image

from vit_jax import assembly, config, evaluators
from vit_jax.data import tasks
from vit_jax.errors import UserError
from vit_jax.evaluators import average_precision
from vit_jax.figures import __main__ as figures
from vit_jax.figures import anatomy, features, worst

CLASSES = 'abcde'
EXPERIMENT = """
from ml_collections import ConfigDict
def get_config():
  size = dict(image_size=16, batch_size=8)
  return ConfigDict(dict(
    steps=2, objective=dict(name='segment'), evals=dict(val=dict(
      type='segment', source=dict(name={0!r}, split='train'), canvas=64, **size)),
    model=dict(name='vit-ti/4', width=16, depth=1, num_heads=2, mlp_dim=32),
    data=dict(task='segment', source=dict(name={0!r}), view='fit', **size)))
"""


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The workdir of a run on images of several sizes, one of which has no label."""
    root, rng = tmp_path_factory.mktemp('worst'), np.random.default_rng(0)
    for name in ('images', 'masks'):
        (root / 'set' / name).mkdir(parents=True)
    for i, shape in enumerate([(40, 50), (64, 30), (20, 60), (48, 48), (33, 64), (17, 20), (5, 9),
                               (50, 40), (30, 30)]):  # fmt: skip
        labels, image = scenes.blocks(shape, rng)
        labels = np.full_like(labels, 255) if i == 3 else labels
        (root / 'set' / 'images' / f'{i}.png').write_bytes(scenes.png(image))
        (root / 'set' / 'masks' / f'{i}.png').write_bytes(scenes.png(labels))
    (root / 'set' / 'classes.txt').write_text('\n'.join(CLASSES))
    (root / 'x.py').write_text(EXPERIMENT.format(str(root / 'set')))
    full = config.load(str(root / 'x.py'))
    parts = assembly.make(full, devices=jax.devices()[:1])
    params = jax.tree.map(
        lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32),
        parts.objective.init(jax.random.key(0)),
    )
    return launched.write_run(root / 'run', full, parts, params)


def test_the_images_of_the_lowest_iou_come_first(run, monkeypatch):
    full = config.complete(figures.workdir.read_json(run / 'config.json'))
    parts = assembly.make(full, devices=jax.devices()[:1])
    params = jax.tree.map(np.asarray, parts.objective.init(jax.random.key(3)))
    rows = worst.of_label_maps(parts.evals['val'], params, lambda count: None)
    scores = []
    for row in rows:
        truth, found = row.truth['label_map'], row.found['label_map']
        assert truth.shape == found.shape == row.image.shape[:2]
        assert (row.image[..., 0] == 40 * truth + 20).all()  # as scenes.blocks paints them
        kept = truth != 255
        each = sklearn.metrics.jaccard_score(
            truth[kept], found[kept], average=None, labels=np.union1d(truth[kept], found[kept])
        )
        scores.append(each.mean())
        assert row.caption.endswith(f'{each.mean():.1%}')
    assert len(rows) == worst.SHOWN and scores == sorted(scores) and scores[0] < scores[-1]
    monkeypatch.setattr(worst, 'SHOWN', 9)
    each = worst.of_label_maps(parts.evals['val'], params, lambda count: None)
    assert len(each) == 8  # one has no label
    assert [row.caption for row in rows] == [row.caption for row in each[: len(rows)]]


def test_the_images_of_the_lowest_panoptic_quality_come_first(tmp_path):
    folder = tiny_dense.write(tmp_path / 'set')
    full = config.load(f'{tiny_dense.__file__}:{folder}', [('evals.panoptic.batch_size', '3')])
    parts = assembly.make(full, devices=jax.devices()[:1])
    params = parts.objective.init(None)
    rows = worst.of_segments(parts.evals['panoptic'], params, lambda count: None)
    scores = []
    for row in rows:
        numbers, found = row.truth['segments'], row.found['segments']
        assert numbers.shape == found.shape == row.image.shape[:2]
        labels, own = (over['labels'].tolist() for over in (row.truth, row.found))
        each = []
        for k in {*labels, *own} - {-1}:  # of each class there is one segment
            true = numbers == labels.index(k) if k in labels else np.zeros(found.shape, bool)
            mask = found == own.index(k) if k in own else np.zeros(found.shape, bool)
            iou = np.sum(true & mask) / np.sum(true | mask & (numbers != 255))
            each.append(iou if iou > 0.5 else 0.0)
        scores.append(np.mean(each))
        assert row.caption.endswith(f'{scores[-1]:.1%}')
    assert len(rows) == worst.SHOWN and scores == sorted(scores) and scores[0] < scores[-1]
    whole = parts.evals['panoptic'](params)
    assert scores[0] < whole['pq'] < 1
    worst.draw(tmp_path / 'x.png', rows[:2], parts.evals['panoptic'].classes)
    assert Image.open(tmp_path / 'x.png').size[0] > 500


def test_the_score_of_an_image_is_that_of_its_objects():
    none = np.zeros(3)
    made = average_precision.Image(
        boxes=np.float32([[0, 0, 10, 10], [20, 0, 10, 10], [0, 20, 10, 10]]),
        labels=np.int32([1, 1, 2]), crowd=np.array([False, False, True]), areas=none,
        found_boxes=np.float32([[0, 0, 10, 6], [0, 0, 10, 10], [0, 0, 10, 4], [20, 0, 10, 10]]),
        found_labels=np.int32([1, 2, 1, 1]), scores=np.array([0.5, 0.9, 0.8, 0.3]),
    )  # fmt: skip
    # the first is found with 0.5: 0.9 is of another class, 0.8 covers too little of it
    assert worst.score_of(made) == pytest.approx((0.5 + 0.3) / 2)
    empty = {name: getattr(made, name)[:0] for name in ('found_boxes', 'found_labels', 'scores')}
    assert worst.score_of(made._replace(**empty)) == 0


def test_objects_are_drawn_by_their_scores(tmp_path):
    boxes = np.float32([[2, 3, 10, 8]])
    records = scenes.source(
        *({'image': scenes.png(np.full((20, 30, 3), 60 + i, np.uint8))} for i in range(3))
    )
    evaluation = types.SimpleNamespace(
        source=records, classes=records.classes, mesh=None, step=None, feed=None
    )
    batch = dict(
        true_mask=np.ones(3), true_id=np.arange(3), true_labels=np.int32([[1], [1], [-1]]),
        true_boxes=np.stack([boxes] * 3), true_crowd=np.zeros((3, 1), bool),
        true_areas=np.ones((3, 1)), found_boxes=np.stack([boxes] * 3),
        found_labels=np.int32([[1], [2], [1]]), scores=np.array([[0.9], [0.8], [0.7]]),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluators, 'results', lambda *arguments: [batch])
        rows = worst.of_objects(evaluation, None, lambda count: None)
    assert [row.caption for row in rows] == ['scene 1: 0.00', 'scene 0: 0.90']
    assert rows[0].words == ['c 0.80'] and rows[1].words == ['b 0.90']
    np.testing.assert_allclose(rows[0].found['boxes'] * [30, 20, 30, 20], [[2, 3, 12, 11]])
    worst.draw(tmp_path / 'x.png', rows, records.classes)
    assert Image.open(tmp_path / 'x.png').size[0] > 1000


def test_components_of_patches_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    points, kept = rng.normal(size=(2, 15, 16, 9)) * np.arange(1, 10), rng.random((2, 15, 16)) < 0.7
    found, shares = anatomy.patch_components(points, kept)
    wanted = sklearn.decomposition.PCA(3).fit(points[kept])
    np.testing.assert_allclose(shares, wanted.explained_variance_ratio_)
    for k, values in enumerate(wanted.transform(points[kept]).T):
        inside = (found[kept][:, k] > 0) & (found[kept][:, k] < 1)
        assert abs(inside.mean() - 0.96) < 0.02 and {0.0, 1.0} <= set(found[..., k].ravel())
        line = np.polyfit(values[inside], found[kept][inside, k], 1)
        np.testing.assert_allclose(np.polyval(line, values[inside]), found[kept][inside, k])


@pytest.mark.parametrize('view', ['fit', dict(name='fit', place='centre'), 'resize'], ids=str)
def test_a_pixel_has_the_patch_that_is_over_it(view):
    size, grid, patches = (24, 36), (4, 6), np.arange(24).reshape(4, 6)
    for shape in ((61, 37), (10, 50)):
        geometry = tasks.make_view(view, size).place(shape, None)
        rows, columns = features.cells_of(tasks.place_of(geometry, shape), size, shape, grid)
        moved = geometry.label_map(patches[rows[:, None], columns], 255)
        wanted = patches.repeat(6, 0).repeat(6, 1)
        inside = moved != 255
        assert inside.sum() > 100 and np.mean(moved[inside] == wanted[inside]) > 0.9


@pytest.mark.slow
def test_a_page_has_the_worst_images_and_the_patches(run, tmp_path):
    status, out, err = launched.run('figures', run, f'--out={tmp_path}/out')
    assert status == 0, err
    assert {f'Picture: {tmp_path}/out/{name}.png' for name in ('worst', 'features')} <= {
        *out.splitlines()
    }
    text = (tmp_path / 'out' / 'page.html').read_text()
    assert '<h2>Worst images</h2>' in text and '<h2>Features of patches</h2>' in text


def test_data_sets_without_label_maps_are_refused(run):
    source, task = features.data_set_of(str(run), run, None)
    assert len(source) == 9 and task.names['classes'] == tuple(CLASSES)
    with pytest.raises(UserError, match='--masks=.*: data.task is classify, not segment'):
        features.data_set_of('x', None, f'{launched.TINY}:{run.parent}')
    assert features.data_set_of('x', None, None) is None
