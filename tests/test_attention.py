"""Attention by every way that a device may have, against NumPy in float64 and one another."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attended import HOPPER, V4, exact

from vit_jax import models, sharding
from vit_jax.distributed import topologies
from vit_jax.errors import UserError
from vit_jax.models import attention, attention_kernel, memory, rotary, tiling
from vit_jax.plan import hlo_traffic

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason='the TPU compiler is not installed: pip install "vit_jax[plan]"',
)
SHAPE = dict(
    tokens=197, width=768, heads=12, dtype=jnp.bfloat16, dropout=0.0, capture=False, relative=False
)  # fmt: skip


@pytest.mark.parametrize('images, tokens, heads, channels, rows, shifted, dtype, tolerance', [
    (2, 197, 3, 64, 256, False, 'bfloat16', 2e-2), (4, 17, 4, 16, 8, True, 'float32', 1e-5),
    (2, 50, 2, 80, 16, False, 'float32', 1e-5), (2, 1, 2, 8, 8, False, 'float32', 1e-5),
    (3, 300, 2, 8, 256, True, 'float32', 1e-5), (4, 17, 4, 16, 8, True, 'bfloat16', 2e-2),
])  # fmt: skip
def test_the_kernel_is_exact(
    images, tokens, heads, channels, rows, shifted, dtype, tolerance, monkeypatch
):
    monkeypatch.setattr(attention_kernel, 'ROWS', rows)
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(2 * rng.standard_normal((images, tokens, 3, heads, channels)), dtype)
    bias = jnp.asarray(rng.standard_normal((3, heads, channels)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((images, tokens, heads, channels)), dtype)
    shift = jnp.float32(rng.standard_normal((heads, tokens, tokens))) if shifted else None
    out, backward = jax.vjp(lambda *x: attention.pallas(*x[:2], (), x[2], True), qkv, bias, shift)
    d_qkv, d_bias, d_shift = backward(weights)
    rounded = np.float64(qkv + bias.astype(dtype))
    added = np.float64(shift.astype(dtype)) if shifted else 0
    wanted, d_wanted, d_added = exact(rounded, np.float64(weights), added)
    pairs = [(out, wanted), (d_qkv, d_wanted), (d_bias, d_wanted.sum((0, 1)))]
    assert out.dtype == d_qkv.dtype == dtype and d_bias.dtype == jnp.float32
    if shifted:
        assert d_shift.dtype == jnp.float32
        pairs.append((d_shift, d_added))
    for found, wanted in pairs:
        assert found.shape == wanted.shape
        error = np.abs(np.float64(found) - wanted).max() / np.abs(wanted).max()
        assert error < tolerance


@pytest.mark.parametrize('mesh, images, rows', [
    (None, 3, 256), (dict(data=2, fsdp=2, tensor=2), 4, 8),
])
@pytest.mark.parametrize('kind', ['pallas', 'shifted', 'tiled'])
def test_the_kernels_rotate_queries_and_keys(mesh, images, rows, kind, monkeypatch):
    """As XLA does before attention, gradients included, with a shift of the logits or without."""
    monkeypatch.setattr(attention_kernel, 'ROWS', rows)
    monkeypatch.setattr(tiling, 'ROWS', (min(rows, 16), rows))
    shifted = kind == 'shifted'
    rope, (tokens, heads, channels) = rotary.Rope(), (21, 2, 16)
    tables = rotary.rotation(rope, (4, 5), 1, channels)
    rng = np.random.default_rng(0)
    weights, *arrays = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in (
        (images, tokens, heads, channels), (images, tokens, 3, heads, channels),
        (3, heads, channels), (heads, tokens, tokens)))  # fmt: skip
    arguments = (0, 1, 2) if shifted else (0, 1)

    def inside(qkv, bias, shift):
        if kind == 'tiled':
            return jnp.sum(weights * attention.tiled(qkv, bias, tables, True))
        added = shift if shifted else None
        return jnp.sum(weights * attention.pallas(qkv, bias, tables, added, True))

    def outside(qkv, bias, shift):
        q, k, v = (jnp.squeeze(x, 2) for x in jnp.split(qkv + bias, 3, axis=2))
        q, k = (rotary.rotate(rope, x, *tables) for x in (q, k))
        logits = jnp.einsum('bqhc,bkhc->bhqk', q, k) * channels**-0.5 + shifted * shift
        return jnp.sum(weights * jnp.einsum('bhqk,bkhc->bqhc', jax.nn.softmax(logits), v))

    grad, places = jax.value_and_grad(inside, arguments), {}
    if mesh:
        mesh = sharding.make_mesh(**mesh)
        grad = sharding.with_mesh(mesh, grad)
        specs = sharding.BATCH, jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec()
        places = dict(in_shardings=tuple(jax.sharding.NamedSharding(mesh, s) for s in specs))
    found = jax.jit(grad, **places)(*arrays)
    wanted = jax.jit(jax.value_and_grad(outside, arguments))(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)


@pytest.mark.parametrize('mesh, style', [
    pytest.param(None, dict(norms=['query_key'], rope={}, unbiased=['key'],
                            bias=dict(kind='mlp', shared=True)), marks=pytest.mark.slow),
    (dict(data=2, fsdp=2, tensor=2), dict(norms=['query_key'], rope=dict(pairs='neighbours'),
                                          bias={})),
    (dict(data=2, fsdp=2, tensor=2), dict(rope=dict(learnt=True), unbiased=['key'])),
])  # fmt: skip
def test_a_model_trains_with_the_kernel_as_without(mesh, style, monkeypatch):
    """With dropout and drop path, whose draws are the same."""
    model = models.build(
        'vit-ti/16', num_classes=5, width=32, depth=2, num_heads=2, mlp_dim=64, patch_size=8,
        dropout=0.2, drop_path=0.3, style=style,
    )  # fmt: skip
    images = jax.random.normal(jax.random.key(0), (8, 32, 32, 3))
    params = jax.jit(model.init)(jax.random.key(1), images)['params']
    params['head']['kernel'] = jax.random.normal(jax.random.key(2), (32, 5))
    attn = params['encoder']['attn']
    if 'bias_table' in attn:  # zeros at first
        attn['bias_table'] = jax.random.normal(jax.random.key(4), attn['bias_table'].shape)

    def loss(params, images):
        rngs = {'dropout': jax.random.key(3)}
        logits, _ = model.apply({'params': params}, images, train=True, rngs=rngs)
        return jnp.sum(jax.nn.log_softmax(logits)[:, 0])

    calls, kernel = [], attention.pallas

    def interpreted(qkv, bias, tables, shift):
        calls.append((qkv.shape, shift is not None))
        return kernel(qkv, bias, tables, shift, True)

    wanted = jax.jit(jax.value_and_grad(loss))(params, images)
    monkeypatch.setattr(attention, 'pallas', interpreted)
    monkeypatch.setattr(memory, 'target', lambda: V4)
    grad, places = jax.value_and_grad(loss), {}
    if mesh:
        mesh = sharding.make_mesh(**mesh)
        grad = sharding.with_mesh(mesh, grad)
        specs = jax.sharding.PartitionSpec(), sharding.BATCH
        places = dict(in_shardings=tuple(jax.sharding.NamedSharding(mesh, s) for s in specs))
    found = jax.jit(grad, **places)(params, images)
    assert calls and set(calls) == {((8, 17, 3, 2, 16), 'bias' in style)}
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), found, wanted)


def test_auto_is_what_can_be():
    def auto(target, **changes):
        return attention.chosen('auto', *target, **(SHAPE | changes))

    assert auto(V4) == auto(('tpu', 'TPU v6 lite')) == auto(V4, dtype=jnp.float32) == 'pallas'
    assert auto(V4, capture=True) == auto(V4, dropout=0.1) == auto(('tpu', 'TPU v3')) == 'xla'
    assert auto(V4, tokens=1025) == auto(V4, tokens=4301) == 'tiled'
    assert auto(V4, tokens=577) == 'pallas' and auto(V4, tokens=9000) == 'chunked'
    assert auto(V4, tokens=2047, dropout=0.1) == 'xla'
    assert auto(V4, tokens=2048, dropout=0.1) == auto(('cpu', 'cpu'), tokens=2048) == 'chunked'
    assert auto(HOPPER, tokens=2048) == 'cudnn' and auto(V4, tokens=2048, capture=True) == 'xla'
    assert auto(V4, bias=(12, 197, 197)) == 'pallas' and auto(V4, bias=(8, 1, 197, 197)) == 'xla'
    assert auto(V4, tokens=577, bias=(12, 577, 577)) == auto(HOPPER, bias=(12, 197, 197)) == 'xla'
    assert auto(HOPPER) == 'cudnn' and auto(HOPPER, dtype=jnp.float32) == 'xla'
    assert auto(HOPPER, heads=2) == auto(('gpu', 'AMD Instinct')) == auto(('cpu', 'cpu')) == 'xla'
    older = 'NVIDIA GeForce RTX 2080 Ti', 'NVIDIA TITAN RTX', 'NVIDIA T1000', 'Tesla V100-SXM2-16GB'
    newer = 'NVIDIA GeForce RTX 3090', 'NVIDIA RTX A6000', 'NVIDIA A100-SXM4-40GB', 'NVIDIA L4'
    assert {auto(('gpu', name)) for name in older} == {'xla'}
    assert {auto(('gpu', name)) for name in newer} == {'cudnn'}


@pytest.mark.parametrize('kind, target, changes, words', [
    ('pallas', ('cpu', 'cpu'), {}, 'for TPUs, and this is for cpu'),
    ('pallas', ('tpu', 'TPU v3'), {}, 'TPU v3'),
    ('pallas', V4, dict(tokens=1025), '1025 tokens of width 768 need 22 MiB'),
    ('pallas', V4, dict(dropout=0.1), 'attention_dropout is 0.1'),
    ('pallas', V4, dict(capture=True), 'are captured'),
    ('pallas', V4, dict(relative=True), "posemb is 'relative'"),
    ('pallas', V4, dict(tokens=577, bias=(12, 577, 577)), '577 tokens of width 768 with biases of '
     '12 heads need 38 MiB on the chip, where TPU v4 has 16'),
    ('pallas', V4, dict(bias=(8, 1, 197, 197)), 'it adds no mask to the logits'),
    ('tiled', ('cpu', 'cpu'), {}, 'for TPUs, and this is for cpu'),
    ('tiled', V4, dict(tokens=9000), 'keys and values of 9000 tokens do not fit on the chip'),
    ('tiled', V4, dict(bias=(12, 197, 197)), 'it adds nothing to the logits'),
    ('chunked', V4, dict(capture=True), 'are captured'),
    ('cudnn', HOPPER, dict(bias=(12, 197, 197)), 'it adds nothing to the logits, and model.style'),
    ('cudnn', V4, {}, 'NVIDIA GPUs, and this is for TPU v4'),
    ('cudnn', ('gpu', 'NVIDIA H200'), dict(dtype=jnp.float32), 'products are in float32'),
    ('cudnn', ('gpu', 'NVIDIA H200'), dict(heads=2), '384 channels'),
])  # fmt: skip
def test_what_can_not_be_says_why(kind, target, changes, words):
    with pytest.raises(UserError, match=f"model.attention is '{kind}', but .*{words}"):
        attention.chosen(kind, *target, **(SHAPE | changes))


@pytest.mark.parametrize('size, tokens', [(16, 5), (24, 10)])  # the second with no class token
@pytest.mark.slow
def test_cudnn_is_given_an_even_number_of_tokens_and_told_how_many_count(monkeypatch, size, tokens):
    """JAX's own attention in place of cuDNN's, which is not here: what is asked of it."""
    by_jax, asked = jax.nn.dot_product_attention, []

    def stand_in(q, k, v, *, implementation, **given):
        asked.append((implementation, q.shape[1], *given))
        return by_jax(q, k, v, implementation='xla', **given)

    model = models.build(
        'vit-ti/16', patch_size=8, width=32, num_heads=4, depth=2, num_classes=5,
        pool='cls' if tokens % 2 else 'gap', registers=0 if tokens % 2 else 1,
    )  # fmt: skip
    images = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)['params']
    params = jax.tree.map(lambda x: x + 0.1 * np.random.default_rng(1).normal(size=x.shape), params)

    def results():
        def loss(p):
            logits, _ = model.apply({'params': p}, images, train=True)
            return jnp.sum(logits**2), logits

        return jax.grad(loss, has_aux=True)(params)

    wanted = results()
    monkeypatch.setattr(memory, 'target', lambda: HOPPER)
    monkeypatch.setattr(attention, 'chosen', lambda *args, **kwargs: 'cudnn')
    monkeypatch.setattr(jax.nn, 'dot_product_attention', stand_in)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
                 results(), wanted)  # fmt: skip
    padding = ('query_seq_lengths', 'key_value_seq_lengths') if tokens % 2 else ()
    assert set(asked) == {('cudnn', tokens + tokens % 2, *padding)}


@pytest.mark.parametrize('unroll', [1, 3])
def test_cudnn_trains_on_197_tokens_and_its_forward_pass_is_not_made_again(monkeypatch, unroll):
    """The program before compilation, as JAX makes it where it finds cuDNN."""
    from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

    monkeypatch.setattr(memory, 'target', lambda: HOPPER)
    monkeypatch.setattr(jax_cudnn, 'check_cudnn_version', lambda: 91000)
    monkeypatch.setattr(jax_cudnn, 'check_compute_capability', lambda _: True)
    model = models.build(
        'vit-ti/16', width=128, num_heads=2, depth=3, dtype='bfloat16', unroll=unroll
    )
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)['params']

    def loss(params, images):
        return model.apply({'params': params}, images, train=True)[0].astype(jnp.float32).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(params, images))
    calls = 1 if unroll == 1 else 2  # the last of unrolled blocks follows the scan of the others
    assert text.count('dot_product_attention_fwd_wrapper[') == calls
    assert text.count('dot_product_attention_bwd_wrapper[') == calls


def test_a_model_that_asks_for_what_can_not_be_is_refused():
    model = models.build('vit-ti/16', width=32, num_heads=2, depth=1, attention='pallas')
    images = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    with pytest.raises(UserError, match='this is for cpu'):
        jax.eval_shape(model.apply, variables, images)
    with pytest.raises(UserError, match="model.attention is 'flash', not one of auto, xla"):
        models.build('vit-ti/16', attention='flash')


@needs_compiler
@pytest.mark.parametrize('topology, tokens, width, heads, shifted', [
    ('v4:2x2x1', 197, 768, 12, True), ('v5e:2x2', 197, 192, 3, False),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('v4:2x2x1', 257, 1664, 16, False), ('v4:2x2x1', 197, 1280, 16, True),  # almost full
        ('v4:2x2x1', 577, 1024, 16, False),  # one image at a time
        ('v6e:2x2', 257, 640, 8, False), ('v5p:2x2x1', 197, 768, 12, False),
        ('v5e:2x2', 257, 1280, 16, True),
    )),
])  # fmt: skip
def test_the_tpus_compiler_takes_the_kernel_and_its_bytes_are_counted(
    topology, tokens, width, heads, shifted
):
    found, _ = topologies.get_devices(topology)
    mesh = sharding.make_mesh(found)
    batch = 2 * len(found)
    split = jax.sharding.NamedSharding(mesh, sharding.BATCH)
    qkv = jax.ShapeDtypeStruct((batch, tokens, 3 * width), jnp.bfloat16, sharding=split)
    added = (heads, tokens, tokens) if shifted else ()

    def gradient(qkv, shift):
        shape = (*qkv.shape[:2], 3, heads, width // heads)
        assert memory.target() == ('tpu', found[0].device_kind)
        attention.chosen('pallas', *memory.target(), **SHAPE | dict(
            tokens=tokens, width=width, heads=heads, bias=added))  # fmt: skip
        bias = jnp.zeros(shape[2:])

        def total(qkv, shift):
            out = attention.pallas(qkv.reshape(shape), bias, (), shift if shifted else None)
            return out.astype(jnp.float32).sum()

        return jax.grad(total, (0, 1) if shifted else 0)(qkv, shift)

    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shift = jax.ShapeDtypeStruct(added, jnp.bfloat16, sharding=everywhere)
    text = jax.jit(sharding.with_mesh(mesh, gradient)).lower(qkv, shift).compile().as_text()
    # Forward, whose result nobody reads, is left out; backward has 3 D and D in, and 3 D out, and
    # the bias's gradient by image.
    rows, lanes = -(-tokens // 8) * 8, -(-3 * width // 128) * 128
    matrices = 2 * 2 * rows * (2 * lanes + -(-width // 128) * 128)
    if shifted:  # and the shift in, its gradient of each of two images out
        matrices += heads * rows * (-(-tokens // 128) * 128) * (2 + 2 * 4)
    assert hlo_traffic.kernel_bytes(text) - matrices in (2 * 4 * lanes, 2 * 4 * 8 * lanes)
    assert text.count('tpu_custom_call') >= 1 and (' all-' in text) == shifted


def test_softmax_keeps_its_probabilities_alone_on_cpus_and_has_the_same_gradient():
    logits, d = jax.random.normal(jax.random.key(0), (2, 3, 5, 7))
    logits *= 4
    probs, gradient = jax.vjp(attention.softmax, logits)
    expected, reference = jax.vjp(jax.nn.softmax, logits)
    np.testing.assert_array_equal(probs, expected)
    np.testing.assert_allclose(gradient(d)[0], reference(d)[0], rtol=1e-5, atol=1e-7)
    kept = [x for x in jax.tree.leaves(gradient) if x.shape == logits.shape]
    assert len(kept) == 1
    np.testing.assert_array_equal(kept[0], probs)
