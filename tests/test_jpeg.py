"""JPEG windows by the extension: Pillow's bits, TensorFlow's preprocessing, nothing on trust."""

import io
import itertools
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pictures
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image

from vit_jax.data import augment, images, metadata

HEADERS = [pathlib.Path(p) / 'jpeglib.h' for p in ('/usr/include', '/usr/local/include')]
# What tf.image makes of three files, TensorFlow 2.21; every fifth row and column.
TF = np.load(pathlib.Path(__file__).parent / 'data' / 'preprocess_tf.npz', allow_pickle=False)
needs_extension = pytest.mark.skipif(images._jpeg is None, reason='the extension is not built')


def photo(height, width, offset=0):
    """A window of a photograph."""
    return load_sample_image('china.jpg')[offset : offset + height, offset : offset + width]


def encoded(image, **options):
    out = io.BytesIO()
    Image.fromarray(image).save(out, 'JPEG', **options)
    return out.getvalue()


def test_the_extension_is_there_where_it_can_be_built():
    assert images._jpeg is not None or not any(path.exists() for path in HEADERS)


@st.composite
def cases(draw):
    h, w = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    options = dict(
        quality=draw(st.sampled_from([3, 30, 75, 95, 100])),
        progressive=draw(st.sampled_from([False, False, True])), optimize=draw(st.booleans()),
    )  # fmt: skip
    grey = draw(st.sampled_from([False, False, True]))
    if not grey:
        options['subsampling'] = draw(st.sampled_from([0, 1, 2]))
        if draw(st.booleans()):
            options['keep_rgb'] = options['subsampling'] == 0
    restarts = draw(st.sampled_from([None, 'restart_marker_blocks', 'restart_marker_rows']))
    if restarts:
        options[restarts] = draw(st.integers(1, 5))
    y, x = draw(st.integers(0, h - 1)), draw(st.integers(0, w - 1))
    box = y, x, draw(st.integers(1, h - y)), draw(st.integers(1, w - x))
    image = photo(h, w, draw(st.integers(0, 200)))
    return encoded(image[..., 0] if grey else image, **options), box


@needs_extension
@settings(max_examples=400, deadline=None)
@given(cases(), st.booleans())
def test_windows_have_the_bits_of_the_whole_image(case, own):
    data, box = case
    image = images.read(data)
    assert isinstance(image, images.Encoded)
    y, x, h, w = box
    whole = images.decode(data)
    assert image.shape == whole.shape
    window = np.empty((h, w, 3), np.uint8)
    # this raises where `resized` would fall back on Pillow
    images._jpeg.view(data, window, *images.scaled(box, 1), 1, 0, True, False, own)
    np.testing.assert_array_equal(window, whole[y : y + h, x : x + w])
    mirrored = images.resized(image, box, (h, w), flip=True)
    np.testing.assert_array_equal(mirrored, window[:, ::-1])


@needs_extension
@settings(max_examples=100, deadline=None)
@given(
    cases(), st.sampled_from(images.METHODS), st.booleans(), st.booleans(),
    st.tuples(st.integers(1, 120), st.integers(1, 120)) | st.tuples(*2 * [st.integers(1, 6)]),
)  # fmt: skip
def test_a_window_is_resized_as_if_all_of_it_was_decoded(case, method, antialias, own, size):
    """Blocks and rows that no filter touches are left out, which no pixel shows."""
    data, box = case
    height, width, _ = images.read(data).shape
    whole = np.empty((height, width, 3), np.uint8)
    place = images.scaled((0, 0, height, width), 1)
    images._jpeg.view(data, whole, *place, 1, 0, antialias, False, False)
    ours, kind = np.empty((*size, 3), np.uint8), images.METHODS.index(method)
    place = images.scaled(box, 1)
    images._jpeg.view(data, ours, *place, 1, kind, antialias, False, own)
    np.testing.assert_array_equal(ours, images.resized(whole, box, size, method, antialias))


@needs_extension
@pytest.mark.parametrize('method', images.METHODS)
@pytest.mark.parametrize('antialias', [True, False])
def test_rows_that_are_still_needed_stay(method, antialias):
    """More rows than are kept at a time, and filters whose first pixel goes up and down."""
    data = encoded(photo(300, 600))
    whole, window = np.empty((300, 600, 3), np.uint8), ((0, 0, 300, 600), (0, 0, 300, 600))
    images._jpeg.view(data, whole, *window, 1, 0, antialias, False, True)
    for size in (900, 20), (71, 3), (11, 600), (1, 1):
        ours, kind = np.empty((*size, 3), np.uint8), images.METHODS.index(method)
        images._jpeg.view(data, ours, *window, 1, kind, antialias, False, True)
        wanted = images.resized(whole, window[0], size, method, antialias)
        np.testing.assert_array_equal(ours, wanted)


FACTORS = list(itertools.product((1, 2, 3, 4), repeat=2))  # across, down, of a component
SAMPLINGS = [
    [y, cb, cr] for y, cb, cr in itertools.product(FACTORS, repeat=3)
    if y[0] * y[1] + cb[0] * cb[1] + cr[0] * cr[1] <= 10  # blocks of an MCU
]  # fmt: skip


@needs_extension
@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(SAMPLINGS + [[factors] for factors in FACTORS]),
    st.integers(17, 90), st.integers(17, 90), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**32),
    st.sampled_from([None, 0, 1]), st.booleans(),
)  # fmt: skip
def test_windows_are_right_at_every_scale_and_sampling(sampling, h, w, scale, seed, adobe, own):
    """Those of the whole image at this scale, as libjpeg-turbo in Pillow decodes it."""
    rng = np.random.default_rng(seed)
    data = pictures.jpeg(h, w, sampling, rng, adobe=adobe)
    with Image.open(io.BytesIO(data)) as file:
        file.draft(None, (w // scale, h // scale))
        assume(file.size == (-(-w // scale), -(-h // scale)))
        try:
            whole = np.asarray(file.convert('RGB'))
        except OSError:  # fractions, as of 3 and 2, are not in libjpeg
            with pytest.raises(images.Unreadable):
                images.resized(images.read(data), (0, 0, h, w), (h, w))
            return
    height, width = whole.shape[:2]
    for _ in range(6):
        y, x = int(rng.integers(height)), int(rng.integers(width))
        box = y, x, int(rng.integers(1, height - y + 1)), int(rng.integers(1, width - x + 1))
        window = np.empty((*box[2:], 3), np.uint8)
        images._jpeg.view(data, window, box, (0, 0, *box[2:]), scale, 0, True, False, own)
        np.testing.assert_array_equal(window, whole[y : y + box[2], x : x + box[3]])
        tiny = np.empty((2, 3, 3), np.uint8)
        images._jpeg.view(data, tiny, box, (0, 0, *box[2:]), scale, 0, True, False, own)
        np.testing.assert_array_equal(tiny, images.resized(whole, box, (2, 3)))
        plain, alike = tiny.copy(), tiny.copy()  # by the fast inverse DCT
        for entropy, out in (own, plain), (False, alike):
            images._jpeg.view(data, out, box, (0, 0, *box[2:]), scale, 1, False, False, entropy)
        np.testing.assert_array_equal(plain, alike)


def differences(ours, theirs):
    """(mean absolute difference, share of pixels with one above 4)."""
    apart = np.abs(ours.astype(float) - theirs.astype(float))
    return apart.mean(), (apart.max(-1) > 4).mean()


@pytest.mark.parametrize('i', [1, 2, 3])
def test_preprocessing_is_that_of_tensorflow(i):
    """Within 0.5 grey levels; where Pillow decodes, its accurate inverse DCT alone is 0.7 to 1."""
    mean = 0.5 if images._jpeg else 1.5
    image = images.read(TF[f'jpeg{i}'].tobytes())
    whole, window = (0, 0, *image.shape[:2]), tuple(map(int, TF[f'window{i}']))
    small = augment.small_central(image.shape[:2], None, size=(224, 224))
    plain = dict(size=(224, 224), antialias=False)
    for ours, theirs in (
        (small.image(image), 'resize_small256_area_central224_'),
        (images.resized(image, window, **plain), 'window_bilinear224_'),
        (images.resized(image, whole, **plain) + 0.5, 'resize224_bilinear'),  # not cut off
    ):
        apart, wrong = differences(ours[::5, ::5], TF[f'{theirs}{i}'])
        assert apart <= mean and wrong <= 0.03, (theirs, apart, wrong)


SHAPES = [((37, 53), (16, 16)), ((20, 31), (45, 40)), ((90, 14), (14, 14)), ((5, 1), (7, 3))]


def assert_cast_of(ours, exact, antialias):
    """uint8 is what real values are rounded, or else cut off, to."""
    exact = exact.clip(0, 255)
    low, high = (exact - 0.502, exact + 0.502) if antialias else (exact - 1, exact + 0.002)
    assert ((low <= ours) & (ours <= high)).all()


@pytest.mark.parametrize('method', images.METHODS)
@pytest.mark.parametrize('antialias', [True, False])
@pytest.mark.parametrize('shape, size', SHAPES)
def test_resizing_is_the_product_with_its_weights(shape, size, method, antialias):
    image = photo(100, 100)
    (h, w), (height, width) = shape, size
    exact = np.einsum(
        'ih,hwc,jw->ijc', images.weights(h, height, method, antialias),
        image[5 : 5 + h, 7 : 7 + w].astype(float), images.weights(w, width, method, antialias),
    )[:, ::-1]  # fmt: skip
    for resized in (images.resized, images.resized_by_numpy):
        ours = resized(image, (5, 7, h, w), size, method, antialias, True)
        assert_cast_of(ours, exact, antialias)


def test_white_stays_white():
    white = np.full((37, 41, 3), 255, np.uint8)
    for method in images.METHODS:
        for antialias in (True, False):
            assert images.resized(white, (0, 0, 37, 41), (50, 23), method, antialias).min() == 255


@pytest.mark.parametrize('shape, size', SHAPES)
def test_antialiased_filters_are_those_of_pillow(shape, size):
    image, box = photo(100, 100), (5, 7, *shape)
    window = Image.fromarray(image[5 : 5 + shape[0], 7 : 7 + shape[1]])
    for method, theirs in (('bilinear', Image.Resampling.BILINEAR),
                           ('bicubic', Image.Resampling.BICUBIC)):  # fmt: skip
        apart = images.resized(image, box, size, method) - np.asarray(
            window.resize(size[::-1], theirs), int
        )
        assert np.abs(apart).max() <= 1


@pytest.mark.parametrize('shape, size', SHAPES)
def test_plain_filters_are_those_of_torch(shape, size):
    window = photo(100, 100)[5 : 5 + shape[0], 7 : 7 + shape[1]]
    pixels = torch.from_numpy(window.astype(np.float32)).permute(2, 0, 1)[None]
    for method in ('bilinear', 'area'):
        options = dict(mode=method) | ({} if method == 'area' else dict(align_corners=False))
        if method == 'area' and (shape[0] % size[0] or shape[1] % size[1]):
            continue  # torch's is another than TensorFlow's, of whole pixels
        theirs = torch.nn.functional.interpolate(pixels, size, **options)[0].permute(1, 2, 0)
        ours = images.resized(window, (0, 0, *shape), size, method, False)
        assert_cast_of(ours, theirs.numpy().astype(float), False)


@needs_extension
def test_large_windows_are_decoded_at_a_smaller_scale_and_look_the_same():
    large = np.asarray(Image.fromarray(load_sample_image('flower.jpg')).resize((2560, 1708)))
    data = encoded(large, quality=92)
    box = (101, 203, 1500, 2100)
    small = images.resized(images.read(data), box, (100, 140))
    assert images.shrink(box, (100, 140)) == 4
    apart, wrong = differences(small, images.resized(images.decode(data), box, (100, 140)))
    assert apart < 1 and wrong < 0.01


def test_turned_and_cmyk_files_are_as_pillow_shows_them():
    exif = Image.Exif()
    exif[metadata.ORIENTATION] = 6
    turned = encoded(photo(40, 60), exif=exif)
    image = images.read(turned)
    assert image.shape == (60, 40, 3)
    np.testing.assert_array_equal(image, images.decode(turned))
    upright = Image.Exif()
    upright[0x010E] = 'a description'
    assert images.read(encoded(photo(40, 60), exif=upright)).shape == (40, 60, 3)
    out = io.BytesIO()
    Image.fromarray(photo(40, 60)).convert('CMYK').save(out, 'JPEG')
    np.testing.assert_array_equal(images.read(out.getvalue()), images.decode(out.getvalue()))


def test_a_truncated_file_is_unreadable_where_its_rows_are_missing():
    data = encoded(photo(300, 300), quality=95)
    image = images.read(data[: len(data) // 2])
    images.resized(image, (0, 0, 100, 300), (50, 50))
    with pytest.raises(images.Unreadable, match='truncated'):
        images.resized(image, (200, 0, 100, 300), (50, 50))
    for junk in (b'', b'\xff\xd8', b'\xff\xd8\xff\xe0', data[:100]):
        with pytest.raises(images.Unreadable):
            np.asarray(images.read(junk))


@needs_extension
def test_threads_do_not_disturb_one_another():
    files = [
        encoded(photo(200, 150, i), quality=60 + i, optimize=i % 2, progressive=i % 5 == 0)
        for i in range(30)
    ]

    def view(data):
        return images.resized(images.read(data), (9, 5, 150, 140), (64, 64))

    wanted = [view(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for one, other in zip(pool.map(view, files), wanted, strict=True):
                np.testing.assert_array_equal(one, other)


def test_the_extension_refuses_what_is_no_image_or_no_window():
    if images._jpeg is None:
        pytest.skip('the extension is not built')
    data, out = encoded(photo(20, 30)), np.empty((8, 8, 3), np.uint8)
    frozen = out.copy()
    frozen.flags.writeable = False
    for bad in (out[..., 0], out.astype(np.float32), out[..., :2], out[:, ::2], frozen, b'x'):
        with pytest.raises((ValueError, BufferError)):
            images._jpeg.view(data, bad, *images.scaled((0, 0, 8, 8), 1), 1, 0, True, False, True)
    for box in ((0, 0, 21, 30), (-1, 0, 5, 5), (0, 28, 5, 5), (0, 0, 0, 5), (19, 0, 2**31 - 1, 1)):
        for call in (
            lambda box: images._jpeg.view(
                data, out, *images.scaled(box, 1), 1, 0, True, False, True
            ),
            lambda box: images._jpeg.resize(np.zeros((20, 30, 3), np.uint8), out, box, 0, 1, 0),
        ):
            with pytest.raises(ValueError, match='is not inside'):
                call(box)


@needs_extension
def test_a_code_that_is_none_is_an_error():
    data = encoded(photo(40, 40))
    scan = data.index(b'\xff\xda') + 2 + int.from_bytes(data[data.index(b'\xff\xda') + 2 :][:2])
    ones = data[:scan] + b'\xff\x00' * 200 + b'\xff\xd9'  # no code is all ones
    out, window = np.empty((8, 8, 3), np.uint8), images.scaled((0, 0, 40, 40), 1)
    with pytest.raises(ValueError, match='no such Huffman code'):
        images._jpeg.view(ones, out, *window, 1, 0, True, False, True)


@needs_extension
@pytest.mark.parametrize('damage', ['truncated', 'lost', 'swapped'])
def test_damaged_restart_intervals_are_decoded_by_pillow(damage):
    """Codes are not read across the end of an interval, nor intervals taken for one another."""
    data = encoded(photo(64, 64), subsampling=0, restart_marker_blocks=4)
    ends = [data.index(b'\xff' + bytes([0xD0 + i])) for i in range(4)]
    first, second = data[ends[0] : ends[1]], data[ends[1] : ends[2]]
    intervals = {'truncated': first[:-5] + second, 'lost': second, 'swapped': second + first}
    data = data[: ends[0]] + intervals[damage] + data[ends[2] :]
    box, out = (0, 0, 24, 64), np.empty((24, 64, 3), np.uint8)
    for own in True, False:
        with pytest.raises(ValueError, match='truncated|Corrupt JPEG data'):
            images._jpeg.view(data, out, *images.scaled(box, 1), 1, 0, True, False, own)
    out = images.resized(images.read(data), box, (24, 64))
    np.testing.assert_array_equal(out, images.decode(data)[:24])


FUZZ = """
import sys, time
import numpy as np
from vit_jax.data import images

files = [bytes.fromhex(line) for line in sys.stdin.read().split()]
rng = np.random.default_rng(int(sys.argv[2]))
end, read, refused = time.time() + float(sys.argv[1]), 0, 0
out = np.empty((16, 16, 3), np.uint8)
while time.time() < end:
    data = bytearray(files[rng.integers(len(files))])
    for _ in range(rng.integers(1, 12)):
        data[rng.integers(len(data))] = rng.choice([0, 1, 255, 208, 217, 218, rng.integers(256)])
    data = bytes(data[: rng.integers(2, len(data) + 1)] if rng.random() < 0.2 else data)
    try:
        h, w, _ = images._jpeg.size(data)
        if h * w > 4_000_000:
            continue
        y, x = int(rng.integers(h)), int(rng.integers(w))
        box = y, x, int(rng.integers(1, h - y + 1)), int(rng.integers(1, w - x + 1))
        d = int(rng.choice([1, 1, 2, 4, 8]))
        images._jpeg.view(
            data, out, *images.scaled(box, d), d, int(rng.integers(3)), d > 1, False,
            bool(rng.random() < 0.8),
        )
        read += 1
    except ValueError:
        refused += 1
print(read, refused)
"""


def fuzz(seconds, seed=0):
    files = [
        encoded(photo(70, 90, 5 * i), quality=80 + i, optimize=i % 2, progressive=i % 4 == 3,
                subsampling=i % 3, restart_marker_blocks=i % 3 * 2)
        for i in range(8)
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, '-c', FUZZ, str(seconds), str(seed)], text=True, capture_output=True,
        input=' '.join(f.hex() for f in files),
        env={'MALLOC_PERTURB_': '165', 'MALLOC_CHECK_': '3'},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return tuple(map(int, done.stdout.split()))


@needs_extension
def test_damaged_files_raise_or_decode():
    read, refused = fuzz(3)
    assert read > 100 and refused > 100


@needs_extension
@pytest.mark.slow
def test_damaged_files_raise_or_decode_for_a_minute():
    read, refused = fuzz(60, seed=1)
    assert read > 2000 and refused > 2000
