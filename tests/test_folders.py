"""Folders of images as people have them: nested, linked, with other files, with odd names."""

import io
import json
import os
import re

import feeds
import fsspec
import kinds
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from vit_jax.data import reading, sources
from vit_jax.data.readers import facts, folders, formats, walk
from vit_jax.data.tasks import classify
from vit_jax.errors import UserError

ODD = (b'caf\xe9', b'\xff\xfe', b'new\nline', b'\x1b[31m', 'Öl'.encode(), b'a b', b'x' * 100)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'cache'))


def put(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(kinds.png(7) if data is None else data)


def test_images_in_sub_folders_and_of_every_suffix_are_there_and_the_rest_is_said(tmp_path, capsys):
    for k, suffix in enumerate((*formats.SUFFIXES, *(s.upper() for s in formats.SUFFIXES))):
        out = io.BytesIO()
        Image.fromarray(np.full((4, 4, 3), k, np.uint8)).save(out, formats.SUFFIXES[suffix.lower()])
        put(tmp_path / 'ant' / ('sub/deep' * (k % 2)) / f'{k}.{suffix}', out.getvalue())
        put(tmp_path / 'bee' / f'{k}.png')
    for name in ('ant/notes.txt', 'ant/sub/a.json', 'bee/b.json', 'bee/README', '.DS_Store'):
        put(tmp_path / name)
    put(tmp_path / 'stray.png')
    source = sources.load(name=str(tmp_path))
    assert len(source) == 4 * len(formats.SUFFIXES)
    assert all(b['mask'].all() for b in feeds.examples(
        source, view='resize', image_size=4, batch_size=len(source)))  # fmt: skip
    said = capsys.readouterr().err
    assert re.search(r'skipped 4 files without the suffix of an image, 2 \.json, ', said)
    assert f'1 images outside of class folders ({tmp_path}/stray.png)' in said
    assert len(said.splitlines()) == 1 and 'DS_Store' not in said


def below(folder, seen):
    """By os alone: the image files below a folder, each real folder once."""
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.isfile(path) and name.lower().endswith(walk.SUFFIXES):
            yield os.path.realpath(path)
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.isdir(path) and os.path.realpath(path) not in seen:
            seen.add(os.path.realpath(path))
            yield from below(path, seen)


def grow(root, rng):
    """A random tree in which much is not as it should be."""
    places = [root / name for name in ('ant', 'bee')]
    for place in places:
        put(place / 'a.png')
    for i in range(rng.integers(5, 40)):
        parent = places[rng.integers(len(places))]
        odd = os.fsdecode(ODD[rng.integers(len(ODD))])
        suffix = ('.png', '.JPG', '.txt', '', '.npy')[rng.integers(5)]
        path = parent / f'{odd}{i}{suffix}'
        what = rng.integers(8)
        if what < 3:
            put(path)
        elif what < 5:  # a folder, named as an image perhaps
            path.mkdir()
            places.append(path)
        elif what == 5:
            path.symlink_to(root / 'nowhere' / str(i))
        elif what == 6:
            path.symlink_to((root, *places)[rng.integers(len(places) + 1)])
        elif rng.random() < 0.5:
            os.mkfifo(path)
        else:
            path.symlink_to(path)
    (root / 'loop').symlink_to(('loop', 'nowhere')[rng.integers(2)])
    if rng.random() < 0.3:
        (root / os.fsdecode(ODD[rng.integers(len(ODD))])).mkdir()  # an empty class, perhaps


def test_any_tree_is_read_to_the_last_image_or_refused_in_words(tmp_path, capsys):
    read = 0
    for trial in range(60):
        root = tmp_path / str(trial)
        grow(root, np.random.default_rng(trial))
        for split in ('train', 'train[:50%]', 'val'):
            try:
                source = sources.load(name=str(root), split=split)
            except UserError as e:
                empty = any(path.is_dir() and not os.listdir(path) for path in root.iterdir())
                assert split == 'val' or empty, e
                continue
            json.dumps(facts.of(source))
            source.name(len(source) - 1)
            if split == 'train':
                read += 1
                top = sorted(name for name in os.listdir(root) if (root / name).is_dir())
                seen = {os.path.realpath(p) for p in (root, *root.parents)}
                seen |= {os.path.realpath(root / name) for name in top}
                wanted = {name: sorted(below(root / name, seen)) for name in top}
                found = {name: [] for name in source.classes}
                for path, label in zip(source.records.paths, source.records.labels, strict=True):
                    found[source.classes[label]].append(os.path.realpath(path))
                assert {k: sorted(v) for k, v in found.items()} == wanted
                for batch in feeds.examples(
                    source, view='resize', image_size=4, batch_size=16, tolerance=0.999
                ):
                    assert batch['mask'].sum() > 0
    assert read > 20
    assert 'Traceback' not in capsys.readouterr().err


def test_a_link_never_brings_the_images_of_another_class(tmp_path, capsys):
    for name in ('ant', 'bee'):
        put(tmp_path / name / f'{name}.png')
    (tmp_path / 'ant' / 'up').symlink_to(tmp_path)
    (tmp_path / 'ant' / 'side').symlink_to(tmp_path / 'bee')
    (tmp_path / 'bee' / 'self').symlink_to('.')
    (tmp_path / 'bee' / 'gone.png').symlink_to('nothing')
    source = sources.load(name=str(tmp_path))
    assert [os.path.basename(p) for p in source.records.paths] == ['ant.png', 'bee.png']
    said = capsys.readouterr().err
    assert f'3 links to folders that are read elsewhere ({tmp_path}/ant/side)' in said
    assert f'1 dangling links ({tmp_path}/bee/gone.png)' in said


def test_workdirs_in_the_data_folder_are_no_classes(tmp_path, capsys):
    for name in ('ant', 'bee'):
        put(tmp_path / name / '0.png')
    begun, ended = tmp_path / 'runs' / 'begun', tmp_path / 'bee' / 'run'
    for place in (begun, ended):
        put(place / 'summary.png')
        put(place / 'config.json')
        (place / 'checkpoints').mkdir()
    put(tmp_path / 'new' / '.lock')  # a run that has just begun
    source = sources.load(name=str(tmp_path))
    assert source.classes == ('ant', 'bee') and len(source) == 2
    assert f'3 workdirs of runs ({tmp_path}/new)' in capsys.readouterr().err


def test_empty_classes(tmp_path, capsys):
    for part in ('train', 'val'):
        for name in ('ant', 'bee', 'cat'):
            put(tmp_path / part / name / '0.png')
    os.unlink(tmp_path / 'val' / 'bee' / '0.png')
    source = sources.load(name=str(tmp_path), split='val')
    assert len(source) == 2 and source.classes == ('ant', 'bee', 'cat')
    assert 'split val has no images of bee' in capsys.readouterr().err
    os.unlink(tmp_path / 'train' / 'bee' / '0.png')
    with pytest.raises(UserError, match='no images in .*train/bee .*remove the folder'):
        sources.load(name=str(tmp_path))


def test_arrow_files_of_a_cache_are_no_part_of_a_data_set(tmp_path, capsys):
    rows = [(kinds.png(i), i % 2) for i in range(6)]
    path = kinds.write('arrow', tmp_path / 'x', rows, ('ant', 'bee'))
    more = kinds.table(rows * 2, ('ant', 'bee'))
    for name in ('cache-0123456789abcdef.arrow', 'tmpabc.arrow'):
        with pa.OSFile(str(path / 'train' / name), 'wb') as out:
            with pa.ipc.new_stream(out, more.schema) as stream:
                stream.write_table(more)
    assert len(sources.load(name=str(path))) == len(sources.load(name=str(path / 'train'))) == 6
    assert 'skipped 2 arrow files of a cache (cache-0' in capsys.readouterr().err
    (path / 'train' / 'tmpabc.arrow').unlink()
    (path / 'train' / 'state.json').unlink()
    assert len(sources.load(name=str(path))) == 6
    (path / 'train' / 'state.json').write_text('{"_data_files": [{"filename": "gone.arrow"}]}')
    with pytest.raises(UserError, match='state.json names gone.arrow, which does not exist'):
        sources.load(name=str(path))


def test_what_is_no_folder_of_classes_is_said(tmp_path):
    put(tmp_path / 'file')
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'loop').symlink_to('loop')
    for name in ('file', 'pipe', 'loop', 'nothing'):
        with pytest.raises(UserError, match=f'no folder .*{name}'):
            sources.load(name=str(tmp_path / name))


def test_a_file_that_becomes_none_in_mid_run_is_an_unreadable_example(tmp_path):
    for i, name in enumerate(('a/0.png', 'a/1.png', 'b/2.png', 'b/3.png')):
        put(tmp_path / 'train' / name, kinds.png(i))
    source = sources.load(name=str(tmp_path), split='train')
    wrong = {0: os.mkfifo, 1: os.mkdir, 2: lambda p: p.symlink_to('/dev/zero'),
             3: lambda p: (p.touch(), os.truncate(p, 2**33))}  # fmt: skip
    for i, make in wrong.items():
        path = tmp_path / 'train' / source.name(i).removeprefix(f'{tmp_path}/train/')
        path.unlink()
        make(path)  # reading it would not end, but for the folder
        task = classify.classify(source, view='resize', image_size=8)
        found = reading.example(i, None, source=source, task=task)
        assert found['mask'] == 0 and found['error'], i


def test_a_folder_at_an_address_is_listed_by_one_request_a_folder(monkeypatch):
    fs = fsspec.filesystem('memory')
    for name in ('train/ant/0.png', 'train/ant/sub/1.JPG', 'train/bee/2.png', 'train/bee/x.txt',
                 'val/ant/3.png'):  # fmt: skip
        fs.pipe_file(f'/set/{name}', kinds.png(1))
    try:
        assert folders.split_folders('memory://set') == ['train', 'val']
        listings = []
        before = type(fs).ls
        monkeypatch.setattr(type(fs), 'ls', lambda *a, **k: listings.append(a) or before(*a, **k))
        skipped = walk.Skipped()
        assert folders.images_of('memory://set/train', skipped) == {
            'ant': ['ant/0.png', 'ant/sub/1.JPG'], 'bee': ['bee/2.png']
        }  # fmt: skip
        assert len(listings) == 4 and dict(skipped.counts) == {'..txt': 1}
    finally:
        fs.store.clear()
