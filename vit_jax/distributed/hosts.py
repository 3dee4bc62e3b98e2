"""Joins several processes into one run and ends all of them if one is lost.

All connect to process 0 at one port: first by a plain socket, which can tell which processes are
missing, then by jax.distributed. In its key-value store each process regularly writes a heartbeat
with its phase. A process that stops reporting, or that others wait for too long, ends all.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback

import jax
from jax._src import distributed  # its key-value store has no public name

import vit_jax
from vit_jax.distributed.rendezvous import meet, mistake
from vit_jax.errors import Lost, UserError, refusal
from vit_jax.io import streams

STATUS = 4  # exit status if another process was lost
LONG = ('start', 'restore', 'compile', 'save')  # phases in which a process may take much longer
BEATS, ENDS, FACTS = 'vit_jax/beat', 'vit_jax/end', 'vit_jax/facts'


def facts(settings):
    """{name: value} that must be equal in all processes of a run."""
    text = json.dumps(settings.to_dict(), sort_keys=True, default=str)
    return {
        'vit_jax': vit_jax.__version__, 'jax': jax.__version__,
        'config': hashlib.sha256(text.encode()).hexdigest()[:12],
    }  # fmt: skip


def expect(place, processes):
    """Raises UserError unless the run has `processes` processes (None: any number)."""
    found = place.processes if place else 1
    if processes not in (None, found):
        raise UserError(
            f'--expect_processes is {processes}, but this is one of {found}; several are found by '
            'the variables of SLURM, Open MPI or a TPU, or by --coordinator, --num_processes and '
            '--process_id'
        )


def expect_devices(devices):
    """Raises UserError unless all processes together have `devices` devices (None: any number)."""
    if devices not in (None, jax.device_count()):
        raise UserError(
            f'--expect_devices is {devices}, but there are {jax.device_count()}: '
            f'{jax.local_device_count()} here, of {jax.process_count()} processes'
        )


@contextlib.contextmanager
def joined(place, facts, *, timeout, start_timeout):
    """Joins this process to a run until all processes reach the end of the block.

    If the block raises, all processes end with its message, this one at once, as an orderly exit
    would wait for the others.

    Args:
      place: clusters.Place of this process. None: it is the only one.
      facts: {name: value} that must be equal in all processes before anything is read.
      timeout: seconds after which a process that does not report, or that the others wait for, ends
        all with exit status STATUS and one line that names it.
      start_timeout: the same for a process that the others wait for in one of the phases LONG.

    Yields:
      (set_phase, agree), which all processes call in the same order: set_phase(phase) as a phase
      begins, and agree(facts), which raises UserError in all of them if one has other facts than
      process 0.

    Raises:
      Lost, UserError: before the block.
    """
    if place is None:
        yield (lambda phase: None), (lambda facts: None)
        return
    meeting = meet(place, facts, start_timeout)
    watch = Watch(place, timeout, start_timeout)
    jax.config.update('jax_enable_preemption_service', False)  # which would handle SIGTERM
    with meeting.watched(timeout, lambda why: watch.stop(why, STATUS)):
        jax.distributed.initialize(
            place.coordinator, place.processes, place.process, place.devices,
            cluster_detection_method='deactivate', initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=10 * timeout,  # so that Watch reports first
            shutdown_timeout_seconds=timeout, coordinator_bind_address=meeting.bind,
        )  # fmt: skip
        watch.begin(distributed.global_state.client)
    try:
        yield watch.set_phase, watch.agree
    except BaseException as e:
        watch.leave(e)
    watch.end()


class Watch:
    """Exchanges heartbeats with the other processes and ends this one if another is lost."""

    def __init__(self, place, timeout, start_timeout):
        self.place, self.timeout, self.start_timeout = place, timeout, start_timeout
        self.interval = min(2, timeout / 12)
        self.limit = timeout - 5 * self.interval  # of silence, so that with delays all end in time
        self.mine = {'moves': 0, 'phase': 'start', 'host': socket.gethostname(), 'beat': 0}
        self.records = {}  # {process: its last heartbeat}
        self.heard, self.behind = {}, {}  # times of the last report; since when others wait
        self.leaving = self.over = False
        self.client = None
        self.kept = ctypes.CFUNCTYPE(None, ctypes.c_int)(self.aborted)
        ctypes.CDLL(None).signal(signal.SIGABRT, self.kept)

    def set_phase(self, phase):
        """Records that this process begins a phase, and reports a LONG one at once."""
        self.mine |= {'moves': self.mine['moves'] + 1, 'phase': phase}
        if phase.startswith(LONG):
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self.put(BEATS, self.mine)

    def begin(self, client):
        self.client = client
        now = time.monotonic()
        self.heard = {i: now for i in range(self.place.processes)}
        for work in (self.exchange, self.judge):
            threading.Thread(target=work, daemon=True).start()

    def agree(self, facts):
        """Raises UserError in all processes if one has other facts than process 0."""
        self.set_phase('start, data compared')
        self.put(FACTS, {'host': self.mine['host'], 'facts': facts})
        self.client.wait_at_barrier('vit_jax/agree', 1000 * self.start_timeout)
        found = self.all(FACTS)
        for i in sorted(found):
            if wrong := mistake(found[0], {'process': i, **found[i]}, None):
                raise UserError(wrong['mistake'])

    def exchange(self):
        """Thread that writes this process's heartbeat and reads those of the others.

        It blocks only on process 0, which has the store; `judge` detects that.
        """
        while not self.over:
            self.mine['beat'] += 1
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self.put(BEATS, self.mine)
                found = {**self.all(BEATS)}
                for i, record in self.all(ENDS).items():
                    found[i] = found.get(i, self.unknown()) | {'end': record}
                now = time.monotonic()
                for i, record in found.items():
                    if record != self.records.get(i):
                        self.heard[i] = now
                self.heard[0] = now  # the store, which is there, has answered
                self.records = found
            time.sleep(self.interval)

    def put(self, folder, record):
        key = f'{folder}/{self.place.process}'
        self.client.key_value_set(key, json.dumps(record), allow_overwrite=True)

    def all(self, folder):
        """{process: record} of the processes that have a record in a folder of the store."""
        pairs = self.client.key_value_dir_get(folder)
        return {int(key.rpartition('/')[2]): json.loads(value) for key, value in pairs}

    def judge(self):
        """Thread that ends this process as soon as another one is lost."""
        before = time.monotonic()
        while not self.over:
            time.sleep(self.interval / 2)
            now = time.monotonic()
            if now - before > 3 * self.interval:  # this process itself was suspended
                self.heard = {i: t + now - before for i, t in self.heard.items()}
                self.behind = {}
            before = now
            if not self.leaving and not self.over and (found := self.lost(now)):
                self.follow(*found)

    def lost(self, now):
        """(message, exit status) if a process is lost, else None."""
        for i, record in self.records.items():
            if 'end' in record and i != self.place.process:
                return record['end']['message'], record['end']['status']
        limit = self.limit if not self.leaving else 3 * self.interval
        for i, since in self.heard.items():
            if now - since > limit:
                silence = f'{self.name(i)} has not been heard of for {now - since:.0f} s'
                return f'{silence}; its last words: {self.phase(i)}', STATUS
        records = self.records | {self.place.process: self.mine}
        top = max(record['moves'] for record in records.values())
        for i, record in records.items():
            place = i, record['moves']
            if record['moves'] == top:
                continue
            waited = now - self.behind.setdefault(place, now)
            long = record['phase'].startswith(LONG)
            if waited > (self.start_timeout if long else self.limit):
                stalled = f'the others have waited {waited:.0f} s for {self.name(i)}'
                return f'{stalled}, which is at: {self.phase(i)}', STATUS
        return None

    def name(self, i):
        record = self.mine if i == self.place.process else self.records.get(i, self.unknown())
        return f'process {i} of {self.place.processes} ({record["host"]})'

    def phase(self, i):
        return self.records.get(i, self.unknown())['phase']

    def unknown(self):
        return {'moves': 0, 'phase': 'start', 'host': 'unknown host'}

    def follow(self, message, status):
        """Ends this process because another is lost; process 0, which has the store, is last."""
        if self.place.process == 0:
            self.tell(message, status)
        self.stop(message, status)

    def tell(self, message, status):
        """Writes the reason of this end to the store; process 0 waits until the others read it."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.put(ENDS, {'status': status, 'message': message[:2000]})
        if self.place.process == 0:
            time.sleep(3 * self.interval)

    def stop(self, message, status):
        """Prints an error and ends this process at once, whatever its other threads do."""
        if sys.stdout.isatty():
            sys.stdout.write('\x1b[?25h')  # shows the cursor, which the progress bar hides
        sys.stdout.flush()
        sys.stderr.flush()
        if status == STATUS:
            message += '; what was saved is as it was, and the same command goes on from there'
        streams.write_error(f'\nerror: {message}\n')
        os._exit(status)

    def aborted(self, signum):
        """Handler of SIGABRT, by which XLA's threads end the process if process 0 is gone, and
        perhaps if another process left a collective. Reports these; aborts in any other case."""
        self.leaving = True
        deadline = time.monotonic() + 5 * self.interval
        while not self.over and time.monotonic() < deadline:
            if self.alone():
                words = f'{self.name(0)}, which coordinates, is gone'
                self.stop(f'{words}; its last words: {self.phase(0)}', STATUS)
            if found := self.lost(time.monotonic()):
                self.follow(*found)
            time.sleep(self.interval / 2)
        ctypes.CDLL(None).signal(signum, None)  # the default
        os.kill(os.getpid(), signum)

    def alone(self):
        """Whether nothing listens at process 0's port."""
        host, _, port = self.place.coordinator.rpartition(':')
        try:
            socket.create_connection((host.strip('[]'), int(port)), 2).close()
        except OSError:
            return True
        return False

    def leave(self, error):
        """Ends this process after `error`, with the message of a lost process if that is the cause.

        If a process leaves a collective, it fails in all others before the silence is detected.
        """
        self.leaving = True
        known = isinstance(error, (UserError, Lost))
        if known:
            message, status = str(error), 2 if isinstance(error, UserError) else STATUS
        elif (message := refusal(error)) is not None:
            known, status = True, 2
        else:
            traceback.print_exception(error)
            message, status = f'{type(error).__name__}: {error}', 1
        deadline = time.monotonic() + 5 * self.interval
        while not known and time.monotonic() < deadline:
            if found := self.lost(time.monotonic()):
                self.follow(*found)
            time.sleep(self.interval / 2)
        self.tell(f'{self.name(self.place.process)}: {message}', status)
        self.stop(message, status)

    def end(self):
        """Waits until all processes have reached the end, and shuts down."""
        self.set_phase('end')
        self.client.wait_at_barrier('vit_jax/end', 1000 * self.start_timeout)
        self.over = True
        jax.distributed.shutdown()
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
