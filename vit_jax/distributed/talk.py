"""A connection between two processes of a job, of which each proves that it has the job's secret.

It carries lines of text, each of at most LIMIT bytes. The first ones exchange two random numbers.
Any other is a JSON object behind a MAC: the HMAC-SHA256, by the secret in $VIT_JAX_JOB_SECRET, of
who speaks, the listener's number and the object. So a line of another connection is of no use to
anybody. Without a secret the key is empty, and whoever reaches the port can speak. Nothing is
encrypted.
"""

import contextlib
import errno
import hashlib
import hmac
import ipaddress
import json
import os
import re
import secrets
import socket
import sys
import time

from vit_jax.errors import UserError

SECRET = 'VIT_JAX_JOB_SECRET'
LIMIT = 65_536
FIRST = re.compile(b'vit_jax ([0-9a-f]{32})')
SEALED = re.compile('[0-9a-f]{64} {')  # what any other line begins with


class Stranger(Exception):
    """The other end of a connection does not belong to the job; says why."""


class Talk:
    """One end of a connection; `speaker` is '0' at process 0, 'i' at any other.

    Attributes:
        peer: address of the other end, as text.
        since: when it began, by time.monotonic().
        record: what the other end has said of itself, once it has.
        said: the beginning of the last line that was not of this connection.
    """

    def __init__(self, connection, speaker, peer=''):
        self.connection, self.speaker, self.peer = connection, speaker, peer
        self.mine, self.theirs = secrets.token_hex(16), None
        self.buffer, self.since, self.record, self.said = b'', time.monotonic(), None, b''

    def call(self):
        """The first line, of the process that has connected."""
        self.connection.sendall(f'vit_jax {self.mine}\n'.encode())

    def reply(self, line, **body):
        """Process 0: answers the first line with its own number; Stranger where it is another."""
        if not (found := FIRST.fullmatch(line)):
            raise Stranger('other words')
        self.theirs = found[1].decode()
        self.say(nonce=self.mine, **body)

    def say(self, **body):
        text = json.dumps(body)
        self.connection.settimeout(2)  # a line fits into the kernel's buffer
        self.connection.sendall(f'{self.mac(self.speaker, self.theirs, text)} {text}\n'.encode())

    def mac(self, speaker, number, text):
        key = os.environ.get(SECRET, '').encode('utf-8', 'surrogateescape')
        return hmac.new(key, f'{speaker} {number} {text}'.encode(), hashlib.sha256).hexdigest()

    def read(self, timeout=0):
        """The lines that are whole within so many seconds; OSError where there is an end."""
        self.connection.settimeout(timeout)
        with contextlib.suppress(BlockingIOError, TimeoutError):
            data = self.connection.recv(LIMIT)
            if not data:
                self.said = self.buffer[:80]
                raise ConnectionResetError('the connection was closed')
            self.buffer += data
        *lines, self.buffer = self.buffer.split(b'\n')
        if any(len(line) > LIMIT for line in (*lines, self.buffer)):
            raise Stranger('too many words')
        return lines

    def opened(self, line):
        """The object in a line; Stranger unless it was made for this connection."""
        mac, _, text = line.decode('utf-8', 'replace').partition(' ')
        self.said = line[:80]
        wanted = self.mac('0' if self.speaker == 'i' else 'i', self.mine, text)
        if not hmac.compare_digest(mac.encode(), wanted.encode()):
            sealed = SEALED.match(f'{mac} {text}')
            raise Stranger(f'without the {SECRET} of this job' if sealed else 'other words')
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            raise Stranger('other words') from None
        if not isinstance(body, dict):
            raise Stranger('other words')
        self.said = b''
        return body

    def wait(self, deadline):
        """The object of the next line; TimeoutError where it is not whole by the deadline."""
        while (left := deadline - time.monotonic()) > 0:
            if lines := self.read(left):
                return self.opened(lines[0])
        self.said = self.buffer[:80]
        raise TimeoutError('it does not answer')

    def close(self):
        self.connection.close()


def listen(host, port, backlog):
    """(sockets, where they listen, whether that is at the host's addresses or at all there are).

    At all where none of the host's is this machine's, as behind a NAT, or where it is one that
    others can't mean, as Debian's 127.0.1.1. Raises UserError where the port is taken.
    """
    servers = []
    try:
        for family, there in addresses(host, port):
            try:
                server = socket.create_server((there, port), family=family, backlog=backlog)
            except OSError as e:
                if e.errno != errno.EADDRNOTAVAIL:
                    raise
            else:
                servers.append(server)
        if servers:
            where = ', '.join(f'{server.getsockname()[0]}:{port}' for server in servers)
            return servers, where, True
        print(f'process 0 listens at port {port} of all its addresses, as {host} is none of these',
              file=sys.stderr)  # fmt: skip
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        options = dict(family=family, dualstack_ipv6=both, backlog=backlog)
        return [socket.create_server(('', port), **options)], f'port {port}', False
    except OSError as e:
        for server in servers:
            server.close()
        raise UserError(
            f'can not listen at port {port} of --coordinator: {e.strerror}; another program, or '
            'another run, has it: give another port'
        ) from None


def addresses(host, port):
    """[(family, address)] by which others find the host; none where the name can't be looked up."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    found = sorted({(family, where[0]) for family, *_, where in found})
    itself = [ipaddress.ip_address(there.partition('%')[0]).is_loopback for _, there in found]
    literal = host == 'localhost' or host[:1].isdigit() or ':' in host
    return found if literal else [one for one, loop in zip(found, itself, strict=True) if not loop]
