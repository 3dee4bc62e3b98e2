"""What tells data sets apart: a copy has the same facts, a change other ones; and a resume."""

import io
import json
import pickle
import shutil
import types
from typing import NamedTuple

import fsspec
import jax
import kinds
import launched
import numpy as np
import pytest
from etils import epath
from PIL import Image

from vit_jax import config, train
from vit_jax.data import mixture, sources
from vit_jax.data.readers import facts
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.run import machine, origin, workdir

NAMES = ('ant', 'bee', 'cat')


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'cache'))


def rows():
    return [(kinds.png(10 * i, 4 + i), i % 3) for i in range(9)]


def of(path, split='train'):
    return facts.of(sources.load(name=str(path), split=split))


def changed(a, b):
    return {key for key in a if a[key] != b[key]}


@pytest.mark.parametrize('kind', kinds.KINDS)
def test_a_copy_has_the_same_facts_and_each_change_is_one_of_them(kind, tmp_path):
    def write(name, some, names=NAMES):
        return kinds.write(kind, tmp_path / name, some, names)

    first = of(write('a', rows()))
    assert first['classes'] == 3 and first['examples'] == 9 and 'ant, bee, cat' in str(first)
    shutil.copytree(tmp_path / 'a', tmp_path / 'elsewhere' / 'b')
    shutil.rmtree(tmp_path / 'a')
    assert of(tmp_path / 'elsewhere' / 'b') == first
    renamed = of(write('renamed', rows(), ('ant', 'bee', 'dog')))
    assert 'class_names' in changed(first, renamed)
    assert {'examples', 'order'} <= changed(first, of(write('grown', [*rows(), rows()[0]])))
    labels = of(write('labels', [(d, 2 - k) for d, k in rows()]))
    assert {'order', 'contents'} & changed(first, labels)  # records keep them within shards
    other = [(kinds.png(255, 60) if i == 4 else d, k) for i, (d, k) in enumerate(rows())]
    assert changed(first, of(write('other', other))) == {'contents', 'sample'}
    share = of(tmp_path / 'other', 'train[:50%]')
    assert {'examples', 'order'} <= changed(of(tmp_path / 'other'), share)
    json.dumps(first)


def bmp(value, size=4):
    """An image of one grey level, of as many bytes for every level."""
    out = io.BytesIO()
    Image.new('RGB', (size, size), (value,) * 3).save(out, 'BMP')
    return out.getvalue()


@pytest.mark.parametrize('kind', kinds.KINDS)
def test_images_of_equal_size_that_change_places_or_bytes_are_a_change(kind, tmp_path):
    before = [(bmp(i), i % 3) for i in range(9)]
    kinds.write(kind, tmp_path / 'a', before, NAMES)
    first = of(tmp_path / 'a')
    swapped = [before[3], *before[1:3], before[0], *before[4:]]  # of one class
    replaced = [(bmp(77), k) if i == 4 else (d, k) for i, (d, k) in enumerate(before)]
    for name, some in (('swapped', swapped), ('replaced', replaced)):
        path = kinds.write(kind, tmp_path / name, some, NAMES)
        if kind == 'records':  # a shard of the same size in place of that which the manifest names
            shutil.copy(tmp_path / 'a' / 'manifest.json', path)
        found = changed(first, of(path))
        assert 'sample' in found and found <= {'sample', 'contents'}
        assert found == {'sample'} or kind == 'parquet'  # which is compressed
    kinds.write(kind, tmp_path / 'copy', before, NAMES)
    assert of(tmp_path / 'copy') == first


def test_a_sample_is_spread_evenly_and_all_of_a_small_set():
    asked = []

    def digest(length, size, other=None):
        asked.clear()

        def read(i):
            asked.append(i)
            return bytes([i == other]) * size

        return facts.sample_digest(read, length)

    digest(10**6, 10)
    assert len(asked) == facts.SAMPLE and {0, 10**6 - 1} <= set(asked)
    assert max(np.diff(sorted(asked))) < 2 * 10**6 / facts.SAMPLE
    chosen = sorted(asked)
    assert digest(10**6, 10) == digest(10**6, 10, other=chosen[5] + 1)
    assert digest(10**6, 10) != digest(10**6, 10, other=chosen[5])
    first = digest(4000, 1000)
    assert sorted(asked) == list(range(4000)) and first != digest(4000, 1000, other=2345)
    digest(4000, 2**18)  # a gigabyte
    assert len(asked) == facts.SAMPLE
    assert digest(3, 1) != digest(3, 2) and digest(0, 1) == digest(0, 2)

    def fails(i):
        if i == 1:
            raise OSError('gone')
        return b'x'

    assert facts.sample_digest(fails, 3) != facts.sample_digest(lambda i: b'x', 3)


@pytest.mark.parametrize('kind', ['tar', 'records', 'parquet'])
def test_facts_read_no_example_at_an_address(kind, tmp_path, monkeypatch):
    kinds.write(kind, tmp_path / 'a', rows(), NAMES)
    fs = fsspec.filesystem('memory')
    try:
        for file in (tmp_path / 'a').rglob('*.*'):
            fs.pipe_file(f'/facts/{file.relative_to(tmp_path / "a")}', file.read_bytes())
        source = sources.load(name='memory://facts')
        monkeypatch.setattr(type(source.records), '__getitem__', lambda *args: pytest.fail('read'))
        monkeypatch.setattr(facts, 'sample_digest', lambda *args: pytest.fail('a sample'))
        assert facts.of(source)['examples'] == 9
    finally:
        fs.store.clear()


def test_facts_of_mixtures_and_drawn_sets_are_those_of_their_parts(tmp_path):
    kinds.write('folder', tmp_path / 'a', rows(), NAMES)
    kinds.write('records', tmp_path / 'b', rows(), NAMES[::-1])

    def mixed(**weights):
        parts = {k: dict(name=str(tmp_path / k), weight=w) for k, w in weights.items()}
        return mixture.load(mixture=parts)

    first = facts.of(mixed(a=1.0, b=2.0))
    assert facts.of(pickle.loads(pickle.dumps(mixed(a=1.0, b=2.0)))) == first
    assert 'order' in changed(first, facts.of(mixed(a=1.0, b=1.0)))
    assert 'order' in changed(first, facts.of(mixed(b=2.0, a=1.0)))
    drawn = [of(name) for name in ('jft_like:50x10@16', 'jft_like:50x10@32')]
    assert changed(*drawn) == {'order'}


def test_a_resume_compares_samples_where_both_have_one(tmp_path):
    parts = types.SimpleNamespace(task=types.SimpleNamespace(names={}, tokenizer=None))

    def settle(begun=True, **found):
        now = {'data.order': 'a', **{f'data.{key}': value for key, value in found.items()}}
        return origin.record_facts(epath.Path(tmp_path), parts, now, begun, allow_change=False)

    settle(begun=False, sample='x')
    assert settle(sample='x') == []
    with pytest.raises(UserError, match='data.sample'):
        settle(sample='y')
    assert settle() == settle(sample='x') == []  # a copy at an address, and back
    with pytest.raises(UserError, match='data.contents'):
        settle(sample='x', contents='z')


class Soon(Stop):
    """True once the run has written its first line."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def __bool__(self):
        return launched.last_step(self.path) >= 1


def run(folder, path, stop=None, steps=60, **options):
    pairs = [('steps', str(steps)), ('evals.val.batch_size', '8')]
    with workdir.lock_workdir(str(path)) as path:
        settings = config.load(f'{launched.TINY}:{folder}', pairs)
        return train.train(settings, path, Stop() if stop is None else stop, **options)


@pytest.mark.slow
def test_a_run_goes_on_with_the_data_it_was_begun_with_or_says_what_differs(tmp_path, capsys):
    data, path = tmp_path / 'data', tmp_path / 'run'
    launched.write_images(data, {'train': 4, 'val': 3})
    run(data, path, Soon(path), steps=60)
    saved = launched.checkpoints(path)
    kept = {name: (path / name).read_bytes() for name in ('classes.json', 'facts.json')}

    def refused(words, undo, **options):
        with pytest.raises(UserError, match=words) as e:
            run(data, path, **options)
        undo()
        assert launched.checkpoints(path) == saved
        assert {name: (path / name).read_bytes() for name in kept} == kept
        return str(e.value)

    train_, val = data / 'train', data / 'val'
    for folder in (train_, val):
        (folder / 'ant').rename(folder / 'zebra')
    said = refused('added zebra; gone ant.*\n.*--allow_config_change',
                   lambda: [(f / 'zebra').rename(f / 'ant') for f in (train_, val)])
    assert 'data.class_names' in said and 'data.order' in said
    shutil.copy(train_ / 'bee' / '0.png', train_ / 'bee' / '9.png')
    assert 'data.examples' in refused('data.order', (train_ / 'bee' / '9.png').unlink)
    before = (train_ / 'cat' / '1.png').read_bytes()
    (train_ / 'cat' / '1.png').write_bytes(kinds.png(3, 64))
    refused('data.contents', lambda: (train_ / 'cat' / '1.png').write_bytes(before))
    (train_ / 'cat' / '1.png').write_bytes(before[:-20] + bytes(20))  # of the same size
    refused('data.sample', lambda: (train_ / 'cat' / '1.png').write_bytes(before))
    for folder in (train_, val):
        shutil.copytree(folder / 'bee', folder / 'yak')
    for options in ({}, dict(allow_change=True)):
        said = refused('added yak. Its head has 3 outputs', lambda: None, **options)
        assert 'opt_state' not in said
    for folder in (train_, val):
        shutil.rmtree(folder / 'yak')
    with jax.default_prng_impl('rbg'):
        refused('jax.default_prng_impl  "threefry2x32"  "rbg"', lambda: None)
    with jax.threefry_partitionable(False):
        refused('jax.threefry_partitionable', lambda: None)
    # What evaluations see and how a number is rounded leaves it the same run, and is said.
    (val / 'ant' / '0.png').unlink()
    with jax.default_matmul_precision('highest'):
        capsys.readouterr()
        run(data, path, Soon(path), steps=60)
    said = capsys.readouterr().out
    assert 'evals.val.examples' in said
    line = 'from here on the last bits may be others: jax.default_matmul_precision changed'
    assert f'\n{line}\n' in said
    (train_ / 'bee' / '0.png').unlink()
    assert run(data, path, steps=20, allow_change=True)['steps'] == 20
    assert json.loads((path / 'facts.json').read_text())['data.examples'] == 11


def test_libraries_on_which_bits_depend(monkeypatch):
    class Installed(NamedTuple):
        name: str
        version: str = '1'

    names = [
        'jax-cuda13-plugin', 'nvidia-cublas', 'nvidia-cudnn-cu13', 'nvidia-nccl-cu13',
        'nvidia-cuda-runtime-cu12', 'nvidia-cuda-nvcc', 'libtpu', 'JAX-ROCM7-PJRT',
    ]  # fmt: skip
    others = ['jax', 'nvidia-cuda-cupti', 'nvidia-cuda-runtimes', 'libtpu-nightly', None]
    monkeypatch.setattr(
        machine.importlib.metadata, 'distributions', lambda: map(Installed, names + others)
    )
    assert list(machine.libraries()) == sorted(name.lower() for name in names)
