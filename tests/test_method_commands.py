"""evaluate, predict and export take the runs of a method of one's own."""

import re

import denoise
import jax
import launched
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax import assembly, config, evaluate, export, predict, train
from vit_jax.assembly import initial, restore
from vit_jax.convert import load
from vit_jax.convert import run as run_files
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.export import __main__ as export_command
from vit_jax.run import checkpoint, workdir

# The same method without names, so that image files have all that it predicts from.
NAMELESS = '''
import denoise
import jax.numpy as jnp

METRICS, restoration, image_and_name = denoise.METRICS, denoise.restoration, denoise.image_and_name

def nameless(model=None, examples=None, *, width: int = 16):
    whole = denoise.denoise(None, examples, width=width)

    def predict(params, batch):
        name = jnp.zeros((batch['image'].shape[0], 8), jnp.uint8)
        flat = batch['image'].reshape(-1, 8 * 8 * 3) / 255 - 0.5
        code = jnp.tanh(flat @ params['encode']['kernel'] + params['encode']['bias'])
        code = code + params['letters'][name.astype(int)].mean(axis=1)
        made = code @ params['decode']['kernel'] + params['decode']['bias']
        return {'restored': made.reshape(batch['image'].shape) + 0.5, 'code': code}

    return whole._replace(predict=predict)
'''

# Keeps the model of the config in a subtree, beside a predictor, as methods with a teacher do.
SIAMESE = '''
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from vit_jax.objectives import Objective

METRICS = {'loss': 'min'}

def siamese(model, examples):
    def init(key):
        params = model.init(key, jnp.zeros((1, *examples.spec['image'].shape)))['params']
        return {'online': params, 'predictor': {'kernel': jnp.eye(16) / 2}}

    def encode(params, batch):
        return model.apply({'params': params}, model.normalise(batch['image']))[1]['pre_logits']

    def loss(params, extra, frozen, batch, key, step):
        made = encode(params['online'], batch) @ params['predictor']['kernel']
        target = encode(extra['average']['online'], batch)
        value = jnp.sum(jnp.mean((made - target) ** 2, 1) * batch['mask'])
        return value, ({'loss': value}, {})

    return Objective(
        init, loss, lambda params, batch: {'code': encode(params['online'], batch)},
        lambda params: {'average': jax.tree.map(jnp.array, params)},
        lambda extra, params, aux, step: {'average': jax.tree.map(
            lambda old, new: (old + new) / 2, extra['average'], params
        )},
        rules=((r'predictor/kernel', jax.sharding.PartitionSpec()),),
    )

def get_config(folder):
    return ConfigDict(dict(
        steps=6, objective=dict(name=f'{__file__}:siamese'),
        model=dict(name='vit/4', width=16, depth=1, num_heads=2, mlp_dim=16),
        data=dict(source=dict(name=folder), view='resize', image_size=8, batch_size=8),
        optim=dict(lr=1e-3, warmup=2), evals=dict(),
    ))
'''


def run(folder, path, **changes):
    """Trains denoise.py's method for a few steps in this process; returns the workdir's path."""
    changes |= {'steps': 6, 'evals.val.every': 3, 'checkpoint.every': 3}
    return run_file(denoise.__file__, folder, path, **changes)


def run_file(file, folder, path, **changes):
    """Trains an experiment file for 6 steps; returns the workdir's path."""
    given = config.experiment.read(f'{file}:{folder}')
    with workdir.lock_workdir(str(path)) as path:
        full = config.override(given, [(key, str(value)) for key, value in changes.items()])
        assert train.train(full, path, Stop())['steps'] == 6
    return str(path)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return launched.write_images(tmp_path_factory.mktemp('images'), {'train': 8, 'val': 5})


@pytest.fixture(scope='module')
def trained(folder, tmp_path_factory):
    return run(folder, tmp_path_factory.mktemp('run') / 'run')


@pytest.fixture(scope='module')
def nameless(folder, tmp_path_factory):
    where = tmp_path_factory.mktemp('nameless')
    file = where / 'nameless.py'
    file.write_text(NAMELESS)
    return run(folder, where / 'run', **{'objective.name': f'{file}:nameless'})


def test_its_evaluations_give_what_the_run_logged_at_that_step(folder, trained):
    logged = {x['step']: x for x in launched.metrics(trained) if 'val/error' in x}
    assert set(logged) == {3, 6} and logged[3]['val/error'] != logged[6]['val/error']
    file = f'{denoise.__file__}:{folder}'
    for path, address, step in (
        (None, trained, 6), (None, f'{trained}@3', 3), (file, f'{trained}@3', 3),
    ):  # fmt: skip
        settings = evaluate.settings_of(path, address, [('steps', '6')])
        (name, metrics, text), = evaluate.evaluate(address, settings)
        assert name == 'val' and text is None
        assert metrics['error'] == logged[step]['val/error']  # to the bit
        assert metrics['examples'] == logged[step]['val/examples'] == 15
    # Without the moving average, the number is another.
    (_, last, _), = evaluate.evaluate(trained, settings, ema=False)
    assert last['error'] != logged[6]['val/error']
    # On other devices it is the same.
    settings = evaluate.settings_of(None, trained, [('mesh.fsdp', '8')])
    (_, other, _), = evaluate.evaluate(trained, settings)
    np.testing.assert_allclose(other['error'], logged[6]['val/error'], rtol=1e-5)


def test_parameters_of_another_objective_are_refused(trained):
    settings = evaluate.settings_of(None, trained, [('objective.width', '8')])
    with pytest.raises(UserError, match=r'run: parameter .* is \[16.*the config has \[8'):
        list(evaluate.evaluate(trained, settings))
    with pytest.raises(UserError, match='denoise.py:denoise has a network of its own'):
        evaluate.weights.read(trained)


def test_predict_writes_what_the_objective_does(nameless, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 8, 8, 3), np.uint8)
    pairs = ((str(i), image) for i, image in enumerate(images))
    predictor = predict.method(nameless, 'all')
    assert predictor.image_size == (8, 8)
    rows = list(predict.predicted(predictor, pairs, 2))
    predict.write_arrays(str(tmp_path / 'x.npz'), rows)
    written = np.load(tmp_path / 'x.npz')
    assert written['files'].tolist() == list('01234')
    full = restore.config_of_method(nameless, with_model=False)
    parts, params = restore.parts_and_params(nameless, full)
    expected = parts.objective.predict(params, {'image': images})
    assert set(written) == {'files', 'restored', 'code'}
    for name in expected:
        np.testing.assert_allclose(written[name], expected[name], rtol=1e-4, atol=1e-5)


def test_export_writes_what_the_objective_does(nameless, tmp_path):
    full = restore.config_of_method(nameless, with_model=False)
    settings = dict(size=None, dtype=None, view='resize', platforms=['cpu'])
    exported, about = export_command.method(nameless, full, None, **settings)
    assert about['output'] == ['code', 'restored'] and about['image_size'] == [8, 8]
    loaded = jax.export.deserialize(bytearray(export.serialised(exported, about)))
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    parts, params = restore.parts_and_params(nameless, full)
    expected = parts.objective.predict(params, {'image': images})
    found = loaded.call(images)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match='--dtype is bfloat16, but objective .*nameless has a netw'):
        export_command.method(nameless, full, None, **settings | dict(dtype='bfloat16'))


@pytest.mark.slow
def test_a_model_in_a_subtree_is_loaded_alone(folder, tmp_path):
    file = tmp_path / 'siamese.py'
    file.write_text(SIAMESE)
    path = run_file(file, folder, tmp_path / 'run')
    parts, params = restore.parts_and_params(path, restore.config_of_method(path, with_model=True))
    found = load.read(path)
    raw = load.read(path, ema=False)
    state = checkpoint.restore_newest(path, parts.abstract)
    for ours, theirs in ((found, state.extra['average']), (raw, state.params)):
        equal = jax.tree.map(np.array_equal, ours.params, theirs['online'])
        assert all(jax.tree.leaves(equal)) and ours.model == parts.model
    kernels = (x.params['embedding']['kernel'] for x in (found, raw))
    assert np.abs(np.subtract(*kernels)).max() > 1e-6
    assert [row for row in found.account if row[0] == 'unused'] == [
        ('unused', 'predictor/kernel', 'beside the model')
    ]
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    made = predict.classifier(path, 'features').compute(found.params, images)['features']
    code = parts.objective.predict(params, {'image': images})['code']
    np.testing.assert_allclose(made, code, rtol=1e-4, atol=1e-5)
    smaller = load.read(path, num_classes=3)  # as for fine-tuning
    assert smaller.params['head']['bias'].shape == (3,)

    # A run of a method with a subtree begins from the model of another run, whatever its method.
    full = config.override(
        config.experiment.read(f'{file}:{folder}'), [('init_from', path), ('seed', '5')]
    )
    other = assembly.make(full, devices=jax.devices()[:2])
    state, account = initial.first_state(full, other)
    for tree in (state.params, state.extra['average']):
        equal = jax.tree.map(np.array_equal, tree['online'], found.params)
        assert all(jax.tree.leaves(equal))
        np.testing.assert_array_equal(tree['predictor']['kernel'], np.eye(16) / 2)
    assert re.search('re-initialised +predictor/kernel +at random', account)
    assert re.search('unused +predictor/kernel +beside the model', account)

    names = {'/'.join(k) for k in flatten_dict(params)}
    assert run_files.prefixes(parts.model, (8, 8), names) == ['online/']
    twice = names | {n.replace('online', 'target') for n in names}
    assert run_files.prefixes(parts.model, (8, 8), twice) == ['online/', 'target/']
    with pytest.raises(UserError, match=r'X has several of .* \(online/, target/\); .*--out'):
        run_files.only_prefix(parts.model, (8, 8), twice, 'X')
    with pytest.raises(UserError, match='X has none of the model that its config names'):
        run_files.only_prefix(parts.model, (8, 8), names - {'online/norm/scale'}, 'X')


def test_what_image_files_lack_is_named(trained, nameless):
    with pytest.raises(UserError, match='denoise has a network of its own.*--out=FILE.npz'):
        predict.method(trained, 'classes')
    with pytest.raises(UserError, match='--image_size is 9, but .* of 8 x 8 pixels alone'):
        predict.method(nameless, 'all', image_size=9)
    words = 'denoise predicts from name, too, which an image file does not have; .*evaluate'
    with pytest.raises(UserError, match=words):
        predict.method(trained, 'all')
    full = restore.config_of_method(trained, with_model=False)
    with pytest.raises(UserError, match=words):
        export_command.method(
            trained, full, None, size=None, dtype=None, view=None, platforms=['cpu']
        )
