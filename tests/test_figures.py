"""The command that draws a run, on a real one; and the recipe of the quickstart."""

import html
import io
import json
import pathlib
import re
import subprocess
import sys

import jax
import launched
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix

import vit_jax
from vit_jax.data import sources


def figures(*arguments):
    return subprocess.run(
        [sys.executable, '-m', 'vit_jax.figures', *map(str, arguments)],
        capture_output=True, text=True, env=launched.ENVIRONMENT,
    )  # fmt: skip


@pytest.mark.slow
def test_the_recipe_of_the_quickstart_trains_and_is_drawn(tmp_path):
    workdir = tmp_path / 'run'
    experiment = launched.TINY.parents[1] / 'experiments' / 'digits.py'
    flags = [f'--config.{key}={value}' for key, value in {
        'steps': 120, 'optim.warmup': 10, 'data.source.data_dir': tmp_path / 'tfds',
        'evals.test.source.data_dir': tmp_path / 'tfds',
    }.items()]
    done = subprocess.run(
        [sys.executable, '-m', 'vit_jax.main', f'--config={experiment}', f'--workdir={workdir}',
         *flags], capture_output=True, text=True, env=launched.ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((workdir / 'result.json').read_text())
    assert result['metrics']['test/examples'] == 359 and result['metrics']['test/accuracy'] > 0.4
    assert f'Result: {workdir}/result.json' in done.stdout
    before = sorted(p for p in workdir.rglob('*'))
    drawn = figures(workdir)
    assert drawn.returncode == 0 and f'Page: {workdir}/page.html' in drawn.stdout
    assert drawn.stderr == ''
    names = [f'{n}.png' for n in ('summary', 'confusion', 'curves', 'filters', 'positions')]
    assert drawn.stdout.splitlines()[:-1] == [f'Picture: {workdir}/{name}' for name in names]
    with Image.open(workdir / 'summary.png') as picture:
        assert picture.width == 1800 and picture.height > 1500
    new = [workdir / name for name in (*names, 'page.html')]
    assert sorted(p for p in workdir.rglob('*')) == sorted([*before, *new])
    check_page((workdir / 'page.html').read_text(), workdir, result)
    assert figures(workdir, f'--out={tmp_path}/new').returncode == 0
    one = figures(workdir / 'checkpoints' / '120', f'--out={tmp_path}/one')
    assert one.stdout.splitlines() == [
        *(f'Picture: {tmp_path}/one/{name}.png' for name in ('filters', 'positions')),
        f'Page: {tmp_path}/one/page.html',
    ]
    for path in new:
        assert (tmp_path / 'new' / path.name).read_bytes() == path.read_bytes()


def check_page(page, workdir, result):
    """Its figures are those of result.json and of scikit-learn's confusion matrix."""
    rows = re.findall('<tr>(.*?)</tr>', page)
    rows = [tuple(map(html.unescape, re.findall('<t[dh][^>]*>(.*?)</t[dh]>', r))) for r in rows]
    assert ('test/accuracy', f'{result["metrics"]["test/accuracy"]:.4g}') in rows
    assert ('optim.lr', '0.002') in rows and ('jax', jax.__version__) in rows
    assert ('exaflops', f'{result["costs"]["exaflops"]:.4g}') in rows
    assert 'class=bad>FAIL' in page  # 120 steps are not enough for what the recipe expects
    model, params = vit_jax.load(workdir, ema=True)
    images = sources.load(name='digits', split='test', data_dir=workdir.parent / 'tfds').records
    labels = [int(images[i]['label']) for i in range(len(images))]
    pixels = np.stack([np.array(Image.open(io.BytesIO(images[i]['image'])).convert('RGB'))
                       for i in range(len(images))])  # fmt: skip
    logits, _ = model.apply({'params': params}, model.normalise(pixels))
    counts = confusion_matrix(labels, np.argmax(logits, axis=1))
    often = sorted(
        (-counts[i, j], i, j) for i in range(10) for j in range(10) if i != j and counts[i, j]
    )
    start = rows.index(('true class', 'predicted', 'times', 'of')) + 1
    assert rows[start : start + min(len(often), 20)] == [
        (str(i), str(j), str(-n), str(counts[i].sum())) for n, i, j in often[:20]
    ]


@pytest.mark.slow
def test_a_model_without_class_token_and_a_run_that_goes_on(tmp_path):
    folder = launched.write_images(tmp_path / 'images', {'train': 8, 'val': 5})
    workdir = tmp_path / 'run'
    process = launched.start(folder, workdir, '--config.model.pool=gap', '--config.steps=3000')
    launched.wait_for(lambda: launched.checkpoints(workdir), process, workdir)
    drawn = figures(workdir)
    assert drawn.returncode == 0, drawn.stderr
    assert (workdir / 'summary.png').exists() and process.poll() is None
    launched.kill(process)


@pytest.mark.parametrize('arguments, words', [
    ([], 'usage: python -m vit_jax.figures X'), (['/nowhere'], '/nowhere is not the workdir'),
    (['/nowhere.npz', '--out=/dev/null/x'], 'cannot write /dev/null/x'),
    (['/nowhere.npz', '--out=/nowhere', '--images=/nowhere.png'], 'no image /nowhere.png'),
])
def test_mistakes_are_named_and_make_no_folder(arguments, words):
    done = figures(*arguments)
    assert not pathlib.Path('/nowhere').exists()
    assert done.returncode == 2 and words in done.stderr and done.stderr.count('\n') == 1
