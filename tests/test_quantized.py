"""Products in 8 bits: against their rule and the theory of its errors in NumPy, and in models."""

import json
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import launched
import ml_dtypes
import numpy as np
import optax
import pytest
from learners import classifier

import vit_jax
from vit_jax import models, optim, sharding, step
from vit_jax.errors import UserError
from vit_jax.models import quantized

# Largest value, mantissa bits, smallest exponent of normal numbers: int8 has one step throughout.
TYPES = {
    'int8': (127, 0, 0),
    'float8_e4m3fn': (448, 3, -6),
    'float8_e5m2': (57344, 2, -14),
}
FORWARD = {'int8': 'int8', 'fp8': 'float8_e4m3fn'}
BACKWARD = {'int8': 'int8', 'fp8': 'float8_e5m2'}
DIMENSIONS = (((2,), (0,)), ((), ()))  # [B, T, D] x [D, F] -> [B, T, F]
IMAGE = (16, 16, 3)
TINY = dict(num_classes=5, depth=2, width=32, mlp_dim=64)
VIT = models.build('vit-ti/4', num_heads=2, glu=True, pool='map', **TINY)
MIXER = models.build('mixer-s/4', tokens_mlp_dim=24, **TINY)


class Layer(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x, kernel):
        return quantized.dot_general(self.kind)(x, kernel, DIMENSIONS)


def rounded(x, axis, dtype):
    """(x as the 8-bit type has it, the scale of each vector along `axis`), both float64."""
    scale = np.abs(x).max(axis, keepdims=True) / TYPES[dtype][0]
    scale = np.where(scale == 0, 1, scale)
    q = np.rint(x / scale) if dtype == 'int8' else (x / scale).astype(ml_dtypes.finfo(dtype).dtype)
    return np.float64(q), scale


def off_ties(x, axis, dtype):
    """x with each value a fifth closer to what it rounds to, so that its last bit never matters."""
    q, scale = rounded(x, axis, dtype)
    return np.float32(0.2 * q * scale + 0.8 * x)


@pytest.mark.parametrize('mesh', [None, dict(data=2, fsdp=2, tensor=2)], ids=['one', 'mesh'])
@pytest.mark.parametrize('kind', ['int8', 'fp8'])
def test_a_product_and_its_gradients_follow_the_rule(kind, mesh):
    """On a mesh too, that splits examples, what is summed over and the kernel both ways."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 7, 48)) * np.exp(rng.standard_normal((4, 7, 1)) * 3)
    x[1, 2] = 0
    x = np.float64(off_ties(x, -1, FORWARD[kind]))
    kernel = rng.standard_normal((48, 40)) * np.exp(rng.standard_normal(40) * 2)
    kernel = np.float64(off_ties(kernel, 0, FORWARD[kind]))
    (xq, xs), (kq, ks) = rounded(x, -1, FORWARD[kind]), rounded(kernel, 0, FORWARD[kind])
    g = np.float64(np.float32(off_ties(rng.standard_normal((4, 7, 40)), -1, BACKWARD[kind]) / ks))
    gq, gs = rounded(g * ks, -1, BACKWARD[kind])  # the kernel's scales are of what is summed

    def run(x, kernel, g):
        y, backward = jax.vjp(lambda *args: Layer(kind).apply({}, *args), x, kernel)
        return y, *backward(g)

    places = {}
    if mesh:
        mesh, spec = sharding.make_mesh(**mesh), jax.sharding.PartitionSpec
        specs = spec(('data', 'fsdp'), None, 'tensor'), spec('tensor', 'fsdp'), sharding.BATCH
        places = dict(in_shardings=tuple(jax.sharding.NamedSharding(mesh, s) for s in specs))
    found = jax.jit(run, **places)(*(np.float32(a) for a in (x, kernel, g)))

    def products(f):
        return (
            f(xq) @ f(kq) * xs * ks, f(gq) @ f(kq.T) * gs,
            np.einsum('btd,btf->df', f(xq * xs), f(g)),
        )  # fmt: skip

    for a, b, terms in zip(found, products(np.float64), products(np.abs), strict=True):
        assert (np.abs(a - b) <= 1e-6 * terms).all()


@pytest.mark.parametrize('dtype, slack', [('float32', 0.05), ('bfloat16', 0.15)])
@pytest.mark.parametrize('kind', ['int8', 'fp8'])
def test_its_errors_are_those_of_rounding_to_the_nearest(kind, dtype, slack):
    """At most half a step of each factor, and in the mean square a twelfth of a step squared."""
    rng = np.random.default_rng(1)
    _, bits, lowest = TYPES[FORWARD[kind]]
    factors, steps = [], []
    for shape, axis in ((2, 50, 256), -1), ((256, 64), 0):
        a = np.float64(jnp.asarray(rng.standard_normal(shape), dtype))
        scale = rounded(a, axis, FORWARD[kind])[1]
        exponent = np.floor(np.log2(np.maximum(np.abs(a / scale), 2.0**lowest)))
        factors.append(a)
        steps.append(scale * 2.0 ** (exponent - bits) if bits else scale + 0 * a)
    (x, kernel), (dx, dk) = factors, steps
    error = Layer(kind).apply({}, *(jnp.asarray(a, dtype) for a in factors)) - x @ kernel
    if dtype == 'float32':
        most = np.abs(x) @ dk / 2 + dx @ np.abs(kernel) / 2 + dx @ dk / 4
        assert (np.abs(error) < most).all()
    theory = np.sqrt(sum(np.mean(d**2) / 12 / np.mean(a**2) for a, d in ((x, dx), (kernel, dk))))
    relative = np.linalg.norm(error) / np.linalg.norm(x @ kernel)
    assert relative == pytest.approx(theory, rel=slack)


def test_what_is_not_finite_stays_so():
    for bad in (np.nan, np.inf):
        x = jnp.ones((1, 2, 8)).at[0, 1, 3].set(bad)
        y = Layer('int8').apply({}, x, jnp.ones((8, 4)))
        assert np.isfinite(y[0, 0]).all() and np.isnan(y[0, 1]).all()


def some_params(model):
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *IMAGE)))['params']
    params['head']['kernel'] = jax.random.normal(jax.random.key(1), params['head']['kernel'].shape)
    return params


@pytest.mark.parametrize('model, in_a_block', [(VIT, 5), (MIXER, 4)], ids=['vit', 'mixer'])
def test_it_is_off_by_default_and_reaches_the_kernels_of_the_blocks_alone(model, in_a_block):
    assert model.quantize == 'none' and quantized.dot_general('none') is jax.lax.dot_general
    images = jnp.zeros((2, *IMAGE))
    params = jax.eval_shape(model.init, jax.random.key(0), images)

    def operands(model):
        """Types of both operands of each product in a gradient, those of a loop's body once."""
        gradient = jax.jit(jax.grad(lambda params: model.apply(params, images)[0].sum()))
        text = gradient.lower(params).as_text()
        pairs = re.findall(r'dot_general .*: \(tensor<.*?(\w+)>, tensor<.*?(\w+)>\)', text)
        return [tuple(kind.rpartition('x')[2].lower() for kind in pair) for pair in pairs]

    floats = operands(model)
    assert set(floats) == {('f32', 'f32')}
    for quantize, forward, gradient in ('int8', 'i8', 'i8'), ('fp8', 'f8e4m3fn', 'f8e5m2'):
        # Forward and, of the two products backward, that for the activations.
        wanted = [(forward, forward)] * in_a_block + [(gradient, forward)] * in_a_block
        found = operands(model.clone(quantize=quantize))
        assert len(found) == len(floats)
        assert sorted(p for p in found if p != ('f32', 'f32')) == sorted(wanted)


@pytest.mark.parametrize('kind', ['int8', 'fp8'])
def test_parameters_and_description_are_as_without(kind):
    model = VIT.clone(quantize=kind)
    shapes = [
        jax.eval_shape(m.init, jax.random.key(0), jnp.zeros((1, *IMAGE))) for m in (VIT, model)
    ]
    assert shapes[0] == shapes[1] and list(shapes[1]) == ['params']
    described = models.describe(model)
    assert described['quantize'] == kind and models.build(**described) == model


def gradients(model, params, mesh=None, parts=1):
    """Gradients of the loss of a batch of noise, from that many micro-batches.

    With few images one value that is rounded the other way, by a tie, would be seen in all.
    """
    examples = 64
    rng = np.random.default_rng(2)
    batch = dict(
        image=rng.integers(0, 256, (examples, *IMAGE), dtype=np.uint8),
        label=rng.integers(0, 5, examples), mask=np.ones(examples, np.float32),
    )  # fmt: skip
    mesh = sharding.make_mesh(jax.devices()[:1]) if mesh is None else sharding.make_mesh(**mesh)
    tx = optim.make(params, 10)
    abstract = step.abstract_state(classifier(model, IMAGE), tx, mesh)
    places = sharding.shardings_of(abstract.params)
    objective = classifier(model, IMAGE)

    def loss(params, batch, key):
        return objective.loss(params, {}, {}, batch, key, 0)

    grad = jax.value_and_grad(loss, has_aux=True)

    def run(params, batch):
        return step.accumulated(grad, params, batch, jax.random.key(0), parts)[2]

    found = jax.jit(sharding.with_mesh(mesh, run), in_shardings=(places, None))(
        params, sharding.put(batch, mesh)
    )
    return jax.device_get(found)


@pytest.mark.slow
@pytest.mark.parametrize('model, fields, mesh', [
    (VIT, dict(remat='full'), dict(data=2, fsdp=2, tensor=2)),
    (VIT, dict(remat='dots_with_no_batch_dims_saveable', unroll=2), dict(fsdp=8)),
    (MIXER, dict(unroll=2), dict(fsdp=4, tensor=2)),
])  # fmt: skip
@pytest.mark.parametrize('kind', ['int8', 'fp8'])
def test_a_step_is_the_same_on_a_mesh_in_parts_unrolled_and_recomputed(kind, model, fields, mesh):
    """But for what is so near a tie that the last bit of a float decides."""
    params = some_params(model)
    exact = gradients(model, params)
    wanted = gradients(model.clone(quantize=kind), params)
    found = gradients(model.clone(quantize=kind, **fields), params, mesh, parts=2)

    def distance(a, b):
        return optax.tree.norm(jax.tree.map(np.subtract, a, b)) / optax.tree.norm(exact)

    assert 0.005 < distance(wanted, exact) < 0.2
    assert distance(found, wanted) < distance(wanted, exact) / 10


def test_a_bad_value_and_a_missing_library_are_named(monkeypatch):
    for name in ('vit-ti/16', 'mixer-s/16'):
        with pytest.raises(UserError, match="quantize is 'int4', not one of none, int8, fp8$"):
            models.build(name, quantize='int4')
    monkeypatch.setitem(sys.modules, 'qwix', None)  # as where it is not installed
    quantized.dot_general.cache_clear()
    models.build('vit-ti/16')
    words = r"^model.quantize 'int8' needs qwix; install it with: pip install \"vit_jax\[quantize\]"
    for name in ('vit-ti/16', 'mixer-s/16'):
        with pytest.raises(UserError, match=words):
            models.build(name, quantize='int8')


@pytest.mark.slow
def test_a_run_is_evaluated_as_it_was_trained_unless_told_otherwise(tmp_path):
    folder = launched.write_images(tmp_path / 'images', {'train': 16, 'val': 5})
    run, export = tmp_path / 'run', tmp_path / 'export.npz'
    status, output = launched.finish(folder, run, '--config.model.quantize=int8')
    assert status == 0, output
    last = [line for line in launched.metrics(run) if 'val/loss' in line][-1]
    model, params = vit_jax.load(run, ema=True)
    assert model.quantize == 'int8'
    vit_jax.save(export, model, params, format='official')

    def loss(*flags):
        command = [sys.executable, '-m', 'vit_jax.evaluate', '--json', *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=launched.ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)['val']['loss']

    config = f'--config={run}/config.json'
    assert loss(f'--checkpoint={run}') == loss(f'--checkpoint={export}', config) == last['val/loss']
    exact = loss(f'--checkpoint={run}', '--config.model.quantize=none')
    assert exact != last['val/loss'] and exact == pytest.approx(last['val/loss'], rel=0.05)
