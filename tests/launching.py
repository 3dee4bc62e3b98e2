"""A machine on which launch.sh calls stand-ins (stand_ins.py), and what it said and did there."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import launched

ROOT = pathlib.Path(__file__).parents[1]
EXPERIMENT = 'experiments/digits.py'
TPU = ('tpu', '--name=t', '--zone=z')
GKE = ('gke', '--image=i/vit:1', '--topology=4x4x8')
NAMES = ('gcloud', 'sbatch', 'srun', 'squeue', 'scancel', 'scontrol', 'kubectl')


class Place:
    """Programs, their state and the workdir of one test."""

    def __init__(self, folder):
        self.folder = folder / 'stand_in'
        self.workdir = folder / 'run'
        self.started = []
        programs = folder / 'bin'
        self.folder.mkdir()
        programs.mkdir()
        for name in (*NAMES, 'python_stand_in'):
            program = programs / name
            action = name.removesuffix('_stand_in')
            program.write_text(
                f'#!/bin/sh\nexec {sys.executable} -S {ROOT}/tests/stand_ins.py {action} "$@"\n'
            )
            program.chmod(0o755)
        self.environment = launched.ENVIRONMENT | dict(
            PATH=f'{programs}:{os.environ["PATH"]}', STAND_IN=str(self.folder), VIT_JAX_POLL='0.2',
            VIT_JAX_PYTHON=str(programs / 'python_stand_in'),
        )  # fmt: skip

    def fail(self, **how):
        (self.folder / 'fails.json').write_text(json.dumps(how))

    def put(self, name, text):
        (self.folder / name).write_text(text)

    def start(self, *words):
        process = subprocess.Popen(
            ['bash', str(ROOT / 'launch.sh'), *words], env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def launch(self, *words):
        """Exit status, output, errors."""
        return finish(self.start(*words))

    def run(self, command, *words):
        return self.launch(*command, f'--workdir={self.workdir}', EXPERIMENT, *words)

    def calls(self, *begin):
        """The calls that have these words, in this order."""
        path = self.folder / 'calls.jsonl'
        calls = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
        return [c for c in calls if [w for w in c if w in begin] == list(begin)]

    def signals(self, process):
        path = self.folder / f'signals_{process}'
        return [int(x) for x in path.read_text().split()] if path.exists() else []

    def trainers(self):
        """Processes of the stand-in that trains that are running now."""
        pids = [int(p.read_text()) for p in self.folder.glob('*.pid')]
        return [p for p in pids if pathlib.Path(f'/proc/{p}').exists()]

    def clear(self):
        """Ends what a test that failed has left."""
        for process in self.started:
            process.terminate()
            process.wait()
        for pid in self.trainers():
            os.kill(pid, signal.SIGKILL)

    def wait(self, condition):
        deadline = time.time() + 120
        while not condition():
            assert time.time() < deadline
            time.sleep(0.02)


def finish(process):
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors


def assert_one_line(errors, *words):
    lines = [x for x in errors.splitlines() if not x.startswith('#')]
    assert len(lines) == 1 and lines[0].startswith('error: '), errors
    for word in words:
        assert word in lines[0], errors


def said(output):
    """What the runs said, without what launch.sh says of them."""
    return [line for line in output.splitlines() if not line.startswith('#')]


def runs(place):
    """What each process was told to train, in all."""
    return [c[c.index('vit_jax.main') + 1 :] for c in place.calls('python', 'vit_jax.main')]


@contextlib.contextmanager
def held(folder):
    """A Place in which nothing runs afterwards."""
    place = Place(folder)
    try:
        yield place
    finally:
        place.clear()
