"""FlexiViT: patches of many sides from one kernel."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compared import compiled
from launched import timeless
from learners import IMAGE

import vit_jax
from vit_jax import assembly, config, evaluate, models, predict, step, train
from vit_jax.assembly import initial
from vit_jax.convert import load
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.models import resizing
from vit_jax.objectives import Examples, supervised
from vit_jax.run import workdir

MODEL = models.build(
    'vit-ti/16', num_classes=10, width=16, depth=2, num_heads=2, mlp_dim=32, patch_size=4,
    interpolation='bilinear_antialias',
)  # fmt: skip
SPEC = Examples({'image': jax.ShapeDtypeStruct(IMAGE, np.uint8)})
SIDES = (1, 2, 4)


def given(**changes):
    return dict(
        steps=12, seed=4,
        model=dict(name='vit-ti/4', width=16, depth=1, num_heads=2, mlp_dim=16,
                   interpolation='bilinear_antialias'),
        data=dict(source=dict(name='digits'), image_size=8, batch_size=16, view='resize'),
        evals=dict(test=dict(source=dict(name='digits', split='test'), view='resize')),
        optim=dict(lr=1e-3), checkpoint=dict(every=5, keep=9),
        objective=dict(patch_sides=SIDES, patch_grid=3, **changes),
    )  # fmt: skip


def run(path, **changes):
    with workdir.lock_workdir(str(path)) as path:
        return train.train(config.complete(given() | changes), path, Stop())


def test_each_side_is_the_model_of_that_patch_size():
    objective = supervised.supervised(MODEL, SPEC, patch_sides=SIDES, patch_grid=3, predict_side=4)
    params = jax.jit(objective.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + np.float32(0.1 * rng.normal(size=x.shape)), params)
    assert params['posemb'].shape == (1, 1 + 3 * 3, 16)
    assert params['embedding']['kernel'].shape == (4, 4, 3, 16)
    batch = {'image': rng.integers(0, 256, (4, *IMAGE), np.uint8), 'label': np.arange(4),
             'mask': np.ones(4, np.float32)}  # fmt: skip
    logits = []
    for side in SIDES:
        fixed = MODEL.clone(patch_size=(side, side))
        own = dict(params)
        own['posemb'] = resizing.positions(
            params['posemb'], (3, 3), fixed.grid(IMAGE), 'bilinear_antialias'
        )
        kernel = resizing.kernel(params['embedding']['kernel'], (side, side))
        own['embedding'] = dict(params['embedding'], kernel=kernel)
        plain = supervised.supervised(fixed, SPEC)
        wanted = jax.jit(plain.loss)(own, {}, {}, batch, jax.random.key(1), 0)[0]
        found = jax.jit(objective.variants[side])(params, {}, {}, batch, jax.random.key(1), 0)[0]
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
        logits.append(jax.jit(plain.predict)(own, batch)['logits'])
    found = jax.jit(objective.predict)(params, batch)['logits']
    np.testing.assert_allclose(found, logits[-1], atol=1e-5)
    assert np.abs(logits[0] - logits[1]).max() > 1e-3
    grads = jax.jit(jax.grad(
        lambda p: objective.variants[2](p, {}, {}, batch, jax.random.key(1), 0)[0]
    ))  # fmt: skip
    for leaf in jax.tree.leaves(grads(params)['embedding']):
        assert np.abs(leaf).max() > 1e-6  # one kernel learns from every side


def test_sides_are_drawn_evenly_and_by_seed_and_step():
    objective = supervised.supervised(MODEL, SPEC, patch_sides=SIDES, patch_grid=3)
    drawn = [objective.variant(3, n) for n in range(3000)]
    assert drawn == [objective.variant(3, n) for n in range(3000)]
    assert drawn != [objective.variant(4, n) for n in range(3000)]
    counts = np.array([drawn.count(side) for side in SIDES])
    assert (np.abs(counts - 1000) < 5 * 1000**0.5).all()


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """(workdir of a run, losses that it compiled, its compiled steps)."""
    made, functions, plain = [], [], step.compiled

    def counted(objective, *arguments, **settings):
        made.append(objective.loss)
        functions.append(plain(objective, *arguments, **settings))
        return functions[-1]

    path = tmp_path_factory.mktemp('whole') / 'run'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, 'compiled', counted)
        run(path)
    return path, made, functions


def test_each_side_is_compiled_once(whole):
    _, made, functions = whole
    sides = {int(np.random.default_rng((4, n)).choice(SIDES)) for n in range(12)}
    assert sides == set(SIDES) and len(made) == len(set(made)) == 3
    assert [advance._cache_size() for advance in functions] == [1, 1, 1]


@pytest.mark.slow
def test_a_run_resumes_to_the_bit_and_is_read_at_any_side(whole, tmp_path):
    whole, parts = whole[0], tmp_path / 'parts'
    shutil.copytree(whole, parts)
    for file in ('checkpoints/10', 'checkpoints/12', 'result.json'):
        path = parts / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run(parts)
    assert timeless(parts) == timeless(whole)
    for a, b in zip(*(jax.tree.leaves(vit_jax.load(path)[1]) for path in (whole, parts)),
                    strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)

    model, params = vit_jax.load(whole)  # as it is kept
    assert model.patch_size == (4, 4) and params['posemb'].shape[1] == 1 + 3 * 3
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    for side in (1, 4):
        other, resized = vit_jax.load(whole, patch_size=side, image_size=8)
        found = compiled(other)(resized, images)[0]
        flexible, own = resizing.with_patches(model, params, side, (8, 8, 3))
        wanted = compiled(flexible)(own, images)[0]
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    evaluated, settings = {}, evaluate.settings_of(None, str(whole), [])
    for side in (None, 2, 4):
        (_, metrics, _), = evaluate.evaluate(str(whole), settings, patch_size=side)
        evaluated[side] = metrics['loss']
    logged = [row['test/loss'] for row in timeless(whole) if 'test/loss' in row]
    np.testing.assert_allclose(evaluated[None], logged[-1], rtol=1e-5)
    assert evaluated[None] == evaluated[2] != evaluated[4]
    found = predict.classifier(str(whole), 'features', image_size=8, patch_size=2)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    flexible, own = resizing.with_patches(model, params, 2, (8, 8, 3))
    wanted = compiled(flexible)(own, flexible.normalise(pixels))[1]['pre_logits']
    made = found.compute(found.params, pixels)['features']
    np.testing.assert_allclose(made, wanted, atol=1e-5)

    account = {row[1]: row for row in load.read(whole, patch_size=2, image_size=8).account}
    assert account['embedding/kernel'] == (
        'resized', 'embedding/kernel', '4 x 4 -> 2 x 2, pseudo-inverse'
    )
    with pytest.raises(UserError, match='not divisible by the patch size 5 x 5'):
        vit_jax.load(whole, patch_size=5)


def test_a_run_begins_from_any_patch_size(tmp_path):
    sizes = dict(width=16, depth=1, num_heads=2, mlp_dim=16)
    base = models.build('vit-ti/8', num_classes=7, **sizes)
    params = jax.jit(base.init)(jax.random.key(3), jnp.zeros((1, 32, 32, 3)))['params']
    vit_jax.save(tmp_path / 'base.npz', base, params, format='official')
    full = config.complete(given() | dict(init_from=str(tmp_path / 'base.npz')))
    parts = assembly.make(full, devices=jax.devices()[:1])
    state, account = initial.first_state(full, parts)
    kernel = resizing.kernel(params['embedding']['kernel'], (4, 4))
    np.testing.assert_allclose(state.params['embedding']['kernel'], kernel, atol=1e-6)
    assert state.params['posemb'].shape == (1, 1 + 3 * 3, 16)
    assert '8 x 8 -> 4 x 4, pseudo-inverse' in account


def test_what_has_no_such_patches_is_refused(tmp_path):
    for model, settings, words in (
        (MODEL, dict(patch_sides=(3,)), 'not divisible by the patch size 3 x 3'),
        (MODEL, dict(predict_side=4), 'predict_side is for objective.patch_sides'),
        (MODEL.clone(posemb='relative'), dict(patch_sides=(4,)), 'the model has others'),
        (models.build('mixer-s/16', patch_size=4), dict(patch_sides=(4,)), 'the model has others'),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            supervised.supervised(model, SPEC, **settings)
