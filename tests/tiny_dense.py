"""Segmentation, detection and panoptic segmentation by colour, on a folder that `write` makes.

Nothing is learnt: what is found depends on the image alone, and each evaluation finds only a part.
"""

import json

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vit_jax.objectives import Objective

CLASSES = ('red', 'green', 'blue')
SHAPES = [(40, 60), (61, 37), (20, 75), (33, 48), (64, 80), (9, 70), (30, 30)]
SIZE, CELL = (32, 48), 4
METRICS = {'loss': 'min'}


def write(root):
    """Images of coloured rectangles, with masks, COCO's json and COCO's panoptic json."""
    import scenes  # a run that reads the config has no path to it

    rng, images, objects, segments = np.random.default_rng(0), [], [], []
    kinds = [dict(id=k + 1, name=name, isthing=int(k > 0)) for k, name in enumerate(CLASSES)]
    for i, shape in enumerate(SHAPES):
        ids, boxes = np.zeros(shape, np.uint8), []
        for k in range(3):  # each in its third of the width
            top, left = (int(rng.integers(n // 4 + 1)) for n in (shape[0], shape[1] // 3))
            left += k * shape[1] // 3
            bottom, right = shape[0] - int(rng.integers(shape[0] // 4 + 1)), (k + 1) * shape[1] // 3
            ids[top:bottom, left:right] = k + 1
            boxes.append((left, top, right, bottom))
        picture = 40 + 160 * np.eye(4, 3, -1, np.uint8)[ids] + rng.integers(0, 40, (*shape, 3))
        files = {
            f'maps/images/{i}.png': np.uint8(picture), f'coco/val2017/{i}.png': np.uint8(picture),
            f'maps/masks/{i}.png': ids,
            f'coco/annotations/panoptic_val2017/{i}.png': np.stack([ids, 0 * ids, 0 * ids], -1),
        }  # fmt: skip
        for name, pixels in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(scenes.png(pixels))
        images.append(dict(id=i, file_name=f'{i}.png', height=shape[0], width=shape[1]))
        objects += [
            dict(id=3 * i + k + 1, image_id=i, category_id=k + 1, iscrowd=0,
                 area=(x1 - x0) * (y1 - y0), bbox=[x0, y0, x1 - x0, y1 - y0],
                 segmentation=scenes.rectangle((x0, y0, x1, y1)))
            for k, (x0, y0, x1, y1) in enumerate(boxes)
        ]  # fmt: skip
        own = [dict(id=int(k), category_id=int(k), iscrowd=0) for k in (1, 2, 3)]
        segments.append(dict(image_id=i, file_name=f'{i}.png', segments_info=own))
    for name, found in ('instances', objects), ('panoptic', segments):
        content = json.dumps(dict(images=images, categories=kinds, annotations=found))
        (root / f'coco/annotations/{name}_val2017.json').write_text(content)
    (root / 'maps/classes.txt').write_text('\n'.join(CLASSES))
    return root


def by_colour(model, examples):
    """A query for each class, whose mask is where the colour is near."""

    def loss(params, extra, frozen, batch, key, step):
        value = 0 * jnp.sum(params['centres'])
        return value, ({'loss': value}, {})

    def predict(params, batch):
        x = batch['image'].astype(jnp.float32) / 255
        b, h, w, _ = x.shape
        x = x.reshape(b, h // CELL, CELL, w // CELL, CELL, 3).mean((2, 4))
        away = jnp.abs(x[:, None] - params['centres'][:, None, None]).sum(-1)  # [B, K, h, w]
        masks = 12 * (0.6 - away)
        sure = 6 * jnp.eye(3, 4) + masks.mean((2, 3))[..., None] * jnp.array([1, 1, 1, 0])
        return {'masks': masks, 'logits': sure}

    centres = 0.24 + 0.6 * jnp.eye(3)
    return Objective(
        lambda key: {'centres': centres}, loss, predict, rules=(('centres', P(None, None)),)
    )


def get_config(folder):
    same = dict(image_size=list(SIZE), batch_size=4, by_class=True, canvas=[64, 80], every=0)
    maps = dict(name=f'{folder}/maps')
    coco = dict(name=f'{folder}/coco', split='val')
    return ConfigDict(dict(
        seed=0, steps=1, model=dict(name='vit-ti/4', width=16, depth=1, num_heads=2, mlp_dim=16),
        objective=dict(name=f'{__file__}:by_colour'),
        data=dict(task='segment', source=maps, view='fit', image_size=list(SIZE), batch_size=4,
                  zero='ignored', threads=1),
        optim=dict(name='sgd', lr=0.1, decay=('centres',)), checkpoint=dict(every=1),
        report=dict(every=1),
        evals=dict(
            maps=dict(type='segment', source=maps, zero='ignored', **same),
            objects=dict(type='detect', source=coco, masks=True, **same),
            panoptic=dict(
                type='panoptic', source=coco | dict(split='panoptic_val'), overlap=0.5, **same
            ),
        ),
    ))  # fmt: skip
