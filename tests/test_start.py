"""What a start costs and shows: compiled programs are kept, and steps are traced on request."""

import contextlib
import gzip
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import launched
import numpy as np
import pytest
from jax._src.lru_cache import LRUCache

import vit_jax
from vit_jax.errors import UserError
from vit_jax.run import compilation, machine, profiling, report, results
from vit_jax.run.profiling import parse

LONGER = ('--config.steps=8', '--allow_config_change')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return launched.write_images(tmp_path_factory.mktemp('images'), {'train': 8, 'val': 5})


def finish(folder, workdir, *flags, **environment):
    """Exit status and output of a run of 6 steps without a compilation cache from outside."""
    env = launched.ENVIRONMENT | environment
    env.pop('JAX_COMPILATION_CACHE_DIR')
    done = subprocess.run(
        launched.command(folder, workdir, '--config.steps=6', *flags), env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout


def files(folder):
    return sorted(p.name for p in pathlib.Path(folder).rglob('*-cache'))


@pytest.mark.slow
def test_what_one_run_compiled_the_next_one_takes(folder, tmp_path):
    ends = []
    for name in 'ab':
        status, said = finish(
            folder, tmp_path / name, VIT_JAX_CACHE=str(tmp_path / 'home'),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
        )  # fmt: skip
        assert status == 0, said
        ends.append(files(tmp_path / 'home' / 'compiled'))
    assert ends[0] and ends[0] == ends[1]  # nothing was compiled again
    states = [launched.state(tmp_path / name, 6) for name in 'ab']
    launched.assert_same_bits(*states)


def test_where_compiled_programs_are_kept(tmp_path, monkeypatch):
    settings, asked = {}, []
    monkeypatch.setattr(compilation.jax.config, 'update', settings.__setitem__)
    monkeypatch.setattr(
        compilation, 'mirrored', lambda address: contextlib.nullcontext(asked.append(address))
    )
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'home'))
    key = 'jax_compilation_cache_dir'

    def kept(wish, workdir='runs/a'):
        settings.clear()
        with compilation.cache(wish, workdir):
            return settings

    assert kept(None) == {}  # of this test's own environment
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
    assert kept('off') == {'jax_enable_compilation_cache': False}
    assert kept(None)[key] == str(tmp_path / 'home/compiled' / machine.cpu_id())
    assert kept(None)['jax_compilation_cache_max_size'] == compilation.LIMIT
    assert kept(str(tmp_path / 'b'))[key] == str(tmp_path / 'b' / machine.cpu_id())
    assert kept(None, 'gs://bucket/run') == {key: None} and asked == ['gs://bucket/run/compiled']
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'gs://bucket/all')
    assert kept(None) == {key: None} and asked[1:] == ['gs://bucket/all']
    assert kept(str(tmp_path / 'c'))[key] == str(tmp_path / 'c' / machine.cpu_id())
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'--compilation_cache=.*file/x cannot be used: .*or off'):
        kept(str(tmp_path / 'file' / 'x'))
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'file'))
    assert kept(None) == {}  # nobody asked for it: the run goes on without


def test_a_program_that_a_kill_left_half_written_is_compiled_and_kept_again(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation.jax.config, 'update', lambda *args: None)
    folder = tmp_path / machine.cpu_id()
    written = LRUCache(str(folder), max_size=1000)
    for key in 'ab':
        written.put(key, b'whole')
    (folder / f'b{compilation.READ}').unlink()
    (folder / f'b{compilation.SUFFIX}').write_bytes(b'who')
    with compilation.cache(str(tmp_path), 'runs/a'):
        assert files(folder) == ['a-cache']
    for key in 'bc':
        written.put(key, b'whole')
    assert [written.get(key) for key in 'abc'] == [b'whole'] * 3


@pytest.mark.slow
def test_a_trace_has_the_steps_that_were_asked_for(folder, tmp_path):
    status, said = finish(folder, tmp_path / 'run', '--profile=3:2', '--compilation_cache=off')
    assert status == 0 and f'steps 3 to 4 are traced in {tmp_path}/run/profile' in said
    (trace,) = (tmp_path / 'run/profile').rglob('perfetto_trace.json.gz')
    events = json.loads(gzip.decompress(trace.read_bytes()))['traceEvents']
    steps = [e['args']['step_num'] for e in events if e.get('name') == 'train']
    assert sorted(map(int, steps)) == [3, 4]
    assert any('on_mesh' in e.get('name', '') for e in events)  # the step itself is in it
    assert list((tmp_path / 'run/profile').rglob('*.xplane.pb'))
    status, said = finish(folder, tmp_path / 'run', '--profile=3:2', *LONGER)
    assert 'the run goes on after step 6; nothing is traced' in said


@pytest.mark.parametrize('wish', ['3', '0:1', '2:0', 'a:b', '2:-1'])
def test_a_profile_that_says_nothing_is_refused(wish):
    with pytest.raises(UserError, match=f"--profile is '{wish}', not STEP:COUNT"):
        parse(wish, 10)


@pytest.mark.parametrize(
    'platforms, installed, refused',
    [(None, '0.0.52', True), ('tpu,cpu', '0.0.4', True), (None, '0.0.42', False),
     (None, '0.0.42.1', False), ('cuda,cpu', '0.0.52', False), (None, None, False)],
)  # fmt: skip
def test_a_libtpu_whose_profiler_would_crash_is_told(monkeypatch, platforms, installed, refused):
    def version(name):
        if not installed:
            raise importlib.metadata.PackageNotFoundError
        return installed

    monkeypatch.setattr(importlib.metadata, 'version', version)
    monkeypatch.setattr(importlib.metadata, 'requires', lambda name: ['libtpu==0.0.42.*; extra'])
    strange = profiling.unsupported_libtpu(platforms)
    assert bool(strange) == refused
    assert not refused or f'libtpu is {installed}, and jax ' in strange and '0.0.42;' in strange


def test_a_profile_beyond_the_end_is_refused(folder, tmp_path):
    assert parse('9:2', 10) == (9, 10)
    status, said = finish(folder, tmp_path / 'run', '--profile=5:3')
    assert status == 2 and said == (
        'error: --profile=5:3 asks for step 7, and the run ends at step 6\n'
    )


def test_metrics_are_read_when_the_next_step_is_on_its_way(tmp_path):
    read = []

    class OnDevice:
        def __init__(self, step):
            self.step = step

        def __array__(self, dtype=None, copy=None):
            read.append(self.step)
            return np.float32(1)

    names = ('loss', 'grad_norm', 'param_norm', 'lr')
    with report.Report(tmp_path, 5, 8, 0, 1, every=1) as log:
        for n in range(1, 6):
            log.write(n, {name: OnDevice(n) for name in names})
            assert set(read) == set(range(1, n))
        log.sync()
        assert set(read) == {1, 2, 3, 4, 5}


def test_help_needs_no_jax():
    done = subprocess.run(
        [sys.executable, '-X', 'importtime', '-m', 'vit_jax.main', '--help'], text=True,
        capture_output=True, env=os.environ, cwd=pathlib.Path(__file__).parents[1],
    )  # fmt: skip
    assert '--workdir' in done.stdout
    loaded = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
    assert 'absl.flags' in loaded and not loaded & {'jax', 'flax', 'grain', 'orbax', 'tensorboard'}


def test_a_package_that_is_not_installed_has_a_version(monkeypatch):
    """As in a clone that PYTHONPATH names."""
    version = importlib.metadata.version

    def of_others(name):
        if name == 'vit_jax':
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, 'version', of_others)
    versions = results.provenance()['versions']
    assert versions['vit_jax'] == vit_jax.__version__ and versions['jax'] == version('jax')
