"""Runs that are killed, stopped, disturbed: real processes, real signals, real files."""

import json
import random
import re
import signal
import subprocess
import time

import in_process
import launched
import processes
import pytest

from vit_jax.errors import UserError

STEPS, BATCH = 60, 32
# Steps that take long enough for a signal to come between two of them.
SLOW = (f'--config.data.batch_size={BATCH}', '--config.model.width=64', '--config.model.depth=6')


def start(folder, workdir, *flags, **options):
    return launched.start(folder, workdir, *SLOW, *flags, **options)


def finish(folder, workdir, *flags):
    return launched.finish(folder, workdir, *SLOW, *flags)


def command(folder, workdir, *flags):
    return launched.command(folder, workdir, *SLOW, *flags)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return launched.write_images(tmp_path_factory.mktemp('images'), {'train': 16, 'val': 40})


@pytest.fixture(scope='module')
def whole(folder, tmp_path_factory):
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    status, output = finish(folder, workdir)
    assert status == 0, output
    return workdir


def assert_as_undisturbed(workdir, whole):
    """Parameters, optimizer, average and every metric of every step, bit by bit."""
    assert launched.checkpoints(workdir)[-1] == STEPS
    launched.assert_same_bits(launched.state(workdir, STEPS), launched.state(whole, STEPS))
    lines = launched.timeless(whole)
    assert [line['step'] for line in lines if 'loss' in line] == list(range(1, STEPS + 1))
    assert len([line for line in lines if 'val/loss' in line]) == STEPS // 20
    assert launched.timeless(workdir) == lines
    results = [json.loads((w / 'result.json').read_text()) for w in (workdir, whole)]
    assert all(r['steps'] == STEPS and r['examples_seen'] == BATCH * STEPS for r in results)
    assert results[0]['metrics']['val/loss'] == results[1]['metrics']['val/loss']


@pytest.mark.slow
def test_learns_and_reports(whole):
    lines = launched.timeless(whole)
    losses = [line['loss'] for line in lines if 'loss' in line]
    assert losses[-1] < 0.7 * losses[0]
    assert lines[-1]['val/examples'] == 120 and lines[-1]['val/accuracy'] > 0.6
    result = json.loads((whole / 'result.json').read_text())
    assert result['device_kind'] == 'cpu' and result['device_count'] == 1
    assert result['versions']['jax'] and result['images_per_s'] > 0 and result['seconds'] > 0


@pytest.mark.slow
def test_killed_at_random_moments(folder, whole, tmp_path):
    workdir, seed = tmp_path / 'run', time.time_ns()
    rng = random.Random(seed)
    print('seed', seed)
    killed_in_save = False
    for attempt in range(8):
        if attempt >= 4 and killed_in_save:
            break
        process = start(folder, workdir)
        done = launched.last_step(workdir)
        if attempt % 2:  # as soon as a checkpoint is being written
            old = set(launched.unfinished(workdir))
            launched.wait_for(lambda: set(launched.unfinished(workdir)) - old, process, workdir)  # noqa: B023
        else:
            target = min(done + rng.randint(1, 12), STEPS - 1)
            launched.wait_for(lambda: launched.last_step(workdir) >= target, process, workdir)  # noqa: B023
            time.sleep(rng.random() * 0.05)
        assert launched.kill(process) == -signal.SIGKILL
        killed_in_save |= bool(launched.unfinished(workdir))
    assert killed_in_save
    status, output = finish(folder, workdir)
    assert status == 0, output
    assert_as_undisturbed(workdir, whole)
    assert not launched.unfinished(workdir)


# Where a run stops itself, to be sent a signal there: {phase: (function, signal, exit status)}
PHASES = {
    'compile': ('vit_jax.step:compiled', signal.SIGTERM, 143),
    'step': ('vit_jax.run.report:Report.write', signal.SIGINT, 130),
    'save': ('vit_jax.run.checkpoint:Checkpoints.save', signal.SIGINT, 130),
    'evaluation': ('vit_jax.evaluators.classify:Classify.__call__', signal.SIGTERM, 143),
}


def stop_in(phase, folder, workdir, start=start):
    """Starts the run and sends it a signal in a phase; returns the step that it has saved."""
    where, signum, status = PHASES[phase]
    process = start(folder, workdir, environment=processes.stopping_in(workdir, where))
    try:
        launched.wait_for(lambda: processes.is_stopped(process), process, workdir)
        before = launched.last_step(workdir)
        process.send_signal(signum)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=100) == status
    finally:
        launched.kill(process)
    output = launched.log_of(workdir).read_text()
    assert 'Traceback' not in output and 'give the same command again' in output
    saved = launched.checkpoints(workdir)[-1]
    assert before <= saved < STEPS and not launched.unfinished(workdir)
    assert saved == launched.last_step(workdir) > 0  # nothing was trained that was not saved
    if phase == 'evaluation':  # cut short, to be made again
        assert saved == 20 and not any('val/loss' in x for x in launched.metrics(workdir))
    return saved


def test_a_signal_saves_and_says_how_to_resume(folder, tmp_path):
    stop_in('evaluation', folder, tmp_path / 'run', launched.start)


@pytest.mark.slow
def test_a_run_that_is_stopped_in_every_phase_is_as_undisturbed(folder, whole, tmp_path):
    workdir = tmp_path / 'run'
    for phase in PHASES:
        saved = stop_in(phase, folder, workdir)
    assert finish(folder, workdir)[0] == 0
    assert f'resumed at step {saved}' in launched.log_of(workdir).read_text()
    assert_as_undisturbed(workdir, whole)


@pytest.mark.slow
def test_two_runs_in_one_workdir(folder, whole, tmp_path):
    workdir = tmp_path / 'run'
    first = start(folder, workdir)
    launched.wait_for(lambda: launched.last_step(workdir) >= 1, first, workdir)
    second = subprocess.run(
        command(folder, workdir), capture_output=True, text=True, env=launched.ENVIRONMENT
    )
    assert second.returncode == 2 and second.stderr.count('\n') == 1, second.stderr
    assert f'in use by another run (process {first.pid})' in second.stderr
    assert first.wait(timeout=60) == 0
    assert_as_undisturbed(workdir, whole)


@pytest.mark.slow
def test_a_loss_that_is_no_number(folder, tmp_path):
    workdir = tmp_path / 'run'
    flags = ('--config.optim.lr=1e30', '--config.optim.clip=1e30', '--config.checkpoint.every=1')
    status, output = finish(folder, workdir, *flags)
    assert status == 3
    line = output.splitlines()[-1]
    step = launched.last_step(workdir)
    last = launched.metrics(workdir)[-1]
    assert last['step'] == step and None in (last['loss'], last['grad_norm'], last['param_norm'])
    for words in (f'step {step}: not finite', 'gradient norm', 'learning rate', 'example ids'):
        assert words in line
    ids = line.rpartition(': ')[2].split()
    assert len(ids) == BATCH and all(0 <= int(i) < 48 for i in ids)
    assert launched.checkpoints(workdir)[-1] < step
    for array in launched.state(workdir, launched.checkpoints(workdir)[-1]).values():
        assert abs(array.astype('float64')).max() < float('inf')


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_saved(folder, tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    workdir = disk / 'run'  # in a file system of 9 MB that only this process sees
    train = ' '.join(map(str, command(folder, workdir, '--config.checkpoint.keep=9')))
    script = (
        f'mount -t tmpfs -o size=9m tmpfs {disk} && {train}; echo status $?; '
        f'ls {workdir}/checkpoints; cp -r {workdir} {tmp_path}/kept'
    )
    done = subprocess.run(
        ['unshare', '--map-root-user', '--mount', 'sh', '-c', script],
        capture_output=True, text=True, env=launched.ENVIRONMENT,
    )  # fmt: skip
    assert 'status 2' in done.stdout, done.stdout + done.stderr
    assert 'No space left on device; what was saved before is unchanged' in done.stderr
    assert 'Traceback' not in done.stderr
    kept = launched.checkpoints(tmp_path / 'kept')
    assert kept and kept[0] == 7
    status, output = finish(folder, tmp_path / 'kept')  # with room, it goes on from there
    assert status == 0 and f'resumed at step {kept[-1]}' in output


REFUSALS = {  # of the next save: what makes it, and the system's words
    'a file in its place': (
        'until mv -T {0} {0}.$RANDOM && : > {0}; do :; done',
        '(Not a directory|No such file or directory)',
    ),
    'immutable': ('chattr +i {0}', 'Operation not permitted'),
}


@pytest.mark.slow
@pytest.mark.parametrize('how', REFUSALS)
def test_a_refused_save_ends_the_run_at_once(how, folder, tmp_path):
    workdir = tmp_path / 'run'
    command, words = REFUSALS[how]
    process = launched.start(folder, workdir, '--config.steps=6000')
    launched.wait_for(lambda: launched.checkpoints(workdir), process, workdir)
    try:
        done = subprocess.run(['bash', '-c', command.format(workdir / 'checkpoints')])
        if done.returncode:
            pytest.skip('chattr is not allowed here')
        status = process.wait(timeout=150)  # Orbax' own threads would wait for 300 s
    finally:
        launched.kill(process)
        subprocess.run(['chattr', '-i', workdir / 'checkpoints'], capture_output=True)
    output = launched.log_of(workdir).read_text()
    assert status == 2 and 'Traceback' not in output, output
    assert 'Error' not in output and 'never awaited' not in output, output
    assert re.search(f'^error: cannot write .*{workdir}/checkpoints.*: {words}', output, re.M)


@pytest.mark.slow
@pytest.mark.parametrize('what', ['', 'metrics.jsonl'])
def test_a_run_whose_files_are_removed_says_so(what, folder, tmp_path):
    workdir = tmp_path / 'run'
    process = launched.start(folder, workdir, '--config.steps=6000')
    try:
        launched.wait_for(lambda: launched.last_step(workdir) > 9, process, workdir)
        subprocess.run(['rm', '-rf', workdir / what])
        status = process.wait(timeout=150)
    finally:
        launched.kill(process)
    output = launched.log_of(workdir).read_text()
    assert status == 2 and 'Traceback' not in output, output
    last = output.splitlines()[-1]
    assert f'error: {workdir}/metrics.jsonl was removed' in last or not what and (
        f'error: cannot write checkpoint {workdir}' in last  # where it was being written
    )


@pytest.mark.slow
@pytest.mark.parametrize('inodes', [160, 180])  # more, and the refusal comes later in a save
def test_no_inodes_left_for_a_save(inodes, folder, tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    train = ' '.join(
        map(str, launched.command(folder, disk / 'run', '--config.checkpoint.keep=9999'))
    )
    mounted = f'mount -t tmpfs -o size=90m,nr_inodes={inodes} tmpfs {disk}'
    done = subprocess.run(
        ['unshare', '--map-root-user', '--mount', 'sh', '-c', f'{mounted} && {train}; echo $?'],
        capture_output=True, text=True, env=launched.ENVIRONMENT, timeout=250,
    )  # fmt: skip
    assert done.stdout.endswith('\n2\n') and done.stderr.count('\n') == 1, done.stderr
    assert 'No space left on device' in done.stderr


def test_a_folder_that_can_not_be_written(folder, tmp_path):
    (tmp_path / 'file').write_text('')
    words = f'cannot write to workdir {tmp_path}/file/run: Not a directory'
    with pytest.raises(UserError, match=words):
        in_process.run(folder, tmp_path / 'file' / 'run')
