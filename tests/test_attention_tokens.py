"""Attention of many tokens: by tiles, by chunks, and how much memory it takes."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attended import HOPPER, V4, exact
from jax.extend.core import jaxprs_in_params

from vit_jax import models, sharding
from vit_jax.distributed import topologies
from vit_jax.models import attention, attention_chunked, masks, memory, tiling
from vit_jax.plan import hlo_traffic


def gradients(attend, images, tokens, heads, channels, dtype):
    """(found, wanted): output and gradients of attend(qkv, bias) and of NumPy in float64."""
    rng = np.random.default_rng(0)
    shape = (images, tokens, 3, heads, channels)
    qkv = jnp.asarray(2 * rng.standard_normal(shape), dtype)
    bias = jnp.asarray(rng.standard_normal(shape[2:]), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((images, tokens, heads, channels)), dtype)

    @jax.jit
    def run(qkv, bias, weights):
        out, backward = jax.vjp(attend, qkv, bias)
        return out, *backward(weights)

    found = run(qkv, bias, weights)
    out, d_qkv, _ = exact(np.float64(qkv + bias.astype(dtype)), np.float64(weights))
    return found, (out, d_qkv, d_qkv.sum((0, 1)))


def assert_close(found, wanted, tolerance):
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert np.abs(np.float64(a) - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize('images, tokens, heads, channels, rows, keys, dtype, tolerance', [
    (2, 1, 2, 64, 8, 16, 'float32', 1e-5),
    (2, 127, 3, 64, 32, 64, 'float32', 1e-5),  # a group of one head and padding
    (1, 40, 2, 80, 16, 24, 'float32', 1e-5),  # channels are padded to 128
    (1, 64, 5, 32, 16, 64, 'bfloat16', 2e-2),
    (1, 600, 1, 64, 256, 512, 'float32', 1e-5),
    pytest.param(1, 1025, 2, 64, 384, 512, 'bfloat16', 2e-2, marks=pytest.mark.slow),
])  # fmt: skip
def test_tiles_are_exact(
    images, tokens, heads, channels, rows, keys, dtype, tolerance, monkeypatch
):
    monkeypatch.setattr(tiling, 'ROWS', (rows, rows))
    monkeypatch.setattr(tiling, 'KEYS', keys)
    found, wanted = gradients(
        lambda qkv, bias: attention.tiled(qkv, bias, (), True), images, tokens, heads, channels,
        dtype,
    )  # fmt: skip
    assert found[0].dtype == found[1].dtype == dtype and found[2].dtype == jnp.float32
    assert_close(found, wanted, tolerance)


@pytest.mark.parametrize('tokens, dtype, tolerance', [
    (1, 'float32', 1e-5), (50, 'float32', 1e-5), (48, 'bfloat16', 2e-2),
])  # fmt: skip
def test_chunks_are_exact(tokens, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(attention_chunked, 'ROWS', 16)

    def attend(qkv, bias):
        q, k, v = jnp.moveaxis(qkv + bias.astype(qkv.dtype), 2, 0).swapaxes(2, 3)
        return attention_chunked.attend(q, k, v).swapaxes(1, 2)

    found, wanted = gradients(attend, 2, tokens, 3, 8, dtype)
    assert_close(found, wanted, tolerance)


@pytest.mark.parametrize('shape', [(2, 20, 20), (3, 1, 20, 20)])
def test_chunks_add_a_bias_and_drop_probabilities(shape, monkeypatch):
    monkeypatch.setattr(attention_chunked, 'ROWS', 8)
    rng = np.random.default_rng(0)
    q, k = (jnp.float32(rng.standard_normal((3, 2, 20, 4))) for _ in range(2))
    v = jnp.broadcast_to(jnp.eye(20), (3, 2, 20, 20))  # the output is the probabilities
    bias = jnp.float32(rng.standard_normal(shape))

    def plain(bias):
        return jax.nn.softmax(jnp.einsum('bhqc,bhkc->bhqk', q, k) / 2 + bias)

    def found(bias, rate=0.0):
        return attention_chunked.attend(q, k, v, bias, rate, jax.random.key(0))

    weights = rng.standard_normal((3, 2, 20, 20))
    for run in (lambda f: f(bias), lambda f: jax.grad(lambda x: jnp.sum(f(x) * weights))(bias)):
        np.testing.assert_allclose(run(found), run(plain), rtol=1e-4, atol=1e-5)
    dropped, wanted = np.asarray(found(bias, 0.25)), np.asarray(plain(bias))
    share = (dropped == 0).mean()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / dropped.size) ** 0.5
    np.testing.assert_allclose(dropped[dropped != 0] * 0.75, wanted[dropped != 0], rtol=1e-4)
    assert len({row.tobytes() for row in (dropped == 0).reshape(-1, 20)}) > 100


def sizes(jaxpr):
    """Yields the number of elements of all arrays of a program and of those inside it."""
    for equation in jaxpr.eqns:
        yield from (math.prod(x.aval.shape) for x in equation.outvars if hasattr(x.aval, 'shape'))
        for inner in jaxprs_in_params(equation.params):
            yield from sizes(inner)


@pytest.mark.parametrize('target', [V4, HOPPER, ('cpu', 'cpu')])
@pytest.mark.parametrize('side, masked', [(360, False), (368, False), (368, True)])
def test_no_program_has_all_logits_from_2048_tokens_on(target, side, masked, monkeypatch):
    """Forward and backward, of a ViT and of a mask classifier in training; below, XLA's has them.

    The program as JAX makes it, before what a compiler may fuse.
    """
    monkeypatch.setattr(memory, 'target', lambda: target)
    monkeypatch.setattr(attention, 'cudnn', lambda q, k, v: q)  # needs a GPU to be traced
    model = models.build(
        'vit-ti/16', patch_size=8, width=32, depth=2, num_heads=4, mlp_dim=32, num_classes=2,
        dtype='bfloat16', attention_dropout=0.0 if masked else 0.1, pool='gap', head_bias=0.0,
    )  # fmt: skip
    rngs, how = {'dropout': jax.random.key(0), 'mask': jax.random.key(1)}, {}
    if masked:
        model = masks.around_encoder(model, num_classes=2, queries=2, query_blocks=1, upscales=1)
        how = dict(masked=jnp.ones(1))
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)['params']

    def loss(params, images):
        found = model.apply({'params': params}, images, train=True, rngs=rngs, **how)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(found))

    tokens = (side // 8) ** 2
    program = jax.make_jaxpr(jax.grad(loss))(params, images)
    assert (max(sizes(program.jaxpr)) < 4 * tokens**2) == (tokens >= 2048)


@pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason='the TPU compiler is not installed: pip install "vit_jax[plan]"',
)
@pytest.mark.parametrize('topology, tokens, heads, channels, dtype', [
    ('v4:2x2x1', 1025, 2, 64, 'bfloat16'),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('v4:2x2x1', 4480, 2, 64, 'bfloat16'), ('v4:2x2x1', 3040, 2, 64, 'float32'),  # almost full
        ('v5e:2x2', 1370, 3, 104, 'bfloat16'), ('v6e:2x2', 4201, 3, 64, 'bfloat16'),
    )),
])  # fmt: skip
def test_the_tpus_compiler_takes_the_tiles_and_their_bytes_are_counted(
    topology, tokens, heads, channels, dtype
):
    found, _ = topologies.get_devices(topology)
    mesh = sharding.make_mesh(found)
    split = jax.sharding.NamedSharding(mesh, sharding.BATCH)
    shape = (len(found), tokens, 3 * heads * channels)
    qkv = jax.ShapeDtypeStruct(shape, dtype, sharding=split)
    cut = tiling.plan(tokens, heads, channels)
    assert tiling.buffers(cut, dtype, found[0].device_kind, rotary=True)

    def gradient(qkv):
        tables = (jnp.ones((tokens, channels)),) * 2
        qkv = qkv.reshape(*shape[:2], 3, heads, channels)
        bias = jnp.zeros(qkv.shape[2:])
        return jax.grad(lambda x: attention.tiled(x, bias, tables).astype(jnp.float32).sum())(qkv)

    text = jax.jit(sharding.with_mesh(mesh, gradient)).lower(qkv).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    # Matrices of D: forward 3 in and 1 out; backward 3, out and its gradient in, 3 out. qkv is an
    # operand of each three times.
    matrix = tokens * cut.groups * cut.lanes * jnp.dtype(dtype).itemsize
    assert 1 <= hlo_traffic.kernel_bytes(text) / (12 * matrix) < 1.4
