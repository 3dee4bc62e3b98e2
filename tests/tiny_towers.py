"""Two small towers on the images with captions of test_words_runs.write, a folder."""

import jax
import numpy as np
from ml_collections import ConfigDict

import vit_jax
from vit_jax import models
from vit_jax.models import two_towers

SMALL = dict(width=16, depth=1, num_heads=2, mlp_dim=16)


def get_config(folder):
    config = ConfigDict()
    config.seed, config.steps = 3, 24
    config.model = dict(name='vit/4', num_classes=8, **SMALL)
    config.objective = dict(
        name='contrastive', text=dict(causal=True, pool='eos', **SMALL), micro_batches=2
    )
    source = dict(name=f'{folder}/data')
    config.data = dict(
        task='image_text', source=source | {'label': None}, image_size=8, view='resize',
        batch_size=16, tokenizer=f'{folder}/tokens',
    )  # fmt: skip
    config.optim = dict(lr=1e-3)
    config.evals = dict(
        zero=dict(type='zero_shot', source=source, templates=('a photo of the {}', '{} bag')),
        found=dict(type='retrieval', source=source | {'label': None}, captions=2, k=(1, 3)),
    )
    config.checkpoint = dict(every=4)
    config.report = dict(every=4)
    return config


def save(path, vocab_size):
    """Writes a file of big_vision with two towers, whose parameters are ones."""
    image = models.build('vit/4', num_classes=8, pool='gap', **SMALL)
    model = two_towers.build_towers(image, dict(vocab_size=vocab_size, length=12, **SMALL))
    blank = np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 12), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *blank)['params']
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    vit_jax.save(path, model, params, format='big_vision', image_size=8)
