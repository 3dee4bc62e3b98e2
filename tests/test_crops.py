"""The tasks `crops` and `image`: views of one image, as torchvision and DINO's code define them."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps
from scipy import stats

from vit_jax.data import distort, images, pipeline, sources, tasks
from vit_jax.data.augment import torchvision_box
from vit_jax.data.tasks import classify, crops
from vit_jax.data.tasks import image as image_task
from vit_jax.errors import UserError

RNG = np.random.default_rng(0)
SMOOTH = np.asarray(Image.fromarray(RNG.integers(0, 256, (9, 12, 3), np.uint8)).resize(
    (160, 120), Image.Resampling.BICUBIC
))  # fmt: skip


def jpeg(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'jpeg', quality=95)
    return file.getvalue()


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp('photographs')
    for i in range(6):
        file = path / 'train' / 'ab'[i % 2] / f'{i}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(np.roll(SMOOTH, 20 * i, axis=1)))
    return sources.load(name=str(path))


def test_windows_are_drawn_as_torchvision_draws_them():
    """Area uniform, log aspect uniform, place uniform; where nothing fits, the largest central."""
    rng, (h, w) = np.random.default_rng(1), (2000, 2000)
    boxes = np.array([
        torchvision_box((h, w), rng, area=(0.05, 0.4), aspect=(3 / 4, 4 / 3)) for _ in range(3000)
    ])  # fmt: skip
    y, x, ch, cw = boxes.T
    for values, low, high in (
        (ch * cw / (h * w), 0.05, 0.4), (np.log(cw / ch), np.log(3 / 4), np.log(4 / 3)),
        (y / (h - ch), 0, 1), (x / (w - cw), 0, 1),
    ):  # fmt: skip
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    for shape, box in (((50, 900), (0, 416, 50, 67)), ((900, 50), (416, 0, 67, 50))):
        drawn = torchvision_box(shape, rng, area=(0.9, 1.0), aspect=(3 / 4, 4 / 3))
        assert drawn == box


def test_a_crop_is_a_window_that_pillow_resizes():
    place = tasks.make_view(dict(name='inception_torchvision', method='bicubic'), 48).place
    for seed in range(5):
        geometry = place(SMOOTH.shape[:2], np.random.default_rng(seed))
        y, x, h, w = geometry.window
        window = Image.fromarray(SMOOTH[y : y + h, x : x + w])
        expected = np.asarray(window.resize((48, 48), Image.Resampling.BICUBIC))
        expected = expected[:, ::-1] if geometry.flip else expected
        assert np.abs(geometry.image(SMOOTH).astype(int) - expected).max() <= 1


def test_distortions_are_pillows_and_come_at_their_rate():
    picture = Image.fromarray(SMOOTH)
    grey = np.asarray(ImageOps.grayscale(picture).convert('RGB'))
    solar = np.asarray(ImageOps.solarize(picture, 128))
    for function, wanted in ((distort.greyscale, grey), (distort.solarize, solar)):
        outs = [function(SMOOTH, np.random.default_rng(s), probability=0.2) for s in range(500)]
        changed = [out for out in outs if not np.array_equal(out, SMOOTH)]
        assert all(np.array_equal(out, wanted) for out in changed)
        assert stats.binomtest(len(changed), 500, 0.2).pvalue > 1e-3
    rng, twin = np.random.default_rng(5), np.random.default_rng(5)
    radius = twin.uniform(0.1, 2.0)
    np.testing.assert_array_equal(
        distort.blur(SMOOTH, rng, probability=1.0),
        np.asarray(picture.filter(ImageFilter.GaussianBlur(radius))),
    )
    moved = [
        not np.array_equal(SMOOTH, distort.color_jitter(
            SMOOTH, np.random.default_rng(s), hue=0.1, probability=0.8
        )) for s in range(300)
    ]  # fmt: skip
    assert stats.binomtest(sum(moved), 300, 0.8).pvalue > 1e-3


def test_each_kind_of_crop_has_its_own_distortions(source, monkeypatch):
    """By the probabilities of DINO's code, read off what each crop's functions are called with."""
    calls, decoded = [], []

    def noted(name):
        def step(image, rng, **settings):
            calls.append((image.shape[0], name, settings['probability']))
            return image

        return step

    names = ('color_jitter', 'greyscale', 'blur', 'solarize')
    monkeypatch.setattr(distort, 'AUGMENTATIONS', {n: noted(n) for n in names})
    monkeypatch.setattr(images, 'decode', lambda data: decoded.append(1) or SMOOTH)
    task = crops.crops(source, image_size=32, local_size=16, local_count=3)
    made = task.read({'image': jpeg(SMOOTH)}, np.random.default_rng(0))
    assert {k: v.shape for k, v in made.items()} == {
        'global': (2, 32, 32, 3), 'local': (3, 16, 16, 3)
    }
    first = [(32, 'color_jitter', 0.8), (32, 'greyscale', 0.2), (32, 'blur', 1.0)]
    second = [*first[:2], (32, 'blur', 0.1), (32, 'solarize', 0.2)]
    local = [(16, 'color_jitter', 0.8), (16, 'greyscale', 0.2), (16, 'blur', 0.5)]
    assert calls == first + second + 3 * local
    assert len(decoded) == 1
    for name, area in (('global', (0.4, 1.0)), ('local', (0.05, 0.4))):
        for view in task.read.keywords['views'][name]:
            assert view.draw.keywords.items() >= dict(area=area, method='bicubic').items()


def test_crops_are_a_function_of_seed_and_step(source):
    task = crops.crops(source, image_size=32, local_size=16, local_count=2)
    feed = lambda **more: pipeline.batches(source, task, 3, batch_size=4, **more)  # noqa: E731
    plain = [batch for _, batch in zip(range(3), feed(), strict=False)]
    assert {k: v.shape for k, v in plain[0].items() if v.ndim > 1} == {
        'global': (4, 2, 32, 32, 3), 'local': (4, 2, 16, 16, 3)
    }
    views = [*plain[0]['global'][0], *plain[1]['global'][0]]
    assert len({v.tobytes() for v in views}) == len(views)
    by_workers = next(feed(workers=2))
    later, part = next(feed(start=1)), next(feed(rows=np.array([2, 3])))
    for name in plain[0]:
        np.testing.assert_array_equal(by_workers[name], plain[0][name])
        np.testing.assert_array_equal(later[name], plain[1][name])
        np.testing.assert_array_equal(part[name], plain[0][name][2:])


def test_without_local_crops_there_are_none(source):
    assert crops.crops(source, image_size=32, local_count=0).blank.keys() == {'global'}


def test_crops_without_distortions_are_windows_of_the_image(source, monkeypatch):
    monkeypatch.setattr(distort, 'AUGMENTATIONS', {})
    task = crops.crops(source, image_size=32, local_size=16, local_count=2, distort=False)
    made = task.read({'image': jpeg(SMOOTH)}, np.random.default_rng(0))
    assert made['local'].shape == (2, 16, 16, 3)
    assert np.ptp(made['global'].astype(int)) > 50


def test_images_without_labels_are_those_of_classify(source):
    """The same views as with labels; the task classify says which task reads what has none."""
    view = dict(name='inception_torchvision', area=(0.2, 1.0))
    alone = image_task.image(source, view=view, image_size=32)
    labelled = classify.classify(source, view=view, image_size=32)
    bare = {'image': source.records[0]['image']}
    with pytest.raises(UserError, match="no label; data.task='image' reads"):
        labelled.read(bare, np.random.default_rng(0))
    made = alone.read(bare, np.random.default_rng(0))
    assert made.keys() == alone.blank.keys() == {'image'}
    expected = labelled.read(source.records[0], np.random.default_rng(0))['image']
    np.testing.assert_array_equal(made['image'], expected)
