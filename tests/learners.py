"""Objectives for tests of steps."""

import jax
import numpy as np

from vit_jax import evaluators, sharding
from vit_jax.objectives import Examples, supervised


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
