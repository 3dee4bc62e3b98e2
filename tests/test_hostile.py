"""Names of folders, files and classes that try to command the terminal, through every command."""

import csv
import json
import os
import subprocess
import sys

import launched
import numpy as np
import pytest
from PIL import Image

from vit_jax.data import mixture
from vit_jax.evaluators import classify
from vit_jax.figures import page
from vit_jax.io import text

CLASSES = (
    '=1+1|x\n\t\x1b[2J\x1b]0;gone\x07',
    '<script>$\\x^_{&%#',
    'turned\u202e\u2066\x9b31m\udcff\udcfe',
)
SHORT = ('--config.steps=2', '--config.optim.warmup=0', '--config.evals.val.every=1')
FILE = '\x1b[31m\r\n\u2028\udcfd<img>{}.png'
PLAIN = launched.ENVIRONMENT | {'PYTHONIOENCODING': 'ascii'}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A folder of images."""
    path = tmp_path_factory.mktemp('data') / 'images\n\x1b[1m'
    pixels = launched.write_images(tmp_path_factory.mktemp('plain'), {'train': 4, 'val': 2})
    for i, file in enumerate(sorted(pixels.rglob('*.png'))):
        name = CLASSES[('ant', 'bee', 'cat').index(file.parent.name)]
        place = path / file.parts[-3] / name
        place.mkdir(parents=True, exist_ok=True)
        file.rename(place / FILE.format(i))
    return path


def run(module, *arguments, status=0):
    """The standard output of a command, both of whose streams a terminal can show."""
    done = subprocess.run(
        [sys.executable, '-m', f'vit_jax.{module}', *map(str, arguments)], capture_output=True,
        env=PLAIN,
    )  # fmt: skip
    assert done.returncode == status, done.stderr.decode(errors='replace')[-2000:]
    for stream in (done.stdout, done.stderr):
        check(stream.decode('ascii'))
    return done.stdout.decode()


def check(shown):
    """No character of a text does anything but end a line."""
    assert not {c for c in shown if c != '\n' and text.escaped(c)}


def strict(line):
    """JSON in which a number is a number."""
    return json.loads(line, parse_constant=lambda name: pytest.fail(f'{name} is no JSON'))


def test_pages_cells_and_titles():
    """What needs no run: a page, the CSV of an evaluation, the title of a data set."""
    shown = page.document(FILE, CLASSES[0], [(CLASSES[1], FILE, [CLASSES, CLASSES])])
    check(shown)
    assert '<script' not in shown and '<img' not in shown
    found = dict(label=np.arange(3), prediction=np.arange(3))
    written = classify.by_class(found, CLASSES, 3)
    check(written)
    first = [row[0] for row in csv.reader(written.splitlines()[1:])]
    assert first == [text.cell(name) for name in CLASSES] and first[0].startswith("'=")
    check(mixture.title({'name': FILE}) + mixture.title({'mixture': dict.fromkeys(CLASSES)}))


@pytest.fixture(scope='module')
def workdir(data, tmp_path_factory):
    """A run on them."""
    path = tmp_path_factory.mktemp('runs') / 'x\n|y'
    config = (f'--config={launched.TINY}:{data}', f'--workdir={path}')
    run('main', *config, *SHORT)
    assert sorted(json.loads((path / 'classes.json').read_text())) == sorted(CLASSES)
    run('main', *config, *SHORT, '--dry_run')
    run('main', *config, status=2)  # another config: a table of what differs
    return path


@pytest.mark.slow
def test_evaluation(workdir, tmp_path):
    run('evaluate', f'--checkpoint={workdir}', f'--out={tmp_path}')
    rows = (tmp_path / 'val.csv').read_text(encoding='ascii').splitlines()
    check('\n'.join(rows))
    assert {row[0] for row in csv.reader(rows[1:])} == set(map(text.cell, CLASSES))
    strict(run('evaluate', f'--checkpoint={workdir}', '--json'))


@pytest.mark.slow
def test_prediction(data, workdir, tmp_path):
    images, broken = data / 'val', tmp_path / FILE.format('broken,')
    broken.write_bytes(b'no image')
    said = run('predict', f'--checkpoint={workdir}', images, broken, status=2)
    assert all(text.printable(name) in said for name in CLASSES)
    said = run('predict', f'--checkpoint={workdir}', '--json', images, broken, status=2)
    assert len(said.splitlines()) == 6
    for line in map(strict, said.splitlines()):
        assert os.path.exists(line['image'])
        assert {row['name'] for row in line['top']} == set(CLASSES)
    run('predict', f'--checkpoint={workdir}', tmp_path / 'no\n\x1bfile.jpg', status=2)
    said = run('figures', workdir, f'--images={images}', f'--images={broken}',
               f'--out={tmp_path}/page', status=2)  # fmt: skip
    assert f'Page: {tmp_path}/page/page.html' in said
    drawn = (tmp_path / 'page' / 'page.html').read_text(encoding='utf-8')
    check(drawn)
    assert '<script' not in drawn and drawn.count('<img') == drawn.count('base64')
    for picture in (tmp_path / 'page').glob('*.png'):
        Image.open(picture).verify()


@pytest.mark.slow
def test_data(data, workdir, tmp_path):
    config = f'--config={workdir}/config.json'
    run('data', config, '--step=1', f'--show={tmp_path}/batch.png')
    for line in run('data', config, '--step=1', '--json').splitlines():
        assert {*strict(line)['labels']} <= set(CLASSES)
    run('data.prepare', data, tmp_path / 'rec\x1bords', '--split=val')


@pytest.mark.slow
def test_files_that_are_written(workdir, tmp_path):
    for format, name in (('hf', 'a\x1bhf'), ('timm', 'timm'), ('official', 'a\nb.npz')):
        run('convert', workdir, tmp_path / name, f'--to={format}')
        run('convert', tmp_path / name)
    run('export', f'--checkpoint={workdir}', f'--out={tmp_path}/a\nb.bin', '--platforms=cpu')
    run('compare', workdir, workdir, f'--out={tmp_path}/c.png')
    run('tables', 'vit.table5', f'--runs={workdir.parent}', f'--out={tmp_path}/tables')
    for file in (tmp_path / 'tables').iterdir():
        check(file.read_text(encoding='utf-8'))
