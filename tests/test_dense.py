"""The tasks segment and detect: all that has a place moves together, and faults are named."""

import io
import json

import numpy as np
import pytest
import scenes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco
from scipy import ndimage

from vit_jax.data import distort, images, label_maps, pipeline, sources
from vit_jax.data.readers import names
from vit_jax.data.tasks import detect, make_view, segment
from vit_jax.errors import UserError

VIEWS = (
    'fit', 'scale_crop', 'large_scale_jitter', 'resize', 'inception',
    dict(name='fit', place='centre'), dict(name='affine', degrees=20.0, flip=True),
    dict(name='shift', pixels=4, flip=True),
)  # fmt: skip
SIDES = st.integers(30, 80)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(VIEWS), st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES), st.integers(0, 99))
def test_all_that_has_a_place_moves_together(view, shape, size, seed):
    """Colours are those of the labels beyond a filter's reach, boxes surround their masks."""
    rng = np.random.default_rng(seed)
    labels, picture = scenes.blocks(shape, rng)
    boxes, masks = scenes.objects(shape, rng)
    record = dict(
        image=scenes.png(picture), mask=scenes.png(labels), boxes=boxes, labels=np.arange(4),
        segmentation=[scenes.rectangle(box) for box in boxes],
    )  # fmt: skip
    source, same = scenes.source(record), dict(view=view, image_size=size)
    made = segment.segment(source, **same).read(record, np.random.default_rng(seed))
    found, ignored = made['label_map'], made['label_map'] == 255
    assert found.dtype == np.uint8 and found.shape == size and made['image'].shape == (*size, 3)
    geometry = make_view(view, size).place(shape, np.random.default_rng(seed), labels)
    enlarged = max(a / b for a, b in zip(geometry.resized, geometry.window[2:], strict=True))
    width = 2 * int(np.ceil(max(enlarged, 1))) + 3  # the reach of the filter, on both sides
    inner = ndimage.maximum_filter(found, width, mode='constant', cval=99) == found
    inner &= ndimage.minimum_filter(found, width) == found
    wanted = np.where(ignored, 0, 40 * found.astype(int) + 20)
    np.testing.assert_array_equal(made['image'][inner][:, 0], wanted[inner])
    task = detect.detect(
        source, masks=True, most=6, crowd=None, box_format='xyxy', **same
    )
    other = task.read(record, np.random.default_rng(seed))
    if view != 'scale_crop':  # where the label map decides on the window
        np.testing.assert_array_equal(other['image'], made['image'])
    count = (other['labels'] >= 0).sum()
    assert (other['labels'][count:] == -1).all() and not other['boxes'][count:].any()
    geometry = make_view(view, size).place(shape, np.random.default_rng(seed))
    for k in range(count):
        whole = geometry.label_map(masks[other['labels'][k]], 0)
        np.testing.assert_array_equal(other['masks'][k], whole)
        rows, columns = np.flatnonzero(whole.any(1)), np.flatnonzero(whole.any(0))
        around = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        gap = (other['boxes'][k] * [*size[::-1], *size[::-1]] - around) * [1, 1, -1, -1]
        turned = isinstance(view, dict) and view['name'] == 'affine'
        assert (gap < 0.502).all() and (turned or (gap > -0.502).all())
    left = np.setdiff1d(np.arange(4), other['labels'][:count])
    assert not any(geometry.label_map(masks[k], 0).any() for k in left)


def test_colours_change_and_places_do_not():
    rng = np.random.default_rng(3)
    labels, picture = scenes.blocks((60, 70), rng)
    record = dict(image=scenes.png(picture), mask=scenes.png(labels))
    read = [
        segment.segment(
            scenes.source(record), view='fit', image_size=50, augment=steps
        ).read for steps in ((), ('photometric',))
    ]  # fmt: skip
    changed = 0
    for seed in range(10):
        one, other = (f(record, np.random.default_rng(seed)) for f in read)
        np.testing.assert_array_equal(one['label_map'], other['label_map'])
        changed += (one['image'] != other['image']).any()
    assert changed > 5
    with pytest.raises(UserError, match='randaugment moves pixels'):
        segment.segment(
            scenes.source(record), view='fit', image_size=50, augment=('randaugment',)
        )


def test_photometric_distortion_is_its_formula_in_floats():
    """In hexagons of hue (colorsys), unrounded: some grey levels apart, of 8-bit steps between."""
    from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    seen = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        out = distort.photometric(image, rng)
        rng = np.random.default_rng(seed)
        bright, contrast, vivid, turned, last = rng.integers(2, size=5)
        seen.add((bright, contrast, vivid, turned, last))
        values = image + (rng.uniform(-32, 32) if bright else 0.0)
        factor = rng.uniform(0.5, 1.5) if contrast else 1.0
        saturation = rng.uniform(0.5, 1.5) if vivid else 1.0
        turn = rng.uniform(-0.1, 0.1) if turned else 0.0
        values = np.clip(values, 0, 255) * (1.0 if last else factor)
        h, s, v = np.moveaxis(rgb_to_hsv(np.clip(values, 0, 255) / 255), -1, 0)
        values = 255 * hsv_to_rgb(np.stack([(h + turn) % 1, np.clip(s * saturation, 0, 1), v], -1))
        values = np.clip(values * (factor if last else 1.0), 0, 255)
        assert np.abs(out - values).max() < 12 and np.abs(out - values).mean() < 2
    assert len(seen) > 20


@pytest.mark.parametrize('ignored', [False, True])
def test_a_window_is_drawn_again_while_one_class_covers_too_much(ignored):
    """Of a picture with one busy corner; ignored pixels count for none of them."""
    labels = np.zeros((200, 200), np.uint8)
    labels[:100, :100] = np.random.default_rng(0).integers(1, 5, (100, 100))
    if ignored:
        labels[labels == 0] = 255
    scale = dict(name='scale_crop', scale=(1.0, 1.0), smaller=200, flip=False)
    views = [make_view(scale | dict(largest_class=x), 60) for x in (0.5, 1.0)]

    def fits(geometry):
        own = geometry.label_map(labels, 255)
        counts = np.bincount(own[own < 255], minlength=5)
        return (counts > 0).sum() > 1 and counts.max() < 0.5 * counts.sum()

    within = [0, 0]
    for seed in range(100):
        bounded, free, bare = (
            view.place((200, 200), np.random.default_rng(seed), given)
            for view, given in ((views[0], labels), (views[1], labels), (views[0], None))
        )
        assert free == bare  # without a bound or labels, the first window
        assert bounded == free or not fits(free)
        within = np.add(within, [fits(bounded), fits(free)])
    assert within[0] > 90 and within[1] < (75 if ignored else 50)


def test_scales_are_those_of_the_published_recipes():
    """mmsegmentation: 512 x 2048 at scale 1; detectron2: within 1024 x 1024 times the scale."""
    shape, rng = (300, 400), np.random.default_rng(0)
    for view, size, low, high in (
        ('scale_crop', 512, 512 / 2, 512 * 2),
        ('large_scale_jitter', 1024, 0.1 * 1024 * 0.75, 2 * 1024 * 0.75),
    ):
        heights = [make_view(view, size).place(shape, rng).resized[0] for _ in range(400)]
        assert low <= min(heights) < low * 1.2 and high * 0.97 < max(heights) <= high
        assert abs(np.mean(heights) - (low + high) / 2) < 0.05 * high
    long = [make_view('scale_crop', 512).place((100, 1000), rng).resized for _ in range(50)]
    assert max(w for _, w in long) <= 4096 and min(w for _, w in long) >= 1024
    fixed = make_view('fit', 64).place((300, 400), None)
    assert fixed.resized == (48, 64) and fixed.offset == (0, 0)


def test_ids_are_ignored_shifted_and_counted_as_set():
    """Sequences are lists in a config.json."""
    ids = np.array([[0, 1, 2], [3, 255, 2]], np.uint8)
    for setting, classes, expected, known in (
        (dict(), 'abcd', [[0, 1, 2], [3, 255, 2]], 'abcd'),
        (dict(zero='ignored'), 'abc', [[255, 0, 1], [2, 255, 1]], 'abc'),
        (dict(zero='background'), 'abc', [[0, 1, 2], [3, 255, 2]], ['background', *'abc']),
        (dict(ignored=[255, 3]), 'abc', [[0, 1, 2], [255, 255, 2]], 'abc'),
        (dict(classes=['x', 'y', 'z', 'w']), 'ab', [[0, 1, 2], [3, 255, 2]], 'xyzw'),
    ):
        record = dict(image=scenes.png(np.zeros((2, 3, 3), np.uint8)), mask=scenes.png(ids))
        source = scenes.source(record, classes=classes)
        task = segment.segment(source, view='fit', image_size=(2, 3), **setting)
        assert task.names == {'classes': tuple(known)}
        made = task.read(record, np.random.default_rng(0))['label_map']
        assert made.dtype == task.blank['label_map'].dtype and made.tolist() == expected
    assert (task.blank['label_map'] == 255).all()


def test_many_classes_have_16_bits():
    ids = np.array([[0, 300], [255, 65535]], np.uint16)
    record = dict(image=scenes.png(np.zeros((2, 2, 3), np.uint8)), mask=scenes.png(ids))
    task = segment.segment(scenes.source(record), view='fit', image_size=2, classes=301)
    made = task.read(record, np.random.default_rng(0))['label_map']
    assert made.dtype == np.uint16 and made.tolist() == [[0, 300], [255, 65535]]


def test_masks_follow_the_classes_of_other_data_sets():
    """Where labels are mapped by name, the ids of masks are, too."""
    ids = np.array([[0, 1, 2, 255]], np.uint8)
    record = dict(image=scenes.png(np.zeros((1, 4, 3), np.uint8)), mask=scenes.png(ids))
    table = np.array([2, 0, 1], np.int32)
    for zero, expected in (('class', [2, 0, 1, 255]), ('background', [0, 3, 1, 255])):
        source = scenes.source(record, classes='abc')
        source.records.label_fields = ()
        other = sources.Source(names.Relabelled(source.records, table), source.classes)
        task = segment.segment(other, view='fit', image_size=(1, 4), zero=zero)
        made = task.read(other.records[0], np.random.default_rng(0))
        assert made['label_map'].tolist() == [expected]
        twice = names.Relabelled(other.records, table)[0][names.TABLE]
        assert twice.tolist() == table[table].tolist()


@pytest.fixture(params=['extension', 'Pillow'])
def reader(request, monkeypatch):
    """The mask reader with and without the extension."""
    if request.param == 'Pillow':
        monkeypatch.setattr(label_maps, '_labels', None)
    elif label_maps._labels is None:
        pytest.skip('the extension is not built')
    return label_maps.read


def filtered(ids, filters):
    """Rows of a PNG's pixels, each by a filter of its own: by the definitions, pixel by pixel."""
    above, rows = [0] * ids.shape[1], b''
    for row, number in zip(ids.tolist(), filters, strict=True):
        out = []
        for x, value in enumerate(row):
            a, b, c = row[x - 1] if x else 0, above[x], above[x - 1] if x else 0
            near = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
            out.append((value - [0, a, b, (a + b) // 2, near][number]) % 256)
        above, rows = row, rows + bytes([number, *out])
    return rows


def test_ids_are_the_same_whatever_the_filters_of_the_file(reader):
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (40, 1), (1, 50), (60, 31)):
        for ids in (rng.integers(0, 256, shape), rng.integers(0, 3, shape) * 100):
            filters = rng.integers(0, 5, shape[0])
            data = scenes.raw_png(ids, 8, 0, filtered(ids, filters))
            np.testing.assert_array_equal(reader(data), ids)
    ids = rng.integers(0, 256, (200, 90), np.uint8)
    np.testing.assert_array_equal(reader(scenes.png(ids, optimize=True)), ids)


@pytest.mark.parametrize('change', [
    lambda data: data[:-30], lambda data: data[:60], lambda data: data[:30] + b'x' + data[31:],
    lambda data: data[:70] + b'x' + data[71:],
    lambda data: scenes.raw_png(np.zeros((4, 5), int), 8, 0, bytes(23)),
    lambda data: scenes.raw_png(np.zeros((4, 5), int), 8, 0, bytes([9, 0, 0, 0, 0, 0] * 4)),
])  # fmt: skip
def test_a_damaged_mask_is_read_or_refused_as_pillow_does(change, monkeypatch):
    ids, found = np.random.default_rng(0).integers(0, 9, (40, 50), np.uint8), []
    data = change(scenes.png(ids))
    for extension in (label_maps._labels, None):
        monkeypatch.setattr(label_maps, '_labels', extension)
        try:
            found.append(label_maps.read(data).tobytes())
        except images.Unreadable as e:
            found.append(str(e))
    assert found[0] == found[1]


def test_rows_and_columns_are_gathered_as_by_numpy(reader):
    rng = np.random.default_rng(0)
    for dtype, shape in ((np.uint8, (9, 7)), (np.uint8, (3, 9, 7)), (np.uint16, (9, 7))):
        labels = rng.integers(0, 250, shape).astype(dtype)
        rows, columns = np.sort(rng.integers(0, 9, 20)), rng.integers(0, 7, 15)
        for own in (labels, labels[..., ::-1]):
            found = label_maps.gathered(own, rows, columns)
            np.testing.assert_array_equal(found, own[..., rows[:, None], columns])
    with pytest.raises((ValueError, IndexError)):
        label_maps.gathered(labels.astype(np.uint8), rows + 1, columns)


def test_labels_and_counts_are_the_same_without_the_extension(reader):
    rng = np.random.default_rng(0)
    for classes, zero in ((255, 'class'), (254, 'background'), (150, 'ignored'), (255, 'ignored')):
        ids = label_maps.Ids(classes, zero)
        values = np.flatnonzero(label_maps.table_of(ids, 256) >= 0).astype(np.uint8)
        mask = rng.choice(values, (31, 47))
        expected = label_maps.table_of(ids, 256)[mask]
        found = ids.labels(mask[:, ::2])
        np.testing.assert_array_equal(found, expected[:, ::2])
        counts = np.bincount(found.ravel(), minlength=256)
        np.testing.assert_array_equal(label_maps.class_counts(found), counts[:255])
        for unknown in np.setdiff1d(np.arange(256), values)[:1]:
            mask[3, 5] = unknown
            with pytest.raises(images.Unreadable, match=f'it has the id {unknown}, and'):
                ids.labels(mask)


IDS = np.array([[0, 1, 0, 1, 1], [1, 1, 0, 0, 1]])


@pytest.mark.parametrize('depth', [1, 2, 4, 8, 16])
@pytest.mark.parametrize('colour', [0, 3])
def test_ids_are_the_numbers_in_the_file(depth, colour, reader):
    """Grey values unscaled, and indices whatever the palette's colours and transparency."""
    if (depth, colour) == (16, 3):
        return  # there is none
    ids = IDS * (2**depth - 1) - (IDS[:, ::-1] if depth > 1 else 0) * IDS
    found = reader(scenes.raw_png(ids, depth, colour))
    assert found.dtype == (np.uint16 if depth == 16 else np.uint8)
    np.testing.assert_array_equal(found, ids)


def other_file(kind, mode):
    out = io.BytesIO()
    Image.new(mode, (5, 2)).save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize('data, words', [
    (other_file('JPEG', 'L'), 'class ids are read from PNG files alone; JPEG would change ids'),
    (other_file('BMP', 'L'), 'class ids are read from PNG files alone'),
    (other_file('PNG', 'RGB'), 'its pixels are RGB, not ids'),
    (other_file('PNG', 'RGBA'), 'its pixels are RGB with alpha, not ids'),
    (other_file('PNG', 'LA'), 'its pixels are grey with alpha, not ids'),
    (other_file('PNG', 'L')[:45], 'unreadable mask: '),
    (b'', 'class ids are read from PNG files alone'),
    (scenes.png(np.zeros((3, 5), np.uint8)), 'it has 5 x 3 pixels, the image 5 x 2'),
    (scenes.png(np.full((2, 5), 7, np.uint8)), 'it has the id 7, and there are 5 classes'),
])
def test_a_mask_that_is_none_is_named(data, words):
    record = dict(image=scenes.png(np.zeros((2, 5, 3), np.uint8)), mask=data)
    task = segment.segment(scenes.source(record), view='fit', image_size=4)
    with pytest.raises(images.Unreadable, match='unreadable mask: ') as e:
        task.read(record, np.random.default_rng(0))
    assert words in str(e.value)


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


def test_a_batch_does_not_depend_on_how_many_read_it():
    rng = np.random.default_rng(0)
    records = []
    for i in range(6):
        labels, picture = scenes.blocks((40 + i, 50), rng)
        records.append(dict(image=scenes.png(picture), mask=scenes.png(labels)))
    source, view = scenes.source(*records), 'scale_crop'
    task = segment.segment(source, view=view, image_size=32, augment=('photometric',))
    feeds = [
        pipeline.batches(source, task, 3, start, batch_size=4, workers=workers, threads=threads)
        for start, workers, threads in ((0, 0, 1), (1, 0, 3), (1, 1, 1))
    ]
    next(feeds[0])
    one, *others = map(next, feeds)
    assert one['mask'].all() and len(set(one['id'].tolist())) > 1
    for other in others:
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


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
