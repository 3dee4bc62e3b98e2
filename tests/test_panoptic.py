"""Panoptic segments: files of COCO and others, what is wrong in them, and what is trained on."""

import json

import numpy as np
import pytest
import scenes

from vit_jax.data import images, overlays, pipeline, sources
from vit_jax.data.tasks import panoptic
from vit_jax.errors import UserError
from vit_jax.objectives import Examples, mask_losses, masks

IMAGE = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
IDS = np.zeros((6, 8), np.uint32)
IDS[1:4, 2:5], IDS[4:, 6:], IDS[0] = 70_000, 300, 9
SETTINGS = dict(view='fit', image_size=(6, 8), most=4)


def rgb(ids):
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)


def coco(root, ids=IDS, change=None, beside=False, **own):
    """A folder of COCO's panoptic files: a thing, stuff and a crowd; an image without segments."""
    segments = [
        {'id': 300, 'category_id': 7, 'iscrowd': 0}, {'id': 70_000, 'category_id': 4, 'iscrowd': 0},
        {'id': 9, 'category_id': 4, 'iscrowd': 1},
    ]  # fmt: skip
    for segment in segments:
        segment.update((change or {}).get(segment['id'], {}))
    content = {
        'images': [{'id': 1, 'file_name': 'a.png'}, {'id': 2, 'file_name': 'b.png'}],
        'categories': [
            {'id': 7, 'name': 'sky', 'isthing': 0}, {'id': 4, 'name': 'ant', 'isthing': 1},
        ],
        'annotations': [
            {'image_id': 2, 'file_name': 'b.png', 'segments_info': []},
            {'image_id': 1, 'file_name': 'a.png', 'segments_info': segments},
        ],
    }  # fmt: skip
    files = {
        'val2017/a.png': scenes.png(IMAGE), 'val2017/b.png': scenes.png(IMAGE),
        'annotations/panoptic_val2017.json': json.dumps(content | own).encode(),
        'annotations/panoptic_val2017/a.png': scenes.png(rgb(ids)),
        'annotations/panoptic_val2017/b.png': scenes.png(rgb(np.zeros((6, 8), int))),
    }  # fmt: skip
    if beside:
        instances = {'images': content['images'], 'categories': [], 'annotations': []}
        files['annotations/instances_val2017.json'] = json.dumps(instances).encode()
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return str(root)


def batch_of(source, tolerance=0.0, **settings):
    task = panoptic.panoptic(source, **SETTINGS | settings)
    return next(pipeline.examples(source, task, batch_size=2, threads=1, tolerance=tolerance))


def test_coco_has_things_and_stuff_and_void_where_crowds_are(tmp_path):
    source = sources.load(name=coco(tmp_path), split='val')
    assert source.classes == ('ant', 'sky') and source.stuff == ('sky',)
    batch = batch_of(source)
    expected = np.full((6, 8), 255)
    expected[IDS == 300], expected[IDS == 70_000] = 0, 1
    np.testing.assert_array_equal(batch['segments'][0], expected)
    assert batch['labels'].tolist() == [[1, 0, -1, -1], [-1] * 4]
    assert (batch['segments'][1] == 255).all()
    painted = overlays.picture({key: x[0] for key, x in batch.items()}, source.classes).image
    assert (painted != IMAGE).any(2).mean() > 0.9
    half = sources.load(name=str(tmp_path), split='val[:50%]', labels='by_number')
    assert half.stuff == ('sky',) and len(half) == 1


def test_panoptic_files_beside_instances_are_splits_of_their_own(tmp_path):
    root = coco(tmp_path, beside=True)
    assert set(sources.splits_of(root)) == {'val', 'panoptic_val'}
    assert 'segments' in sources.load(name=root, split='panoptic_val').records[0]
    assert 'boxes' in sources.load(name=root, split='val').records[0]
    with pytest.raises(UserError, match="no split 'train'; it has val, panoptic_val"):
        sources.load(name=root, split='train')


@pytest.mark.parametrize('change, words', [
    (dict(ids=np.where(IDS == 9, 123_456, IDS)), 'it has the id 123456, which no segment has'),
    (dict(ids=np.where(IDS == 300, 0, IDS)), 'segment 300 has no pixel'),
    (dict(ids=IDS[:5]), 'it has 8 x 5 pixels, the image 8 x 6'),
    (dict(change={9: {'category_id': 5}}), 'segment 9 has a class that is none of the 2'),
    (dict(change={9: {'id': 300}}), 'two segments have the same id'),
])  # fmt: skip
def test_a_fault_of_a_segment_costs_one_example(tmp_path, change, words):
    source = sources.load(name=coco(tmp_path, **change), split='val')
    assert batch_of(source, tolerance=0.5)['mask'].tolist() == [0, 1]
    with pytest.raises(UserError, match=f'a.png: (unreadable segments: )?{words}'):
        batch_of(source)


@pytest.mark.parametrize('change, words', [
    (dict(annotations=[]), 'image 1 has no annotation'),
    (dict(images=[{'id': 1, 'file_name': '../a.png'}]), "'../a.png' is not a path below"),
    (dict(categories=[{'id': 7}]), "no field 'name'"),
])  # fmt: skip
def test_other_jsons_are_named(tmp_path, change, words):
    with pytest.raises(UserError, match=f'val2017.json is not a valid panoptic json .*{words}'):
        sources.load(name=coco(tmp_path, **change), split='val')


def test_ids_that_count_objects_and_a_background():
    """As fashion_scenes and Pascal VOC have them."""
    ids = np.zeros((6, 8), np.uint8)
    ids[2:4, 1:5], ids[3, 4:6], ids[5] = 1, 2, 255
    record = {'image': scenes.png(IMAGE), 'instances': scenes.png(ids), 'labels': [3, 1]}
    given = dict(segments='instances', crowd=None, ids=None)
    source = scenes.source(record)
    task = panoptic.panoptic(source, zero='background', ignored=(255,), **SETTINGS | given)
    (one,) = pipeline.examples(source, task, batch_size=1, threads=1)
    np.testing.assert_array_equal(one['segments'][0], np.choose(ids % 251, [2, 0, 1, 0, 255]))
    assert one['labels'].tolist() == [[4, 2, 0, -1]]
    assert task.names['classes'] == ('background', 'a', 'b', 'c', 'd', 'e')
    void = panoptic.panoptic(source, ignored=(255,), **SETTINGS | given).read(record, None)
    np.testing.assert_array_equal(void['segments'], np.choose(ids % 251, [255, 0, 1, 0, 255]))
    with pytest.raises(images.Unreadable, match='it has the id 255, which no segment has'):
        panoptic.panoptic(source, **SETTINGS | given).read(record, None)
    with pytest.raises(images.Unreadable, match='it shows 2 segments, above data.most=1'):
        given |= dict(most=1, ignored=(255,))
        panoptic.panoptic(source, **SETTINGS | given).read(record, None)


def test_segments_move_with_the_image_and_those_that_leave_it_are_gone(tmp_path):
    source = sources.load(name=coco(tmp_path), split='val')
    record, rng = source.records[0], np.random.default_rng(0)
    task = panoptic.panoptic(
        source, **SETTINGS | dict(view='large_scale_jitter', image_size=(12, 16))
    )
    counts = set()
    for _ in range(20):
        one = task.read(record, rng)
        numbers = np.unique(one['segments'][one['segments'] < 255])
        assert numbers.tolist() == list(range((one['labels'] >= 0).sum()))
        counts.add(len(numbers))
    assert len(counts) > 1


def test_targets_of_segments_are_those_of_their_masks():
    rng = np.random.default_rng(0)
    numbers = rng.choice(np.uint8([0, 1, 2, 255]), (3, 8, 12))
    labels = np.array([[2, 0, 1], [1, 1, -1], [0, 1, 2]], np.int32)
    batch = dict(labels=labels, mask=np.float32([1, 1, 0]))
    each = dict(segments=numbers, masks=np.uint8(numbers[:, None] == np.arange(3)[:, None, None]))
    one, other = (
        masks.targets_of(batch | {name: values}, 3, 3) for name, values in each.items()
    )
    assert one.labels.tolist() == other.labels.tolist() == [*labels[:2].tolist(), [-1] * 3]
    points = rng.random((3, 3, 40, 2), np.float32)
    inside = mask_losses.targets_at(one, points)
    np.testing.assert_array_equal(inside, mask_losses.targets_at(other, points))
    assert 0 < inside.mean() < 1
    with pytest.raises(UserError, match='needs `labels` beside `segments`'):
        masks.check_masks(Examples({'segments': numbers}), 3, 5, None)
