"""A process that builds and times programs for a script, asked by lines of JSON.

JAX and torch have one each, so that a program that fails or hangs ends its own process alone.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any


class Ended(Exception):
    """A worker did not answer in time, or has ended."""


class Worker:
    """The script's end of a worker, which is started at once and given up when it is silent."""

    def __init__(self, report: Any):
        self.report = report
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'benchmarks.gpu.worker'],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        report.children.append(self.process)

    def send(self, **request: Any) -> None:
        """Sends a request whose answer `receive` returns."""
        try:
            self.process.stdin.write(json.dumps(request) + '\n')
            self.process.stdin.flush()
        except OSError as e:
            raise Ended(f'the worker ended with status {self.process.wait()}') from e

    def receive(self, spare: float = 2) -> dict[str, Any]:
        """Waits for an answer until the script has `spare` seconds left, and then ends the process.

        Raises Ended, or what went wrong.
        """
        seconds = max(self.report.left() - spare, 0)
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        if not ready:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise Ended(f'not finished when {spare:.0f} s were left')
        line = self.process.stdout.readline()
        if not line:
            raise Ended(f'the worker ended with status {self.process.wait()}')
        answer = json.loads(line)
        if 'error' in answer:
            raise RuntimeError(answer['error'])
        return answer

    def ended(self) -> bool:
        return self.process.poll() is not None

    def ask(self, **request: Any) -> dict[str, Any]:
        self.send(**request)
        return self.receive()


def answer(request: dict[str, Any], built: dict[str, Any]) -> dict[str, Any]:
    """Does what a request says: {facts}, {build, name, settings, seconds}, {turn} or {drop}.

    `build` is one of programs.BUILDERS; turns are of so many seconds, and of two runs at least.
    """
    from benchmarks.gpu import programs

    if 'facts' in request:
        return programs.facts()
    if 'drop' in request:
        built.pop(request['drop'], None)
        programs.release()
        return {}
    if 'turn' in request:
        program, n = built[request['turn']]
        began = time.perf_counter()
        program.run(n)
        return {'seconds': (time.perf_counter() - began) / n, 'n': n}
    began = time.perf_counter()
    program = programs.BUILDERS[request['build']](**request['settings'])
    program.run(1)
    compiled = time.perf_counter() - began
    program.run(2)  # of small programs the first runs are slower
    began = time.perf_counter()
    program.run(2)
    seconds = (time.perf_counter() - began) / 2
    built[request['name']] = program, max(2, round(request['seconds'] / seconds))
    return {
        'build_s': compiled, 'flops': program.flops, 'memory': program.memory,
        **({'note': program.note} if program.note else {}),
    }  # fmt: skip


def main() -> None:
    out = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print is no answer
    built = {}
    for line in sys.stdin:
        try:
            found = answer(json.loads(line), built)
        except Exception as e:
            text = (str(e).strip().splitlines() or [''])[0][:300]
            found = {'error': f'{type(e).__name__}: {text}'}
        print(json.dumps(found), file=out, flush=True)


if __name__ == '__main__':
    from benchmarks.gpu import report as _  # noqa: F401 - sets how memory is taken

    main()
