"""The tasks segment and detect: all that has a place moves together."""


import numpy as np
import pytest
import scenes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from vit_jax.data import distort, pipeline
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
    for shape, whole in ((480, 640), (800, 1067)), ((480, 1000), (640, 1333)):
        assert make_view(dict(name='fit', smaller=800), 1333).place(shape, None).resized == whole


@pytest.mark.parametrize('shape', [(480, 640), (640, 427), (300, 700)])
def test_resize_or_crop_follows_detrs_rules(shape):
    """Those of facebookresearch/detr datasets/transforms.py, to a pixel."""
    sizes, view = range(480, 801, 32), make_view('resize_or_crop', 1333)
    whole_image, seen, wholes = np.float32([[0, 0, shape[1], shape[0]]]), set(), 0
    for seed in range(300):
        found = view.place(shape, np.random.default_rng(seed))
        y, x, *part = found.window
        small, large = sorted(part)
        expected = [(s, s * large / small) for s in sizes]
        expected = [(a, b) if b <= 1333 else (1333 * small / large, 1333) for a, b in expected]
        assert np.abs(np.subtract(expected, sorted(found.resized))).max(1).min() <= 1
        scales = [before / min(shape) for before in (400, 500, 600)]
        assert found.window == (0, 0, *shape) or any(
            all(384 - scale <= n * scale <= 600 + scale for n in part) for scale in scales
        )
        assert y + part[0] <= shape[0] and x + part[1] <= shape[1]
        [box], _ = found.boxes(whole_image)  # padding is on the right and below
        np.testing.assert_allclose(box, [0, 0, *found.resized[::-1]], atol=1e-3)
        wholes += part == [*shape]
        seen.add((found.flip, min(found.resized)))
    assert len(seen) > 15 and 120 < wholes < 180


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
