"""Addresses become local paths: real servers, real connections that break, real processes."""

import collections
import contextlib
import dataclasses
import http.server
import json
import os
import pathlib
import pty
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time

import fsspec
import pytest
import trustme
from fsspec.implementations.memory import MemoryFileSystem

from vit_jax.errors import UserError
from vit_jax.io import addresses, atomic, fetch

BODY = bytes(range(256)) * 4000  # about a megabyte
CHILD = 'import sys\nfrom vit_jax.io import fetch\nprint(fetch.local(sys.argv[1]))'


@dataclasses.dataclass
class Page:
    """What a server has at a path, and how it misbehaves."""

    body: bytes = BODY
    etag: str | None = '"1"'
    head: int | None = None  # the length that HEAD announces, if not the body's
    announced: int | str | None = 'body'  # the length that GET announces; None: no length at all
    stop: int | None = None  # bytes after which the connection is reset
    pause: float = 0  # seconds between the halves
    go: threading.Event | None = None  # set before the second half
    status: int = 200
    kind: str = 'application/octet-stream'


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        name = self.path.partition('?')[0]
        self.server.count[self.command, name] += 1
        self.server.asked.append(self.path)
        page = self.server.pages.get(name, Page(b'', status=404))
        body, length = page.body, len(page.body) if page.announced == 'body' else page.announced
        if self.command == 'HEAD':
            length = length if page.head is None else page.head
        self.send_response(206 if self.headers['Range'] else page.status)
        if self.headers['Range']:  # as huggingface_hub asks
            first, last = map(int, self.headers['Range'].removeprefix('bytes=').split('-'))
            body = body[first : last + 1]
            length = len(body)
        self.send_header('Content-Type', page.kind)
        if page.etag:
            self.send_header('ETag', page.etag)
        if length is not None:
            self.send_header('Content-Length', str(length))
        self.end_headers()
        if self.command == 'GET':
            with contextlib.suppress(ConnectionError):  # a client that has seen enough
                self.send(page, body)

    def send(self, page, body):
        if page.stop is not None:
            self.wfile.write(body[: page.stop])
            self.wfile.flush()
            linger = struct.pack('ii', 1, 0)  # close with a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.shutdown(socket.SHUT_RD)
            return
        self.wfile.write(body[: len(body) // 2])
        time.sleep(page.pause)
        assert page.go is None or page.go.wait(60)
        self.wfile.write(body[len(body) // 2 :])


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    gone = False

    def __init__(self, context=None):
        super().__init__(('127.0.0.1', 0), Handler)
        self.pages, self.count, self.asked = {}, collections.Counter(), []
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f'http{"s" if context else ""}://127.0.0.1:{self.server_port}'

    def handle_error(self, request, address):
        pass

    def go_away(self):
        if not self.gone:
            self.gone = True
            self.shutdown()
            self.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.go_away()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no proxy between the tests and their servers."""
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('NO_PROXY', '*')
    return tmp_path / 'cache'


@pytest.fixture
def memory():
    """fsspec's memory:// file system, empty."""
    fs = fsspec.filesystem('memory')
    fs.store.clear()
    yield fs
    fs.store.clear()


def names(folder):
    """The files in a cached folder that a loader may see."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith('.'))


def leftovers(cache):
    return [path for path in cache.rglob('*') if path.name.endswith('.part')]


def refused(address, *companions):
    """The one line of the UserError that an address leads to."""
    with pytest.raises(UserError) as e:
        fetch.local(address, companions)
    message = str(e.value)
    assert '\n' not in message and address in message
    return message


def child(address, **environment):
    return subprocess.Popen(
        [sys.executable, '-c', CHILD, address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def wait_for(condition):
    end = time.time() + 20
    while not condition():
        assert time.time() < end
        time.sleep(0.01)


def test_local_path_is_itself(tmp_path, monkeypatch):
    (tmp_path / 'a.npz').write_bytes(b'')
    assert fetch.local(str(tmp_path / 'a.npz')) == tmp_path / 'a.npz'
    assert fetch.local(tmp_path) == tmp_path
    monkeypatch.setenv('HOME', str(tmp_path))
    assert fetch.local('~/a.npz') == tmp_path / 'a.npz'
    assert 'no such file or folder' in refused(str(tmp_path / 'b.npz'))


def test_cache_folder(tmp_path, monkeypatch):
    address = 'https://host/a/model.safetensors?download=true'
    assert addresses.cache_folder(address).parent == tmp_path / 'cache'
    assert addresses.cache_folder(address).name.startswith('model.safetensors-')
    assert addresses.cache_folder(address) != addresses.cache_folder(address.replace('/a/', '/b/'))
    monkeypatch.delenv('VIT_JAX_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    assert addresses.cache_folder(address).parent == tmp_path / 'xdg' / 'vit_jax'
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert addresses.cache_folder(address).parent == tmp_path / '.cache' / 'vit_jax'
    for hostile in ('https://host/..', 'https://host/..?x=/', 'gs://', 'https://h/%2e%2e'):
        folder = addresses.cache_folder(hostile)
        assert folder.resolve().parent == (tmp_path / '.cache' / 'vit_jax').resolve()


def test_whole_file_once(server, capsys):
    server.pages['/a.npz'] = Page()
    path = fetch.local(f'{server.url}/a.npz')
    assert path.name == 'a.npz' and path.read_bytes() == BODY
    said = capsys.readouterr()
    assert not said.out and said.err.count('\n') == 1 and 'a.npz' in said.err  # no terminal: a line
    assert fetch.local(f'{server.url}/a.npz') == path
    assert server.count['GET', '/a.npz'] == 1
    assert not capsys.readouterr().err


def test_file_is_on_the_disk_before_it_has_its_name(server, cache, monkeypatch):
    sizes = []

    def fsync(descriptor):
        sizes.append(os.fstat(descriptor).st_size)
        assert not list(cache.glob('*/a.npz'))

    monkeypatch.setattr(os, 'fsync', fsync)
    server.pages['/a.npz'] = Page()
    fetch.local(f'{server.url}/a.npz')
    assert sizes == [len(BODY)]


def test_proxy(server, monkeypatch):
    monkeypatch.delenv('NO_PROXY')
    monkeypatch.setenv('http_proxy', server.url)
    server.pages['http://nowhere.invalid/a.npz'] = Page()
    assert fetch.local('http://nowhere.invalid/a.npz').read_bytes() == BODY


def test_companions_beside(server):
    for name in ('model.safetensors', 'config.json', 'labels.txt', 'a.npz', 'a.json', 'b.json'):
        server.pages[f'/{name}'] = Page(name.encode())
    path = fetch.local(f'{server.url}/model.safetensors?download=true', ('labels.txt', 'none.txt'))
    assert names(path.parent) == ['config.json', 'labels.txt', 'model.safetensors']
    assert all(asked.endswith('?download=true') for asked in server.asked)
    assert all((path.parent / name).read_bytes() == name.encode() for name in names(path.parent))
    assert names(fetch.local(f'{server.url}/a.npz').parent) == ['a.json', 'a.npz']


def test_companion_that_is_withdrawn_goes(server):
    server.pages |= {'/a.npz': Page(), '/a.json': Page(b'{}')}
    path = fetch.local(f'{server.url}/a.npz')
    assert names(path.parent) == ['a.json', 'a.npz']
    del server.pages['/a.json']
    fetch.local(f'{server.url}/a.npz')
    assert names(path.parent) == ['a.npz']
    assert server.count['GET', '/a.npz'] == 1


def test_changed_file_is_fetched_again(server):
    server.pages['/a.npz'] = Page()
    fetch.local(f'{server.url}/a.npz')
    server.pages['/a.npz'] = Page(BODY[::-1], etag='"2"')  # as long as before
    assert fetch.local(f'{server.url}/a.npz').read_bytes() == BODY[::-1]
    assert server.count['GET', '/a.npz'] == 2


def test_record_of_another_format_is_replaced(server):
    server.pages['/a.npz'] = Page()
    path = fetch.local(f'{server.url}/a.npz')
    path.with_name('.fetched').write_text('{"a.npz": {}}')
    assert fetch.local(f'{server.url}/a.npz').read_bytes() == BODY
    assert server.count['GET', '/a.npz'] == 2


def test_damaged_copy_is_fetched_again(server):
    server.pages['/a.npz'] = Page()
    path = fetch.local(f'{server.url}/a.npz')
    path.write_bytes(BODY[::-1])
    os.utime(
        path, (1e9, 1e9)
    )  # later writes may fall into the same tick of the file system's clock
    assert fetch.local(f'{server.url}/a.npz').read_bytes() == BODY


@pytest.mark.parametrize(
    ('page', 'why'),
    [
        (Page(stop=len(BODY) // 2), 'broke off after'),
        (Page(announced=len(BODY) + 1000), 'broke off after 1,024,000 bytes'),
        (Page(head=len(BODY) + 1000), '1,024,000 bytes of 1,025,000 announced'),
        (Page(head=len(BODY) - 1000), 'more than the 1,023,000 bytes announced'),
        (Page(announced=None, head=len(BODY) - 1000), 'more than the 1,023,000 bytes announced'),
    ],
    ids=['reset', 'short', 'head-announces-more', 'head-announces-less', 'endless'],
)
def test_broken_download_leaves_nothing(server, cache, page, why):
    server.pages['/a.npz'] = page
    assert why in refused(f'{server.url}/a.npz')
    [folder] = cache.iterdir()
    assert [path.name for path in folder.iterdir()] == ['.lock']
    server.pages['/a.npz'] = Page()
    assert fetch.local(f'{server.url}/a.npz').read_bytes() == BODY


def test_broken_update_leaves_the_old_files(server):
    server.pages |= {'/m.safetensors': Page(b'old'), '/config.json': Page(b'{}')}
    path = fetch.local(f'{server.url}/m.safetensors')
    server.pages['/m.safetensors'] = Page(b'new', etag='"2"')
    server.pages['/config.json'] = Page(etag='"2"', stop=1000)
    refused(f'{server.url}/m.safetensors')
    assert path.read_bytes() == b'old' and path.with_name('config.json').read_bytes() == b'{}'
    server.go_away()
    assert fetch.local(f'{server.url}/m.safetensors').read_bytes() == b'old'


def test_no_length(server):
    server.pages['/a.npz'] = Page(announced=None, etag=None)
    assert fetch.local(f'{server.url}/a.npz').read_bytes() == BODY
    server.pages['/a.npz'] = Page(BODY[::-1], announced=None, etag=None)  # nothing tells of it
    assert fetch.local(f'{server.url}/a.npz').read_bytes() == BODY[::-1]


@pytest.mark.parametrize('status', [404, 403])
def test_answer_that_there_is_none(server, status):
    server.pages['/a.npz'] = Page()
    fetch.local(f'{server.url}/a.npz')
    server.pages['/a.npz'] = Page(b'', status=status)
    assert f'answers {status}' in refused(f'{server.url}/a.npz')  # though a copy is there


def test_server_away_without_a_copy(server):
    server.pages['/a.npz'] = Page(status=503)
    assert 'answers 503' in refused(f'{server.url}/a.npz')
    server.go_away()
    for address in (f'{server.url}/a.npz', f'{server.url}/folder'):
        assert 'Connection refused' in refused(address)


def test_server_away_with_a_copy(server, capsys):
    server.pages['/a.npz'] = Page()
    fetch.local(f'{server.url}/a.npz')
    capsys.readouterr()
    server.pages['/a.npz'] = Page(status=503)
    assert fetch.local(f'{server.url}/a.npz').read_bytes() == BODY
    server.go_away()
    assert 'answers 503' in capsys.readouterr().err
    path = fetch.local(f'{server.url}/a.npz')
    assert path.read_bytes() == BODY
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and server.url in said and 'Connection refused' in said
    path.write_bytes(BODY[:-1])
    assert 'no copy' in refused(f'{server.url}/a.npz')


def test_larger_than_the_disk(server):
    server.pages['/a.npz'] = Page(head=10**18)
    assert '1,000,000,000,000,000,000 bytes' in refused(f'{server.url}/a.npz')
    assert server.count['GET', '/a.npz'] == 0


def test_disk_that_takes_no_more(server, cache):
    server.pages['/a.npz'] = Page(announced=None)
    code = f'import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (500_000,) * 2)\n{CHILD}'
    address = f'{server.url}/a.npz'
    run = subprocess.run([sys.executable, '-c', code, address], capture_output=True, text=True)
    assert 'File too large' in run.stderr.splitlines()[-1] and address in run.stderr
    assert run.returncode and not leftovers(cache)


def test_killed_download(server, cache):
    server.pages['/a.npz'] = Page(pause=60)
    process = child(f'{server.url}/a.npz')
    wait_for(lambda: any(path.stat().st_size for path in leftovers(cache)))
    assert str(process.pid) in leftovers(cache)[0].name
    process.kill()
    process.communicate()
    [half] = leftovers(cache)
    assert 0 < half.stat().st_size < len(BODY)
    living = half.with_name(f'.a.npz.{atomic.host()}.{os.getppid()}.part')
    living.write_bytes(b'')
    server.pages['/a.npz'] = Page()
    path = fetch.local(f'{server.url}/a.npz')
    assert path.read_bytes() == BODY and path.parent == half.parent
    assert leftovers(cache) == [living]


def test_two_processes_at_once(server, cache):
    server.pages['/a.npz'] = page = Page(go=threading.Event())
    first = child(f'{server.url}/a.npz')
    wait_for(lambda: leftovers(cache))
    second = child(f'{server.url}/a.npz')
    assert any('waiting for another process' in line for line in second.stderr)
    page.go.set()
    outputs = [process.communicate() for process in (first, second)]
    for process, (out, err) in zip((first, second), outputs, strict=True):
        assert process.returncode == 0, err
        assert pathlib.Path(out.strip()).read_bytes() == BODY
    assert server.count['GET', '/a.npz'] == 1 and not leftovers(cache)


def test_two_processes_where_there_are_no_locks(server, cache, monkeypatch):
    monkeypatch.setattr(fetch, 'locked', lambda *args: contextlib.nullcontext())
    server.pages['/a.npz'] = Page(pause=0.5)
    process = child(f'{server.url}/a.npz')
    wait_for(lambda: leftovers(cache))
    assert fetch.local(f'{server.url}/a.npz').read_bytes() == BODY
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert pathlib.Path(out.strip()).read_bytes() == BODY
    assert server.count['GET', '/a.npz'] == 2 and not leftovers(cache)


def test_https(tmp_path):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / 'ca.pem'))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert('127.0.0.1').configure_cert(context)
    server = Server(context)
    server.pages['/a.npz'] = Page()
    # An untrusted certificate, in the process of the tests, which has read its own list already.
    assert 'certificate verify failed' in refused(f'{server.url}/a.npz')
    out, err = child(f'{server.url}/a.npz', SSL_CERT_FILE=str(tmp_path / 'ca.pem')).communicate()
    assert out, err
    assert pathlib.Path(out.strip()).read_bytes() == BODY
    server.go_away()


def test_progress_bar_on_a_terminal(server):
    server.pages['/a.npz'] = Page(pause=0.3)
    parent, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, '-c', CHILD, f'{server.url}/a.npz'],
        stdout=subprocess.DEVNULL,
        stderr=terminal,
        env=os.environ | {'TERM': 'xterm', 'COLUMNS': '120'},
    )
    os.close(terminal)
    said = b''
    with contextlib.suppress(OSError):  # the end of a terminal
        while chunk := os.read(parent, 4096):
            said += chunk
    os.close(parent)
    assert process.wait() == 0, said
    assert b'a.npz' in said and b'1.0/1.0 MB' in said and b'MB/s' in said, said


FOLDER = {
    **{'config.json': b'{}', 'model.safetensors': BODY, 'model.safetensors.index.json': b'{}'},
    **{'tokenizer.json': b'', 'tokenizer_config.json': b'', 'vocab.json': b'', 'README.md': b''},
    **{'pytorch_model.bin': b'', '.gitattributes': b'', 'sub/other.safetensors': b''},
}
FETCHED = ['config.json', 'model.safetensors', 'model.safetensors.index.json']


def test_folder(memory):
    for name, body in FOLDER.items():
        memory.pipe(f'/bucket/vit/{name}', body)
    memory.pipe('/bucket/vit/folder.json/a', b'')
    folder = fetch.local('memory://bucket/vit')
    assert names(folder) == FETCHED
    assert all((folder / name).read_bytes() == FOLDER[name] for name in FETCHED)
    assert names(fetch.local('memory://bucket/vit/', ['README.md'])) == ['README.md', *FETCHED]


def test_folder_of_an_http_server(server):
    links = [*FOLDER, '../', '/up/', '?C=N;O=D', 'https://elsewhere.example/evil.json']
    page = ''.join(f'<a href="{link}">{link}</a>' for link in links if '/other' not in link)
    server.pages = {f'/vit/{name}': Page(body) for name, body in FOLDER.items()}
    server.pages['/vit'] = Page(page.encode(), kind='text/html')
    folder = fetch.local(f'{server.url}/vit')
    assert names(folder) == FETCHED
    assert all((folder / name).read_bytes() == FOLDER[name] for name in FETCHED)
    fetch.local(f'{server.url}/vit')
    assert server.count['GET', '/vit/model.safetensors'] == 1
    server.go_away()
    assert fetch.local(f'{server.url}/vit') == folder


def test_pickles_are_refused(memory):
    memory.pipe({'/a/pytorch_model.bin': b'', '/a/config.json': b'{}', '/b/config.json': b'{}'})
    message = refused('memory://a')
    assert 'pytorch_model.bin' in message and 'pickle' in message and 'safetensors' in message
    assert 'pickle' not in refused('memory://b')
    assert 'pickle' in refused('https://nowhere.invalid/model.pth')  # asks nobody


class Hostile(MemoryFileSystem):
    """A file system that lists one honest file and one of a name that the test chooses."""

    protocol = 'hostile'
    cachable = False
    name = None

    def ls(self, path, detail=True, **kwargs):
        files = ('model.safetensors', self.name)
        return [{'name': f'{path}/{name}', 'size': 3, 'type': 'file'} for name in files]

    def get_file(self, rpath, lpath, **kwargs):
        pathlib.Path(lpath).write_bytes(b'bad')


@pytest.mark.parametrize(
    'name',
    ['../evil.json', '..evil.json', '/tmp/evil.json', 'sub/evil.json', 'sub\\evil.json', '.e.json']
    + ['%2e%2e%2fevil.json', '%2Fevil.json', 'evil\n.json', 'evil\0.json', '\x1b[2Jevil.json'],
)
def test_hostile_names(name, cache, tmp_path, monkeypatch):
    fsspec.register_implementation('hostile', Hostile, clobber=True)
    monkeypatch.setattr(Hostile, 'name', name)
    assert 'not a plain file name' in refused('hostile://x')
    assert not [path for path in tmp_path.rglob('*') if path.is_file() and path.name != '.lock']
    assert 'not a plain file name' in refused('hostile://x/a.npz', name)
    monkeypatch.setattr(Hostile, 'name', 'good.json')
    assert names(fetch.local('hostile://x')) == ['good.json', 'model.safetensors']


@pytest.mark.parametrize(
    ('address', 'module'),
    [('gs://b/a.npz', 'gcsfs'), ('https://h/a.npz', 'aiohttp'), ('hf://o/r', 'huggingface_hub')],
)
def test_backend_that_is_not_installed(address, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    imported = sys.modules['fsspec.registry']._registry
    monkeypatch.delitem(imported, address.partition(':')[0], raising=False)
    assert 'pip install "vit_jax[remote]"' in refused(address)


@pytest.mark.parametrize(
    'address', ['gs://', 'gs:///a.npz', 'gcs://', 'hf://', 'https://', 'http:///a.npz']
)
def test_address_without_a_bucket_asks_nobody(address, monkeypatch):
    monkeypatch.setattr(fsspec.core, 'url_to_fs', None)  # which waits, and asks again
    for call in (fetch.local, addresses.backend):
        with pytest.raises(UserError, match=f'^{address} has no (bucket|host|repository)$'):
            call(address)


def test_protocol_that_nobody_knows():
    assert 'foo' in refused('foo://b/a.npz')


def test_cache_that_can_not_be_written(server, cache):
    server.pages['/a.npz'] = Page()
    cache.write_bytes(b'')
    assert str(cache) in refused(f'{server.url}/a.npz')


def test_hugging_face(server, cache):
    """The few answers of the Hub's interface that its client needs, to a client in a process."""
    oids = {name: f'{i:040}' for i, name in enumerate(FOLDER)}

    def serve():
        tree = [
            {'type': 'file', 'path': name, 'size': len(body), 'oid': oids[name]}
            for name, body in FOLDER.items()
            if '/' not in name
        ]
        tree += [{'type': 'directory', 'path': 'sub', 'oid': '0'}]
        repo = {'_id': '0', 'id': 'org/repo', 'sha': '0', 'tags': [], 'siblings': []}
        for path, value in (('', repo), ('/revision/main', repo), ('/tree/main', tree)):
            page = Page(json.dumps(value).encode(), kind='application/json')
            server.pages[f'/api/models/org/repo{path}'] = page

    def fetched(address):
        out, err = child(address, HF_ENDPOINT=server.url, HF_HOME=str(cache / 'hf')).communicate()
        assert out, err
        return pathlib.Path(out.strip())

    server.pages = {f'/org/repo/resolve/main/{name}': Page(body) for name, body in FOLDER.items()}
    serve()
    folder = fetched('hf://org/repo')
    assert names(folder) == FETCHED
    assert all((folder / name).read_bytes() == FOLDER[name] for name in FETCHED)
    oids['config.json'] = '9' * 40
    serve()
    fetched('hf://org/repo')
    counts = [server.count['GET', f'/org/repo/resolve/main/{name}'] for name in FETCHED]
    assert counts == [2, 1, 1]
    path = fetched('hf://org/repo@main/model.safetensors')
    assert path.read_bytes() == BODY and names(path.parent) == ['config.json', 'model.safetensors']


def test_google_storage(server):
    """The JSON interface of Cloud Storage, as its emulators have it, to a client in a process."""
    item = {'name': 'vit/a.npz', 'bucket': 'b', 'size': str(len(BODY)), 'generation': '5'}
    kind = 'application/json'
    server.pages = {
        '/storage/v1/b/b/o/vit%2Fa.npz': Page(json.dumps(item).encode(), kind=kind),
        '/storage/v1/b/b/o': Page(b'{"items": []}', kind=kind),
        '/download/storage/v1/b/b/o/vit%2Fa.npz': Page(),
    }
    environment = {'STORAGE_EMULATOR_HOST': server.url, 'FSSPEC_GS_TOKEN': 'anon'}
    environment['GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT'] = 'false'  # which asks by gRPC, not here
    for _ in range(2):
        out, err = child('gs://b/vit/a.npz', **environment).communicate()
        assert out, err
        assert pathlib.Path(out.strip()).read_bytes() == BODY
    assert server.count['GET', '/download/storage/v1/b/b/o/vit%2Fa.npz'] == 1
