"""Data sets of images with masks or boxes, as others lay them out, and what is wrong in them."""

import json

import numpy as np
import pytest
import scenes

from vit_jax.data import images, pipeline, sources
from vit_jax.data.prepare import folder
from vit_jax.data.readers import example, facts, names, voc
from vit_jax.data.tasks import detect, segment
from vit_jax.errors import UserError

IMAGE = scenes.png(np.zeros((6, 8, 3), np.uint8))
IDS = np.zeros((6, 8), np.uint8)
IDS[1:4, 2:5], IDS[4:, 6:], IDS[0] = 3, 1, 255


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(root)


@pytest.mark.parametrize('layout, part', [
    ('{}/', 'train'), ('train/{}/', 'train'), ('{}/training/', 'train'), ('{}/val/', 'val'),
])
@pytest.mark.parametrize('masks', ['masks', 'annotations'])
@pytest.mark.parametrize('file, text', [
    ('classes.txt', '\ufeffant\nbee\nfly\n\n'), ('labels.txt', 'ant\r\nbee\r\nfly'),
    ('classes.json', '["ant", "bee", "fly"]'), (None, ''),
])  # fmt: skip
def test_folders_of_masks_and_the_names_of_their_classes(tmp_path, layout, part, masks, file, text):
    """Those of ADEChallengeData2016 among them; id 0 is nothing, and 255 neither."""
    root = write(tmp_path, {
        layout.format('images') + 'a.jpg': IMAGE, layout.format(masks) + 'a.png': scenes.png(IDS)
    } | ({file: text} if file else {}))
    source = sources.load(name=root, split=part)
    assert sources.splits_of(root) == (part,)
    assert source.classes == (('ant', 'bee', 'fly') if file else ())
    settings = dict(view='fit', image_size=(6, 8), zero='ignored')
    if not file:
        with pytest.raises(UserError, match='no names of classes .* data.classes gives them'):
            segment.segment(source, **settings)
    task = segment.segment(source, **settings, **({} if file else dict(classes=3)))
    assert task.names == {'classes': source.classes or ('0', '1', '2')}
    (batch,) = pipeline.examples(source, task, batch_size=1, threads=1)
    expected = np.where(IDS == 0, 255, IDS - 1 + (IDS == 255))
    np.testing.assert_array_equal(batch['label_map'][0], expected)


def coco_json(**change):
    one = {'id': 70, 'image_id': 1, 'category_id': 4, 'bbox': [2, 1, 3, 3], 'iscrowd': 0,
           'area': 9, 'segmentation': scenes.rectangle((2, 1, 5, 4))}
    crowd = one | {'id': 71, 'iscrowd': 1, 'bbox': [0, 0, 8, 1],
                   'segmentation': {'size': [6, 8], 'counts': [0, 1, 5, 1, 41]}}
    return json.dumps({
        'images': [{'id': 1, 'file_name': 'a.png'}, {'id': 2, 'file_name': 'b.png'}],
        'categories': [{'id': 9, 'name': 'bee'}, {'id': 4, 'name': 'ant'}],
        'annotations': [one | change, crowd, one | {'id': 72, 'image_id': 2, 'category_id': 9}],
    })  # fmt: skip


def coco_task(root, **change):
    write(root, {'train/a.png': IMAGE, 'train/b.png': IMAGE, 'train.json': coco_json(**change)})
    source = sources.load(name=str(root))
    return source, detect.detect(source, view='fit', image_size=(6, 8), masks=True, most=3)


def test_coco_trains_a_detector_without_its_crowds(tmp_path):
    source, task = coco_task(tmp_path)
    (batch,) = pipeline.examples(source, task, batch_size=2, threads=1)
    assert batch['labels'].tolist() == [[0, -1, -1], [1, -1, -1]]
    assert task.names == {'classes': ('ant', 'bee')}
    np.testing.assert_allclose(batch['boxes'][:, 0], [[2 / 8, 1 / 6, 5 / 8, 4 / 6]] * 2)
    np.testing.assert_array_equal(batch['masks'][0, 0], IDS == 3)


@pytest.mark.parametrize('change, words', [
    (dict(bbox=[1, 1, float('nan'), 2]), 'annotation 70 has a box that is not finite'),
    (dict(bbox=[1, 1, 0, 2]), 'annotation 70 has a box without area'),
    (dict(category_id=5), 'annotation 70 has a class that is none of the 2'),
    (dict(segmentation=scenes.rectangle((2, 1, 99, 4))), 'annotation 70: its polygon leaves'),
    (dict(segmentation=None), 'annotation 70: its segmentation is neither'),
])
def test_a_fault_in_an_annotation_of_coco_costs_one_example(tmp_path, change, words):
    source, task = coco_task(tmp_path, **change)
    (batch,) = pipeline.examples(source, task, batch_size=2, threads=1, tolerance=0.5)
    assert batch['mask'].tolist() == [0, 1]
    with pytest.raises(UserError, match=f'a.png: {words}'):
        list(pipeline.examples(source, task, batch_size=2, threads=1))


@pytest.mark.parametrize('shape, words', [
    ((7, 8), 'its annotations are of 8 x 7 pixels, the image has 8 x 6$'),
    ((8, 6), 'its annotations are of 6 x 8 pixels, the image has 8 x 6 as its EXIF .* shows it'),
])
def test_annotations_of_another_size_are_not_those_of_the_image(tmp_path, shape, words):
    source, task = coco_task(tmp_path)
    for i, ends in ((0, shape), (1, (6, 8))):
        source.records.arrays['shapes'][i] = ends
    task.read(source.records[1], None)
    with pytest.raises(UserError, match=words):
        task.read(source.records[0], None)


XML = """<annotation><filename>a.jpg</filename>
<object><name>cat</name><difficult>0</difficult>
<bndbox><xmin>3</xmin><ymin>2</ymin><xmax>5</xmax><ymax>4</ymax></bndbox></object>
<object><name>dog</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>8</xmax><ymax>6</ymax></bndbox></object>
<object><name>aeroplane</name>
<bndbox><xmin>7</xmin><ymin>5</ymin><xmax>8</xmax><ymax>6</ymax></bndbox></object>
</annotation>"""


def voc_folder(root, xml=XML, **more):
    classes, numbers = IDS.copy(), IDS.copy()
    classes[IDS == 3], numbers[IDS == 3], numbers[IDS == 1] = 8, 1, 3
    palette = scenes.png_with_palette
    return write(root, {
        'JPEGImages/a.jpg': IMAGE, 'JPEGImages/b.jpg': IMAGE, 'Annotations/a.xml': xml,
        'Annotations/b.xml': '<annotation></annotation>',
        'SegmentationClass/a.png': palette(classes), 'SegmentationObject/a.png': palette(numbers),
        'ImageSets/Segmentation/train.txt': 'a\n', 'ImageSets/Main/train.txt': 'b\na\n',
        'ImageSets/Main/cat_train.txt': 'a  1\nb -1\n', 'ImageSets/Main/trainval.txt': 'a\nb\n',
    } | more)  # fmt: skip


def test_folders_of_pascal_voc(tmp_path):
    root = voc_folder(tmp_path)
    assert sources.splits_of(root) == ('train', 'main_train', 'main_trainval')
    source = sources.load(name=root)
    assert source.classes == voc.NAMES and len(source) == 1
    same = dict(view='fit', image_size=(6, 8))
    task = segment.segment(source, zero='background', **same)
    assert task.names['classes'] == ('background', *voc.NAMES)
    label_map = task.read(source.records[0], None)['label_map']
    np.testing.assert_array_equal(label_map, np.where(IDS == 3, 8, IDS))
    task = detect.detect(source, masks=True, most=3, **same)
    made = task.read(source.records[0], None)
    assert made['labels'].tolist() == [7, 0, -1]  # without the difficult dog
    np.testing.assert_allclose(made['boxes'][0], [2 / 8, 1 / 6, 5 / 8, 4 / 6])
    np.testing.assert_array_equal(made['masks'][:2], [IDS == 3, IDS == 1])
    other = sources.load(name=root, split='main_train')
    assert [other.name(i)[-5:] for i in range(2)] == ['b.jpg', 'a.jpg']
    assert detect.detect(other, **same).read(other.records[0], None)['labels'].max() == -1
    before = facts.of(source)
    write(tmp_path, {'Annotations/a.xml': XML.replace('dog', 'cow')})
    assert facts.of(source) != before
    write(tmp_path, {'classes.txt': 'cat\ndog'})
    named = sources.load(name=root)
    assert named.classes == ('cat', 'dog')
    task = detect.detect(named, crowd=None, **same)
    with pytest.raises(images.Unreadable, match='annotation 2 has a class that is none of the 2'):
        task.read(named.records[0], None)
    write(tmp_path, {'ImageSets/Segmentation/train.txt': '../../x'})
    with pytest.raises(UserError, match=r'there is no JPEGImages/../../x'):
        sources.load(name=root)


BOMB = '<!DOCTYPE a [<!ENTITY x "xxxxxxxxxx"><!ENTITY y "&x;&x;&x;">]><annotation>&y;</annotation>'


@pytest.mark.parametrize('xml, words', [
    (BOMB, 'it declares a document type'), (BOMB.encode('utf-16'), 'it declares a document type'),
    ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', 'it declares a document type'),
    (XML[:200], 'Annotations/a.xml is no annotation of VOC'), ('', 'no element found'),
    (XML.replace('<xmin>3</xmin>', ''), 'is no annotation of VOC'),
    (XML.replace('bndbox', 'box'), 'is no annotation of VOC'),
])
def test_xml_that_is_hostile_or_broken_makes_its_example_unusable(tmp_path, xml, words):
    source = sources.load(name=voc_folder(tmp_path, xml))
    task = detect.detect(source, view='fit', image_size=8)
    with pytest.raises(UserError, match=words) as e:
        list(pipeline.examples(source, task, batch_size=1, threads=1))
    assert 'a.jpg: ' in str(e.value)


def test_masks_of_tars_and_parquet_by_their_fields(tmp_path):
    import io
    import tarfile

    import pyarrow as pa
    import pyarrow.parquet as pq

    members = {'png': IMAGE, 'mask.png': scenes.png(IDS), 'json': json.dumps({
        'boxes': [[2, 1, 3, 3]], 'labels': [1]
    }).encode()}  # fmt: skip
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        for suffix, content in members.items():
            info = tarfile.TarInfo(f'0.{suffix}')
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    struct = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
    pq.write_table(pa.table({
        'image': pa.array([{'bytes': IMAGE, 'path': None}], struct),
        'annotation': pa.array([{'bytes': members['mask.png'], 'path': None}], struct),
        'objects': [{'bbox': [[2.0, 1.0, 3.0, 3.0]], 'category': [1]}],
    }), tmp_path / 'a.parquet')  # fmt: skip
    for file, mask, boxes, labels in (
        ('a.tar', 'mask.png', 'json/boxes', 'json/labels'),
        ('a.parquet', 'annotation', 'objects/bbox', 'objects/category'),
    ):
        source = sources.load(name=str(tmp_path / file), label=None)
        same = dict(view='fit', image_size=(6, 8), classes=4)
        made = segment.segment(source, mask=mask, **same).read(source.records[0], None)
        np.testing.assert_array_equal(made['label_map'], IDS)
        task = detect.detect(source, boxes=boxes, labels=labels, crowd=None, most=1, **same)
        made = task.read(source.records[0], None)
        np.testing.assert_allclose(made['boxes'], [[2 / 8, 1 / 6, 5 / 8, 4 / 6]])
        assert made['labels'].tolist() == [1]


def test_prepared_records_keep_masks_and_objects(tmp_path):
    """The same examples as from the folder, and one clear line where fields can't be kept."""
    source, task = coco_task(tmp_path / 'coco')
    keep = ('boxes', 'labels', 'crowd', 'ids', 'segmentation')
    folder.prepare(str(tmp_path / 'coco'), str(tmp_path / 'a'), keep=keep, max_side=0, distance=-1)
    made = sources.load(name=str(tmp_path / 'a'))
    assert made.classes == source.classes == ('ant', 'bee') and 'label' not in made.records[0]
    for i in range(2):
        one, other = (task.read(s.records[i], None) for s in (source, made))
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
    other = names.relabel(made, ('bee', 'ant'), 'it')
    assert task.read(other.records[0], None)['labels'][0] == 1
    root = write(tmp_path / 'pairs', {'images/a.jpg': IMAGE, 'masks/a.png': scenes.png(IDS)})
    folder.prepare(root, str(tmp_path / 'b'), keep=('mask',), max_side=0)
    assert sources.load(name=str(tmp_path / 'b')).records[0]['mask'] == scenes.png(IDS)
    shapes = dict(a=[[1.5, 2], [3, 4]], b=[], c=[3, 4], d=[[[1, 2]], [[3, 4]]], e=[None], f='text')
    again = example.decode(example.encode(b'', [], '', shapes | dict(g=np.zeros((0, 4)))))
    found = {key: example.value(value) for key, value in again.items()}
    assert [found[key].tolist() for key in 'abcg'] == [[1.5, 2, 3, 4], [], [3, 4], []]
    assert [json.loads(found[key]) for key in 'de'] == [shapes['d'], [None]]
    assert found['f'] == b'text'
    for options, words in (
        (dict(max_side=0), 'has no labels; --keep names fields'),
        (dict(keep=('mask',)), '--keep needs --max_side=0'),
        (dict(keep=('masks',), max_side=0), "unreadable image .*a.jpg: no field 'masks' among"),
    ):
        with pytest.raises(UserError, match=words):
            folder.prepare(root, str(tmp_path / 'c'), **options)
