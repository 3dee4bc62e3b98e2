"""Two runs side by side: where they part, what differs in their settings, and the picture."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vit_jax import compare
from vit_jax.run import workdir


def curves(part_at, size, count=400, noise=0.02, seed=0):
    """Two noisy curves that fall alike; from step `part_at` on the second lies `size` above."""
    rng = np.random.default_rng(seed)
    steps = range(10, 10 * count + 10, 10)
    base = [2 * np.exp(-s / 1500) + 0.5 for s in steps]
    a = {s: v + rng.normal(0, noise) for s, v in zip(steps, base, strict=True)}
    b = {s: v + rng.normal(0, noise) + size * (s >= part_at)
         for s, v in zip(steps, base, strict=True)}  # fmt: skip
    return a, b


@pytest.mark.parametrize('size', [0.05, 0.5])
def test_a_divergence_is_found_within_a_window(size):
    a, b = curves(2000, size)
    found = compare.divergence(a, b)
    assert found.first == 10  # other bits from the start
    assert 2000 - 10 * 20 <= found.significant <= 2000 + 10 * 20
    assert found.sigma == pytest.approx(0.02 * 2**0.5, rel=0.2)


def test_noise_alone_is_no_divergence():
    diverged = [compare.divergence(*curves(0, 0.0, seed=seed)).significant for seed in range(40)]
    assert sum(p is not None for p in diverged) <= 2


def test_equal_bits_and_a_single_other_one():
    a, _ = curves(0, 0.0)
    assert compare.divergence(a, dict(a)) == (None, None, 0.0)
    b = dict(a)
    b[1500] = np.nextafter(b[1500], 9)
    found = compare.divergence(a, b)
    assert found.first == 1500 and found.significant is None  # rounding is no divergence
    late = {s: v + (0.01 if s >= 3000 else 0) for s, v in a.items()}
    assert compare.divergence(a, late).first == 3000
    assert 2800 <= compare.divergence(a, late).significant <= 3000
    assert compare.divergence({1: 0.5}, {2: 0.5}).first is None


def written(path, curve, rate, commit):
    path.mkdir()
    lines = [json.dumps({'step': s, 'loss': v, 'lr': rate}) for s, v in curve.items()]
    (path / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
    workdir.write_json(path / 'config.json', {'optim': {'lr': rate, 'name': 'adamw'}})
    result = {'versions': {'jax': commit, 'numpy': '2'}, 'git_commit': commit}
    workdir.write_json(path / 'result.json', result)


def command(*args):
    return subprocess.run(
        [sys.executable, '-m', 'vit_jax.compare', *map(str, args)], capture_output=True,
        text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_says_what_differs_and_draws_it(tmp_path):
    a, b = curves(2000, 0.5)
    written(tmp_path / 'a', a, 0.001, 'one')
    written(tmp_path / 'b', b, 0.003, 'two')
    done = command(tmp_path / 'a', tmp_path / 'b', '--out', tmp_path / 'x.png')
    assert done.returncode == 0, done.stderr
    words = done.stdout
    assert 'loss at 400 common steps' in words and 'differ first at step 10' in words
    assert 'differ by more than noise from step ' in words
    assert 'optim.lr  0.001  0.003  changes the result' in words and 'optim.name' not in words
    assert 'jax  one  two' in words and 'numpy' not in words
    pixels = np.array(Image.open(tmp_path / 'x.png').convert('RGB'))
    assert pixels.shape == (750, 1200, 3) and (pixels != 255).any(-1).mean() > 0.01
    curve = tmp_path / 'a' / 'metrics.jsonl'  # a stored reference curve
    same = command(tmp_path / 'a', curve, '--out', tmp_path / 'y.png')
    assert 'equal to the last bit' in same.stdout and 'settings' not in same.stdout
    # What is there is kept.
    before = (tmp_path / 'x.png').read_bytes()
    arguments = (tmp_path / 'a', curve, '--out', tmp_path / 'x.png')
    kept = command(*arguments)
    assert kept.returncode == 2 and '/x.png exists; --force' in kept.stderr
    assert (tmp_path / 'x.png').read_bytes() == before
    new = command(*arguments, '--force')
    assert new.returncode == 0 and new.stdout.splitlines()[:-1] == same.stdout.splitlines()[:-1]
    assert (tmp_path / 'x.png').read_bytes() != before


@pytest.mark.slow
def test_mistakes_are_one_line(tmp_path):
    written(tmp_path / 'a', {1: 2.0}, 0.1, 'x')
    written(tmp_path / 'b', {2: 2.0}, 0.1, 'x')
    assert 'usage: ' in command().stderr
    for args, words in (
        ([tmp_path / 'a'], 'usage: '), (['compare', 'a', 'b'], 'usage: '),
        ([tmp_path / 'a', tmp_path / 'no'], f'no run and no file {tmp_path}/no'),
        ([tmp_path / 'a', tmp_path / 'a', '--metric', 'f1'],
         "/a has no --metric 'f1'; there are loss"),
        ([tmp_path / 'a', tmp_path / 'b'], 'no step in common'),
    ):
        failed = command(*args)
        assert failed.returncode == 2 and words in failed.stderr, failed.stderr
        assert 'Traceback' not in failed.stderr
