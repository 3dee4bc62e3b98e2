"""A training method that lives outside of the package: a denoising autoencoder.

It sees images and the bytes of their names, has a network of its own, a moving average of itself as
a teacher and a running mean of its codes, and a frozen network that says what counts in an image.
Below are its objective, task and evaluation, and the config of a run of seconds.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vit_jax import evaluators, sharding
from vit_jax.data import images, mixture, pipeline, tasks
from vit_jax.io.bounds import NonNegative, Positive, Rate, Size
from vit_jax.models.memory import shard_batch
from vit_jax.objectives import Objective

METRICS = {'loss': 'min', 'error': 'min', 'agreement': 'min'}
RULES = (
    (r'(encode|decode)/kernel', P('fsdp', 'tensor')),
    (r'look/kernel', P('fsdp', None)),
    (r'(encode|decode)/bias', P('tensor')),
    (r'letters', P(None, 'fsdp')),
    (r'codes', P('fsdp')),
)
FEATURES = 8  # of the frozen network


def image_and_name(source, *, image_size: Size, view: str | dict = 'resize',
                   length: Positive[int] = 8):  # fmt: skip
    """`image` uint8 [H, W, 3], and `name` uint8 [length], the bytes of its class."""
    blank = {
        'image': np.zeros((*tasks.size_of(image_size), 3), np.uint8),
        'name': np.zeros(length, np.uint8),
    }
    names = np.zeros((len(source.classes), length), np.uint8)
    for row, name in zip(names, source.classes, strict=True):
        spelled = name.encode()[:length]
        row[: len(spelled)] = np.frombuffer(spelled, np.uint8)
    return tasks.Task(blank, partial(read, view=tasks.make_view(view, image_size), names=names))


def read(record, rng, *, view, names):
    return {
        'image': view(images.read(record['image']), rng), 'name': names[int(record['label'])]
    }  # fmt: skip


def mean(values, mask):
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)


def denoise(
    model=None,
    examples=None,
    *,
    width: Positive[int] = 16,
    noise: NonNegative[float] = 0.2,
    decay: Rate = 0.9,
    whole: bool = False,
):
    """Restores noisy images from what is left of them and from their names."""
    pixels = int(np.prod(examples.spec['image'].shape))

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            'encode': {'kernel': jax.random.normal(keys[0], (pixels, width)) / pixels**0.5,
                       'bias': jnp.zeros(width)},
            'decode': {'kernel': jax.random.normal(keys[1], (width, pixels)) / width**0.5,
                       'bias': jnp.zeros(pixels)},
            'letters': jax.random.normal(keys[2], (256, width)) * 0.1,
        }  # fmt: skip

    def restored(params, flat, name):
        code = jnp.tanh(flat @ params['encode']['kernel'] + params['encode']['bias'])
        code = shard_batch(code + params['letters'][name.astype(int)].mean(axis=1))  # [B, D]
        return code @ params['decode']['kernel'] + params['decode']['bias'], code

    def flat(batch):
        return shard_batch(batch['image'].reshape(len(batch['image']), -1) / 255 - 0.5)

    def loss(params, extra, frozen, batch, key, step):
        clean, mask = flat(batch), batch['mask'].astype(jnp.float32)
        noisy = shard_batch(clean + noise * jax.random.normal(key, clean.shape))
        made, code = restored(params, noisy, batch['name'])
        target, _ = restored(extra['teacher'], clean, batch['name'])
        look = frozen['look']['kernel']
        gone = made - clean
        error = mean(jnp.mean(gone**2, axis=1) + jnp.mean((gone @ look) ** 2, axis=1), mask)
        agreement = mean(jnp.mean((made - jax.lax.stop_gradient(target)) ** 2, 1), mask)
        spread = mean(jnp.mean((code - extra['codes']) ** 2, 1), mask)
        value = error + 0.1 * agreement + 0.01 * spread
        codes = jnp.sum(code * mask[:, None], 0) / jnp.maximum(jnp.sum(mask), 1)
        return value, ({'loss': value, 'error': error, 'agreement': agreement}, {'codes': codes})

    def predict(params, batch):
        made, _ = restored(params, flat(batch), batch['name'])
        return {'restored': made.reshape(batch['image'].shape) + 0.5}

    def extra(params):
        return {'teacher': jax.tree.map(jnp.array, params), 'codes': jnp.zeros(width)}

    def update(extra, params, aux, step):
        teacher = jax.tree.map(
            lambda old, new: decay * old + (1 - decay) * new, extra['teacher'], params
        )
        return {'teacher': teacher, 'codes': 0.9 * extra['codes'] + 0.1 * aux['codes']}

    look = np.random.default_rng(7).normal(size=(pixels, FEATURES)) / pixels**0.5
    return Objective(
        init, loss, predict, extra, update, {'look': {'kernel': look.astype(np.float32)}}, RULES,
        'its codes are of the whole batch' if whole else '',
    )  # fmt: skip


class restoration:
    """`error`: the mean squared error of clean images that are restored."""

    def __init__(self, subject, *, source: dict, image_size: Size, batch_size: Positive[int]):
        self.mesh, own = subject.mesh, mixture.load(**source)
        self.sources, task = {'source': own}, image_and_name(own, image_size=image_size)
        self.feed = partial(pipeline.examples, own, task, sharding.rows(batch_size, self.mesh),
                            batch_size=batch_size)  # fmt: skip

        def sums(params, batch):
            made = subject.predict(params, batch)['restored']
            errors = jnp.mean((made - batch['image'] / 255) ** 2, axis=(1, 2, 3))
            mask = batch['mask'].astype(jnp.float32)
            return {'error': jnp.sum(errors * mask), 'examples': jnp.sum(mask)}

        self.step = evaluators.compiled(sums, self.mesh)

    def __call__(
        self, params, stop=None, set_phase=lambda phase: None, advance=lambda images: None
    ):
        total = evaluators.totals(self.step, self.feed, params, self.mesh, stop, set_phase, advance)
        return total and {
            'error': float(total['error'] / total['examples']), 'examples': int(total['examples'])
        }  # fmt: skip


def get_config(folder):
    config = ConfigDict()
    config.seed, config.steps = 3, 40
    config.objective = dict(name=f'{__file__}:denoise')
    config.data = dict(
        task=f'{__file__}:image_and_name', source=dict(name=folder), image_size=8, batch_size=8,
        view=dict(name='shift', pixels=1),
    )
    config.evals = dict(val=dict(
        type=f'{__file__}:restoration', source=dict(name=folder, split='val'), every=10,
    ))  # fmt: skip
    config.optim = dict(lr=1e-2, warmup=5, weight_decay=0.0, clip=1.0, ema=0.9)
    config.checkpoint = dict(every=4, best='val/error', keep=2)
    config.report = dict(every=1)
    config.expected = [
        dict(metric='val/error', value=0.03, tolerance=0.03, source='this test'),
    ]
    return config
