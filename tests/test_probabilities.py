"""Whether a classifier was trained with a softmax or a sigmoid is known of each kind of checkpoint,
and every number that is called a probability is of that."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import vit_jax
from vit_jax import export, models, predict
from vit_jax.convert import load, stages
from vit_jax.data import files, tasks
from vit_jax.figures import model_page
from vit_jax.objectives import losses

SIZE, CLASSES = 16, 7
FORMATS = {'official': 'm.npz', 'big_vision': 'm.npz', 'timm': 'm', 'hf': 'm'}
KEEPS = dict(big_vision=dict(fold=True))


@pytest.fixture(scope='module')
def model():
    """A model with a head of large weights, so that a softmax and a sigmoid differ."""
    made = models.build(
        'vit/8', num_classes=CLASSES, width=16, depth=1, num_heads=2, mlp_dim=16
    )
    params = jax.jit(made.init)(jax.random.key(0), np.zeros((1, SIZE, SIZE, 3), 'f'))['params']
    params['head'] = jax.tree.map(
        lambda x: np.asarray(jax.random.normal(jax.random.key(1), x.shape)), params['head']
    )
    return made, params


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 16, 3), np.uint8)).save(tmp_path / f'{i}.png')
    return files.find_images([str(tmp_path)])


@pytest.mark.parametrize('loss', ['softmax', 'sigmoid', None])
@pytest.mark.parametrize('format', FORMATS)
def test_each_format_says_how_its_head_was_trained(model, tmp_path, format, loss):
    path = tmp_path / FORMATS[format]
    vit_jax.save(path, *model, format=format, loss=loss, image_size=SIZE, **KEEPS.get(format, {}))
    assert load.read(path).loss == loss
    assert load.read(path, num_classes=3).loss is None  # a new head
    by_config = tmp_path / f'other_{FORMATS[format]}'
    config = {'objective': {'loss': loss or 'softmax'}}
    vit_jax.save(by_config, *model, format=format, config=config, image_size=SIZE,
                 **KEEPS.get(format, {}))  # fmt: skip
    assert load.read(by_config).loss == (loss or 'softmax')


@pytest.mark.parametrize('stated', [['sigmoid'], {}, 5, 'other'])
def test_what_stands_beside_weights_is_untrusted(model, tmp_path, stated):
    vit_jax.save(tmp_path / 'm.npz', *model, loss='sigmoid', image_size=SIZE)
    record = json.loads((tmp_path / 'm.json').read_text())
    (tmp_path / 'm.json').write_text(json.dumps(record | {'loss': stated}))
    assert load.read(tmp_path / 'm.npz').loss is None


@pytest.mark.parametrize('config', [None, {}, {'objective': 5}, {'objective': {'loss': ['x']}}])
def test_a_config_that_says_nothing_leaves_it_unknown(config):
    assert stages.loss_of(config) is None


@pytest.mark.parametrize('loss', ['softmax', 'sigmoid', None])
def test_predict_figures_and_exported_files_agree(model, tmp_path, paths, loss):
    vit_jax.save(tmp_path / 'hf', *model, format='hf', loss=loss, image_size=SIZE)
    found = load.read(tmp_path / 'hf')
    view = tasks.make_view(found.view, (SIZE, SIZE))
    images = np.stack([files.pixels(path, view) for path in paths])
    logits, _ = found.model.apply({'params': found.params}, found.model.normalise(images))
    logits = np.asarray(logits, np.float64)
    wanted = 1 / (1 + np.exp(-logits))
    if loss != 'sigmoid':
        wanted = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predictor = predict.classifier(str(tmp_path / 'hf'), 'classes')
    rows = predict.predicted(predictor, predict.read_ahead(paths, view, 2), 2)
    np.testing.assert_allclose([values for _, values in rows], wanted, rtol=1e-4)
    file = export.exported(found.model, found.params, (SIZE, SIZE), view='resize', loss=found.loss)
    np.testing.assert_allclose(file.call(images), wanted, rtol=1e-4)
    *_, table = next(model_page.ImageResults(found, paths).parts(tmp_path))
    best = [f'{x:.2%}' for row in -np.sort(-wanted)[:, :5] for x in row]
    assert [cells[2] for cells in table[1:]] == best
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    assert (config.get('problem_type') == 'multi_label_classification') == (loss == 'sigmoid')


def test_a_probability_is_float32_and_of_each_class():
    logits = np.array([[0.0, 2.0, -1.0]])
    np.testing.assert_allclose(np.sum(losses.probabilities(logits)), 1, rtol=1e-6)
    np.testing.assert_allclose(losses.probabilities(logits, 'sigmoid')[0, 0], 0.5)
