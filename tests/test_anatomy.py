"""What a model has learnt, as arrays and pictures: against scikit-learn and loops in words."""

import base64
import html
import pathlib
import re
import subprocess
import sys

import jax
import launched
import numpy as np
import pytest
import scipy.special
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity

import vit_jax
from vit_jax.convert import load as weights
from vit_jax.data import files, tasks
from vit_jax.figures import anatomy

DATA = pathlib.Path(__file__).with_name('data')
RNG = np.random.default_rng(0)


def attention(layers=3, batch=2, heads=4, grid=(3, 5), prefix=1):
    """Random probabilities [L, B, H, T, T]."""
    tokens = prefix + grid[0] * grid[1]
    logits = RNG.normal(0, 2, (layers, batch, heads, tokens, tokens))
    e = np.exp(logits)
    return e / e.sum(-1, keepdims=True)


def test_components_are_those_of_scikit_learn():
    kernel = RNG.normal(0, 1, (4, 4, 3, 100)) * np.linspace(0.1, 2, 3)[:, None]
    components, shares = anatomy.filter_components(kernel, 10)
    pca = PCA(10).fit(kernel.reshape(48, 100).T)
    np.testing.assert_allclose(shares, pca.explained_variance_ratio_, rtol=1e-6)
    for mine, theirs in zip(components.reshape(10, -1), pca.components_, strict=True):
        assert abs(mine @ theirs) == pytest.approx(1, abs=1e-6)
        assert mine[np.abs(mine).argmax()] > 0
    few, _ = anatomy.filter_components(RNG.normal(0, 1, (2, 2, 1, 3)), 28)
    assert len(few) == 3  # as many as there are


def test_positions_are_compared_without_those_of_the_prefix():
    table = RNG.normal(0, 1, (1, 2 + 6, 16))
    found = anatomy.position_similarity(table, (2, 3))
    expected = cosine_similarity(table[0, 2:])
    np.testing.assert_allclose(found.reshape(6, 6), expected, atol=1e-12)
    assert found[1, 2, 1, 2] == pytest.approx(1)


def test_distance_is_the_mean_over_patches_in_pixels():
    probs, (h, w), stride = attention(), (3, 5), (8, 16)
    found = anatomy.attention_distance(probs, (h, w), stride)
    for layer, head in ((0, 0), (2, 3)):
        distances = []
        for image in range(2):
            for q in range(h * w):
                weights = probs[layer, image, head, 1 + q, 1:]
                far = [np.hypot((q // w - k // w) * 8, (q % w - k % w) * 16) for k in range(h * w)]
                distances.append(np.average(far, weights=weights))
        assert found[layer, head] == pytest.approx(np.mean(distances))
    own = np.broadcast_to(np.eye(16), (1, 1, 1, 16, 16))
    assert anatomy.attention_distance(own, (3, 5), stride) == 0


def test_rollout_multiplies_what_layers_pass_on():
    probs = attention(grid=(2, 2))
    found = anatomy.rollout(probs, (2, 2))
    for image in range(2):
        flow = np.eye(5)
        for layer in range(3):  # arXiv:2005.00928 eq. 1, one head's mean after the other
            mean = sum(probs[layer, image, head] for head in range(4)) / 4
            flow = (0.5 * mean + 0.5 * np.eye(5)) @ flow
        row = flow[0, 1:] / flow[0, 1:].sum()
        np.testing.assert_allclose(found[image].reshape(-1), row)
    nothing = np.zeros((2, 1, 1, 5, 5))
    nothing[..., 0, 3] = 1.0  # the class token sees patch 3 alone
    nothing[..., [1, 2, 3, 4], [1, 2, 3, 4]] = 1.0
    assert anatomy.rollout(nothing, (2, 2))[0].tolist() == [[0, 0], [1, 0]]


def test_maps_of_heads_are_rows_of_the_class_token():
    probs = attention(prefix=3)  # registers are left out
    found = anatomy.head_maps(probs, (3, 5), layer=1)
    assert found.shape == (2, 4, 3, 5)
    np.testing.assert_array_equal(found[1, 2].reshape(-1), probs[1, 1, 2, 0, 3:])


def figures(*arguments):
    return subprocess.run(
        [sys.executable, '-m', 'vit_jax.figures', *map(str, arguments)],
        capture_output=True, text=True, env=launched.ENVIRONMENT,
    )  # fmt: skip


@pytest.mark.slow
def test_a_checkpoint_is_drawn(tmp_path):
    for i in range(2):
        pixels = RNG.integers(0, 255, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f'{i}.png')
    out = tmp_path / 'out'
    checkpoint = DATA / 'official_vit_prelogits.npz'
    drawn = figures(checkpoint, '--images', tmp_path, '--out', out)
    assert drawn.returncode == 0, drawn.stderr
    names = ['filters.png', 'positions.png', 'distance.png', 'rollout.png', 'heads.png']
    said = [f'Picture: {out}/{name}' for name in names]
    assert drawn.stdout.splitlines() == [*said, f'Page: {out}/page.html']
    page = (out / 'page.html').read_text()
    held = [base64.b64decode(data) for data in re.findall(r'base64,([^"]+)"', page)]
    assert held == [(out / name).read_bytes() for name in names]
    assert '://' not in page and page.count('src=') == len(names)  # nothing beside it is needed
    text = html.unescape(re.sub('<[^>]*>', '|', page))
    model, params = vit_jax.load(checkpoint)
    assert f'{sum(x.size for x in jax.tree.leaves(params)):,} parameters' in text
    assert f'|num_heads||{model.num_heads}|' in text
    before = {}
    for name in names:
        with Image.open(out / name) as picture:
            pixels = np.array(picture.convert('RGB'))
        assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
        before[name] = (out / name).read_bytes()
    figures(checkpoint, '--images', tmp_path, '--out', out)
    assert (out / 'page.html').read_text() == page
    assert all((out / name).read_bytes() == before[name] for name in names)


@pytest.mark.slow
def test_a_model_without_attention_says_what_it_sees(tmp_path):
    Image.fromarray(RNG.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / 'a & b.png')
    checkpoint = DATA / 'official_mixer.npz'
    drawn = figures(checkpoint, '--images', tmp_path / 'a & b.png', '--out', tmp_path / 'out')
    assert drawn.returncode == 0, drawn.stderr
    assert drawn.stdout.splitlines() == [
        f'Picture: {tmp_path}/out/filters.png', f'Page: {tmp_path}/out/page.html']
    page = (tmp_path / 'out' / 'page.html').read_text()
    said = re.findall(r'<td>a &amp; b.png</td><td>class (\d+)</td><td>([\d.]+)%', page)
    found = weights.read(checkpoint)
    model, params = found.model, found.params
    pixels = files.pixels(tmp_path / 'a & b.png', tasks.make_view('central', found.image_size))
    logits, _ = model.apply({'params': params}, model.normalise(pixels[None]))
    shares = scipy.special.softmax(np.float64(logits[0]))
    assert [int(i) for i, _ in said] == list(np.argsort(-shares)[:5])
    best = 100 * np.sort(shares)[:-6:-1]
    np.testing.assert_allclose([float(p) for _, p in said], best, atol=6e-3)


@pytest.mark.parametrize('arguments, words', [
    ([DATA / 'official_vit_prelogits.npz'], 'give --out'),
    ([DATA / 'official_vit_prelogits.npz', '--images', '/nowhere', '--out', '{}'], 'no image /now'),
    (['/nowhere.npz', '--out', '{}'], '/nowhere.npz'),
])  # fmt: skip
def test_mistakes_are_one_line(tmp_path, arguments, words):
    failed = figures(*(str(a).format(tmp_path) for a in arguments))
    assert failed.returncode == 2 and words in failed.stderr
    assert failed.stderr.count('\n') == 1, failed.stderr
