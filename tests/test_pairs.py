"""Losses of all pairs: values, gradients and memory against the plain loss in float64."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from vit_jax import sharding
from vit_jax.objectives import pairs


def made(count, width, seed=0, masked=3):
    rng = np.random.default_rng(seed)
    image, text = rng.standard_normal((2, count, width))
    text += image
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    mask = np.ones(count)
    mask[rng.permutation(count)[:masked]] = 0
    arrays = image, text, np.array(7.3), np.array(-2.1), mask
    return pairs.Pairs(*(x.astype(np.float32) for x in arrays))


def plain(p, kind):
    """The loss over all valid pairs at once."""
    logits = p.image @ p.text.T * p.scale + p.bias
    true = np.eye(len(logits))
    if kind == 'sigmoid':
        each = jnp.log1p(jnp.exp(-(2 * true - 1) * logits))
        return jnp.sum(each) / len(logits)
    rows, columns = jax.nn.log_softmax(logits, axis=1), jax.nn.log_softmax(logits, axis=0)
    return -jnp.sum(true * (rows + columns)) / 2 / len(logits)


def exact(p, kind):
    """(loss, accuracy, image, text, scale and bias gradients) in float64 of the rows that count."""
    with jax.enable_x64(True):
        kept = np.flatnonzero(p.mask)
        small = pairs.Pairs(*(jnp.asarray(np.asarray(x, np.float64)) for x in p))
        small = small._replace(image=small.image[kept], text=small.text[kept])
        value, found = jax.value_and_grad(plain)(small, kind)
        logits = np.asarray(small.image @ small.text.T)
        accuracy = np.mean(np.argmax(logits, axis=1) == np.arange(len(logits)))
        image, text = np.zeros((2, *p.image.shape))
        image[kept], text[kept] = found.image, found.text
        return float(value), accuracy, image, text, float(found.scale), float(found.bias)


MESHES = [dict(data=1), dict(data=2), dict(data=4), dict(data=8), dict(data=2, fsdp=4),
          dict(data=1, fsdp=2, tensor=4)]  # fmt: skip


@pytest.mark.parametrize('kind', pairs.KINDS)
@pytest.mark.parametrize('axes', [None, *MESHES], ids=str)
def test_chunked_losses_equal_the_plain_loss(kind, axes):
    p = made(32, 12)

    def evaluate(p):
        grad = jax.value_and_grad(partial(pairs.loss, kind=kind), has_aux=True)
        (value, accuracy), found = grad(p)
        return value, accuracy, found

    if axes is None:
        value, accuracy, found = jax.jit(evaluate)(p)
    else:
        mesh = sharding.make_mesh(jax.devices()[: int(np.prod(list(axes.values())))], **axes)
        batch, rest = (NamedSharding(mesh, s) for s in (sharding.BATCH, sharding.P()))
        p = pairs.Pairs(*map(jax.device_put, p, (batch, batch, rest, rest, batch)))
        value, accuracy, found = jax.jit(sharding.with_mesh(mesh, evaluate))(p)
    wanted = exact(p, kind)
    assert np.isclose(value, wanted[0], rtol=1e-6)
    assert np.isclose(accuracy, wanted[1])
    for got, want in zip(found, wanted[2:], strict=False):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert not np.any(found.mask)


@pytest.mark.parametrize('kind', pairs.KINDS)
def test_no_pair_counts_and_extreme_scales_stay_finite(kind):
    p = made(8, 4)
    grad = jax.value_and_grad(partial(pairs.loss, kind=kind), has_aux=True)
    (value, accuracy), found = grad(p._replace(mask=np.zeros(8, np.float32)))
    assert value == accuracy == 0 and not any(np.any(x) for x in found)
    for scale, bias in itertools.product((0.0, 1e4), (-1e4, 1e4)):
        found = grad(p._replace(scale=np.float32(scale), bias=np.float32(bias)))
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))


@pytest.mark.parametrize('kind', pairs.KINDS)
def test_no_device_has_more_than_its_share_of_the_logits(kind):
    mesh = sharding.make_mesh(jax.devices()[:8], data=4, fsdp=2)
    batch, rest = (NamedSharding(mesh, s) for s in (sharding.BATCH, sharding.P()))
    count = 4096
    shapes = [((count, 8), batch), ((count, 8), batch), ((), rest), ((), rest), ((count,), batch)]
    p = pairs.Pairs(*(jax.ShapeDtypeStruct(s, jnp.float32, sharding=x) for s, x in shapes))
    grad = jax.value_and_grad(partial(pairs.loss, kind=kind), has_aux=True)
    compiled = jax.jit(sharding.with_mesh(mesh, grad)).lower(p).compile()
    share = (count // 8) ** 2 * 4  # bytes of [b, b]
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 8 * share  # of 8 devices
