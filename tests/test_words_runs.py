"""Runs of two towers, killed and moved to other devices, and evaluated on several processes."""

import json

import jax
import launched
import numpy as np
import processes
import pytest
import tiny_towers
import words
from PIL import Image

import vit_jax
from vit_jax import assembly, config, evaluate, export, predict, train
from vit_jax.assembly import initial
from vit_jax.convert import load as weights
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.figures import __main__ as figures
from vit_jax.models import parameters
from vit_jax.predict import by_labels
from vit_jax.run import workdir

SAME = (  # small steps, and not Adam's: differences by rounding must not grow
    '--config.optim.name=sgd', '--config.optim.lr=0.01', '--config.optim.clip=1.0',
)  # fmt: skip
FILE = tiny_towers.__file__
CLASSES = ('red', 'blue', 'dog')


def write(path, count=14):
    """path/data has images and captions.jsonl, path/tokens the tokenizer."""
    words.clip(path / 'tokens', length=12)
    rng, rows = np.random.default_rng(0), []
    (path / 'data').mkdir(parents=True)
    for i in range(count):
        label = i % 3
        pixels = rng.integers(0, 90, (8, 8, 3)) + 150 * (np.arange(3) == label)
        Image.fromarray(pixels.astype(np.uint8)).save(path / 'data' / f'{i}.png')
        name = CLASSES[label]
        texts = [f'a photo of the {name} {i}', f'{name} above the bag'][: 1 + i % 2]
        rows.append({'file_name': f'{i}.png', 'captions': texts, 'label': name})
    (path / 'data' / 'captions.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return path


@pytest.mark.slow
def test_killed_it_resumes_to_the_bit_and_moves_to_other_devices(tmp_path):
    folder = write(tmp_path / 'data')

    def finish(workdir, *more, **options):
        found = launched.finish(folder, workdir, *SAME, *more, config=FILE, **options)
        assert found[0] == 0, found[1]

    def killed(workdir, *more, **options):
        process = launched.start(folder, workdir, *SAME, *more, config=FILE, **options)
        launched.wait_for(lambda: launched.checkpoints(workdir), process, workdir)
        launched.kill(process)

    whole, again, moved = (tmp_path / n for n in ('whole', 'again', 'moved'))
    finish(whole)
    killed(again, '--config.data.workers=2')
    finish(again)
    assert launched.checkpoints(again) == launched.checkpoints(whole)
    for saved in launched.checkpoints(whole):
        launched.assert_same_bits(*(launched.state(w, saved) for w in (again, whole)))
    assert launched.timeless(again) == launched.timeless(whole)

    killed(moved, '--config.mesh.fsdp=2', devices=4)
    finish(moved, '--config.mesh.fsdp=2', devices=2)
    assert 'resumed at step' in launched.log_of(moved).read_text()
    for ours, theirs in zip(launched.timeless(moved), launched.timeless(whole), strict=True):
        assert ours.keys() == theirs.keys() and ours['step'] == theirs['step']
        if 'loss' in ours:
            np.testing.assert_allclose(ours['loss'], theirs['loss'], rtol=1e-4)

    model, params = vit_jax.load(whole)
    tokens = vit_jax.tokenizer(whole)(['red above the bag', 'dog'])
    images = np.zeros((3, 8, 8, 3), np.float32)
    assert model.apply({'params': params}, images, tokens)[0].shape == (3, 2)
    assert by_labels.predictor(str(whole), ('red', 'blue')).classes == ('red', 'blue')


@pytest.mark.slow
def test_evaluations_on_two_processes_are_those_of_one(tmp_path):
    """14 images in batches of 16 and of 8, on two processes with two devices each."""
    folder = write(tmp_path / 'data')
    flags = ['--config.steps=1', '--config.optim.lr=1e-9']
    flags += [f'--config.evals.{name}.batch_size=8' for name in ('zero', 'found')]
    processes.finish(folder, tmp_path / 'run', 2, 2, *flags, config=FILE)
    made = launched.metrics(tmp_path / 'run')
    parts = assembly.make(config.load(f'{FILE}:{folder}'), devices=jax.devices()[:1])
    for name, evaluation in parts.evals.items():
        wanted = evaluation(parts.objective.init(jax.random.key(3)))
        [line] = [one for one in made if f'{name}/examples' in one]
        assert wanted['examples'] == 14
        for key, value in wanted.items():
            assert np.isclose(line[f'{name}/{key}'], value, rtol=1e-4), key


def test_an_evaluation_s_tokenizer_has_the_tokens_of_the_model(tmp_path):
    folder = write(tmp_path / 'data', count=3)
    more = words.clip(tmp_path / 'more')
    tokens = json.loads((more / 'vocab.json').read_text())
    (more / 'vocab.json').write_text(json.dumps(tokens | {'more</w>': len(tokens)}))
    for name in ('zero', 'found'):
        changed = config.load(f'{FILE}:{folder}', [(f'evals.{name}.tokenizer', str(more))])
        with pytest.raises(UserError, match='more has .* tokens, and the model'):
            assembly.make(changed, devices=jax.devices()[:1])


def test_the_text_tower_fits_the_image_tower_and_the_tokenizer(tmp_path):
    folder = write(tmp_path / 'data', count=3)

    def made(*changes):
        changes = [('evals', '{}'), ('model.num_classes', 'None'), *changes]
        parts = assembly.make(config.load(f'{FILE}:{folder}', changes), devices=jax.devices()[:1])
        return parameters.named_leaves(parts.abstract.params)['text/head/kernel'].shape

    assert made(('model.pool', 'cls_gap')) == (16, 32)
    assert made(('model.representation_size', '24')) == (16, 24)
    with pytest.raises(UserError, match='eos_id is 5, and texts of .* end with 555'):
        made(('objective.text.eos_id', '5'))


@pytest.mark.slow
def test_towers_and_texts_begin_with_those_of_a_checkpoint(tmp_path, caplog):
    folder, run = write(tmp_path / 'data'), tmp_path / 'run'
    short = [('steps', '2'), ('checkpoint.every', '1'), ('evals', '{}')]
    with workdir.lock_workdir(str(run)) as path:
        train.train(config.load(f'{FILE}:{folder}', short), path, Stop())
    with pytest.raises(UserError, match='has an image tower and a text tower'):
        weights.read(run)  # as a classifier, of which the dimensions of embeddings are no classes
    model, saved = vit_jax.load(run)
    saved = parameters.named_leaves(saved)

    def begun(*changes, **sections):
        given = tiny_towers.get_config(str(folder)).to_dict() | dict(seed=5, evals={}) | sections
        full = config.override(given, [('init_from', str(run)), *changes])
        parts = assembly.make(full, devices=jax.devices()[:1])
        state, account = initial.first_state(full, parts)
        return parameters.named_leaves(state.params), account

    both, _ = begun()
    assert both.keys() == saved.keys()
    for name, x in both.items():
        np.testing.assert_array_equal(x, saved[name], name)

    assert 'computes otherwise' not in caplog.text
    begun(('objective.text.gelu', 'exact'))
    assert "otherwise: objective.text.gelu is 'exact', there 'tanh'" in caplog.text

    assert 'makes other ids' not in caplog.text
    words.bert(tmp_path / 'bert')
    without, _ = begun(
        ('objective.loss', 'softmax'), ('data.tokenizer', str(tmp_path / 'bert')),
        ('objective.text.vocab_size', str(model.text.vocab_size)),
    )  # fmt: skip
    assert f'makes other ids than {tmp_path}/bert' in caplog.text
    assert without.keys() == saved.keys() - {'bias'}
    assert without['temperature'] == saved['temperature']

    image = vit_jax.load(run, part='image')
    vit_jax.save(tmp_path / 'image.npz', *image, format='official')
    one, account = begun(('init_from', str(tmp_path / 'image.npz')))
    tower = [n for n in one if n.startswith('image/') and not n.startswith('image/head/')]
    for name in tower:
        np.testing.assert_array_equal(one[name], saved[name], name)
    for name in ('image/head/kernel', 'text/vocabulary', 'text/head/kernel'):
        assert np.any(one[name]) and not np.array_equal(one[name], saved[name]), name
    assert 'at random: beside the model' in account

    alone, _ = begun(
        model=dict(
            name='text', causal=True, pool='eos', vocab_size=model.text.vocab_size, length=12,
            **tiny_towers.SMALL,
        ), objective={}, data=dict(
            task='text', source=dict(name=f'{folder}/data'), labels=True, batch_size=8,
            tokenizer=f'{folder}/tokens',
        ),
    )  # fmt: skip
    assert alone['head/kernel'].shape == (16, 3) and not np.any(alone['head/kernel'])
    for name, x in alone.items():
        assert name.startswith('head/') or np.array_equal(x, saved[f'text/{name}']), name


def test_a_run_of_texts_is_evaluated_and_takes_no_images(tmp_path):
    folder, run = write(tmp_path / 'data'), tmp_path / 'run'
    source = dict(name=f'{folder}/data')
    full = config.override(dict(
        seed=5, steps=1, checkpoint=dict(every=1), optim=dict(lr=1e-2),
        model=dict(name='text', vocab_size=600, length=12, **tiny_towers.SMALL),
        data=dict(task='text', source=source, labels=True, batch_size=8,
                  tokenizer=f'{folder}/tokens'),
        evals=dict(named=dict(type='classify', source=source)),
    ), [])  # fmt: skip
    with workdir.lock_workdir(str(run)) as path:
        train.train(full, path, Stop())
    ((name, metrics, _),) = evaluate.evaluate(str(run), evaluate.settings_of(None, str(run), []))
    [wanted] = [line for line in launched.metrics(run) if 'named/loss' in line]
    assert name == 'named' and metrics['examples'] == 14
    assert np.isclose(metrics['loss'], wanted['named/loss'], rtol=1e-5)
    with pytest.raises(UserError, match='reads text, not images'):
        predict.classifier(str(run), 'classes')
    with pytest.raises(UserError, match='reads text, not images'):
        export.exported(*vit_jax.load(run), (8, 8))
    assert figures.model_of(str(run), True, None) is None
    towers = config.load(f'{FILE}:{folder}', [('init_from', str(run)), ('evals', '{}')])
    with pytest.raises(UserError, match='a model of texts alone; two towers begin'):
        initial.first_state(towers, assembly.make(towers, devices=jax.devices()[:1]))
