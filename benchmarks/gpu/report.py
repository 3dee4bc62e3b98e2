"""What the scripts for GPUs share: their arguments, a budget of seconds, one JSON file.

They import jax, flax, optax, orbax and numpy, and what these need; peers also torch and timm.
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import re
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

BEGAN = time.monotonic()
# Of JAX and torch, which share a GPU: each takes memory as it needs it.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')


def arguments(description: str, **more: Any) -> argparse.Namespace:
    """Arguments of a script; `more` are further ones, {name: those of add_argument}."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', default='gpu.json', help='JSON file to write')
    parser.add_argument('--seconds', type=float, default=225, help='of the script in all')
    parser.add_argument('--only', default='', help='regular expression of the cases to run')
    parser.add_argument('--small', action='store_true', help='tiny sizes; always so on CPUs')
    for name, settings in more.items():
        parser.add_argument(f'--{name}', **settings)
    return parser.parse_args()


class Report:
    """Results of a script, written to its file as each comes, and the seconds that are left.

    When these are over, a timer writes what is there, kills the processes in `children` and ends
    this one with status 3.
    """

    def __init__(self, options: argparse.Namespace):
        self.path, self.only = pathlib.Path(options.out), options.only
        self.seconds = options.seconds
        self.results = {'command': ' '.join(sys.argv), 'cases': {}, 'skipped': {}, 'bars': {}}
        self.children, self.current = [], []
        self.lock = threading.RLock()  # cases may run in several threads
        self.timer = threading.Timer(max(self.left(), 0.0), self.cut)
        self.timer.daemon = True
        self.timer.start()

    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - BEGAN)

    def wants(self, name: str, needed: float = 15) -> bool:
        """Whether a case is asked for and has `needed` seconds; if not, the file says why."""
        if not re.search(self.only, name):
            reason = 'not asked for by --only'
        elif self.left() < needed:
            reason = f'{max(self.left(), 0):.0f} s were left'
        else:
            return True
        self.skip(name, reason)
        return False

    def skip(self, name: str, reason: str) -> None:
        """Notes why a case has no result."""
        with self.lock:
            self.results['skipped'][name] = reason
            self.write()

    def add(self, name: str, **result: Any) -> None:
        """Writes the result of a case."""
        with self.lock:
            self.results['cases'][name] = rounded(result)
            self.results['skipped'].pop(name, None)
            self.write()
        print(name, json.dumps(rounded(result)), flush=True)

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[None]:
        """Context of a case, which is skipped with the first line of an error that it raises."""
        self.current.append(name)
        try:
            yield
        except Exception as e:
            self.skip(name, f'{type(e).__name__}: {first_line(e)}')
            print(name, self.results['skipped'][name], flush=True)
        finally:
            self.current.remove(name)

    def bar(self, name: str, wanted: float, found: float | None) -> None:
        """Notes whether a figure reaches what is wanted; None: it was not measured."""
        met = None if found is None else found >= wanted
        self.results['bars'][name] = rounded(dict(wanted=wanted, found=found, met=met))
        self.write()

    def write(self) -> None:
        with self.lock:
            self.results['seconds'] = round(time.monotonic() - BEGAN, 1)
            beside = self.path.with_name(self.path.name + '.partial')
            beside.write_text(json.dumps(self.results, indent=1) + '\n')
            os.replace(beside, self.path)

    def cut(self) -> None:
        for name in self.current:
            self.skip(name, 'it was not finished when the seconds were over')
        self.write()
        self.kill()
        print(f'{self.seconds:.0f} s are over; the results are in {self.path}', flush=True)
        os._exit(3)

    def kill(self) -> None:
        """Ends the processes in `children` with all that they started."""
        for process in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def end(self) -> int:
        """Writes the file for the last time; returns the exit status, 1 if a case failed."""
        self.timer.cancel()
        self.kill()
        self.write()
        cases, skipped = self.results['cases'], self.results['skipped']
        failed = [n for n, c in cases.items() if c.get('ok') is False]
        failed += [n for n, why in skipped.items() if re.match(r'\w+(Error|Exception|Exit):', why)]
        print(f'{len(cases)} cases, {len(failed)} failed, {len(skipped)} skipped; {self.path}')
        for name, bar in self.results['bars'].items():
            print(f'{name}: {bar["found"]} of {bar["wanted"]}')
        return 1 if failed else 0


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [''])[0][:300]


def rounded(value: Any) -> Any:
    """The same with numbers of four significant digits, for JSON, which has no infinite ones."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f'{value:.4g}') if math.isfinite(value) else str(value)
    return value


def turns(runs: Iterable[Callable[[], float]], rounds: int) -> tuple[list[float], ...]:
    """Results of functions that take turns, in the other order every second round."""
    runs = list(runs)
    found = [[] for _ in runs]
    for n in range(rounds):
        for i in range(len(runs))[:: -1 if n % 2 else 1]:
            found[i].append(runs[i]())
    return tuple(found)


def spread(values: list[float]) -> float:
    """Range of values relative to their median."""
    return (max(values) - min(values)) / statistics.median(values)
