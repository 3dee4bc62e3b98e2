"""Authenticated connections between two processes of a job.

The protocol is lines of text of at most LIMIT bytes. The first line of each end has a random nonce.
Every other line is a JSON object after its MAC: the HMAC-SHA256, with the secret in
$VIT_JAX_JOB_SECRET as key, of the sender's role, the receiver's nonce and the object. So lines of
one connection can't be replayed in another. Without a secret the key is empty, and anyone who
reaches the port is authenticated. Nothing is encrypted.
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
SEALED = re.compile('[0-9a-f]{64} {')  # the start of every other line


class Stranger(Exception):
    """The other end of a connection does not belong to the job, for the reason in the message."""


class Talk:
    """One end of a connection; `speaker`, the role of this end, is '0' at process 0, else 'i'.

    Attributes:
        peer: address of the other end, as text.
        since: time.monotonic() at the start of the connection.
        record: the object by which the other end introduces itself; None before that.
        said: start of the last line that failed authentication.
    """

    def __init__(self, connection, speaker, peer=''):
        self.connection, self.speaker, self.peer = connection, speaker, peer
        self.mine, self.theirs = secrets.token_hex(16), None
        self.buffer, self.since, self.record, self.said = b'', time.monotonic(), None, b''

    def call(self):
        """Sends the first line, from the process that connects."""
        self.connection.sendall(f'vit_jax {self.mine}\n'.encode())

    def reply(self, line, **body):
        """Process 0: answers the first line with its own nonce; raises Stranger if malformed."""
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
        """Complete lines that arrive within `timeout` seconds; raises OSError at the end."""
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
        """The object in a line; raises Stranger unless its MAC is valid for this connection."""
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
        """The object in the next line; raises TimeoutError if incomplete at the deadline."""
        while (left := deadline - time.monotonic()) > 0:
            if lines := self.read(left):
                return self.opened(lines[0])
        self.said = self.buffer[:80]
        raise TimeoutError('it does not answer')

    def close(self):
        self.connection.close()


def listen(host, port, backlog):
    """Listens at the host's addresses, or at all of this machine's if none of those can be used.

    That is so behind a NAT, or if the name resolves to a loopback address, as Debian's 127.0.1.1.
    Returns (sockets, description of where they listen, whether these are the host's addresses).
    Raises UserError if the port is taken.
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
    """[(family, address)] at which others reach the host; empty if the name can't be resolved."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    found = sorted({(family, where[0]) for family, *_, where in found})
    itself = [ipaddress.ip_address(there.partition('%')[0]).is_loopback for _, there in found]
    literal = host == 'localhost' or host[:1].isdigit() or ':' in host
    return found if literal else [one for one, loop in zip(found, itself, strict=True) if not loop]
