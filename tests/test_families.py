"""Files of every family are fine-tuned: a new head, all other weights from the file."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from learners import classifier, loss_of
from recorded import DATA, FIXTURES, location

import vit_jax
from vit_jax import optim
from vit_jax.models import parameters

CLASSES = 3
# Adding a number to all logits of a softmax changes nothing: biases of keys, where nothing but the
# product with the query reads them, and of numbers by offset, where all tokens are patches.
INVARIANT = r'map_head/key/bias|(encoder/attn/)?bias_fc2/bias'
DECAY = 0.5


def of_file(name):
    """(model, parameters, images [B, H, W, C] as uint8) of a recorded file with a new head."""
    shape = np.load(DATA / f'{name}.expected.npz')['images'].shape[1:]
    model, params = vit_jax.load(location(name), num_classes=CLASSES)
    rng = np.random.default_rng(0)
    return model, params, rng.integers(0, 256, (8, *shape), np.uint8)


def without_gradient(name, value, model, dead):
    """Whether a gradient of zeros in the layers `dead` is right; `value` is that of all [L, ...].

    Biases of an MLP by offset are among patches, which a class token does not read in the last.
    """
    style = getattr(model, 'style', None)
    if re.fullmatch(INVARIANT, name):
        return True
    if name.startswith('encoder/attn/bias_fc') and model.pool == 'cls':
        return dead == [model.depth - 1]
    if name != 'encoder/attn/qkv/bias' or style is None:
        return False
    rest = np.delete(value, 1, axis=1)  # keys: see INVARIANT
    masked = [i for i, part in enumerate(('query', 'value')) if part in style.unbiased]
    return bool(np.delete(rest, masked, axis=1).any())


@pytest.mark.slow
@pytest.mark.parametrize('name', FIXTURES)
def test_a_family_is_fine_tuned(name):
    model, params, images = of_file(name)
    assert not np.any(params['head']['kernel']) and params['head']['bias'].shape == (CLASSES,)
    objective = classifier(model, images.shape[1:])
    batch = dict(
        image=images, label=np.arange(8, dtype=np.int32) % CLASSES, mask=np.ones(8, np.float32)
    )
    for key, leaf in parameters.named_leaves(params).items():
        spec = parameters.find_rule(key, leaf.shape).spec  # raises without a rule for an array
        assert 'fsdp' in spec or leaf.size < 1e4 or not key.endswith('kernel'), key

    of_loss = jax.jit(jax.value_and_grad(loss_of(objective), has_aux=True))
    losses = []
    for n in range(3):
        (loss, _), grads = of_loss(params, batch, jax.random.key(n))
        losses.append(float(loss))
        params = jax.tree.map(lambda x, g: x - 1e-3 * g, params, grads)
    np.testing.assert_allclose(losses[0], np.log(CLASSES), rtol=1e-5)  # a head of zeros
    assert np.isfinite(losses).all() and losses[2] < losses[0]

    flat = flatten_dict(params, sep='/')
    for part in [n for n in flat if n.split('/')[0] in ('head', 'dist_head')]:
        flat[part] = jax.random.normal(jax.random.key(len(part)), flat[part].shape)
    _, grads = of_loss(unflatten_dict(flat, sep='/'), batch, jax.random.key(0))
    for key, value in flatten_dict(grads, sep='/').items():
        value = np.asarray(value)
        assert np.isfinite(value).all(), key
        layers = value if key.startswith('encoder/') else value[None]
        dead = [i for i, layer in enumerate(layers) if not np.any(np.abs(layer) > 1e-9)]
        assert not dead or without_gradient(key, value, model, dead), (key, dead)


@pytest.mark.parametrize('name', FIXTURES)
def test_layer_wise_rates_know_the_depth_of_each_parameter(name):
    model, params, _ = of_file(name)
    leaves = parameters.named_leaves(params)
    if not any(key.startswith('encoder/') for key in leaves):
        pytest.skip('this model has no encoder blocks')
    rates = optim.rate_multipliers(leaves, (), DECAY)
    stem = r'embedding|cls|dist|registers|posemb.*|patch_norm|pre_norm|resnet|bias_.*'
    for key, leaf in leaves.items():
        first = key.split('/')[0]
        rate = jnp.broadcast_to(jnp.asarray(rates[key]), leaf.shape)
        if first == 'encoder':
            wanted = DECAY ** np.arange(model.depth, 0, -1)
            assert leaf.shape[0] == model.depth, key
            np.testing.assert_allclose(rate.reshape(model.depth, -1)[:, 0], wanted, err_msg=key)
        else:
            wanted = DECAY ** (model.depth + 1) if re.fullmatch(stem, first) else 1
            np.testing.assert_allclose(rate, wanted, err_msg=key)
