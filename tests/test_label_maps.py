"""Masks to label maps: ids as the file has them, by the extension and by Pillow."""

import ast
import io
import re
import zlib

import numpy as np
import pytest
import scenes
from PIL import Image

from vit_jax.data import geometry, images, label_maps, sources
from vit_jax.data.readers import names
from vit_jax.data.tasks import segment


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


@pytest.fixture(params=['libdeflate', 'zlib', 'Pillow'])
def reader(request, monkeypatch):
    """The mask reader with the extension, by either inflater, and without."""
    if request.param == 'libdeflate':
        pytest.importorskip('deflate')
    if request.param == 'zlib':
        monkeypatch.setattr(label_maps, 'deflate', None)
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


def test_regions_are_the_same_whatever_the_filters_of_the_file(reader):
    """Runs that begin and end anywhere, to the left and above; most predictions are right."""
    rng = np.random.default_rng(1)
    for cells, width in ((1, 70), (3, 67), (3, 200), (7, 160)):
        edges = np.arange(cells, width, cells) + rng.integers(3, size=(40, (width - 1) // cells))
        cell = (np.arange(width) >= edges[..., None]).sum(1)  # [40, width]
        values = rng.integers(0, 256, (40 // cells + 1, width // cells + 1))
        ids = values[np.arange(40)[:, None] // cells, cell]
        for filters in (rng.integers(0, 5, 40), *([k] * 40 for k in range(5))):
            data = scenes.raw_png(ids, 8, 0, filtered(ids, filters))
            np.testing.assert_array_equal(reader(data), ids)
            counts = label_maps.id_counts(ids.astype(np.uint8))
            np.testing.assert_array_equal(counts, np.bincount(ids.ravel(), minlength=256))


def test_inflaters_agree_on_streams_that_are_no_mask(monkeypatch):
    """Cut, damaged, too short, too long, followed by other bytes, a bomb.

    libdeflate alone reads some codes with entries that nothing uses; the checksum holds for both.
    """
    pytest.importorskip('deflate')
    rows = bytes(range(200)) * 20
    whole = zlib.compress(rows)
    damaged = [whole[:i] + bytes([whole[i] ^ 64]) + whole[i + 1 :] for i in range(len(whole))]
    for data in (whole, b'', whole + b'more', *(whole[:-i] for i in range(1, 9)), *damaged):
        for size in (4000, 3999, 4001, 2**40):
            found = label_maps.inflated(data, size)
            with monkeypatch.context() as without:
                without.setattr(label_maps, 'deflate', None)
                expected = label_maps.inflated(data, size)
            assert found == expected or (expected, found) == (None, rows)
    assert label_maps.inflated(whole, 4000) == rows
    assert label_maps.inflated(whole, 3999) is label_maps.inflated(whole, 4001) is None


@pytest.mark.parametrize('change', [
    lambda data: data[:-30], lambda data: data[:60], lambda data: data[:30] + b'x' + data[31:],
    lambda data: data[:70] + b'x' + data[71:],
    lambda data: scenes.raw_png(np.zeros((4, 5), int), 8, 0, bytes(23)),
    lambda data: scenes.raw_png(np.zeros((4, 5), int), 8, 0, bytes([9, 0, 0, 0, 0, 0] * 4)),
    *(lambda data, n=n: data[:-n] for n in (1, 4, 5, 11, 12, 13)),
    *(lambda data, n=n: data + b'\n' * n for n in (1, 7, 8, 12, 40)),
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


def exactly(labels, view, fill):
    """The label map of a view without a warp, by its definition, in whole numbers."""
    def places(axis, flip):
        start, length, whole = view.window[axis], view.window[2 + axis], view.resized[axis]
        centres = 2 * (np.arange(view.size[axis])[:: -1 if flip else 1] + view.offset[axis]) + 1
        inside = (centres > 0) & (centres < 2 * whole)
        return np.where(inside, start + centres * length // (2 * whole), 0), inside

    (rows, in_rows), (columns, in_columns) = places(0, False), places(1, view.flip)
    inside = in_rows[:, None] & in_columns
    return np.where(inside, labels[..., rows[:, None], columns], np.asarray(fill, labels.dtype))


def drawn_view(rng, shape):
    """A window, from one pixel to the whole image, resized and shown with any padding."""
    sides = [int(rng.integers(1, n + 1)) for n in shape] if rng.integers(3) else shape
    corner = [int(rng.integers(n - side + 1)) for n, side in zip(shape, sides, strict=True)]
    resized = [max(1, int(n * 2 ** rng.uniform(-2, 2))) for n in sides]
    resized = resized if rng.integers(4) else sides
    size = [int(n) for n in rng.integers(1, 90, 2)] if rng.integers(3) else resized
    offset = [int(rng.integers(-n, whole + 1)) for n, whole in zip(size, resized, strict=True)]
    offset = offset if rng.integers(3) else (0, 0)
    flip = bool(rng.integers(2))
    return geometry.Geometry(
        (*corner, *sides), tuple(resized), tuple(size), tuple(offset), flip=flip
    )


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_views_are_those_of_the_definition(dtype, reader):
    """Of images and outputs of any size: one pixel, less than a vector, several of them."""
    rng, fill = np.random.default_rng(0), label_maps.ignored(dtype)
    alike = 0
    for _ in range(400):
        shape = tuple(int(n) for n in rng.integers(1, (40, 130)))
        labels = rng.integers(0, 250, shape).astype(dtype)
        labels[rng.random(shape) < 0.1] = fill
        view = drawn_view(rng, shape)
        expected = exactly(labels, view, fill)
        np.testing.assert_array_equal(view.label_map(labels, fill), expected, str(view))
        turned = exactly(labels[:, ::-1], view, fill)
        np.testing.assert_array_equal(view.label_map(labels[:, ::-1], fill), turned)
        alike += (expected == fill).all()
    assert alike < 100


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_a_view_is_mixed_as_the_counts_of_its_label_map_say(dtype, reader):
    """For the largest share of a class, too, which no rounding hides."""
    rng, fill = np.random.default_rng(0), label_maps.ignored(dtype)
    found = []
    for _ in range(300):
        shape = tuple(int(n) for n in rng.integers(1, (130, 90)))
        labels = (rng.exponential(rng.uniform(0.1, 2), shape) * 2).clip(0, 9).astype(dtype)
        labels[: int(rng.integers(shape[0]))] = rng.choice([0, 200, fill])
        labels[int(rng.integers(1, shape[0] + 1)) :] = rng.choice([0, 7, fill])
        view = drawn_view(rng, shape)
        counts = np.bincount(exactly(labels, view, fill).ravel(), minlength=fill + 1)[:fill]
        share = counts.max() / max(counts.sum(), 1)
        for most in (1, 0.75, rng.uniform(), share, np.nextafter(share, 1), min(share + 0.01, 1)):
            expected = np.count_nonzero(counts) > 1 and counts.max() < most * counts.sum()
            assert view.is_mixed(labels, most) == expected, (view, most)
            found.append(expected)
    assert 300 < sum(found) < 1500


def test_views_of_several_masks_are_those_of_each(reader):
    rng = np.random.default_rng(1)
    masks = rng.integers(0, 2, (3, 20, 30), np.uint8)
    view = geometry.Geometry((2, 3, 15, 20), (40, 31), (33, 37), (5, -4), flip=True)
    found = view.label_map(masks, 0)
    np.testing.assert_array_equal(found, [view.label_map(mask, 0) for mask in masks])


@pytest.mark.skipif(label_maps._labels is None, reason='the extension is not built')
@pytest.mark.parametrize('window, resized', [
    ((0, 0, 10, 8), (5, 5)), ((2, 0, 8, 7), (5, 5)), ((-1, 0, 5, 5), (5, 5)),
    ((0, -1, 5, 5), (5, 5)), ((0, 0, 0, 5), (5, 5)), ((0, 0, 5, 5), (5, 0)),
    ((2**62, 0, 2**62, 5), (5, 5)), ((0, 0, 5, -5), (5, 5)),
])  # fmt: skip
def test_a_window_outside_of_the_image_is_refused(window, resized):
    labels = np.zeros((9, 7), np.uint8)
    with pytest.raises(ValueError, match='not a part of'):
        label_maps.view(labels, (4, 4), window, resized, (0, 0), False, 255)
    with pytest.raises(ValueError, match='not a part of'):
        label_maps.view_is_mixed(labels, 0.75, (4, 4), window, resized, (0, 0))


def ids_of_many_kinds():
    """Ids, and the classes of the mask's data set: ranges that are shifted, and any others."""
    for classes, zero in ((255, 'class'), (254, 'background'), (150, 'ignored'), (255, 'ignored')):
        yield label_maps.Ids(classes, zero), None
    for ignored in ((), (0,), (7, 9), (255, 200), (150,)):
        yield label_maps.Ids(150, 'class', ignored), None
        yield label_maps.Ids(150, 'ignored', ignored), None
    yield label_maps.Ids(1, 'class', ()), None
    yield label_maps.Ids(20), np.random.default_rng(3).permutation(20).astype(np.int32)
    yield label_maps.Ids(20), np.int32([*range(5, 20), *range(5)])


@pytest.mark.parametrize('ids, classes', [*ids_of_many_kinds()])
def test_labels_and_counts_are_the_same_without_the_extension(ids, classes, reader):
    rng = np.random.default_rng(0)
    table = label_maps.table_of(ids, 256)
    labels = table.astype(np.uint8)
    if classes is not None:
        labels[:20] = classes
    values = np.flatnonzero(table >= 0).astype(np.uint8)
    mask = rng.choice(values, (31, 47))
    found = ids.labels(mask[:, ::2], classes)
    np.testing.assert_array_equal(found, labels[mask[:, ::2]])
    counts = np.bincount(found.ravel(), minlength=256)
    np.testing.assert_array_equal(label_maps.class_counts(found), counts[:255])
    for unknown in np.setdiff1d(np.arange(256), values):
        mask[3, 5] = unknown
        with pytest.raises(images.Unreadable, match=f'it has the id {unknown}, and'):
            ids.labels(mask, classes)


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


@pytest.mark.parametrize('ids', [
    label_maps.Ids(5), label_maps.Ids(5, 'ignored'), label_maps.Ids(5, 'background', (9,)),
    label_maps.Ids(300), label_maps.Ids(255),
])  # fmt: skip
@pytest.mark.parametrize('values', [[0, 5], [0, 6, 7], [255], [254, 255]])
def test_ids_of_no_class_are_named_with_the_setting_that_reads_them(ids, values):
    """Whichever it is: with the words of the message the same mask is read."""
    mask = np.array([values], np.uint8)
    try:
        ids.labels(mask)
        return  # all are classes, or ignored
    except images.Unreadable as e:
        words = str(e)
    first = int(ids.zero == 'ignored')
    assert f'{ids.classes} classes, {first} to {ids.classes - 1 + first}; ' in words
    settings = re.findall(r"(zero|ignored)=('\w+'|\(.*?\))", words)
    assert settings
    for name, value in settings:
        value = ast.literal_eval(value)
        more = int(value == 'background')  # a class before the others
        found = ids._replace(**{name: value}, classes=ids.classes + more).labels(mask)
        assert found.max() == ids.fill or name == 'zero'


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
