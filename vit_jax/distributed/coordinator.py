"""Process 0's side of the rendezvous: identifies the other processes and names missing ones."""

import collections
import contextlib
import resource
import selectors
import socket
import sys
import time
from typing import Any

from vit_jax.distributed.clusters import Place
from vit_jax.distributed.connection import SECRET, Connection, Rejected, listen
from vit_jax.io.text import printable

PATIENCE = 5  # seconds until a connection must have identified itself
MAX_PENDING = 64  # unidentified connections, beyond the number of processes
MALFORMED = 'malformed message'


class Coordinator:
    """The connections of process 0.

    Attributes:
      answer: what all processes receive at the end; {} if all have joined.
      joined: {process: its newest Connection}.
      identified: all connections of the job.
      pending: connections that have not identified themselves yet.
      rejected: Counter of (address, reason).
    """

    def __init__(self, place: Place, hello: dict[str, Any]):
        self.processes, self.hello, self.answer = place.processes, hello, {}
        self.joined, self.identified, self.pending = {}, [], []
        self.rejected = collections.Counter()
        self.selector = selectors.DefaultSelector()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        files = 2 * self.processes + MAX_PENDING + 500  # jax.distributed has as many connections
        if soft < files and hard != soft:
            most = files if hard == resource.RLIM_INFINITY else min(files, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        backlog = self.processes + MAX_PENDING
        servers, self.where, self.at_own_address = listen(*place.address(), backlog)
        for server in servers:
            server.setblocking(False)
            self.selector.register(server, selectors.EVENT_READ)

    def gather(self, timeout: float) -> tuple[dict[str, str], dict[int, Connection]]:
        """(answer to all processes, {process: Connection}) once all have joined, or in the end."""
        deadline = time.monotonic() + timeout
        while len(self.joined) < self.processes - 1 and (now := time.monotonic()) < deadline:
            for key, _ in self.selector.select(min(0.5, deadline - now)):
                self.serve(key.data) if key.data else self.accept(key.fileobj)
            for connection in [c for c in self.pending if time.monotonic() - c.opened > PATIENCE]:
                self.drop(connection, 'no message')
            if self.answer:  # an error, which the last processes are to receive, too
                deadline = min(deadline, time.monotonic() + PATIENCE)
        missing = sorted(set(range(1, self.processes)) - self.joined.keys())
        if missing and not self.answer:
            self.answer = {'lost': f'{names(missing)} of {self.processes} did not start within '
                           f'{timeout:g} s (--start_timeout); process 0 listened at {self.where}'
                           f'{self.rejections()}'}  # fmt: skip
        elif self.rejected:
            print(f'process 0 listened at {self.where}{self.rejections()}', file=sys.stderr)
        for connection in self.identified:
            with contextlib.suppress(OSError):
                connection.send(**self.answer)
        for key in list(self.selector.get_map().values()):
            if key.data not in self.joined.values():
                key.fileobj.close()
        self.selector.close()
        return self.answer, self.joined

    def accept(self, server: socket.socket) -> None:
        """Accepts a connection; drops the oldest pending one if there are too many."""
        if len(self.pending) >= self.processes + MAX_PENDING:
            self.drop(self.pending[0], 'no message')
        try:
            accepted, (peer, *_) = server.accept()
        except OSError:  # it was closed again, or too many files are open
            if self.pending:
                self.drop(self.pending[0], 'no message')
            return
        self.pending.append(connection := Connection(accepted, '0', peer))
        self.selector.register(accepted, selectors.EVENT_READ, connection)

    def serve(self, connection: Connection) -> None:
        """Handles the lines that a connection has received."""
        if connection.socket.fileno() < 0:  # closed since the select
            return
        try:
            for line in connection.read_lines():
                if connection.peer_nonce is None:
                    connection.answer_nonce(line, host=self.hello['host'])
                elif connection.record is None:
                    self.identify(connection, self.checked(connection.authenticate(line)))
        except Rejected as e:
            self.drop(connection, str(e))
        except OSError:
            other_key = f', perhaps with another {SECRET}' if connection.peer_nonce else ''
            self.drop(connection, f'closed{other_key}')

    def checked(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record by which a process identifies itself; raises Rejected if it is malformed."""
        i, host, facts = (record.get(key) for key in ('process', 'host', 'facts'))
        if not (type(i) is int and isinstance(host, str) and isinstance(facts, dict)):
            raise Rejected(MALFORMED)
        if i < 1 or i > 10**6 or i >= self.processes == facts.get('processes'):
            raise Rejected(MALFORMED)
        return record

    def identify(self, connection: Connection, record: dict[str, Any]) -> None:
        """Adds a process of the job, and sets the answer if it does not belong to this run."""
        self.pending.remove(connection)
        self.identified.append(connection)
        connection.record, i = record, record['process']
        mismatch = find_mismatch(self.hello, record, self.joined.get(i))
        if mismatch and not self.answer:
            self.answer = {'mistake': mismatch}
        self.joined[i] = connection

    def drop(self, connection: Connection, reason: str) -> None:
        """Closes a connection that is rejected, and counted, or whose process has ended."""
        self.selector.unregister(connection.socket)
        connection.close()
        if connection in self.pending:
            self.pending.remove(connection)
            peer = connection.peer if len(self.rejected) < 1000 else 'elsewhere'
            self.rejected[peer, reason] += 1
        elif connection in self.identified:
            self.identified.remove(connection)
            self.joined = {i: c for i, c in self.joined.items() if c is not connection}

    def rejections(self) -> str:
        """Summary: '; rejected 3 connections: 2 from 10.0.0.7 (no message), 1 from ...', or ''."""
        if not self.rejected:
            return ''
        most = [f'{n} from {peer} ({reason})' for (peer, reason), n in self.rejected.most_common(4)]
        more = ', ...' if len(self.rejected) > len(most) else ''
        return f'; rejected {self.rejected.total()} connections: {", ".join(most)}{more}'


def find_mismatch(
    first: dict[str, Any], record: dict[str, Any], same: Connection | None = None
) -> str | None:
    """Why a process does not belong to process 0's run; None if it does.

    Args:
      first: record of process 0.
      record: record of the process, from outside.
      same: connection of another process with the same index.
    """
    host = printable(record['host'])[:100]
    for key, value in first['facts'].items():
        if record['facts'].get(key) != value:
            other = printable(record['facts'].get(key))[:200]
            return (f'process {record["process"]} ({host}) has another {key} than process 0 '
                    f'({first["host"]}): {other}, not {value}')  # fmt: skip
    if same is not None:
        return (f'two processes have the index {record["process"]}: on '
                f'{printable(same.record["host"])[:100]} and on {host}')  # fmt: skip
    return None


def names(processes: list[int]) -> str:
    """Names processes in a message: 'process 1' or 'processes 1, 2, 5'."""
    listed = ', '.join(map(str, processes[:20])) + (' ...' if len(processes) > 20 else '')
    return f'process {listed}' if len(processes) == 1 else f'processes {listed}'
