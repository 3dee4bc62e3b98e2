"""Rendezvous of a run's processes at a socket of process 0, before jax.distributed starts.

jax.distributed aborts if a process is missing and can't tell which. The rendezvous can; it lasts
until jax.distributed has started in all processes. Its messages (framed by connection.py):

    i to 0      {"process": i, "host": NAME, "facts": {...}}
    0 to all    {} once all have joined; else {"lost": WHY} or {"mistake": WHY}
    both        {"alive": true} twice a second; {"started": true} once jax.distributed has started;
                {"lost": WHY} from process 0 if a process ends or stops reporting before that

Process 0 serves all connections concurrently. It rejects a connection that does not identify itself
within PATIENCE seconds or sends anything else, counts it, and reports it once all have joined or
the time is over. At most MAX_PENDING more connections than the run has processes wait unidentified;
beyond that the oldest is rejected. A rejected connection never ends the run. Without a secret of
the job, one that imitates a process is not detected. The launchers of launch/ create a secret for
each start.
"""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from vit_jax.distributed.clusters import Place
from vit_jax.distributed.connection import AUTHENTICATED, SECRET, Connection, Rejected
from vit_jax.distributed.coordinator import PATIENCE, Coordinator
from vit_jax.errors import Lost, UserError
from vit_jax.io.text import printable

CERTAIN = 10  # seconds of wrong answers only, after which the port belongs to another program


def meet(place: Place, facts: dict[str, str], timeout: float) -> 'Meeting':
    """Waits until all processes of a run have joined.

    Args:
      place: this process.
      facts: {name: value} that must be equal in all processes.
      timeout: seconds.

    Raises:
      Lost: some processes have not joined in time; the message names them.
      UserError: in all processes, if two have the same index or other facts.
    """
    hello = {'process': place.process, 'host': socket.gethostname(),
             'facts': {'processes': place.processes, **facts}}  # fmt: skip
    bind = None
    if place.process:
        answer, connections = join(place, hello, timeout)
    else:
        coordinator = Coordinator(place, hello)
        answer, connections = coordinator.gather(timeout)
        bind = place.coordinator if coordinator.at_own_address else None
    if answer:
        for connection in connections.values():
            connection.close()
        raise Lost(answer['lost']) if 'lost' in answer else UserError(answer['mistake'])
    return Meeting(connections, place, bind)


def join(
    place: Place, hello: dict[str, Any], timeout: float
) -> tuple[dict[str, str], dict[int, Connection]]:
    """Joins process 0 from another process: returns (process 0's answer, {0: Connection})."""
    start = time.monotonic()
    deadline = start + timeout
    wrong_since = no_answer_since = None  # times since which all answers were wrong, or missing
    printed, reason, wrong_answer = False, '', b''
    while (now := time.monotonic()) < deadline:
        connection = None
        try:
            connection = Connection(
                socket.create_connection(place.address(), deadline - now), 'i'
            )
            connection.send_nonce()
            patience = min(deadline, time.monotonic() + PATIENCE)
            connection.record = connection.receive(patience)
            connection.peer_nonce = connection.record['nonce']
            connection.send(**hello)
            # Process 0 may have started a little later.
            return connection.receive(deadline + 10), {0: connection}
        except (Rejected, KeyError, OSError) as e:
            reason = getattr(e, 'strerror', None) or str(e)
            if connection is None:  # nothing listens there
                wrong_since = no_answer_since = None
            else:
                connection.close()
                wrong_answer = connection.rejected or wrong_answer
                wrong_since = wrong_since or (connection.rejected and now)
                no_answer_since = no_answer_since or now
            if isinstance(e, socket.gaierror) and now - start > CERTAIN and not printed:
                printed = True
                print(f'waiting for process 0 at {place.coordinator}: {reason}', file=sys.stderr)
        if wrong_since and now - wrong_since > CERTAIN:
            return {'mistake': explain_wrong_answer(place, wrong_answer)}, {}
        if no_answer_since and now - no_answer_since > 6 * CERTAIN:
            break
        time.sleep(0.2)
    waited = f'{min(timeout, time.monotonic() - start):.3g} s'
    return {'lost': f'process 0 did not answer at {place.coordinator} within {waited} '
            f'(--start_timeout): {reason}'}, {}  # fmt: skip


def explain_wrong_answer(place: Place, answer: bytes) -> str:
    """Why process 0 can't be reached if its port gave a wrong answer."""
    if AUTHENTICATED.match(answer.decode('ascii', 'replace')):
        return (f'process 0 at {place.coordinator} has another {SECRET} than this process, or '
                'belongs to another job')  # fmt: skip
    return (f'{place.coordinator} is used by another program, which answers {answer!r}: process 0 '
            'cannot listen there; give another port')  # fmt: skip


class Meeting:
    """Connections of the processes that have joined, until jax.distributed has started in all.

    Attributes:
        bind: HOST:PORT at which process 0 listened. None: at all its addresses, or not process 0.
    """

    def __init__(self, connections: dict[int, Connection], place: Place, bind: str | None):
        self.connections, self.place, self.bind = connections, place, bind
        self.started = threading.Event()

    @contextlib.contextmanager
    def guard(self, limit: float, on_loss: Callable[[str], None]) -> Iterator[None]:
        """Calls on_loss(reason) if another process ends or does not report for `limit` seconds.

        Raises Lost, in this process and in the others, for a RuntimeError of the block.
        """
        threading.Thread(target=self.watch, args=(limit, on_loss), daemon=True).start()
        try:
            yield
        except RuntimeError as e:
            reason = str(e).partition('\n')[0]
            reason = f'process {self.place.process} could not start jax.distributed: {reason}'
            self.send(lost=reason)
            self.connections = {}
            raise Lost(reason) from e
        self.started.set()

    def send(self, **body: Any) -> None:
        """Sends an object to all others that can be reached."""
        for connection in self.connections.values():
            with contextlib.suppress(OSError):
                connection.send(**body)

    def watch(self, limit: float, on_loss: Callable[[str], None]) -> None:
        """Thread that reads from the others until they have started, too.

        A connection that is closed earlier may lose its last message.
        """
        last_report, reason = dict.fromkeys(self.connections, time.monotonic()), None
        while self.connections and not reason:
            time.sleep(0.5)
            started = self.started.is_set()
            for i, connection in list(self.connections.items()):
                host = printable(connection.record['host'])
                name = f'process {i} of {self.place.processes} ({host})'
                try:
                    connection.send(**{'started' if started else 'alive': True})
                    bodies = [connection.authenticate(line) for line in connection.read_lines()]
                except (OSError, Rejected):
                    self.connections.pop(i).close()
                    reason = reason or f'{name} ended before jax.distributed had started'
                    continue
                last_report[i] = time.monotonic() if bodies else last_report[i]
                silence = time.monotonic() - last_report[i]
                if silence > limit:
                    reason = reason or f'{name} has not reported for {silence:.0f} s, at its start'
                for body in bodies:
                    reason = body.get('lost') or reason
                    if started and 'started' in body and i in self.connections:
                        self.connections.pop(i).close()
            reason = None if started else reason  # watch.Watch has begun
        if reason:
            self.send(lost=reason)
            time.sleep(1.5)  # until the others have received it
            on_loss(reason)
