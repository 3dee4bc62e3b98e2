"""Random numbers of a step: the same bits on 1 to 8 devices, however these share the batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax import sharding
from vit_jax.models import layers
from vit_jax.objectives import corruption, mae, mixing

B, T, D, H = 8, 6, 16, 4
MESHES = [(2, {}), (4, dict(fsdp=2)), (4, dict(tensor=4)), (8, {}), (8, dict(fsdp=2, tensor=2))]
HEADS = PartitionSpec(('data', 'fsdp'), 'tensor')


def mixed(x, key, by):
    settings = dict(mixup=0.8, cutmix=1.0, by=by)
    return mixing.mix(x.reshape(B, T, 4, 4), jnp.eye(B), key, **settings)


DRAWS = {  # functions of x [B, T, D] and a key
    'dropout': lambda x, key: layers.kept(x, 0.4, key),
    'attention_dropout': lambda x, key: layers.kept(x.reshape(B, H, -1, T), 0.4, key),
    'drop_path': lambda x, key: layers.dropped(x, jnp.float32(0.5), key),
    'mixing of a batch': partial(mixed, by='batch'),
    'mixing of examples': partial(mixed, by='example'),
    'masked tokens': lambda x, key: corruption.draw(key, (B, 12), 0.5),
    'hidden patches': lambda x, key: mae.draw_noise(key, B, (4, 4)),
    'hidden blocks': lambda x, key: mae.draw_noise(key, B, (4, 4), 'block'),
}


def program(name, devices, mesh):
    """A function of x and a key whose results lie on the devices of a mesh, compiled."""
    mesh = sharding.make_mesh(jax.devices()[:devices], **mesh)
    spec = HEADS if name == 'attention_dropout' else sharding.BATCH
    function = jax.jit(
        sharding.with_mesh(mesh, DRAWS[name]), out_shardings=NamedSharding(mesh, spec),
        in_shardings=(NamedSharding(mesh, sharding.BATCH), NamedSharding(mesh, PartitionSpec())),
    )  # fmt: skip
    return function.lower(jnp.ones((B, T, D)), jax.random.key(1)).compile()


@pytest.mark.parametrize('name', DRAWS)
def test_draws_are_the_same_on_any_mesh(name):
    x, key = np.ones((B, T, D), np.float32), jax.random.key(1)
    one = jax.device_get(program(name, 1, {})(x, key))
    drawn = jax.tree.leaves(one)[-1].reshape(B, -1)
    assert len(np.unique(drawn, axis=0)) > 1  # examples have draws of their own
    for devices, mesh in MESHES:
        several = jax.device_get(program(name, devices, mesh)(x, key))
        for a, b in zip(*map(jax.tree.leaves, (one, several)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('name', ['dropout', 'drop_path', 'masked tokens', 'hidden patches'])
def test_each_device_draws_its_own_part_and_sends_nothing(name):
    text = program(name, 8, {}).as_text()
    assert 'all-' not in text and 'collective-' not in text
    assert f'u32[{B}' not in text  # the numbers of all examples
