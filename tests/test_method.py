"""A training method of one's own has what classification has, without a line in the package."""

import json
import pathlib
import random

import denoise
import jax
import launched
import numpy as np
import pytest
from learners import assert_trees_close

from vit_jax import assembly, config, errors, sharding, step, train
from vit_jax.data import pipeline
from vit_jax.distributed.stop import Stop
from vit_jax.plan import rehearsal

STEPS = 40
FILE = pathlib.Path(denoise.__file__)


def start(folder, workdir, *flags, **options):
    return launched.start(folder, workdir, *flags, config=FILE, **options)


def finish(folder, workdir, *flags, **options):
    status, output = launched.finish(folder, workdir, *flags, config=FILE, **options)
    assert status == 0, output


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return launched.write_images(tmp_path_factory.mktemp('images'), {'train': 12, 'val': 5})


@pytest.fixture(scope='module')
def whole(folder, tmp_path_factory):
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    finish(folder, workdir)
    return workdir


def parts_of(folder, devices=1, **changes):
    full = config.override(
        config.experiment.read(f'{FILE}:{folder}'), [(k, str(v)) for k, v in changes.items()]
    )
    return full, assembly.make(full, devices=jax.devices()[:devices])


def trained(folder, steps=3, **how):
    """(state, metrics of each step) in this process."""
    full, parts = parts_of(folder, **how)
    advance = step.compiled(
        parts.objective, parts.tx, parts.abstract, parts.mesh, seed=full.seed,
        accumulate=full.accumulate,
    )  # fmt: skip
    state = step.init(parts.objective, parts.tx, full.seed, parts.abstract)
    frozen = step.frozen(parts.objective, parts.mesh)
    feed = pipeline.batches(parts.source, parts.task, full.seed, batch_size=8)
    found = []
    for _ in range(steps):
        state, metrics = advance(state, sharding.put(next(feed), parts.mesh), frozen)
        found.append(jax.device_get(metrics))
    return jax.device_get(state), found


def test_eight_devices_are_one_on_any_mesh(folder):
    plain = {'optim.name': 'sgd', 'optim.lr': 0.1}  # Adam makes much of gradients that are noise
    one = trained(folder, **plain)
    assert one[1][-1]['loss'] < one[1][0]['loss']
    assert np.abs(one[0].extra['codes']).max() > 0.01
    teacher = one[0].extra['teacher']['encode']['kernel']
    assert np.abs(teacher - one[0].params['encode']['kernel']).max() > 1e-4
    mesh = {'mesh.fsdp': 2, 'mesh.tensor': 2}
    assert_trees_close(trained(folder, devices=8, **plain, **mesh), one, rtol=1e-4, atol=1e-6)


def test_what_it_keeps_is_sharded_by_name_and_never_replicated_by_accident(folder):
    _, parts = parts_of(folder, devices=8, **{'mesh.fsdp': 8})
    extra = parts.abstract.extra
    for name in ('encode', 'decode'):
        placed = extra['teacher'][name]['kernel'].sharding
        assert placed == parts.abstract.params[name]['kernel'].sharding
        assert placed.spec[0] == 'fsdp' and not placed.is_fully_replicated
    assert extra['codes'].sharding.spec == sharding.P('fsdp')
    frozen = step.frozen(parts.objective, parts.mesh)['look']['kernel']
    assert frozen.sharding.spec[0] == 'fsdp'
    nameless = parts.objective._replace(rules=denoise.RULES[:-1])
    with pytest.raises(errors.UserError, match='no sharding rule for codes'):
        step.abstract_state(nameless, parts.tx, parts.mesh)


def test_micro_batches_add_up_or_are_refused(folder):
    # The noise of a micro-batch is its own; without it they add up.
    plain, parts = trained(folder, **{'objective.noise': 0.0}), {'objective.noise': 0.0}
    assert_trees_close(trained(folder, accumulate=4, **parts), plain, rtol=1e-4, atol=1e-5)
    with pytest.raises(errors.UserError, match='accumulate is 2.*its codes are of the whole batch'):
        parts_of(folder, accumulate=2, **{'objective.whole': True})


# The method with one fault at a time, of those that would otherwise show deep in the trainer.
FAULTY = '''
import denoise
import jax.numpy as jnp

METRICS, restoration = denoise.METRICS | {'val': 'min'}, denoise.restoration

def faulty(model=None, examples=None, *, fault: str):
    whole = denoise.denoise(None, examples)

    def loss(*arguments):
        value, (metrics, aux) = whole.loss(*arguments)
        if fault == 'no loss':
            metrics.pop('loss')
        if fault == 'vector':
            metrics['rows'] = jnp.ones(3)
        return value, (metrics, aux)

    def update(extra, params, aux, step):
        extra = whole.update(extra, params, aux, step)
        if fault == 'shape':
            extra['codes'] = jnp.ones(3)
        if fault == 'missing':
            del extra['codes']
        if fault == 'dtype':
            extra['teacher']['letters'] = extra['teacher']['letters'].astype(jnp.bfloat16)
        return extra

    return whole._replace(loss=loss, update=update)

def task(source, *, image_size: int, view: dict, fault: str = ''):
    whole = denoise.image_and_name(source, image_size=image_size, view=view)

    def read(record, rng):
        arrays = whole.read(record, rng)
        if fault == 'dtype':
            arrays['image'] = arrays['image'] / 255
        if fault == 'shape':
            arrays['name'] = arrays['name'][:3]
        if fault == 'missing':
            del arrays['name']
        if fault == 'more':
            arrays['text'] = arrays['name']
        return arrays

    return whole._replace(read=read)
'''


@pytest.mark.parametrize('fault, words', [
    ('no loss', "returns the metrics .*error.*'loss' among them"),
    ('vector', r'metric rows of the objective is \[3\], not a scalar'),
    ('shape', r'makes extra codes float32 \[3\]; it was float32 \[16\]'),
    ('missing', r'makes extra codes nothing; it was float32 \[16\]'),
    ('dtype', r'extra teacher/letters bfloat16 \[256, 16\]; it was float32 \[256, 16\]'),
])  # fmt: skip
def test_what_its_functions_return_is_checked_before_the_first_step(
    folder, tmp_path, fault, words
):
    file = tmp_path / 'faulty.py'
    file.write_text(FAULTY)
    given = config.experiment.read(f'{FILE}:{folder}')
    changes = {'objective.name': f'{file}:faulty', 'objective.fault': fault}
    full = config.override(given, list(changes.items()))
    with pytest.raises(errors.UserError, match=words):  # as --dry_run does
        rehearsal.describe(full, tmp_path)
    with pytest.raises(errors.UserError, match=words):
        train.train(full, tmp_path / 'run', Stop())
    assert not (tmp_path / 'run' / 'metrics.jsonl').read_text()


@pytest.mark.parametrize('fault, words', [
    ('dtype', r'made image float64 \[8, 8, 3\] of an example; its `blank` has uint8 \[8, 8, 3\]'),
    ('shape', r'made name uint8 \[3\] of an example; its `blank` has uint8 \[8\]'),
    ('missing', r'made name none of an example; its `blank` has uint8 \[8\]'),
    ('more', r'made text uint8 \[8\] of an example; its `blank` has none'),
])  # fmt: skip
def test_examples_are_as_their_task_says(folder, tmp_path, fault, words):
    file = tmp_path / 'faulty.py'
    file.write_text(FAULTY)
    _, parts = parts_of(folder, **{'data.task': f'{file}:task', 'data.fault': fault})
    with pytest.raises(errors.UserError, match=words):
        next(pipeline.batches(parts.source, parts.task, 0, batch_size=4, tolerance=1.0))


def test_the_best_is_a_metric_that_is_measured(folder, tmp_path):
    """METRICS of a file are of its objective, too, so only the first evaluation tells."""
    given = config.experiment.read(f'{FILE}:{folder}')
    full = config.override(given, [('checkpoint.best', 'val/agreement'), ('steps', '6')])
    words = 'checkpoint.best is val/agreement, which val does not measure; there are error, examp'
    with pytest.raises(errors.UserError, match=words):
        train.train(full, tmp_path / 'run', Stop())


def test_its_settings_are_checked_as_all_others(folder):
    for key, value, words in (
        ('objective.nosie', 1, 'unknown key objective.nosie; the nearest valid key is .*noise'),
        ('objective.noise', -1, 'objective.noise is -1'),
        ('data.lenght', 1, 'valid key is .*length'),
        ('evals.val.k', 1, 'unknown key evals.val.k'),
        ('evals.val.image_size', 9, 'evals.val.image_size is 9, data.image_size 8: '),
        ('checkpoint.best', 'val/accuracy', 'no metric of the evals; there are val/'),
        ('objective.name', f'{FILE}:no', 'has no function no'),
        ('objective.name', 'nosuch', "is 'nosuch'; there are .*, and your own as FILE.py"),
        ('data.task', '/nowhere/x.py:f', 'no file /nowhere/x.py'),
        ('model.width', 3, 'unknown key model.width'),
        ('init_from', '/nowhere', '/nowhere'),
    ):  # fmt: skip
        with pytest.raises(errors.UserError, match=words):
            parts_of(folder, **{key: value})


@pytest.mark.slow
def test_killed_anywhere_it_resumes_to_the_bit(folder, whole, tmp_path):
    draw = random.Random(0)
    for trial in range(2):
        workdir = tmp_path / str(trial)
        for at in sorted(draw.sample(range(1, STEPS - 2), 2)):
            process = start(folder, workdir, '--config.data.workers=2' if trial else '-v=-1')
            launched.wait_for(
                lambda at=at, run=workdir: launched.last_step(run) >= at, process, workdir
            )
            launched.kill(process)
        finish(folder, workdir)
        assert launched.checkpoints(workdir) == launched.checkpoints(whole)
        for saved in launched.checkpoints(whole):
            a, b = (launched.state(w, saved) for w in (workdir, whole))
            assert a.keys() == b.keys() and any(k.startswith('extra/teacher/') for k in a)
            assert all(a[k].tobytes() == b[k].tobytes() for k in a)
        assert launched.timeless(workdir) == launched.timeless(whole)


@pytest.mark.slow
def test_a_run_moves_from_eight_devices_to_two(folder, whole, tmp_path):
    workdir = tmp_path / 'run'
    process = start(folder, workdir, '--config.mesh.fsdp=4', devices=8)
    launched.wait_for(lambda: launched.last_step(workdir) >= 12, process, workdir)
    launched.kill(process)
    finish(folder, workdir, '--config.mesh.fsdp=2', devices=2)
    assert 'resumed at step' in launched.log_of(workdir).read_text()
    pairs = list(zip(launched.timeless(workdir), launched.timeless(whole), strict=True))
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys() and ours['step'] == theirs['step']
        if 'loss' in ours:  # Adam makes much of small gradients
            np.testing.assert_allclose(ours['loss'], theirs['loss'], rtol=2e-2)


@pytest.mark.slow
def test_everything_shows_it(folder, whole, tmp_path):
    result = json.loads((whole / 'result.json').read_text())
    assert result['expected'][0]['pass'] is True and result['flops_per_image'] is None
    assert result['metrics']['val/error'] < 0.06 and 'exaflops' not in result['costs']
    scores = {x['step']: x['val/error'] for x in launched.metrics(whole) if 'val/error' in x}
    best = min((s for s in scores if s % 4 == 0), key=scores.get)
    assert best in launched.checkpoints(whole)
    assert list((whole / 'tensorboard').iterdir())

    def said(module, *arguments):
        status, output, errors = launched.run(module, *arguments)
        assert status == 0, errors
        return output

    config_flag = f'--config={FILE}:{folder}'
    rehearsed = said('main', config_flag, f'--workdir={tmp_path}/x', '--dry_run')
    assert 'denoise: ' in rehearsed and '5 epochs' not in rehearsed and 'val/error' in rehearsed
    planned = said('plan', config_flag, '--topology=cpu:8', '--config.mesh.fsdp=8')
    assert 'fits' in planned
    said('figures', whole, f'--out={tmp_path}/page')
    assert 'val/error' in (tmp_path / 'page' / 'page.html').read_text()
    compared = said('compare', whole, whole, '--metric=val/error', f'--out={tmp_path}/c.png')
    assert 'equal to the last bit' in compared


@pytest.mark.slow
def test_other_frozen_weights_are_another_run(folder, whole, tmp_path):
    other = tmp_path / 'denoise.py'
    other.write_text(FILE.read_text().replace('default_rng(7)', 'default_rng(8)'))
    workdir = tmp_path / 'run'
    finish(folder, workdir, '--config.steps=6')
    flags = (f'--config.{key}={other}:{name}' for key, name in (
        ('objective.name', 'denoise'), ('data.task', 'image_and_name'),
        ('evals.val.type', 'restoration'),
    ))  # fmt: skip
    status, output = launched.finish(folder, workdir, '--config.steps=8', *flags, config=FILE)
    assert status == 2 and 'frozen' in output
