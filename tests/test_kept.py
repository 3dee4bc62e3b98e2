"""Features of a locked image tower, computed once: the same training, resumed, and refusals."""

import io
import json

import jax
import launched
import numpy as np
import pytest
import tiny_towers
import words
from PIL import Image

from vit_jax import assembly, config, evaluate, step, train
from vit_jax.assembly import kept
from vit_jax.data import images, mixture, order, pipeline, sources
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.models import parameters
from vit_jax.run import workdir
from vit_jax.run.weights import read_params

FILE = tiny_towers.__file__
CHANGES = [
    ('optim.freeze', '^image/(?!head/)'), ('steps', '6'), ('checkpoint.every', '3'),
    ('report.every', '1'), ('evals.found.every', '3'), ('optim.name', 'sgd'), ('optim.lr', '0.01'),
    ('optim.clip', '1.0'),
]  # fmt: skip
KEPT = [('objective.keep_features', 'True')]
ALONE = [*KEPT, ('evals', '{}')]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with images and captions, and a tokenizer."""
    path = tmp_path_factory.mktemp('data')
    words.clip(path / 'tokens', length=12)
    (path / 'data').mkdir()
    rng, rows = np.random.default_rng(0), []
    for i in range(14):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path / f'data/{i}.png')
        texts = [f'the red {i}', f'bag {i} above a shoe'][: 1 + i % 2]
        rows.append({'file_name': f'{i}.png', 'captions': texts, 'label': 'ab'[i % 2]})
    (path / 'data' / 'captions.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return path


def loaded(folder, *changes):
    return config.load(f'{FILE}:{folder}', [*CHANGES, *changes])


def run(folder, path, *changes, stop=None):
    with workdir.lock_workdir(str(path)) as path:
        return train.train(loaded(folder, *changes), path, Stop() if stop is None else stop)


def params_of(path, n=6):
    return read_params(path / 'checkpoints' / str(n), average=None)


class StopSoon(Stop):
    """True from its sixth question on, in the midst of the steps."""

    asked = 0

    def __bool__(self):
        self.asked += 1
        return self.asked > 5


@pytest.mark.slow
def test_training_is_that_on_images_and_resumes_to_the_bit(folder, tmp_path, monkeypatch):
    on_images, whole, again = (tmp_path / name for name in ('images', 'whole', 'again'))
    wanted = run(folder, on_images)
    found = run(folder, whole, *KEPT)
    ours, theirs = params_of(whole), params_of(on_images)
    parts = assembly.make(loaded(folder), devices=jax.devices()[:1])
    before = parameters.named_leaves(step.init(parts.objective, parts.tx, 3, parts.abstract).params)
    moved = [name for name in ours if np.any(ours[name] != np.asarray(before[name]))]
    assert {'image/head/kernel', 'text/head/kernel', 'temperature'} <= set(moved)
    assert not [name for name in moved if name.startswith('image/') and 'head/' not in name]
    for name, x in theirs.items():
        np.testing.assert_allclose(ours[name], x, rtol=1e-4, atol=1e-5, err_msg=name)
    for name, value in wanted['metrics'].items():  # evaluations read images
        if name.startswith('found/'):
            assert found['metrics'][name] == pytest.approx(value), name

    assert run(folder, again, *KEPT, stop=StopSoon()) is None
    assert 0 < max(launched.checkpoints(again)) < 6
    with monkeypatch.context() as patch:
        patch.setattr(kept, 'computed', None)  # the file has them
        run(folder, again, *KEPT)
    for name, x in params_of(again).items():
        np.testing.assert_array_equal(x, ours[name], err_msg=name)
    metrics = [m for _, m, _ in evaluate.evaluate(str(again), loaded(folder, *KEPT))]
    assert all(m['examples'] == 14 for m in metrics) and len(metrics) == 2


def test_features_are_of_the_weights_and_the_examples_of_now(folder, tmp_path):
    full = loaded(folder, *ALONE)
    parts = assembly.make(full, devices=jax.devices()[:1])
    assert set(parts.spec) == {'features', 'text'} and 'image' in parts.inputs
    one, other = (jax.jit(parts.objective.init)(jax.random.key(i)) for i in (0, 1))

    def features(params):
        made = kept.filled(full, parts, params, tmp_path, Stop(), lambda phase: None)
        batch = next(train.batches(full, made, 0, Stop()))
        return batch['id'], batch['features']

    ids, first = features(one)
    _, second = features(other)
    _, again = features(one)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 0.01
    (tmp_path / kept.FILE).write_bytes((tmp_path / kept.FILE).read_bytes()[:300])
    np.testing.assert_array_equal(features(one)[1], first)

    shown = np.stack([images.read((folder / f'data/{i}.png').read_bytes()) for i in range(14)])
    model = jax.jit(parts.objective.predict)(one, {'image': shown[ids]})
    np.testing.assert_allclose(model['pre_logits'], first, atol=1e-5)


def test_an_image_that_cannot_be_used_is_left_out(folder, tmp_path):
    full = loaded(folder, *ALONE, ('data.tolerance', '0.2'))
    full.data.source.name = str(tmp_path / 'data')
    (tmp_path / 'data').mkdir()
    for path in (folder / 'data').iterdir():
        (tmp_path / 'data' / path.name).write_bytes(path.read_bytes())
    (tmp_path / 'data' / '3.png').write_bytes(b'no image')
    parts = assembly.make(full, devices=jax.devices()[:1])
    params = jax.jit(parts.objective.init)(jax.random.key(0))
    made = kept.filled(full, parts, params, tmp_path, Stop(), lambda phase: None)
    batch = next(pipeline.examples(made.source, parts.task, batch_size=14, tolerance=0.2))
    assert (batch['mask'] == (batch['id'] != 3)).all()
    assert np.abs(batch['features'][batch['mask'] > 0]).max(axis=1).min() > 0


@pytest.mark.parametrize('change, message', [
    (('data.view', 'inception'), 'data.view to one that is not random'),
    (('data.augment', "('greyscale',)"), 'data.augment to'),
    (('optim.freeze', '^image/head/'), r"image/\S+ is trained.*optim.freeze='\^image/"),
    (('model.drop_path', '0.1'), 'model.drop_path is 0.1'),
])  # fmt: skip
def test_what_changes_during_a_run_is_refused(change, message, folder):
    with pytest.raises(UserError, match=message) as error:
        assembly.make(loaded(folder, *ALONE, change), devices=jax.devices()[:1])
    assert '\n' not in str(error.value)


def test_the_examples_of_a_mixture_have_its_weights(folder):
    part = dict(name=str(folder / 'data'), split='train', label=None)
    whole = mixture.load(mixture={'a': part | {'weight': 1.0}, 'b': part | {'weight': 4.0}})
    records = kept.Records(whole.records, {}, np.ones(len(whole), bool))
    wanted, found = (
        order.batch_ids(sources.Source(x, ()), batch_size=50, seed=1, step=2)
        for x in (whole.records, records)
    )
    assert (wanted >= 14).sum() == 40
    np.testing.assert_array_equal(found, wanted)


def test_a_file_with_any_bit_changed_is_read_as_it_was_or_not_at_all(tmp_path):
    features = np.arange(6, dtype=np.float32).reshape(3, 2)
    arrays = {kept.USABLE: np.ones(3, bool), 'features': features}
    path, data = tmp_path / kept.FILE, io.BytesIO()
    np.savez(data, key=np.array(['0123', *sorted(arrays)]), **arrays)
    assert kept.stored(path, '0123', 3) is None  # not there
    for k in range(-1, len(data.getvalue())):
        for bit in (1, 128) if k >= 0 else (0,):
            damaged = bytearray(data.getvalue())
            damaged[k] ^= bit
            path.write_bytes(damaged)
            found = kept.stored(path, '0123', 3)
            assert found is not None or bit
            for name in arrays if found else ():
                np.testing.assert_array_equal(found[name], arrays[name])
    assert kept.stored(path, '4567', 3) is None
