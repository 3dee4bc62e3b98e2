"""Runs of several processes: real ones that meet, train, are stopped, killed and held up."""

import json
import os
import re
import shutil
import signal

import launched
import numpy as np
import processes
import pytest
from processes import Run

from vit_jax import sharding
from vit_jax.distributed import clusters, hosts
from vit_jax.distributed.watch import EXIT_STATUS, Watch
from vit_jax.errors import UserError

pytestmark = pytest.mark.timeout(900)  # several runs in a test, on a machine that may be busy
STEPS = (
    '--config.steps=12', '--config.checkpoint.every=4', '--config.evals.val.every=4',
    '--config.optim.schedule=constant',
)  # fmt: skip
PAIR = ('--config.steps=24', '--config.mesh.fsdp=2')  # of two processes with a device each
LONG = ('--config.steps=100000', '--config.checkpoint.every=7', '--config.evals.val.every=0')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return launched.write_images(tmp_path_factory.mktemp('images'), {'train': 11, 'val': 7})


# who is who


@pytest.fixture
def environment(monkeypatch):
    for name in os.environ:
        if name.startswith(('SLURM', 'OMPI', 'JAX_COORD', 'TPU', 'MEGASCALE')):
            monkeypatch.delenv(name)

    def given(text):
        for pair in text.split():
            monkeypatch.setenv(*pair.split('=', 1))

    return given


SLURM = 'SLURM_JOB_ID=7 SLURM_STEP_NODELIST=node[003-006,9] SLURM_NTASKS=8 SLURM_PROCID=5 ' \
    'SLURM_LOCALID=1 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NUM_TASKS=8 '  # fmt: skip
OMPI = 'OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_LOCAL_RANK=1 '


@pytest.mark.parametrize('variables, flags, wanted', [
    ('', (), None),
    ('', (None, 1, 0), None),
    ('', ('a:1', 4, 3), ('a:1', 4, 3, None)),
    ('', ('[::1]:8476', 2, 0), ('[::1]:8476', 2, 0, None)),
    # JAX takes the port from the number of the job: 61440 + n % 4096
    (SLURM + 'SLURM_STEP_TASKS_PER_NODE=4(x2)', (), ('node003:61447', 8, 5, [1])),
    (SLURM + 'SLURM_STEP_TASKS_PER_NODE=1(x8)', (), ('node003:61447', 8, 5, None)),
    (SLURM + 'SLURM_STEP_TASKS_PER_NODE=4(x2)', ('b:2', None, None), ('b:2', 8, 5, [1])),
    # A batch script: no step has more than one task, though the job has eight
    ('SLURM_JOB_ID=7 SLURM_NTASKS=8 SLURM_PROCID=0 SLURM_LOCALID=0', (), None),
    (OMPI + 'OMPI_COMM_WORLD_LOCAL_SIZE=2 '
     'OMPI_MCA_orte_hnp_uri=1531576320.0;tcp://10.96.0.1,10.148.0.1:34911', (),
     ('10.96.0.1:62624', 4, 3, [1])),
    (OMPI + 'OMPI_COMM_WORLD_LOCAL_SIZE=1', ('c:3', None, None), ('c:3', 4, 3, None)),
    ('OMPI_COMM_WORLD_SIZE=1 OMPI_COMM_WORLD_RANK=0', (), None),
])  # fmt: skip
def test_place(variables, flags, wanted, environment):
    environment(variables)
    assert clusters.place(*flags) == wanted


@pytest.mark.parametrize('variables, flags, words', [
    ('', ('a:1', 4, None), '--process_id must be given too'),
    ('', (None, None, 1), '--coordinator and --num_processes must be given too'),
    ('', ('a', 4, 1), "--coordinator is 'a', not of the form HOST:PORT"),
    ('', ('a:', 4, 1), 'not of the form HOST:PORT'),
    ('', ('a b:1', 4, 1), 'not of the form HOST:PORT'),
    ('', ('::1:8476', 4, 1), 'not of the form HOST:PORT, or [ADDRESS]:PORT for IPv6'),
    ('', ('a:99999', 4, 1), "'a:99999'; ports are from 1 to 65535"),
    ('', ('a:0', 4, 0), 'ports are from 1 to 65535'),
    ('', ('a..b:1', 4, 1), "'a..b:1', whose host is not a valid name"),
    ('', ('a:1', 4, 4), '--process_id is 4; with --num_processes=4 it is from 0 to 3'),
    ('OMPI_COMM_WORLD_SIZE=four', (), "OMPI_COMM_WORLD_SIZE is 'four', not a number"),
    ('OMPI_COMM_WORLD_SIZE=4', (), "OMPI_COMM_WORLD_RANK is '', not a number"),
    (OMPI, (), "this is process 3 of 4, but 'OMPI_MCA_orte_hnp_uri', which says where"),
])  # fmt: skip
def test_places_that_are_none(variables, flags, words, environment):
    environment(variables)
    with pytest.raises(UserError, match=re.escape(words)):
        clusters.place(*flags)


def test_a_tpu_slice(environment, monkeypatch):
    monkeypatch.setattr('jax._src.cloud_tpu_init.running_in_cloud_tpu_vm', True)
    monkeypatch.setattr('jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm', True)
    monkeypatch.setenv('JAX_PLATFORMS', 'tpu')
    environment('MEGASCALE_COORDINATOR_ADDRESS= MEGASCALE_NUM_SLICES= MEGASCALE_SLICE_ID=')
    environment('TPU_WORKER_ID=2 TPU_WORKER_HOSTNAMES=localhost,t-1,t-2,t-3')
    assert clusters.place() == ('localhost:8482', 4, 2, None)
    environment('TPU_WORKER_ID=0 TPU_WORKER_HOSTNAMES=localhost')
    assert clusters.place() is None  # one host needs none of this


def test_a_jax_without_a_private_name_is_refused(monkeypatch):
    monkeypatch.delattr('jax._src.cloud_tpu_init.running_in_cloud_tpu_vm')
    with pytest.raises(UserError, match='lacks .*running_in_cloud_tpu_vm.*; jax 0.9.0 to 0.11.2'):
        clusters.place()


def test_what_is_expected_is_checked(environment):
    where = clusters.Place('a:1', 4, 0, None)
    hosts.check_processes(where, 4)
    hosts.check_processes(None, 1)
    hosts.check_devices(8)
    for call, words in (
        (lambda: hosts.check_processes(where, 8), '--expect_processes is 8, but this is one of 4'),
        (lambda: hosts.check_processes(None, 4), '--expect_processes is 4, but this is one of 1'),
        (lambda: hosts.check_devices(16), '--expect_devices is 16, but there are 8: 8 here'),
    ):
        with pytest.raises(UserError, match=words):
            call()


# who is lost


def watch(**fields):
    found = Watch.__new__(Watch)
    found.place, found.heartbeat = clusters.Place('a:1', 3, 0, None), dict(phases=5, phase='step 3')
    found.interval, found.limit, found.start_timeout = 2, 50, 600
    found.heartbeats, found.waited_since, found.failing = {}, {}, False
    found.last_report = {i: 1000.0 for i in range(3)}
    vars(found).update(fields)
    return found


def record(phases, phase='step 3', **fields):
    return dict(phases=phases, phase=phase, host='h', number=1, **fields)


def test_silence_is_a_loss():
    one = watch(heartbeats={1: record(5), 2: record(5, 'save, of step 2')})
    assert one.find_loss(1049) is None
    one.last_report |= {0: 1049, 1: 1049}
    words = r'process 2 of 3 \(h\) has not reported for 51 s; its last phase: save, of step 2'
    message, status = one.find_loss(1051)
    assert status == 4 and message == words.replace('\\', '')


@pytest.mark.parametrize('phase, patience', [
    ('step 3, waiting for data', 50), ('compile, of the step', 600), ('restore', 600),
])  # fmt: skip
def test_whom_others_wait_for_is_lost(phase, patience):
    one = watch(heartbeats={1: record(5), 2: record(4, phase)})
    now = 2000.0

    def lost(after):
        one.last_report = {i: now + after for i in range(3)}
        return one.find_loss(now + after)

    assert lost(0) is None and lost(patience - 1) is None
    message, status = lost(patience + 1)
    assert status == 4 and 'for process 2 of 3 (h), which is in phase: ' + phase in message
    one.heartbeats[2] = record(5, phase)  # it has come on
    assert lost(patience + 2) is None
    one.heartbeats[1], one.heartbeat['phases'] = record(6), 6  # it is behind again
    assert lost(patience + 3) is None and lost(2 * patience) is None
    assert lost(2 * patience + 4) is not None


def test_all_even_is_never_a_loss():
    one = watch(heartbeats={i: record(5) for i in range(3)}, last_report={i: 9e9 for i in range(3)})
    assert one.find_loss(9e9) is None


# what a process holds of a batch


def test_one_process_has_every_row():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    np.testing.assert_array_equal(sharding.rows(16, mesh), np.arange(16))
    batch = {'image': np.arange(16 * 3).reshape(16, 3).astype(np.uint8), 'id': np.arange(16)}
    placed = sharding.put(batch, mesh)
    for key, value in batch.items():
        np.testing.assert_array_equal(placed[key], value)
        assert placed[key].sharding.spec == sharding.BATCH


# real processes


@pytest.fixture(scope='module')
def alone(folder, tmp_path_factory):
    """The workdir of a run of one process with one device."""
    workdir = tmp_path_factory.mktemp('alone') / 'run'
    status, output = launched.finish(folder, workdir, *processes.TINY, *STEPS)
    assert status == 0, output
    return workdir


@pytest.fixture(scope='module')
def pair(folder, tmp_path_factory):
    """The workdir of a run of two processes that nothing disturbed, saved at steps 16 and 24."""
    workdir = tmp_path_factory.mktemp('pair') / 'run'
    processes.finish(folder, workdir, 2, 1, *PAIR, '--config.checkpoint.every=8')
    return workdir


def unfinished_copy(workdir, path):
    """A copy of a workdir, whose run then goes on from the last checkpoint."""
    shutil.copytree(workdir, path)
    (path / 'result.json').unlink()
    return path


def assert_close(workdir, other):
    """The same lines; training and evaluation close, examples and steps equal."""
    lines, wanted = launched.timeless(workdir), launched.timeless(other)
    assert [line.keys() for line in lines] == [line.keys() for line in wanted]
    for line, goal in zip(lines, wanted, strict=True):
        assert line['step'] == goal['step'] and line.get('val/examples') == goal.get('val/examples')
        for key in line.keys() & {'loss', 'val/loss', 'param_norm', 'grad_norm'}:
            np.testing.assert_allclose(line[key], goal[key], rtol=1e-5, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize('count, devices, mesh', [
    (4, 1, 'fsdp=2'), (2, 2, 'tensor=2'),
])
def test_losses_are_those_of_one_process(count, devices, mesh, folder, alone, tmp_path):
    workdir = tmp_path / 'run'
    flags = [f'--config.mesh.{axis}' for axis in mesh.split()]
    run = processes.finish(
        folder, workdir, count, devices, *STEPS, *flags, f'--expect_processes={count}',
        f'--expect_devices={count * devices}',
    )  # fmt: skip
    assert_close(workdir, alone)
    assert launched.metrics(workdir)[-1]['val/examples'] == 21  # of no multiple of the batch
    result = json.loads((workdir / 'result.json').read_text())
    assert result['device_count'] == count * devices and result['examples_seen'] == 96
    # One writes and speaks, those with a first replica write the checkpoint: no array is large.
    assert len(list((workdir / 'tensorboard').iterdir())) == 1
    assert 'val/accuracy' in run.log(0)
    assert not any('loss' in run.log(i) or 'devices' in run.log(i) for i in range(1, count))
    parts = (workdir / 'checkpoints' / '12' / 'state').glob('ocdbt.process_*')
    written = {int(path.name.rpartition('_')[2]) for path in parts}
    assert written == ({0, 1} if mesh.startswith('fsdp') else written | {0})


TUNED = """
from tests import tiny


def get_config(folder):
    config = tiny.get_config(folder)
    config.model, config.init_from = {}, INIT_FROM
    return config
"""


@pytest.mark.slow
def test_all_read_their_model_from_a_checkpoint_of_a_run(folder, alone, tmp_path):
    config = tmp_path / 'tuned.py'
    config.write_text(TUNED.replace('INIT_FROM', repr(str(alone))))
    flags = *processes.TINY, *STEPS
    processes.finish(folder, tmp_path / 'pair', 2, 1, *flags, config=config)
    assert json.loads((tmp_path / 'pair' / 'config.json').read_text())['model']['width'] == 16
    one = tmp_path / 'one'
    status, output = launched.finish(folder, one, *flags, config=config, cwd=processes.ROOT)
    assert status == 0, output
    assert_close(tmp_path / 'pair', one)


@pytest.mark.slow
@pytest.mark.parametrize('signum, who, count', [
    ('KILL', 1, 3), ('STOP', 1, 2), ('KILL', 0, 2), ('STOP', 0, 2),
])  # fmt: skip
def test_one_that_dies_or_stalls_ends_all(signum, who, count, folder, tmp_path):
    workdir, timeout = tmp_path / 'run', 12
    flags = (f'--config.data.batch_size={2 * count}', f'--config.evals.val.batch_size={2 * count}')
    with Run(folder, workdir, count, 1, *LONG, *flags, f'--peer_timeout={timeout}') as run:
        run.wait_for(lambda: launched.last_step(workdir) >= 9)
        run.wait_for(lambda: 7 in launched.checkpoints(workdir))
        run.processes[who].send_signal(getattr(signal, f'SIG{signum}'))
        statuses = run.ended(who, within=timeout + 5)
        for i, status in statuses.items():
            assert status == EXIT_STATUS, run.says()
            (error,) = run.errors(i)
            assert f'process {who} of {count} (' in error  # it was silent, or the others waited
            assert 'step' in error.partition(' phase: ')[2]
    assert 7 in launched.checkpoints(workdir)


PHASES = {
    'start': 'vit_jax.distributed.hosts:meet',
    'restore': 'vit_jax.run.checkpoint:Checkpoints.restore',
    'save': 'vit_jax.run.checkpoint:Checkpoints.save',
    'compile, of the step': 'vit_jax.sharding:put',
}


@pytest.mark.slow
@pytest.mark.parametrize('phase', PHASES)
def test_a_barrier_where_one_stalls(phase, folder, pair, tmp_path):
    workdir = tmp_path / 'run'
    if phase != 'start':
        unfinished_copy(pair, workdir)
    flags = ('--config.steps=30', '--config.checkpoint.every=6', '--config.evals.val.every=3',
             '--allow_config_change', '--peer_timeout=10', '--start_timeout=20')  # fmt: skip
    with Run(folder, workdir, 2, 1, *flags, stop_in=(1, PHASES[phase])) as run:
        run.wait_for(lambda: run.stopped(1))
        statuses = run.ended(1, within=30)
        assert statuses == {0: EXIT_STATUS}, run.says()
        (error,) = run.errors(0)
        assert 'process 1 of 2' in error, error
        assert ('did not start' if phase == 'start' else f' phase: {phase}') in error


@pytest.mark.parametrize('signum, who, count', [
    ('KILL', 1, 3),
    pytest.param('KILL', 0, 2, marks=pytest.mark.slow),
    pytest.param('STOP', 1, 2, marks=pytest.mark.slow),
    pytest.param('STOP', 0, 2, marks=pytest.mark.slow),
])
def test_one_lost_between_the_meeting_and_the_start_is_named(signum, who, count, folder, tmp_path):
    flags = ('--peer_timeout=10', '--start_timeout=600')
    stop_in = who, 'vit_jax.distributed.hosts:Watch'
    with Run(folder, tmp_path, count, 1, *flags, stop_in=stop_in) as run:
        run.wait_for(lambda: run.stopped(who))
        if signum == 'KILL':
            run.processes[who].kill()
        statuses = run.ended(who)
        assert set(statuses.values()) == {EXIT_STATUS}, run.says()
        for i in statuses:
            (error,) = run.errors(i)
            assert f'error: process {who} of {count} (' in error, run.says()
            assert 'Check failed' not in run.log(i)
            assert ('ended before' if signum == 'KILL' else 'has not reported') in error


@pytest.mark.slow
@pytest.mark.parametrize('who', [0, 1])
def test_sigterm_to_any_one_saves_all_at_one_step(who, folder, pair, tmp_path):
    workdir, flags = tmp_path / 'run', (*PAIR, '--config.checkpoint.every=0')
    with Run(folder, workdir, 2, 1, *flags) as run:
        run.wait_for(lambda: launched.last_step(workdir) >= 3)
        run.processes[who].send_signal(signal.SIGTERM)
        assert run.ended() == {0: 143, 1: 143}, run.says()
        assert 'Stopped and saved' in run.log(0) and not run.errors(0) + run.errors(1)
    (saved,) = launched.checkpoints(workdir)
    assert saved >= launched.last_step(workdir) >= 3
    if who:  # the same bits as if nothing had been
        processes.finish(folder, workdir, 2, 1, *flags)
        launched.assert_same_bits(launched.state(workdir, 24), launched.state(pair, 24))
        assert launched.timeless(workdir) == launched.timeless(pair)


@pytest.mark.slow
def test_a_run_goes_on_on_other_processes_devices_and_meshes(folder, alone, tmp_path):
    workdir = tmp_path / 'run'
    stretches = [(2, 2, 'fsdp=4'), (1, 1, ''), (2, 2, 'fsdp=2 tensor=2')]
    for k, (count, devices, mesh) in enumerate(stretches):
        axes = dict(part.split('=') for part in mesh.split())
        shape = [f'--config.mesh.{axis}={axes.get(axis, 1)}' for axis in ('fsdp', 'tensor')]
        before = launched.state(workdir, 4 * k) if k else None
        run = processes.finish(
            folder, workdir, count, devices, *STEPS, *shape, f'--config.steps={4 * k + 4}',
            '--allow_config_change',
        )  # fmt: skip
        assert (f'resumed at step {4 * k}' in run.log(0)) == bool(k)
        if k:  # what was restored is to the bit what was saved, and still is there
            launched.assert_same_bits(launched.state(workdir, 4 * k), before)
        assert launched.checkpoints(workdir)[-1] == 4 * k + 4
    assert_close(workdir, alone)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_for_the_next_start(folder, pair, tmp_path):
    workdir = unfinished_copy(pair, tmp_path / 'run')
    written = list((workdir / 'checkpoints/24/state').glob('ocdbt.process_1/d/*'))
    assert written
    for data in written:  # arrays are in some of them, how many depends on how fast they came
        data.write_bytes(data.read_bytes()[:16])
    flags = (*PAIR, '--config.steps=25', '--allow_config_change')
    with Run(folder, workdir, 2, 1, *flags) as run:
        assert run.ended() == {0: EXIT_STATUS, 1: EXIT_STATUS}, run.says()
        for i in range(2):
            assert any('checkpoints/24 is damaged: ' in error for error in run.errors(i))
    assert launched.checkpoints(workdir) == [16]
    run = processes.finish(folder, workdir, 2, 1, *flags)
    assert 'resumed at step 16' in run.log(0) and launched.checkpoints(workdir)[-1] == 25


@pytest.mark.slow
def test_an_unreadable_image_ends_all_and_loses_nothing(folder, pair, tmp_path):
    folder = shutil.copytree(folder, tmp_path / 'images')
    workdir, flags = tmp_path / 'run', (*PAIR, '--config.checkpoint.every=0')
    bad = folder / 'train' / 'ant' / '5.png'  # the last of the first epoch, in step 5
    good = bad.read_bytes()
    bad.write_bytes(good[:50])
    with Run(folder, workdir, 2, 1, *flags) as run:
        assert run.ended() == {0: 2, 1: 2}, run.says()
        for i in range(2):
            assert any(str(bad) in error for error in run.errors(i)), run.says()
        saved = launched.checkpoints(workdir)
    bad.write_bytes(good)
    # The data set has other contents than the run was begun with.
    run = processes.finish(folder, workdir, 2, 1, *flags, '--allow_config_change')
    assert saved == [] or f'resumed at step {saved[-1]}' in run.log(0)
    launched.assert_same_bits(launched.state(workdir, 24), launched.state(pair, 24))


WAITS = """
import os, time
from functools import partial
from vit_jax.data.tasks import classify

def waits(source, *, view, image_size, gate):
    task = classify.classify(source, view=view, image_size=image_size)
    return task._replace(read=partial(read, own=task.read, gate=gate))

def read(record, rng, *, own, gate):
    '''For ever, where the gate is there and holds the bytes of this image.'''
    while os.path.exists(gate) and open(gate, 'rb').read() == record['image']:
        time.sleep(0.1)
    return own(record, rng)
"""


@pytest.mark.slow
def test_a_process_that_waits_for_its_data_is_named(tmp_path):
    folder = launched.write_images(tmp_path / 'images', {'train': 30, 'val': 2})
    task, gate = tmp_path / 'waits.py', tmp_path / 'gate'
    task.write_text(WAITS)
    flags = ('--config.steps=6000', '--config.checkpoint.every=0', '--peer_timeout=10',
             f'--config.data.task={task}:waits', f'--config.data.gate={gate}')  # fmt: skip
    with Run(folder, tmp_path / 'run', 2, 1, *flags) as run:
        run.wait_for(lambda: launched.last_step(tmp_path / 'run') >= 3)
        shutil.copy(folder / 'train' / 'bee' / '7.png', tmp_path / 'part')
        os.replace(tmp_path / 'part', gate)
        assert run.ended() == {0: 4, 1: 4}, run.says()
        for i in range(2):
            (error,) = run.errors(i)
            assert 'the others have waited' in error and 'waiting for data' in error
    names = {error.partition(', which')[0] for i in range(2) for error in run.errors(i)}
    assert len({name.partition(' s for ')[2] for name in names}) == 1


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_all(folder, tmp_path):
    with Run(folder, tmp_path / 'run', 2, 1, *STEPS, '--config.optim.lr=1e38') as run:
        assert run.ended() == {0: 3, 1: 3}, run.says()
        assert all('not finite' in run.errors(i)[0] for i in range(2))


def copies(path, *changes):
    """{process: folder with a local copy of the data}, each changed in its own way."""
    found = {}
    for i, change in enumerate(changes):
        found[i] = path / f'host{i}'
        launched.write_images(found[i] / 'data', {'train': 4, 'val': 2})
        if change:
            change(found[i] / 'data')
    return found


def other_names(data):
    for split in ('train', 'val'):
        (data / split / 'bee').rename(data / split / 'dog')


DIFFERENCES = {
    'data.class_names': other_names,
    'evals.val.examples': lambda data: (data / 'val/bee/1.png').unlink(),
}


@pytest.mark.parametrize('key', DIFFERENCES)
@pytest.mark.slow
def test_processes_whose_data_differ_end_before_they_train(key, tmp_path):
    cwd = copies(tmp_path, None, None, DIFFERENCES[key])
    workdir = tmp_path / 'run'
    sizes = ('--config.data.batch_size=6', '--config.evals.val.batch_size=6')
    with Run('data', workdir, 3, 1, *sizes, *LONG, cwd=cwd) as run:
        assert run.ended() == {0: 2, 1: 2, 2: 2}, run.says()
        for i in range(3):
            (error,) = run.errors(i)
            assert 'process 2 (' in error and f'has another {key} than process 0' in error
    assert not launched.checkpoints(workdir) and not launched.metrics(workdir)


@pytest.mark.slow
def test_one_mistake_is_one_line_in_all(folder, tmp_path):
    with Run(folder, tmp_path / 'run', 3, 1, *STEPS) as run:
        assert run.ended() == {0: 2, 1: 2, 2: 2}, run.says()
        for i in range(3):
            (error,) = run.errors(i)
            assert 'batch size 8 is not divisible by the 3 devices' in error
