"""The rendezvous: missing processes, mismatches, and connections of other programs."""

import concurrent.futures
import contextlib
import json
import random
import socket
import threading
import time

import pytest
from processes import free_port

from vit_jax.distributed import rendezvous
from vit_jax.distributed.clusters import Place
from vit_jax.distributed.connection import SECRET, Connection, listen
from vit_jax.distributed.rendezvous import meet
from vit_jax.errors import Lost, UserError

SECRETS = pytest.mark.parametrize('secret', [None, 'of this job'])


@pytest.fixture(autouse=True)
def no_secret(monkeypatch):
    monkeypatch.delenv(SECRET, raising=False)


def meeting(*places, port=None, facts=None, timeout=20, host='localhost'):
    """What `meet` raises, or a Meeting, in each of several threads, (process, of how many) each."""
    port = port or free_port()

    def one(i, process, count):
        try:
            where = Place(f'{host}:{port}', count, process, None)
            return meet(where, (facts or {}).get(i, {'config': 'a'}), timeout)
        except (Lost, UserError) as e:
            return e

    with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
        jobs = [pool.submit(one, i, *place) for i, place in enumerate(places)]
        return [job.result() for job in jobs]


def all_met(found):
    return all(isinstance(one, rendezvous.Meeting) for one in found) or found


@pytest.mark.parametrize('host', ['localhost', '127.0.0.1', '[::1]'])
def test_all_meet(host):
    if host == '[::1]':
        try:
            socket.create_server(('::1', 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip('no IPv6 here')
    assert all_met(meeting(*((i, 5) for i in range(5)), host=host)) is True


def test_who_does_not_come_is_named_to_all():
    for found in meeting((0, 5), (2, 5), (4, 5), timeout=1):
        assert isinstance(found, Lost)
        assert 'processes 1, 3 of 5 did not start within 1 s' in str(found)
    (found,) = meeting((1, 2), timeout=1)
    assert isinstance(found, Lost) and 'process 0 did not answer at localhost:' in str(found)


def test_a_name_that_is_not_known_is_said_while_it_is_waited_for(monkeypatch, capfd):
    """Kubernetes knows the names of pods a while after these have started."""
    monkeypatch.setattr(rendezvous, 'CERTAIN', 0.1)

    def unknown(*args, **options):
        raise socket.gaierror(socket.EAI_NONAME, 'Name or service not known')

    monkeypatch.setattr(socket, 'getaddrinfo', unknown)
    (found,) = meeting((1, 2), timeout=1, host='nowhere')
    said = capfd.readouterr().err
    assert said.startswith('waiting for process 0 at nowhere:') and said.count('\n') == 1
    assert 'Name or service not known' in said and isinstance(found, Lost)
    assert 'within 1 s (--start_timeout): Name or service not known' in str(found)


@pytest.mark.slow
@SECRETS
def test_other_configs_and_equal_numbers_are_named_to_all(secret, monkeypatch):
    if secret:
        monkeypatch.setenv(SECRET, secret)
    for found in meeting((0, 3), (1, 3), (2, 3), facts={2: {'config': 'b\n'}}):
        assert isinstance(found, UserError) and '\n' not in str(found)
        assert 'process 2 (' in str(found) and 'has another config than process 0' in str(found)
    for found in meeting((0, 2), (1, 3)):
        assert isinstance(found, UserError) and 'has another processes than' in str(found)
    found = meeting((0, 3), (1, 3), (1, 3))
    assert all(isinstance(f, UserError) and 'have the index 1: on' in str(f) for f in found)


# connections that do not belong to the job


def connected(port):
    """A connection to a port at which somebody listens soon."""
    while True:
        with contextlib.suppress(OSError):
            return socket.create_connection(('localhost', port), 5)
        time.sleep(0.01)


def shaken(port):
    """A Connection to process 0 that has exchanged nonces, as whoever reaches the port can."""
    one = Connection(connected(port), 'i')
    one.send_nonce()
    line = one.read_lines(20)[0]
    one.peer_nonce = json.loads(line.partition(b' ')[2])['nonce']
    return one


WRONG = [
    '[' * 9000, '[]', '5', 'null', '{"process": []}', '{"process": true}', '{', '"' * 70_000,
    '{"process": 1, "host": "x", "facts": 5}', '{"process": 1, "host": 5, "facts": {}}',
    '{"process": 7, "host": "x", "facts": {"processes": 3, "config": "a"}}',
    '{"process": 0, "host": "x", "facts": {"processes": 3, "config": "a"}}',
    '{"process": -1, "host": "x", "facts": {"processes": 3, "config": "a"}}',
    '{"process": %s, "host": "x", "facts": {"processes": 3}}' % ('9' * 4000),
    '{"a":' * 5000, '\ud800', '{"process": 1.0, "host": "x", "facts": {}}',
]  # fmt: skip


def say_wrong_things(port):
    for text in WRONG:
        with contextlib.suppress(OSError):
            one = shaken(port)
            data = text.encode('utf-8', 'surrogatepass')
            mac = one.mac('i', one.peer_nonce, data.decode('utf-8', 'replace'))
            one.socket.sendall(mac.encode() + b' ' + data + b'\n')
            yield one.socket


def say_anything(port):
    rng = random.Random(0)
    first = b'vit_jax ' + b'0' * 32 + b'\n'
    whole = [b'GET / HTTP/1.1\r\n\r\n', b'\n' * 1000, b'', first + b'x' * 80]
    for _ in range(60):
        data = rng.choice([*whole, rng.randbytes(rng.choice([1, 100, 100_000]))])
        with contextlib.suppress(OSError):
            one = connected(port)
            one.sendall(data[: rng.randrange(len(data) + 1)])
            yield one


def idle(port):
    for _ in range(200):
        yield connected(port)


def dribble(port):
    one = shaken(port)
    yield one.socket
    with contextlib.suppress(OSError):
        while True:
            one.socket.sendall(b'x')
            time.sleep(0.2)


ATTACKS = [say_wrong_things, say_anything, idle, dribble]


@SECRETS
@pytest.mark.parametrize('attack', ATTACKS)
def test_a_rejected_connection_neither_delays_nor_ends_a_run(secret, attack, monkeypatch, capfd):
    if secret:
        monkeypatch.setenv(SECRET, secret)
    port, connections = free_port(), []
    begun = threading.Event()

    def strangers():
        for connection in attack(port):
            connections.append(connection)
            begun.set()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(meeting, (0, 3), port=port, timeout=60)
        thread = threading.Thread(target=strangers, daemon=True)
        thread.start()
        begun.wait(20)
        if attack is not dribble:
            thread.join(40)
        rest = meeting((1, 3), (2, 3), port=port, timeout=60)
        assert all_met([*first.result(), *rest]) is True
    for connection in connections:
        connection.close()
    said = capfd.readouterr().err
    assert attack in (idle, dribble) or '; rejected ' in said and said.count('\n') == 1


def sealed(number, key, monkeypatch, **body):
    """The line of a process with a key, or none, for a number of process 0."""
    with monkeypatch.context() as patch:
        patch.setenv(SECRET, key) if key else patch.delenv(SECRET, raising=False)
        text = json.dumps(body)
        return f'{Connection(None, "i").mac("i", number, text)} {text}\n'.encode()


@pytest.mark.parametrize('key', ['', 'of another job', 'of this job'])
def test_a_record_without_the_secret_or_replayed_is_rejected(key, monkeypatch, capfd):
    """Its facts differ, which ends the run where a process of the job says so."""
    monkeypatch.setenv(SECRET, 'of this job')
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(meeting, (0, 2), port=port)
        one, other = shaken(port), shaken(port)
        number = other.peer_nonce if key == 'of this job' else one.peer_nonce  # a replay
        facts = {'processes': 2, 'config': 'b'}
        line = sealed(number, key, monkeypatch, process=1, host='x', facts=facts)
        one.socket.sendall(line)
        with pytest.raises(OSError):
            one.read_lines(20)  # process 0 has closed it
        assert all_met([*meeting((1, 2), port=port), *first.result()]) is True
    assert '(without this job\'s VIT_JAX_JOB_SECRET)' in capfd.readouterr().err


def test_an_answer_without_the_secret_is_none(monkeypatch):
    """A process believes no one who only listens where process 0 should."""
    monkeypatch.setattr(rendezvous, 'CERTAIN', 1)
    monkeypatch.setenv(SECRET, 'of this job')
    (found,) = with_program(false_process_0)
    assert isinstance(found, UserError)
    assert 'has another VIT_JAX_JOB_SECRET than this process, or belongs to' in str(found)


def false_process_0(connection):
    one = Connection(connection, '0')
    one.mac = lambda *words: '0' * 64
    one.answer_nonce(one.read_lines(5)[0], host='x')
    one.send(mistake='not believed')
    time.sleep(1)


def with_program(serve, timeout=30):
    """What process 1 of 2 finds where another program has the port of process 0."""
    with socket.create_server(('localhost', 0)) as server:

        def program():
            with contextlib.suppress(OSError):
                while True:
                    with server.accept()[0] as connection, contextlib.suppress(OSError):
                        serve(connection)

        threading.Thread(target=program, daemon=True).start()
        return meeting((1, 2), port=server.getsockname()[1], timeout=timeout)


@pytest.mark.parametrize('banner, seconds', [
    (b'SSH-2.0-OpenSSH\r\n', 1.5), (b'\x00\x00\x12\x04', 1.5), (b'\xff\n{}\n', 1.5),
    (b'\x00\x00\x12\x04', 0),  # as the jax.distributed of another run
])  # fmt: skip
def test_another_program_at_the_port_is_named_soon(banner, seconds, monkeypatch):
    monkeypatch.setattr(rendezvous, 'CERTAIN', 1)
    monkeypatch.setattr(rendezvous, 'PATIENCE', 1)

    def serve(connection):
        connection.sendall(banner)
        connection.recv(100)
        time.sleep(seconds)

    (found,) = with_program(serve, timeout=600)
    assert isinstance(found, UserError) and 'is used by another program' in str(found)


def test_a_port_that_says_nothing_is_not_waited_for_to_the_end(monkeypatch):
    monkeypatch.setattr(rendezvous, 'CERTAIN', 0.5)
    monkeypatch.setattr(rendezvous, 'PATIENCE', 1)
    (found,) = with_program(lambda connection: time.sleep(2), timeout=600)
    assert isinstance(found, Lost) and 'did not answer' in str(found)


def test_a_port_in_use_is_named():
    with socket.create_server(('', 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        (found,) = meeting((0, 2), port=server.getsockname()[1])
        assert isinstance(found, UserError) and 'cannot listen at port' in str(found)


def test_process_0_listens_where_others_find_it(monkeypatch, capfd):
    def bound(host):
        servers, *_ = listen(host, free_port(), 5)
        found = {server.getsockname()[0] for server in servers}
        for server in servers:
            server.close()
        return found

    assert bound('127.0.0.1') == {'127.0.0.1'}
    # A name of this machine that leads to itself alone, and an address that it has not.
    found = [(socket.AF_INET, 1, 6, '', ('127.0.1.1', 1))]
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *args, **options: found)
    assert bound('node003') <= {'::', '0.0.0.0'}
    found = [(socket.AF_INET, 1, 6, '', ('192.0.2.7', 1))]
    assert bound('192.0.2.7') <= {'::', '0.0.0.0'}
    assert capfd.readouterr().err.count('of all its addresses, as 192.0.2.7 is none') == 1
