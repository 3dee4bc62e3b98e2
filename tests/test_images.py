"""Decoding: what a viewer shows, or a refusal; views: what they cut out, and that they repeat."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from vit_jax.data import augment, images
from vit_jax.errors import UserError

# What tf.image.resize makes of an image without antialias, TensorFlow 2.21.
TF = np.load(pathlib.Path(__file__).parent / 'data' / 'views_tf.npz', allow_pickle=False)


def encoded(image, kind='PNG', **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def ramp(h=6, w=5):
    return np.arange(h * w * 3, dtype=np.uint8).reshape(h, w, 3) * 2


@pytest.mark.parametrize('kind', ['PNG', 'BMP', 'TIFF'])
def test_lossless_formats_keep_every_pixel(kind):
    np.testing.assert_array_equal(images.decode(encoded(Image.fromarray(ramp()), kind)), ramp())


def test_grey_is_shown_in_three_channels():
    grey = ramp()[..., 0]
    shown = images.decode(encoded(Image.fromarray(grey)))
    np.testing.assert_array_equal(shown, np.repeat(grey[..., None], 3, 2))


def test_sixteen_bits_are_scaled_to_eight():
    deep = np.array([[0, 255, 256, 65535]], np.uint16)
    shown = images.decode(encoded(Image.fromarray(deep)))
    np.testing.assert_array_equal(shown[0, :, 0], [0, 0, 1, 255])


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_transparency_lies_over_white(mode):
    image = np.zeros((1, 3, 4), np.uint8)
    image[0, :, 3] = 0, 128, 255
    options = {}
    if mode == 'P':  # a palette whose first colour is transparent
        picture = Image.fromarray(np.array([[0, 1, 1]], np.uint8), 'P')
        picture.putpalette([9, 9, 9, 0, 0, 0])
        options = dict(transparency=0)
        expected = [255, 0, 0]
    else:
        picture = Image.fromarray(image).convert(mode)
        expected = [255, 127, 0]
    shown = images.decode(encoded(picture, **options))
    np.testing.assert_allclose(shown[0, :, 0], expected, atol=1)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    shown = images.decode(encoded(Image.fromarray(ramp()), exif=exif))
    np.testing.assert_array_equal(shown, np.rot90(ramp(), -1))


def test_cmyk_jpeg_looks_as_its_rgb():
    smooth = np.tile(np.linspace(40, 200, 16, dtype=np.uint8)[:, None, None], (1, 16, 3))
    shown = images.decode(encoded(Image.fromarray(smooth).convert('CMYK'), 'JPEG', quality=98))
    np.testing.assert_allclose(shown.astype(int), smooth.astype(int), atol=6)


def test_an_animation_is_its_first_frame():
    frames = [Image.new('RGB', (4, 4), c) for c in ('red', 'blue', 'green')]
    data = encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:])
    assert images.decode(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize('data', [
    b'', b'not an image', encoded(Image.fromarray(ramp(99, 99)), 'JPEG')[:900],
    encoded(Image.fromarray(np.ones((2, 2), np.float32)), 'TIFF'),
])
def test_the_rest_is_refused(data):
    with pytest.raises(images.Unreadable):
        images.decode(data)


@pytest.mark.parametrize('method', ['bilinear', 'bicubic'])
def test_plain_filters_are_those_of_tensorflow(method):
    """At the border too, where it drops what lies outside. uint8 is cut off there as here."""
    image = TF['image']
    sizes = [tuple(map(int, key.split()[1:])) for key in TF.files if key.startswith(method)]
    assert len(sizes) == 4
    for height, width in sizes:
        exact = TF[f'{method} {height} {width}'].astype(float)
        down, across = (
            images.weights(n, m, method, False) for n, m in ((40, height), (33, width))
        )
        ours = down.astype(float) @ image[..., 0] @ across.T
        np.testing.assert_allclose(ours, exact, atol=2e-3)
        for resized in images.resized, images.resized_by_numpy:
            cast = resized(image, (0, 0, 40, 33), (height, width), method, False, False)[..., 0]
            low, high = exact.clip(0, 255) - 1, exact.clip(0, 255) + 0.003
            assert ((low <= cast) & (cast <= high)).all()


@pytest.mark.parametrize('name', sorted(augment.VIEWS))
@pytest.mark.parametrize('shape', [(40, 30), (1, 50), (50, 1), (8, 8)])
def test_views_have_the_size_and_repeat(name, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    a, b = (
        augment.VIEWS[name](shape, np.random.default_rng(3), size=(12, 8)).image(image)
        for _ in range(2)
    )
    assert a.shape == (12, 8, 3) and a.dtype == np.uint8
    np.testing.assert_array_equal(a, b)


def test_central_is_the_middle():
    image = np.zeros((16, 32, 3), np.uint8)
    image[4:12, 12:20] = 255
    view = augment.central((16, 32), None, size=(8, 8), crop=0.5).image(image)
    assert view.min() == 255


def test_shift_moves_and_keeps_the_rest():
    image = ramp(8, 8)
    views = [
        augment.shift((8, 8), np.random.default_rng(i), size=(8, 8)).image(image) for i in range(60)
    ]
    assert len({v.tobytes() for v in views}) == 9
    assert any(np.array_equal(v[:-1, :-1], image[1:, 1:]) and not v[-1].any() for v in views)


class Most:
    """A generator whose draws are all the upper bound."""

    def uniform(self, low, high, size=None):
        return high if size is None else np.full(size, high)


@pytest.mark.parametrize('degrees, scale, shear, pixels', [
    (0, 0, 0, 0), (90, 0, 0, 0), (0, 0, 0, 1.5), (0, np.log(2), 0, 0), (0, 0, 0.3, 0),
    (25, 0.2, 0.1, 0.7),
])
def test_affine_turns_scales_and_moves_about_the_centre(degrees, scale, shear, pixels):
    y, x = np.mgrid[:20, :20]
    image = np.uint8(128 + 60 * np.sin(x / 3) + 60 * np.cos(y / 4 + x / 9))
    view = augment.affine(
        (20, 20), Most(), size=(20, 20), degrees=degrees, scale=scale, shear=shear, pixels=pixels
    ).image(np.repeat(image[..., None], 3, 2))
    # In (y, x): where the centres of the output's pixels come from in the input.
    a = np.deg2rad(degrees)
    turn = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
    to_input = np.exp(scale) * turn @ np.array([[1, 0], [shear, 1]])
    offset = 9.5 - to_input @ (9.5 + np.array([pixels, pixels]))
    expected = ndimage.affine_transform(image.astype(float), to_input, offset, order=1, cval=-1)
    inside = expected >= 60  # those that border on the outside are mixed with black
    assert inside.mean() > 0.2
    np.testing.assert_allclose(view[..., 0][inside], expected[inside], atol=1.1)


def test_affine_draws_within_its_bounds():
    image = np.zeros((15, 15, 3), np.uint8)
    image[7, 7] = 255
    centres = []
    for i in range(300):
        view = augment.affine((15, 15), np.random.default_rng(i), size=(15, 15), pixels=2)
        centres.append(ndimage.center_of_mass(view.image(image)[..., 0].astype(float)))
    moved = np.array(centres) - 7
    assert 1.5 < np.abs(moved).max() < 2.6 and np.abs(moved.mean(0)).max() < 0.3


# Deciles of 200,000 boxes of sample_distorted_bounding_box, TensorFlow 2.21, and their means.
TF_BOXES = {
    (375, 500): dict(
        area=[0.0825, 0.124, 0.1742, 0.2329, 0.3009, 0.3769, 0.4605, 0.5521, 0.6671],
        aspect=[0.8081, 0.866, 0.9241, 0.9826, 1.0408, 1.0982, 1.1561, 1.214, 1.2721],
        y=[0.3347, 0.404, 0.4493, 0.48, 0.4987, 0.5173, 0.548, 0.592, 0.6613],
        x=[0.29, 0.36, 0.413, 0.459, 0.5, 0.54, 0.586, 0.64, 0.709],
    ),
    (500, 333): dict(
        area=[0.0786, 0.1144, 0.1566, 0.2058, 0.2623, 0.3249, 0.3943, 0.4711, 0.5633],
        aspect=[0.8082, 0.8659, 0.9236, 0.9808, 1.0393, 1.0971, 1.1553, 1.2135, 1.2718],
        y=[0.267, 0.335, 0.392, 0.445, 0.498, 0.551, 0.605, 0.662, 0.731],
        x=[0.3393, 0.4069, 0.4505, 0.4805, 0.4985, 0.5165, 0.5465, 0.5901, 0.6562],
    ),
}  # fmt: skip


@pytest.mark.parametrize('shape', sorted(TF_BOXES))
def test_boxes_are_distributed_as_those_of_tensorflow(shape):
    rng = np.random.default_rng(0)
    height, width = shape
    y, x, h, w = np.array([augment.random_box(shape, rng) for _ in range(40_000)]).T
    assert min(y.min(), x.min()) == 0
    assert height - 1 <= (y + h).max() <= height and width - 1 <= (x + w).max() <= width
    ours = dict(
        area=h * w / (height * width), aspect=w / h, y=(y + h / 2) / height, x=(x + w / 2) / width
    )
    for name, deciles in TF_BOXES[shape].items():
        # The share below each decile: its deviation is sqrt(0.25 / 40,000) = 0.0025 at most. The
        # values are steps of whole pixels, a centre half of one: those at a decile count by half.
        below = [(ours[name] < d - 1e-4).mean() for d in deciles]
        upto = [(ours[name] <= d + 1e-4).mean() for d in deciles]
        wanted = np.arange(1, 10) / 10
        assert (np.array(below) < wanted + 0.012).all(), name
        assert (np.array(upto) > wanted - 0.012).all(), name


def test_boxes_are_never_wider_than_those_of_tensorflow():
    rng = np.random.default_rng(0)
    boxes = np.array([augment.random_box((6000, 8000), rng) for _ in range(999)])
    ratio = boxes[:, 3] / boxes[:, 2]
    assert 0.749 < ratio.min() < 0.753 and 1.327 < ratio.max() < 1.3305


@pytest.mark.parametrize('name, given, whole', [
    ('resize_crop', dict(resize=7), (7, 7)), ('small_crop', dict(smaller=6), (6, 9)),
])  # fmt: skip
def test_a_crop_of_the_resized_image_is_one_of_its_windows(name, given, whole):
    image, size = ramp(8, 12), (5, 6)
    view = augment.VIEWS[name]
    given |= dict(method='bilinear', antialias=False)
    resized = images.resized(image, (0, 0, 8, 12), whole, antialias=False)
    windows = {}
    for y in range(whole[0] - 4):
        for x in range(whole[1] - 5):
            window = resized[y : y + 5, x : x + 6]
            windows |= {window.tobytes(): (y, x, 0), window[:, ::-1].tobytes(): (y, x, 1)}
    rngs = [np.random.default_rng(seed) for seed in range(400)]
    seen = {windows[view((8, 12), rng, size=size, **given).image(image).tobytes()] for rng in rngs}
    assert len(seen) == len(windows) == 2 * (whole[0] - 4) * (whole[1] - 5)
    plain = [view((8, 12), rng, size=size, flip=False, **given).flip for rng in rngs]
    assert not any(plain)
    with pytest.raises(UserError, match='is 4, less than the image size 5 x 6'):
        view((8, 12), rngs[0], size=size, **given | {[*given][0]: 4})


def test_a_box_that_never_fits_is_the_whole_image():
    assert augment.random_box((2, 900), np.random.default_rng(0), area=(0.9, 1)) == (0, 0, 2, 900)
