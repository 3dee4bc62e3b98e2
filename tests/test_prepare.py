"""Data sets as records: real processes, real signals, files that others could read and damage."""

import io
import json
import os
import pathlib
import pickle
import shlex
import signal
import subprocess
import sys
import time
import tracemalloc

import fsspec
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images
from tensorflow_datasets.proto import tf_example_pb2

from vit_jax.data import images, sources
from vit_jax.data.prepare import duplicates, worker
from vit_jax.data.readers import example, prepared, records
from vit_jax.errors import UserError

HERE = pathlib.Path(__file__).parents[1]
LABELS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9)
NAMES = st.text(st.characters(exclude_categories=['Cs']), max_size=300)


def example_of(record):
    """(image, labels, name) of a record, by protobuf alone."""
    feature = tf_example_pb2.Example.FromString(record).features.feature
    assert feature.keys() == {'image', 'label', 'name'}
    (image,), (name,) = feature['image'].bytes_list.value, feature['name'].bytes_list.value
    return image, tuple(feature['label'].int64_list.value), name.decode()


def decoded(record):
    """(image, labels, name) of a record, by the package."""
    features = example.decode(record)
    name = example.one_bytes(features, 'name').decode() if 'name' in features else ''
    return example.one_bytes(features, 'image'), example.integers(features, 'label'), name


@hypothesis.given(st.binary(max_size=500), LABELS, NAMES)
def test_records_are_what_tfds_reads_and_writes(image, labels, name):
    record = example.encode(image, labels, name)
    assert example_of(record) == (image, tuple(labels), name) == decoded(record)
    theirs = tf_example_pb2.Example()
    feature = theirs.features.feature
    feature['other'].float_list.value.extend([1.5, 2.5])
    feature['name'].bytes_list.value.append(name.encode())
    feature['label'].int64_list.value.extend(labels)
    feature['image'].bytes_list.value.append(image)
    assert decoded(theirs.SerializeToString()) == (image, tuple(labels), name)
    assert list(example.decode(theirs.SerializeToString())['other']) == [1.5, 2.5]


def field(number, *parts):
    """A field of bytes of less than 128 bytes, by protobuf's wire format."""
    value = b''.join(parts)
    assert len(value) < 128
    return bytes([number << 3 | 2, len(value)]) + value


def test_bytes_are_those_of_the_wire_format_and_equal_for_equal_input():
    def entry(name, kind, values):
        return field(1, field(1, name), field(2, field(kind, values)))

    written = field(
        1, entry(b'image', 1, field(1, b'abc')), entry(b'label', 3, field(1, b'\x05\xac\x02')),
        entry(b'name', 1, field(1, b'a\xff')),
    )  # fmt: skip
    assert example.encode(b'abc', [5, 300], 'a\udcff') == written
    bare = field(
        1, entry(b'image', 1, field(1, b'')), entry(b'label', 3, b''),
        entry(b'name', 1, field(1, b'')),
    )  # fmt: skip
    assert example.encode(b'', [], '') == bare


def test_unpacked_labels_and_unknown_fields_are_read():
    def entry(name, kind, values):
        return field(1, field(1, name), field(2, field(kind, values)))

    minus_one = b'\xff' * 9 + b'\x01'
    label = entry(b'label', 3, b'\x08\x05\x08' + minus_one + b'\x08\xac\x02')
    image = entry(b'image', 1, field(1, b'abc'))
    unknown = b'\x10\x07' + field(9, b'later') + b'\x1d1234' + b'\x2112345678'
    record = unknown + field(1, label, unknown, image) + unknown
    assert decoded(record) == (b'abc', (5, -1, 300), '')
    long = entry(b'label', 3, b'\x08' + b'\xff' * 9 + b'\x7f')
    assert decoded(field(1, image, long))[1] == (-1,)  # of 70 bits the lowest 64
    for wrong, words in (
        (entry(b'image', 3, b'\x08\x05'), 'feature image is not bytes'),
        (entry(b'image', 1, field(1, b'a') + field(1, b'b')), 'image has 2 values, not one'),
        (entry(b'other', 1, field(1, b'a')), 'it has no feature image'),
    ):
        with pytest.raises(ValueError, match=words):
            decoded(field(1, wrong, label))
    with pytest.raises(ValueError, match='feature label is not int64'):
        decoded(field(1, image, entry(b'label', 1, field(1, b'5'))))


@hypothesis.given(st.data())
def test_damaged_records_are_a_value_error(data):
    record = bytearray(example.encode(b'image' * 40, (1, 2, 300), 'name'))
    for _ in range(data.draw(st.integers(0, 4))):
        record[data.draw(st.integers(0, len(record) - 1))] = data.draw(st.integers(0, 255))
    record = bytes(record[: data.draw(st.integers(0, len(record)))]) + data.draw(st.binary())
    try:
        image, labels, name = decoded(record)
    except ValueError:
        return
    assert type(image) is bytes and type(name) is str and all(type(n) is int for n in labels)


def write_set(path, count=24, shards=3, max_labels=1):
    """A prepared folder, without `prepare`; label i % 5 (and 7) of image i."""
    path.mkdir(parents=True)
    entries = []
    for k in range(shards):
        name = records.shard_name('train', k, shards)
        rows = [
            example.encode(b'image %d' % i, (i % 5, 7)[:max_labels], f'name {i}')
            for i in range(count)[k * count // shards : (k + 1) * count // shards]
        ]
        written = records.write_shard(path / name, rows)
        entries.append(dict(zip(('file', 'examples', 'bytes', 'sha256'), (name, *written),
                                strict=True)))  # fmt: skip
    save(path, {
        'format': records.FORMAT, 'version': 1, 'classes': list('abcdefgh'),
        'max_labels': max_labels, 'splits': {'train': entries},
    })  # fmt: skip
    return path


def save(path, manifest):
    (path / records.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize('max_labels', [1, 2, 3])
def test_each_example_is_read_with_its_labels(tmp_path, max_labels, monkeypatch):
    monkeypatch.setattr(prepared.Prepared, 'limit', 2)
    data = prepared.Prepared(write_set(tmp_path / 'set', max_labels=max_labels))
    data = pickle.loads(pickle.dumps(data))
    assert len(data) == 24
    for i in np.random.default_rng(0).permutation(24):
        image, label = data[i]['image'], data[i]['label']
        assert image == b'image %d' % i
        if max_labels == 1:
            assert type(label) is int and label == i % 5
        else:
            assert label.dtype == np.int32 and label.tolist() == [i % 5, 7, -1][:max_labels]
        shard = f'{tmp_path}/set/train-0000{i // 8}-of-00003.array_record[{i % 8}]'
        assert data.name(i) == f'{shard} (name {i})'
        assert len(data.readers) <= 2
    with pytest.raises(IndexError):
        data[24]


def test_a_shard_that_is_not_the_manifests_is_named(tmp_path):
    path = write_set(tmp_path / 'set')
    manifest = records.read_manifest(path)
    shard = manifest['splits']['train'][1]
    shard['examples'] += 1
    save(path, manifest)
    with pytest.raises(UserError, match=rf'{shard["file"]} has 8 records, 9 by its'):
        prepared.Prepared(path)[10]
    file = path / shard['file']
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf'{shard["file"]} has [\d,]+ bytes'):
        prepared.Prepared(path)[10]
    shard['examples'] -= 1
    save(path, manifest)
    file.write_bytes(whole.replace(b'image 10', b'image 11'))
    with pytest.raises(UserError, match=rf'record 2 of .*{shard["file"]} is damaged'):
        prepared.Prepared(path)[10]
    assert prepared.Prepared(path)[9]['image'] == b'image 9'
    file.unlink()
    with pytest.raises(UserError, match=rf'{shard["file"]}: No such file'):
        prepared.Prepared(path)[10]


@pytest.mark.parametrize('key, value', [
    ('format', 'other'), ('version', 2), ('classes', 'ab'), ('classes', [1]), ('max_labels', -1),
    ('max_labels', True), ('splits', {}), ('splits', []), ('splits', {'train': []}),
    ('splits', {'train': [{}]}), ('splits', {'train': ['x']}), ('file', '../x'), ('file', 'a/b'),
    ('file', 3), ('file', 'train-00000-of-00003.array_record'), ('examples', -1), ('bytes', 1e300),
    ('examples', True), ('sha256', 'x'), ('sha256', None),
])  # fmt: skip
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path, key, value):
    path = write_set(tmp_path / 'set')
    manifest = records.read_manifest(path)
    if key in manifest:
        manifest[key] = value
    else:
        manifest['splits']['train'][1][key] = value
    save(path, manifest)
    with pytest.raises(UserError) as error:
        prepared.Prepared(path)
    text = str(error.value)
    assert text.startswith(f'{path}/manifest.json: ') and '\n' not in text
    assert key.rstrip('s') in text


@pytest.mark.parametrize('text', ['', '{"format": ', '[' * 10**5, '[]', '"x"', '\udcff', '1'])
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    (tmp_path / 'manifest.json').write_bytes(text.encode('utf-8', 'surrogateescape'))
    with pytest.raises(UserError, match='manifest.json'):
        records.read_manifest(tmp_path)


def test_three_billion_examples_take_little_memory(tmp_path):
    shards = [
        dict(file=records.shard_name('train', k, 100_000), examples=30_000 + k % 2, bytes=3 * 10**9,
             sha256=f'{k:064x}')
        for k in range(100_000)
    ]  # fmt: skip
    save(tmp_path, dict(format=records.FORMAT, version=1, classes=['a'], max_labels=1,
                        splits={'train': shards}))  # fmt: skip
    ends = np.cumsum([shard['examples'] for shard in shards])
    tracemalloc.start()
    data = prepared.Prepared(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6 and len(data) == ends[-1] == 3_000_050_000
    for k in (0, 1, 2, 49_999, 99_999):
        assert data.locate(ends[k] - 1) == (k, 29_999 + k % 2)
        assert data.locate(ends[k] - 30_000 - k % 2) == (k, 0)


def test_an_address_is_fetched_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'cache'))
    fs, local = fsspec.filesystem('memory'), write_set(tmp_path / 'set')
    fs.put(str(local), '/records/set', recursive=True)
    data = prepared.Prepared('memory://records/set')
    assert dict(data[9]) == {'image': b'image 9', 'label': 4, 'name': 'name 9'}
    fs.rm('/records/set/train-00001-of-00003.array_record')
    assert pickle.loads(pickle.dumps(data))[10]['image'] == b'image 10'
    wrong = bytearray((local / 'train-00002-of-00003.array_record').read_bytes())
    wrong[-9] ^= 1
    fs.pipe('/records/set/train-00002-of-00003.array_record', bytes(wrong))
    with pytest.raises(UserError, match=r'train-00002.*sha256'):
        data[20]
    fs.rm('/records/set/train-00000-of-00003.array_record')
    with pytest.raises(UserError, match='train-00000.*no such file'):
        data[0]
    assert len(list((tmp_path / 'cache').rglob('*.array_record*'))) == 1
    with pytest.raises(UserError, match='no manifest.json'):
        prepared.Prepared('memory://records/other')


# What follows starts `python -m vit_jax.data.prepare`.


def write_images(path, count=10, side=40, split=''):
    """path/class/i: windows of photographs, of two classes, as JPEG and PNG in turn."""
    rng, photos = np.random.default_rng(0), load_sample_images().images
    for i in range(2 * count):
        file = path / split / 'ab'[i % 2] / f'{i:03d}.{"png" if i % 3 == 0 else "jpg"}'
        file.parent.mkdir(parents=True, exist_ok=True)
        y, x = rng.integers(300), rng.integers(500)
        Image.fromarray(photos[i % 2][y : y + side, x : x + 2 * side]).save(file)
    return path


def command(src, dst, *options):
    return [sys.executable, '-m', 'vit_jax.data.prepare', str(src), str(dst),
            *map(str, options)]  # fmt: skip


def run(src, dst, *options):
    """(exit status, output) of a whole run."""
    done = subprocess.run(
        command(src, dst, *options), cwd=HERE, timeout=100, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def refused(src, dst, *options):
    """The one line of a run that refuses."""
    status, output = run(src, dst, *options)
    lines = [line for line in output.splitlines() if not line.startswith('images ')]
    assert status == 2 and len(lines) == 1 and lines[0].startswith('error: '), output
    return lines[0]


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope='module')
def src(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def endless(tmp_path_factory):
    """So many images that a run is still at work when it is sent a signal."""
    folder = write_images(tmp_path_factory.mktemp('endless'), count=2)
    one = folder / 'b' / '001.jpg'
    for i in range(20_000):
        os.link(one, one.with_name(f'{i}.jpg'))
    return folder


@pytest.fixture(scope='module')
def whole(src, tmp_path_factory):
    """What one worker prepares, undisturbed."""
    dst = tmp_path_factory.mktemp('whole') / 'set'
    status, output = run(src, dst, '--workers=1', '--shards=7', '--max_side=60')
    assert status == 0 and 'train: 20 images' in output, output
    return dst


def test_labels_and_bytes_are_those_of_the_source(src, whole):
    source, data = sources.load(name=str(src)), prepared.Prepared(whole)
    assert data.classes == source.classes and len(data) == len(source) == 20
    assert len(data.files) == 7
    for i in range(20):
        (before, label), (after, same) = (
            (one['image'], one['label']) for one in (source.records[i], data[i])
        )
        assert same == label and data.name(i).endswith(f'({source.name(i)})')
        assert Image.open(io.BytesIO(after)).format == 'JPEG'
        assert images.decode(after).shape == (30, 60, 3)
        x = np.asarray(Image.fromarray(images.decode(before)).resize((60, 30)), float)
        assert np.abs(x - images.decode(after)).mean() < 6
    for name in sorted(p.name for p in whole.iterdir()):
        assert name == 'manifest.json' or name.startswith('train-0000')


@pytest.mark.parametrize('side, kept', [(0, ('jpg', 'png')), (512, ('jpg',))])
def test_small_jpegs_are_kept_byte_for_byte(src, side, kept):
    for path in sorted(src.glob('*/*')):
        data, image = worker.convert(path.read_bytes(), side, 92)
        assert image.shape == (40, 80, 3) and images.decode(data).shape == image.shape
        assert (data == path.read_bytes()) == (path.suffix[1:] in kept)
        assert path.suffix[1:] in kept or data[:2] == b'\xff\xd8'


# The command that stops itself, as SIGSTOP would, when so many shards stand in the journal.
STOPPING = """
import os, runpy, signal, sys
from vit_jax.data.prepare import pool
results, shards = pool.results, int(sys.argv.pop(1))
def stopping(*arguments):
    for count, entry in enumerate(results(*arguments)):
        if count == shards:
            os.kill(os.getpid(), signal.SIGSTOP)
        yield entry
pool.results = stopping
runpy.run_module('vit_jax.data.prepare', run_name='__main__', alter_sys=True)
"""


def killed(src, dst, shards, *options, number=signal.SIGKILL):
    """Starts a run and sends it a signal after so many shards; (exit status, output)."""
    python, _, _, *arguments = command(src, dst, *options)
    with open(f'{dst}.log', 'wb') as log:
        process = subprocess.Popen(
            [python, '-c', STOPPING, str(shards), *arguments], cwd=HERE, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1]), open(log.name).read()
        (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)
        os.kill(process.pid, signal.SIGCONT)
        return process.wait(timeout=60), open(log.name).read()


def finished(dst):
    """How many shards the journal has."""
    path = dst / records.JOURNAL
    return path.read_text().count('\n') - 1 if path.exists() else 0


def test_killed_and_resumed_it_is_the_same_data_set(src, whole, tmp_path):
    dst, options = tmp_path / 'set', ('--shards=7', '--max_side=60')
    status, _ = killed(src, dst, 2, '--workers=1', *options)
    assert status == -signal.SIGKILL and finished(dst) == 2
    with pytest.raises(UserError, match='not finished; run python -m vit_jax.data.prepare again'):
        prepared.Prepared(dst)
    assert 'quality is 92, not 80' in refused(src, dst, *options, '--quality=80')
    assert 'name is' in refused(write_images(tmp_path / 'other'), dst, *options)
    kept = {p: p.stat().st_mtime_ns for p in dst.glob('train-00000*')}
    (dst / 'train-00001-of-00007.array_record').write_bytes(b'damaged')
    with (dst / records.JOURNAL).open('a') as file:
        file.write('{"split": "tra')  # as a kill may leave it
    (dst / '.train-00006-of-00007.array_record.1.part').write_bytes(b'half')
    status, output = killed(src, dst, 1, '--workers=2', *options, number=signal.SIGINT)
    assert status == 130 and 'Traceback' not in output and 'the same command resumes' in output
    status, output = run(src, dst, '--workers=2', *options)
    assert status == 0, output
    assert content(dst) == content(whole)
    assert kept == {p: p.stat().st_mtime_ns for p in dst.glob('train-00000*')}


def test_drawn_images_are_prepared_like_any_other(tmp_path):
    """On a full disk it stops; afterwards it resumes, and the records are those that are drawn."""
    name, dst = 'jft_like:60x50@128,max_labels=3,test_examples=3', tmp_path / 'set'
    options = ('--shard_examples=25', '--split=test,train')
    limited = 'ulimit -f 150; ' + shlex.join(
        command(name, dst, '--workers=1', *options)
    )  # the shard of test fits 150 KiB, those of train do not
    done = subprocess.run(
        ['bash', '-c', limited], cwd=HERE, timeout=100, text=True, capture_output=True
    )
    assert done.returncode == 2 and 'cannot write' in done.stderr, done.stderr
    assert finished(dst) == 1 and not list(dst.glob('*.part'))
    (shard,) = dst.glob('test-*')
    before = shard.stat().st_mtime_ns
    for folder, workers in ((dst, 2), (tmp_path / 'undisturbed', 1)):
        status, output = run(name, folder, f'--workers={workers}', *options)
        assert status == 0 and 'train: 60 images' in output, output
    assert content(dst) == content(tmp_path / 'undisturbed') and len(content(dst)) == 5
    assert shard.stat().st_mtime_ns == before
    for split in ('train', 'test'):
        drawn, source = (sources.load(name=str(x), split=split) for x in (name, dst))
        assert len(drawn) == len(source) and drawn.classes == source.classes
        for i in range(len(drawn)):
            (data, label), (own, own_label) = (
                (one['image'], one['label']) for one in (source.records[i], drawn.records[i])
            )
            assert data == own and label.tolist() == own_label.tolist()
    assert 'seed=1' in refused(f'{name},seed=1', dst, *options)


def test_interrupted_as_workers_start_it_says_one_line(endless, tmp_path):
    begun = tmp_path / 'set' / records.JOURNAL
    with open(tmp_path / 'log', 'wb') as log:
        process = subprocess.Popen(
            command(endless, tmp_path / 'set'), cwd=HERE, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    deadline = time.time() + 60
    while not begun.exists():
        assert process.poll() is None and time.time() < deadline, open(log.name).read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output = open(log.name).read() if process.wait(timeout=60) == 130 else ''
    assert output.strip().count('\n') == 0 and 'resumes' in output, open(log.name).read()


def test_a_finished_folder_is_left_as_it_is(src, whole):
    before = content(whole)
    assert run(src, whole, '--shards=7', '--max_side=60')[0] == 0
    assert 'is finished, but options max_side is 60, not 50' in refused(
        src, whole, '--shards=7', '--max_side=50'
    )
    assert content(whole) == before


def test_a_worker_that_dies_ends_the_command(endless, tmp_path):
    dst = tmp_path / 'set'
    process = subprocess.Popen(
        command(endless, dst, '--workers=1'), cwd=HERE, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        deadline = time.time() + 60
        while not list(dst.glob('.train*.part')):
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.01)
        (worker,) = {int(p.name.split('.')[-2]) for p in dst.glob('.train*.part')}
        os.kill(worker, signal.SIGKILL)
        output = process.communicate(timeout=30)[0]
    finally:
        process.kill()
    assert process.returncode == 2 and 'exit status -9 in shard 0 of train' in output
    assert 'Traceback' not in output


def test_unreadable_images_and_duplicates_are_left_out(tmp_path):
    src, test = write_images(tmp_path / 'src', side=60), tmp_path / 'test'
    (src / 'b' / '001.jpg').write_bytes(b'\xff\xd8\xff no image')
    files = sorted(src.glob('*/*'))
    text = refused(src, tmp_path / 'set', '--workers=1')
    assert f'unreadable image {src}/b/001.jpg' in text and '(1 of 20 images' in text
    for i, (file, change) in enumerate({
        files[0]: lambda image: image,
        files[5]: lambda image: image.resize((60, 30)),
        files[12]: lambda image: ImageEnhance.Brightness(image).enhance(0.8),
        files[17]: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    }.items()):  # fmt: skip
        out = test / 'test' / 'ab'[i % 2] / f'{i}.png'
        out.parent.mkdir(parents=True, exist_ok=True)
        (test / 'train' / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        change(Image.open(file)).save(out)
    dst = tmp_path / 'set2'
    status, output = run(
        src, dst, '--workers=1', '--tolerance=0.05', f'--against={test}:test', '--shards=2'
    )
    assert status == 0 and '15 images' in output, output
    rows = [json.loads(line) for line in (dst / 'removed.jsonl').read_text().splitlines()]
    found = {row['name']: (row['kind'], pathlib.Path(row['of']).name) for row in rows}
    assert found == {
        str(files[0]): ('exact', '0.png'), str(files[5]): ('near', '1.png'),
        str(files[12]): ('near', '2.png'), str(files[17]): ('mirrored', '3.png'),
    }  # fmt: skip
    counts = {'examples': 15, 'removed': 4, 'unreadable': 1}
    assert json.loads((dst / 'manifest.json').read_text())['counts'] == {'train': counts}
    (bad,) = map(json.loads, (dst / 'unreadable.jsonl').read_text().splitlines())
    assert bad['name'] == f'{src}/b/001.jpg'
    assert {p.name for p in dst.iterdir() if not p.name.startswith('train-')} == {
        'manifest.json', 'removed.jsonl', 'unreadable.jsonl'
    }  # fmt: skip


def test_the_nearest_hash_is_found_as_by_comparing_all():
    rng = np.random.default_rng(0)
    table = rng.integers(0, 2**64, (500, 4), dtype=np.uint64)
    known = duplicates.Index([str(i) for i in range(500)], [], table)
    for changed in (0, 1, 30, 48, 49, 100):
        bits = np.unpackbits(table[123].view(np.uint8))
        bits[rng.permutation(256)[:changed]] ^= 1
        words = np.packbits(bits).view(np.uint64)
        wanted = (123, changed) if changed <= 48 else None
        assert known.nearest(words, 48) == wanted
