"""Data sets of many kinds: tars, parquet, TFRecord, records, drawn; on disk and at addresses."""

import collections
import concurrent.futures
import contextlib
import hashlib
import http.server
import io
import json
import os
import pathlib
import pickle
import re
import struct
import sys
import tarfile
import threading

import feeds
import fsspec
import kinds
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from vit_jax.data import images, sources
from vit_jax.data.readers import columnar, example, records, tars, tfrecord
from vit_jax.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp('cache')
    monkeypatch.setenv('VIT_JAX_CACHE', str(folder))
    yield folder
    MemoryFileSystem.store.clear()


def test_a_workdir_does_not_hide_the_data_set_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources.kind_of('cifar10') == 'tfds'
    (tmp_path / 'cifar10' / 'checkpoints').mkdir(parents=True)  # --workdir cifar10
    (tmp_path / 'cifar10' / '.lock').touch()
    assert sources.kind_of('cifar10') == 'tfds'
    (tmp_path / 'cifar10' / 'train').mkdir()  # images, and a run beside them
    assert sources.kind_of('cifar10') == 'place'


def png(i):
    """An image of one colour that tells i."""
    out = io.BytesIO()
    Image.new('RGB', (3, 2), (i % 256, i // 256, 7)).save(out, 'PNG')
    return out.getvalue()


def shown(data):
    """Which i the image was made of."""
    red, green, blue = images.decode(data)[0, 0].tolist()
    assert blue == 7
    return red + 256 * green


def contents(source):
    """[(i of the image, label)] of a source; a list of labels for many."""
    found = [source.records[i] for i in range(len(source))]
    return [(shown(one['image']), np.asarray(one['label']).tolist()) for one in found]


def tar_of(members, format=tarfile.GNU_FORMAT):
    """The bytes of a tar with members (name, bytes) or TarInfo, one after the other."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w', format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def pair(i, label=None, key=None):
    key = f'{i:04d}' if key is None else key
    return [(f'{key}.png', png(i)), (f'{key}.cls', b'%d' % (i % 5 if label is None else label))]


def write_tar(path, numbers, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of([m for i in numbers for m in pair(i)], **options))


def counted(monkeypatch, module, name):
    """A list that grows with the first arguments of each call of a function."""
    calls, before = [], getattr(module, name)

    def call(*args, **kwargs):
        calls.append(args)
        return before(*args, **kwargs)

    monkeypatch.setattr(module, name, call)
    return calls


def test_a_pattern_a_glob_and_a_folder_are_the_same_shards(tmp_path):
    for k in range(3):
        write_tar(tmp_path / f'x-{k:03d}.tar', range(10 * k, 10 * k + 10))
    names = ('x-{000..002}.tar', 'x-{000,001,002}.tar', 'x-*.tar', '{x,}-00*.tar', '')
    for name in names:
        source = sources.load(name=f'{tmp_path}/{name}')
        assert contents(source) == [(i, i % 5) for i in range(30)]
        assert source.classes == ('0', '1', '2', '3', '4')
        assert source.name(27) == f'{tmp_path}/x-002.tar[7] (0027)'
    assert contents(sources.load(name=f'{tmp_path}/x-{{001..002}}.tar'))[0] == (10, 0)
    assert contents(sources.load(name=f'{tmp_path}/x-001.tar'))[0] == (10, 0)
    again = pickle.loads(pickle.dumps(source))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: shown(again.records[i]['image']), list(range(30)) * 5))
    assert found == list(range(30)) * 5


@pytest.mark.parametrize('format', [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names_are_read(tmp_path, format):
    keys = ['d' * 90 + '/' + 'k' * 150, 'täglich/bee', 'dir.with.dots/n02 (1)', 'UP', '../up']
    members = [m for i, key in enumerate(keys) for m in pair(i, key=key)]
    members[0] = (f'{keys[0]}.JPeG', members[0][1])  # the decoder looks at the bytes
    folder = tarfile.TarInfo('folder/')
    folder.type = tarfile.DIRTYPE
    members = [folder, ('no_suffix', b'x'), *members, ('.hidden', b'x')]
    (tmp_path / 'a.tar').write_bytes(tar_of(members, format))
    source = sources.load(name=f'{tmp_path}/a.tar')
    assert contents(source) == [(i, i) for i in range(5)]
    assert [source.name(i).split('] (')[1].rstrip(')')[:200] for i in (1, 2, 4)] == [
        keys[1], 'dir.with.dots/n02 (1', keys[4]
    ]  # fmt: skip


def test_labels_in_json_are_one_or_many(tmp_path):
    def write(name, labels, key='label'):
        members = []
        for i, label in enumerate(labels):
            text = json.dumps({key: label, 'caption': 'x'}).encode()
            members += [(f'{i}.json', text), (f'{i}.webp', png(i))]
        (tmp_path / name).write_bytes(tar_of(members))

    write('one.tar', [3, 0, 2])
    assert contents(sources.load(name=f'{tmp_path}/one.tar')) == [(0, 3), (1, 0), (2, 2)]
    write('many.tar', [[3, 1], [], [2], 5], key='tags')
    source = sources.load(name=f'{tmp_path}/many.tar', label='tags')
    assert [label for _, label in contents(source)] == [[3, 1], [-1, -1], [2, -1], [5, -1]]
    assert source.records[0]['label'].dtype == np.int32 and len(source.classes) == 6
    with pytest.raises(UserError, match="many.tar: example 0 .0.: .json has no field 'label', but"):
        sources.load(name=f'{tmp_path}/many.tar')


def test_an_image_of_several_is_chosen(tmp_path):
    members = [('a.png', png(1)), ('a.mask.png', png(2)), ('a.jpg', png(3)), ('a.cls', b'0\n')]
    (tmp_path / 'a.tar').write_bytes(tar_of(members))
    with pytest.raises(UserError, match=r'example 0 \(a\): several images; choose one among'):
        sources.load(name=f'{tmp_path}/a.tar')
    for name, i in (('png', 1), ('mask.png', 2), ('jpg', 3)):
        assert contents(sources.load(name=f'{tmp_path}/a.tar', image=name)) == [(i, 0)]


def special(kind):
    info = tarfile.TarInfo('0001.jpg')
    info.type, info.linkname = kind, '/etc/passwd'
    return info


@pytest.mark.parametrize('members, words', [
    ([('0001.png', png(1))], r'example 1 \(0001\): no label: neither .cls nor .json'),
    ([('0001.cls', b'1')], r'example 1 \(0001\): no image .* among its members .cls'),
    ([('0001.heic', b'x'), ('0001.cls', b'1')], r'example 1 \(0001\): no image'),
    ([('0001.png', png(1)), ('0001.cls', b'cat')], r"\(0001\): .cls is b'cat', not a number"),
    ([('0001.png', png(1)), ('0001.cls', b'9' * 10)], r'\(0001\): label 9999999999 is not'),
    ([('0001.png', png(1)), ('0001.json', b'{"label": "x"}')], r"\(0001\): label 'x' is not"),
    ([('0001.png', png(1)), ('0001.json', b'{"label": true}')], r'\(0001\): label True is not'),
    ([('0001.png', png(1)), ('0001.json', b'{')], r'\(0001\): .json is invalid'),
    ([('0001.png', png(1)), ('0001.png', b'')], r'\(0001\): two members have the extension .png'),
    ([special(tarfile.LNKTYPE)], '0001.jpg is a link or sparse'),
    ([special(tarfile.SYMTYPE)], '0001.jpg is a link or sparse'),
    ([special(tarfile.GNUTYPE_SPARSE)], '0001.jpg is a link or sparse'),
    ([('0001.cls', bytes(2**20 + 1))], '0001.cls has 1,048,577 bytes, more than 1,048,576'),
])  # fmt: skip
def test_what_is_wrong_in_a_tar_is_named_with_shard_and_key(tmp_path, members, words):
    (tmp_path / 'a.tar').write_bytes(tar_of(pair(0)))
    (tmp_path / 'b.tar').write_bytes(tar_of([*pair(0), *members, *pair(2)]))
    with pytest.raises(UserError, match='b.tar: .*' + words):
        sources.load(name=f'{tmp_path}/*.tar')


def test_a_tar_that_is_cut_or_damaged_anywhere_is_named(tmp_path):
    whole = tar_of([m for i in range(4) for m in pair(i)])
    path = tmp_path / 'a.tar'
    end = 4 * 4 * 512  # of the headers and contents; zeros to the end of the block follow
    for size in [*range(0, end + 1, 256), 3, end - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r'a.tar is damaged at byte [\d,]+: '):
            sources.load(name=str(path))
    path.write_bytes(whole[:550])
    with pytest.raises(UserError, match='byte 0: 0000.png exceeds the end of the file'):
        sources.load(name=str(path))
    for k in range(8):  # a damaged header is no end of the archive
        at = 1024 * k + 5
        path.write_bytes(whole[:at] + b'\xff' + whole[at + 1 :])
        with pytest.raises(UserError, match=rf'a.tar is damaged at byte {1024 * k:,}: '):
            sources.load(name=str(path))
    path.write_bytes(whole)
    source = sources.load(name=str(path))
    path.write_bytes(whole[: end - 1500])  # afterwards
    with pytest.raises(UserError, match=r'a.tar\[3\] \(0003\): got .* bytes at'):
        source.records[3]
    assert shown(source.records[1]['image']) == 1


@pytest.mark.parametrize('kind', [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_headers_that_claim_much_are_refused(tmp_path, kind):
    info = tarfile.TarInfo('x')
    info.type, info.size = kind, 2**33
    header = info.tobuf(tarfile.GNU_FORMAT) + bytes(2**16)
    (tmp_path / 'a.tar').write_bytes(tar_of(pair(0))[:2048] + header)
    with pytest.raises(UserError, match='a.tar is damaged at byte 2,048: a header claims 8,589,'):
        sources.load(name=f'{tmp_path}/a.tar')


def test_an_index_is_made_once_and_anew_for_a_changed_tar(tmp_path, monkeypatch, cache):
    scans = counted(monkeypatch, tars, 'scan')
    path = tmp_path / 'a.tar'
    write_tar(path, range(6))
    load = lambda **options: contents(sources.load(name=str(path), **options))  # noqa: E731
    first = load()
    assert load() == first and len(scans) == 1
    sidecar = tmp_path / 'a.tar.index.npz'
    assert sidecar.exists() and not list(cache.glob('*/index.npz'))
    write_tar(path, range(6, 0, -1))  # of the same size
    os.utime(path, ns=(1, 1))
    assert load() == [(i, i % 5) for i in range(6, 0, -1)] and len(scans) == 2
    assert load(image='png') and len(scans) == 3  # made for other members
    good = sidecar.read_bytes()
    last = good.rindex(b'PK\1\2')  # entry of an array: a version and an encryption that are none
    other = (good[: last + k] + b'\x81' + good[last + k + 1 :] for k in (6, 8))
    for bad in (good[:-30], b'', b'x' * 999, *other):
        sidecar.write_bytes(bad)
        assert load(image='png') and len(scans) == 4
        scans.pop()
    with np.load(sidecar) as file:
        arrays = dict(file)
    np.savez(sidecar, **{**arrays, 'key_sizes': arrays['key_sizes'] + 1})
    with pytest.raises(UserError, match='the index of .*a.tar is inconsistent; remove it'):
        load(image='png')
    for key, value in (('offsets', -512), ('sizes', 2**40)):
        np.savez(sidecar, **{**arrays, key: arrays[key] * 0 + value})
        assert load(image='png') and len(scans) == 4
        scans.pop()
    with sidecar.open('wb') as file:  # which takes memory
        np.savez_compressed(file, **arrays, more=np.zeros(2**24, np.int64))
    assert load(image='png') and len(scans) == 4
    sidecar.unlink()
    sidecar.mkdir()  # so that no file can be put there
    assert load() and len(scans) == 5 and list(cache.glob('*/index.npz'))
    assert load() and len(scans) == 5


def test_splits_are_folders_or_parts_of_names(tmp_path):
    write_tar(tmp_path / 'a' / 'train' / '0.tar', range(10))
    write_tar(tmp_path / 'a' / 'val' / '0.tar', range(2))
    (tmp_path / 'a' / 'classes.txt').write_text('ant\nbee\ncat\ndog\neel\n')
    write_tar(tmp_path / 'b' / 'set-train-00.tar', range(5))
    write_tar(tmp_path / 'b' / 'set-train-01.tar', range(5, 10))
    write_tar(tmp_path / 'b' / 'set-val-00.tar', range(2))
    for name, classes in (('a', 'ant bee cat dog eel'), ('b', '0 1 2 3 4')):
        load = lambda split: sources.load(name=f'{tmp_path}/{name}', split=split)  # noqa: B023, E731
        assert len(load('train')) == 10 and contents(load('val')) == [(0, 0), (1, 1)]
        assert load('train').classes == load('val').classes == tuple(classes.split())
        low, high = load('train[:33%]'), load('train[33%:]')
        assert contents(low) + contents(high) == contents(load('train')) and len(low) == 3
        assert high.name(0) == load('train').name(3)
        with pytest.raises(UserError, match="has no split 'test'; it has train, val"):
            load('test')
        with pytest.raises(IndexError):
            low.records[3]
    (tmp_path / 'a' / 'classes.txt').rename(tmp_path / 'a' / 'classes.json')
    with pytest.raises(UserError, match='a/classes.json is not a list of class names'):
        sources.load(name=f'{tmp_path}/a')
    write_tar(tmp_path / 'b' / 'more.tar', range(5))
    with pytest.raises(UserError, match='b/more.tar names no split'):
        sources.load(name=f'{tmp_path}/b')


def test_a_label_that_is_no_class_is_named_by_shard_and_key(tmp_path):
    write_tar(tmp_path / 'a.tar', range(9))
    (tmp_path / 'classes.txt').write_text('ant\nbee\ncat\ndog\n')
    source = sources.load(name=f'{tmp_path}/a.tar')
    with pytest.raises(UserError, match=r'a.tar\[4\] \(0004\).* out of range'):
        list(feeds.examples(source, view='resize', image_size=8, batch_size=4))


def test_a_huge_label_makes_no_list_of_names(tmp_path):
    (tmp_path / 'a.tar').write_bytes(tar_of([*pair(0), *pair(1, label=2**30)]))
    with pytest.raises(UserError, match='has a label 1073741824, and no list of class names'):
        sources.load(name=f'{tmp_path}/a.tar')


def test_images_beside_the_tars_they_came_in_are_a_folder_of_images(tmp_path):
    for name in ('ant', 'bee'):
        (tmp_path / name).mkdir()
        (tmp_path / name / '0.png').write_bytes(png(3))
        write_tar(tmp_path / f'{name}.tar', range(2))
    assert sources.load(name=str(tmp_path)).classes == ('ant', 'bee')


@pytest.mark.parametrize('name, words', [
    ('{tmp}/x-*.tar', 'no file matches .*x-'),
    ('{tmp}/x-{{0..99999999}}.tar', 'does not count up to 1,000,000 files'),
    ('{tmp}/x-{{3..1}}.tar', 'does not count'),
    ('{tmp}/{{0..9999}}{{0..9999}}.tar', 'more than 1,000,000 files'),
    ('{tmp}/x-{{0..1}}.zip', 'files are .zip, not one of .tar, .parquet'),
    ('{tmp}/x-{{0..1}}.tar', 'cannot read .*x-0.tar: No such file'),
    ('{tmp}/x.parquet', 'cannot read .*x.parquet: No such file'),
    ('{tmp}', 'has 0 class folders; .* or else manifest.json, .*tar or .*parquet'),
    ('memory://nothing', 'memory://nothing has no manifest.json, and no'),
    ('memory://nothing/x-{{0..1}}.tar', 'cannot read memory://nothing/x-0.tar: no such file'),
    ('nothing', "no data set 'nothing' is prepared.* tar or parquet files is given by"),
    ('runs/nothing', "no data set 'runs/nothing' is prepared.* is given by its path"),
    ('jft_like:10', "'jft_like:10' is not of the form jft_like:EXAMPLESxCLASSES"),
    ('jft_like:10x99999', r'classes of jft_like:10x99999 is 99999, not int in \[2, 31680\]'),
])  # fmt: skip
def test_what_is_no_data_set_is_told_in_one_line(tmp_path, name, words):
    with pytest.raises(UserError, match=words) as e:
        sources.load(name=name.format(tmp=tmp_path))
    assert '\n' not in str(e.value)


def write_records(folder, count=12):
    """A prepared folder of two shards, as bytes by name."""
    shards = []
    for k in range(2):
        numbers = range(k * count // 2, (k + 1) * count // 2)
        name = records.shard_name('train', k, 2)
        folder.mkdir(exist_ok=True)
        encoded = [example.encode(png(i), [i % 5], f'n{i}') for i in numbers]
        n, size, digest = records.write_shard(folder / name, encoded)
        shards.append({'file': name, 'examples': n, 'bytes': size, 'sha256': digest})
    manifest = {'format': records.FORMAT, 'version': records.VERSION, 'max_labels': 1,
                'classes': list('abcde'), 'splits': {'train': shards}}  # fmt: skip
    (folder / records.MANIFEST).write_text(json.dumps(manifest))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_prepared_records_are_found_by_their_manifest(tmp_path):
    write_records(tmp_path / 'r')
    source = sources.load(name=f'{tmp_path}/r')
    assert contents(source) == [(i, i % 5) for i in range(12)] and source.classes == tuple('abcde')
    parts = [sources.load(name=f'{tmp_path}/r', split=s) for s in ('train[:40%]', 'train[40%:]')]
    assert contents(parts[0]) + contents(parts[1]) == contents(source) and len(parts[0]) == 5
    assert parts[1].name(0) == source.name(5)
    with pytest.raises(UserError, match="has no split 'val'; it has train"):
        sources.load(name=f'{tmp_path}/r', split='val')
    (tmp_path / 'r' / records.MANIFEST).rename(tmp_path / 'r' / records.JOURNAL)
    with pytest.raises(UserError, match='not finished'):
        sources.load(name=f'{tmp_path}/r')


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves files from memory, in parts where it is asked for them and `server.parts` is set."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        body = self.server.files.get(self.path)
        if body is None:
            return self.send_error(404)
        wanted = re.fullmatch(r'bytes=(\d+)-(\d+)', self.headers.get('Range', ''))
        part = body
        if wanted and self.server.parts:
            part = body[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206 if part is not body else 200)
        self.send_header('Content-Length', str(len(part)))
        self.send_header('ETag', hashlib.sha256(body).hexdigest())
        self.end_headers()
        if self.command == 'GET':
            self.server.sent[self.path] += len(part)
            with contextlib.suppress(ConnectionError):
                self.wfile.write(part)


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.files, server.parts, server.sent = {}, True, collections.Counter()
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def put(where, files, server):
    """Files at an address of memory or of the server; gives the address."""
    if where == 'memory':
        for name, data in files.items():
            fsspec.filesystem('memory').pipe_file(f'/set/{name}', data)
        return 'memory://set'
    server.files.update({f'/set/{name}': data for name, data in files.items()})
    return f'http://127.0.0.1:{server.server_port}/set'


@pytest.mark.parametrize('where', ['memory', 'http'])
def test_tars_at_an_address(where, server, monkeypatch):
    scans = counted(monkeypatch, tars, 'scan')
    files = {f'x-{k}.tar': tar_of([m for i in range(5 * k, 5 * k + 5) for m in pair(i)])
             for k in range(2)}  # fmt: skip
    address = put(where, {**files, 'classes.txt': b'a\nb\nc\nd\ne\n'}, server)
    names = ['x-{0..1}.tar'] + ['x-*.tar', ''] * (where == 'memory')  # the server has no listing
    for name in names:
        source = sources.load(name=f'{address}/{name}'.rstrip('/'))
        assert contents(source) == [(i, i % 5) for i in range(10)]
        assert source.classes == tuple('abcde')
        assert source.name(6) == f'{address}/x-1.tar[1] (0006)'
    assert len(scans) == 2
    again = pickle.loads(pickle.dumps(source))
    server.sent.clear()
    data = again.records[7]['image']
    assert shown(data) == 7 and sum(server.sent.values()) in (0, len(data))  # its range alone
    changed = tar_of([m for i in range(5) for m in pair(i + 20)])
    put(where, {'x-1.tar': changed}, server)
    assert contents(sources.load(name=f'{address}/x-{{0..1}}.tar'))[5:] == [
        (i, i % 5) for i in range(20, 25)
    ]
    assert len(scans) == 3


def test_a_server_without_parts_of_files_is_refused(server):
    server.parts = False
    address = put('http', {'x.tar': tar_of([m for i in range(5) for m in pair(i)])}, server)
    with pytest.raises(UserError):
        sources.load(name=f'{address}/x.tar').records[3]


@pytest.mark.parametrize('where', ['memory', 'http'])
def test_records_at_an_address(where, server, tmp_path):
    address = put(where, write_records(tmp_path / 'r'), server)
    source = sources.load(name=address, split='train[50%:]')
    assert contents(source) == [(i, i % 5) for i in range(6, 12)]
    assert address in source.name(0)


def features(names=('ant', 'bee', 'cat', 'dog', 'eel')):
    """What Hugging Face's library writes into the schema."""
    label = {'names': list(names), '_type': 'ClassLabel'}
    info = {'info': {'features': {'image': {'_type': 'Image'}, 'label': label}}}
    return {b'huggingface': json.dumps(info).encode()}


def table(numbers, labels=None, metadata=None, struct=True):
    values = [png(i) for i in numbers]
    if struct:
        kind = pa.struct({'bytes': pa.binary(), 'path': pa.string()})
        values = pa.array([{'bytes': v, 'path': 'x.png'} for v in values], kind)
    labels = [i % 5 for i in numbers] if labels is None else labels
    found = pa.table({'id': list(numbers), 'image': values, 'label': labels})
    return found.replace_schema_metadata(metadata)


def write_parquet(path, numbers, *args, group=4, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(numbers, *args, **options), path, row_group_size=group)


def test_parquet_files_as_hugging_face_names_them(tmp_path):
    data = tmp_path / 'data'
    write_parquet(data / 'train-00000-of-00002.parquet', range(10), metadata=features())
    write_parquet(data / 'train-00001-of-00002.parquet', range(10, 13), metadata=features())
    write_parquet(data / 'validation-00000-of-00001.parquet', range(2), metadata=features())
    for name in (tmp_path, data):
        source = sources.load(name=str(name))
        assert contents(source) == [(i, i % 5) for i in range(13)]
        assert source.classes == ('ant', 'bee', 'cat', 'dog', 'eel')
        assert source.name(11) == f'{data}/train-00001-of-00002.parquet[1]'
        validation = sources.load(name=str(name), split='validation')
        assert contents(validation) == [(0, 0), (1, 1)]
    assert len(sources.load(name=f'{data}/train-*.parquet', split='train[:50%]')) == 6
    again = pickle.loads(pickle.dumps(source))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        order = np.random.default_rng(0).permutation(np.arange(13).repeat(8))
        found = list(pool.map(lambda i: shown(again.records[i]['image']), order))
    assert found == order.tolist()
    (data / 'train-00001-of-00002.parquet').unlink()
    with pytest.raises(UserError, match='of 2 shards there are 1, as .*train-00000-of-00002'):
        sources.load(name=str(tmp_path))


@pytest.mark.parametrize('kind', ['none', 'dataset_info', 'readme', 'readme list'])
def test_class_names_of_parquet_files(tmp_path, kind):
    write_parquet(tmp_path / 'data' / 'train.parquet', range(3), struct=False)
    wanted = ('ant', 'bee', 'cat') if kind != 'none' else ('0', '1', '2')
    names = "names:\n          '0': ant\n          '1': bee\n          '2': cat\n"
    if kind == 'dataset_info':
        info = {'features': {'label': {'names': wanted, '_type': 'ClassLabel'}}}
        (tmp_path / 'dataset_info.json').write_text(json.dumps(info))
    elif kind == 'readme':
        text = 'dataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n' \
               '    dtype:\n      class_label:\n        '  # fmt: skip
        (tmp_path / 'README.md').write_text(f'---\nlicense: mit\n{text}{names}---\n# A --- set')
    elif kind == 'readme list':
        text = 'dataset_info:\n- config_name: a\n  features:\n  - name: label\n    sequence:\n' \
               '      class_label:\n        '  # fmt: skip
        (tmp_path / 'README.md').write_text(f'---\n{text}{names}---\n')
    source = sources.load(name=str(tmp_path))
    assert source.classes == wanted and contents(source) == [(0, 0), (1, 1), (2, 2)]


def test_lists_of_labels_in_parquet(tmp_path):
    labels = pa.array([[4, 1], [], [0]] * 3, pa.list_(pa.int64()))
    write_parquet(tmp_path / 'a.parquet', range(9), labels)
    write_parquet(tmp_path / 'b.parquet', range(9, 12), labels[:3])
    source = sources.load(name=str(tmp_path))
    found = [label for _, label in contents(source)]
    assert found == [[4, 1], [-1, -1], [0, -1]] * 4 and len(source.classes) == 5
    assert source.records[0]['label'].dtype == np.int32


def test_row_groups_are_decoded_once_and_few_are_kept(tmp_path, monkeypatch):
    write_parquet(tmp_path / 'a.parquet', range(40), group=5)
    source = sources.load(name=str(tmp_path))
    decoded = counted(monkeypatch, columnar.Parquet, 'column')
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda i: shown(source.records[i]['image']), range(40))
        assert list(found) == list(range(40))
    assert sorted(group for _, group, _ in decoded) == list(range(8))
    path = source.records.path
    source.records.cached_bytes = 2 * source.records.column(0, 0, path).nbytes
    source.records.close()
    for i in range(0, 40, 5):
        source.records[i]
    assert 1 <= len(source.records.cache) <= 2 and source.records.cache_size() < 2 * 5 * 200


def test_arrow_files_of_save_to_disk(tmp_path):
    (tmp_path / 'train').mkdir()
    path = tmp_path / 'train' / 'data-00000-of-00001.arrow'
    whole = table(range(10), metadata=features())
    with pa.OSFile(str(path), 'wb') as out, pa.ipc.new_stream(out, whole.schema) as stream:
        stream.write_table(whole, max_chunksize=4)
    (tmp_path / 'dataset_dict.json').write_text('{"splits": ["train"]}')
    source = sources.load(name=str(tmp_path))
    assert contents(source) == [(i, i % 5) for i in range(10)] and source.classes[1] == 'bee'
    sound = path.read_bytes()  # what follows would end the process, as the file is mapped
    with path.open('r+b') as file:
        file.write(b'\x7f' * len(sound))
    with pytest.raises(UserError, match='not where they were: the file has changed'):
        source.records[9]
    batch = pa.ipc.open_stream(sound).read_next_batch()
    ends = batch.column('image').field('bytes').buffers()[1].to_pybytes()[4:16]
    assert ends in sound
    path.write_bytes(sound.replace(ends, b'\x7f' * len(ends)))
    with pytest.raises(UserError, match='cannot read .*data-00000-of-00001.arrow'):
        sources.load(name=str(tmp_path))
    path.write_bytes(sound[:-700])
    with pytest.raises(UserError, match='data-00000-of-00001.arrow .* is shorter'):
        source.records[9]
    with pytest.raises(UserError, match='cannot read .*data-00000-of-00001.arrow'):
        contents(sources.load(name=str(tmp_path)))


def test_parquet_at_an_address(tmp_path, server):
    write_parquet(tmp_path / 'a.parquet', range(10), metadata=features())
    for where in ('memory', 'http'):
        address = put(where, {'a.parquet': (tmp_path / 'a.parquet').read_bytes()}, server)
        source = sources.load(name=f'{address}/a.parquet')
        assert contents(source) == [(i, i % 5) for i in range(10)] and source.classes[1] == 'bee'


def test_what_is_wrong_in_parquet_files_is_named(tmp_path, monkeypatch):
    path = tmp_path / 'a.parquet'
    load = lambda **options: sources.load(name=str(tmp_path), **options)  # noqa: E731
    write_parquet(path, range(8))
    with pytest.raises(UserError, match="a.parquet has no column 'img', but id, image, label"):
        load(image='img')
    with pytest.raises(UserError, match="column 'id' is int64, not the bytes of images"):
        load(image='id')
    with pytest.raises(UserError, match="column 'image' is struct.*, not numbers of classes"):
        load(label='image')
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match='cannot read .*a.parquet: '):
        load()
    pq.write_table(table(range(8)), path, row_group_size=4, compression='none',
                   use_dictionary=False)  # fmt: skip
    whole = path.read_bytes()
    at = whole.index(png(5)) - 100  # in the second group of rows, its header of a page
    path.write_bytes(whole[:at] + bytes(90) + whole[at + 90 :])
    source = load()
    assert shown(source.records[3]['image']) == 3
    with pytest.raises(UserError, match='row group 1 of .*a.parquet'):
        contents(source)
    write_parquet(path, range(8), [0, 1, 2, 3, 4, None, 1, 2])
    with pytest.raises(UserError, match='row group 1 of .*a.parquet has rows without a label'):
        load()
    write_parquet(path, range(8), [0, 1, 2, 3, 4, 2**40, 1, 2])
    with pytest.raises(UserError, match='row group 1 of .*a.parquet has labels that are not'):
        load()
    values = [{'bytes': png(0), 'path': 'a'}, {'bytes': None, 'path': 'b'}]
    pq.write_table(pa.table({'image': values, 'label': [0, 1]}), path)
    source = load()
    with pytest.raises(UserError, match=r"a.parquet\[1\] has no image: column 'image' holds no"):
        source.records[1]
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(UserError, match=re.escape('pip install "vit_jax[parquet]"')):
        load()


class Coins(tfds.core.GeneratorBasedBuilder):
    """A data set of TFDS in two shards, with a feature that is not asked for."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            'photo': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
            'kind': tfds.features.ClassLabel(names=list('abcde')),
            'size': np.int64,
        }))  # fmt: skip

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        for i in range(12):
            yield i, {'photo': io.BytesIO(png(i)), 'kind': i % 5, 'size': i}


def prepare_coins(folder, shards=2):
    """Coins as TFDS prepares it, its records then written as TFRecord; gives the shards' paths."""
    builder = Coins(data_dir=folder)
    config = tfds.download.DownloadConfig(num_shards=shards)
    builder.download_and_prepare(file_format='array_record', download_config=config)
    paths = sorted(pathlib.Path(builder.data_dir).glob('*array_record*'))
    assert len(paths) == shards
    made = []
    for path in paths:
        reader = ArrayRecordReader(str(path))
        made.append(path.with_name(path.name.replace('array_record', 'tfrecord')))
        made[-1].write_bytes(b''.join(map(kinds.tf_record, reader.read_all())))
        path.unlink()
    info = pathlib.Path(builder.data_dir) / 'dataset_info.json'
    info.write_text(info.read_text().replace('array_record', 'tfrecord'))
    return made


def test_tfds_prepared_as_tfrecord_is_read_without_tensorflow(tmp_path, monkeypatch, cache):
    paths = prepare_coins(tmp_path)
    scans = counted(monkeypatch, tfrecord, 'scan')
    where = dict(name='coins', data_dir=str(tmp_path), image='photo', label='kind')
    source = sources.load(**where)
    found = contents(source)
    assert sorted(found) == [(i, i % 5) for i in range(12)] and source.classes == tuple('abcde')
    assert source.name(7) == f'{paths[1]}[1]' and 'tensorflow' not in sys.modules
    parts = [sources.load(**where, split=s) for s in ('train[:75%]', 'train[75%:]')]
    assert contents(parts[0]) + contents(parts[1]) == found and len(parts[0]) == 9
    assert parts[1].name(0) == source.name(9)
    assert len(scans) == 2 and len(list(cache.glob('*/index.npz'))) == 2
    assert contents(pickle.loads(pickle.dumps(parts[1]))) == found[9:]
    with pytest.raises(UserError, match="has no split 'val'; it has train"):
        sources.load(**where, split='val')
    with pytest.raises(UserError, match="feature 'size' of data set coins is not a class label"):
        sources.load(**{**where, 'label': 'size'})
    with pytest.raises(UserError, match="feature 'kind' of .* only images of uint8"):
        sources.load(**{**where, 'image': 'kind'})


def test_tfrecord_files_that_are_cut_or_damaged_are_named(tmp_path):
    paths = prepare_coins(tmp_path, shards=1)
    whole = paths[0].read_bytes()
    where = dict(name='coins', data_dir=str(tmp_path), image='photo', label='kind')
    size = struct.unpack('<Q', whole[:8])[0] + 16  # of the first record
    for cut, record in ((5, 0), (size - 1, 0), (size + 7, 1), (size + 20, 1), (len(whole) - 1, 11)):
        paths[0].write_bytes(whole[:cut])
        with pytest.raises(UserError, match=f'ends at byte {cut:,}, within record {record}$'):
            sources.load(**where)
    for cut in (0, size):
        paths[0].write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r'has \d records, 12 by dataset_info.json'):
            sources.load(**where)
    for at in (0, 6, 9):  # in the length and its CRC
        bad = bytearray(whole)
        bad[size + at] ^= 1
        paths[0].write_bytes(bad)
        with pytest.raises(UserError, match=f'the length of record 1 at byte {size:,}'):
            sources.load(**where)
    bad = bytearray(whole)
    bad[size + 30] ^= 1
    paths[0].write_bytes(bad)
    source = sources.load(**where)
    shown(source.records[0]['image'])
    with pytest.raises(UserError, match=r'record .*\[1\] is damaged \(its CRC differs\)'):
        source.records[1]


def test_crcs_are_those_of_the_standard():
    """RFC 3720 appendix B.4, and the catalogue's check value."""
    rows = np.frombuffer(bytes(32) + b'\xff' * 32 + bytes(range(32)), np.uint8).reshape(3, 32)
    assert tfrecord.crc_of_rows(rows).tolist() == [0x8A9136AA, 0x62A8AB43, 0x46DD794E]
    check = np.frombuffer(b'123456789', np.uint8)[None]
    assert tfrecord.crc_of_rows(check).tolist() == [0xE3069283] == [kinds.crc32c(b'123456789')]
