"""From a checkpoint to a fine-tuned model and on: real runs, evaluated, exported, asked."""

import csv
import json
import pathlib
import re
import shutil

import jax
import launched
import numpy as np
import pytest
from PIL import Image

import vit_jax
from vit_jax import config, models, train
from vit_jax.convert import load
from vit_jax.data import tasks
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.run import workdir

FINETUNE = launched.TINY.parents[1] / 'experiments' / 'finetune.py'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return launched.write_images(tmp_path_factory.mktemp('images'), {'train': 16, 'val': 5})


@pytest.fixture(scope='module')
def pretrained(folder, tmp_path_factory):
    """The workdir of a whole small run."""
    path = tmp_path_factory.mktemp('run') / 'run'
    status, output = launched.finish(folder, path)
    assert status == 0, output
    return path


@pytest.fixture(scope='module')
def others(tmp_path_factory):
    """Images of other classes."""
    return launched.write_images(
        tmp_path_factory.mktemp('others'), {'train': 16, 'val': 6}, classes=('dog', 'eel'), seed=1
    )


def finetune(folder, path, source, *overrides, stop=None):
    """A run of experiments/finetune.py of four steps on eight devices."""
    fixed = {
        'init_from': source, 'steps': 4, 'optim.warmup': 0, 'data.image_size': 16,
        'data.batch_size': 8, 'checkpoint.every': 2,
    }  # fmt: skip
    pairs = [(k, str(v)) for k, v in fixed.items()] + [o.split('=', 1) for o in overrides]
    with workdir.lock_workdir(str(path)) as path:
        begun = workdir.read_json(path / 'config.json')
        settings = config.load(f'{FINETUNE}:{folder}', pairs, begun)
        stop = Stop() if stop is None else stop
        return train.train(settings, path, stop), settings


def flat(params):
    return {
        jax.tree_util.keystr(k, simple=True, separator='/'): np.asarray(v)
        for k, v in jax.tree_util.tree_leaves_with_path(params)
    }


def test_a_linear_probe_changes_the_head_alone(others, pretrained, tmp_path, capsys):
    result, settings = finetune(others, tmp_path, pretrained, 'optim.only=head')
    said = capsys.readouterr().out
    assert '2 x 2 -> 4 x 4, linear' in said and 'zeros: 2 classes' in said
    assert settings.model.width == 16 and settings.model.num_heads == 2  # read, not said
    before = flat(vit_jax.load(pretrained, image_size=16, num_classes=2, ema=True)[1])
    after = flat(vit_jax.load(tmp_path)[1])
    assert before.keys() == after.keys() and len(before) == 20
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {'head/kernel', 'head/bias'}
    assert result['metrics']['val/examples'] == 12
    assert json.loads((tmp_path / 'classes.json').read_text()) == ['dog', 'eel']


@pytest.mark.slow
def test_it_starts_at_the_weights_and_not_at_their_source(others, pretrained, tmp_path):
    """With rates of zero every parameter is what was loaded; resumed without the source too."""
    source = tmp_path / 'copy.npz'
    vit_jax.save(source, *vit_jax.load(pretrained))
    finetune(others, tmp_path / 'run', source, 'optim.lr=1e-30', 'optim.ema=0.5')
    before = flat(vit_jax.load(source, image_size=16, num_classes=2)[1])
    for ema in (False, True):
        after = flat(vit_jax.load(tmp_path / 'run', ema=ema)[1])
        for name in before:
            np.testing.assert_allclose(before[name], after[name], atol=1e-12, err_msg=name)

    class Once(Stop):
        """False until the first checkpoint is there."""

        def __bool__(self):
            return bool(launched.checkpoints(tmp_path / 'second'))

    result, _ = finetune(others, tmp_path / 'second', source, 'steps=40', stop=Once())
    assert result is None
    source.unlink()
    result, _ = finetune(others, tmp_path / 'second', source, 'steps=40')
    assert result['steps'] == 40
    with pytest.raises(UserError, match='no such file or folder'):
        finetune(others, tmp_path / 'third', source)


@pytest.mark.slow
def test_layer_decay_and_a_head_that_is_kept(folder, pretrained, tmp_path):
    finetune(folder, tmp_path / 'a', pretrained, 'optim.lr=1e-30', 'keep_head=true')
    kept = flat(vit_jax.load(tmp_path / 'a')[1])
    before = flat(vit_jax.load(pretrained, ema=True)[1])
    assert np.abs(before['head/kernel']).max() > 0
    np.testing.assert_allclose(kept['head/kernel'], before['head/kernel'], atol=1e-12)
    finetune(folder, tmp_path / 'b', pretrained, 'optim.layer_decay=0.1', 'keep_head=true')
    after = flat(vit_jax.load(tmp_path / 'b')[1])
    moved = {n: np.abs(after[n] - before[n]).max() for n in ('head/kernel', 'embedding/kernel')}
    assert moved['embedding/kernel'] < 0.02 * moved['head/kernel'] and moved['embedding/kernel'] > 0


def test_what_does_not_fit_is_named(folder, others, pretrained, tmp_path):
    with pytest.raises(UserError, match="not the kept head's: dog, eel; .* it lacks ant, bee, cat"):
        finetune(others, tmp_path / 'a', pretrained, 'keep_head=true', 'model.num_classes=2')
    with pytest.raises(UserError, match='model.width is 24, there 16'):
        finetune(folder, tmp_path / 'b', pretrained, 'model.name=vit-ti/4', 'model.width=24',
                 'model.depth=2', 'model.num_heads=2', 'model.mlp_dim=32')  # fmt: skip
    with pytest.raises(UserError, match='no such file or folder'):
        finetune(folder, tmp_path / 'c', '/nowhere.npz')
    assert not (tmp_path / 'c' / 'config.json').exists()


@pytest.mark.parametrize('name', ['cifar10', 'imagenet2012', 'oxford_iiit_pet', 'some_tfds_name'])
def test_every_preset_is_a_complete_config(name, pretrained):
    full = config.load(f'{FINETUNE}:{name}', [('init_from', str(pretrained))])
    assert full.optim.name == 'sgd' and full.optim.clip == 1 and full.optim.weight_decay == 0
    assert full.data.image_size == 384 and full.data.batch_size == 512
    assert full.steps == {'cifar10': 10_000, 'imagenet2012': 20_000, 'oxford_iiit_pet': 500}.get(
        name, 2_500)
    models.build(**{**full.model, 'num_classes': 10})


@pytest.mark.slow
def test_evaluate_gives_the_last_digit_for_the_run_and_every_export(pretrained, tmp_path):
    last = [line for line in launched.metrics(pretrained) if 'val/loss' in line][-1]
    wanted = {k.removeprefix('val/'): v for k, v in last.items() if k.startswith('val/')}
    assert {'accuracy', 'loss', 'ece', 'class_accuracy', 'examples'} == wanted.keys()  # 3 classes
    exports = {
        pretrained: (), tmp_path / 'b.npz': ('big_vision', '--fold'), tmp_path / 'h': ('hf',),
    }  # fmt: skip
    for path, to in exports.items():
        if to:
            status, out, error = launched.run('convert', pretrained, path, f'--to={to[0]}', *to[1:])
            assert status == 0, error
            assert f'Written: {path}' in out and 'loaded' in out
        given = [] if len(to) == 0 else [f'--config={pretrained}/config.json']
        status, out, error = launched.run('evaluate', f'--checkpoint={path}', '--json', *given)
        assert status == 0, error
        found = json.loads(out)['val']
        assert found.pop('images_per_s') > 0 and found == wanted, path
    # What goes with the weights: the run's config, so that nothing has to be named.
    status, out, _ = launched.run('evaluate', f'--checkpoint={tmp_path}/h', f'--out={tmp_path}/csv')
    assert status == 0 and f'val/accuracy  {wanted["accuracy"]:.4g}' in out
    rows = list(csv.DictReader((tmp_path / 'csv' / 'val.csv').read_text().splitlines()))
    assert [row['class'] for row in rows] == json.loads((pretrained / 'classes.json').read_text())
    assert sum(int(row['images']) for row in rows) == wanted['examples']
    hits = sum(int(row[row['class']]) for row in rows)
    assert hits / wanted['examples'] == wanted['accuracy']
    headless = tmp_path / 'headless.npz'
    vit_jax.save(headless, *vit_jax.load(pretrained, num_classes=0))
    config_flag = f'--config={pretrained}/config.json'
    status, _, error = launched.run('evaluate', f'--checkpoint={headless}', config_flag)
    assert status == 2 and 'has 3 classes, the model no head' in error
    status, out, _ = launched.run('evaluate', f'--checkpoint={pretrained}', '--noema', '--json')
    assert status == 0 and json.loads(out)['val']['loss'] != wanted['loss']


@pytest.mark.slow
def test_predict_says_what_the_model_says_with_names(folder, pretrained, tmp_path):
    images = sorted((folder / 'val' / 'cat').iterdir())
    status, out, error = launched.run(
        'predict', f'--checkpoint={pretrained}', '--json', '--batch_size=3', folder / 'val' / 'cat'
    )
    assert status == 0, error
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line['image'] for line in lines] == [str(path) for path in images]
    model, params = vit_jax.load(pretrained, ema=True)
    for path, line in zip(images, lines, strict=True):
        pixels = tasks.make_view('resize', 8)(np.asarray(Image.open(path)), None)  # the run's view
        logits, _ = model.apply({'params': params}, model.normalise(pixels[None]))
        probabilities = np.asarray(jax.nn.softmax(logits[0]))
        assert [row['name'] for row in line['top']] == [
            ('ant', 'bee', 'cat')[i] for i in np.argsort(-probabilities)
        ]
        found = [row['probability'] for row in line['top']]
        np.testing.assert_allclose(found, -np.sort(-probabilities), atol=1e-5)
    status, out, _ = launched.run('predict', f'--checkpoint={pretrained}', '--top=2', images[0])
    assert status == 0 and out.count('%') == 2 and 'cat' in out and str(images[0]) in out
    bad = tmp_path / 'bad.jpg'
    bad.write_bytes(b'no image')
    for arguments, words in (
        ((images[0], bad), f'unreadable image {bad}'), ((tmp_path / 'none.png',), 'no image'),
        ((), 'no image is named'), ((tmp_path / 'empty',), 'no images in'),
    ):  # fmt: skip
        (tmp_path / 'empty').mkdir(exist_ok=True)
        status, _, error = launched.run('predict', f'--checkpoint={pretrained}', *arguments)
        lines = error.splitlines()  # with several images each that can't be read has one, too
        assert status == 2 and words in error and len(lines) == max(1, len(arguments)), error


@pytest.mark.slow
def test_convert_prints_the_catalogue_and_what_a_checkpoint_is(pretrained, tmp_path):
    status, out, _ = launched.run('convert', '--list')
    assert status == 0 and len(out.splitlines()) == len(load.catalogue()) + 1 > 200
    assert 'augreg/b_16-i21k ' in out and 'gs://vit_models/augreg/' in out
    status, part, _ = launched.run('convert', '--list', '--like=DINOv3')
    names = [line.split()[0] for line in part.splitlines()]
    assert status == 0 and names[0] == 'name' and all('dinov3' in name for name in names[1:])
    assert len(names) > 5 and all(line in out for line in map(str.strip, names))
    status, _, error = launched.run('convert', '--list', '--like=dinov33')
    assert status == 2 and "contains 'dinov33'; near it: dinov3" in error
    status, out, _ = launched.run('convert', pretrained)
    assert status == 0 and 'width = 16' in out and 'for images of 8 x 8' in out
    foreign = tmp_path / 'mine'
    foreign.mkdir()
    (foreign / 'thesis.txt').write_text('years of work')
    for arguments, words in (
        ((pretrained, foreign, '--to=timm', '--force'), 'which no export wrote'),
        ((pretrained, tmp_path / 'x.npz'), 'usage'),
        ((pretrained, tmp_path / 'x', '--to=hf', '--model.gleu=exact'), "nearest is 'glu'"),
        (('augreg/b_16-i21kk',), 'the nearest: augreg/b_16-i21k'),
    ):  # fmt: skip
        status, _, error = launched.run('convert', *arguments)
        assert status == 2 and words in error and len(error.splitlines()) == 1, error
    assert (foreign / 'thesis.txt').read_text() == 'years of work'


def test_every_name_of_the_catalogue_is_well_formed():
    for name, row in load.catalogue().items():
        assert row['family'] in ('official', 'big_vision', 'timm', 'hf'), name
        assert row['address'].startswith(('gs://', 'hf://')), name
        assert row['address'].split(':img')[0].endswith('.npz') == (
            row['family'] in ('official', 'big_vision')), name
        assert row['source'] and 0 < row['image_size'] < 1000, name
        assert row['accuracy'] is None or 50 < row['accuracy'] < 92, name
        assert (row['accuracy'] is None) == (row['metric'] is None), name
        assert row['licence'] is None or re.fullmatch(r'[a-z0-9.-]+', row['licence']), name
    names = list(load.catalogue())
    assert names == sorted(names)
    addresses = [row['address'] for row in load.catalogue().values()]
    assert len(set(addresses)) == len(addresses)
    assert load.resolve('augreg/b_16-i21k').startswith('gs://vit_models/augreg/B_16-i21k-300ep')


def test_a_copied_workdir_is_a_checkpoint(pretrained, tmp_path):
    shutil.copytree(pretrained, tmp_path / 'elsewhere')
    a, b = flat(vit_jax.load(pretrained)[1]), flat(vit_jax.load(tmp_path / 'elsewhere')[1])
    assert all(np.array_equal(a[n], b[n]) for n in a) and pathlib.Path(pretrained).exists()
