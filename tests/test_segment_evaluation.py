"""Evaluation of segmentation: by PyTorch's interpolation and scikit-learn's confusion matrix."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scenes
from PIL import Image
from scipy import special
from sklearn import metrics as reference

from vit_jax import sharding
from vit_jax.data import images, pipeline, sources
from vit_jax.data.geometry import Geometry
from vit_jax.data.tasks import make_view
from vit_jax.data.tasks import segment as segment_task
from vit_jax.errors import UserError
from vit_jax.evaluators import Subject, segment

CLASSES = ('sky', 'tree', 'cow', 'boat')
SIZE, CELLS = (32, 48), (4, 6)
SHAPES = [(40, 60), (61, 37), (20, 75), (33, 48), (7, 5), (64, 80), (1, 9)]
COLOURS = np.random.default_rng(5).normal(size=(3, 4)).astype(np.float32)
QUERIES = np.random.default_rng(6).normal(size=(5, 5)) + 3 * np.eye(5)


def predict(params, batch):
    """Logits [B, K, h, w] of the mean colours of patches."""
    x = batch['image'].astype(jnp.float32) / 255
    b, height, width, _ = x.shape
    x = x.reshape(b, CELLS[0], height // CELLS[0], CELLS[1], width // CELLS[1], 3).mean((2, 4))
    x = x - x.mean((1, 2), keepdims=True)
    return {'semantic': (x @ params).transpose(0, 3, 1, 2)}


def predict_masks(params, batch):
    """Masks [B, 5, h, w] of mean colours, and logits [B, 5, K + 1]."""
    maps = predict(params, batch)['semantic']
    maps = 3 * jnp.concatenate([maps, -maps.mean(1, keepdims=True)], axis=1)
    return {'masks': maps, 'logits': jnp.broadcast_to(QUERIES, (len(maps), 5, 5))}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Images of many sizes with random masks, a third of whose pixels is ignored, and no cow."""
    root, rng = tmp_path_factory.mktemp('set'), np.random.default_rng(0)
    for name in ('images', 'masks'):
        (root / name).mkdir()
    for i, shape in enumerate(SHAPES):
        coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        picture = coarse[np.arange(shape[0]) % 5][:, np.arange(shape[1]) * 5 // shape[1]]
        labels = rng.choice(np.uint8([0, 1, 3, 255]), shape, p=[0.3, 0.2, 0.2, 0.3])
        if i == 3:
            labels[:] = 255  # an image without any label
        (root / 'images' / f'{i}.png').write_bytes(scenes.png(picture))
        (root / 'masks' / f'{i}.png').write_bytes(scenes.png(labels))
    (root / 'classes.txt').write_text('\n'.join(CLASSES))
    return root


def evaluation(folder, devices=1, batch_size=4, predict=predict, **settings):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    outputs = jax.eval_shape(predict, COLOURS, {'image': np.zeros((1, *SIZE, 3), np.uint8)})
    subject = Subject(predict, mesh, outputs, {'classes': CLASSES}, {})
    same = dict(source=dict(name=str(folder)), image_size=SIZE, canvas=(64, 80))
    return segment.Segment(subject, batch_size=batch_size, **same | settings)


def interpolated(logits, shape, geometry):
    """Logits [1, K, h, w] of a view at the pixels of its image, by PyTorch."""
    torch = pytest.importorskip('torch')
    logits = torch.tensor(np.array(logits))
    if geometry.resized == SIZE:
        how = dict(mode='bilinear', align_corners=False)
        return torch.nn.functional.interpolate(logits, shape, **how)[0]
    sides = zip(shape, geometry.resized, geometry.offset, SIZE, strict=True)
    y, x = np.meshgrid(
        *[2 * ((np.arange(n) + 0.5) * r / n - o) / s - 1 for n, r, o, s in sides], indexing='ij'
    )
    grid = torch.tensor(np.stack([x, y], -1)[None].astype(np.float32))
    return torch.nn.functional.grid_sample(
        logits, grid, mode='bilinear', padding_mode='border', align_corners=False
    )[0]


def labels_and_predictions(folder, view, masks):
    """Labels and predictions of all pixels that are not ignored."""
    pairs = []
    for i, shape in enumerate(SHAPES):
        image, labels = (
            np.asarray(Image.open(folder / name / f'{i}.png')) for name in ('images', 'masks')
        )
        geometry = make_view(view, SIZE).place(shape, None)
        given = {'image': geometry.image(image)[None]}
        if masks:
            maps = interpolated(predict_masks(COLOURS, given)['masks'], shape, geometry)
            shares = special.softmax(QUERIES.astype(float), axis=1)[:, :-1]
            scores = np.tensordot(shares.T, special.expit(maps.numpy().astype(float)), 1)
        else:
            scores = interpolated(predict(COLOURS, given)['semantic'], shape, geometry).numpy()
        predicted = scores.argmax(0)
        pairs.append((labels[labels != 255], predicted[labels != 255]))
    return [np.concatenate(each) for each in zip(*pairs, strict=True)]


@pytest.mark.parametrize('view, masks', [
    ('fit', True), ('resize', False), (dict(name='fit', place='centre'), False),
])  # fmt: skip
def test_it_counts_each_pixel_once_as_others_do(folder, view, masks):
    labels, predicted = labels_and_predictions(folder, view, masks)
    how = dict(predict=predict_masks) if masks else {}
    found = evaluation(folder, view=view, by_class=True, **how)(COLOURS)
    among = range(len(CLASSES))
    expected = reference.confusion_matrix(labels, predicted, labels=among)
    each = reference.jaccard_score(labels, predicted, labels=among, average=None, zero_division=0)
    occurs = expected.sum(0) + expected.sum(1) > 0
    wanted = {
        'miou': each[occurs].mean(), 'examples': len(SHAPES),
        'pixel_accuracy': reference.accuracy_score(labels, predicted),
        'class_accuracy': reference.balanced_accuracy_score(labels, predicted),
    } | {f'iou/{name}': x for name, x, had in zip(CLASSES, each, occurs, strict=True) if had}
    assert found == pytest.approx(wanted, abs=5e-4)  # pixels between two classes
    assert set(found) == set(wanted) and len(set(predicted)) > 2


SLIDING = [
    (dict(stride=20, smaller=40, larger=70), False),
    (dict(stride=32, smaller=48, even=True, scales=(1.0, 0.6), flip=True), True),
    (dict(stride=24, scales=(0.5, 1.3), flip=True), False),
    (dict(flip=True), False),
]


def corners_of(whole, settings):
    """Places of the windows in an image of a size; one without a stride."""
    if 'stride' not in settings:
        return [(0, 0)]
    stride, sides = settings['stride'], []
    for rest in (max(n - part, 0) for n, part in zip(whole, SIZE, strict=True)):
        if settings.get('even'):
            sides.append([int(x) for x in np.linspace(0, rest, -(-rest // stride) + 1)])
        else:
            sides.append(sorted({min(i, rest) for i in range(0, rest + stride, stride)}))
    return list(itertools.product(*sides))


def scores_in(scaled, corner, shape, flip, masks):
    """Scores [K, *shape] by one window of an image, and the pixels that it shows."""
    window = np.zeros((*SIZE, 3), np.uint8)
    part = scaled[corner[0] :, corner[1] :][: SIZE[0], : SIZE[1]]
    window[: part.shape[0], : part.shape[1]] = part
    way = -1 if flip else 1
    maps = np.asarray(predict(COLOURS, {'image': window[None, :, ::way]})['semantic'])
    geometry = Geometry((0, 0, *shape), scaled.shape[:2], SIZE, corner)
    maps = interpolated(maps[..., ::way], shape, geometry).numpy().astype(float)
    if masks:
        maps = 3 * np.concatenate([maps, -maps.mean(0, keepdims=True)])
        shares = special.softmax(QUERIES.astype(float), axis=1)[:, :-1]
        maps = np.tensordot(shares.T, special.expit(maps), 1)
    sides = zip(shape, scaled.shape[:2], corner, strict=True)
    at = [(np.arange(n) + 0.5) * w / n - c for n, w, c in sides]
    y, x = ((0 <= p) & (p < n) for p, n in zip(at, SIZE, strict=True))
    return maps, y[:, None] & x


def by_windows(image, shape, masks, settings):
    """Scores [K, *shape] of an image, window by window, by PyTorch's interpolation."""
    smaller, total = settings.get('smaller', 32), 0.0
    larger, scales = settings.get('larger', 4 * smaller), settings.get('scales', (1.0,))
    several = len(scales) > 1 or settings.get('flip')
    for scale in scales:
        factor = scale * min(smaller / min(shape), larger / max(shape))
        whole = tuple(max(1, int(n * factor + 0.5)) for n in shape)
        whole = whole if 'stride' in settings else SIZE
        scaled = images.resized(image, (0, 0, *shape), whole)
        for flip in (False, True) if settings.get('flip') else (False,):
            sums, count = np.zeros((len(CLASSES), *shape)), np.zeros(shape)
            for corner in corners_of(whole, settings):
                maps, inside = scores_in(scaled, corner, shape, flip, masks)
                sums, count = sums + maps * inside, count + inside
            found = sums / count
            total = total + (special.softmax(found, axis=0) if several and not masks else found)
    return total


@pytest.mark.parametrize('settings, masks', SLIDING)
def test_windows_count_as_each_by_itself(folder, settings, masks):
    pairs = []
    for i, shape in enumerate(SHAPES):
        image, labels = (
            np.asarray(Image.open(folder / name / f'{i}.png')) for name in ('images', 'masks')
        )
        predicted = by_windows(image, shape, masks, settings).argmax(0)
        pairs.append((labels[labels != 255], predicted[labels != 255]))
    labels, predicted = (np.concatenate(each) for each in zip(*pairs, strict=True))
    how = dict(predict=predict_masks) if masks else {}
    view = {} if 'stride' in settings else dict(view='resize')
    measured = evaluation(folder, batch_size=3, **how, **settings, **view)
    total = measured.step(COLOURS, next(measured.feed()))['confusion'] * 0
    for batch in measured.feed():
        total = total + measured.step(COLOURS, batch)['confusion']
    expected = reference.confusion_matrix(labels, predicted, labels=range(len(CLASSES)))
    assert np.abs(np.asarray(total) - expected).sum() <= 6  # pixels between two classes
    assert len(set(predicted)) > 2 and expected.sum() > 5000
    eight = evaluation(folder, devices=8, batch_size=8, **how, **settings, **view)
    assert eight(COLOURS) == measured(COLOURS)


@pytest.mark.parametrize('settings', [dict(view='fit'), SLIDING[0][0]])
def test_images_of_all_sizes_are_evaluated_by_one_program(folder, settings):
    traced = []

    def noted(params, batch):
        traced.append(batch['image'].shape)
        return predict(params, batch)

    one = evaluation(folder, batch_size=1, predict=noted, **settings)
    traced.clear()
    total = sharding.put(next(one.feed()), one.mesh)
    one.step(COLOURS, total)
    first = len(traced)
    one(COLOURS)
    assert len(traced) == first > 0 and len(SHAPES) == len(set(SHAPES)) > 5


def test_images_of_all_sizes_are_trained_by_one_program(folder):
    source = sources.load(name=str(folder))
    for view in ('fit', 'scale_crop', 'large_scale_jitter'):
        task, traced = segment_task.segment(source, view=view, image_size=SIZE), []
        step = jax.jit(lambda batch, traced=traced: traced.append(batch['image'].shape))
        for batch, _ in zip(pipeline.batches(source, task, 0, batch_size=2), SHAPES, strict=False):
            step(batch)
        assert traced == [(2, *SIZE, 3)]


def test_each_image_counts_once_on_any_devices(folder):
    one = evaluation(folder, batch_size=7)(COLOURS)
    assert evaluation(folder, devices=8, batch_size=16)(COLOURS) == one
    assert evaluation(folder, devices=1, batch_size=2)(COLOURS) == one


def test_what_can_not_be_measured_is_refused(folder):
    with pytest.raises(UserError, match='view central may cut pixels off; fit and resize keep'):
        evaluation(folder, view='central')
    with pytest.raises(UserError, match='2.png: the image has 75 x 20 pixels, above canvas=70'):
        evaluation(folder, canvas=(64, 70))(COLOURS)
    with pytest.raises(UserError, match="the view does not show the whole image"):
        evaluation(folder, view=dict(name='resize', crop=0.5))(COLOURS)
    with pytest.raises(UserError, match='no pixel of the data set has a label'):
        segment.summary(np.zeros((3, 3)))
    with pytest.raises(UserError, match='evals: scales is a setting of windows; give their stride'):
        evaluation(folder, scales=(1.0, 2.0))
    with pytest.raises(UserError, match='stride 40 leaves gaps between windows of 32 pixels'):
        evaluation(folder, stride=40)
    with pytest.raises(UserError, match='evals: 14,577 windows .*mirrored .* maps of 17 GiB'):
        evaluation(folder, stride=1, smaller=160, larger=160, flip=True, batch_size=1600)
    absent = segment.iou(np.array([[2, 1, 0], [0, 0, 0], [0, 0, 0]]))
    np.testing.assert_array_equal(absent, [2 / 3, 0, np.nan])


def test_more_pixels_than_a_batch_can_count_are_refused(folder):
    with pytest.raises(UserError, match='batch_size 4 of canvas 30000 x 30000'):
        evaluation(folder, canvas=30_000)
