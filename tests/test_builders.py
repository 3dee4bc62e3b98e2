"""The dataset builders of the repository, prepared and read without TensorFlow."""

import collections
import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_digits

from vit_jax.data import sources
from vit_jax.data.builders.digits import digits_dataset_builder
from vit_jax.data.builders.emoji import emoji_dataset_builder as emoji
from vit_jax.data.builders.fashion_mnist_debian import (
    fashion_mnist_debian_dataset_builder as fashion,
)
from vit_jax.data.builders.fashion_scenes import fashion_scenes_dataset_builder as fashion_scenes
from vit_jax.data.tasks import detect, segment
from vit_jax.errors import UserError


def read(builder, split):
    """(image, label) pairs of a split: the stored PNG opened by Pillow."""
    decoders = {'image': tfds.decode.SkipDecoding()}
    for example in builder.as_data_source(split, decoders=decoders):
        yield np.asarray(Image.open(io.BytesIO(example['image']))), int(example['label'])


def test_digits_are_scikit_learns_split_in_two(tmp_path):
    builder = digits_dataset_builder.Builder(data_dir=tmp_path)
    builder.download_and_prepare(file_format='array_record')
    train, test = (list(read(builder, s)) for s in ('train', 'test'))
    assert (len(train), len(test)) == (1438, 359)
    digits = load_digits()
    expected = collections.Counter(
        (np.round(x * (255 / 16)).astype(np.uint8).tobytes(), int(y))
        for x, y in zip(digits.images, digits.target, strict=True)
    )
    assert collections.Counter((x.tobytes(), y) for x, y in train + test) == expected
    counts = np.bincount([y for _, y in test], minlength=10)
    assert counts.min() > 20  # a random fifth, not one that follows the labels' order
    assert 'tensorflow' not in sys.modules


@pytest.mark.slow
def test_fashion_mnist_is_debians(tmp_path):
    builder = fashion.Builder(data_dir=tmp_path)
    builder.download_and_prepare(file_format='array_record')
    images, labels = (
        fashion.read_idx(fashion.FOLDER / f't10k-{part}-ubyte.gz')
        for part in ('images-idx3', 'labels-idx1')
    )
    assert images.shape == (10_000, 28, 28) and np.bincount(labels).tolist() == [1000] * 10
    test = list(read(builder, 'test'))
    expected = collections.Counter(
        (x.tobytes(), int(y)) for x, y in zip(images, labels, strict=True)
    )
    assert collections.Counter((x.tobytes(), y) for x, y in test) == expected
    assert builder.info.splits['train'].num_examples == 60_000


def test_a_missing_debian_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion, 'FOLDER', tmp_path / 'absent')
    builder = fashion.Builder(data_dir=tmp_path)
    with pytest.raises(UserError, match='apt-get install dataset-fashion-mnist'):
        builder.download_and_prepare(file_format='array_record')


class Dots(tfds.core.GeneratorBasedBuilder):
    """A data set of other people's making, with features of other names."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            'photo': tfds.features.Image(shape=(4, 4, 3), encoding_format='png'),
            'kind': tfds.features.ClassLabel(names=['dark', 'light']),
        }))

    def _split_generators(self, dl_manager):
        return {'validation': self._generate_examples()}

    def _generate_examples(self):
        for i in range(10):
            image = Image.new('RGB', (4, 4), 'white' if i % 2 else 'black')
            yield i, {'photo': image, 'kind': i % 2}


def test_any_prepared_data_set_is_read_by_its_name_from_its_files_alone(tmp_path):
    Dots(data_dir=tmp_path).download_and_prepare(file_format='array_record')
    script = f"""
from vit_jax.data import images, sources
from vit_jax.errors import UserError
where = dict(name='dots', data_dir={str(tmp_path)!r}, image='photo')
source = sources.load(**where, label='kind', split='validation[20%:]')
assert len(source) == 8 and source.classes == ('dark', 'light')
for i in range(8):
    data, label = source.records[i]['image'], source.records[i]['label']
    assert (images.decode(data) == 255 * label).all()
assert source.name(3) == 'dots/validation[20%:][3]'
for options, words in ((dict(label='label'), "no feature 'label', but kind, photo"),
                       (dict(label='kind'), "no split 'train'; it has validation")):
    try:
        sources.load(**where, **options)
    except UserError as e:
        assert words in str(e), e
    else:
        raise AssertionError(words)
"""
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_scenes_are_a_function_of_their_number_and_their_masks_are_exact():
    """What is annotated is what is seen: a scene without its articles differs there alone."""
    made = {split: list(fashion_scenes.scenes(split, 12)) for split in ('train', 'test')}
    again = list(fashion_scenes.scenes('train', 5))
    for one, other in zip(again, made['train'], strict=False):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.instances, other.instances)
    every = made['train'] + made['test']
    assert {len(scene.labels) for scene in every} == {1, 2, 3, 4, 5}
    assert len({scene.image.tobytes() for scene in every}) == len(every)
    for scene in every:
        mask, boxes = scene.mask(), scene.boxes() * fashion_scenes.SIZE
        assert np.unique(scene.instances).tolist()[-len(scene.labels) :] == list(
            range(1, len(scene.labels) + 1)
        )
        for k, (label, box) in enumerate(zip(scene.labels, boxes, strict=True)):
            own = scene.instances == k + 1
            assert (mask[own] == label + 1).all() and own.sum() >= 10
            y0, x0, y1, x1 = np.rint(box).astype(int)
            assert own[y0:y1, x0:x1].sum() == own.sum()
            for edge in (own[y0], own[y1 - 1], own[:, x0], own[:, x1 - 1]):
                assert edge.any()
        assert (mask[scene.instances == 0] == 0).all()


def test_an_article_hides_those_below_and_nothing_else():
    canvas = np.zeros((fashion_scenes.SIZE,) * 2 + (3,), np.float32)
    articles = np.zeros((2, 28, 28), np.uint8)
    articles[:, 4:24, 4:24], labels = 200, np.array([3, 7])
    alone = [
        fashion_scenes.compose(canvas, articles[:1], labels[:1], np.random.RandomState(k))
        for k in range(6)
    ]
    for k, below in enumerate(alone):
        both = fashion_scenes.compose(canvas, articles, labels, np.random.RandomState(k))
        np.testing.assert_array_equal(below.instances > 0, below.image.max(-1) >= 0.5 * (
            below.image.max()
        ))
        if both is not None:
            changed = (both.instances != below.instances) | (both.instances == 2)
            np.testing.assert_array_equal(both.instances[~changed], below.instances[~changed])
            far = ndimage.binary_dilation(both.instances == 2, iterations=4)
            np.testing.assert_array_equal(both.image[~far], below.image[~far])


def test_prepared_scenes_train_both_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_scenes, 'SCENES', {'train': 6, 'test': 2})
    source = sources.load(name='fashion_scenes', data_dir=str(tmp_path), label='objects/label')
    assert len(source) == 6 and source.classes == tuple(fashion.CLASSES)
    drawn = {scene.image.tobytes(): scene for scene in fashion_scenes.scenes('train', 6)}
    same = dict(view='fit', image_size=fashion_scenes.SIZE)
    one = segment.segment(source, zero='background', **same)
    other = detect.detect(
        source, masks=True, most=5, boxes='objects/bbox', labels='objects/label', crowd=None,
        segmentation='instances', box_format='yxyx', **same,
    )
    assert one.names['classes'] == ('background', *fashion.CLASSES)
    for i in range(6):
        made = one.read(source.records[i], None) | other.read(source.records[i], None)
        scene = drawn.pop(made['image'].tobytes())
        np.testing.assert_array_equal(made['label_map'], scene.mask())
        count = len(scene.labels)
        assert made['labels'].tolist() == [*scene.labels, *[-1] * (5 - count)]
        np.testing.assert_allclose(made['boxes'][:count], scene.boxes()[:, [1, 0, 3, 2]], atol=1e-6)
        for k in range(count):
            np.testing.assert_array_equal(made['masks'][k], scene.instances == k + 1)
    assert not drawn


def test_emoji_are_split_by_what_they_are(tmp_path):
    manual = tmp_path / 'downloads' / 'manual'
    with pytest.raises(UserError, match='emoji'):
        emoji.Builder(data_dir=tmp_path).download_and_prepare(file_format='array_record')
    manual.mkdir(parents=True)
    rows = [
        dict(name=f'Red_THING {i}', short_names=[f'red-thing-{i}', f'thing_{i}'], unified=f'{i:X}',
             image=f'{i}.png', category=emoji.CATEGORIES[i % 10])
        for i in range(40)
    ]  # fmt: skip
    for house, shade in (('google', 0), ('twitter', 255)):
        path = manual / f'{emoji.PACKAGE}-{house}-{emoji.VERSION}.tgz'
        with tarfile.open(path, 'w:gz') as tar:
            files = {'package/emoji.json': json.dumps(rows).encode()}
            for i in range(40):
                pixels = np.full((64, 64, 4), (shade, 0, i, 255), np.uint8)
                pixels[:32] = 0  # transparent
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, 'png')
                files[f'package/img/{house}/64/{i}.png'] = file.getvalue()
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    for house, shade in (('google', 0), ('twitter', 255)):
        names = {}
        for part in ('', '_seen', '_unseen'):
            found = sources.load(name='emoji', split=house + part, data_dir=str(tmp_path))
            names[part] = set()
            for record in (found.records[i] for i in range(len(found))):
                i = np.asarray(Image.open(io.BytesIO(record['image'])))
                assert (i[:32] == 255).all() and (i[32:, :, 0] == shade).all()
                number = int(i[40, 0, 2])
                texts = [text.decode() for text in record['captions']]
                assert texts == [f'red thing {number}', f'thing {number}']
                assert found.classes[record['label']] == rows[number]['category']
                names[part].add(number)
        assert names[''] == set(range(40)) == names['_seen'] | names['_unseen']
        assert not names['_seen'] & names['_unseen'] and 2 < len(names['_unseen']) < 20
