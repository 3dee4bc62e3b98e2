"""A run of several real processes for tests: tests/tiny.py on simulated devices of this machine."""

import contextlib
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import launched
import xla_flags

ROOT = pathlib.Path(__file__).parents[1]
TINY = (
    '--config.evals.val.batch_size=8', '--config.data.threads=1', '--config.optim.warmup=2',
)  # fmt: skip
# Makes one process stop itself, as SIGSTOP would, when it first calls a function: in the middle of
# a phase, which no signal from outside can be aimed at.
HOOK = """
import importlib.abc, os, signal, sys
where, _, name = os.environ.get('STOP_IN', '').rpartition(':')
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, module, path, target=None):
        if module != where:
            return None
        sys.meta_path.remove(self)
        import importlib.util
        spec = importlib.util.find_spec(module)
        run = spec.loader.exec_module
        def execute(made):
            run(made)
            *owners, last = name.split('.')
            owner = made
            for part in owners:
                owner = getattr(owner, part)
            called = getattr(owner, last)
            def stopping(*args, **kwargs):
                setattr(owner, last, called)
                os.kill(os.getpid(), signal.SIGSTOP)
                return called(*args, **kwargs)
            setattr(owner, last, stopping)
        spec.loader.exec_module = execute
        return spec
if where:
    sys.meta_path.insert(0, Finder())
"""


def free_port():
    with socket.create_server(('localhost', 0)) as server:
        return server.getsockname()[1]


def stopping_in(workdir, where):
    """The environment of a process that stops itself when it first calls 'module:function'."""
    hook = pathlib.Path(f'{workdir}.hook')
    hook.mkdir(exist_ok=True)
    (hook / 'sitecustomize.py').write_text(HOOK)
    return {'PYTHONPATH': f'{hook}:{ROOT}', 'STOP_IN': where}


def is_stopped(process):
    """Whether a process was stopped, by a signal of its own or another's."""
    status = pathlib.Path(f'/proc/{process.pid}/stat').read_text()
    return status.rpartition(')')[2].split()[0] == 'T'


class Run:
    """Processes that train in one workdir, each with its log; all end with the block."""

    def __init__(
        self, folder, workdir, count, devices, *flags, stop_in=(None, ''), only=None, cwd=None,
        config=None,
    ):  # fmt: skip
        """`stop_in` is (process, 'module:function'); of `only` these processes none is missing.

        `cwd` is {process: folder}, where a relative `folder` is another one for each. `config` is
        another file than tests/tiny.py.
        """
        self.workdir, self.count = workdir, count
        self.logs = [pathlib.Path(f'{workdir}.{i}.log') for i in range(count)]
        self.seen = [len(log.read_text()) if log.exists() else 0 for log in self.logs]
        port = free_port()
        file, flags = (config, flags) if config else (launched.TINY, (*TINY, *flags))
        self.processes = {}
        for i in range(count) if only is None else only:
            place = [f'--coordinator=localhost:{port}', f'--num_processes={count}',
                     f'--process_id={i}']  # fmt: skip
            where = stop_in[1] if stop_in[0] == i else ''
            environment = os.environ | stopping_in(workdir, where) | {
                'XLA_FLAGS': xla_flags.devices(devices)
            }  # fmt: skip
            with self.logs[i].open('a') as log:
                self.processes[i] = subprocess.Popen(
                    [sys.executable, '-m', 'vit_jax.main', f'--config={file}:{folder}',
                     f'--workdir={workdir}', *flags, *place],
                    stdout=log, stderr=log, env=environment, cwd=cwd and cwd[i],
                )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()

    def log(self, i):
        """What process i has said in this run."""
        return self.logs[i].read_text()[self.seen[i] :]

    def says(self):
        return '\n'.join(f'process {i}:\n{self.log(i)[-3000:]}' for i in self.processes)

    def errors(self, i):
        """The lines of process i that begin with 'error: '."""
        return re.findall('^error: .*', self.log(i), re.MULTILINE)

    def wait_for(self, condition):
        deadline = time.time() + 200
        while not condition():
            assert all(p.poll() is None for p in self.processes.values()), self.says()
            assert time.time() < deadline, self.says()
            time.sleep(0.05)

    def stopped(self, i):
        """Whether process i was stopped, by a signal of its own or another's."""
        return is_stopped(self.processes[i])

    def ended(self, *but, within=200):
        """{process: exit status} of all but these, once they have ended."""
        deadline = time.time() + within
        found = {}
        for i, process in self.processes.items():
            if i not in but:
                try:
                    found[i] = process.wait(timeout=max(deadline - time.time(), 0.1))
                except subprocess.TimeoutExpired:
                    raise AssertionError(f'process {i} goes on\n{self.says()}') from None
        return found


def finish(folder, workdir, count, devices, *flags, **options):
    """A whole run, in which all processes must end with status 0; `options` are those of `Run`."""
    with Run(folder, workdir, count, devices, *flags, **options) as run:
        statuses = run.ended()
        assert set(statuses.values()) == {0}, run.says()
        return run
