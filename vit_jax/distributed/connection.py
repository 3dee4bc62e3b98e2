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
from typing import Any, Literal

from vit_jax.errors import UserError

SECRET = 'VIT_JAX_JOB_SECRET'
LIMIT = 65_536
FIRST = re.compile(b'vit_jax ([0-9a-f]{32})')
AUTHENTICATED = re.compile('[0-9a-f]{64} {')  # the start of every other line


class Rejected(Exception):
    """The other end of a connection does not belong to the job, for the reason in the message."""


class Connection:
    """One end of an authenticated connection.

    Attributes:
      socket: the connected socket.
      role: '0' at process 0, else 'i'.
      peer: address of the other end, as text.
      nonce, peer_nonce: those of the two ends; the other end's is None until it is received.
      opened: time.monotonic() when the connection was made.
      record: the object by which the other end identifies itself; None before that.
      rejected: start of the last line that failed authentication.
    """

    def __init__(self, socket: socket.socket | None, role: Literal['0', 'i'], peer: str = ''):
        self.socket, self.role, self.peer = socket, role, peer
        self.nonce, self.peer_nonce = secrets.token_hex(16), None
        self.opened, self.record = time.monotonic(), None
        self.buffer = self.rejected = b''

    def send_nonce(self) -> None:
        """Sends the first line, from the process that connects."""
        self.socket.sendall(f'vit_jax {self.nonce}\n'.encode())

    def answer_nonce(self, line: bytes, **body: Any) -> None:
        """Answers the first line with the nonce of process 0; raises Rejected if malformed."""
        if not (match := FIRST.fullmatch(line)):
            raise Rejected('malformed message')
        self.peer_nonce = match[1].decode()
        self.send(nonce=self.nonce, **body)

    def send(self, **body: Any) -> None:
        """Sends an object."""
        text = json.dumps(body)
        self.socket.settimeout(2)  # a line fits into the kernel's buffer
        self.socket.sendall(f'{self.mac(self.role, self.peer_nonce, text)} {text}\n'.encode())

    def mac(self, role: str, nonce: str, text: str) -> str:
        """The MAC of an object from a sender with a role to a receiver with a nonce."""
        key = os.environ.get(SECRET, '').encode('utf-8', 'surrogateescape')
        return hmac.new(key, f'{role} {nonce} {text}'.encode(), hashlib.sha256).hexdigest()

    def read_lines(self, timeout: float = 0) -> list[bytes]:
        """Complete lines that arrive within `timeout` seconds; raises OSError at the end."""
        self.socket.settimeout(timeout)
        with contextlib.suppress(BlockingIOError, TimeoutError):
            data = self.socket.recv(LIMIT)
            if not data:
                self.rejected = self.buffer[:80]
                raise ConnectionResetError('the connection was closed')
            self.buffer += data
        *lines, self.buffer = self.buffer.split(b'\n')
        if any(len(line) > LIMIT for line in (*lines, self.buffer)):
            raise Rejected('too long message')
        return lines

    def authenticate(self, line: bytes) -> dict[str, Any]:
        """The object in a line; raises Rejected unless its MAC is valid for this connection."""
        mac, _, text = line.decode('utf-8', 'replace').partition(' ')
        self.rejected = line[:80]
        expected = self.mac('0' if self.role == 'i' else 'i', self.nonce, text)
        if not hmac.compare_digest(mac.encode(), expected.encode()):
            other_key = AUTHENTICATED.match(f'{mac} {text}')
            raise Rejected(f'without this job\'s {SECRET}' if other_key else 'malformed message')
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            raise Rejected('malformed message') from None
        if not isinstance(body, dict):
            raise Rejected('malformed message')
        self.rejected = b''
        return body

    def receive(self, deadline: float) -> dict[str, Any]:
        """The object in the next line; raises TimeoutError if incomplete at the deadline."""
        while (left := deadline - time.monotonic()) > 0:
            if lines := self.read_lines(left):
                return self.authenticate(lines[0])
        self.rejected = self.buffer[:80]
        raise TimeoutError('it does not answer')

    def close(self) -> None:
        """Closes the connection."""
        self.socket.close()


def listen(host: str, port: int, backlog: int) -> tuple[list[socket.socket], str, bool]:
    """Listens at the host's addresses, or at all of this machine's if it has none of those.

    It has none behind a NAT, or if the name resolves to a loopback address, as Debian's 127.0.1.1.

    Returns:
      (sockets, description of where they listen, whether these are the host's addresses).

    Raises:
      UserError: the port is taken.
    """
    servers = []
    try:
        for family, address in addresses(host, port):
            try:
                server = socket.create_server((address, port), family=family, backlog=backlog)
            except OSError as e:
                if e.errno != errno.EADDRNOTAVAIL:
                    raise
            else:
                servers.append(server)
        if servers:
            where = ', '.join(f'{server.getsockname()[0]}:{port}' for server in servers)
            return servers, where, True
        print(f'process 0 listens at port {port} of all its addresses, as {host} is none of them',
              file=sys.stderr)  # fmt: skip
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        options = dict(family=family, dualstack_ipv6=both, backlog=backlog)
        return [socket.create_server(('', port), **options)], f'port {port}', False
    except OSError as e:
        for server in servers:
            server.close()
        raise UserError(
            f'cannot listen at port {port} of --coordinator: {e.strerror}; another program or '
            'another run uses it: give another port'
        ) from None


def addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
    """[(family, address)] at which others reach the host; empty if the name can't be resolved."""
    try:
        resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    found = sorted({(family, address[0]) for family, *_, address in resolved})
    if host == 'localhost' or host[:1].isdigit() or ':' in host:
        return found
    return [
        (family, address) for family, address in found
        if not ipaddress.ip_address(address.partition('%')[0]).is_loopback
    ]  # fmt: skip
