"""A method of seconds on images with captions: vectors of words, and of the mean colour.

The argument is a folder of images with captions, and one with a tokenizer, joined by a comma.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_jax.objectives import Objective

METRICS = {'loss': 'min'}
WORDS = 600  # above the size of the vocabulary


def match(model=None, examples=None):
    """Brings the mean vector of a caption's tokens to the mean colour of its image."""

    def init(key):
        return {'words': jax.random.normal(key, (WORDS, 3)) * 0.1}

    def loss(params, extra, frozen, batch, key, step):
        colours = batch['image'].astype(jnp.float32).mean((1, 2)) / 255
        errors = (params['words'][batch['text']].mean(1) - colours) ** 2
        value = jnp.sum(errors.mean(1) * batch['mask']) / jnp.maximum(jnp.sum(batch['mask']), 1)
        return value, ({'loss': value}, {})

    def predict(params, batch):
        return {'colour': params['words'][batch['text']].mean(1)}

    return Objective(init, loss, predict, rules=((r'words', jax.sharding.PartitionSpec()),))


def get_config(places):
    folder, _, tokenizer = places.partition(',')
    config = ConfigDict()
    config.seed, config.steps = 2, 12
    config.objective = dict(name=f'{__file__}:match')
    config.data = dict(
        task='image_text', source=dict(name=folder), image_size=4, view='resize', batch_size=8,
        tokenizer=tokenizer, length=6,
    )  # fmt: skip
    config.optim = dict(lr=1e-2, decay=())
    config.checkpoint = dict(every=4)
    config.report = dict(every=1)
    return config
