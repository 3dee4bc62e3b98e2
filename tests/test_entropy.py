"""The guard of the JPEG extension: its entropy decoder is used only where it has libjpeg's bits."""

import importlib.util
import io
import itertools
import pathlib
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from vit_jax.data import entropy, images

SOURCE = pathlib.Path(entropy.__file__).with_name('_jpeg.c')
MISTAKES = {  # a name: (what the source has, what takes its place)
    'no mistake': ('', ''),
    'a bit of a long code': ('next = {value_of', 'next = {c.size > 8 ^ value_of'),
    'a negative value': ('+= 1 - (1 << c.size)', '+= -(1 << c.size)'),
    'a place that is left': ('block[natural[k]] = 0;', ';'),
    'a place in a block': ('49, 56, 57', '56, 49, 57'),
    'blocks without new coefficients': ('count = (1 << run)', 'count = 1 + (1 << run)'),
    'bits that refine': ('drop(b, whole ? count', 'drop(b, whole ? count + (count > 2)'),
    'a new coefficient': ('found |= bit_at(k)', 'found |= bit_at(k + 1)'),
    'a skipped block': ('advance += more;', 'advance += more + (more == 4);'),
    'a restart': ('memset(d->predictions', '(void)(d->predictions'),
    'a column of the window': ('d->column <= d->last_column', 'd->column < d->last_column'),
    'a block beside those of the pixels': ('pixels > 8 ? pixels / 8 : 0', '0'),
    'a group of rows': ('++*group;', ';'),
}
pytestmark = pytest.mark.skipif(images._jpeg is None, reason='the extension is not built')


def build(folder, before, after):
    """The extension, compiled with a mistake in its source."""
    source = SOURCE.read_text()
    assert before in source
    folder.mkdir()
    (folder / '_jpeg.c').write_text(source.replace(before, after, 1) if before else source)
    library = folder / '_jpeg.abi3.so'
    flags = ['-O0', '-w', '-shared', '-fPIC', '-I', sysconfig.get_path('include')]
    compile = ['cc', *flags, '_jpeg.c', '-o', library, '-ljpeg', '-lm']
    subprocess.run(compile, cwd=folder, check=True)
    spec = importlib.util.spec_from_file_location('_jpeg', library)
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return extension


def test_every_mistake_in_a_decoder_is_found(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        built = pool.map(
            lambda name: build(tmp_path / name.replace(' ', '_'), *MISTAKES[name]), MISTAKES
        )
        found = dict(zip(MISTAKES, map(entropy.mismatch, built), strict=True))
    assert found.pop('no mistake') == ''
    assert {name for name, reason in found.items() if 'makes other pixels' in reason} == set(found)


@pytest.mark.parametrize('versions', [('2.1.99', '2023'), ('2.1.5', '2098'), ('2.1.5', '')])
def test_a_version_that_was_not_tested_is_not_even_tried(versions, caplog):
    stand_in = SimpleNamespace(versions=lambda: versions)  # it has no `view` to call
    assert not entropy.is_exact(stand_in)
    assert '\n' not in caplog.text.strip() and f'libjpeg-turbo {versions[0]}' in caplog.text
    assert all(version in caplog.text for version in entropy.TESTED)


def test_a_decoder_that_refuses_the_picture_is_not_used():
    def view(*args):
        raise ValueError('no such Huffman code')

    stand_in = SimpleNamespace(versions=images._jpeg.versions, view=view)
    assert 'makes other pixels' in entropy.mismatch(stand_in)


def test_the_picture_has_what_the_decoder_has_to_know():
    data = entropy.picture()
    assert b'\xff\xdd' in data and b'\xff\xd0' in data  # restarts
    with Image.open(io.BytesIO(data)) as file:
        assert file.size == (75, 45) and [layer[1:3] for layer in file.layer][0] == (2, 2)
    assert len(data) < 10_000


def test_without_its_own_decoder_the_extension_gives_equal_pixels(monkeypatch):
    image = load_sample_image('china.jpg')[:300, :400]
    kinds = dict(quality=90), dict(quality=50, subsampling=0, restart_marker_rows=2)
    for options in *kinds, dict(quality=90, progressive=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, 'JPEG', **options)
        views = []
        for own in True, False:
            monkeypatch.setattr(images, 'OWN_ENTROPY', own)
            data = images.read(file.getvalue())
            assert isinstance(data, images.Encoded)
            views.append([
                images.resized(data, box, (32, 48), antialias=antialias, flip=flip)
                for box in ((0, 0, 300, 400), (37, 55, 90, 101))
                for antialias in (True, False) for flip in (True, False)
            ])  # fmt: skip
        np.testing.assert_array_equal(*views)


def test_the_reason_is_logged_once_and_not_by_workers():
    """A process that imports images, and a worker process of it that does, too."""
    code = (
        'import concurrent.futures, importlib, multiprocessing\n'
        'from vit_jax.data import entropy\n'
        'entropy.TESTED = {}\n'
        'def work():\n'
        '    from vit_jax.data import images\n'
        '    return images.OWN_ENTROPY\n'
        'if __name__ == "__main__":\n'
        '    context = multiprocessing.get_context("fork")\n'
        '    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:\n'
        '        assert not pool.submit(work).result()\n'
        '    assert not work() and not work()\n'
    )
    done = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True, check=True)
    assert done.stderr.count('JPEGs are decoded at about half the speed') == 1, done.stderr


def test_without_instructions_of_x86_pixels_are_equal(tmp_path):
    plain = build(tmp_path / 'plain', '#ifdef __x86_64__', '#if 0')
    assert entropy.mismatch(plain) == ''
    image = load_sample_image('china.jpg')
    shapes = [(90, 120), (3, 5), (16, 16), (7, 301), (1, 4), (2, 1)]
    for size, kind, antialias, flip in itertools.product(shapes, range(3), (0, 1), (0, 1)):
        ours, theirs = (np.full((*size, 3), 7, np.uint8) for _ in range(2))
        for extension, out in (images._jpeg, ours), (plain, theirs):
            extension.resize(image, out, (20, 30, 77, 140), kind, antialias, flip)
        np.testing.assert_array_equal(ours, theirs)
