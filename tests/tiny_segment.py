"""A segmenter that trains for seconds, on the folder of images that is its argument."""

from functools import partial

import numpy as np
from ml_collections import ConfigDict

from vit_jax.data import images, tasks
from vit_jax.io.bounds import Size


def bright(source, *, image_size: Size):
    """Images with label maps: which pixels are bright, and a row of ignored ones."""
    size = tasks.size_of(image_size)
    blank = {'image': np.zeros((*size, 3), np.uint8), 'label_map': np.full(size, 255, np.uint8)}
    view = tasks.make_view('resize', image_size)
    return tasks.Task(blank, partial(read, view=view), {'classes': ('dark', 'bright')})


def read(record, rng, *, view):
    image = view(images.read(record['image']), rng)
    label_map = (image.mean(-1) > image.mean()).astype(np.uint8)
    label_map[0] = 255
    return {'image': image, 'label_map': label_map}


def get_config(folder):
    config = ConfigDict()
    config.seed, config.steps = 2, 4
    config.model = dict(name='vit-ti/4', width=16, depth=2, num_heads=2, mlp_dim=32)
    config.objective = dict(name='segment')
    config.data = dict(
        task=f'{__file__}:bright', source=dict(name=folder), image_size=[16, 8], batch_size=8,
    )
    config.optim = dict(lr=1e-3)
    config.checkpoint = dict(every=4)
    config.report = dict(every=1)
    return config
