"""Files of every kind are decoded to what viewers show; each is written here from known samples."""

import io
import itertools
import json
import os
import pathlib
import struct
import subprocess
import sys
import zlib

import numpy as np
import pictures
import pytest
from PIL import Image

from vit_jax.data import images, metadata

CASES = pathlib.Path(__file__).parent / 'data' / 'images'
RNG = np.random.default_rng(0)
SIZE = 9, 13


def decoded(data):
    """uint8 [H, W, 3], by both paths."""
    image, whole = images.read(data), images.decode(data)
    assert tuple(image.shape) == whole.shape
    np.testing.assert_array_equal(image, whole)
    return whole


def assert_shows(data, expected, within=1):
    expected = np.broadcast_to(expected, (*expected.shape[:2], 3))
    np.testing.assert_allclose(decoded(data).astype(float), expected, atol=within)


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


PHOTO = np.uint8(np.stack([np.add.outer(np.arange(24) * 3, np.arange(40) * k) for k in (0, 2, 4)],
                          -1))  # fmt: skip


def saved(kind, image=PHOTO, **options):
    out = io.BytesIO()
    options = dict(lossless=True) | options if kind == 'WEBP' else options
    Image.fromarray(image).save(out, kind, **options)
    return out.getvalue()


def with_exif(kind, exif, image=PHOTO):
    """An image file with EXIF data of just these bytes, a TIFF structure."""
    if kind == 'PNG':
        data = saved('PNG', image)
        return data[:33] + pictures.chunk(b'eXIf', exif) + data[33:]
    return saved(kind, image, exif=b'Exif\0\0' + exif)


def turns(image):
    """What EXIF's orientations 1 to 8 make of an image (TIFF 6.0, tag 274)."""
    across = image.swapaxes(0, 1)
    return [image, image[:, ::-1], np.rot90(image, 2), image[::-1], across, np.rot90(image, -1),
            np.rot90(across, 2), np.rot90(image)]  # fmt: skip


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF', 'MPO'])
def test_all_orientations(kind, order):
    if kind == 'TIFF':
        upright = PHOTO
    else:
        upright = decoded(saved(kind, **(dict(save_all=True) if kind == 'MPO' else {})))
    for k, expected in enumerate(turns(upright), 1):
        exif = pictures.tiff_of([(271, 2, b'maker'), (metadata.ORIENTATION, 3, [k])], order=order)
        for compress in (False, True) if kind == 'TIFF' else (False,):
            if kind == 'TIFF':
                tags = [(metadata.ORIENTATION, 3, [k])]
                data = pictures.tiff(PHOTO, 8, 2, order=order, compress=compress, tags=tags)
            elif kind == 'MPO':
                more = dict(save_all=True, append_images=[Image.fromarray(PHOTO[::-1])])
                data = saved('MPO', exif=b'Exif\0\0' + exif, **more)
            else:
                data = with_exif(kind, exif)
            np.testing.assert_array_equal(decoded(data), expected)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
def test_an_orientation_in_xmp_alone_turns_nothing(kind):
    if kind == 'JPEG':
        plain, body = saved('JPEG'), b'http://ns.adobe.com/xap/1.0/\0' + XMP
        data = plain[:2] + b'\xff\xe1' + struct.pack('>H', len(body) + 2) + body + plain[2:]
    elif kind == 'PNG':
        plain = saved('PNG')
        text = pictures.chunk(b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0' + XMP)
        data = plain[:33] + text + plain[33:]
    elif kind == 'WEBP':
        plain, data = saved('WEBP'), saved('WEBP', xmp=XMP)
    else:
        plain, data = (pictures.tiff(PHOTO, 8, 2, tags=tags) for tags in ([], [(700, 1, XMP)]))
    assert data != plain
    np.testing.assert_array_equal(decoded(data), decoded(plain))


ODD = [  # (tag, type, values) that no viewer minds
    (282, 5, [1, 0]), (282, 10, [-1, 0]), (33432, 5, [1, 0]), (33432, 2, b'\xff\xfe'),
    (271, 12, [0.5]), (282, 12, [float('nan')]), (34665, 2, b'x'), (34665, 4, [2**32 - 1]),
    (34665, 4, [8]), (37500, 7, bytes(70000)[:3000]), (0, 3, [0]), (65535, 99, b'abcd'),
    (700, 5, [0, 0]), (34853, 4, [12]), (272, 1, []), (metadata.ORIENTATION, 3, [0]),
    (metadata.ORIENTATION, 3, [9]), (metadata.ORIENTATION, 3, [6, 6]),
    (metadata.ORIENTATION, 2, b'\6\0'), (metadata.ORIENTATION, 12, [6.0]),
]  # fmt: skip


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
def test_odd_entries_make_nothing_unreadable(kind):
    plain = pictures.tiff(PHOTO, 8, 2) if kind == 'TIFF' else saved(kind)
    upright = decoded(plain)
    for (tag, number, values), order in itertools.product(ODD, '<>'):
        entry = [(tag, number, values)]
        if kind == 'TIFF':
            data = pictures.tiff(PHOTO, 8, 2, order=order, tags=entry)
        else:
            data = with_exif(kind, pictures.tiff_of(entry, order=order))
        np.testing.assert_array_equal(decoded(data), upright, err_msg=f'{tag} {number} {values}')
    for exif in (b'', b'II', b'MM\0*', b'II*\0\xff\xff\xff\xff', b'XX' + bytes(30), b'\xff' * 99):
        if kind != 'TIFF':
            np.testing.assert_array_equal(decoded(with_exif(kind, exif)), upright)


def test_bytes_between_the_segments_of_a_jpeg_are_skipped():
    plain = saved('JPEG', exif=b'Exif\0\0' + pictures.tiff_of([(metadata.ORIENTATION, 3, [6])]))
    shown, end = decoded(plain), 4 + int.from_bytes(plain[4:6]) - 2 + 2
    assert plain[end] == 0xFF and shown.shape == (40, 24, 3)
    for junk in (b'junk', b'\0', b'\xff', b'\xff\xff\xff', b'a\xff\0b', bytes(5000)):
        np.testing.assert_array_equal(decoded(plain[:2] + junk + plain[2:]), shown)
        np.testing.assert_array_equal(decoded(plain[:end] + junk + plain[end:]), shown)


def test_texts_of_a_png_do_not_count_whatever_is_in_them():
    samples = RNG.integers(0, 256, (*SIZE, 3))
    plain = pictures.png(samples, 8, 2)
    long = zlib.compress(bytes(50_000_000), 9)
    damaged = bytearray(pictures.chunk(b'tEXt', b'Comment\0a'))
    damaged[-1] ^= 1
    for extra in (pictures.chunk(b'zTXt', b'Comment\0\0' + long),
                  pictures.chunk(b'iTXt', b'Comment\0\1\0\0\0' + long),
                  pictures.chunk(b'iCCP', b'profile\0\0' + long),
                  pictures.chunk(b'tEXt', b'Comment\0' + bytes(3_000_000)), bytes(damaged),
                  pictures.chunk(b'pHYs', b'x'), pictures.chunk(b'gAMA'),
                  pictures.chunk(b'zTXt', b'Comment\0\0not deflated')):  # fmt: skip
        assert_shows(pictures.png(samples, 8, 2, extra=extra), samples, 0)
        deep = RNG.integers(0, 2**16, (*SIZE, 3))
        key = deep[2, 2].astype('>u2').tobytes()
        np.testing.assert_array_equal(
            decoded(pictures.png(deep, 16, 2, trns=key, extra=extra)),
            decoded(pictures.png(deep, 16, 2, trns=key)),
        )
    at = plain.index(b'IDAT') + 10
    broken = plain[:at] + bytes([plain[at] ^ 1]) + plain[at + 1 :]
    with pytest.raises(images.Unreadable):
        decoded(broken)
    header = struct.pack('>IIBBBBB', 20000, 20000, 8, 2, 0, 0, 0)
    bomb = plain[:8] + pictures.chunk(b'IHDR', header) + plain[33:]
    with pytest.raises(images.Unreadable, match='bomb'):
        decoded(bomb)


def test_transparency_that_is_damaged_or_in_the_wrong_place_does_not_count():
    samples = RNG.integers(0, 2, (*SIZE, 1)) * 255
    plain = pictures.png(samples, 8, 0)
    key = pictures.chunk(b'tRNS', b'\0\0')
    end = plain.index(b'IDAT') + 8 + struct.unpack('>I', plain[33:37])[0]
    for data in (plain[:33] + key[:-1] + bytes([key[-1] ^ 1]) + plain[33:],
                 plain[:end] + key + plain[end:],
                 plain[:33] + pictures.chunk(b'tRNS', b'\0\0\0\0') + plain[33:]):  # fmt: skip
        assert_shows(data, samples, 0)
    assert_shows(plain[:33] + key + plain[33:], np.full_like(samples, 255), 0)


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


@pytest.mark.skipif('avif' not in images.SUFFIXES, reason='this Pillow was built without AVIF')
def test_avif_turns_by_its_own_boxes():
    for k, expected in enumerate(turns(decoded(saved('AVIF', quality=100))), 1):
        exif = pictures.tiff_of([(metadata.ORIENTATION, 3, [k]), (282, 5, [1, 0])])
        shown = decoded(saved('AVIF', quality=100, exif=exif))
        np.testing.assert_array_equal(shown, expected)


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
