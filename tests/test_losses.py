"""Losses over many classes: what counts as a hit, and no float32 copy of the logits."""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import sharding
from vit_jax.distributed import topologies
from vit_jax.objectives import losses
from vit_jax.plan import hlo_text

CLASSES = 21_841  # of ImageNet-21k


@pytest.mark.parametrize('labels', [[3, 0, 5], [[3, -1], [1, 0], [-1, -1]], 'weights'])
def test_hits_are_of_any_true_label(labels):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 7)).astype(np.float32)
    weights = rng.integers(0, 2, (3, 7)).astype(np.float32)
    labels = weights if labels == 'weights' else np.array(labels)
    for _ in range(20):
        logits = rng.permuted(logits, axis=1)
        best = logits.argmax(axis=1)
        if labels.dtype == np.float32:
            wanted = [weights[i, k] > 0 for i, k in enumerate(best)]
        else:
            wanted = [k in np.ravel(row) for k, row in zip(best, labels, strict=True)]
        np.testing.assert_array_equal(losses.hits(jnp.asarray(logits), jnp.asarray(labels)), wanted)


def test_softmax_smoothing_adds_nothing_to_an_example_without_labels():
    logits = jnp.zeros((4, 7)).at[:, 2].set(jnp.array([0.0, 0.0, 3.0, 0.0]))
    loss = functools.partial(losses.softmax_xent, label_smoothing=0.3)
    sets = loss(logits, jnp.array([[1, 2], [-1, -1], [2, -1], [-1, -1]]))
    np.testing.assert_array_equal(sets[np.array([1, 3])], 0)
    weights = loss(logits, jnp.zeros((4, 7)).at[0, 1].set(1.0).at[0, 2].set(1.0).at[2, 2].set(1.0))
    np.testing.assert_allclose(weights[1:], sets[1:], rtol=1e-6)
    one = (0.7 * jax.nn.one_hot(2, 7) + 0.3 / 7)[None]  # label 2, smoothed
    np.testing.assert_allclose(sets[2], losses.softmax_xent(logits[2:3], one)[0], rtol=1e-6)


@pytest.mark.parametrize('s', [0.0, 1e-4, 0.3])
def test_sigmoid_smoothing_flips_each_target_with_a_probability(s):
    """In float64, by -log p of what is true: a share s of the examples has the opposite label."""
    rng = np.random.default_rng(0)
    logits = (10 * rng.standard_normal((4, 7))).astype(np.float32)
    labels = np.array([[1, 2], [-1, -1], [2, -1], [6, 6]])
    truth = np.array([[k in row for k in range(7)] for row in labels])
    x = np.where(truth, 1, -1) * logits.astype(np.float64)
    wanted = ((1 - s) * np.log1p(np.exp(-x)) + s * np.log1p(np.exp(x))).sum(1)
    loss = functools.partial(losses.sigmoid_xent, label_smoothing=s)
    np.testing.assert_allclose(loss(jnp.asarray(logits), jnp.asarray(labels)), wanted, rtol=1e-5)
    np.testing.assert_allclose(loss(jnp.asarray(logits), jnp.asarray(1.0 * truth)), wanted, 1e-5)
    np.testing.assert_allclose(loss(logits[2:3], jnp.array([2])), wanted[2:3], rtol=1e-5)
    mixed = jnp.asarray(0.7 * truth + 0.3 * truth[::-1])  # linear in the target, so in a mixture
    other = loss(jnp.asarray(logits), jnp.asarray(1.0 * truth[::-1]))
    np.testing.assert_allclose(loss(logits, mixed), 0.7 * wanted + 0.3 * other, rtol=1e-5)


@pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason='the TPU compiler is not installed: pip install "vit_jax[plan]"',
)
@pytest.mark.parametrize('name', list(losses.LOSSES))
def test_a_step_over_many_classes_makes_no_float32_copy_of_the_logits(name):
    """In the program for a TPU: of [B, K] there is what the head's product gives, bfloat16."""
    found, _ = topologies.get_devices('v4:2x2x1')
    mesh = sharding.make_mesh(found)
    batch, width = 128 * len(found), 256

    def objective(kernel, x, labels):
        logits = (x @ kernel.astype(x.dtype)).astype(jnp.bfloat16)
        by_example = losses.LOSSES[name](logits, labels, label_smoothing=0.1)
        return jnp.mean(by_example), jnp.mean(losses.hits(logits, labels))

    place = functools.partial(jax.sharding.NamedSharding, mesh)
    split, same = place(sharding.BATCH), place(jax.sharding.PartitionSpec())
    step = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    text = step.lower(
        jax.ShapeDtypeStruct((width, CLASSES), jnp.float32, sharding=same),
        jax.ShapeDtypeStruct((batch, width), jnp.bfloat16, sharding=split),
        jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=split),
    ).compile().as_text()  # fmt: skip
    computations, entry = hlo_text.parsed(text)
    arrays = [
        shape for i in computations[entry].values() if i.opcode != 'bitcast' for shape in i.shapes
    ]
    large = [s for s in arrays if math.prod(s.dims) >= 128 * CLASSES]
    logits = [s for s in large if sorted(s.dims)[-2:] == [128, CLASSES]]
    assert logits and {s.dtype for s in logits} == {'bf16'}
