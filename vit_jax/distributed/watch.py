"""The watch over the processes of a run: ends all of them if one is lost."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax

from vit_jax.distributed.clusters import Place
from vit_jax.distributed.coordinator import find_mismatch
from vit_jax.errors import Lost, UserError, refusal
from vit_jax.io import streams

EXIT_STATUS = 4  # if another process was lost
LONG_PHASES = ('start', 'restore', 'compile', 'save')  # limited by `start_timeout`
HEARTBEATS, ERRORS, FACTS = 'vit_jax/heartbeat', 'vit_jax/error', 'vit_jax/facts'  # in the store


class Watch:
    """Exchanges heartbeats with the other processes and ends this one if another is lost.

    Attributes:
      interval: seconds between heartbeats.
      limit: seconds without a heartbeat after which a process is lost; a little less than the
        timeout, so that all processes end within it.
      heartbeat: that of this process. `phases` counts the phases that it has begun.
      heartbeats: {process: its newest heartbeat}.
      last_report: {process: time.monotonic() when its newest heartbeat was read}.
      waited_since: {(process, phases): time.monotonic() when others had begun a later phase}.
    """

    def __init__(self, place: Place, timeout: float, start_timeout: float):
        self.place, self.timeout, self.start_timeout = place, timeout, start_timeout
        self.interval = min(2, timeout / 12)
        self.limit = timeout - 5 * self.interval
        self.heartbeat = {'phases': 0, 'phase': 'start', 'host': socket.gethostname(), 'number': 0}
        self.heartbeats = {}
        self.last_report, self.waited_since = {}, {}
        self.failing = self.finished = False
        self.client = None
        self.abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self.handle_abort)
        ctypes.CDLL(None).signal(signal.SIGABRT, self.abort_handler)

    def set_phase(self, phase: str) -> None:
        """Records that this process begins a phase, and reports a long one at once."""
        self.heartbeat |= {'phases': self.heartbeat['phases'] + 1, 'phase': phase}
        if phase.startswith(LONG_PHASES):
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self.write(HEARTBEATS, self.heartbeat)

    def start(self, client: Any) -> None:
        """Starts to exchange heartbeats by a client of the key-value store."""
        self.client = client
        now = time.monotonic()
        self.last_report = {i: now for i in range(self.place.processes)}
        for work in (self.exchange, self.monitor):
            threading.Thread(target=work, daemon=True).start()

    def agree(self, facts: dict[str, Any]) -> None:
        """Raises UserError in all processes if the facts of one differ from those of process 0."""
        self.set_phase('start, data compared')
        self.write(FACTS, {'host': self.heartbeat['host'], 'facts': facts})
        self.client.wait_at_barrier('vit_jax/agree', 1000 * self.start_timeout)
        records = self.read(FACTS)
        for i in sorted(records):
            if mismatch := find_mismatch(records[0], {'process': i, **records[i]}):
                raise UserError(mismatch)

    def exchange(self) -> None:
        """Thread that writes this process's heartbeat and reads those of the others.

        It blocks only on process 0, which has the store; `monitor` detects that.
        """
        while not self.finished:
            self.heartbeat['number'] += 1
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self.write(HEARTBEATS, self.heartbeat)
                records = self.read(HEARTBEATS)
                for i, error in self.read(ERRORS).items():
                    records[i] = records.get(i, self.unknown()) | {'error': error}
                now = time.monotonic()
                for i, record in records.items():
                    if record != self.heartbeats.get(i):
                        self.last_report[i] = now
                self.last_report[0] = now  # its store has answered
                self.heartbeats = records
            time.sleep(self.interval)

    def write(self, folder: str, record: dict[str, Any]) -> None:
        """Writes this process's record into a folder of the store."""
        key = f'{folder}/{self.place.process}'
        self.client.key_value_set(key, json.dumps(record), allow_overwrite=True)

    def read(self, folder: str) -> dict[int, dict[str, Any]]:
        """{process: record} of the processes that have a record in a folder of the store."""
        pairs = self.client.key_value_dir_get(folder)
        return {int(key.rpartition('/')[2]): json.loads(value) for key, value in pairs}

    def monitor(self) -> None:
        """Thread that ends this process as soon as another one is lost."""
        before = time.monotonic()
        while not self.finished:
            time.sleep(self.interval / 2)
            now = time.monotonic()
            if now - before > 3 * self.interval:  # this process itself was suspended
                self.last_report = {i: t + now - before for i, t in self.last_report.items()}
                self.waited_since = {}
            before = now
            if not self.failing and not self.finished and (loss := self.find_loss(now)):
                self.end_after(*loss)

    def find_loss(self, now: float) -> tuple[str, int] | None:
        """(message, exit status) if another process is lost at a time, else None."""
        for i, record in self.heartbeats.items():
            if 'error' in record and i != self.place.process:
                return record['error']['message'], record['error']['status']
        limit = self.limit if not self.failing else 3 * self.interval
        for i, last in self.last_report.items():
            if now - last > limit:
                return self.last_seen(i, f'has not reported for {now - last:.0f} s'), EXIT_STATUS
        records = self.heartbeats | {self.place.process: self.heartbeat}
        newest = max(record['phases'] for record in records.values())
        for i, record in records.items():
            if record['phases'] == newest:
                continue
            waited = now - self.waited_since.setdefault((i, record['phases']), now)
            is_long = record['phase'].startswith(LONG_PHASES)
            if waited > (self.start_timeout if is_long else self.limit):
                return (
                    f'the others have waited {waited:.0f} s for {self.name(i)}, which is in phase: '
                    f'{self.phase(i)}'
                ), EXIT_STATUS
        return None

    def name(self, i: int) -> str:
        """Names a process in a message, with its host."""
        own = i == self.place.process
        record = self.heartbeat if own else self.heartbeats.get(i, self.unknown())
        return f'process {i} of {self.place.processes} ({record["host"]})'

    def phase(self, i: int) -> str:
        """The last phase that a process has reported."""
        return self.heartbeats.get(i, self.unknown())['phase']

    def last_seen(self, i: int, problem: str) -> str:
        """Message of a problem with a process and its last phase."""
        return f'{self.name(i)} {problem}; its last phase: {self.phase(i)}'

    def unknown(self) -> dict[str, Any]:
        """Heartbeat that stands for that of a process which has not reported."""
        return {'phases': 0, 'phase': 'start', 'host': 'unknown host'}

    def end_after(self, message: str, status: int) -> NoReturn:
        """Ends this process because another is lost; process 0, which has the store, is last."""
        if self.place.process == 0:
            self.report_error(message, status)
        self.exit(message, status)

    def report_error(self, message: str, status: int) -> None:
        """Writes an error to the store; process 0 waits until the others have read it."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.write(ERRORS, {'status': status, 'message': message[:2000]})
        if self.place.process == 0:
            time.sleep(3 * self.interval)

    def exit(self, message: str, status: int) -> NoReturn:
        """Prints an error and ends this process at once, whatever its other threads do."""
        if sys.stdout.isatty():
            sys.stdout.write('\x1b[?25h')  # shows the cursor, which the progress bar hides
        sys.stdout.flush()
        sys.stderr.flush()
        if status == EXIT_STATUS:
            message += '; saved checkpoints are intact, and the same command resumes from them'
        streams.write_error(f'\nerror: {message}\n')
        os._exit(status)

    def handle_abort(self, signum: int) -> None:
        """Handles SIGABRT: reports a lost process if there is one, and else aborts.

        XLA's threads abort if process 0 is gone, and may if another process left a collective.
        """
        self.failing = True
        deadline = time.monotonic() + 5 * self.interval
        while not self.finished and time.monotonic() < deadline:
            if not self.is_coordinator_there():
                self.exit(self.last_seen(0, 'no longer listens at its port'), EXIT_STATUS)
            if loss := self.find_loss(time.monotonic()):
                self.end_after(*loss)
            time.sleep(self.interval / 2)
        ctypes.CDLL(None).signal(signum, None)  # the default
        os.kill(os.getpid(), signum)

    def is_coordinator_there(self) -> bool:
        """Whether something listens at process 0's port."""
        try:
            socket.create_connection(self.place.address(), 2).close()
        except OSError:
            return False
        return True

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process after `error`, with the message of a lost process if that is the cause.

        If a process leaves a collective, the collective fails in all others before they detect that
        it does not report.
        """
        self.failing = True
        is_cause = isinstance(error, (UserError, Lost))
        if is_cause:
            message, status = str(error), 2 if isinstance(error, UserError) else EXIT_STATUS
        elif (message := refusal(error)) is not None:
            is_cause, status = True, 2
        else:
            traceback.print_exception(error)
            message, status = f'{type(error).__name__}: {error}', 1
        deadline = time.monotonic() + 5 * self.interval
        while not is_cause and time.monotonic() < deadline:
            if loss := self.find_loss(time.monotonic()):
                self.end_after(*loss)
            time.sleep(self.interval / 2)
        self.report_error(f'{self.name(self.place.process)}: {message}', status)
        self.exit(message, status)

    def finish(self) -> None:
        """Waits until all processes have reached the end, and shuts down."""
        self.set_phase('end')
        self.client.wait_at_barrier('vit_jax/end', 1000 * self.start_timeout)
        self.finished = True
        jax.distributed.shutdown()
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
