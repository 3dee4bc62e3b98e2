"""Average precision: against pycocotools on hand-made json, and NumPy."""

import contextlib
import io
import json
import sys

import jax
import numpy as np
import pytest
import scenes
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import special

from vit_jax import sharding
from vit_jax.errors import UserError
from vit_jax.evaluators import Subject, average_precision, detect

CLASSES, IDS = ('ant', 'bee', 'cow'), (3, 7, 40)
VIEW, QUERIES, CELLS = (32, 48), 16, (8, 12)
SHAPES = [(40, 60), (61, 37), (20, 75), (32, 48), (64, 80), (50, 50), (9, 70), (64, 20)]
COUNTS = [4, 3, 0, 5, 2, 1, 2, 3]
NAMES = ('ap', 'ap50', 'ap75', 'ap_small', 'ap_medium', 'ap_large')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Images of many sizes: one without objects, one of a crowd alone, crowds beside objects."""
    root, rng = tmp_path_factory.mktemp('set'), np.random.default_rng(0)
    (root / 'val').mkdir()
    images, annotations = [], []
    for i, (shape, count) in enumerate(zip(SHAPES, COUNTS, strict=True)):
        picture = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        (root / 'val' / f'{i}.png').write_bytes(scenes.png(picture))
        images.append({
            'id': 90 + i, 'file_name': f'{i}.png', 'height': shape[0], 'width': shape[1]
        })
        boxes, masks = scenes.objects(shape, rng, max(count, 1))
        for k, (x0, y0, x1, y1) in enumerate(boxes[:count].tolist()):
            crowd = i == 5 or (k == 0 and i in (0, 3))
            runs = np.diff(np.flatnonzero(np.diff(masks[k].T.ravel(), prepend=2, append=2)))
            runs = ([0] if masks[k][0, 0] else []) + runs.tolist()
            annotations.append({
                'id': 500 + len(annotations), 'image_id': 90 + i, 'iscrowd': int(crowd),
                'category_id': int(rng.choice(IDS)), 'bbox': [x0, y0, x1 - x0, y1 - y0],
                'area': float((x1 - x0) * (y1 - y0) * rng.uniform(0.3, 1)),
                'segmentation': {'size': list(shape), 'counts': runs} if crowd
                else scenes.rectangle((x0, y0, x1, y1)),
            })  # fmt: skip
    categories = [{'id': i, 'name': name} for i, name in zip(IDS, CLASSES, strict=True)]
    content = {'images': images, 'annotations': annotations, 'categories': categories}
    (root / 'val.json').write_text(json.dumps(content))
    return root, content


def scaled(shape):
    """Size of an image in the view."""
    scale = min(VIEW[0] / shape[0], VIEW[1] / shape[1])
    return np.array([round(n * scale) for n in shape])


def true_objects(content, i):
    """(corners in pixels [n, 4], classes [n]) of image i."""
    found = [one for one in content['annotations'] if one['image_id'] == 90 + i]
    boxes = np.array([one['bbox'] for one in found], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes, [IDS.index(one['category_id']) for one in found]


def predictions(content, noise, seed=1):
    """Boxes near the true ones of all images, twice, and a half of each; some leave the image."""
    rng, logits, boxes = np.random.default_rng(seed), [], []
    for i, shape in enumerate(SHAPES):
        corners, labels = true_objects(content, i)
        corners = (corners * np.tile((scaled(shape) / shape)[::-1], 2)).reshape(-1, 2, 2)
        random = np.sort(rng.uniform(-10, 60, (QUERIES, 2, 2)), axis=1)
        halves = np.stack([corners[:, 0], corners.mean(1)], axis=1)  # within a crowd: no mistake
        near = np.concatenate([corners, corners, halves] if noise else [corners])
        own = np.concatenate([near + rng.normal(0, noise, near.shape), random])[:QUERIES]
        own = np.sort(own, axis=1) / VIEW[::-1]
        boxes.append(np.concatenate([own.mean(1), own[:, 1] - own[:, 0]], axis=1))
        own = rng.normal(0, 1, (QUERIES, len(CLASSES) + 1)) * (noise > 0)
        own[len(near) :, -1] += 2 if noise else 50
        own[np.arange(len(near)), (labels * 3)[: len(near)]] += 3 if noise else 50
        logits.append(own)
    return {'logits': np.float32(logits), 'boxes': np.float32(boxes)}


def predict(params, batch):
    """The predictions that are stored for these images."""
    return {name: values[batch['id']] for name, values in params.items()}


def evaluation(root, params, devices=1, batch_size=3, classes=CLASSES, **settings):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    outputs = {
        name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in params.items()
    }
    subject = Subject(predict, mesh, outputs, {'classes': classes}, {})
    same = dict(source=dict(name=str(root), split='val'), image_size=VIEW)
    return detect.Detect(subject, batch_size=batch_size, **same | settings)


def pycocotools(content, found, kind, most=100):
    """{metric: value} of detections as dicts of COCO's results."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(json.dumps(content))
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(found), kind)
        judge.params.maxDets = [1, 10, most]
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    each = judge.eval['precision'][:, :, :, 0, 2]
    made = dict(zip(NAMES, judge.stats, strict=False)) | {'ar': judge.stats[8]}
    made |= {'ap': each[each > -1].mean()}  # pycocotools has it of 100 detections alone
    made |= {f'ap/{name}': each[:, :, k].mean() for k, name in enumerate(CLASSES)}
    return {name: value for name, value in made.items() if value > -1}


def boxes_of(params):
    """COCO's results of predicted boxes, by float64."""
    made = []
    for i, shape in enumerate(SHAPES):
        shares = special.softmax(params['logits'][i].astype(float), axis=1)[:, :-1]
        factor = np.tile((shape / scaled(shape) * VIEW)[::-1], 2)
        for share, (x, y, w, h) in zip(shares, params['boxes'][i] * factor, strict=True):
            x0, y0 = np.clip([x - w / 2, y - h / 2], 0, shape[::-1])
            x1, y1 = np.clip([x + w / 2, y + h / 2], 0, shape[::-1])
            made.append(dict(
                image_id=90 + i, category_id=IDS[share.argmax()], score=share.max(),
                bbox=[x0, y0, x1 - x0, y1 - y0],
            ))  # fmt: skip
    return made


@pytest.mark.parametrize('noise', [0.5, 3.0])
def test_boxes_have_the_precision_of_pycocotools(folder, noise, capsys):
    root, content = folder
    params = predictions(content, noise)
    found = evaluation(root, params, by_class=True)(params)
    expected = pycocotools(content, boxes_of(params), 'bbox')
    assert found == pytest.approx(expected | {'examples': len(SHAPES)}, abs=1e-6)
    assert 0.03 < found['ap'] < 0.95 and 'ap_large' not in found and not capsys.readouterr().out


def test_perfect_boxes_have_precision_1_and_boxes_of_the_view_do_not(folder):
    root, content = folder
    params = predictions(content, 0.0)
    found = evaluation(root, params)(params)
    assert found == pytest.approx(dict.fromkeys(found, 1.0) | {'examples': len(SHAPES)})
    assert evaluation(root, params, view='resize')(params)['ap'] < 0.5
    centred = dict(name='fit', place='centre')
    assert evaluation(root, params, view=centred)(params)['ap'] < 0.5
    offsets = np.array([(VIEW - scaled(shape)) // 2 / VIEW for shape in SHAPES])
    params['boxes'][..., :2] += offsets[:, None, ::-1]
    assert evaluation(root, params, view=centred)(params)['ap'] == pytest.approx(1)


def test_classes_of_the_same_name_have_metrics_of_their_own(folder):
    root, content = folder
    params = predictions(content, 0.5)
    by_name = evaluation(root, params, by_class=True)(params)
    source = dict(name=str(root), split='val', labels='by_number')
    classes, other = ('ant', 'bee', 'ant'), ('ant (0)', 'bee', 'ant (2)')
    found = evaluation(root, params, classes=classes, source=source, by_class=True)
    measured = found(params)
    assert measured.keys() - {'examples'} <= found.metrics.keys()
    assert [measured[f'ap/{name}'] for name in other] == [by_name[f'ap/{x}'] for x in CLASSES]


def masks_and_logits(content, seed=2):
    """Logits of masks near the true boxes; one is empty everywhere."""
    rng, boxes = np.random.default_rng(seed), predictions(content, 1.5)
    centred = boxes['boxes'][:, :, None, None] * np.tile(CELLS[::-1], 2)
    y, x = np.mgrid[: CELLS[0], : CELLS[1]] + 0.5
    dx, dy = np.abs(x - centred[..., 0]), np.abs(y - centred[..., 1])
    inside = np.minimum(centred[..., 2] / 2 - dx, centred[..., 3] / 2 - dy)
    masks = 2 * inside + rng.normal(0, 0.3, inside.shape)
    masks[0, 0] = -5
    return {'logits': boxes['logits'], 'masks': np.float32(masks)}


def masks_of(params, most):
    """COCO's results of predicted masks as EoMT has them: PyTorch interpolates, twice."""
    torch = pytest.importorskip('torch')
    resized = torch.nn.functional.interpolate
    made = []
    for i, shape in enumerate(SHAPES):
        shares = special.softmax(params['logits'][i].astype(float), axis=1)[:, :-1]
        height, width = scaled(shape)
        view = resized(torch.tensor(params['masks'][i][None]), VIEW, mode='bilinear')
        own = resized(view[..., :height, :width], shape, mode='bilinear')[0].double().numpy()
        for place in np.argsort(-shares.ravel())[:most]:
            query, label = divmod(place, len(CLASSES))
            mask = own[query] > 0
            mean = (special.expit(own[query]) * mask).sum() / (mask.sum() + 1e-6)
            made.append(dict(
                image_id=90 + i, category_id=IDS[label], score=shares.ravel()[place] * mean,
                segmentation=coco_masks.encode(np.asfortranarray(mask.astype(np.uint8))),
            ))  # fmt: skip
    return made


def test_masks_have_the_precision_of_pycocotools(folder):
    root, content = folder
    params = masks_and_logits(content)
    settings = dict(masks=True, most=15, canvas=(64, 80))
    found = evaluation(root, params, by_class=True, **settings)(params)
    results = masks_of(params, 15)
    expected = {
        f'mask_{name}': value for name, value in pycocotools(content, results, 'segm', 15).items()
    }
    around = [
        dict(one, bbox=coco_masks.toBbox(one['segmentation']).tolist()) for one in results
    ]
    for one in around:
        del one['segmentation']
    expected |= pycocotools(content, around, 'bbox', 15) | {'examples': len(SHAPES)}
    assert found == pytest.approx(expected, abs=1e-6)
    assert 0.05 < found['mask_ap'] < 0.95
    alone = evaluation(root, params, most=15, canvas=(64, 80))(params)  # boxes around masks
    assert alone == {name: value for name, value in found.items() if name in alone}


def test_each_image_counts_once_on_any_devices(folder):
    root, content = folder
    params = masks_and_logits(content)
    settings = dict(masks=True, canvas=(64, 80))
    one = evaluation(root, params, batch_size=8, **settings)(params)
    assert evaluation(root, params, devices=8, batch_size=16, **settings)(params) == one


def test_areas_without_annotated_ones_are_those_of_masks_or_boxes(folder):
    root, content = folder
    params = masks_and_logits(content)
    for masks in (False, True):
        settings = dict(masks=masks, canvas=(64, 80), areas=None)
        found = evaluation(root, params, **settings)(params)
        areas = [{'area': float(np.prod(one['bbox'][2:]))} for one in content['annotations']]
        pairs = zip(content['annotations'], areas, strict=True)
        changed = content | {'annotations': [one | area for one, area in pairs]}
        expected = pycocotools(changed, masks_of(params, 100), 'segm' if masks else 'bbox')
        start = 'mask_' if masks else ''
        for name in ('ap_small', 'ap_medium'):
            assert found[start + name] == pytest.approx(expected[name], abs=1e-6)


def numpy_precision(images, classes, threshold):
    """Mean over classes of the average precision at a threshold, for boxes without crowds."""
    each = []
    for label in range(classes):
        total, rows = 0, []
        for image in images:
            mine = image.boxes[image.labels == label]
            total, free = total + len(mine), np.ones(len(mine), bool)
            for k in np.argsort(-image.scores, kind='stable'):
                if image.found_labels[k] != label:
                    continue
                low = np.maximum(mine[:, :2], image.found_boxes[k, :2])
                high = np.minimum(mine.T[:2] + mine.T[2:], image.found_boxes[k, :2, None]
                                  + image.found_boxes[k, 2:, None]).T
                common = np.prod(np.maximum(high - low, 0), axis=1)
                union = mine[:, 2:].prod(1) + image.found_boxes[k, 2:].prod() - common
                iou = np.where(free, common / union, -1)
                hit = iou.size > 0 and iou.max() >= threshold
                free[iou.argmax() if hit else []] = False
                rows.append((-image.scores[k], hit))
        if total:
            hits = np.cumsum([hit for _, hit in sorted(rows, key=lambda row: row[0])])
            precision, recall = hits / np.arange(1, len(hits) + 1), hits / total
            each.append(np.mean([
                precision[recall >= r].max(initial=0) for r in np.linspace(0, 1, 101)
            ]))  # fmt: skip
    return np.mean(each)


def random_image(rng, objects, detections):
    def boxes(count):
        return np.concatenate([rng.uniform(0, 60, (count, 2)), rng.uniform(5, 40, (count, 2))], 1)

    true, labels = boxes(objects), rng.integers(0, 3, objects)
    found, own = boxes(detections), rng.integers(0, 3, detections)
    near = min(objects, detections)
    found[:near] = true[:near] + rng.normal(0, 2, (near, 4))
    own[: near // 2] = labels[: near // 2]
    crowd, areas = np.zeros(objects, bool), true[:, 2:].prod(1)
    return average_precision.Image(true, labels, crowd, areas, found, own, rng.random(detections))


def test_precision_of_boxes_is_that_of_numpy_and_0_without_detections():
    rng = np.random.default_rng(4)
    images = [random_image(rng, *rng.integers(0, 9, 2)) for _ in range(30)]
    found = average_precision.summary(average_precision.curves(images, 3, 100, masks=False))
    assert found['ap50'] == pytest.approx(numpy_precision(images, 3, 0.5))
    assert found['ap75'] == pytest.approx(numpy_precision(images, 3, 0.75))
    none = [image._replace(found_boxes=np.zeros((0, 4)), found_labels=np.zeros(0, int),
                           scores=np.zeros(0)) for image in images]  # fmt: skip
    nothing = average_precision.summary(average_precision.curves(none, 3, 100, masks=False))
    assert nothing['ap'] == nothing['ar'] == 0


def test_what_can_not_be_measured_is_refused(folder, monkeypatch):
    root, content = folder
    boxes, masks = predictions(content, 1.0), masks_and_logits(content)
    with pytest.raises(UserError, match='masks=True, and the objective predicts boxes alone'):
        evaluation(root, boxes, masks=True)
    with pytest.raises(UserError, match='of predicted masks it needs canvas'):
        evaluation(root, masks)
    with pytest.raises(UserError, match='this one predicts logits'):
        evaluation(root, {'logits': boxes['logits']})
    with pytest.raises(UserError, match='0.png: it has 4 objects, above most_objects=3'):
        evaluation(root, boxes, most_objects=3)(boxes)
    with pytest.raises(UserError, match='1.png: the image has 37 x 61 pixels, above canvas=80 x 6'):
        evaluation(root, masks, masks=True, canvas=(60, 80))(masks)
    with pytest.raises(UserError, match='no image of the data set has an object'):
        evaluation(root, boxes, crowd='ids')(boxes)
    monkeypatch.setitem(sys.modules, 'pycocotools.cocoeval', None)
    with pytest.raises(UserError, match='need pycocotools: pip install'):
        evaluation(root, boxes)
