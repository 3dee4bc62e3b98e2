"""Images that a user names: paths, folders of folders, addresses; what can't be read is named."""

import functools
import http.server
import os
import threading

import fsspec
import numpy as np
import pytest
from PIL import Image

from vit_jax.data import files, images
from vit_jax.errors import UserError


def view(image, rng):
    return np.asarray(image)


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (4, 3), (value, 0, 0)).save(path, 'PNG')
    return path


@pytest.fixture
def tree(tmp_path):
    """A folder of images at several depths, among files that are none."""
    root = tmp_path / 'images'
    for k, name in enumerate(['b.png', 'a/c.JFIF', 'a/deep/er/d.jpe', 'x.jpg/e.bmp', '.git/f.png']):
        picture(root / name, k)
    (root / 'notes.txt').write_text('no image')
    return root


EXPECTED = ['a/c.JFIF', 'a/deep/er/d.jpe', 'b.png', 'x.jpg/e.bmp']
VALUES = [1, 2, 0, 3]


def test_folders_are_walked_down_and_links_do_not_lead_in_circles(tree, tmp_path):
    (tree / 'a' / 'up').symlink_to(tree)
    (tree / 'z.png').symlink_to(tmp_path / 'nowhere')
    picture(tmp_path / 'elsewhere' / 'f.png', 9)
    (tree / 'linked').symlink_to(tmp_path / 'elsewhere')
    found = files.find_images([tree])
    assert [os.path.relpath(path, tree) for path in found] == [
        'a/c.JFIF', 'a/deep/er/d.jpe', 'b.png', 'linked/f.png', 'x.jpg/e.bmp', 'z.png'
    ]  # fmt: skip
    with pytest.raises(UserError, match=r'unreadable image .*z.png: No such file'):
        files.pixels(found[-1], view)


def test_the_folder_of_the_output_is_left_out(tree):
    found = files.find_images([tree, tree / 'b.png'], skip=tree / 'a' / 'deep')
    left = ['a/c.JFIF', 'b.png', 'x.jpg/e.bmp', 'b.png']
    assert [os.path.relpath(path, tree) for path in found] == left


def test_what_is_not_there_or_no_image_is_named(tree, tmp_path):
    for path, why in (
        (tmp_path / 'none.png', 'no image'), (tree / 'b.png' / 'c', 'Not a directory'),
        (tmp_path / 'a\0b', 'null'), ('x' * 300, 'too long'),
        ('nowhere://a/b.png', 'nowhere'),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            files.find_images([path])
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='no images in .*empty'):
        files.find_images([tmp_path / 'empty'])
    os.mkfifo(tree / 'pipe.png')
    for path in (tree / 'notes.txt', tree / 'pipe.png', tree / 'a', tmp_path / 'none.png'):
        with pytest.raises(images.Unreadable, match=f'unreadable image {path}: .'):
            files.pixels(path, view)


@pytest.fixture
def address(tree):
    """The address of `tree` at a web server, whose pages list what is in a folder."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=tree)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


def test_addresses_of_a_web_server(address, monkeypatch):
    monkeypatch.setenv('NO_PROXY', '*')
    found = files.find_images([f'{address}/b.png?a=1', f'{address}/a/'])
    assert found == [
        f'{address}/{name}' for name in ('b.png?a=1', 'a/c.JFIF', 'a/deep/er/d.jpe')
    ]  # fmt: skip
    assert [files.pixels(path, view)[0, 0, 0] for path in found] == [0, 1, 2]
    with pytest.raises(UserError, match=f'{address}/none.png: .*(404|no such file)'):
        files.find_images([f'{address}/none.png'])
    for name in ('none.png', 'notes.txt'):
        with pytest.raises(images.Unreadable, match=f'unreadable image {address}/{name}: .'):
            files.pixels(f'{address}/{name}', view)
    monkeypatch.setattr(files, 'MOST_BYTES', 20)
    with pytest.raises(images.Unreadable, match='more than 20 bytes'):
        files.pixels(found[0], view)


def test_addresses_of_a_store(tree):
    store = fsspec.filesystem('memory')
    store.put(str(tree), '/shelf', recursive=True)
    found = files.find_images(['memory://shelf', 'memory://shelf/b.png'])
    wanted = [f'memory://shelf/{name}' for name in EXPECTED]
    assert [path.replace(':///', '://') for path in found] == [*wanted, wanted[2]]
    assert [files.pixels(path, view)[0, 0, 0] for path in found] == [*VALUES, 0]
    with pytest.raises(UserError, match='memory://shelf/none'):
        files.find_images(['memory://shelf/none'])
    store.rm('/shelf', recursive=True)
    with pytest.raises(images.Unreadable, match='no such file'):
        files.pixels(found[0], view)
