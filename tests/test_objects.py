"""Boxes, classes and masks of objects: formats, and faults that are named."""

import json

import numpy as np
import pytest
import scenes
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from vit_jax.data import images, pipeline
from vit_jax.data.tasks import detect
from vit_jax.errors import UserError

SQUARE = scenes.rectangle((1, 1, 4, 4))
OBJECT = dict(boxes=[[1, 1, 3, 3]], labels=[2], crowd=[False], segmentation=[SQUARE], ids=[70])


@pytest.mark.parametrize('change, words', [
    (dict(boxes=[[1, 1, 0, 3]]), 'annotation 70 has a box without area in the image'),
    (dict(boxes=[[9, 1, 3, 3]]), 'annotation 70 has a box without area in the image'),
    (dict(boxes=[[1, 1, -1, 3]]), 'annotation 70 has a box without area in the image'),
    (dict(boxes=[[1, 1, np.nan, 3]]), 'annotation 70 has a box that is not finite'),
    (dict(boxes=[[1, 1, np.inf, 3]]), 'annotation 70 has a box that is not finite'),
    (dict(boxes=['here']), 'its boxes are not numbers'),
    (dict(boxes=[]), 'it has 0 boxes, 1 labels and 1 crowd'),
    (dict(labels=[5]), 'annotation 70 has a class that is none of the 5'),
    (dict(labels=[-1]), 'annotation 70 has a class that is none of the 5'),
    (dict(segmentation=[scenes.rectangle((9, 1, 12, 4))]), 'annotation 70: its polygon is outside'),
    (dict(segmentation=[scenes.rectangle((1, -3, 4, 0))]), 'annotation 70: its polygon is outside'),
    (dict(segmentation=[scenes.rectangle((1, 1, 4, 13))]), 'annotation 70: its polygon leaves the'),
    (dict(segmentation=[scenes.rectangle((-9, 1, 4, 4))]), 'annotation 70: its polygon leaves the'),
    (dict(segmentation=[[[1, 1, np.nan, 4, 4, 4]]]), 'annotation 70: its polygon is not finite'),
    (dict(segmentation=[[[1, 1, 4, 4]]]), 'annotation 70: it has no polygon of three points'),
    (dict(segmentation=[[]]), 'annotation 70: it has no polygon of three points'),
    (dict(segmentation=[None]), 'annotation 70: its segmentation is neither polygons nor'),
    (dict(segmentation=[]), 'it has 0 segmentations of 1 annotations'),
    (dict(segmentation=[{'size': [6, 5], 'counts': [30]}]), 'its mask has 5 x 6 pixels, the image'),
    (dict(segmentation=[{'size': [6, 8], 'counts': [3, 90]}]), 'its runs have 93 pixels, not 48'),
    (dict(segmentation=[{'size': [6, 8], 'counts': [-3, 51]}]), 'annotation 70: its segmentation'),
    (dict(segmentation=[{'size': [6, 8], 'counts': '11'}]), 'its runs have 2 pixels, not 48'),
    (dict(segmentation=[{'size': [6, 8], 'counts': 'oo'}]), 'annotation 70: its segmentation'),
    (dict(segmentation=scenes.png(np.zeros((6, 8), np.uint8))), 'annotation 70 has no pixel in'),
    (dict(segmentation=scenes.png(np.zeros((8, 6), np.uint8))), 'it has 6 x 8 pixels, the image'),
])  # fmt: skip
def test_an_annotation_that_cannot_be_right_is_named(change, words):
    record = dict(image=scenes.png(np.zeros((6, 8, 3), np.uint8)), **OBJECT)
    task = detect.detect(scenes.source(record), view='fit', image_size=8, masks=True)
    assert task.read(record, np.random.default_rng(0))['masks'].sum() == 9
    with pytest.raises(images.Unreadable) as e:
        task.read(record | change, np.random.default_rng(0))
    assert words in str(e.value)
    crowded = record | change | dict(crowd=[True])
    if len(crowded['boxes']) == len(crowded['segmentation']) == 1 and 'here' not in words:
        if 'not numbers' not in words:  # of a crowd nothing is read
            made = task.read(crowded, np.random.default_rng(0))
            assert (made['labels'] == -1).all() and not made['masks'].any()


def test_faults_count_against_the_tolerance():
    good = dict(image=scenes.png(np.zeros((6, 8, 3), np.uint8)), **OBJECT)
    source = scenes.source(good, good | dict(labels=[9]), good)
    task = detect.detect(source, view='fit', image_size=8)
    (batch,) = pipeline.examples(source, task, batch_size=3, threads=1, tolerance=0.5)
    assert batch['mask'].tolist() == [1, 0, 1] and (batch['labels'][1] == -1).all()
    with pytest.raises(UserError, match='scene 1: annotation 70 has a class that is none of the 5'):
        list(pipeline.examples(source, task, batch_size=3, threads=1))


def test_more_objects_than_there_is_room_for_are_refused_and_not_dropped():
    record = dict(
        image=scenes.png(np.zeros((6, 8, 3), np.uint8)), boxes=[[1, 1, 3, 3]] * 4, labels=[0] * 4
    )
    source = scenes.source(record)
    tasks = [detect.detect(source, view='fit', image_size=8, most=m, crowd=None) for m in (4, 3)]
    made = tasks[0].read(record, np.random.default_rng(0))
    assert made['labels'].tolist() == [0] * 4 and made['boxes'].shape == (4, 4)
    with pytest.raises(images.Unreadable, match='it shows 4 objects, above data.most=3'):
        tasks[1].read(record, np.random.default_rng(0))


@pytest.mark.parametrize('form, boxes', [
    ('xywh', [[2, 1, 4, 2]]), ('xyxy', [[2, 1, 6, 3]]), ('yxyx', [[0.25, 0.25, 0.75, 0.75]]),
])
def test_boxes_of_each_format_are_shares_of_the_canvas(form, boxes):
    """Of 8 x 4 pixels in the upper left of 16 x 16, twice as large; one beyond is clipped."""
    record = dict(image=scenes.png(np.zeros((4, 8, 3), np.uint8)), boxes=boxes, labels=[1])
    task = detect.detect(
        scenes.source(record), view='fit', image_size=16, crowd=None, box_format=form, most=2
    )
    made = task.read(record, np.random.default_rng(0))
    assert made['boxes'].dtype == np.float32 and made['labels'].dtype == np.int32
    np.testing.assert_allclose(made['boxes'], [[0.25, 0.125, 0.75, 0.375], [0, 0, 0, 0]])
    assert made['labels'].tolist() == [1, -1]
    wide = record | dict(boxes=[[-50, -50, 100, 100]])
    task = detect.detect(
        scenes.source(wide), view='fit', image_size=16, crowd=None, box_format='xyxy', most=1
    )
    np.testing.assert_allclose(task.read(wide, None)['boxes'], [[0, 0, 1, 0.5]])


def test_what_leaves_the_image_is_cut_off():
    record = dict(image=scenes.png(np.zeros((6, 8, 3), np.uint8)), labels=[0], crowd=[0])
    box = (5, -3, 11, 4)
    record |= dict(boxes=[[5, -3, 6, 7]], segmentation=[scenes.rectangle(box)])
    task = detect.detect(scenes.source(record), view='fit', image_size=(6, 8), masks=True, most=1)
    made = task.read(record, None)
    expected = np.zeros((6, 8), np.uint8)
    expected[:4, 5:] = 1
    np.testing.assert_array_equal(made['masks'][0], expected)
    np.testing.assert_allclose(made['boxes'], [[5 / 8, 0, 1, 4 / 6]])


def test_masks_of_polygons_and_run_lengths_are_those_of_an_independent_rasteriser():
    """Polygons: the pixels whose centre is inside, but for those that an edge passes through."""
    from matplotlib.path import Path

    from vit_jax.data import annotations

    rng, shape = np.random.default_rng(0), (40, 50)
    y, x = np.mgrid[:40, :50] + 0.5
    for _ in range(20):
        points = rng.uniform(0, 1, (5, 2)) * [50, 40]
        points = points[np.argsort(np.arctan2(*(points - points.mean(0)).T))]
        mask = annotations.decode([points.ravel().tolist()], shape)
        assert mask.dtype == np.uint8 and mask.shape == shape
        paths = [Path(points).contains_points(
            np.stack([x.ravel(), y.ravel()], 1), radius=r
        ).reshape(shape) for r in (-0.8, 0.8)]  # fmt: skip
        inner, outer = np.logical_and(*paths), np.logical_or(*paths)
        assert (mask[inner] == 1).all() and (mask[~outer] == 0).all() and inner.sum() > 5
        runs = coco.encode(np.asfortranarray(mask))
        flat = np.r_[0, mask.T.ravel(), 1 - mask[-1, -1]]
        plain = np.diff(np.flatnonzero(np.diff(flat)), prepend=0).tolist()
        for counts in (runs['counts'], runs['counts'].decode(), plain):
            size = list(shape)
            np.testing.assert_array_equal(
                annotations.decode(dict(size=size, counts=counts), shape), mask
            )


def test_an_instance_map_gives_the_masks_of_objects_by_number():
    instances = np.zeros((6, 8), np.uint8)
    instances[1:3, 1:3], instances[4:6, 4:8], instances[3, 3] = 2, 1, 3
    record = dict(
        image=scenes.png(np.zeros((6, 8, 3), np.uint8)), labels=[4, 3, 0],
        boxes=[[4, 4, 4, 2], [1, 1, 2, 2], [3, 3, 1, 1]], crowd=[0, 0, 1],
        segmentation=scenes.png(instances),
    )  # fmt: skip
    task = detect.detect(scenes.source(record), view='fit', image_size=(6, 8), masks=True, most=3)
    made = task.read(record, np.random.default_rng(0))
    assert made['labels'].tolist() == [4, 3, -1]
    np.testing.assert_array_equal(made['masks'], [instances == 1, instances == 2, instances < 0])


def test_fields_are_found_by_paths():
    objects = dict(bbox=[[1, 1, 4, 4]], category=[3])
    image = scenes.png(np.zeros((6, 8, 3), np.uint8))
    for record, start in (
        (dict(image=image, objects=objects), 'objects'),
        (dict(image=image, json=json.dumps(dict(a=objects)).encode()), 'json/a'),
    ):
        names_of = dict(boxes=f'{start}/bbox', labels=f'{start}/category', crowd=None)
        source = scenes.source(record)
        task = detect.detect(source, view='fit', image_size=8, **names_of)
        assert task.read(record, None)['labels'][:2].tolist() == [3, -1]
        wrong = names_of | dict(boxes=f'{start}/x')
        task = detect.detect(source, view='fit', image_size=8, **wrong)
        with pytest.raises(UserError, match=f'field .* has no {start}/x'):
            task.read(record, None)


NUMBERS = st.one_of(st.integers(-2, 9), st.floats(width=16), st.none(), st.text('1a'))
JUNK = st.recursive(
    NUMBERS, lambda inner: st.one_of(
        st.lists(inner, max_size=8), st.dictionaries(st.sampled_from(['size', 'counts']), inner)
    ), max_leaves=20,
)  # fmt: skip
PLAUSIBLE = st.lists(st.one_of(
    st.lists(st.lists(st.integers(0, 8), min_size=6, max_size=8), max_size=2),
    st.builds(dict, size=st.just([6, 8]), counts=st.one_of(
        st.lists(st.integers(-9, 60), max_size=4), st.text('0123:;<OPQoz', max_size=6)
    )),
), min_size=1, max_size=2)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(['boxes', 'labels', 'crowd', 'ids', 'segmentation']), JUNK | PLAUSIBLE,
    st.booleans(),
)  # fmt: skip
def test_whatever_an_annotation_holds_is_read_or_refused(name, value, as_json):
    """Files are untrusted: no other exception, and no mask of pixels that nobody named."""
    record = dict(image=scenes.png(np.zeros((6, 8, 3), np.uint8)), **OBJECT)
    record[name] = json.dumps(value).encode() if as_json else value
    task = detect.detect(scenes.source(record), view='fit', image_size=(6, 8), masks=True, most=3)
    try:
        made = task.read(record, None)
    except UserError as e:
        assert '\n' not in str(e)
        return
    again = task.read(record, None)
    for key in made:
        np.testing.assert_array_equal(made[key], again[key])
    assert made['masks'].max() <= 1 and np.isfinite(made['boxes']).all()
