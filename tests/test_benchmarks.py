"""What benchmarks compare: the same model, whoever computes it."""

import jax
import numpy as np
import pytest

from benchmarks import peers
from vit_jax import models


def by_plain(params):
    """Parameters of a model of this package under the names of peers.PlainVit."""

    def block(p):
        qkv, names = p['attn']['qkv'], ('query', 'key', 'value')
        projections = {n: {k: qkv[k][..., i, :, :] for k in qkv} for i, n in enumerate(names)}
        return {
            'LayerNorm_0': p['norm1'], 'LayerNorm_1': p['norm2'],
            'MultiHeadDotProductAttention_0': projections | {'out': p['attn']['out']},
            'Dense_0': p['mlp']['fc1'], 'Dense_1': p['mlp']['fc2'],
        }  # fmt: skip

    depth = len(params['encoder']['norm1']['scale'])
    blocks = {
        f'Block_{i}': block(jax.tree.map(lambda x: x[i], params['encoder']))  # noqa: B023
        for i in range(depth)
    }
    same = {name: params[name] for name in ('embedding', 'cls', 'posemb', 'head')}
    return same | blocks | {'LayerNorm_0': params['norm']}


def test_the_plain_encoder_computes_what_ours_does():
    ours = models.build(
        'vit-ti/16', width=24, depth=2, num_heads=3, mlp_dim=40, patch_size=4, num_classes=5
    )
    plain, rng = peers.PlainVit(ours), np.random.default_rng(0)
    images = rng.normal(size=(2, 8, 12, 3)).astype(np.float32)
    params = jax.jit(ours.init)(jax.random.key(0), images)['params']
    params = jax.tree.map(lambda x: x + np.float32(0.2 * rng.normal(size=x.shape)), params)
    found, wanted = (
        jax.jit(model.apply)({'params': p}, images)[0]
        for model, p in ((plain, by_plain(params)), (ours, params))
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    shapes = jax.eval_shape(plain.init, jax.random.key(0), images)['params']
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(np.shape, by_plain(params))


@pytest.mark.slow
@pytest.mark.parametrize('train', [True, False])
def test_contenders_run_and_count_alike(train):
    arguments = ('vit-ti/16', 16, 2, 5, train, 'float32', {})
    (ours, flops), (plain, others) = peers.ours(*arguments), peers.flax_mha(*arguments)
    assert flops == others > 0
    ours(1), plain(1)
