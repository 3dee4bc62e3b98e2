"""A run whose workdir is on gs://, against an emulator, through errors, in real processes."""

import json
import pathlib
import re
import signal
import threading

import launched
import pytest
import storage as stores
from etils import epath

from vit_jax.errors import UserError
from vit_jax.io import storage
from vit_jax.run import compilation

STEPS = 60
FLAGS = (f'--config.steps={STEPS}', '--config.checkpoint.every=8')


@pytest.fixture
def store():
    store = stores.Store()
    yield store
    store.close()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return launched.write_images(tmp_path_factory.mktemp('images'), {'train': 16, 'val': 40})


@pytest.fixture(scope='module')
def whole(folder, tmp_path_factory):
    """The workdir, on a disk, of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    status, output = launched.finish(folder, workdir, *FLAGS)
    assert status == 0, output
    return workdir


def train(store, folder, tmp_path, *flags, workdir='gs://bucket/run'):
    """A process that trains there; what it says goes to tmp_path/gs.log."""
    return launched.start(
        folder, workdir, *FLAGS, *flags, log=launched.log_of(tmp_path / 'gs'),
        environment=store.environment,
    )  # fmt: skip


def wait_for(condition, process, tmp_path):
    launched.wait_for(condition, process, tmp_path / 'gs')


def end(process, tmp_path):
    """Exit status and output of a process of `train`, once it has ended."""
    return process.wait(timeout=200), launched.log_of(tmp_path / 'gs').read_text()


def ask(store, module, *flags):
    """The output of a whole command."""
    status, output, errors = launched.run(module, *flags, environment=store.environment)
    assert status == 0, errors
    return output


def committed(store):
    """Steps with a whole checkpoint."""
    found = re.findall(r'/(\d+)/commit_success.txt', ' '.join(store.names('run/checkpoints/')))
    return sorted(map(int, found))


def begun(store):
    """Steps of which there is anything."""
    found = re.findall(r'run/checkpoints/(\d+)/', ' '.join(store.names('run/checkpoints/')))
    return sorted(set(map(int, found)))


def assert_as_on_a_disk(store, whole, folder):
    """The arrays of the last checkpoint and the metrics of each step, bit by bit."""
    workdir = store.copy('run', folder)
    launched.assert_same_bits(launched.state(workdir, STEPS), launched.state(whole, STEPS))
    assert launched.timeless(workdir) == launched.timeless(whole)
    results = [json.loads((w / 'result.json').read_text()) for w in (workdir, whole)]
    assert results[0]['metrics']['val/loss'] == results[1]['metrics']['val/loss']
    assert begun(store) == committed(store) == launched.checkpoints(whole)


@pytest.mark.slow
def test_killed_and_stopped_it_ends_as_on_a_disk(store, folder, whole, tmp_path):
    run = train(store, folder, tmp_path)
    wait_for(
        lambda: set(begun(store)) - set(committed(store)) and committed(store), run, tmp_path
    )
    launched.kill(run)  # within a save, after another
    last = committed(store)[-1]
    kept = [json.loads(line) for line in store.read('run/metrics.jsonl').splitlines()]
    assert {line['step'] for line in kept if 'loss' in line} >= set(range(1, last + 1))

    run = train(store, folder, tmp_path)
    wait_for(lambda: committed(store)[-1] > last, run, tmp_path)
    run.send_signal(signal.SIGTERM)
    status, output = end(run, tmp_path)
    assert status == 143 and f'resumed at step {last}' in output, output
    assert 'Traceback' not in output, output
    last = committed(store)[-1]
    assert begun(store) == committed(store) and last < STEPS

    status, output = end(train(store, folder, tmp_path), tmp_path)
    assert status == 0 and f'resumed at step {last}' in output, output
    assert_as_on_a_disk(store, whole, tmp_path / 'copy')
    assert any(name.startswith('run/tensorboard/events.out') for name in store.names('run/'))

    status, output = end(train(store, folder, tmp_path), tmp_path)
    assert status == 0 and f'is finished: {STEPS} steps' in output, output
    measured = json.loads(ask(store, 'evaluate', '--checkpoint=gs://bucket/run', '--json'))
    at_the_end = json.loads(store.read('run/result.json'))['metrics']
    assert measured['val']['loss'] == at_the_end['val/loss']
    ask(store, 'figures', 'gs://bucket/run')
    assert store.read('run/summary.png').startswith(b'\x89PNG')
    tuned = tmp_path / 'tuned'
    status, output = launched.finish(
        folder, tuned, '--config.steps=1', '--config.init_from=gs://bucket/run',
        '--config.optim.lr=1e-30', '--config.optim.warmup=0', '--config.keep_head=True',
        environment=store.environment,
    )  # fmt: skip
    assert status == 0, output
    average = launched.state(whole, STEPS)
    average = {k.partition('average/')[2]: v for k, v in average.items() if '/average/' in k}
    kernel = launched.state(tuned, 1)['params/embedding/kernel']
    assert kernel.tobytes() == average['embedding/kernel'].tobytes()


@pytest.mark.slow
def test_errors_change_nothing(store, folder, whole, tmp_path):
    """Every kind of request of every library fails once in each way."""
    ways = ('503', 'cut', 'refused', 'slow')
    store.trouble = stores.Once(*ways)
    status, output = end(train(store, folder, tmp_path), tmp_path)
    assert status == 0 and 'Traceback' not in output, output
    assert {library for library, *_ in store.trouble.failed} == {
        'python-gcsfs', 'tensorstore', 'gcloud-python'
    }  # fmt: skip
    often = [kind for kind, n in store.trouble.failed.items() if n == len(ways)]
    assert len(often) >= 6, store.trouble.failed
    assert_as_on_a_disk(store, whole, tmp_path / 'copy')


@pytest.mark.slow
@pytest.mark.parametrize('way', ['503', 'refused'])
def test_a_store_that_stays_away_ends_the_run_with_one_line(store, folder, tmp_path, way):
    run = train(store, folder, tmp_path, '--config.steps=1000000')
    wait_for(lambda: committed(store), run, tmp_path)
    store.trouble = lambda request: way
    status, output = end(run, tmp_path)
    assert status == 2 and 'Traceback' not in output, output
    (line,) = [line for line in output.splitlines() if line.startswith('error:')]
    assert re.match(r'error: cannot write .*gs://bucket/run/(checkpoints/\d+|metrics.jsonl)', line)
    store.trouble = lambda request: None
    last = committed(store)[-1]
    flags = (f'--config.steps={last + 1}', '--allow_config_change')
    status, output = end(train(store, folder, tmp_path, *flags), tmp_path)
    assert f'resumed at step {last}' in output and status == 0, output


def test_a_bucket_that_is_not_there(store, folder, tmp_path):
    status, output = end(train(store, folder, tmp_path, workdir='gs://buckt/run'), tmp_path)
    assert status == 2
    assert output == "error: cannot write to gs://buckt/run: there is no bucket 'buckt'\n"


@pytest.mark.parametrize('methods', ['GET', 'POST PUT'])
def test_no_permission(store, folder, tmp_path, methods):
    store.trouble = lambda request: '403' if request.command in methods else None
    status, output = end(train(store, folder, tmp_path), tmp_path)
    does = 'read' if methods == 'GET' else 'write to'
    path = 'gs://bucket/run' + ('/config.json' if does == 'read' else '')
    assert output == f'error: cannot {does} {path}: the server answers 403 Forbidden\n'
    assert status == 2 and not store.names()


@pytest.fixture
def here(store, monkeypatch):
    """The store as this process sees it."""
    monkeypatch.setenv('STORAGE_EMULATOR_HOST', store.url)
    monkeypatch.setattr(storage, 'PERIOD', 0)
    storage.set_up()
    return epath.Path('gs://bucket/run')


def test_a_growing_file_is_whole_after_sync(store, here):
    file = storage.Growing(here / 'lines', b'0\n')
    store.trouble = lambda request: '403'
    file.write(b'1\n')  # tried in the background, in vain
    with pytest.raises(UserError, match='cannot write gs://bucket/run/lines: .* 403 Forbidden'):
        file.sync()
    assert store.read('run/lines') == b'0\n'
    store.trouble = lambda request: None
    file.write(b'2\n')
    file.sync()
    assert store.read('run/lines') == b'0\n1\n2\n'
    file.write(b'3\n')
    file.close()
    assert store.read('run/lines') == b'0\n1\n2\n3\n'


def test_a_growing_file_does_not_wait_for_its_server(store, here):
    file, asked, answers = storage.Growing(here / 'lines'), threading.Event(), threading.Event()

    def hold(request):
        asked.set()
        answers.wait(60)

    store.trouble = hold
    file.next = 0  # the next line is written at once
    for i in range(100):
        file.write(b'%d\n' % i)
    assert asked.wait(60) and store.read('run/lines') == b''
    answers.set()
    file.close()
    assert store.read('run/lines') == b''.join(b'%d\n' % i for i in range(100))


def test_a_growing_file_on_a_disk_has_every_line_at_once(tmp_path):
    path = epath.Path(tmp_path) / 'lines'
    file = storage.Growing(path, b'0\n')
    file.write(b'1\n')
    assert path.read_bytes() == b'0\n1\n'
    file.close()


def test_what_can_not_be_read_for_now_is_not_taken_for_absent(store, here, monkeypatch):
    assert storage.read(here / 'config.json') is None
    storage.write(here / 'config.json', b'{}')
    store.trouble = lambda request: '403'
    with pytest.raises(UserError, match='cannot read gs://bucket/run/config.json'):
        storage.read(here / 'config.json')


def programs(**files):
    """Copies programs to and from the store as a run does; returns those that it begins with."""
    with compilation.mirrored('gs://bucket/run/compiled') as folder:
        found = {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}
        for name, data in files.items():
            (pathlib.Path(folder) / f'{name}-cache').write_bytes(data)
    return found


def test_compiled_programs_are_kept_in_the_store(store, here):
    assert programs(a=b'1') == {}
    assert programs(b=b'2') == {'a-cache': b'1'}
    assert programs() == {'a-cache': b'1', 'b-cache': b'2'}
    assert store.names('run/compiled') == ['run/compiled/a-cache', 'run/compiled/b-cache']


@pytest.mark.parametrize('trouble', ['403', 'silent'])
def test_a_store_of_programs_that_is_away_delays_a_run_by_a_limit(
    trouble, store, here, monkeypatch, caplog
):
    assert programs(a=b'1') == {}
    store.trouble = lambda request: trouble
    monkeypatch.setattr(compilation, 'PATIENCE', 0.5)
    assert programs(b=b'2') == {}  # and no test takes forever
    words = '403 Forbidden' if trouble == '403' else 'more than 0.5 s'
    assert caplog.text.count(words) == 2 and caplog.text.count('goes on without') == 2
    store.trouble = lambda request: None
    assert programs() == {'a-cache': b'1'}


@pytest.mark.slow
def test_a_run_whose_programs_are_at_a_silent_store_ends_as_another(
    store, folder, whole, tmp_path
):
    store.trouble = lambda request: 'silent' if 'programs' in request.path else None
    flag = '--compilation_cache=gs://bucket/programs'
    run = train(store, folder, tmp_path, flag, workdir=tmp_path / 'run')
    status, output = end(run, tmp_path)
    assert status == 0 and output.count('goes on without') == 2, output
    assert launched.timeless(tmp_path / 'run') == launched.timeless(whole)
