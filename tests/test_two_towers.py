"""The text tower and two towers: what they compute, and where their parameters lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import models, sharding
from vit_jax.errors import UserError
from vit_jax.models import parameters, two_towers
from vit_jax.models.text import Text

SMALL = dict(width=16, depth=2, num_heads=2, mlp_dim=32)
WORDS = dict(vocab_size=24, length=6, num_classes=8, **SMALL)
IMAGE = models.build('vit/8', num_classes=8, pool='map', head_std=None, **SMALL)
TOKENS = np.array([[3, 9, 23, 1, 1, 1], [4, 23, 7, 23, 1, 1], [5, 6, 8, 9, 2, 2]], np.int32)


def drawn(model, *inputs, seed=0):
    """Random numbers as the parameters of a model of these inputs."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)['params']
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype('f'), shapes)


def applied(model, params, *inputs, **options):
    return jax.device_get(jax.jit(lambda p: model.apply({'params': p}, *inputs, **options))(params))


def text(**fields):
    return Text(**(WORDS | fields))


def towers(**fields):
    model = two_towers.build_towers(IMAGE, text(head_std=None), **fields)
    images = np.random.default_rng(1).normal(size=(3, 16, 16, 3)).astype('f')
    return model, drawn(model, images, TOKENS), images


@pytest.mark.parametrize('causal', [True, False])
def test_a_causal_token_changes_no_output_before_it(causal):
    model = text(causal=causal, pool='none')
    params, other = drawn(model, TOKENS), TOKENS.copy()
    other[:, 3] -= 1
    before, after = (applied(model, params, x)[1]['encoded'] for x in (TOKENS, other))
    changed = (before != after).any(axis=(0, 2)).tolist()
    assert changed == ([False] * 3 + [True] * 3 if causal else [True] * 6)


@pytest.mark.parametrize('fields, places', [
    (dict(pool='eos', eos_id=23), [2, 1, 0]),  # the first; of none the first token
    (dict(pool='eos', eos_id=None), [2, 1, 3]),  # of the highest id
    (dict(pool='last'), [5, 5, 5]),
    (dict(pool='last', pad_id=1, mask_padding=True), [2, 3, 5]),
    (dict(pool='first'), [0, 0, 0]),
])  # fmt: skip
def test_pools_of_a_place(fields, places):
    model = text(num_classes=None, **fields)
    pooled, out = applied(model, drawn(model, TOKENS), TOKENS)
    np.testing.assert_array_equal(pooled, out['encoded'][np.arange(3), places])
    np.testing.assert_array_equal(out['pre_logits'], pooled)


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('pool', ['mean', 'map', 'last'])
def test_masked_padding_has_no_influence(pool, causal):
    model = text(pool=pool, pad_id=1, mask_padding=True, causal=causal)
    params = drawn(model, TOKENS)
    padded = applied(model, params, TOKENS)[0]
    for row, count in ((0, 3), (1, 4)):
        short = applied(model, params, TOKENS[row : row + 1, :count])[0]
        np.testing.assert_allclose(padded[row], short[0], atol=1e-6)
    plain = applied(model.clone(mask_padding=False), params, TOKENS)[0]
    assert pool == 'last' or np.abs(plain[:2] - padded[:2]).max() > 1e-3
    np.testing.assert_allclose(plain[2], padded[2], atol=1e-6)  # which has no padding


def test_a_text_by_numpy():
    """One block of a causal text, in float64."""
    model = text(depth=1, causal=True, pool='first', posemb='learn')
    params = drawn(model, TOKENS)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        return x * scale['scale'].squeeze() + scale['bias'].squeeze()

    block = jax.tree.map(lambda x: x[0], p['encoder'])
    x = p['vocabulary'][TOKENS] + p['posemb']
    qkv = np.einsum('bld,dihc->ibhlc', norm(x, block['norm1']), block['attn']['qkv']['kernel'])
    q, k, v = qkv + block['attn']['qkv']['bias'][:, None, :, None]
    logits = q @ k.swapaxes(-1, -2) / np.sqrt(8) + np.triu(np.full((6, 6), -np.inf), 1)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    out = block['attn']['out']
    x = x + np.einsum('bhlc,hcd->bld', probs @ v, out['kernel']) + out['bias']
    y = norm(x, block['norm2']) @ block['mlp']['fc1']['kernel'] + block['mlp']['fc1']['bias']
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    x = norm(x + y @ block['mlp']['fc2']['kernel'] + block['mlp']['fc2']['bias'], p['norm'])
    logits, out = applied(model, params, TOKENS)
    np.testing.assert_allclose(out['encoded'], x, atol=1e-5)
    np.testing.assert_allclose(logits, x[:, 0] @ p['head']['kernel'] + p['head']['bias'], atol=1e-5)
    tied = applied(model, params, out['encoded'], method='logits_of_tokens')
    np.testing.assert_allclose(tied, x @ p['vocabulary'].T, atol=1e-5)


def test_ids_outside_of_the_vocabulary_are_nan_and_lengths_are_checked():
    model = text(pool='first')
    params = drawn(model, TOKENS)
    output = applied(model, params, np.array([[0], [23], [24], [-1]]))[0]
    assert np.isnan(output).all(1).tolist() == [False, False, True, True]
    for tokens, words in (
        (np.zeros((1, 7), int), 'a text has 7 tokens, and the model has positions for 1 to 6'),
        (np.zeros((1, 6)), r'tokens are float64 \[1, 6\], not int'),
        (np.zeros(6, int), r'tokens are int64 \[6\], not int \[B, L\]'),
    ):
        with pytest.raises(UserError, match=words):
            model.apply({'params': params}, tokens)


@pytest.mark.parametrize('fields, words', [
    (dict(vocab=9), "text has no key 'vocab'"),
    (dict(causal='yes'), "text.causal is 'yes'"),
    (dict(eos_id=32_000), 'text.eos_id is 32000, but text.vocab_size 32000'),
    (dict(mask_padding=True), 'text.mask_padding needs text.pad_id'),
    (dict(num_classes=9), 'image tower gives vectors of 8, the text tower of 9'),
    (dict(pool='none'), "text.pool is 'none'"),
])  # fmt: skip
def test_wrong_towers_are_named(fields, words):
    with pytest.raises(UserError, match=words):
        two_towers.build_towers(IMAGE, fields)


def test_two_towers_by_their_parts():
    model, params, images = towers()
    logits, out = applied(model, params, images, TOKENS)
    vectors = []
    for name, inputs in (('image', images), ('text', TOKENS)):
        x = applied(getattr(model, name), params[name], inputs)[0].astype(np.float64)
        vectors.append(x / np.linalg.norm(x, axis=1, keepdims=True))
        np.testing.assert_allclose(out[f'{name}_embedding'], vectors[-1], atol=1e-6)
    expected = np.exp(params['temperature']) * vectors[0] @ vectors[1].T + params['bias']
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    for inputs, missing in (((images, None), 'text'), ((None, TOKENS), 'image')):
        none, one = applied(model, params, *inputs)
        assert none is None and f'{missing}_embedding' not in one
        (name,) = {'image', 'text'} - {missing}
        np.testing.assert_array_equal(one[f'{name}_embedding'], out[f'{name}_embedding'])
    assert model.mean == IMAGE.mean and model.grid((16, 24)) == (2, 3)


def test_the_temperature_starts_where_it_is_told_and_stays_below_its_bound():
    model, _, images = towers(temperature_init=1 / 0.07, use_bias=False, temperature_max=100.0)
    params = jax.jit(model.init)(jax.random.key(0), images, TOKENS)['params']
    assert 'bias' not in params
    logits, out = applied(model, params, images, TOKENS)
    np.testing.assert_allclose(out['temperature'], 1 / 0.07, rtol=1e-6)
    assert np.abs(logits).max() > 0.1  # projections do not start from zero
    hot = applied(model, params | {'temperature': np.float32(9)}, images, TOKENS)[1]
    np.testing.assert_allclose(hot['temperature'], 100, rtol=1e-6)


def test_bfloat16_computes_so_and_embeds_in_float32():
    model, params, images = towers()
    exact = applied(model, params, images, TOKENS)[1]
    half = model.clone(image=IMAGE.clone(dtype='bfloat16'), text=model.text.clone(dtype='bfloat16'))
    out = applied(half, params, images, TOKENS)[1]
    for name in ('image', 'text'):
        assert out[name]['encoded'].dtype == jnp.bfloat16
        embedding = out[f'{name}_embedding']
        assert embedding.dtype == np.float32
        assert 0 < np.abs(embedding - exact[f'{name}_embedding']).max() < 0.05


def test_captures_change_no_output():
    model, params, images = towers()
    plain = applied(model, params, images, TOKENS)[0]
    logits, out = applied(model, params, images, TOKENS, capture=('attention', 'tokens_by_block'))
    np.testing.assert_array_equal(logits, plain)
    assert out['text']['attention'].shape == (2, 3, 2, 6, 6)
    np.testing.assert_array_equal(out['text']['tokens_by_block'][0], out['text']['tokens'])


@pytest.mark.parametrize('mesh', [dict(fsdp=4), dict(fsdp=2, tensor=2)])
def test_shards_compute_the_same_as_one_device(mesh):
    """Loss and gradient on 8 devices, each array split as the table says."""
    model, params, images = towers()
    images, tokens = np.tile(images[:2], (4, 1, 1, 1)), np.tile(TOKENS[:2], (4, 1))

    def loss(params, images, tokens):
        logits, _ = model.apply({'params': params}, images, tokens)
        return -jnp.mean(jax.nn.log_sigmoid(logits * (2 * jnp.eye(8) - 1)))

    expected = jax.jit(jax.value_and_grad(loss))(params, images, tokens)
    mesh = sharding.make_mesh(**mesh)
    placed = jax.device_put(params, sharding.by_name(params, mesh))
    split = {n for n, x in parameters.named_leaves(placed).items() if not x.is_fully_replicated}
    assert {'text/vocabulary', 'text/head/kernel', 'text/encoder/attn/qkv/kernel',
            'image/head/kernel', 'image/map_head/query/kernel'} <= split  # fmt: skip
    with jax.sharding.set_mesh(mesh):
        inputs = jax.device_put((images, tokens), jax.NamedSharding(mesh, sharding.BATCH))
        value, gradient = jax.jit(jax.value_and_grad(loss))(placed, *inputs)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected[1]), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-6, err_msg=jax.tree_util.keystr(path))
