"""Files that can't be written: one line that names them, before anything is computed."""

import os
import pathlib
import subprocess
import sys

import launched
import pytest

from vit_jax import evaluate
from vit_jax.errors import UserError
from vit_jax.io import storage
from vit_jax.run import workdir

CHECKPOINT = pathlib.Path(__file__).parent / 'data' / 'timm_vit_token'


def test_a_file_takes_the_place_of_a_file_alone(tmp_path):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'plain').write_text('before')
    os.mkfifo(tmp_path / 'pipe')
    for name, words in (
        ('folder', 'it is a folder; name a file'), ('pipe', 'it is not a regular file'),
        ('plain/x', ''), ('x' * 300, 'File name too long'),
    ):
        path = workdir.located(tmp_path / name)
        for call in (storage.prepare_file, lambda path: storage.write(path, b'after')):
            with pytest.raises(UserError, match=f'cannot write {path}: {words}'):
                call(path)
    assert (tmp_path / 'pipe').is_fifo() and (tmp_path / 'plain').read_text() == 'before'
    path = storage.prepare_file(workdir.located(tmp_path / 'new' / 'x'))
    storage.write(path, b'after')
    assert path.read_bytes() == b'after'


@pytest.mark.parametrize('address', ['s3://bucket/run', 'https://host/run', 'gs://', 'gs:///run'])
def test_an_address_of_another_kind_is_named(address):
    with pytest.raises(UserError, match=f'{address}: name a path of this machine, or gs://BUCKET'):
        workdir.located(address)


def test_each_evaluation_has_a_file_of_its_own(tmp_path):
    texts = {name: f'class,{name}' for name in ('c/x', 'c_x', 'c', 'c/x/y')}
    evaluate.write(workdir.located(tmp_path), texts)
    written = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob('*.csv')}
    assert written == {pathlib.Path(f'{name}.csv'): text for name, text in texts.items()}


@pytest.mark.slow
@pytest.mark.parametrize('command, words', [
    ('compare . . --out pipe.png', '/pipe.png: it is not a regular file'),
    ('compare . . --out x.pdf', '--out=x.pdf: name a file that ends in .png'),
    ('data --config DIGITS --show x', '--show=x: name a png, pdf, svg file of this machine'),
    ('data --config DIGITS --show pipe.png', '/pipe.png: it is not a regular file'),
    ('data --config DIGITS --step 999999', '--step is 999999; there are 0 to '),
    ('export --checkpoint CHECKPOINT --force --out pipe.png', 'pipe.png: it is not a regular'),
    ('convert CHECKPOINT pipe.png --to timm --force', 'pipe.png: it is not a regular file'),
    ('tables vit.table5 --out plain/x', '/plain/x: Not a directory'),
    ('tables vit.table5 --out=', 'flag --out is empty; give it a value'),
])
def test_each_command_names_what_it_can_not_write(command, words, tmp_path):
    (tmp_path / 'plain').write_text('before')
    os.mkfifo(tmp_path / 'pipe.png')
    experiments = pathlib.Path(launched.__file__).parents[1] / 'experiments'
    names = {'DIGITS': str(experiments / 'digits.py'), 'CHECKPOINT': str(CHECKPOINT)}
    done = subprocess.run(
        [sys.executable, '-m', *(names.get(w, w) for w in f'vit_jax.{command}'.split())],
        capture_output=True, text=True, cwd=tmp_path, env=launched.ENVIRONMENT, timeout=200,
    )  # fmt: skip
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert [s.startswith('error: ') for s in done.stderr.splitlines()] == [True]
    assert (tmp_path / 'pipe.png').is_fifo() and (tmp_path / 'plain').read_text() == 'before'
