"""Products alone in bfloat16 (model.matmul_dtype), and those in float32 on any device (precision).

With the former the residual stream, norms and logits stay in float32.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from learners import batch, classifier

from vit_jax import models, optim, sharding, step
from vit_jax.errors import UserError
from vit_jax.figures import restored
from vit_jax.models import (
    attention,
    block,
    detector,
    interface,
    mae,
    masks,
    patch_classifier,
    segmenter,
    two_towers,
)
from vit_jax.predict import by_labels

B, T, D, H, M, K = 2, 17, 24, 3, 40, 13  # K and R are sizes of nothing else
R, M1 = 11, 6  # the representation layer, the MLP over patches
MIXED = dict(matmul_dtype='bfloat16', num_classes=K)
VIT = dict(name='vit/4', width=D, depth=2, num_heads=H, mlp_dim=M, unroll=1)
KINDS = {
    'vit': dict(VIT, representation_size=R, style=dict(norms=['query_key']), layer_scale=0.1),
    'map': dict(VIT, pool='map', glu=True, posemb='relative'),
    'regular': dict(VIT, dropout=0.1, attention_dropout=0.1, drop_path=0.1),
    'mixer': dict(name='mixer/4', width=D, depth=2, tokens_mlp_dim=M1, mlp_dim=M, drop_path=0.1,
                  unroll=1),
    'hybrid': dict(VIT, name='r26+vit-s/32', resnet=(1, 1), resnet_width=0.5, patch_size=1),
    'bit': dict(name='bit', units=(1, 1), width=0.5),
}  # fmt: skip


def equations(jaxpr):
    """All equations of a jaxpr, those of its loops and calls included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, 'eqns')):
            if hasattr(inner, 'eqns') or hasattr(inner, 'jaxpr'):
                yield from equations(getattr(inner, 'jaxpr', inner))


@functools.cache
def traced(kind):
    """Equations of a forward pass in training and of its gradient."""
    model = models.build(**MIXED, **KINDS[kind])
    images = jnp.zeros((B, 16, 16, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}

    def logits(params, images):
        out, rest = model.apply(params, images, train=True, rngs={'dropout': jax.random.key(1)})
        assert out.dtype == rest['pre_logits'].dtype == rest['encoded'].dtype == jnp.float32
        return out.sum()

    return list(equations(jax.make_jaxpr(jax.grad(logits))(params, images).jaxpr))


def dtypes(eqn):
    return {x.aval.dtype.name for x in eqn.invars}


def of_head(eqn):
    """Whether a product is of the head or of the representation layer."""
    return {K, R} & {n for x in eqn.invars for n in x.aval.shape}


@pytest.mark.parametrize('kind', KINDS)
def test_products_are_in_bfloat16_and_those_of_the_head_are_not(kind):
    names = 'dot_general', 'conv_general_dilated'
    products = [e for e in traced(kind) if e.primitive.name in names]
    head = [e for e in products if of_head(e)]
    assert head and all(dtypes(e) == {'float32'} for e in head)
    rest = [e for e in products if not of_head(e)]
    pooling = [e for e in rest if dtypes(e) != {'bfloat16'}]
    assert len(rest) > len(pooling) and all(dtypes(e) == {'float32'} for e in pooling)
    # Four projections, two products of attention, two of the MLP, each with two gradients.
    assert len(pooling) == (3 * 8 if kind == 'map' else 0)


@pytest.mark.parametrize('kind', KINDS)
def test_the_residual_stream_norms_and_softmax_are_in_float32(kind):
    found = traced(kind)
    sums = [
        e for e in found if e.primitive.name == 'add'
        and len({x.aval.shape for x in e.invars}) == 1 and e.invars[0].aval.ndim > 2
        and e.invars[0].aval.shape[-1] not in (M, M1, T, T - 1)  # GELU, logits
    ]  # fmt: skip
    assert len(sums) >= 2 and all(dtypes(e) == {'float32'} for e in sums)
    for e in found:
        if e.primitive.name in ('rsqrt', 'exp'):
            assert dtypes(e) == {'float32'}
        if e.primitive.name == 'scan':  # the stream from block to block, and its gradient
            first = e.params['num_consts']
            carry = [x.aval for x in e.invars[first : first + e.params['num_carry']]]
            stream = [x.dtype.name for x in carry if x.ndim == 3 and x.shape[-1] == D]
            assert stream == ['float32']


def rounded(x):
    """The nearest bfloat16 values, in float64."""
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


def numpy_block(p, x, r):
    """A block in float64 with values rounded by `r` where products read and write them."""

    def norm(x, p):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return r(y * p['scale'] + p['bias'])

    def dense(path, x, p):
        return r(r(np.einsum(path, x, r(p['kernel']))) + r(p['bias']))

    qkv = dense('btd,dihc->btihc', norm(x, p['norm1']), p['attn']['qkv'])
    q, k, v = (qkv[:, :, i] for i in range(3))
    logits = r(np.einsum('bqhc,bkhc->bhqk', r(q * r((D // H) ** -0.5)), k))
    e = np.exp(logits - logits.max(-1, keepdims=True))
    y = r(np.einsum('bhqk,bkhc->bqhc', r(e / e.sum(-1, keepdims=True)), v))
    x = x + dense('bqhc,hcd->bqd', y, p['attn']['out'])
    y = dense('btd,dm->btm', norm(x, p['norm2']), p['mlp']['fc1'])
    y = r(0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))))
    return x + dense('btm,md->btd', y, p['mlp']['fc2'])


def test_a_block_equals_numpy_with_the_same_casts():
    """On a stream of large values, which bfloat16 would round by more than a block adds."""
    rng = np.random.default_rng(0)
    x = (1000 * rng.standard_normal((B, T, D))).astype(np.float32)
    model = block.Block(H, M, matmul_dtype=jnp.bfloat16)
    params = jax.jit(model.init)(jax.random.key(0), x, 0.0)['params']
    params = jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape, np.float32), params)
    found, _ = model.apply({'params': params}, x, 0.0)  # not compiled: each result is rounded
    assert found.dtype == jnp.float32
    added = np.asarray(found, np.float64) - x
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    wanted, exact = (numpy_block(p, np.float64(x), r) - x for r in (rounded, lambda x: x))
    assert np.abs(added - wanted).max() < 0.03 * added.std()
    errors = [np.sqrt(np.mean((added - x) ** 2)) for x in (wanted, exact)]
    assert errors[0] < 0.7 * errors[1]


def test_names_of_dtypes():
    model = models.build('vit-ti/16', matmul_dtype=jnp.bfloat16)
    assert model.matmul_dtype == 'bfloat16' and model.dtype == 'float32'
    assert models.build(**models.describe(model)) == model
    for name in ('vit-ti/16', 'mixer-b/16', 'bit-r50x1'):
        with pytest.raises(UserError, match="matmul_dtype is 'int8', not one of float32, bfloat16"):
            models.build(name, matmul_dtype='int8')


PRODUCTS = 'dot_general', 'conv_general_dilated'
EXACT = (jax.lax.Precision.HIGHEST,) * 2
TEXT = dict(vocab_size=9, length=5, **{k: v for k, v in VIT.items() if k not in ('name', 'unroll')})


def precisions(function, *arguments):
    """Precisions of all products of float32 values, and of how many."""
    found = [
        e.params['precision'] for e in equations(jax.make_jaxpr(function)(*arguments).jaxpr)
        if e.primitive.name in PRODUCTS and 'float32' in dtypes(e)
    ]  # fmt: skip
    return set(found), len(found)


def small(**fields):
    return models.build(**VIT | dict(num_classes=K) | fields)


def towers():
    return two_towers.build_towers(small(num_classes=D), TEXT | dict(num_classes=D))


MODELS = {
    **{kind: lambda kind=kind: models.build(**KINDS[kind] | dict(num_classes=K)) for kind in KINDS},
    'chunked': lambda: small(attention='chunked'),
    'towers': towers,
    'mae': lambda: mae.around_encoder(small(), decoder_width=8, decoder_depth=1, decoder_heads=2),
    'yolos': lambda: detector.around_encoder(small(), num_classes=K, queries=3),
    'eomt': lambda: masks.around_encoder(small(), num_classes=K, queries=3, query_blocks=1),
    'segmenter': lambda: segmenter.around_encoder(small(), num_classes=K, depth=1),
    'patches': lambda: patch_classifier.around_encoder(small(), num_classes=K),
}


@pytest.mark.parametrize('kind', MODELS)
def test_all_products_of_a_model_as_commands_load_it_are_in_float32(kind):
    model = MODELS[kind]()
    inputs = [jnp.zeros((B, 16, 16, 3))]
    if kind == 'towers':
        inputs.append(jnp.ones((B, 5), jnp.int32))
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    more = {'noise': jnp.zeros((B, 16))} if kind == 'mae' else {}
    exact = interface.exact(model)
    assert exact != model and interface.exact(exact) == exact
    found, count = precisions(lambda p, *x: exact.apply(p, *x, **more)[0], params, *inputs)
    assert found == {EXACT} and count > 5
    plain, _ = precisions(lambda p, *x: model.apply(p, *x, **more)[0], params, *inputs)
    assert None in plain  # as the device does it


@pytest.mark.parametrize('pool', ['map', 'cls'])
def test_products_of_commands_beside_the_model_are_in_its_precision(pool):
    """Embeddings of patches alone, and what undoes the normalisation of restored patches."""
    vit = interface.exact(small(pool=pool, num_classes=D, representation_size=R))
    params = jax.eval_shape(vit.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))['params']
    found, count = precisions(
        lambda p, x: by_labels.patch_embeddings(vit, p, x), params, jnp.zeros((B, 16, D))
    )
    assert found == {EXACT} and count > 1
    model = interface.exact(MODELS['mae']())
    params = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)), noise=jnp.zeros((1, 16))
    )['params']
    images = jnp.zeros((B, 16, 16, 3), jnp.uint8)
    found, _ = precisions(
        lambda p, x, noise: restored.restore(model, p, x, noise), params, images,
        jnp.zeros((B, 16)),
    )  # fmt: skip
    assert found == {EXACT}


def test_kernels_are_in_the_precision_around_them():
    qkv, bias = jnp.zeros((B, T, 3, H, D // H)), jnp.zeros((3, H, D // H))

    def total(qkv):
        return attention.pallas(qkv, bias, (), None, True).sum()

    assert precisions(jax.grad(total), qkv)[0] == {None}
    with jax.default_matmul_precision('float32'):
        assert precisions(jax.grad(total), qkv)[0] == {EXACT}


@pytest.mark.parametrize('precision', [None, 'float32', 'tensorfloat32'])
def test_a_step_computes_all_products_in_the_stated_precision(precision):
    model = small(attention='chunked', gelu='exact', precision=precision)
    objective, mesh = classifier(model, (16, 16, 3)), sharding.make_mesh(jax.devices()[:1])
    tx = optim.make(step.abstract_params(objective), 10)
    abstract = step.abstract_state(objective, tx, mesh)
    examples = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch())) | {
        'image': jax.ShapeDtypeStruct((16, 16, 16, 3), jnp.uint8)
    }
    advance = step.compiled(objective, tx, abstract, mesh, precision=precision)
    high = {'float32': EXACT, 'tensorfloat32': (jax.lax.Precision.HIGH,) * 2, None: None}
    assert precisions(advance, abstract, examples, {})[0] == {high[precision]}


def test_models_with_products_in_16_bits_have_no_precision():
    model = small(matmul_dtype='bfloat16')
    assert interface.exact(model) == model
    assert interface.computed_exactly(small, model) is small
    with pytest.raises(UserError, match="precision is 'float32', .* they are in bfloat16"):
        small(matmul_dtype='bfloat16', precision='float32')
