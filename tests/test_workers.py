"""Worker processes: whatever ends, the run is told or ends too, and nothing stays behind."""

import contextlib
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from multiprocessing import shared_memory

import feeds
import launched
import numpy as np
import pytest

from vit_jax.data import memory, pipeline, sources

SCRIPT = """
import multiprocessing, sys, time
from vit_jax import cli
from vit_jax.data import pipeline, sources
from vit_jax.data.tasks import classify

def main(argv):
    source = sources.load(name=argv[1])
    task = classify.classify(source, view='resize', image_size=64)
    feed = pipeline.batches(source, task, 0, batch_size=4, workers=2, threads=1)
    next(feed)
    print(*[p.pid for p in multiprocessing.active_children()], flush=True)
    for _ in feed:
        time.sleep(0.01)
        print('goes on', flush=True)

if __name__ == '__main__':
    cli.run(main)
"""


class Run:
    """A process with two workers, of which it is known that a batch has come."""

    def __init__(self, tmp_path):
        folder = launched.write_images(tmp_path / 'images', {'train': 8, 'val': 1})
        script = tmp_path / 'script.py'
        script.write_text(SCRIPT)
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(folder)], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True, env=os.environ,
            cwd=pathlib.Path(__file__).parent.parent,
        )  # fmt: skip
        self.workers = [int(pid) for pid in self.process.stdout.readline().split()]
        assert len(self.workers) == 2
        maps = pathlib.Path(f'/proc/{self.process.pid}/maps').read_text()
        (self.prefix,) = set(re.findall(r'/dev/shm/(vit_jax-[0-9a-f]+)', maps))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def ended(self, seconds):
        """(exit status, what it said) within so many seconds; all of it is gone then."""
        _, said = self.process.communicate(timeout=seconds)
        end = time.time() + seconds
        while any(alive(pid) for pid in self.workers) or self.left():
            assert time.time() < end, (self.workers, self.left())
            time.sleep(0.1)
        return self.process.returncode, said

    def left(self):
        """This run's shared memory that is still there; other tests have some of their own."""
        return [name for name in self.files() if not name.endswith('.lock')]

    def files(self):
        return [name for name in os.listdir('/dev/shm') if self.prefix in name]


def alive(pid):
    try:
        status = pathlib.Path(f'/proc/{pid}/stat').read_text()
    except OSError:
        return False
    return status.rpartition(')')[2].split()[0] != 'Z'


@pytest.mark.slow
def test_many_cores_have_a_worker_for_every_four_and_the_same_batches(tmp_path, monkeypatch):
    folder = launched.write_images(tmp_path / 'images', {'train': 8, 'val': 1})
    fields = dict(view='inception', image_size=8, batch_size=4)
    source, before = sources.load(name=str(folder)), set(multiprocessing.active_children())
    batches = []
    for cores, workers in ((4, 0), (11, 2)):
        monkeypatch.setattr(pipeline, 'cores', lambda cores=cores: cores)
        feed = feeds.batches(source, 0, **fields)
        batches.append([next(feed) for _ in range(5)])
        assert len(set(multiprocessing.active_children()) - before) == workers
        feed.close()
    for a, b in zip(*batches, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_is_named_within_ten_seconds(tmp_path, number):
    with Run(tmp_path) as run:
        os.kill(run.workers[0], number)
        status, said = run.ended(10)
        line = next(line for line in said.splitlines() if line.startswith('error: '))
        assert status == 2 and 'Traceback' not in said
        assert f'of 2 (process {run.workers[0]}) ended with exit code {-number}' in line
        assert number.name in line


def test_an_error_is_the_last_line(tmp_path):
    """Batches that nobody has taken leave no warning of their shared memory behind it."""
    folder = launched.write_images(tmp_path / 'images', {'train': 8, 'val': 1})
    next((folder / 'train').glob('*/*.png')).write_bytes(b'no image')
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], text=True, capture_output=True, timeout=60,
        cwd=pathlib.Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith('error: '), done.stderr
    assert 'unreadable image' in done.stderr and done.stderr.count('\n') == 1, done.stderr


def test_workers_end_with_a_killed_parent(tmp_path):
    with Run(tmp_path) as run:
        assert run.left()
        os.kill(run.process.pid, signal.SIGKILL)
        assert run.ended(10)[0] == -signal.SIGKILL


@pytest.mark.slow
def test_what_a_killed_group_leaves_is_removed_at_the_next_start(tmp_path):
    """And nothing else: neither of a run that goes on, nor of another program."""
    other = shared_memory.SharedMemory(create=True, size=10)
    try:
        with Run(tmp_path / 'a') as lives, Run(tmp_path / 'b') as killed:
            os.killpg(killed.process.pid, signal.SIGKILL)
            killed.process.wait()
            before = lives.files()
            assert len(killed.files()) > 10 and f'{lives.prefix}.lock' in before
            orphan = 'vit_jax-0123456789abcdef-1'  # made after its run's rest was removed
            pathlib.Path('/dev/shm', orphan).touch()
            memory.sweep()
            files = os.listdir('/dev/shm')
            assert not killed.files() and orphan not in files and other.name in files
            assert {name for name in before if 'sem.' in name or 'lock' in name} <= set(files)
            assert lives.process.poll() is None and lives.process.stdout.readline()
    finally:
        other.unlink()


def spawned(pid):
    """Workers of a process, from their first instruction on."""
    found = []
    with contextlib.suppress(OSError):
        for task in pathlib.Path(f'/proc/{pid}/task').glob('*/children'):
            for child in task.read_text().split():
                if b'spawn_main' in pathlib.Path(f'/proc/{child}/cmdline').read_bytes():
                    found.append(int(child))
    return found


MOMENTS = [(signal.SIGTERM, 0.0)] + [
    pytest.param(number, delay, marks=pytest.mark.slow)
    for number, delay in zip(
        (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) * 2, (0.05, 0.3, 1.0, 4.0, 2.0, 0.5),
        strict=True,
    )
]


@pytest.mark.parametrize('number, delay', MOMENTS)
def test_a_signal_to_the_group_is_for_the_parent_alone(tmp_path, number, delay):
    """Seconds after the first worker began, while the first batch is awaited or later."""
    folder = launched.write_images(tmp_path / 'images', {'train': 8, 'val': 1})
    workdir = tmp_path / 'run'
    process = launched.start(
        folder, workdir, '--config.data.workers=2', '--config.steps=100000', start_new_session=True
    )
    try:
        launched.wait_for(lambda: spawned(process.pid), process, workdir)
        time.sleep(delay)
        os.killpg(process.pid, number)
        status = process.wait(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    said = launched.log_of(workdir).read_text()
    assert status == 128 + number and 'Stopped and saved' in said, said
    assert 'Traceback' not in said and 'error' not in said and launched.checkpoints(workdir)


def test_ctrl_c_ends_all(tmp_path):
    with Run(tmp_path) as run:
        os.killpg(run.process.pid, signal.SIGINT)  # a terminal sends it to the whole group
        status, said = run.ended(10)
        assert status == 130 and 'interrupted' in said


IN_A_DESTRUCTOR = """
import os, signal, time
from vit_jax import cli

class Array:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

def main(argv):
    Array()
    time.sleep(60)

if __name__ == '__main__':
    cli.run(main)
"""


@pytest.mark.parametrize('before', ['', 'from vit_jax.run import orbax_errors'])
def test_ctrl_c_within_a_destructor_is_not_lost(before, tmp_path):
    script = tmp_path / 'script.py'
    silence = '    orbax_errors.silence_repeats()\n' * 2 if before else ''
    text = IN_A_DESTRUCTOR.replace('    Array()\n', f'{silence}    Array()\n')
    script.write_text(f'{before}\n{text}')
    done = subprocess.run(
        [sys.executable, str(script)], text=True, capture_output=True, timeout=30,
        cwd=pathlib.Path(__file__).parent.parent, env=os.environ | {'PYTHONPATH': '.'},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, 'interrupted\n')


STARTING = """
import os, signal, threading, time
from vit_jax.data.workers import ignore_signals

go = threading.Event()

def other():
    go.wait()
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)

threading.Thread(target=other).start()
try:
    with ignore_signals():
        go.set()
        for _ in range(20):  # this thread has blocked the signal, the other one not
            time.sleep(0.01)
        print('started', flush=True)
except KeyboardInterrupt:
    print('interrupted')
"""


def test_a_signal_to_another_thread_does_not_leave_a_process_half_started():
    done = subprocess.run([sys.executable, '-c', STARTING], capture_output=True, text=True)
    assert done.stdout.split() == ['started', 'interrupted'], done.stderr
