"""Worker processes: whatever ends, the run is told or ends too, and nothing stays behind."""

import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import launched
import numpy as np
import pytest

from vit_jax.data import pipeline, sources

SCRIPT = """
import multiprocessing, sys, time
from vit_jax import cli
from vit_jax.data import pipeline, sources

def main(argv):
    feed = pipeline.batches(
        sources.load(name=argv[1]), 0, view='resize', image_size=64, batch_size=4, workers=2,
        threads=1,
    )
    next(feed)
    print(*[p.pid for p in multiprocessing.active_children()], flush=True)
    for _ in feed:
        time.sleep(0.01)

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
        self.segments = set(re.findall(r'/dev/shm/(psm_\w+)', maps))

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
        return self.segments & set(os.listdir('/dev/shm'))


def alive(pid):
    try:
        status = pathlib.Path(f'/proc/{pid}/stat').read_text()
    except OSError:
        return False
    return status.rpartition(')')[2].split()[0] != 'Z'


def test_many_cores_have_a_worker_for_every_four_and_the_same_batches(tmp_path, monkeypatch):
    folder = launched.write_images(tmp_path / 'images', {'train': 8, 'val': 1})
    fields = dict(view='inception', image_size=8, batch_size=4)
    source, before = sources.load(name=str(folder)), set(multiprocessing.active_children())
    batches = []
    for cores, workers in ((4, 0), (11, 2)):
        monkeypatch.setattr(pipeline, 'cores', lambda cores=cores: cores)
        feed = pipeline.batches(source, 0, **fields)
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


def test_workers_end_with_a_killed_parent(tmp_path):
    with Run(tmp_path) as run:
        assert run.left()
        os.kill(run.process.pid, signal.SIGKILL)
        assert run.ended(10)[0] == -signal.SIGKILL


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


def test_ctrl_c_within_a_destructor_is_not_lost(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(IN_A_DESTRUCTOR)
    done = subprocess.run(
        [sys.executable, str(script)], text=True, capture_output=True, timeout=30,
        cwd=pathlib.Path(__file__).parent.parent, env=os.environ | {'PYTHONPATH': '.'},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, 'interrupted\n')
