"""A view moves images, label maps and boxes alike: against Pillow and by arithmetic."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_image

from vit_jax.data import augment, distort, images, tasks
from vit_jax.data.geometry import Geometry
from vit_jax.errors import UserError

SIZE = (24, 36)
SHAPE = (53, 71)
VIEWS = {
    'resize': {}, 'resize cropped': dict(crop=0.8), 'central': {}, 'random_crop': {},
    'small_central': dict(smaller=40), 'inception': {}, 'shift': dict(pixels=5, flip=True),
    'resize_crop': dict(resize=40), 'small_crop': dict(smaller=40),
    'affine': dict(degrees=25.0, shear=0.2, pixels=3.0, flip=True),
    'fit': {}, 'fit centred': dict(place='centre'), 'fit smaller': dict(smaller=15),
    'large_scale_jitter': {}, 'scale_crop': {},
    'resize_or_crop': dict(smaller=(11, 15), before=(31, 43), crop=(13, 31)),
}  # fmt: skip


def geometries(name, shape=SHAPE, size=SIZE, count=20):
    """Geometries that a view draws with some seeds."""
    view = augment.VIEWS[name.split()[0]]
    for seed in range(count):
        yield view(shape, np.random.default_rng(seed), size=size, **VIEWS[name])


def pillow(labels, geometry):
    """A label map by Pillow's operations, one after another; 255 in the padding."""
    y, x, h, w = geometry.window
    nearest = Image.Resampling.NEAREST
    image = Image.fromarray(labels).resize(
        geometry.resized[::-1], nearest, box=(x, y, x + w, y + h)
    )
    canvas = Image.new('L', geometry.size[::-1], 255)
    canvas.paste(image, (-geometry.offset[1], -geometry.offset[0]))
    if geometry.warp is not None:
        affine = Image.Transform.AFFINE
        canvas = canvas.transform(
            canvas.size, affine, geometry.warp.ravel(), nearest, fillcolor=255
        )
    return np.asarray(canvas)[:, :: -1 if geometry.flip else 1]


def on_edges(geometry):
    """Whether a centre lies on the edge of two pixels of the image: bool [*size]."""
    edges = []
    for axis in (0, 1):
        places = np.arange(geometry.size[axis]) + 0.5
        places = geometry.size[1] - places if axis and geometry.flip else places
        scale = geometry.window[2 + axis] / geometry.resized[axis]
        places = (places + geometry.offset[axis]) * scale
        edges.append(np.abs(places - np.rint(places)) < 1e-6)
    return edges[0][:, None] | edges[1]


@pytest.mark.parametrize('name', VIEWS)
def test_label_maps_are_those_of_pillow(name):
    """Where no centre lies on the edge of two pixels, which rounding would decide.

    The size of a warped image does not change, as Pillow would round twice.
    """
    size = 16, 32
    shape = size if name == 'affine' else (29, 61)
    labels = np.random.default_rng(0).integers(0, 200, shape, np.uint8)
    seen = set()
    for geometry in geometries(name, shape, size):
        ours = geometry.label_map(labels, fill=255)
        assert ours.dtype == np.uint8
        most = 0.01 if name == 'affine' else 0  # where Pillow computes to 1/65536 pixel
        differ = ours != pillow(labels, geometry)
        if name == 'resize_or_crop':
            differ &= ~on_edges(geometry)
        assert differ.mean() <= most
        several = np.int32([labels, labels + 1])
        wanted = [np.where(ours < 255, np.int32(ours) + i, -1) for i in range(2)]
        np.testing.assert_array_equal(geometry.label_map(several, fill=-1), wanted)
        seen.add((geometry.flip, geometry.window, geometry.offset))
    drawn = (
        'random_crop', 'resize_crop', 'small_crop', 'inception', 'shift', 'scale_crop',
        'large_scale_jitter', 'resize_or_crop',
    )
    assert (len(seen) > 5) == (name in drawn)


@pytest.mark.parametrize('name', VIEWS)
def test_an_image_has_its_labels_in_the_same_place(name):
    """Pixels that are at least two from any other label have the colour of theirs."""
    labels = np.repeat(np.repeat(np.random.default_rng(1).integers(1, 6, (4, 5)), 14, 0), 15, 1)
    labels = labels[: SHAPE[0], : SHAPE[1]].astype(np.uint8)
    image = np.repeat(40 * labels[..., None], 3, 2)
    compared = 0
    for geometry in geometries(name):
        found = geometry.label_map(labels, fill=0)
        inner = ndimage.maximum_filter(found, 5, mode='constant', cval=99) == found
        inner &= ndimage.minimum_filter(found, 5) == found
        np.testing.assert_array_equal(geometry.image(image)[inner][:, 0], 40 * found[inner])
        compared += inner.sum()
    assert compared > 1000


PUBLISHED = [  # (view, size resized to, side and place of the window, method) of 375 x 500 pixels
    # big_vision configs/common_fewshot.py:51: resize(256)|central_crop(224)
    (dict(name='resize', crop=224 / 256, antialias=False), (256, 256), 224, (16, 16), 'bilinear'),
    # vision_transformer vit_jax/input_pipeline.py:213, and BiT's test view: resize(384)
    (dict(name='resize', antialias=False), (384, 384), 384, (0, 0), 'bilinear'),
    # big_vision configs/vit_i1k.py:105: resize_small(256)|central_crop(224)
    (dict(name='small_central'), (256, 341), 224, (16, 58), 'area'),
    # big_vision configs/transfer.py:113: resize_small(448)|central_crop(384)
    (dict(name='small_central', smaller=448), (448, 597), 384, (32, 106), 'area'),
]


@pytest.mark.parametrize('view, whole, side, place, method', PUBLISHED)
def test_views_of_published_evaluations(view, whole, side, place, method):
    geometry = tasks.make_view(view, side).place((375, 500), None)
    expected = Geometry((0, 0, 375, 500), whole, (side,) * 2, place, method=method, antialias=False)
    assert geometry == expected


def boxes_and_masks(shape, count=12):
    """Random boxes of whole pixels [N, 4], and masks [N, H, W] that fill them."""
    rng = np.random.default_rng(2)
    x, y = (
        np.sort([rng.choice(n, 2, replace=False) for _ in range(count)], 1) for n in shape[::-1]
    )
    masks = np.zeros((count, *shape), bool)
    for mask, (left, right), (top, bottom) in zip(masks, x, y, strict=True):
        mask[top:bottom, left:right] = True
    return np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1), masks


@pytest.mark.parametrize('name', [name for name in VIEWS if name != 'affine'])
def test_a_box_stays_around_the_mask_that_fills_it(name):
    """To half a pixel on each side: a pixel is in the mask if its centre is."""
    boxes, masks = boxes_and_masks(SHAPE)
    compared = 0
    for geometry in geometries(name):
        moved, kept = geometry.boxes(boxes)
        assert moved.dtype == np.float32 and len(moved) == len(kept) <= len(boxes)
        found = geometry.label_map(masks, fill=False)
        assert not found[np.setdiff1d(np.arange(len(boxes)), kept)].any()
        for box, mask in zip(moved, found[kept], strict=True):
            if mask.any():
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                around = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
                np.testing.assert_allclose(around, box, atol=0.501)
                compared += 1
            else:
                assert min(box[2] - box[0], box[3] - box[1]) <= 1
    assert compared > 100


def test_a_warped_box_is_the_smallest_around_its_turned_pixels():
    """And the mask that fills it lies within, but for half a pixel."""
    boxes, masks = boxes_and_masks((100, 150))
    for geometry in geometries('affine', (100, 150), (50, 90)):
        moved, kept = geometry.boxes(boxes)
        found = geometry.label_map(masks, fill=False)
        to_input = np.concatenate([geometry.warp, [[0, 0, 1]]])
        for i, (x0, y0, x1, y1) in enumerate(boxes):
            y, x = np.mgrid[y0 : y1 + 1, x0 : x1 + 1].reshape(2, -1)
            x, y, _ = np.linalg.solve(to_input, [x * 90 / 150, y * 50 / 100, np.ones(len(x))])
            x = (90 - x if geometry.flip else x).clip(0, 90)
            y = y.clip(0, 50)
            box = np.array([x.min(), y.min(), x.max(), y.max()])
            assert (i in kept) == (box[2] > box[0] and box[3] > box[1])
            if i in kept:
                np.testing.assert_allclose(moved[list(kept).index(i)], box, atol=1e-4)
            rows, columns = np.flatnonzero(found[i].any(1)), np.flatnonzero(found[i].any(0))
            if len(rows):
                assert columns[0] >= box[0] - 0.5 and columns[-1] + 1 <= box[2] + 0.5
                assert rows[0] >= box[1] - 0.5 and rows[-1] + 1 <= box[3] + 0.5


def test_boxes_by_hand():
    """A window of 20 x 40 pixels at (10, 30) that is doubled, moved by (4, -6) and mirrored."""
    geometry = Geometry((10, 30, 20, 40), (40, 80), (50, 70), (-4, 6), flip=True)
    boxes = np.array([
        [40, 15, 50, 25],  # x: 2 (40 - 30) - 6 = 14 to 34, mirrored 36 to 56; y: 14 to 34
        [30, 10, 40, 20],  # x: -6 to 14, of 20 pixels 14 inside; y: 4 to 24
        [0, 0, 30, 40],    # left of the window
        [40, 15, 40, 25],  # without area
    ])  # fmt: skip
    moved, kept = geometry.boxes(boxes)
    np.testing.assert_array_equal(moved, [[36, 14, 56, 34], [56, 4, 70, 24]])
    assert kept.tolist() == [0, 1]
    assert geometry.boxes(boxes, least=0.7)[1].tolist() == [0, 1]
    assert geometry.boxes(boxes, least=0.71)[1].tolist() == [0]
    assert geometry.boxes(np.zeros((0, 4)))[0].shape == (0, 4)


def test_padding_is_black_and_has_the_label_to_fill():
    geometry = Geometry((0, 0, 4, 6), (4, 6), (8, 8), (-1, -2))
    image = geometry.image(np.full((4, 6, 3), 200, np.uint8))
    labels = geometry.label_map(np.full((4, 6), 7, np.int32), fill=255)
    inside = np.zeros((8, 8), bool)
    inside[1:5, 2:8] = True
    np.testing.assert_array_equal(image, np.repeat(np.where(inside, 200, 0)[..., None], 3, 2))
    np.testing.assert_array_equal(labels, np.where(inside, 7, 255))
    away = geometry._replace(offset=(20, 0))
    assert not away.image(np.full((4, 6, 3), 200, np.uint8)).any()
    assert (away.label_map(np.zeros((4, 6), np.int32), fill=9) == 9).all()


def test_a_task_applies_one_geometry_in_two_steps():
    """Those of a call at once, with a JPEG that is decoded as far as the window needs it."""
    file = io.BytesIO()
    Image.fromarray(load_sample_image('china.jpg')[:200, :300]).save(file, 'JPEG')
    image = images.read(file.getvalue())
    view = tasks.make_view('inception', SIZE, ('color_jitter', 'erase'), in_place=True)
    at_once = view(image, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    geometry = view.place(image.shape[:2], rng)
    np.testing.assert_array_equal(view.distort(geometry.image(image), rng), at_once)


@pytest.mark.parametrize('name', sorted(distort.AUGMENTATIONS))
def test_an_augmentation_that_moves_pixels_is_refused_beside_label_maps(name):
    """Whether it does shows in a dot: only those in MOVING put it anywhere else."""
    image = np.full((40, 40, 3), 100, np.uint8)
    image[10:14, 10:14] = [250, 10, 20]
    moved = False
    for seed in range(60):
        settings = dict(probability=0.0) if name == 'erase' else {}
        out = distort.AUGMENTATIONS[name](image, np.random.default_rng(seed), **settings)
        apart = ndimage.uniform_filter(np.abs(out - np.median(out, (0, 1))).sum(-1), 5)
        y, x = np.unravel_index(np.argmax(apart), apart.shape)
        moved |= apart.max() > 60 and not (9 <= y <= 14 and 9 <= x <= 14)
    assert moved == (name in distort.MOVING)
    if moved:
        with pytest.raises(UserError, match=f'the augmentation {name} moves pixels'):
            tasks.make_view('resize', 8, (name,), in_place=True)
    else:
        tasks.make_view('resize', 8, (name,), in_place=True)
