"""Several processes as one run: they meet, watch each other, and end together.

All find process 0 at one port. First over a plain socket, as that can tell who is missing; then
through jax.distributed, in whose store each says again and again that it lives and where it is.
One that falls silent, or stays behind while others wait for it, ends all.
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
from jax._src import distributed  # its store of keys has no public name

import vit_jax
from vit_jax.distributed.rendezvous import meet, mistake
from vit_jax.errors import Lost, UserError, refusal
from vit_jax.io import streams

STATUS = 4  # the exit status where another process was lost
LONG = ('start', 'restore', 'compile', 'save')  # phases that one may need much longer for
BEATS, ENDS, FACTS = 'vit_jax/beat', 'vit_jax/end', 'vit_jax/facts'


def facts(settings):
    """What must be equal in all processes of a run: {name: value}."""
    text = json.dumps(settings.to_dict(), sort_keys=True, default=str)
    return {
        'vit_jax': vit_jax.__version__, 'jax': jax.__version__,
        'config': hashlib.sha256(text.encode()).hexdigest()[:12],
    }  # fmt: skip


def expect(place, processes):
    """Raises UserError unless there are as many processes as --expect_processes says."""
    found = place.processes if place else 1
    if processes not in (None, found):
        raise UserError(
            f'--expect_processes is {processes}, but this is one of {found}; several are found by '
            'the variables of SLURM, Open MPI or a TPU, or by --coordinator, --num_processes and '
            '--process_id'
        )


def expect_devices(devices):
    """Raises UserError unless all processes together have so many devices."""
    if devices not in (None, jax.device_count()):
        raise UserError(
            f'--expect_devices is {devices}, but there are {jax.device_count()}: '
            f'{jax.local_device_count()} here, of {jax.process_count()} processes'
        )


@contextlib.contextmanager
def joined(place, facts, *, timeout, start_timeout):
    """Makes this process one of a run's, until all have come to the end of the block.

    Yields (at, agree), which all processes call in the same order: at(phase) as each begins, and
    agree(facts), which raises UserError in all where one has other facts than process 0. `facts`
    are those that must be equal before anything is read. A process that is not heard of for
    `timeout` seconds, or stays behind the others so long (in a LONG phase: `start_timeout`), ends
    all with STATUS and one line that names it. Where the block raises, all end with its words, this
    process at once: an orderly exit would wait for the others. Raises Lost, UserError before the
    block.
    """
    if place is None:
        yield (lambda phase: None), (lambda facts: None)
        return
    meeting = meet(place, facts, start_timeout)
    watch = Watch(place, timeout, start_timeout)
    jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM for itself
    with meeting.watched(timeout, lambda why: watch.stop(why, STATUS)):
        jax.distributed.initialize(
            place.coordinator, place.processes, place.process, place.devices,
            cluster_detection_method='deactivate', initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=10 * timeout,  # the watch is to speak first
            shutdown_timeout_seconds=timeout, coordinator_bind_address=meeting.bind,
        )  # fmt: skip
        watch.begin(distributed.global_state.client)
    try:
        yield watch.at, watch.agree
    except BaseException as e:
        watch.leave(e)
    watch.end()


class Watch:
    """What this process knows of the others, and they of it."""

    def __init__(self, place, timeout, start_timeout):
        self.place, self.timeout, self.start_timeout = place, timeout, start_timeout
        self.interval = min(2, timeout / 12)
        self.limit = timeout - 5 * self.interval  # of silence: with the delays, all within timeout
        self.mine = {'moves': 0, 'phase': 'start', 'host': socket.gethostname(), 'beat': 0}
        self.records = {}  # the last of each process
        self.heard, self.behind = {}, {}  # since when: it said something, others wait for it
        self.leaving = self.over = False
        self.client = None
        self.kept = ctypes.CFUNCTYPE(None, ctypes.c_int)(self.aborted)
        ctypes.CDLL(None).signal(signal.SIGABRT, self.kept)

    def at(self, phase):
        """Says that this process begins a phase; of a rare one the others hear at once."""
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
        """Raises UserError, in all processes, where one has other facts than process 0."""
        self.at('start, data compared')
        self.put(FACTS, {'host': self.mine['host'], 'facts': facts})
        self.client.wait_at_barrier('vit_jax/agree', 1000 * self.start_timeout)
        found = self.all(FACTS)
        for i in sorted(found):
            if wrong := mistake(found[0], {'process': i, **found[i]}, None):
                raise UserError(wrong['mistake'])

    def exchange(self):
        """Tells the others of this process and hears of them, until the end.

        Only ever waits for process 0, which has the store; that it does so is judged elsewhere.
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
                self.heard[0] = now  # it has answered
                self.records = found
            time.sleep(self.interval)

    def put(self, folder, record):
        key = f'{folder}/{self.place.process}'
        self.client.key_value_set(key, json.dumps(record), allow_overwrite=True)

    def all(self, folder):
        """{process: record} of those that have one."""
        pairs = self.client.key_value_dir_get(folder)
        return {int(key.rpartition('/')[2]): json.loads(value) for key, value in pairs}

    def judge(self):
        """Ends this process as soon as another one is lost, until the end."""
        before = time.monotonic()
        while not self.over:
            time.sleep(self.interval / 2)
            now = time.monotonic()
            if now - before > 3 * self.interval:  # this process itself was stopped for a while
                self.heard = {i: t + now - before for i, t in self.heard.items()}
                self.behind = {}
            before = now
            if not self.leaving and not self.over and (found := self.lost(now)):
                self.follow(*found)

    def lost(self, now):
        """(what to say, exit status) where a process is lost; else None."""
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
        """Ends this process because another one is lost; the last to leave has the store."""
        if self.place.process == 0:
            self.tell(message, status)
        self.stop(message, status)

    def tell(self, message, status):
        """Puts why this process ends where the others look; process 0 waits until they have."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.put(ENDS, {'status': status, 'message': message[:2000]})
        if self.place.process == 0:
            time.sleep(3 * self.interval)

    def stop(self, message, status):
        """Ends this process, wherever its other threads are."""
        if sys.stdout.isatty():
            sys.stdout.write('\x1b[?25h')  # the cursor, which the progress bar has hidden
        sys.stdout.flush()
        sys.stderr.flush()
        if status == STATUS:
            message += '; what was saved is as it was, and the same command goes on from there'
        streams.write_error(f'\nerror: {message}\n')
        os._exit(status)

    def aborted(self, signum):
        """Called in place of an abort, which is how XLA's threads end: at once where process 0 is
        gone, perhaps where another one has left a collective. Any other abort goes on."""
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
        """Whether nobody answers at process 0's port."""
        host, _, port = self.place.coordinator.rpartition(':')
        try:
            socket.create_connection((host.strip('[]'), int(port)), 2).close()
        except OSError:
            return True
        return False

    def leave(self, error):
        """Ends this process for what it has raised, in the others' name where they are the reason.

        A collective without one of its processes fails in all others, before its silence is long.
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
        """Waits until all have come here."""
        self.at('end')
        self.client.wait_at_barrier('vit_jax/end', 1000 * self.start_timeout)
        self.over = True
        jax.distributed.shutdown()
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
