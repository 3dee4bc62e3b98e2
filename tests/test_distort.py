"""Augmentations: each operation against a definition of its own, and what the policies draw."""

import collections
import pathlib

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy import ndimage, stats

from vit_jax.data import distort, images, randaugment, randaugment_timm
from vit_jax.data import operations as ops
from vit_jax.errors import UserError


def picture(h=40, w=33, low=20, high=230):
    """Waves and noise, each channel with a range of its own."""
    y, x = np.mgrid[:h, :w]
    waves = np.stack([np.sin(x / 5) * np.cos(y / 7), np.cos(x / 3 + y / 9), np.sin(y / 4)], -1)
    noise = np.random.default_rng(0).normal(scale=0.2, size=(h, w, 3))
    span = np.array([1, 0.8, 0.6]) * (high - low) / 2
    return np.uint8(np.clip((high + low) / 2 + span * (waves + noise), low, high))


IMAGE = picture()
# What big_vision's pp/autoaugment.py makes of three images, TensorFlow 2.21.
TF = np.load(pathlib.Path(__file__).parent / 'data' / 'views_tf.npz', allow_pickle=False)
FACTORS = [0.1, 0.46, 1.0, 1.9, 2.8, 3.7]


def close(actual, expected, atol=0.0):
    assert actual.dtype == np.uint8
    np.testing.assert_allclose(actual.astype(float), expected, atol=atol)


def blended(degenerate, image, factor):
    """Fractions of a byte are dropped; where float32 may have rounded up to one, see `atol`."""
    exact = np.float64(degenerate) + factor * (np.float64(image) - degenerate)
    return np.floor(np.clip(exact, 0, 255) + 1e-4)


def test_autocontrast_stretches_each_channel():
    image = IMAGE.copy()
    image[..., 2] = 77  # of one value: stays
    low, high = image.min((0, 1)), image.max((0, 1))
    exact = (image[..., :2] - low[:2].astype(float)) * 255 / (high - low.astype(float))[:2]
    close(ops.autocontrast(image)[..., :2], np.floor(exact), atol=1)  # float32
    np.testing.assert_array_equal(ops.autocontrast(image)[..., 2], 77)
    ours = ops.autocontrast(image, np.float64)
    np.testing.assert_array_equal(ours, ImageOps.autocontrast(Image.fromarray(image)))


def test_equalize_ranks_the_values():
    equal = ops.equalize(IMAGE)
    for c in range(3):
        values = IMAGE[..., c].ravel()
        step = (values.size - np.sum(values == values.max())) // 255
        assert step > 0
        below = np.array([np.sum(values < v) for v in values])
        close(equal[..., c].ravel(), np.minimum((below + step // 2) // step, 255))
    flat = np.full((9, 9, 3), 5, np.uint8)
    np.testing.assert_array_equal(ops.equalize(flat), flat)


def test_operations_on_single_values():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    v = values.astype(int)
    close(ops.invert(values), 255 - v)
    for bits, expected in enumerate(TF['posterize']):  # from 9 on one bit, as below 1
        close(ops.posterize(values, bits).reshape(256, 3), expected[:, None].repeat(3, 1))
    for threshold in 0, 76, 128, 255, 256:
        close(ops.solarize(values, threshold), np.where(v < threshold, v, 255 - v))
    for addition in 0, 55, 165, 300:
        added = np.minimum(v + addition, 255)
        close(ops.solarize_add(values, addition), np.where(v < 128, added, v))
    for factor in FACTORS:
        close(ops.brightness(values, factor), np.floor(np.minimum(v * factor + 1e-4, 255)))


@pytest.mark.parametrize('factor', FACTORS)
def test_enhancements_are_blends(factor):
    grey = np.floor(IMAGE @ np.array([0.2989, 0.587, 0.114]) * 255.5 / 255 + 1e-4)[..., None]
    close(ops.color(IMAGE, factor), blended(grey, IMAGE, factor))
    # the number of pixels over 256, whatever they show
    for image, constant in (IMAGE, 5), (picture(180, 180), 126), (picture(300, 300), 255):
        close(ops.contrast(image, factor), blended(constant, image, factor))
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]])[..., None]
    smooth = ndimage.convolve(IMAGE.astype(int), kernel) // 13
    smooth[[0, -1]], smooth[:, [0, -1]] = IMAGE[[0, -1]], IMAGE[:, [0, -1]]
    close(ops.sharpness(IMAGE, factor), blended(smooth, IMAGE, factor))
    np.testing.assert_array_equal(
        ops.smooth(IMAGE, 6), Image.fromarray(IMAGE).filter(ImageFilter.SMOOTH)
    )


@pytest.fixture(params=['extension', 'numpy'])
def either(request, monkeypatch):
    """Warps by the extension, and where it is not built."""
    if request.param == 'numpy':
        monkeypatch.setattr(images, '_jpeg', None)
    elif images._jpeg is None:
        pytest.skip('the extension is not built')


def test_warps_are_those_of_tensorflow(either):
    """To the pixel, ties too. A pixel tells its place: (row, column, 255); outside is grey."""
    y, x = np.mgrid[:40, :33]
    places = np.stack([y, x, 0 * x + 255], -1).astype(np.uint8)
    warps = [key for key in TF.files if key.startswith(('rotate', 'shear', 'translate'))]
    assert len(warps) == 19
    for key in warps:
        name, amount = key.split()
        warped = getattr(ops, name)(places, float(amount))
        np.testing.assert_array_equal(warped, TF[key], err_msg=key)
        assert amount == '0.0' or (warped == 128).all(2).mean() > 0.1


def test_warps_of_odd_shapes_stay_inside(either):
    for shape in (1, 1), (1, 50), (50, 1), (2, 3):
        image = np.full((*shape, 3), 9, np.uint8)
        for name in 'rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y':
            for amount in -1e9, -90.0, -0.5, 0.0, 0.5, 1.5, 1e9:
                warped = getattr(ops, name)(image[::-1], amount)
                assert warped.shape == image.shape and set(warped.ravel().tolist()) <= {9, 128}
                if amount == 0:
                    np.testing.assert_array_equal(warped, image)


@pytest.mark.parametrize('kind', ['Brightness', 'Color', 'Contrast', 'Sharpness'])
def test_enhance_is_pillows(kind):
    for factor in 0.1, 0.7, 1.0, 1.9:
        expected = getattr(ImageEnhance, kind)(Image.fromarray(IMAGE)).enhance(factor)
        np.testing.assert_array_equal(ops.enhance(IMAGE, kind, factor), expected)


def test_operations_are_the_same_without_the_extension(monkeypatch):
    if ops._operations is None:
        pytest.skip('the extension is not built')
    rng = np.random.default_rng(0)
    noise, flat = rng.integers(0, 256, (150, 220, 3), np.uint8), np.full((9, 7, 3), 200, np.uint8)
    skewed = np.uint8(rng.integers(30, 250, (64, 65, 3)) ** [1, 0.5, 0.9])
    small = [noise[:h, :w] for h, w in ((1, 1), (2, 1), (1, 5), (3, 3), (2, 90), (17, 3))]
    calls = [
        ('autocontrast', np.float32), ('autocontrast', np.float64), ('equalize',),
        ('scale_values', 1.3, -20.0), ('sharpness', 1.9, 6), ('enhance', 'Brightness', 1.3),
    ]  # fmt: skip
    names = 'color', 'contrast', 'brightness', 'sharpness'
    calls += [(name, factor) for name in names for factor in (-0.7, 0.0, *FACTORS, 30.0)]
    for image in IMAGE, noise, noise[::-1, ::-1], flat, flat * 0, skewed, *small:
        for name, *arguments in calls:
            found = getattr(ops, name)(image, *arguments)
            with monkeypatch.context() as without:
                without.setattr(ops, '_operations', None)
                expected = getattr(ops, name)(image, *arguments)
            np.testing.assert_array_equal(found, expected, err_msg=f'{name} {arguments}')


def test_blends_with_a_uniform_grey_are_pillows():
    shown = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    for value in 0, 5, 126, 255:
        for factor in (*FACTORS, -0.7, 0.33, 30.0):
            expected = Image.blend(Image.new('L', shown.size, value), shown, factor)
            found = ops.blend_uniform(np.asarray(shown)[..., None].repeat(3, 2), value, factor)
            np.testing.assert_array_equal(found[..., 1], expected)


def test_hue_turns_the_circle():
    red = np.full((4, 4, 3), (200, 0, 0), np.uint8)
    assert ops.hue(red, 1 / 3)[0, 0].argmax() == 1 and ops.hue(red, -1 / 3)[0, 0].argmax() == 2
    close(ops.hue(red, 0.5), np.broadcast_to([0, 200, 200], red.shape), atol=6)
    close(ops.hue(red, 0.0), red)


def test_cutout_is_a_square_cut_at_the_border():
    for y, x, half in (10, 12, 4), (0, 32, 5), (39, 1, 60), (7, 7, 0):
        rows, columns = np.arange(40)[:, None], np.arange(33)[None]
        hole = (rows >= y - half) & (rows < y + half) & (columns >= x - half) & (columns < x + half)
        close(ops.cutout(IMAGE, y, x, half), np.where(hole[..., None], 128, IMAGE))


@pytest.mark.parametrize('name', sorted(distort.AUGMENTATIONS))
def test_augmentations_repeat_and_leave_their_input(name):
    augment = distort.AUGMENTATIONS[name]
    different = set()
    for image in IMAGE, IMAGE[:, ::-1], picture(3, 50), picture(2, 1):
        before = image.copy()  # contiguous, where a mirrored image is not
        for seed in range(15):
            a, b = (augment(i, np.random.default_rng(seed)) for i in (image, before))
            assert a.shape == image.shape and a.dtype == np.uint8
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(image, before)
            different.add(a.tobytes())
    few = {'erase': 8, 'greyscale': 4, 'solarize': 4}  # mostly, the image is not changed
    assert len(different) > few.get(name, 15)


def recorded(monkeypatch, table):
    """A table whose operations note (name, arguments) in the list that is returned."""
    calls = []
    for name, (_, *rest) in getattr(randaugment, table).items():
        note = lambda image, *a, name=name: calls.append((name, a)) or image  # noqa: E731
        monkeypatch.setitem(getattr(randaugment, table), name, (note, *rest))
    return calls


def test_randaugment_draws_evenly_with_the_papers_levels(monkeypatch):
    calls = recorded(monkeypatch, 'RANDAUGMENT')
    rng, count = np.random.default_rng(1), 3000
    for _ in range(count):
        randaugment.randaugment(IMAGE, rng, layers=2, magnitude=15)
    names = collections.Counter(name for name, _ in calls)
    assert len(calls) == 2 * count and len(names) == 16
    assert stats.chisquare(list(names.values())).pvalue > 1e-3
    pairs = collections.Counter(zip(*(iter([n for n, _ in calls]),) * 2, strict=True))
    assert len(pairs) == 256  # the second does not depend on the first
    seen = collections.defaultdict(collections.Counter)
    for name, arguments in calls:
        seen[name][tuple(np.round(arguments, 9))] += 1
    expected = {
        'Rotate': 45, 'ShearX': 0.45, 'ShearY': 0.45, 'TranslateX': 150, 'TranslateY': 150,
        'Posterize': 6, 'Solarize': 128, 'SolarizeAdd': 165, 'Color': 2.8, 'Contrast': 2.8,
        'Brightness': 2.8, 'Sharpness': 2.8, 'AutoContrast': None, 'Equalize': None, 'Invert': None,
    }  # fmt: skip
    for name, value in expected.items():
        if name[:5] in ('Rotat', 'Shear', 'Trans'):
            assert set(seen[name]) == {(value,), (-value,)}
            assert stats.binomtest(seen[name][value,], seen[name].total()).pvalue > 1e-4
        else:
            assert set(seen[name]) == {() if value is None else (value,)}
    y, x, half = np.array([a for n, a in calls if n == 'Cutout']).T
    assert set(half) == {60} and y.max() == 39 and x.max() == 32 and y.min() == x.min() == 0


@pytest.mark.parametrize('level, solarize, posterize, factor', [
    (0, 0, 0, 0.1), (5, 128, 2, 1.0), (10, 0, 4, 1.9), (20, 0, 8, 3.7),
])
def test_levels(monkeypatch, level, solarize, posterize, factor):
    calls = recorded(monkeypatch, 'RANDAUGMENT')
    for name in 'Solarize', 'Posterize', 'Color':
        randaugment.operate(randaugment.RANDAUGMENT, name, IMAGE, None, level)
    assert [a[0] for _, a in calls] == [solarize, posterize, pytest.approx(factor)]


def test_autoaugment_applies_by_probability(monkeypatch):
    calls = recorded(monkeypatch, 'AUTOAUGMENT')
    rng, count = np.random.default_rng(2), 8000
    for _ in range(count):
        randaugment.autoaugment(IMAGE, rng)
    counts = collections.Counter(name for name, _ in calls)
    # Each of 25 pairs by the same chance, each of its two by a chance of its own.
    wanted = collections.Counter()
    for name, probability, _ in [o for pair in randaugment.POLICIES for o in pair]:
        wanted[name] += probability / 25
    assert len(randaugment.POLICIES) == 25 and set(counts) == {n for n, p in wanted.items() if p}
    for name, share in wanted.items():
        assert abs(counts[name] / count - share) < 4 * np.sqrt(2 * share / count)
    assert {a for n, a in calls if n == 'TranslateY'} == {(225.0,), (-225.0,)}
    assert {a for n, a in calls if n == 'Posterize'} == {(2,), (0,)}
    calls.clear()
    for name in 'TranslateX', 'Cutout':
        randaugment.operate(randaugment.AUTOAUGMENT, name, IMAGE, rng, 5)
    assert abs(calls[0][1][0]) == 125 and calls[1][1][2] == 50
    calls.clear()
    monkeypatch.setattr(randaugment, 'POLICIES', [(('Color', 1.0, i),) for i in range(25)])
    for _ in range(3000):
        randaugment.autoaugment(IMAGE, rng)
    drawn = collections.Counter(calls)
    assert len(drawn) == 25 and stats.chisquare(list(drawn.values())).pvalue > 1e-3


def test_torchvisions_magnitudes(monkeypatch):
    calls = recorded(monkeypatch, 'TORCHVISION')
    image = np.zeros((100, 331, 3), np.uint8)
    for seed in range(600):
        randaugment.randaugment_torchvision(image, np.random.default_rng(seed))
    names = collections.Counter(name for name, _ in calls)
    assert len(names) == 14 and stats.chisquare(list(names.values())).pvalue > 1e-3
    seen = collections.defaultdict(set)
    for name, arguments in calls:
        seen[name].add(tuple(np.round(arguments, 9)))
    both = {
        'ShearX': 0.09, 'ShearY': 0.09, 'TranslateX': 45, 'TranslateY': 13, 'Rotate': 9.0,
    }  # fmt: skip
    for name, value in both.items():
        assert seen[name] == {(value,), (-value,)}
    for name in 'Brightness', 'Color', 'Contrast', 'Sharpness':
        assert seen[name] == {(1.27,), (0.73,)}
    assert seen['Posterize'] == {(7,)}  # 8 - round(9 / 7.5)
    assert seen['Solarize'] == {(179,)}  # values not below 178.5
    assert randaugment.TORCHVISION['Posterize'][1](14 / 30, None, None) == 6  # 8 - round(1.87)
    assert seen['Identity'] == seen['Equalize'] == seen['AutoContrast'] == {()}


def test_torchvisions_operations_are_pillows():
    by_name = {name: row[0] for name, row in randaugment.TORCHVISION.items()}
    shown = Image.fromarray(IMAGE)
    affine = dict(method=Image.Transform.AFFINE, resample=Image.Resampling.NEAREST)
    expected = {
        ('Identity',): shown, ('AutoContrast',): ImageOps.autocontrast(shown),
        ('Equalize',): ImageOps.equalize(shown), ('Rotate', 9.0): shown.rotate(9.0),
        ('Posterize', 6): ImageOps.posterize(shown, 6),
        ('Solarize', 179): ImageOps.solarize(shown, 178.5),
        ('Color', 1.27): ImageEnhance.Color(shown).enhance(1.27),
        ('Sharpness', 0.73): ImageEnhance.Sharpness(shown).enhance(0.73),
        ('ShearX', 0.23): shown.transform(shown.size, data=(1, 0.23, 0, 0, 1, 0), **affine),
        ('ShearY', -0.23): shown.transform(shown.size, data=(1, 0, 0, -0.23, 1, 0), **affine),
        ('TranslateX', 5): shown.transform(shown.size, data=(1, 0, 5, 0, 1, 0), **affine),
    }  # fmt: skip
    for (name, *arguments), image in expected.items():
        np.testing.assert_array_equal(by_name[name](IMAGE, *arguments), image, err_msg=name)


def test_timms_magnitudes(monkeypatch):
    """timm's rand-m9-mstd0.5-inc1: levels of 9 +- 0.5 up to 10, half of two operations applied."""
    calls, table = [], randaugment_timm.TIMM
    monkeypatch.setattr(randaugment_timm, 'TIMM', {
        name: (lambda image, *given, name=name: calls.append((name, *given)) or image, argument)
        for name, (_, argument) in table.items()
    })  # fmt: skip
    image, draws = np.zeros((100, 200, 3), np.uint8), 8_000
    for seed in range(draws):
        randaugment_timm.randaugment_timm(image, np.random.default_rng(seed))
    assert len(calls) == pytest.approx(draws, abs=4 * (draws / 2) ** 0.5)  # half of two each
    names = collections.Counter(name for name, *_ in calls)
    assert len(names) == 15 and stats.chisquare(list(names.values())).pvalue > 1e-3
    seen = {n: np.array([c[1:] for c in calls if c[0] == n]).reshape(-1) for n in names}
    # From the argument back to the level, which is normal and clipped at 10.
    levels = {
        'Rotate': abs(seen['Rotate']) / 3, 'ShearX': abs(seen['ShearX']) / 0.03,
        'ShearY': abs(seen['ShearY']) / 0.03, 'TranslateX': abs(seen['TranslateX']) / 9,
        'TranslateY': abs(seen['TranslateY']) / 4.5,
        **{n: abs(seen[n] - 1) / 0.09 for n in ('Color', 'Contrast', 'Brightness', 'Sharpness')},
    }  # fmt: skip
    expected = np.minimum(stats.norm(9, 0.5).ppf((np.arange(10_000) + 0.5) / 10_000), 10)
    for name, level in levels.items():
        assert level.max() == pytest.approx(10) and (level > 10 - 1e-9).mean() < 0.06, name
        assert level.mean() == pytest.approx(expected.mean(), abs=0.1), name
        assert level.std() == pytest.approx(expected.std(), abs=0.07), name
        centre = 1 if name in ('Color', 'Contrast', 'Brightness', 'Sharpness') else 0
        assert abs((seen[name] > centre).mean() - 0.5) < 0.1, name
    assert {*seen['Posterize']} == {0, 1}  # one bit kept below level 10, none at it
    assert min(seen['Solarize']) == 0 and np.median(seen['Solarize']) == pytest.approx(26, abs=2)
    assert max(seen['SolarizeAdd']) == 110
    assert np.median(seen['SolarizeAdd']) == pytest.approx(99, abs=1)
    for name in 'AutoContrast', 'Equalize', 'Invert':
        assert not seen[name].size


def test_timms_operations_are_pillows():
    shown = Image.fromarray(IMAGE)
    affine = dict(
        method=Image.Transform.AFFINE, resample=Image.Resampling.BICUBIC, fillcolor=(124, 116, 104)
    )
    add = [min(255, i + 99) if i < 128 else i for i in range(256)]
    expected = {
        ('AutoContrast',): ImageOps.autocontrast(shown), ('Invert',): ImageOps.invert(shown),
        ('Rotate', -27.3): shown.rotate(-27.3, affine['resample'], fillcolor=affine['fillcolor']),
        ('Posterize', 1): ImageOps.posterize(shown, 1), ('Posterize', 0): np.zeros_like(IMAGE),
        ('Solarize', 26): ImageOps.solarize(shown, 26), ('SolarizeAdd', 99): shown.point(add * 3),
        ('Solarize', 256): shown, ('Color', 1.83): ImageEnhance.Color(shown).enhance(1.83),
        ('Contrast', 0.15): ImageEnhance.Contrast(shown).enhance(0.15),
        ('Brightness', 1.8): ImageEnhance.Brightness(shown).enhance(1.8),
        ('Sharpness', 0.1): ImageEnhance.Sharpness(shown).enhance(0.1),
        ('ShearX', 0.27): shown.transform(shown.size, data=(1, 0.27, 0, 0, 1, 0), **affine),
        ('ShearY', -0.27): shown.transform(shown.size, data=(1, 0, 0, -0.27, 1, 0), **affine),
        ('TranslateX', 9.3): shown.transform(shown.size, data=(1, 0, 9.3, 0, 1, 0), **affine),
        ('TranslateY', -4.7): shown.transform(shown.size, data=(1, 0, 0, 0, 1, -4.7), **affine),
    }  # fmt: skip
    for (name, *arguments), image in expected.items():
        found = randaugment_timm.TIMM[name][0](IMAGE, *arguments)
        np.testing.assert_array_equal(found, image, err_msg=name)


def test_three_augment_is_one_of_three(monkeypatch):
    grey = np.asarray(Image.fromarray(IMAGE).convert('L').convert('RGB'))
    solar = np.asarray(ImageOps.solarize(Image.fromarray(IMAGE)))
    kinds, radii = collections.Counter(), []
    spread = IMAGE.astype(float).std()
    for seed in range(900):
        out = distort.three_augment(IMAGE, np.random.default_rng(seed), jitter=0.0)
        kind = 0 if np.array_equal(out, grey) else 1 if np.array_equal(out, solar) else 2
        kinds[kind] += 1
        if kind == 2:
            radii.append(out.astype(float).std() / spread)
    assert stats.chisquare([kinds[i] for i in range(3)]).pvalue > 1e-3
    least = np.asarray(Image.fromarray(IMAGE).filter(ImageFilter.GaussianBlur(2))).std() / spread
    assert least * 0.999 < min(radii) < least * 1.05 and 0.99 < max(radii) <= 1.001
    given = []
    monkeypatch.setattr(distort, 'color_jitter', lambda image, rng, **more: given.append(more))
    distort.three_augment(IMAGE, np.random.default_rng(0))
    assert given == [dict(brightness=0.3, contrast=0.3, saturation=0.3)]


def test_color_jitter_draws_factors_and_an_order(monkeypatch):
    calls = []
    monkeypatch.setattr(
        ops, 'enhance', lambda image, kind, factor: calls.append((kind, factor)) or image
    )
    monkeypatch.setattr(ops, 'hue', lambda image, turn: calls.append(('Hue', turn)) or image)
    rng, count = np.random.default_rng(3), 1500
    for _ in range(count):
        distort.color_jitter(
            IMAGE, rng, brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1
        )
    ranges = {
        'Brightness': (0.6, 1.4), 'Contrast': (0, 2.5), 'Color': (0.8, 1.2), 'Hue': (-0.1, 0.1),
    }  # fmt: skip
    for kind, (low, high) in ranges.items():
        drawn = [x for k, x in calls if k == kind]
        assert len(drawn) == count
        assert stats.kstest(drawn, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    orders = collections.Counter(zip(*(iter([k for k, _ in calls]),) * 4, strict=True))
    assert len(orders) == 24 and stats.chisquare(list(orders.values())).pvalue > 1e-3
    calls.clear()
    distort.color_jitter(IMAGE, rng, brightness=0.0, contrast=0.1, saturation=0.0)
    assert [k for k, _ in calls] == ['Contrast']


def erased(count, **settings):
    """Boxes (y, x, height, width) of white images that were erased, and how many were not."""
    image, boxes = np.full((200, 300, 3), 255, np.uint8), []
    for seed in range(count):
        out = distort.erase(image, np.random.default_rng(seed), fill='black', **settings)
        hole = (out == 0).all(2)
        if hole.any():
            y, x = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
            boxes.append((y[0], x[0], len(y), len(x)))
            assert hole.sum() == len(y) * len(x) and (out[~hole] == 255).all()
    return np.array(boxes), count - len(boxes)


def test_erase_draws_area_aspect_and_place():
    count = 1500
    (y, x, h, w), missed = (lambda boxes, n: (boxes.T, n))(
        *erased(count, probability=0.5, area=(0.02, 0.2))
    )
    assert stats.binomtest(missed, count).pvalue > 1e-3
    # An area of 0.2 and an aspect of 10/3 fit: 200 high and 60 wide; not so when tall and large.
    area, aspect = h * w / 60_000, np.log(h / w)
    fits = area < 0.2 * 3 / 4.5  # all aspects do below (200 / 300) * 3 / 10
    assert stats.kstest(area[fits], stats.uniform(0.02, 0.2 * 3 / 4.5 - 0.02).cdf).pvalue > 1e-3
    bound = np.log(10 / 3)
    assert stats.kstest(aspect[fits], stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-3
    assert stats.kstest((y + 0.5) / (201 - h), stats.uniform.cdf).pvalue > 1e-3
    assert stats.kstest((x + 0.5) / (301 - w), stats.uniform.cdf).pvalue > 1e-3


def test_erase_has_the_aspect_of_height_to_width():
    boxes, missed = erased(100, probability=1.0, area=(0.05, 0.1), aspect=(2.0, 3.0))
    ratio = boxes[:, 2] / boxes[:, 3]
    assert missed == 0 and 1.9 < ratio.min() < 2.1 and 2.9 < ratio.max() < 3.1


def test_a_box_that_never_fits_erases_nothing():
    boxes, missed = erased(20, probability=1.0, area=(1.0, 1.0))
    assert missed == 20 and not len(boxes)


def test_erase_fills_with_imagenets_colours():
    image = np.zeros((160, 160, 3), np.uint8)
    settings = dict(probability=1.0, area=(0.3, 0.3), aspect=(1.0, 1.0))
    noise = distort.erase(image, np.random.default_rng(0), **settings)
    box = noise[noise.any(2)].astype(float)  # [N, 3]
    mean, std = 255 * distort.MEAN, 255 * distort.STD
    exact = stats.norm(mean, std)  # clipped to a byte
    drawn = np.clip(exact.rvs((200_000, 3), random_state=0), 0, 255)
    n = len(box)
    assert 7400 < n < 7800
    assert np.all(np.abs(box.mean(0) - drawn.mean(0)) < 4 * std / np.sqrt(n) + 0.5)
    assert np.all(np.abs(box.std(0) / drawn.std(0) - 1) < 4 / np.sqrt(n))
    assert np.abs(np.corrcoef(box.T) - np.eye(3)).max() < 4 / np.sqrt(n)
    flat = distort.erase(image, np.random.default_rng(0), fill='mean', **settings)
    assert {tuple(c) for c in flat.reshape(-1, 3).tolist()} == {(0, 0, 0), (124, 116, 104)}


def test_augreg_presets():
    rows = {
        name: (*((c['layers'], c['magnitude']) for c in row['augment']), row['mixup'])
        for name, row in distort.AUGREG.items()
    }
    assert rows == {
        'none': (0.0,), 'light1': ((2, 0), 0.0), 'light2': ((2, 10), 0.2),
        'medium1': ((2, 15), 0.2), 'medium2': ((2, 15), 0.5), 'strong1': ((2, 20), 0.5),
        'strong2': ((2, 20), 0.8),
    }  # fmt: skip
    assert all(c['name'] in distort.AUGMENTATIONS for r in distort.AUGREG.values()
               for c in r['augment'])  # fmt: skip


def test_a_magnitude_beyond_the_bins_is_a_mistake():
    with pytest.raises(UserError, match='magnitude 31 of 31 bins'):
        randaugment.randaugment_torchvision(IMAGE, np.random.default_rng(0), magnitude=31)
