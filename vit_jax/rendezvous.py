"""The meeting of a run's processes before jax.distributed begins, over a socket of process 0.

jax.distributed aborts where one does not come, and can not say which.
"""

import contextlib
import json
import socket
import time

from vit_jax.errors import Lost, UserError


def meet(place, facts, timeout):
    """Returns when all processes of a Place are there; `facts` are what must be equal in all.

    Raises Lost after `timeout` seconds, with who is missing, and UserError where two processes
    have the same number or other facts, in all processes.
    """
    host, _, port = place.coordinator.rpartition(':')
    hello = {'process': place.process, 'host': socket.gethostname(),
             'facts': {'processes': place.processes, **facts}}  # fmt: skip
    deadline = time.monotonic() + timeout
    if place.process:
        answer = ask(host.strip('[]'), int(port), hello, deadline, timeout)
    else:
        answer = gather(int(port), hello, place.processes, deadline, timeout)
    if 'lost' in answer:
        raise Lost(answer['lost'])
    if 'mistake' in answer:
        raise UserError(answer['mistake'])


def gather(port, hello, processes, deadline, timeout):
    """Process 0: waits for the others, and gives them all the answer that it returns."""
    met, everyone = {}, []
    try:
        server = socket.create_server(
            ('', port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=processes
        ) if socket.has_dualstack_ipv6() else socket.create_server(('', port), backlog=processes)
    except OSError as e:
        return {'mistake': f'can not listen at port {port} of --coordinator: {e.strerror}'}
    with server, contextlib.ExitStack() as connections:
        answer = None
        while len(met) < processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, processes)) - met.keys())
                answer = answer or {'lost': f'{names(missing)} of {processes} did not start within '
                                    f'{timeout:g} s (--start_timeout)'}  # fmt: skip
                break
            connections.enter_context(connection)
            connection.settimeout(5)
            found = heard(connection)
            if not found or not hello.keys() <= found.keys():  # some other program
                continue
            everyone.append(connection)
            i = found['process']
            if answer is None and (answer := mistake(hello, found, met.get(i))):
                deadline = min(deadline, time.monotonic() + 5)  # so that the last hear it, too
            met[i] = (connection, found)
            if len(met) == processes - 1:  # those that are still there
                met = {i: one for i, one in met.items() if not closed(one[0])}
        answer = answer or {}
        for connection in everyone:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(answer).encode() + b'\n')
        return answer


def mistake(hello, found, other):
    """An answer where a process does not belong to the run as process 0 knows it."""
    who = f'process {found["process"]} ({found["host"]})'
    for key, value in hello['facts'].items():
        if found['facts'].get(key) != value:
            return {'mistake': f'{who} has another {key} than process 0 ({hello["host"]}): '
                    f'{found["facts"].get(key)}, not {value}'}  # fmt: skip
    if other is not None and not closed(other[0]):
        return {'mistake': f'two processes say that they are number {found["process"]}: on '
                f'{other[1]["host"]} and {found["host"]}'}  # fmt: skip
    return None


def closed(connection):
    """Whether the other side has ended, a process that was started anew since."""
    connection.settimeout(0.001)
    try:
        return connection.recv(1) == b''
    except TimeoutError:
        return False
    except OSError:
        return True


def ask(host, port, hello, deadline, timeout):
    """Any other process: the answer of process 0."""
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection((host, port), left) as talk:
            talk.sendall(json.dumps(hello).encode() + b'\n')
            talk.settimeout(left + 10)  # process 0 may have begun to wait a little later
            if (answer := heard(talk)) is not None:
                return answer
        time.sleep(0.2)
    return {'lost': f'process 0 did not answer at {host}:{port} within {timeout:g} s '
            '(--start_timeout)'}  # fmt: skip


def heard(connection):
    """The JSON object of a line that comes; None where it is none."""
    with contextlib.suppress(OSError, ValueError), connection.makefile('rb') as lines:
        found = json.loads(lines.readline(10_000))
        return found if isinstance(found, dict) else None
    return None


def names(processes):
    """'process 1' or 'processes 1, 2, 5'."""
    listed = ', '.join(map(str, processes[:20])) + (' ...' if len(processes) > 20 else '')
    return f'process {listed}' if len(processes) == 1 else f'processes {listed}'
