"""The commands of README.md and docs/ run, on small data; those that can't are listed here."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys

import launched
import numpy as np
import pytest
import scenes
import xla_flags
from pages import FENCED, ROOT, commands
from PIL import Image

CHECKPOINT = ROOT / 'tests' / 'data' / 'official_vit_prelogits.npz'
# Beginnings of commands that no test can run as they stand, and what does instead.
NOT_RUN = {
    'bash launch.sh': 'tests/test_launch.py',
    'python -m vit_jax.main --config FILE[:ARG]': 'says what is taken',
    'python -m vit_jax.main --config experiments/siglip.py': 'no such data; tests/test_recipes.py',
    'python -m vit_jax.main --config experiments/emoji.py': 'a download; tests/test_kept.py',
    'python -m vit_jax.data.tokenizers --captions emoji': 'the same; tests/test_image_text.py',
    'python -m vit_jax.plan --config experiments/pretrain.py': 'minutes; tests/test_plan.py',
    'python -m vit_jax.tables vit.table5 --run slurm': 'a cluster; tests/test_tables.py',
    "python -m vit_jax.tables vit.table5 --row 'ImageNet-21k": 'days; tests/test_selection.py',
    'python -m vit_jax.tables study --run': 'an hour; tests/test_scaling.py',
    'python -m vit_jax.tables augreg_fashion --run': 'the same',
    'python -m vit_jax.tables ssl_study --run': 'the same',
    'python -m benchmarks.': 'minutes; tests/test_benchmarks.py',
}
STAND_INS = {  # for what a reader puts in; of its own for some commands
    'python -m vit_jax.data.prepare': {'SRC': 'images', 'DST': 'shards', 'TEST_SET': 'others'},
    'python -m vit_jax.export': {'FILE': 'exported'},
    'python -m vit_jax.plan': {'v5e:16x16': 'cpu:8'},
    'python -m vit_jax.main --config segmenter.py': {'PATH': 'scenes'},
    'python -m vit_jax.figures SRC --masks segmenter.py': {'PATH': 'scenes'},
    'python -m vit_jax.main': {'FILE': 'tests/tiny.py:images'},
    '': {
        'PATH_OR_TFDS_NAME': 'images', 'PATH': 'images', 'FOLDER': 'images', 'SRC': 'runs/mine',
        'DST': 'converted', 'FILE': 'experiments/folder.py:images', 'DINOV2': 'runs/mine',
        'dinov2_vits14': 'runs/mine', 'augreg/b_16-i21k': 'runs/mine',
    },
}  # fmt: skip
SMALL = '--config.steps=2 --config.optim.warmup=0 --config.data.batch_size=8'
SMALL_EVALS = '--config.evals.val.image_size=32 --config.evals.val.batch_size=2'
SHORTER = {  # what makes it take seconds, added to the command
    'experiments/folder.py:PATH': f'{SMALL} --config.model.depth=1',
    'segmenter.py:PATH --config.init_from': f'{SMALL} --config.data.image_size=32 {SMALL_EVALS}',
    'experiments/finetune.py': f'{SMALL} --config.data.image_size=64',
    'tests/denoise.py:FOLDER --workdir runs/denoise': '--config.steps=8',
    '--config FILE --step 100': '--config.steps=101',
    'focal.py:focal': '--config.steps=20',
}
RUN = [line for line in commands() if not line.startswith(tuple(NOT_RUN))]


def test_what_is_not_run_is_in_the_docs():
    assert len(RUN) > 15
    for beginning in NOT_RUN:
        assert any(line.startswith(beginning) for line in commands()), beginning


def filled(line):
    """A command with stand-ins for what a reader puts in."""
    more = [flags for part, flags in SHORTER.items() if part in line and '--dry_run' not in line]
    values = {}
    for beginning in STAND_INS:
        if line.startswith(beginning):
            values = STAND_INS[beginning] | values
    form = '|'.join(rf'(?<![\w/]){re.escape(word)}(?![\w/])' for word in values)
    return ' '.join([re.sub(form, lambda m: values[m[0]], line), *more])


def run(line, folder):
    """The output of a line of shell, in a folder, with this Python."""
    command = re.sub(r'^python\b', lambda m: sys.executable, line)
    xla = xla_flags.devices(1, cpu_alone='vit_jax.plan' not in line)
    environment = os.environ | {'XLA_FLAGS': xla, 'PYTHONPATH': str(ROOT)}
    process = subprocess.Popen(
        ['bash', '-c', command], cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=280)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with all that the command has started
        raise
    assert process.returncode == 0, f'{line}\n{out}{err}'
    return out


def write_scenes(path):
    """Images beside masks of three classes."""
    rng = np.random.default_rng(0)
    for part, i in itertools.product(('train', 'val'), range(8)):
        for name, array in zip(('masks', 'images'), scenes.blocks((40, 50), rng, 3), strict=True):
            file = path / part / name / f'{i}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(scenes.png(array))
    (path / 'classes.txt').write_text('a\nb\nc')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with the recipes, images and five runs."""
    folder = tmp_path_factory.mktemp('docs')
    for name in ('experiments', 'tests'):
        (folder / name).symlink_to(ROOT / name)
    launched.write_images(folder / 'images', {'train': 12, 'val': 5})
    launched.write_images(folder / 'others', {'train': 1, 'test': 2}, seed=1)
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    for name in ('photo.jpg', 'china.png', 'flower.png'):
        Image.fromarray(noise).save(folder / name)
    blocks = FENCED.findall((ROOT / 'docs' / 'extending.md').read_text())
    (folder / 'focal.py').write_text(next(code for kind, code in blocks if kind == 'py'))
    train = 'python -m vit_jax.main --workdir runs/'
    run(f'{train}mine --config experiments/folder.py:images {SMALL} --config.model.depth=1', folder)
    run(f'{train}denoise --config tests/denoise.py:images --config.steps=8', folder)
    blocks = FENCED.findall((ROOT / 'docs' / 'dense.md').read_text())
    (folder / 'segmenter.py').write_text(next(code for kind, code in blocks if kind == 'py'))
    write_scenes(folder / 'scenes')
    run(filled(next(line for line in RUN if '--config segmenter.py' in line)), folder)
    for name in ('a', 'b'):
        shutil.copytree(folder / 'runs' / 'mine', folder / 'runs' / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('line', RUN, ids=lambda line: line[:80])
def test_a_command_of_the_docs_runs(line, folder):
    said = run(filled(line), folder)
    assert said.strip() or '--out' in line or '--features' in line


@pytest.mark.slow
def test_the_block_on_loading_and_saving_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    blocks = [code for _, code in FENCED.findall((ROOT / 'README.md').read_text())]
    block = next(code for code in blocks if 'vit_jax.save' in code)
    picture = Image.open('photo.jpg')
    given = {'path': CHECKPOINT, 'picture': picture, 'array': np.asarray(picture)}
    exec(block.replace('augreg/b_16-i21k', str(CHECKPOINT)).replace('a.jpg', 'photo.jpg'), given)
    assert given['logits'].shape == (3, 37) and (folder / 'mine').is_dir()
    assert {'attention', 'tokens_by_block', 'pre_logits'} <= set(given['out'])
