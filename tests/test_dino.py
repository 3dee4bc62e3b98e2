"""DINO's loss, head, positions and initial values against its published code, PyTorch and NumPy."""

import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import launched
import numpy as np
import pytest
import tiny_dino

from vit_jax import assembly, config, models, step
from vit_jax.data import pipeline
from vit_jax.errors import UserError
from vit_jax.models import prototypes, resizing
from vit_jax.models.parameters import named_leaves
from vit_jax.objectives import Examples, dino
from vit_jax.run.report import Report

FIXTURE = pathlib.Path(__file__).with_name('data') / 'losses_dino.npz'
STILL = {'model.drop_path': 0.0}  # its draws are of a micro-batch


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return launched.write_images(tmp_path_factory.mktemp('images'), {'train': 8, 'val': 4})


def parts_of(folder, **changes):
    full = config.override(
        tiny_dino.get_config(str(folder)).to_dict(), [(k, str(v)) for k, v in changes.items()]
    )
    return full, assembly.make(full, devices=jax.devices()[:1])


def objective_and_batch(folder, **changes):
    """(model, objective, parameters that are noise, a batch)."""
    full, parts = parts_of(folder, **changes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.3, x.shape).astype('f'), step.abstract_params(parts.objective)
    )
    feed = pipeline.batches(parts.source, parts.task, full.seed, batch_size=8)
    return parts.model.clone(num_classes=None), parts.objective, params, next(feed)


def test_loss_and_centre_are_those_of_the_published_code():
    given = np.load(FIXTURE)
    crops, teacher, student = int(given['crops']), given['teacher'], given['student']
    # There the rows are ordered by crop, here by example.
    teacher = teacher.reshape(2, len(teacher) // 2, -1).swapaxes(0, 1)
    student = student.reshape(crops, len(student) // crops, -1).swapaxes(0, 1)
    centred = (teacher - given['centre_before']) / given['teacher_temperature'].astype('f')
    each = dino.cross_entropy(
        student / given['student_temperature'].astype('f'), jax.nn.softmax(centred)
    )
    np.testing.assert_allclose(each.mean(), given['loss'], rtol=1e-6)
    spec = {'global': jax.ShapeDtypeStruct((2, 8, 8, 3), np.uint8)}
    model = models.build('vit/4', width=16, depth=1, num_heads=2, mlp_dim=16)
    method = dino.dino(model, Examples(spec), prototypes=student.shape[-1])
    mean = dino.mean_over(teacher.mean(axis=1), np.ones(len(teacher), 'f'))
    kept = {'average': {}, 'center': given['centre_before'][0]}
    after = method.update(kept, {}, {'center': mean}, jnp.int32(0))
    np.testing.assert_allclose(after['center'], given['centre_after'][0], atol=1e-6)


@pytest.mark.parametrize('scaled', [False, True])
def test_the_head_is_pytorchs(scaled):
    torch = pytest.importorskip('torch')
    head = prototypes.Prototypes(count=24, hidden=20, bottleneck=6, scaled=scaled)
    rng, x = np.random.default_rng(1), np.random.default_rng(0).normal(size=(5, 12)).astype('f')
    params = head.init(jax.random.key(0), x)['params']
    assert float(jnp.abs(params['prototypes']['direction']).max()) <= 6**-0.5
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype('f'), params)
    tensor = lambda a: torch.from_numpy(np.ascontiguousarray(a))  # noqa: E731
    y = tensor(x)
    for i in (1, 2, 3):
        y = torch.nn.functional.gelu(y) if i > 1 else y
        own = params[f'fc{i}']
        y = torch.nn.functional.linear(y, tensor(own['kernel'].T), tensor(own['bias']))
    last = torch.nn.Linear(6, 24, bias=False)
    last.weight.data = tensor(params['prototypes']['direction'].T)
    last = torch.nn.utils.parametrizations.weight_norm(last)
    scale = params['prototypes']['scale'] if scaled else np.ones(24, 'f')
    last.parametrizations.weight.original0.data = tensor(scale[:, None])
    theirs = last(torch.nn.functional.normalize(y, dim=-1)).detach().numpy()
    np.testing.assert_allclose(head.apply({'params': params}, x), theirs, atol=2e-6)


@pytest.mark.parametrize('old, new, offset', [
    ((14, 14), (6, 6), 0.1), ((28, 28), (12, 12), 0.1), ((3, 5), (7, 2), 0.1),
    ((14, 14), (6, 6), 0.0), ((4, 4), (9, 9), 0.0),
])  # fmt: skip
def test_positions_are_resized_as_pytorch_does(old, new, offset):
    torch = pytest.importorskip('torch')
    table = np.random.default_rng(0).normal(size=(1, 2 + old[0] * old[1], 5)).astype('f')
    resize = partial(resizing.positions, old=old, new=new, method='bicubic', offset=offset)
    found = jax.jit(resize)(table)
    how = dict(scale_factor=tuple((n + offset) / m for n, m in zip(new, old, strict=True)))
    how = how if offset else dict(size=new)
    grid = torch.from_numpy(table[:, 2:].reshape(1, *old, 5).transpose(0, 3, 1, 2).copy())
    theirs = torch.nn.functional.interpolate(grid, mode='bicubic', **how).numpy()
    np.testing.assert_array_equal(found[:, :2], table[:, :2])
    np.testing.assert_allclose(
        found[:, 2:], theirs.transpose(0, 2, 3, 1).reshape(1, -1, 5), atol=1e-5
    )


def test_two_passes_are_a_pass_for_each_crop(folder):
    """Each crop by itself, its loss in float64; the mask, the centre and the temperatures count."""
    model, method, params, batch = objective_and_batch(folder, **STILL)
    rng = np.random.default_rng(2)
    teacher = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype('f'), params)
    extra = {'average': teacher, 'center': rng.normal(0, 0.2, 64).astype('f')}
    batch['mask'][[1, 4]] = 0
    head = prototypes.Prototypes(64, 16, 8, True)

    def outputs(tree, crop):
        vit = tree['vit']
        if crop.shape[1] == 8:
            small = resizing.positions(vit['posemb'], (4, 4), (2, 2), 'bicubic', offset=0.1)
            vit = vit | {'posemb': small}
        token = model.apply({'params': vit}, model.normalise(crop))[1]['cls']
        return np.asarray(head.apply({'params': tree['head']}, token), np.float64)

    def log_softmax(x):
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    views = [batch['global'][:, i] for i in range(2)] + [batch['local'][:, i] for i in range(3)]
    student = [log_softmax(outputs(params, view) / 0.1) for view in views]
    seen = [outputs(teacher, view) for view in views[:2]]
    for update, temperature in ((0, 0.04), (3, 0.04), (4, 0.055), (8, 0.07), (90, 0.07)):
        targets = [np.exp(log_softmax((x - extra['center']) / temperature)) for x in seen]
        pairs = [
            -(t * s).sum(axis=-1) for i, t in enumerate(targets)
            for v, s in enumerate(student) if v != i
        ]  # fmt: skip
        assert len(pairs) == 8
        expected = np.average(np.mean(pairs, axis=0), weights=batch['mask'])
        value, (metrics, aux) = jax.jit(method.loss)(
            params, extra, {}, batch, jax.random.key(0), update
        )
        np.testing.assert_allclose(value, expected, rtol=2e-6)
    assert metrics.keys() == dino.METRICS.keys()
    own = np.average(np.mean(seen, axis=0), axis=0, weights=batch['mask'])
    np.testing.assert_allclose(aux['center'], own, atol=1e-6)
    entropies = [-(t * np.log(t)).sum(axis=-1) for t in targets]
    expected = np.average(np.mean(entropies, axis=0), weights=batch['mask'])
    np.testing.assert_allclose(metrics['entropy'], expected, rtol=1e-5)
    mean = np.average(np.mean(targets, axis=0), axis=0, weights=batch['mask'])
    np.testing.assert_allclose(metrics['entropy_of_mean'], -(mean * np.log(mean)).sum(), rtol=1e-5)


def test_the_student_alone_has_stochastic_depth(folder):
    _, method, params, batch = objective_and_batch(folder, **{'model.drop_path': 0.9})
    extra = method.extra(params)
    outs = [
        jax.jit(method.loss)(params, extra, {}, batch, jax.random.key(i), 0) for i in range(2)
    ]
    assert outs[0][0] != outs[1][0]
    for a, b in zip(jax.tree.leaves(outs[0][1][1]), jax.tree.leaves(outs[1][1][1]), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(*(x[1][0]['deviation'] for x in outs))


def test_collapse_is_measured_and_said_once(tmp_path, capfd):
    rng, mask = np.random.default_rng(0), np.ones(64, 'f')
    spherical = rng.normal(size=(64, 256)).astype('f')
    some, uniform = np.eye(8, dtype='f')[rng.integers(8, size=(64, 2))], np.full((64, 2, 8), 1 / 8)
    healthy = dino.spread(some, spherical, mask)
    assert 0.95 < healthy['deviation'] < 1.05
    assert healthy['entropy'] == 0 and healthy['entropy_of_mean'] > 1.9
    constant = dino.spread(some, np.tile(spherical[:1], (64, 1)), mask)
    assert constant['deviation'] < 1e-3
    flat = dino.spread(uniform, spherical, mask)
    np.testing.assert_allclose([flat['entropy'], flat['entropy_of_mean']], np.log(8), rtol=1e-6)
    single = dino.spread(np.tile(some[:1], (64, 1, 1))[:, :1].repeat(2, 1), spherical, mask)
    assert dino.warning(1, healthy) is None
    for found in (constant, flat, single):
        assert 'features have collapsed' in dino.warning(1, found)
    norms = dict(loss=1.0, grad_norm=1.0, param_norm=1.0, lr=0.1)
    with Report(tmp_path, 9, 8, 0, None, None, dino.warning, every=2) as report:
        for n, found in enumerate((healthy, constant, healthy, *[flat] * 6)):
            report.write(n, found | norms)
        report.sync()
    said = capfd.readouterr().out
    assert said.count('features have collapsed') == 1 and 'step 4  warning: ' in said


def test_initial_values_are_those_of_the_published_code():
    """Deviations of vision_transformer.py's and PyTorch's initial values."""
    spec = {'global': jax.ShapeDtypeStruct((2, 32, 32, 3), np.uint8)}
    model = models.build('vit/8', width=128, depth=2, num_heads=4, mlp_dim=256)
    method = dino.dino(model, Examples(spec), prototypes=512, hidden=64, bottleneck=32)
    params = named_leaves(jax.jit(method.init)(jax.random.key(0)))
    third = 3**-0.5
    wanted = {
        'vit/encoder/attn/qkv/kernel': 0.02, 'vit/encoder/mlp/fc2/kernel': 0.02, 'vit/cls': 0.02,
        'vit/posemb': 0.02, 'vit/encoder/mlp/fc1/bias': 0, 'head/fc1/kernel': 0.02,
        'vit/embedding/kernel': third * 192**-0.5, 'vit/embedding/bias': third * 192**-0.5,
        'head/prototypes/direction': third * 32**-0.5, 'head/fc3/bias': 0,
    }  # fmt: skip
    for name, deviation in wanted.items():
        rough = 0.2 if params[name].size < 1000 else 0.05
        np.testing.assert_allclose(params[name].std(), deviation, rtol=rough, err_msg=name)
        assert abs(params[name].mean()) <= 0.3 * deviation
    layers = params['vit/encoder/attn/qkv/kernel']
    assert not np.array_equal(layers[0], layers[1])
    first, second = (params[f'vit/encoder/mlp/fc{i}/kernel'].ravel()[:99] for i in (1, 2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize('changes, words', [
    ({'data.task': 'classify', 'data.view': 'resize'}, "makes image, label; set data.task to 'cro"),
    ({'data.local_size': 10}, 'data.local_size: image size 10 x 10 is not divisible by the patch'),
    ({'data.image_size': 18}, 'data.image_size: image size 18 x 18 is not divisible'),
    ({'model.pool': 'gap'}, "reads a class token, which model.pool 'gap' has not"),
    ({'model.posemb': 'learn2d'}, 'crops of two sizes: positions are those of model.posemb learn,'),
    ({'model.name': 'mixer/4'}, 'objective dino trains a ViT'),
])  # fmt: skip
def test_mistakes_are_named(folder, changes, words):
    given = tiny_dino.get_config(str(folder)).to_dict()
    if 'data.task' in changes:
        for key in ('local_size', 'local_count'):
            del given['data'][key]
    if 'model.name' in changes:
        given['model'] = dict(width=16, depth=2, tokens_mlp_dim=8, mlp_dim=32)
    with pytest.raises(UserError, match=words):
        assembly.make(config.override(given, [(k, str(v)) for k, v in changes.items()]))
