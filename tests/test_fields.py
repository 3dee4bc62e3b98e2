"""Raw fields of records: a task of one's own reads any of them, from files of each kind."""

import io
import json
import pickle
import tarfile

import fsspec
import kinds
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from fsspec.implementations.memory import MemoryFileSystem

from vit_jax.data import pipeline, sources, tasks
from vit_jax.data.readers import coco, columnar, example, facts, names, ranges, records
from vit_jax.errors import UserError

WORDS = ('a red ant', 'two bees', 'a cat, and a dog')


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'cache'))
    yield
    MemoryFileSystem.store.clear()


def read_bytes(record, rng, *, field, length):
    value = record[field]
    value = value.encode() if isinstance(value, str) else bytes(value)
    out = np.zeros(length, np.uint8)
    out[: len(value)] = np.frombuffer(value[:length], np.uint8)
    return {'bytes': out}


class Bytes:
    """A task outside of the package: the bytes of one field."""

    def __init__(self, field, length=300):
        self.field, self.length = field, length

    def __call__(self, record, rng):
        return read_bytes(record, rng, field=self.field, length=self.length)


def fed(source, field, tolerance=0.0):
    """The field of each example by the pipeline, without trailing zeros."""
    task = tasks.Task({'bytes': np.zeros(300, np.uint8)}, Bytes(field))
    (batch,) = pipeline.examples(
        source, task, batch_size=len(source), threads=1, tolerance=tolerance
    )
    return [row.tobytes().rstrip(b'\0') for row in batch['bytes']]


def write_tar(path, examples):
    """Examples are {extension: bytes}."""
    with tarfile.open(path, 'w') as tar:
        for i, members in enumerate(examples):
            for suffix, content in members.items():
                info = tarfile.TarInfo(f'{i:03}.{suffix}')
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def tar_examples():
    return [
        {'png': kinds.png(i), 'txt': text.encode(), 'json': json.dumps({'label': i}).encode(),
         'mask.png': kinds.png(100 + i)} for i, text in enumerate(WORDS)
    ]  # fmt: skip


def test_members_of_a_tar_are_fields_by_extension_and_read_when_asked_for(tmp_path, monkeypatch):
    write_tar(tmp_path / 'a.tar', tar_examples()[:2])
    write_tar(tmp_path / 'b.tar', [dict(reversed(tar_examples()[2].items()))])
    source = sources.load(name=str(tmp_path))
    source = pickle.loads(pickle.dumps(source))
    assert fed(source, 'txt') == [text.encode() for text in WORDS]
    assert fed(source, 'mask.png') == [kinds.png(100 + i) for i in range(3)]
    assert sorted(source.records[2]) == ['image', 'json', 'label', 'mask.png', 'txt']
    assert json.loads(source.records[1]['json'])['label'] == 1 == source.records[1]['label']
    asked = []
    before = ranges.Ranges.read_range
    monkeypatch.setattr(
        ranges.Ranges, 'read_range', lambda *args: asked.append(args[1:]) or before(*args)
    )
    record = source.records[2]
    assert record['image'] == kinds.png(2) and record['label'] == 2 and len(asked) == 1
    assert record['txt'] == record['txt'] == WORDS[2].encode() and len(asked) == 2
    with pytest.raises(UserError, match=r"a.tar\[0\] \(000\): no field 'text' among image, label"):
        fed(source, 'text')
    assert 'text' not in record and record.get('text') is None and len(record) == 5


def test_a_tar_of_texts_needs_no_labels(tmp_path):
    write_tar(tmp_path / 'a.tar', [
        {'jpg': kinds.png(i), 'txt': text.encode()} for i, text in enumerate(WORDS)
    ])  # fmt: skip
    with pytest.raises(UserError, match='no label: neither .cls nor .json'):
        sources.load(name=f'{tmp_path}/a.tar')
    source = sources.load(name=f'{tmp_path}/a.tar', label=None)
    assert source.classes == () and sorted(source.records[0]) == ['image', 'txt']
    assert fed(source, 'txt') == [text.encode() for text in WORDS]
    assert facts.of(source)['examples'] == 3
    share = sources.load(name=f'{tmp_path}/a.tar', label=None, split='train[34%:]')
    assert fed(share, 'txt') == [text.encode() for text in WORDS[1:]]


def test_columns_are_fields_and_decoded_when_asked_for(tmp_path, monkeypatch):
    image = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
    table = pa.table({
        'image': pa.array([{'bytes': kinds.png(i), 'path': 'x'} for i in range(3)], image),
        'label': [0, 1, 2], 'caption': list(WORDS), 'ids': [[1, 2], [], [3]],
        'mask': pa.array([{'bytes': kinds.png(9 + i), 'path': 'x'} for i in range(3)], image),
    })  # fmt: skip
    pq.write_table(table, tmp_path / 'a.parquet', row_group_size=2)
    (tmp_path / 'arrow').mkdir()
    with pa.OSFile(str(tmp_path / 'arrow' / 'a.arrow'), 'wb') as out:
        with pa.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    columns = []
    before = columnar.Parquet.column
    monkeypatch.setattr(
        columnar.Parquet, 'column', lambda *args: columns.append(args[2]) or before(*args)
    )
    for name in ('a.parquet', 'arrow'):
        source = sources.load(name=str(tmp_path / name))
        columns.clear()
        assert [source.records[i]['label'] for i in range(3)] == [0, 1, 2]
        assert set(columns) <= {('image', 'bytes')}
        assert fed(source, 'caption') == [text.encode() for text in WORDS]
        assert fed(source, 'mask') == [kinds.png(9 + i) for i in range(3)]
        assert [source.records[i]['ids'] for i in range(3)] == [[1, 2], [], [3]]
        bare = sources.load(name=str(tmp_path / name), label=None)
        assert bare.classes == () and bare.records[2]['label'] == 2  # the raw column
        assert set(bare.records[2]) == set(table.column_names)
        with pytest.raises(UserError, match="no field 'text' among image, label, caption"):
            fed(source, 'text')


def test_prepared_records_have_their_name_and_other_features(tmp_path):
    kinds.write('records', tmp_path, [(kinds.png(i), i) for i in range(3)], ('a', 'b', 'c'))
    assert fed(sources.load(name=str(tmp_path)), 'name') == [b'0', b'1', b'2']
    made = []
    for i, text in enumerate(WORDS):
        one = example.Example.FromString(example.encode(kinds.png(i), [i], f'{i}'))
        one.features.feature['text'].bytes_list.value.append(text.encode())
        one.features.feature['boxes'].float_list.value.extend([0.5, 1.5])
        made.append(one.SerializeToString())
    file = records.shard_name('train', 0, 1)
    _, size, digest = records.write_shard(tmp_path / file, made)
    place = tmp_path / records.MANIFEST
    manifest = json.loads(place.read_text())
    manifest['splits']['train'][0] |= {'bytes': size, 'sha256': digest}
    place.write_text(json.dumps(manifest))
    source = sources.load(name=str(tmp_path))
    assert fed(source, 'text') == [text.encode() for text in WORDS]
    assert source.records[1]['boxes'].tolist() == [0.5, 1.5]


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Images with text, a number, a list and a mask."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            'image': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
            'label': tfds.features.ClassLabel(names=list('abc')),
            'text': tfds.features.Text(), 'size': np.int64,
            'parts': tfds.features.Sequence(np.int64),
            'mask': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
        }))  # fmt: skip

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        for i, text in enumerate(WORDS):
            yield i, {
                'image': io.BytesIO(kinds.png(i)), 'label': i, 'text': text, 'size': 7 + i,
                'parts': list(range(i)), 'mask': io.BytesIO(kinds.png(50 + i)),
            }  # fmt: skip


@pytest.mark.parametrize('format', ['array_record', 'tfrecord'])
def test_features_of_tfds_are_fields_by_name(tmp_path, format):
    builder = Scenes(data_dir=tmp_path)
    builder.download_and_prepare(file_format='array_record')
    if format == 'tfrecord':
        (path,) = builder.data_path.glob('*array_record*')
        written = path.parent / path.name.replace('array_record', 'tfrecord')
        written.write_bytes(b''.join(map(kinds.tf_record, ArrayRecordReader(str(path)).read_all())))
        path.unlink()
        info = path.parent / 'dataset_info.json'
        info.write_text(info.read_text().replace('array_record', 'tfrecord'))
    source = sources.load(name='scenes', data_dir=str(tmp_path))
    source = pickle.loads(pickle.dumps(source)) if format == 'tfrecord' else source
    order = [source.records[i]['label'] for i in range(3)]
    assert sorted(order) == [0, 1, 2]
    assert fed(source, 'text') == [WORDS[i].encode() for i in order]
    assert fed(source, 'mask') == [kinds.png(50 + i) for i in order]
    assert [int(source.records[k]['size']) for k in range(3)] == [7 + i for i in order]
    assert [list(source.records[k]['parts']) for k in range(3)] == [list(range(i)) for i in order]
    bare = sources.load(name='scenes', data_dir=str(tmp_path), label=None)
    assert bare.classes == () and fed(bare, 'text') == [WORDS[i].encode() for i in order]


@pytest.mark.parametrize('layout', ['images/{}', 'train/images/{}', 'images/train/{}'])
def test_masks_beside_images_are_fields(tmp_path, layout, capsys, monkeypatch):
    for i in range(6):
        for kind, value, suffix in (('images', i, '.jpg'), ('masks', 50 + i, '.png')):
            path = tmp_path / layout.replace('images', kind).format(f'sub/{i}{suffix}')
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(kinds.png(value))
    (tmp_path / layout.format('alone.png')).write_bytes(kinds.png(1))
    (tmp_path / layout.replace('images', 'masks').format('7_mask.png')).write_bytes(kinds.png(1))
    source = sources.load(name=str(tmp_path))
    line = capsys.readouterr().err
    assert 'skipped 1 images without a mask' in line and '1 masks without an image' in line
    assert len(source) == 6 and source.classes == () and source.name(3).endswith('sub/3.jpg')
    assert sources.splits_of(str(tmp_path)) == ('train',)
    assert fed(source, 'image') == [kinds.png(i) for i in range(6)]
    assert fed(source, 'mask') == [kinds.png(50 + i) for i in range(6)]
    parts = [sources.load(name=str(tmp_path), split=s) for s in ('train[:50%]', 'train[50%:]')]
    found = sorted(fed(parts[0], 'mask') + fed(parts[1], 'mask'))
    assert found == sorted(kinds.png(50 + i) for i in range(6)) and min(map(len, parts)) > 0
    before = facts.of(source)
    masks = sorted((tmp_path / layout.replace('images', 'masks').format('sub')).iterdir())
    masks[0].unlink()
    with pytest.raises(UserError, match='0.jpg: cannot read .*0.png: No such file'):
        fed(source, 'mask')
    assert fed(source, 'image')[0] == kinds.png(0)  # the mask is not read
    masks[0].write_bytes(kinds.png(60))
    assert facts.of(source) != before


def coco_json():
    return {
        'images': [{'id': 7, 'file_name': 'b.png', 'height': 4, 'width': 4},
                   {'id': 3, 'file_name': 'a.png', 'height': 4, 'width': 4},
                   {'id': 9, 'file_name': 'c.png', 'height': 4, 'width': 4}],
        'categories': [{'id': 90, 'name': 'bee'}, {'id': 18, 'name': 'ant'}],
        'annotations': [
            {'id': 1, 'image_id': 3, 'category_id': 90, 'bbox': [1, 2, 0.5, 1], 'iscrowd': 0,
             'area': 0.4, 'segmentation': [[1, 2, 1.5, 2, 1.5, 3]]},
            {'id': 5, 'image_id': 7, 'category_id': 18, 'bbox': [0, 0, 2, 2], 'iscrowd': 1,
             'area': 4, 'segmentation': {'counts': [0, 4], 'size': [2, 2]}},
            {'id': 2, 'image_id': 7, 'category_id': 90, 'bbox': [1, 1, 1, 1]},
        ],
    }  # fmt: skip


LAYOUTS = [('annotations/instances_train2017.json', 'train2017'),
           ('annotations/instances_train2017.json', 'images/train2017'),
           ('train.json', 'train'), ('train/_annotations.coco.json', 'train')]  # fmt: skip


def write_coco(path, content, place='train.json', folder='train'):
    for file in (path / place, path / folder / 'x'):
        file.parent.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate('abc'):
        (path / folder / f'{name}.png').write_bytes(kinds.png(i))
    (path / place).write_text(json.dumps(content))
    return path


@pytest.mark.parametrize('place, folder', LAYOUTS)
def test_boxes_of_coco_are_fields(tmp_path, place, folder):
    write_coco(tmp_path, coco_json(), place, folder)
    assert sources.splits_of(str(tmp_path)) == ('train',)
    source = pickle.loads(pickle.dumps(sources.load(name=str(tmp_path))))
    assert source.classes == ('ant', 'bee') and len(source) == 3
    assert source.name(0) == f'{tmp_path}/{folder}/b.png'
    assert fed(source, 'image') == [kinds.png(1), kinds.png(0), kinds.png(2)]
    first, second, empty = (source.records[i] for i in range(3))
    assert first['boxes'].tolist() == [[0, 0, 2, 2], [1, 1, 1, 1]]
    assert first['boxes'].dtype == np.float32 and first['labels'].tolist() == [0, 1]
    assert first['crowd'].tolist() == [True, False] and first['ids'].tolist() == [5, 2]
    assert first['areas'].tolist() == [4, 1] and first['image_id'] == 7
    assert first['segmentation'] == [{'counts': [0, 4], 'size': [2, 2]}, None]
    assert second['segmentation'] == [[[1, 2, 1.5, 2, 1.5, 3]]] and second['image_id'] == 3
    assert empty['boxes'].shape == (0, 4) and empty['segmentation'] == []
    other = names.relabel(source, ('bee', 'ant'), 'it')
    assert other.records[0]['labels'].tolist() == [1, 0]
    last = sources.load(name=str(tmp_path), split='train[67%:]')
    assert [last.records[i]['image_id'] for i in range(len(last))] == [9]


@pytest.mark.parametrize('change, words', [
    (lambda c: c.pop('categories'), "no field 'categories'"),
    (lambda c: c['images'][0].update(file_name='../x.png'), 'is not a path below its folder'),
    (lambda c: c['images'][0].update(file_name='/etc/passwd'), 'is not a path below its folder'),
    (lambda c: c['images'][0].update(id=3), 'two images have the id 3'),
    (lambda c: c['categories'][0].update(id=18), 'two categories have the id 18'),
    (lambda c: c['annotations'][0].update(image_id=4), 'annotation 1 has an unknown image'),
    (lambda c: c['annotations'][0].update(bbox=[1, 2, 3]), 'train.json is not a valid json'),
    (lambda c: c['annotations'][0].update(category_id=None), 'train.json is not a valid json'),
    (lambda c: c.update(images={'a': 1}), 'train.json is not a valid json'),
])
def test_what_is_wrong_in_a_json_of_coco_is_named(tmp_path, change, words):
    content = coco_json()
    change(content)
    write_coco(tmp_path, content)
    with pytest.raises(UserError, match=words) as e:
        sources.load(name=str(tmp_path))
    assert 'train.json' in str(e.value) and '\n' not in str(e.value)


def test_a_json_beside_classes_is_no_coco(tmp_path):
    kinds.write('folder', tmp_path, [(kinds.png(i), i) for i in range(3)], ('a', 'b', 'c'))
    (tmp_path / 'train.json').write_text('{"note": 1}')
    assert coco.find(str(tmp_path), ['train.json'], {'train'}) == {}
    assert sources.load(name=str(tmp_path)).classes == ('a', 'b', 'c')


def test_fields_of_a_tar_at_an_address_are_requests_of_their_own(tmp_path):
    write_tar(tmp_path / 'a.tar', tar_examples())
    fsspec.filesystem('memory').pipe_file('/set/a.tar', (tmp_path / 'a.tar').read_bytes())
    source = sources.load(name='memory://set/a.tar')
    assert fed(source, 'txt') == [text.encode() for text in WORDS]
