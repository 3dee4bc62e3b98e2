"""Files of every kind are decoded to what viewers show; each is written here from known samples."""

import io
import itertools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pictures
import pytest
from pictures import PHOTO, assert_shows, decoded, saved
from PIL import Image

from vit_jax.data import images

CASES = pathlib.Path(__file__).parent / 'data' / 'images'
RNG = np.random.default_rng(0)
SIZE = 9, 13


def over_white(values, alpha):
    """Values and alpha in 0 to 1 as grey levels of 255."""
    return 255 * (values * alpha + 1 - alpha)


@pytest.mark.parametrize('name', sorted(json.loads((CASES / 'expected.json').read_text())))
def test_files_found_in_the_world(name):
    expected = json.loads((CASES / 'expected.json').read_text())[name]
    image = decoded((CASES / name).read_bytes())
    assert list(image.shape[:2]) == expected['shape']
    half = image.shape[1] // 2
    for part, mean in zip((image[:, :half], image[:, half:]), expected['left_right'], strict=True):
        np.testing.assert_allclose(part[2:-2, 2:-2].mean((0, 1)), mean, atol=4)


@pytest.mark.parametrize('interlace', [False, True])
@pytest.mark.parametrize('depth, colour', [
    *itertools.product((1, 2, 4, 8, 16), [0]), *itertools.product((1, 2, 4, 8), [3]),
    *itertools.product((8, 16), (2, 4, 6)),
])  # fmt: skip
def test_pngs(depth, colour, interlace):
    channels, top = pictures.CHANNELS[colour], 2**depth - 1
    samples = RNG.integers(0, 2**depth, (*SIZE, channels))
    samples[:5] = 0x1200 * (depth == 16) + RNG.integers(0, 2, (5, SIZE[1], channels))
    options, key = dict(interlace=interlace), samples[2, 2]
    shown = samples if depth < 16 else samples >> 8
    if colour == 3:
        palette, alpha = RNG.integers(0, 256, (top + 1, 3)), RNG.integers(0, 256, top + 1)
        shown = palette[samples[..., 0]]
        assert_shows(pictures.png(samples, depth, 3, palette=palette, **options), shown, 0)
        expected = over_white(shown / 255, alpha[samples] / 255)
        for trns in (alpha, np.where(alpha < 128, 0, 255)):
            expected = over_white(shown / 255, trns[samples] / 255)
            trns = np.uint8(trns).tobytes()
            data = pictures.png(samples, depth, 3, palette=palette, trns=trns, **options)
            assert_shows(data, expected)
    elif colour in (4, 6):
        shown = over_white(shown[..., :-1] / 255, shown[..., -1:] / 255)
        assert_shows(pictures.png(samples, depth, colour, **options), shown)
    else:
        shown = shown * 255 // min(top, 255)
        assert_shows(pictures.png(samples, depth, colour, **options), shown, 0)
        transparent = (samples == key).all(-1, keepdims=True)
        data = pictures.png(samples, depth, colour, trns=key.astype('>u2').tobytes(), **options)
        assert 0 < transparent.mean() < 1
        assert_shows(data, np.where(transparent, 255, shown), 0)


READ_TIFFS = [  # bits, photometric, planes, extra sample (1: alpha, multiplied; 2: not), tiles of
    *((b, p, False, None, t) for b in (1, 2, 4, 8, 16) for p in (0, 1) for t in (None, 16)),
    *((b, 2, False, x, t) for b in (8, 16) for x in (None, 0, 1, 2) for t in (None, 16)),
    *((8, 2, True, x, t) for x in (None, 2) for t in (None, 16)),
    *((8, 1, False, x, None) for x in (0, 1, 2)), (8, 1, False, None, 16),
]  # fmt: skip


@pytest.mark.parametrize('order', '<>')
def test_tiffs(order):
    """Those of all kinds are as viewers show them, or refused; those above are not refused."""
    kinds = itertools.product((1, 2, 4, 8, 12, 16), (0, 1, 2), (False, True), (None, 0, 1, 2),
                              (None, 16))  # fmt: skip
    for (bits, photometric, planar, extra, tile), compress in itertools.product(kinds, (0, 1)):
        colours, top = 3 if photometric == 2 else 1, 2**bits - 1
        if planar and colours == 1 and extra is None:
            continue
        samples = RNG.integers(0, 2**bits, (*SIZE, colours + (extra is not None)))
        if extra == 1:
            samples[..., :-1] = np.minimum(samples[..., :-1], samples[..., -1:])
        tags = [] if extra is None else [(338, 3, [extra])]
        data = pictures.tiff(samples, bits, photometric, order=order, planar=planar, tags=tags,
                             compress=compress, tile=tile)  # fmt: skip
        values, alpha = samples[..., :colours] / top, samples[..., -1:] / top if extra else 1
        if photometric == 0:
            values = (alpha if extra == 1 else 1) - values
        shown = 255 * (values * (alpha if extra == 2 else 1) + 1 - alpha)
        kind = bits, photometric, planar, extra, tile
        try:
            assert_shows(data, shown, 3 if extra else 1)
        except images.Unreadable:
            assert kind not in READ_TIFFS and (bits, order) != (12, '<') or extra is not None or (
                photometric == 2), kind  # fmt: skip
        except AssertionError as e:
            raise AssertionError(f'{kind}, compressed {compress}: {e}') from e


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('bits', [1, 2, 4, 8])
@pytest.mark.parametrize('compress', [False, True])
def test_palettes_of_tiffs_have_8_or_16_bits(order, bits, compress):
    samples = RNG.integers(0, 2**bits, (*SIZE, 1))
    palette = RNG.integers(0, 256, (3, 2**bits))
    shown = palette.T[samples[..., 0]]
    for scale in (1, 257):
        tags = [(320, 3, (palette * scale).reshape(-1).tolist())]
        data = pictures.tiff(samples, bits, 3, order=order, compress=compress, tags=tags)
        assert_shows(data, shown, 0)


def test_pixels_without_a_range_are_refused():
    values = RNG.integers(0, 100, (*SIZE, 1))
    for bits, kind in itertools.product((8, 16, 32), (2, 3)):
        data = values.astype(f'f{bits // 8}') if kind == 3 and bits > 8 else values
        with pytest.raises(images.Unreadable):
            decoded(pictures.tiff(data, bits, 1, tags=[(339, 3, [kind])]))
    for order in '<>':
        with pytest.raises(images.Unreadable):
            decoded(pictures.tiff(values, 32, 1, order=order))


@pytest.mark.parametrize('y, x, height, width', [
    (0, 0, 9, 13), (0, 0, 9, 5), (3, 0, 6, 13), (2, 4, 3, 3), (8, 12, 1, 1),
])  # fmt: skip
@pytest.mark.parametrize('transparent', [None, 2])
@pytest.mark.parametrize('background', [0, 1, 2])
def test_what_the_first_frame_of_a_gif_leaves_is_white(
    y, x, height, width, transparent, background
):
    indices = RNG.integers(0, 4, (height, width))
    palette = RNG.integers(0, 256, (4, 3))
    shown = np.full((*SIZE, 3), 255)
    part = palette[indices]
    if transparent is not None:
        part[indices == transparent] = 255
    shown[y : y + height, x : x + width] = part
    for disposal, more in itertools.product(range(4), (False, True)):
        frames = [(y, x, indices, transparent, disposal)]
        frames += [(0, 0, RNG.integers(0, 4, SIZE), None, 0)] * more
        data = pictures.gif(SIZE, frames, background=background, palette=palette)
        assert_shows(data, shown, 0)


@pytest.mark.parametrize('top', [1, 15, 100, 255, 1000, 65535])
@pytest.mark.parametrize('channels', [1, 3])
def test_pnms(top, channels):
    samples = RNG.integers(0, top + 1, (*SIZE, channels))
    data = samples.astype('>u2' if top > 255 else 'u1').tobytes()
    text = ' '.join(map(str, samples.reshape(-1))).encode()
    head = b' %d %d %d\n' % (SIZE[1], SIZE[0], top)
    for content in (b'P%d' % (6 if channels == 3 else 5) + head + data,
                    b'P%d' % (3 if channels == 3 else 2) + head + text):  # fmt: skip
        assert_shows(content, samples / top * 255)


@pytest.mark.parametrize('kind', ['PNG', 'WEBP'])
def test_an_animation_with_smaller_frames_is_its_first_frame(kind):
    first = np.dstack([PHOTO, np.tile(np.uint8([0, 80, 160, 255]), (24, 10))])
    second = first.copy()
    second[3:9, 5:11] = 7
    options = dict(save_all=True, append_images=[Image.fromarray(second)])
    options |= dict(background=(0, 255, 0, 255), exact=True) if kind == 'WEBP' else {}
    assert_shows(saved(kind, first, **options), over_white(PHOTO / 255, first[..., 3:] / 255), 2)


@pytest.mark.parametrize('mode', ['L', 'RGB', 'CMYK'])
@pytest.mark.parametrize('progressive', [False, True])
def test_jpegs_with_and_without_an_adobe_marker(mode, progressive):
    smooth = Image.fromarray(PHOTO)
    out = io.BytesIO()
    smooth.convert(mode).save(out, 'JPEG', quality=95, progressive=progressive)
    expected = np.asarray(smooth.convert(mode).convert('RGB'))
    assert_shows(out.getvalue(), expected, 12)


FUZZ = """
import fuzz_images, sys, warnings
warnings.simplefilter('ignore')
fuzz_images.limited()
print(*fuzz_images.fuzz(count=int(sys.argv[1]), seed=int(sys.argv[2])))
"""


def fuzzed(count, seed):
    """(files read, files refused) of mutations, in a process with limited memory."""
    done = subprocess.run(
        [sys.executable, '-c', FUZZ, str(count), str(seed)], text=True, capture_output=True,
        cwd=pathlib.Path(__file__).parent, timeout=1500,
        env=os.environ | {'MALLOC_PERTURB_': '165', 'MALLOC_CHECK_': '3'},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return tuple(map(int, done.stdout.split()))


def test_damaged_files_are_arrays_or_unreadable():
    read, refused = fuzzed(1500, 0)
    assert read > 100 and refused > 500


@pytest.mark.slow
def test_many_damaged_files_are_arrays_or_unreadable():
    read, refused = fuzzed(40_000, 1)
    assert read > 3000 and refused > 10_000


def test_a_jpeg_of_a_thousand_scans_is_refused_at_once():
    """Each goes over the whole image: a file of 100 kB could take minutes, one of 20 MB hours."""
    plain = saved('JPEG', np.full((2048, 2048), 99, np.uint8), progressive=True)
    last = plain[plain.rindex(b'\xff\xc4', 0, plain.rindex(b'\xff\xda')) : -2]
    few, many = (plain[:-2] + last * count + b'\xff\xd9' for count in (20, 1024))
    assert images.read(few).shape == (2048, 2048, 3)
    for read in (images.read, images.decode):
        with pytest.raises(images.Unreadable, match='10.. scans of 2048 x 2048 pixels'):
            read(many)
    movie = np.random.default_rng(0).bytes(2_000_000)  # behind the picture, as telephones have it
    assert decoded(saved('JPEG') + movie).shape == (24, 40, 3)
