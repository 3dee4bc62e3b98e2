"""The table of parameter names: one rule for each, and layers in the order of the model."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import models, optim
from vit_jax.errors import UserError
from vit_jax.models import parameters, text, two_towers
from vit_jax.objectives import Objective

IMAGE = (1, 64, 64, 3)
TINY = dict(width=16, depth=3, num_heads=2, mlp_dim=24, num_classes=4)
ALL = dict(
    pool='map', cls_token=True, dist_token=True, dist_head=True, registers=2, pre_norm=True,
    representation_size=8, glu=True, style=dict(norms=['query_key']), layer_scale=0.5,
)
FAMILIES = {
    'everything': dict(name='vit/32', **ALL, posemb='learn2d'),
    'table': dict(name='vit/32', cls_posemb=True),
    'table by block': dict(name='vit/32', posemb_at='layers'),
    'rows and columns by block': dict(name='vit/32', posemb='learn2d', posemb_at='layers'),
    'shared table': dict(name='vit/32', posemb_at='shared', last_norm='pooled'),
    'relative': dict(name='vit/32', posemb='relative', pool='cls_gap'),
    'fixed': dict(name='vit/32', posemb='sincos2d_moco', pool='gap'),
    'hybrid': dict(name='r26+vit-s/32', resnet=(1, 1), resnet_width=0.5),
    'learnt turns, biases by block': dict(
        name='vit/32', patch_norm=True, style=dict(bias={}, rope=dict(learnt=True))
    ),
    'shared biases': dict(name='vit/32', style=dict(bias=dict(shared=True, kind='mlp'))),
    'biases of an MLP': dict(name='vit/32', style=dict(bias=dict(kind='mlp'))),
    'words': dict(name='text', vocab_size=9, length=5),
    'mixer': dict(name='mixer-s/32', tokens_mlp_dim=8, num_heads=None),
    'bit': dict(name='bit', units=(1, 1), width=0.5, depth=None, num_heads=None, mlp_dim=None),
}


def built(family):
    """(a small model of a family, its parameters: random numbers)."""
    fields = {k: v for k, v in {**TINY, **FAMILIES[family]}.items() if v is not None}
    model = models.build(**fields)
    return model, drawn(model, example(model))


def example(model):
    """What a model reads: an image [1, H, W, C] or tokens [1, L]."""
    if isinstance(model, text.Text):
        return jnp.arange(model.length)[None] % model.vocab_size
    return jnp.asarray(np.random.default_rng(1).normal(size=IMAGE), jnp.float32)


def drawn(model, *inputs):
    """Random numbers as the parameters of a model of these inputs."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype('f'), shapes['params'])


def towers(depth):
    """(two towers of 3 and `depth` blocks, their parameters)."""
    image = models.build('vit/32', **TINY)
    words = dict(TINY, vocab_size=9, length=5, depth=depth)
    model = two_towers.build_towers(image, words)
    return model, drawn(model, example(model.image), example(model.text))


def test_every_parameter_has_one_rule_and_every_rule_a_parameter():
    used = set()
    for params in (*(built(family)[1] for family in FAMILIES), towers(2)[1]):
        for name, leaf in parameters.named_leaves(params).items():
            matches = [
                rule for rule in parameters.RULES if re.search(f'(^|/)({rule.pattern})$', name)
            ]
            # One that splits it, or else it is a bias, scale or token that is replicated.
            splits = [rule for rule in matches if rule.spec != parameters.P()]
            assert matches and splits in ([], matches[:1]), (name, matches)
            assert parameters.find_rule(name, leaf.shape) == matches[0]
            assert len(matches[0].spec) <= leaf.ndim, name
            used.add(matches[0])
    assert used == set(parameters.RULES)


@pytest.mark.parametrize('family', [name for name in FAMILIES if name != 'bit'])
def test_the_layer_of_a_parameter_is_where_the_model_reads_it(family):
    model, params = built(family)
    inputs = example(model)

    @jax.jit
    def by_block(params):  # the input of the first block, then the output of each
        _, out = model.apply({'params': params}, inputs, capture='tokens_by_block')
        return jnp.reshape(out['tokens_by_block'], (model.depth + 1, -1))

    leaves, tree = parameters.named_leaves(params), jax.tree.structure(params)
    before = by_block(params)

    def reads(name, x):
        """Which rows of `by_block` depend on a parameter: those that another value x changes."""
        changed = jax.tree.unflatten(tree, list((leaves | {name: x}).values()))
        return np.any(np.asarray(by_block(changed) != before), axis=1)

    layers = {}
    for name, leaf in leaves.items():
        layers[name] = parameters.find_rule(name, leaf.shape).layer
        if layers[name] == 'blocks':
            assert len(leaf) == model.depth, name
            for k in range(model.depth):
                other = np.concatenate([leaf[:k], leaf[k : k + 1] * 1.5 + 0.1, leaf[k + 1 :]])
                assert reads(name, other).tolist() == [i > k for i in range(model.depth + 1)], name
        else:
            assert {*reads(name, leaf * 1.5 + 0.1)[1:]} == {layers[name] == 'stem'}, name
    assert {'blocks', 'head', 'stem'} == set(layers.values())
    rates = optim.rate_multipliers(parameters.named_leaves(params), (), 0.5)
    for name, rate in rates.items():
        expected = {'stem': 0.5**4, 'head': 1, 'blocks': np.array([0.125, 0.25, 0.5])}[layers[name]]
        np.testing.assert_allclose(np.squeeze(rate), expected)


def test_each_tower_has_the_rates_of_its_depth():
    params = parameters.named_leaves(towers(2)[1])
    rates = optim.rate_multipliers(params, (), 0.5)
    expected = {
        'image/posemb': 0.5**4, 'text/posemb': 0.5**3, 'text/vocabulary': 0.5**3,
        'image/encoder/norm1/bias': [0.125, 0.25, 0.5], 'text/encoder/norm1/bias': [0.25, 0.5],
        'image/head/kernel': 1, 'text/head/kernel': 1, 'temperature': 1, 'bias': 1,
    }  # fmt: skip
    for name, values in expected.items():
        np.testing.assert_allclose(np.squeeze(rates[name]), values, err_msg=name)


def test_rules_of_an_objective_come_first():
    params = {'encoder': {'fc': np.ones((3, 2, 2))}, 'head': {'kernel': np.ones((2, 2))}}
    with pytest.raises(UserError, match=r'no sharding rule for encoder/fc \[3, 2, 2\]'):
        optim.make(params, 9, decay=(), layer_decay=0.5)
    rules = Objective(None, None, None, rules=(
        ('head/kernel', parameters.P('tensor'), 'stem'), ('encoder/fc', parameters.P(), 'blocks'),
    )).rules  # fmt: skip
    for start, expected in ('head', ['0.125 ... 0.5', '0.0625']), ('block', ['0.25 ... 1', '0.25']):
        tx = optim.make(params, 9, rules, decay=(), layer_decay=0.5, layer_decay_from=start)
        assert [rate for _, _, _, rate, *_ in tx.table] == expected
    with pytest.raises(UserError, match='no encoder blocks'):
        optim.make(params, 9, (('encoder/fc', parameters.P()),), decay=(), layer_decay=0.5)
    two = params | {'decoder': {'fc': np.ones((2, 2))}}
    with pytest.raises(UserError, match=r'but the model has stacks of \[2, 3\] blocks'):
        optim.make(two, 9, (('fc', parameters.P(), 'blocks'),), decay=(), layer_decay=0.5)
