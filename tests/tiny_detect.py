"""A detector that trains for seconds, on the folder of images that is its argument."""

from functools import partial

import numpy as np
from ml_collections import ConfigDict

from vit_jax.data import images, tasks
from vit_jax.io.bounds import Positive, Size


def squares(source, *, image_size: Size, most: Positive[int] = 3):
    """Images with white squares drawn into them: `boxes` [M, 4] and `labels` [M] by their size."""
    blank = {
        'image': np.zeros((*tasks.size_of(image_size), 3), np.uint8),
        'boxes': np.zeros((most, 4), np.float32), 'labels': np.full(most, -1, np.int32),
    }  # fmt: skip
    view = tasks.make_view('resize', image_size)
    return tasks.Task(blank, partial(read, view=view, most=most), {'classes': ('small', 'large')})


def read(record, rng, *, view, most):
    image = view(images.read(record['image']), rng) // 2
    h, w, _ = image.shape
    boxes, labels = np.zeros((most, 4), np.float32), np.full(most, -1, np.int32)
    for i in range(rng.integers(most + 1)):
        side = int(rng.integers(2, min(h, w)))
        y, x = (int(rng.integers(n - side)) for n in (h, w))
        image[y : y + side, x : x + side] = 255
        boxes[i] = x / w, y / h, (x + side) / w, (y + side) / h
        labels[i] = side > min(h, w) // 2
    return {'image': image, 'boxes': boxes, 'labels': labels}


def get_config(folder):
    config = ConfigDict()
    config.seed, config.steps = 2, 4
    config.model = dict(
        name='vit-ti/4', width=16, depth=2, num_heads=2, mlp_dim=32, gelu='exact',
        interpolation='bicubic', posemb_at='layers',
    )  # fmt: skip
    config.objective = dict(name='detect', queries=5)
    config.data = dict(
        task=f'{__file__}:squares', source=dict(name=folder), image_size=[16, 8], batch_size=8,
    )
    config.optim = dict(lr=1e-3)
    config.checkpoint = dict(every=4)
    config.report = dict(every=1)
    return config
