"""VTAB: labels and splits as the benchmark's own code has them, read from prepared files."""

import io
import itertools

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vit_jax.data import sources
from vit_jax.data.readers import splits, vtab
from vit_jax.errors import UserError
from vit_jax.plan import data_sets
from vit_jax.tables import published


def test_the_tasks_are_those_of_the_published_table():
    columns = published.table('vit.table9').columns
    assert len(vtab.TASKS) == len(columns) - 2 == 19
    assert [sum(t.group == g for t in vtab.TASKS.values())
            for g in ('natural', 'specialized', 'structured')] == [7, 4, 8]  # fmt: skip
    for task in vtab.TASKS.values():  # TFDS knows each
        name, _, config = task.dataset.partition('/')
        builder = tfds.builder_cls(name)
        assert not config or config in [c.name for c in builder.BUILDER_CONFIGS]


@pytest.mark.parametrize('depths, kinds, label', [
    ([1.0], [0], 0), ([10.0], [0], 1), ([30.0], [0], 2), ([30.0], [4], 3), ([30.0, 1.0], [0, 1], 0),
    ([], [], 3),
])  # fmt: skip
def test_kitti_distance(depths, kinds, label):
    """The cases of the benchmark's own test."""
    location = np.array([[0.0, 0.0, z] for z in depths]).reshape(-1, 3)
    assert vtab.kitti_distance({'objects': {'type': kinds, 'location': location}}) == label


@pytest.mark.parametrize('nearest, label', [(7.9, 0), (8.1, 1), (9.6, 4), (10.5, 5), (30.0, 5)])
def test_clevr(nearest, label):
    points = np.array([[0, 0, 40.0], [1, 2, nearest], [3, 4, 50.0], [0, 0, 99.0]])
    example = {'objects': {'size': [0, 1, 0, 1], 'pixel_coords': points}}
    assert vtab.clevr_distance(example) == label and vtab.clevr_count(example) == 1


def test_dsprites_has_sixteen_classes_of_each():
    places = [vtab.dsprites_location({'label_x_position': i}) for i in range(32)]
    angles = [vtab.dsprites_orientation({'label_orientation': i}) for i in range(40)]
    assert sorted(set(places)) == sorted(set(angles)) == list(range(16))
    assert places[:4] == [0, 0, 1, 1] and angles[:6] == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize('name, sizes, parts', [
    ('caltech101', {'train': 3060}, ('train[:800]', 'train[2754:2954]', 'test')),
    ('eurosat', {'train': 27_000}, ('train[:800]', 'train[16200:16400]', 'train[80%:]')),
    ('norb_azimuth', {'test': 24_300}, ('train[:800]', 'test[0:200]', 'test[50%:]')),
    ('dtd', {'validation': 1880}, ('train[:800]', 'validation[0:200]', 'test')),
])
def test_splits(name, sizes, parts):
    task = vtab.task(f'vtab:{name}')
    found = [vtab.split_of(task, split, sizes) for split in ('train800', 'val200', 'test')]
    assert tuple(found) == parts
    assert vtab.split_of(task, 'train800val200', sizes) == f'{parts[0]}+{parts[1]}'


@pytest.mark.parametrize('names, sizes, counts', [
    ('caltech101', (3_060, 0, 6_084), (2_754, 306, 6_084)),
    ('cifar100', (50_000, 0, 10_000), (45_000, 5_000, 10_000)),
    ('dtd', (1_880, 1_880, 1_880), (1_880, 1_880, 1_880)),
    ('flowers102', (1_020, 1_020, 6_149), (1_020, 1_020, 6_149)),
    ('pets', (3_680, 0, 3_669), (2_944, 736, 3_669)),
    ('sun397', (76_128, 10_875, 21_750), (76_128, 10_875, 21_750)),
    ('svhn', (73_257, 0, 26_032), (65_931, 7_326, 26_032)),
    ('camelyon', (262_144, 32_768, 32_768), (262_144, 32_768, 32_768)),
    ('eurosat', (27_000, 0, 0), (16_200, 5_400, 5_400)),
    ('resisc45', (31_500, 0, 0), (18_900, 6_300, 6_300)),
    ('retinopathy', (35_126, 10_906, 42_670), (35_126, 10_906, 42_670)),
    ('clevr_count clevr_distance', (70_000, 15_000, 15_000), (63_000, 7_000, 15_000)),
    ('dmlab', (65_550, 22_628, 22_735), (65_550, 22_628, 22_735)),
    ('dsprites_location dsprites_orientation', (737_280, 0, 0), (589_824, 73_728, 73_728)),
    ('kitti_distance', (6_347, 423, 711), (6_347, 423, 711)),
    ('norb_azimuth norb_elevation', (24_300, 0, 24_300), (24_300, 12_150, 12_150)),
])  # fmt: skip
def test_full_splits(names, sizes, counts):
    """Sizes of the benchmark's own tests, from those of TFDS; no image is in two of the splits."""
    sizes = dict(zip(('train', 'validation', 'test'), sizes, strict=True))
    for name in names.split():
        task, used = vtab.task(f'vtab:{name}'), []
        for split, count in zip(('train', 'val', 'test'), counts, strict=True):
            part = vtab.split_of(task, split, sizes)
            whole = sizes[part.partition('[')[0]]
            assert splits.size(part, whole)[1] == count, (name, split)
            used.append((part.partition('[')[0], interval(part, whole)))
        for (part, one), (other, two) in itertools.combinations(used, 2):
            assert part != other or one.stop <= two.start or two.stop <= one.start, name
        source = dict(name=f'vtab:{name}', split='train')
        assert data_sets.published_size(source) == (counts[0], task.classes)  # of plans


def interval(split, whole):
    """Examples of a split as a range: of 'test[50%:]', 'train[:800]', 'validation[0:423]'."""
    low, _, high = split.partition('[')[2].rstrip(']').partition(':')
    first, last = (
        round(whole * int(x[:-1]) / 100) if x.endswith('%') else int(x) if x else default
        for x, default in ((low, 0), (high, whole))
    )
    return range(first, last)


def test_means_are_those_of_table_9():
    """Means by group of the paper's own numbers, and the mean that it prints, of all tasks."""
    found = published.table('vit.table9')
    for row in found.rows:
        scores = dict(zip(vtab.TASKS, row[1:-1], strict=True))
        means = vtab.means(scores)
        assert round(means['mean'], 1) == row[-1]
        assert means['natural'] == pytest.approx(np.mean(row[1:8]))
        assert means['structured'] == pytest.approx(np.mean(row[12:20]))
    del scores['dtd']
    with pytest.raises(ValueError, match='no accuracy of dtd'):
        vtab.means(scores)


def prepared(data_dir, name, version, features, examples):
    """A data set of TFDS's name in data_dir; `examples` are {split: [example]}."""

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: enumerate(rows) for split, rows in examples.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Made.name = name
    Made(data_dir=data_dir).download_and_prepare(file_format='array_record')


def image(value, channels=3, size=4):
    pixels = np.full((size, size, channels), value, np.uint8)
    return Image.fromarray(pixels if channels == 3 else pixels[..., 0])


def test_a_task_reads_its_images_and_makes_its_labels(tmp_path):
    features = dict(tfds.builder('clevr', data_dir=tmp_path).info.features)

    def example(i):
        names = dict(color='gray', material='rubber', shape='cube', size='small')
        objects = [
            names | {
                '3d_coords': np.zeros(3, np.float32), 'rotation': 0.0,
                'pixel_coords': np.array([0, 0, 8.2 + k], np.float32),
            }
            for k in range(3 + i % 8)
        ]  # fmt: skip
        asked = [{'question': 'how many?', 'answer': 'some'}]
        return {'image': image(i % 256), 'objects': objects, 'file_name': str(i),
                'question_answer': asked}  # fmt: skip

    prepared(tmp_path, 'clevr', '3.1.0', features, {
        'train': map(example, range(2000)), 'validation': map(example, range(20)),
    })  # fmt: skip
    train = sources.load(name='vtab:clevr_count', split='train800val200', data_dir=str(tmp_path))
    assert len(train) == 1000 and len(train.classes) == 8
    full = [sources.load(name='vtab:clevr_count', split=split, data_dir=str(tmp_path))
            for split in ('train', 'val')]  # fmt: skip
    assert [len(one) for one in full] == [1800, 200]
    assert full[1].records[0]['label'] == train.records[800]['label']
    names = [{one.records[i]['file_name'] for i in range(len(one))} for one in full]
    assert len(names[0]) == 1800 and len(names[1]) == 200 and not names[0] & names[1]
    test = sources.load(name='vtab:clevr_count', split='test', data_dir=str(tmp_path))
    seen = []
    for i in range(len(test)):
        data, label = (test.records[i][key] for key in ('image', 'label'))
        value = np.array(Image.open(io.BytesIO(data)))[0, 0, 0]
        assert label == value % 8
        seen.append(int(value))
    assert sorted(seen) == list(range(20))
    near = sources.load(name='vtab:clevr_distance', split='test', data_dir=str(tmp_path))
    assert {near.records[i]['label'] for i in range(20)} == {1}


def test_images_of_zero_and_one_are_made_bright(tmp_path):
    features = {
        'image': tfds.features.Image(shape=(8, 8, 1), encoding_format='png'),
        **{name: tfds.features.ClassLabel(num_classes=n)
           for name, n in (('label_x_position', 32), ('label_orientation', 40))},
    }  # fmt: skip
    examples = [{'image': image(1, 1, 8), 'label_x_position': i % 32, 'label_orientation': i % 40}
                for i in range(50)]  # fmt: skip
    prepared(tmp_path, 'dsprites', '2.0.0', features, {'train': examples})
    found = sources.load(name='vtab:dsprites_location', split='test', data_dir=str(tmp_path))
    assert len(found) == 5 and len(found.classes) == 16
    data = found.records[0]['image']
    assert (np.array(Image.open(io.BytesIO(data))) == 255).all()


def test_an_image_of_tfds_may_have_several_labels(tmp_path):
    """As ImageNet ReaL has: some, one or none."""
    features = {
        'image': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
        'real_label': tfds.features.Sequence(tfds.features.ClassLabel(num_classes=5)),
    }
    labels = [[1, 4], [], [3], [0, 1, 2]]
    examples = [{'image': image(i), 'real_label': row} for i, row in enumerate(labels)]
    prepared(tmp_path, 'imagenet2012_real', '1.0.0', features, {'validation': examples})
    found = sources.load(
        name='imagenet2012_real', split='validation', label='real_label', data_dir=str(tmp_path)
    )
    assert found.records.max_labels == 32 and len(found.classes) == 1000
    for i in range(4):
        data, label = (found.records[i][key] for key in ('image', 'label'))
        place = np.array(Image.open(io.BytesIO(data)))[0, 0, 0]
        assert label.shape == (32,) and list(label[label >= 0]) == labels[place]


@pytest.mark.parametrize('name, split, words', [
    ('vtab:imagenet', 'test', "no task 'vtab:imagenet'; there are vtab:caltech101, vtab:cifar100"),
    ('vtab:dtd', 'test', 'data set dtd is not prepared|no data set .dtd'),
])
def test_mistakes_are_named(tmp_path, name, split, words):
    with pytest.raises(UserError, match=words):
        sources.load(name=name, split=split, data_dir=str(tmp_path))
    with pytest.raises(UserError, match="no split 'trainval'; it has train800, val200"):
        vtab.split_of(vtab.task('dtd'), 'trainval', {})
