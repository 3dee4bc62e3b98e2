"""What is found in an image lies where it is: against PyTorch, transformers and pycocotools."""

import json
import types

import launched
import numpy as np
import predicting
import pytest
import tiny_detect
import tiny_segment
from PIL import Image
from scipy import special

from vit_jax.data import annotations, overlays, run_lengths, tasks
from vit_jax.errors import UserError
from vit_jax.evaluators import places
from vit_jax.figures import overlaid
from vit_jax.predict import dense, findings
from vit_jax.predict.findings import Found

RNG = np.random.default_rng(4)
VIEWS = 'resize', 'fit', dict(name='fit', place='centre')
SIZE = (32, 48)


def place_in(view, shape, size=SIZE):
    geometry = tasks.make_view(view, size).place(shape, None)
    return geometry, places.Place(shape, size, tasks.place_of(geometry, shape))


@pytest.mark.parametrize('view', VIEWS, ids=str)
@pytest.mark.parametrize('shape', [(61, 37), (20, 75), (1, 9)])
def test_boxes_come_back_to_the_pixels_that_the_view_took_them_from(view, shape):
    geometry, place = place_in(view, shape)
    corners = np.sort(RNG.uniform(0, shape[::-1], (20, 2, 2)), axis=1).reshape(-1, 4)
    moved, kept = geometry.boxes(corners)
    start, end = np.split(moved / np.tile(SIZE[::-1], 2), 2, axis=1)
    boxes = np.concatenate([(start + end) / 2, end - start], axis=1)
    logits = RNG.normal(size=(len(boxes), 6))
    scores, labels, found = places.detections(logits, boxes, place)
    shares = special.softmax(logits, axis=1)[:, :-1]
    order = np.argsort(-shares.max(1))
    np.testing.assert_allclose(scores, shares.max(1)[order], rtol=1e-5)
    np.testing.assert_array_equal(labels, shares.argmax(1)[order])
    np.testing.assert_array_equal(kept, range(20))
    start, end = np.split(corners[order], 2, axis=1)
    np.testing.assert_allclose(found, np.concatenate([start, end - start], axis=1), atol=1e-3)


@pytest.mark.parametrize('view', VIEWS, ids=str)
@pytest.mark.parametrize('queries', [False, True])
def test_each_pixel_has_the_class_that_pytorch_interpolates(view, queries, monkeypatch):
    torch = pytest.importorskip('torch')
    monkeypatch.setattr(places, 'BLOCK', 2000)  # a few rows at a time
    shape, logits = (61, 37), RNG.normal(size=(5, 8)) if queries else None
    (geometry, place), maps = place_in(view, shape), RNG.normal(size=(5, 4, 6))
    sides = zip(shape, geometry.resized, geometry.offset, SIZE, strict=True)
    rows, columns = (((np.arange(n) + 0.5) * r / n - o) / s for n, r, o, s in sides)
    grid = np.stack(np.meshgrid(2 * columns - 1, 2 * rows - 1), -1)[None]
    values = torch.nn.functional.grid_sample(
        torch.tensor(maps[None]), torch.tensor(grid), padding_mode='border', align_corners=False
    )[0].numpy()
    if queries:
        shares = special.softmax(logits, axis=1)[:, :-1]
        values = np.tensordot(shares.T, special.expit(values), 1)
    np.testing.assert_array_equal(places.label_map(maps, place, logits), values.argmax(0))


def test_objects_and_scores_are_those_of_transformers():
    torch = pytest.importorskip('torch')
    eomt = pytest.importorskip('transformers.models.eomt.image_processing_pil_eomt')
    yolos = pytest.importorskip('transformers.models.yolos.image_processing_pil_yolos')
    logits, masks = 3 * RNG.normal(size=(9, 4)), 2 * RNG.normal(size=(9, 8, 8)) - 1
    masks[2] = -1
    outputs = types.SimpleNamespace(
        class_queries_logits=torch.tensor(logits)[None], logits=torch.tensor(logits)[None],
        masks_queries_logits=torch.tensor(masks)[None], patch_offsets=None,
        pred_boxes=torch.tensor(RNG.uniform(0.3, 0.4, (1, 9, 4))),
    )  # fmt: skip
    theirs = eomt.EomtImageProcessorPil().post_process_instance_segmentation(
        outputs, [(61, 37)], 0.3, dict(shortest_edge=32, longest_edge=32)
    )[0]
    _, place = place_in('fit', (61, 37), (32, 32))
    scores, labels, found = places.objects(logits, masks, place, 0.3)
    rows = sorted(theirs['segments_info'], key=lambda row: -row['score'])
    assert len(rows) > 3
    np.testing.assert_allclose(scores, [row['score'] for row in rows], atol=1e-5)
    assert labels.tolist() == [row['label_id'] for row in rows]
    drawn = np.full((61, 37), -1)  # later queries over earlier ones, as there
    for i in np.argsort([row['id'] for row in rows]):
        drawn[found[i]] = rows[i]['id']
    np.testing.assert_array_equal(drawn, theirs['segmentation'])
    theirs = yolos.YolosImageProcessorPil().post_process_object_detection(outputs, 0.5, [(61, 37)])
    _, place = place_in('resize', (61, 37))
    scores, labels, boxes = places.detections(logits, outputs.pred_boxes[0].numpy(), place)
    boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    count, order = len(theirs[0]['scores']), np.argsort(-theirs[0]['scores'].numpy())
    assert 3 < count == (scores > 0.5).sum()
    for name, ours in (('scores', scores), ('labels', labels), ('boxes', boxes)):
        np.testing.assert_allclose(ours[:count], theirs[0][name].numpy()[order], atol=1e-4)


def test_run_lengths_are_those_of_pycocotools_both_ways():
    coco = pytest.importorskip('pycocotools.mask')
    masks = [RNG.random(shape) < share for shape in ((1, 1), (7, 5), (300, 400), (1, 90), (2000, 3))
             for share in (0, 0.02, 0.5, 0.999, 1)]  # fmt: skip
    whole = np.zeros((640, 480), bool)
    whole[:600] = whole[5, 5] = True
    for mask in (*masks, whole):
        ours, theirs = run_lengths.encoded(mask), coco.encode(np.asfortranarray(mask, np.uint8))
        assert ours == {'size': list(mask.shape), 'counts': theirs['counts'].decode()}
        np.testing.assert_array_equal(annotations.decode(ours, mask.shape), mask)


@pytest.mark.parametrize('objects', [False, True])
def test_a_picture_has_the_colours_of_what_is_there(objects, tmp_path):
    labels = np.zeros((20, 30), np.uint8)
    labels[4:16, 5:12], labels[4:16, 12:22] = 1, 2
    found = Found((20, 30), labels)
    if objects:
        masks = np.stack([labels == 1, labels == 2])
        boxes = np.array(list(map(dense.box_of, masks)), float)
        found = Found(
            (20, 30), scores=np.array([0.9, 0.6]), labels=np.array([1, 2]), boxes=boxes, masks=masks
        )
        assert boxes.tolist() == [[5, 4, 7, 12], [12, 4, 10, 12]]
    image, names = np.full((20, 30, 3), 100, np.uint8), ['background', 'shoe', 'a $b$ bag']
    findings.draw(tmp_path / 'x.png', image, found, names)
    made, times = np.asarray(Image.open(tmp_path / 'x.png').convert('RGB')), 16
    assert overlaid.enlarged(image) == times and made.shape[0] > 20 * times
    for k, (y, x) in ((1, (10, 8)), (2, (10, 16))):
        mixed = 100 + overlays.STRENGTH * (255 * np.array(overlays.colour(k)) - 100)
        np.testing.assert_allclose(made[y * times + 8, x * times + 8], mixed, atol=1.5)
    assert (made[2 * times, 27 * times] == 100).all()
    edge = made[10 * times + 8, 12 * times - 1 : 12 * times + 1]  # a line between the two
    wanted = [255 * np.array(overlays.colour(k)) for k in (1, 2)]
    np.testing.assert_allclose(edge, wanted, atol=1.5)
    assert (made[20 * times :] != 255).any()  # the legend


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return launched.write_images(tmp_path_factory.mktemp('images'), {'train': 3})


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    return predicting.photos(tmp_path_factory.mktemp('photos'))


@pytest.mark.slow
@pytest.mark.parametrize('masks', ['semantic', 'instances'])
def test_a_run_of_masks_prints_and_draws(masks, folder, photos, tmp_path, capsys):
    coco = pytest.importorskip('pycocotools.mask')
    objective = dict(name='masks', queries=5, query_blocks=1, points=20)
    run = predicting.a_run(tmp_path / 'run', tiny_segment, objective, folder)
    out = dict(out=str(tmp_path / 'out'), masks=masks, threshold=0.05)
    rows = predicting.predicted(capsys, run, photos, **out)
    assert [(row['height'], row['width']) for row in rows] == [(40, 60), (90, 30), (16, 16)]
    assert [row['image'] for row in rows] == list(map(str, photos))
    for row, path in zip(rows, photos, strict=True):
        found = row['classes' if masks == 'semantic' else 'objects']
        covered = np.array([coco.decode(one['segmentation']) for one in found])
        assert {one['name'] for one in found} <= {'dark', 'bright'} and len(found)
        if masks == 'semantic':
            assert (covered.sum(0) == 1).all()
            np.testing.assert_allclose([one['share'] for one in found], covered.mean((1, 2)))
        else:
            boxes = [coco.toBbox(one['segmentation']).tolist() for one in found]
            assert boxes == [one['box'] for one in found]
        assert Image.open(tmp_path / 'out' / f'{path.stem}.png').size[0] >= 240
    with pytest.raises(UserError, match=r'0\.png exists'):
        predicting.predicted(capsys, run, photos, **out)


def test_a_run_of_detection_prints_and_names_mistakes(folder, photos, tmp_path, capsys):
    run = predicting.a_run(tmp_path / 'run', tiny_detect, dict(name='detect', queries=5), folder)
    assert dense.is_dense(str(run))
    rows = predicting.predicted(capsys, run, photos, threshold=0.0)
    for row, size in zip(rows, ((40, 60), (90, 30), (16, 16)), strict=True):
        assert len(row['objects']) == 5 or size != (16, 16)  # others are padded
        for one in row['objects']:
            x, y, w, h = one['box']
            assert 0 <= x < x + w <= size[1] + 1e-4 and 0 <= y < y + h <= size[0] + 1e-4
            assert one['name'] in ('small', 'large') and 0 < one['score'] < 1
    rows = predicting.predicted(capsys, run, photos, threshold=1.0)
    assert all(row['objects'] == [] for row in rows)
    place = places.Place((20, 40), (32, 32), np.float32([[0.8, 0]] * 2))
    centres = np.array([[0.5, 0.9, 0.2, 0.1], [0.5, 0.2, 0.2, 0.1]])
    outputs = {'logits': np.zeros((2, 3)), 'boxes': centres}
    found = dense.finder(str(run), threshold=0.1).find(outputs, place)  # one is in the padding
    np.testing.assert_allclose(found.boxes, [[16, 6, 8, 4]], atol=1e-4)
    for given, words in (
        (dict(masks='instances'), 'is for mask classifiers, and .* is none'),
        (dict(out='x.jpg'), '--out=x.jpg: name a local .png file'),
        (dict(out=str(tmp_path / 'a.png')), 'a folder for several'),
    ):
        with pytest.raises(UserError, match=words):
            predicting.predicted(capsys, run, photos, **given)


@pytest.mark.slow
def test_the_command_prints_json_and_ends_with_status_2_for_mistakes(folder, photos, tmp_path):
    run = predicting.a_run(tmp_path / 'run', tiny_segment, dict(name='segment'), folder)
    arguments = f'--checkpoint={run}', *photos
    status, out, err = launched.run('predict', *arguments, '--json', f'--out={tmp_path}/out')
    assert status == 0, err
    assert [set(json.loads(line)) for line in out.splitlines()] == [
        {'image', 'width', 'height', 'classes'}
    ] * 3
    status, out, err = launched.run('predict', *arguments, '--masks=instances')
    assert status == 2 and not out and err.count('\n') == 1 and 'mask classifiers' in err
