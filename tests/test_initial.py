"""Initial values, and stochastic depth of MLP-Mixer, as in the code of the papers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import models
from vit_jax.models.parameters import named_leaves

WIDE = dict(width=256, depth=1, num_heads=4, mlp_dim=8, num_classes=3)
TABLES = [
    ('stem', 'learn', None, 256**-0.5), ('stem', 'relative', None, 64**-0.5),
    ('stem', 'learn', 0.02, 0.02), ('stem', 'learn2d', 0.02, 0.02), ('layers', 'learn', 0.02, 0.02),
    ('shared', 'learn', 0.02, 0.02), ('stem', 'relative', 0.02, 0.02),
]  # fmt: skip


def initial(pattern, name, size, **fields):
    """{name: array} of the parameters of a new model whose names match, for images of that size."""
    model = models.build(name, **fields)

    def matching(key):
        params = model.init(key, jnp.zeros((1, size, size, 3)))['params']
        return {n: x for n, x in named_leaves(params).items() if re.search(pattern, n)}

    return jax.jit(matching)(jax.random.key(0))  # compiles what matches, and no more


@pytest.mark.parametrize('at, kind, std, wanted', TABLES)
def test_deviation_of_positions(at, kind, std, wanted):
    """vision_transformer models_vit.py:192 and big_vision models/vit.py:47."""
    fields = dict(posemb=kind, posemb_at=at, posemb_std=std)
    found = initial('posemb|relative', 'vit/8', 64, **fields, **WIDE)
    assert len(found) == 1 + (kind == 'learn2d')
    for name, table in found.items():
        assert name.startswith('encoder/') == (at == 'layers' or kind == 'relative')
        assert abs(table.std() / wanted - 1) < 0.05, name
        assert np.abs(table.mean()) < 0.1 * wanted, name


def test_deviations_of_mixer():
    """LeCun normal, truncated at two deviations, and biases of zero: mlp_mixer.py:35."""
    found = initial('kernel|bias', 'mixer-s/32', 224, depth=1)
    inputs = {'channel_mixing/fc1': 512, 'channel_mixing/fc2': 2048, 'token_mixing/fc1': 49,
              'token_mixing/fc2': 256, 'embedding': 32 * 32 * 3}  # fmt: skip
    for name, count in inputs.items():
        name = name if name == 'embedding' else f'encoder/{name}'
        kernel = found[f'{name}/kernel']
        assert abs(kernel.std() * count**0.5 - 1) < 0.02, name
        assert 2 < np.abs(kernel).max() * count**0.5 < 2.3, name
        assert not found[f'{name}/bias'].any(), name
    assert not found['head/kernel'].any()


def test_the_head_of_each_kind_starts_at_its_bias():
    for name, fields in (('vit/8', dict(WIDE, dist_token=True, dist_head=True)),
                         ('mixer-s/8', dict(width=16, depth=1, num_classes=3)),
                         ('bit', dict(units=(1,), width=0.5, num_classes=3))):  # fmt: skip
        heads = initial('head/', name, 16, head_bias=-6.9, **fields)
        assert len(heads) == 2 + 2 * (name == 'vit/8')
        for leaf, x in heads.items():
            np.testing.assert_array_equal(x, np.float32(-6.9 if 'bias' in leaf else 0))


def test_stochastic_depth_of_mixer_scales_nothing():
    """An example that drops nothing has the output of evaluation: mlp_mixer.py:173."""
    model = models.build(
        'mixer-s/4', num_classes=3, width=24, depth=2, tokens_mlp_dim=16, mlp_dim=32, drop_path=0.5
    )
    images = jax.random.normal(jax.random.key(0), (64, 8, 8, 3))
    params = jax.jit(model.init)(jax.random.key(1), images)

    def tokens(**options):
        return np.asarray(model.apply(params, images, capture='tokens_by_block', **options)[1][
            'tokens_by_block'
        ])  # fmt: skip

    plain = tokens()
    found = tokens(train=True, rngs={'dropout': jax.random.key(2)})
    np.testing.assert_allclose(found[1], plain[1], atol=1e-6)  # the first block drops nothing
    whole, none = (np.abs(found[2] - x).max(axis=(1, 2)) < 1e-5 for x in (plain[2], plain[1]))
    assert not (whole & none).any()
    assert 5 < whole.sum() < 30 and 5 < none.sum() < 30  # a quarter of 64 each, two parts kept
