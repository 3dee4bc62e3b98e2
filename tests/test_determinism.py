"""What a run does to repeat to the bit on a GPU: flags of XLA, and the kernels that it keeps.

There is no GPU: a stand-in for JAX's CUDA plugin, in real processes, notes the flags that the
backend starts with, and writes and reads the files that these name, as XLA does.
"""

import json
import os
import pathlib
import shlex
import shutil

import jaxlib
import launched
import pytest
import storage as stores
import xla_flags
from etils import epath

from vit_jax.errors import UserError
from vit_jax.io import storage
from vit_jax.run import determinism

KEPT = f'kernels/jaxlib-{jaxlib.__version__}.textproto'
PLUGIN = """
import json, os

def initialize():
    flags = dict(f.partition('=')[::2] for f in os.environ['XLA_FLAGS'].split())
    known = ''
    if path := flags.get('--xla_gpu_load_autotune_results_from'):
        known = open(path).read()
    with open(os.environ['NOTED'], 'a') as file:
        print(json.dumps([flags, known]), file=file)
    if path := flags.get('--xla_gpu_dump_autotune_results_to'):
        with open(path, 'w') as file:
            file.write(known or 'kernel\\n')
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return launched.write_images(tmp_path_factory.mktemp('images'), {'train': 8, 'val': 5})


@pytest.fixture
def plugin(tmp_path):
    """Variables of a process that finds the stand-in."""
    room = tmp_path / 'plugin'
    info = room / 'stand_in-1.dist-info'
    info.mkdir(parents=True)
    (room / 'stand_in.py').write_text(PLUGIN)
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: stand-in\nVersion: 1\n')
    (info / 'entry_points.txt').write_text('[jax_plugins]\nxla_cuda12 = stand_in\n')
    return {
        'PYTHONPATH': f'{room}:{os.environ.get("PYTHONPATH", "")}', 'JAX_PLATFORMS': 'cuda,cpu',
        'NOTED': str(tmp_path / 'noted'), 'VIT_JAX_CACHE': str(tmp_path / 'cache'),
        'XLA_FLAGS': xla_flags.devices(1),
    }  # fmt: skip


def noted(plugin):
    """[(flags, kernels loaded)] of every start."""
    return [json.loads(line) for line in pathlib.Path(plugin['NOTED']).read_text().splitlines()]


@pytest.mark.slow
def test_a_run_starts_with_the_flags_and_with_the_kernels_of_its_first_start(
    folder, plugin, tmp_path
):
    run = tmp_path / 'run'

    def finish(steps, *flags, **more):
        given = ('--allow_config_change', f'--config.steps={steps}', *flags)
        status, said = launched.finish(folder, run, *given, environment=plugin | more)
        assert status == 0, said
        return noted(plugin)[-1]

    flags, _ = finish(6)
    assert flags[determinism.EXCLUDE] == 'true' and determinism.LOAD not in flags
    assert (run / KEPT).read_text() == 'kernel\n'
    result = json.loads((run / 'result.json').read_text())
    facts = json.loads((run / 'facts.json').read_text())
    assert f'{determinism.EXCLUDE}=true' in facts['xla_flags'].split()
    assert result['machine']['processor'] and determinism.DUMP not in facts['xla_flags']
    assert {f'machine.{k}': v for k, v in result['machine'].items()}.items() <= facts.items()
    (run / 'facts.json').write_text(json.dumps(facts | {'machine.driver': '1.2'}))
    own = f'{xla_flags.devices(1)} {determinism.EXCLUDE}=false'
    flags, loaded = finish(7, XLA_FLAGS=own)
    assert flags[determinism.EXCLUDE] == 'false' and loaded == 'kernel\n'
    said = launched.log_of(run).read_text()
    line = 'from here on the last bits may be others: machine.driver, xla_flags changed'
    assert said.count('last bits') == 1 and f'\n{line}\n' in said
    assert not list((tmp_path / 'cache' / 'kernels').iterdir())


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """As if a GPU was here; the flags are as the test of this process leaves them."""
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('XLA_FLAGS', '--mine=1')
    monkeypatch.setattr(determinism, 'uses_gpu', lambda: True)
    monkeypatch.setattr(determinism.jax.config, 'update', lambda *args: None)


def named_flags():
    """{flag: value} of XLA_FLAGS, as XLA reads them."""
    return dict(f.partition('=')[::2] for f in shlex.split(os.environ['XLA_FLAGS']))


def start(workdir, choose):
    """The flags of a start; `choose` makes the kernels that XLA then knows of those loaded."""
    with determinism.repeatable(workdir, True) as keep:
        flags, named = os.environ['XLA_FLAGS'], named_flags()
        source = named.get(determinism.LOAD)
        keep()  # nothing was chosen yet
        known = pathlib.Path(source).read_bytes() if source else b''
        pathlib.Path(named[determinism.DUMP]).write_bytes(choose(known))
        keep()
    os.environ['XLA_FLAGS'] = '--mine=1'
    return flags


@pytest.mark.parametrize('remote', [False, True])
def test_kernels_are_in_the_workdir(gpu, remote, tmp_path, monkeypatch):
    workdir = epath.Path(tmp_path / 'run')
    if remote:
        store = stores.Store()
        monkeypatch.setenv('STORAGE_EMULATOR_HOST', store.url)
        storage.set_up()
        workdir = epath.Path('gs://bucket/run')
    try:
        first = start(workdir, lambda known: known + b'a\nb\n')
        assert first.endswith(' --mine=1') and determinism.LOAD not in first
        assert (workdir / KEPT).read_bytes() == b'a\nb\n'
        # In another order they are the same, so that later starts have the same flags, by which
        # JAX knows what is compiled.
        later = [start(workdir, lambda known: known[2:] + known[:2]) for _ in range(2)]
        assert later[0] == later[1] and determinism.LOAD in later[0]
        assert (workdir / KEPT).read_bytes() == b'a\nb\n'
        start(workdir, lambda known: known + b'c\n')
        assert (workdir / KEPT).read_bytes() == b'a\nb\nc\n'
        assert start(epath.Path(tmp_path / 'new'), lambda known: b'a\n') != first
        with determinism.repeatable(workdir, False):
            assert os.environ['XLA_FLAGS'] == '--mine=1'
    finally:
        if remote:
            store.close()


def test_a_start_that_fails_leaves_the_files_of_a_run_that_goes_on(gpu, tmp_path):
    workdir = epath.Path(tmp_path / 'run')
    start(workdir, lambda known: b'a\n')
    with determinism.repeatable(workdir, True) as keep:
        named = named_flags()
        pathlib.Path(named[determinism.DUMP]).write_bytes(b'a\nb\n')
        with pytest.raises(UserError), determinism.repeatable(workdir, True):
            raise UserError('the workdir is that of a run that goes on')
        assert pathlib.Path(named[determinism.LOAD]).read_bytes() == b'a\n'
        keep()
    assert (workdir / KEPT).read_bytes() == b'a\nb\n'
    with pytest.raises(UserError), determinism.repeatable(tmp_path / 'new', True):
        raise UserError('a mistake')
    assert not list((tmp_path / 'cache' / 'kernels').iterdir())


def test_a_copy_resumed_beside_a_run_has_kernels_of_its_own(gpu, tmp_path):
    workdir, copy = epath.Path(tmp_path / 'run'), epath.Path(tmp_path / 'copy')
    start(workdir, lambda known: b'a\n')
    shutil.copytree(workdir, copy)
    with determinism.repeatable(workdir, True) as keep:
        pathlib.Path(named_flags()[determinism.DUMP]).write_bytes(b'a\nours\n')
        os.environ['XLA_FLAGS'] = ''
        start(copy, lambda known: known + b'theirs\n')
        keep()
    assert (workdir / KEPT).read_bytes() == b'a\nours\n'
    assert (copy / KEPT).read_bytes() == b'a\ntheirs\n'


WHOLE = b'version: 3\nresults {\n  device: "a \\"b\\" {"\n  result {\n  }\n}\n'


@pytest.mark.parametrize('half', [b'', WHOLE[:20], WHOLE[:40], WHOLE[:-3], bytes(70), b'\xff\n'])
def test_half_written_kernels_are_neither_kept_nor_loaded(gpu, half, tmp_path):
    workdir = epath.Path(tmp_path / 'run')
    start(workdir, lambda known: half)
    assert not (workdir / KEPT).exists()
    start(workdir, lambda known: WHOLE)
    assert (workdir / KEPT).read_bytes() == WHOLE
    start(workdir, lambda known: WHOLE + half)
    (workdir / KEPT).write_bytes(half)
    with pytest.raises(UserError, match=f'{KEPT} is damaged; remove it'):
        start(workdir, lambda known: known)
    assert os.environ['XLA_FLAGS'] == '--mine=1'


def test_a_resumed_run_says_that_its_kernels_are_missing(gpu, tmp_path, caplog):
    workdir = epath.Path(tmp_path / 'run')
    start(workdir, lambda known: WHOLE)
    facts = {'jaxlib': jaxlib.__version__, 'xla_flags': f'{determinism.EXCLUDE}=true'}
    (workdir / 'facts.json').write_text(json.dumps(facts))
    (workdir / 'checkpoints' / '3').mkdir(parents=True)
    start(workdir, lambda known: known)
    assert not caplog.text
    (workdir / KEPT).unlink()
    start(workdir, lambda known: WHOLE)
    line = f'from here on the last bits may be others: {workdir / KEPT} is missing'
    assert line in caplog.text
    (workdir / KEPT).unlink()
    for text in json.dumps(facts | {'jaxlib': '0.0.1'}), json.dumps(facts | {'xla_flags': ''}):
        (workdir / 'facts.json').write_text(text)  # which the heading of the run says
        start(workdir, lambda known: b'')
    assert caplog.text.count('last bits') == 1


def test_flags_of_the_user_and_paths_are_read_as_xla_reads_them(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'my "own" cache'))
    mine = f'--mine="a {determinism.EXCLUDE}=x b"'
    for text in mine, str(tmp_path / 'flags'):
        (tmp_path / 'flags').write_text(f'\n{mine}\n')
        monkeypatch.setenv('XLA_FLAGS', text)
        with determinism.repeatable(epath.Path(tmp_path / 'run'), True) as keep:
            named = named_flags()
            assert named['--mine'] == f'a {determinism.EXCLUDE}=x b'
            assert named[determinism.EXCLUDE] == 'true' and len(named) == 3
            assert len(determinism.flags_of(os.environ['XLA_FLAGS'])) == 3
            pathlib.Path(named[determinism.DUMP]).write_bytes(WHOLE)
            keep()
        assert (tmp_path / 'run' / KEPT).read_bytes() == WHOLE
        (tmp_path / 'run' / KEPT).unlink()
    monkeypatch.setenv('XLA_FLAGS', 'none')
    with pytest.raises(UserError, match="XLA_FLAGS is 'none': neither flags nor a file"):
        start(tmp_path / 'run', lambda known: known)


def test_a_cache_that_cannot_be_written_is_not_needed(gpu, tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'file' / 'cache'))
    workdir = epath.Path(tmp_path / 'run')
    start(workdir, lambda known: b'a\n')
    start(workdir, lambda known: known + b'b\n')
    assert (workdir / KEPT).read_bytes() == b'a\nb\n'


@pytest.mark.parametrize('platforms, plugins, found', [
    (None, ['xla_cuda12'], True), ('cuda', ['xla_cuda13'], True), ('cpu', ['xla_cuda12'], False),
    ('gpu,cpu', ['xla_rocm7'], True), (None, ['other'], False), ('tpu,cpu', ['xla_cuda12'], False),
])  # fmt: skip
def test_where_there_may_be_a_gpu(monkeypatch, platforms, plugins, found):
    class Plugin:
        def __init__(self, name):
            self.name = name

    monkeypatch.setattr(
        determinism.importlib.metadata, 'entry_points', lambda group: map(Plugin, plugins)
    )
    monkeypatch.delenv('JAX_PLATFORMS', raising=False)
    if platforms:
        monkeypatch.setenv('JAX_PLATFORMS', platforms)
    assert determinism.uses_gpu() == found
