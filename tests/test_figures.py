"""The command that draws a run, on a real one; and the recipe of the quickstart."""

import json
import pathlib
import subprocess
import sys

import launched
import pytest
from PIL import Image


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
    assert drawn.returncode == 0 and f'Picture: {workdir}/summary.png' in drawn.stdout
    assert drawn.stderr == ''
    with Image.open(workdir / 'summary.png') as picture:
        assert picture.width == 1800 and picture.height > 1500
    assert sorted(p for p in workdir.rglob('*')) == sorted([*before, workdir / 'summary.png'])
    assert figures(workdir, f'--out={tmp_path}/new').returncode == 0
    assert (tmp_path / 'new' / 'summary.png').read_bytes() == (
        workdir / 'summary.png').read_bytes()


@pytest.mark.slow
def test_a_model_without_class_token_and_a_run_that_goes_on(tmp_path):
    folder = launched.write_images(tmp_path / 'images', {'train': 8, 'val': 5})
    workdir = tmp_path / 'run'
    process = launched.start(folder, workdir, '--config.model.pool=gap', '--config.steps=3000')
    launched.wait_for(lambda: launched.checkpoints(workdir), process, workdir)
    drawn = figures(workdir)
    assert drawn.returncode == 0, drawn.stderr
    assert (workdir / 'summary.png').exists() and process.poll() is None
    process.kill()
    process.wait()


@pytest.mark.parametrize('arguments, words', [
    ([], 'usage: python -m vit_jax.figures X'), (['/nowhere'], '/nowhere is no workdir'),
])
def test_mistakes_are_named_and_make_no_folder(arguments, words):
    done = figures(*arguments)
    assert not pathlib.Path('/nowhere').exists()
    assert done.returncode == 2 and words in done.stderr and done.stderr.count('\n') == 1
