"""Small models, batches and objectives for tests of steps and evaluators."""

import functools

import jax
import numpy as np
import optax
from flax import linen as nn

from vit_jax import evaluators, models, sharding
from vit_jax.objectives import Examples, supervised

IMAGE = (8, 8, 3)
MODEL = models.build(
    'vit-ti/16', num_classes=4, width=16, depth=2, num_heads=2, mlp_dim=32, patch_size=4
)


def batch(size=16, seed=0):
    """Random images and labels for MODEL; a fifth of the examples is masked out."""
    rng = np.random.default_rng(seed)
    return {
        'image': rng.integers(0, 256, (size, *IMAGE), dtype=np.uint8),
        'label': rng.integers(0, 4, size),
        'mask': (rng.random(size) < 0.8).astype(np.float32),
    }


class Table(nn.Module):
    """Logits that the first pixel of an image chooses from a table, so that all is known."""

    num_classes: int = 7

    def normalise(self, images):
        return images

    @nn.compact
    def __call__(self, images, train=False):
        table = self.param('table', nn.initializers.normal(3.0), (256, self.num_classes))
        logits = table[images[:, 0, 0, 0].astype(int)]
        return logits, {'logits': logits}


def classifier(model, shape, **settings):
    """Supervised classification of images [H, W, C]."""
    spec = {'image': jax.ShapeDtypeStruct(tuple(shape), np.uint8)}
    return supervised.supervised(model, Examples(spec), **settings)


def loss_of(objective):
    """(params, batch, key) -> (loss, metrics) of an objective that keeps nothing."""

    def loss(params, batch, key):
        value, (metrics, _) = objective.loss(params, {}, {}, batch, key, 0)
        return value, metrics

    return loss


def learnt_by_heart(objective, batch, lr, steps):
    """Losses of steps by Adam on one batch with one key; the objective counts each as a half."""
    params, tx = objective.init(jax.random.key(0)), optax.adam(lr)
    state, losses = tx.init(params), []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def advance(params, state, n):
        loss = lambda p: objective.loss(p, {}, {}, batch, jax.random.key(0), n / 2)[0]  # noqa: E731
        value, slopes = jax.value_and_grad(loss)(params)
        changes, state = tx.update(slopes, state)
        return optax.apply_updates(params, changes), state, value

    for n in range(steps):
        params, state, value = advance(params, state, n)
        losses.append(float(value))
    return losses


def subject(model, shape, classes=None, loss=None, mesh=None):
    """What evaluators take, of any model of images [H, W, C]."""

    def predict(params, batch):
        return model.apply({'params': params}, model.normalise(batch['image']))[1]

    def outputs(key):
        images = np.zeros((1, *shape), np.float32)
        return predict(model.init(key, model.normalise(images))['params'], {'image': images})

    shapes = {} if model is None else jax.eval_shape(outputs, jax.random.key(0))
    mesh = sharding.make_mesh() if mesh is None else mesh
    return evaluators.Subject(predict, mesh, shapes, {'classes': classes}, {'loss': loss})


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)
