"""Panoptic quality: against pixel by pixel rules written out, PyTorch's masks and cases by hand."""

import json

import jax
import numpy as np
import pytest
import scenes

from vit_jax import sharding
from vit_jax.errors import UserError
from vit_jax.evaluators import Subject, panoptic, panoptic_quality

CLASSES, IDS = ('ant', 'sky', 'bee', 'sea'), (2, 5, 6, 11)
STUFF = (1, 3)
VIEW, QUERIES, CELLS = (32, 48), 9, (8, 12)
SHAPES = [(40, 60), (61, 37), (20, 75), (32, 48), (64, 80), (9, 70)]


def rgb(ids):
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)


def a_map(shape, rng, segments, void):
    """Numbers of segments at blocks of an image, -1 where it is void."""
    grid = rng.integers(-void, segments, (5, 6)).clip(-1)
    rows, columns = (np.arange(n) * k // n for n, k in zip(shape, grid.shape, strict=True))
    return grid[rows][:, columns]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """COCO's panoptic files: crowds, void, and an image without segments; and what is in them."""
    root, rng = tmp_path_factory.mktemp('set'), np.random.default_rng(0)
    pictures = root / 'annotations' / 'panoptic_val2017'
    pictures.mkdir(parents=True)
    (root / 'val2017').mkdir()
    images, annotations, truth = [], [], []
    for i, shape in enumerate(SHAPES):
        numbers = np.full(shape, -1) if i == 5 else a_map(shape, rng, 6, 2)
        ids = rng.choice(2**24 - 1, 6, replace=False) + 1
        segments = []
        for k in np.unique(numbers[numbers >= 0]):
            segments.append(dict(
                id=int(ids[k]), category_id=int(rng.choice(IDS)), iscrowd=int(k == 0), bbox=[],
                area=int((numbers == k).sum()),
            ))  # fmt: skip
        picture = rgb(np.where(numbers < 0, 0, ids[numbers]))
        (pictures / f'{i}.png').write_bytes(scenes.png(picture))
        (root / 'val2017' / f'{i}.png').write_bytes(scenes.png(picture))
        images.append({'id': 30 + i, 'file_name': f'{i}.png'})
        annotations.append(
            {'image_id': 30 + i, 'file_name': f'{i}.png', 'segments_info': segments}
        )
        truth.append((np.where(numbers < 0, 0, ids[numbers]), segments))
    categories = [
        {'id': i, 'name': name, 'isthing': int(k not in STUFF)}
        for k, (i, name) in enumerate(zip(IDS, CLASSES, strict=True))
    ]
    content = {'images': images, 'annotations': annotations[::-1], 'categories': categories}
    (root / 'annotations' / 'panoptic_val2017.json').write_text(json.dumps(content))
    return root, truth


def scaled(shape):
    """Size of an image in the view."""
    scale = min(VIEW[0] / shape[0], VIEW[1] / shape[1])
    return tuple(round(n * scale) for n in shape)


def predictions(truth, seed=1):
    """Queries near the true segments, some twice, uncertain or of another class, and others."""
    rng = np.random.default_rng(seed)
    logits, masks = rng.normal(0, 1, (len(truth), QUERIES, 5)), []
    logits[:, -2:, -1] += 6
    for i, (ids, segments) in enumerate(truth):
        height, width = scaled(ids.shape)
        own = rng.normal(-2, 2, (QUERIES, *CELLS))
        y, x = (((np.arange(n) + 0.5) * size / n) for n, size in zip(CELLS, VIEW, strict=True))
        rows, columns = (
            (at * n / size).astype(int).clip(0, n - 1)
            for at, n, size in zip((y, x), ids.shape, (height, width), strict=True)
        )
        for k, one in enumerate(segments[: QUERIES - 2]):
            inside = ids[rows][:, columns] == one['id']
            own[k] = np.where(inside, 4, -4) + rng.normal(0, 0.5, CELLS)
            sure = 7 if k % 4 else 2
            logits[i, k, IDS.index(one['category_id']) if rng.random() < 0.8 else 0] += sure
        own[QUERIES - 3] = own[0] + rng.normal(0, 1, CELLS)  # twice
        logits[i, QUERIES - 3] = logits[i, 0] + rng.normal(0, 0.1, 5)
        masks.append(own)
    return {'logits': np.float32(logits), 'masks': np.float32(masks)}


def predict(params, batch):
    """The predictions that are stored for these images."""
    return {name: values[batch['id']] for name, values in params.items()}


def evaluation(root, params, devices=1, batch_size=4, **settings):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    outputs = {
        name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in params.items()
    }
    subject = Subject(predict, mesh, outputs, {'classes': CLASSES}, {})
    same = dict(source=dict(name=str(root), split='val'), image_size=VIEW, canvas=(64, 80))
    return panoptic.Panoptic(subject, batch_size=batch_size, **same | settings)


def segments_of(logits, masks, shape):
    """[(class, mask [H, W])] of queries as EoMT has them, whose masks PyTorch interpolates."""
    torch = pytest.importorskip('torch')
    resized, (height, width) = torch.nn.functional.interpolate, scaled(shape)
    view = resized(torch.tensor(masks[None]), VIEW, mode='bilinear')[..., :height, :width]
    maps = torch.sigmoid(resized(view, shape, mode='bilinear')[0]).numpy()
    shares = torch.softmax(torch.tensor(logits), dim=-1).numpy()
    kept = [
        q for q in range(QUERIES) if shares[q].argmax() < len(CLASSES) and shares[q].max() > 0.8
    ]
    found, places = [], {}
    if not kept:
        return found
    best = np.array([shares[q].max() * maps[q] for q in kept]).argmax(0)
    for k, q in enumerate(kept):
        own, won = maps[q] >= 0.5, best == k
        if not (own & won).any() or won.sum() / own.sum() < 0.8:
            continue
        label = int(shares[q].argmax())
        if label in places:
            found[places[label]] = label, found[places[label]][1] | (own & won)
            continue
        if label in STUFF:
            places[label] = len(found)
        found.append((label, own & won))
    return found


def counted(truth, found):
    """{class: [sum of IoU, matches, false positives, false negatives]}, mask by mask."""
    ids, segments = truth
    count = {k: [0.0, 0, 0, 0] for k in range(len(CLASSES))}
    void, used, missed = ids == 0, set(), []
    for one in segments:
        label, true, hit = IDS.index(one['category_id']), ids == one['id'], False
        for k, (own_label, mask) in enumerate(found):
            union = (true | mask) & ~(void & mask)
            iou = (true & mask).sum() / union.sum()
            if own_label == label and not one['iscrowd'] and iou > 0.5:
                count[label][0] += iou
                count[label][1] += 1
                used.add(k)
                hit = True
        if not hit and not one['iscrowd']:
            missed.append(label)
    for label in missed:
        count[label][3] += 1
    for k, (label, mask) in enumerate(found):
        crowds = [one['id'] for one in segments
                  if one['iscrowd'] and IDS.index(one['category_id']) == label]  # fmt: skip
        free = void | (ids == crowds[-1]) if crowds else void
        if k not in used and (mask & free).sum() / mask.sum() <= 0.5:
            count[label][2] += 1
    return count


def qualities(counts):
    """{metric: value} of the counts of all images."""
    each = {}
    for label in range(len(CLASSES)):
        iou, tp, fp, fn = np.sum([one[label] for one in counts], axis=0)
        if tp + fp + fn:
            share = tp / (tp + fp / 2 + fn / 2)
            each[label] = share * iou / max(tp, 1), iou / max(tp, 1), share
    found = {
        f'{name}/{CLASSES[label]}': value
        for label, own in each.items() for name, value in zip(('pq', 'sq', 'rq'), own, strict=True)
    }  # fmt: skip
    stuff = set(STUFF)
    groups = {'': each.keys(), '_things': each.keys() - stuff, '_stuff': each.keys() & stuff}
    for end, labels in groups.items():
        for k, name in enumerate(('pq', 'sq', 'rq')):
            found[name + end] = np.mean([each[label][k] for label in labels])
    return found


@pytest.mark.parametrize('seed', [1, 2])
def test_quality_is_that_of_masks_one_by_one(folder, seed):
    root, truth = folder
    params = predictions(truth, seed)
    found = evaluation(root, params, by_class=True)(params)
    made = [
        segments_of(logits, masks, ids.shape)
        for logits, masks, (ids, _) in zip(*params.values(), truth, strict=True)
    ]
    expected = qualities([counted(*pair) for pair in zip(truth, made, strict=True)])
    assert found == pytest.approx(expected | {'examples': len(SHAPES)}, abs=1e-9)
    assert 0.1 < found['pq'] < 0.9 and found['pq_things'] != found['pq_stuff']


def test_each_image_counts_once_on_any_devices(folder):
    root, truth = folder
    params = predictions(truth)
    one = evaluation(root, params, batch_size=6)(params)
    assert evaluation(root, params, devices=8, batch_size=16)(params) == one


def quality(truth, found, labels, own, crowd=()):
    """Tallies [4, 3] of a row of pixels: numbers of segments, -1 for void."""
    table = np.zeros((len(labels) + 1, len(own) + 1), int)
    np.add.at(table, (np.array(truth), np.array(found)), 1)  # -1 is the last row or column
    crowds = np.isin(np.arange(len(labels)), crowd)
    labels, own = np.array(labels, int), np.array(own, int)
    return panoptic_quality.tally(table, labels, crowds, own, 3).tolist()


def test_rules_by_hand():
    # 3 of 4 pixels; the fourth is void in the truth, and so no part of the union
    assert quality([0, 0, 0, -1], [0, 0, 0, 0], [1], [1])[0] == [0, 1, 0]
    # an IoU of exactly a half is no match
    half = quality([0, 0, -1, -1], [0, -1, -1, -1], [1], [1])
    assert half == [[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 1, 0]]
    # more than half of it is void: the prediction does not count; at exactly a half it does
    assert quality([-1, -1, 0], [0, 0, 0], [1], [2])[2] == [0, 0, 0]
    assert quality([-1, 0], [0, 0], [1], [2])[2] == [0, 0, 1]
    # a crowd is no miss, takes no match, and ignores predictions of its class alone
    assert quality([0, 0, 0], [0, 0, 0], [1], [1], crowd=[0]) == [[0, 0, 0]] * 4
    assert quality([0, 0, 0], [0, 0, 0], [1], [2], crowd=[0])[2] == [0, 0, 1]
    # the same pixels of another class: a miss and a false alarm
    assert quality([0, 0], [0, 0], [0], [1])[2:] == [[0, 1, 0], [1, 0, 0]]
    # an image without segments and without predictions
    assert quality([-1, -1], [-1, -1], [], []) == [[0, 0, 0]] * 4


def test_queries_of_stuff_are_one_segment_and_those_of_things_are_not():
    table = np.array([[4, 3, 0, 1], [0, 0, 6, 2]])  # true segment and void by three queries, void
    given = dict(won=np.array([4, 3, 8]), areas=np.array([5, 3, 10]), labels=np.array([2, 2, 0]))
    for stuff, expected in (({2}, [[7, 0, 1], [0, 6, 2]]), (set(), [[4, 3, 0, 1], [0, 0, 6, 2]])):
        own, labels = panoptic_quality.merged(table, stuff=stuff, overlap=0.8, **given)
        assert own.tolist() == expected and labels.tolist() == ([2, 0] if stuff else [2, 2, 0])
    own, labels = panoptic_quality.merged(table, stuff=(), overlap=0.81, **given)
    assert labels.tolist() == [2] and own.tolist() == [[3, 5], [0, 8]]


def test_what_can_not_be_measured_is_refused(folder):
    root, truth = folder
    params = predictions(truth)
    with pytest.raises(UserError, match='this one predicts logits'):
        evaluation(root, {'logits': params['logits']})
    with pytest.raises(UserError, match="evals.stuff: there is no class 'mud'"):
        evaluation(root, params, stuff=('sky', 'mud'))
    with pytest.raises(UserError, match='0.png: it has . segments, above most_segments=3'):
        evaluation(root, params, most_segments=3)(params)
    with pytest.raises(UserError, match='no image of the data set has a segment'):
        params['logits'][..., -1] = 50
        evaluation(root, params, crowd='ids')(params)
