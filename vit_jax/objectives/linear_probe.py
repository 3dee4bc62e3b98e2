"""A linear classifier on frozen features, normalised over the batch (arXiv:2111.06377 A.1).

A batch is {image: uint8 [B, H, W, C], label: int [B], int [B, L] padded with -1 or float [B, K],
mask: [B]}. Shapes: D features, K classes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.io.bounds import Positive, Rate
from vit_jax.models.parameters import named_leaves
from vit_jax.objectives import Examples, Objective, losses, masked_mean
from vit_jax.objectives.supervised import check_model

METRICS = {'loss': 'min', 'accuracy': 'max'}


def linear_probe(
    model: nn.Module,
    examples: Examples,
    *,
    decay: Rate = 0.9,
    epsilon: Positive[float] = 1e-6,
) -> Objective:
    """Trains the head of a classifier alone, on features with mean 0 and variance 1 over the batch.

    Mean and variance have no learnt scale and are those of the global batch. Evaluations, and what
    loads the run, have their moving averages, multiplied into the head, so they read a model as any
    other. `optim.only` is to be ('^head/',), as all else is frozen; dropout is off.

    Args:
      model: classifier, as `models.build` makes it.
      examples: the training examples, with `image` [H, W, C] in the spec.
      decay: decay of the moving averages of mean and variance.
      epsilon: term added to the variance.
    """
    check_model(model, examples)
    shape = examples.spec['image'].shape

    def init(key):
        return model.init(key, jnp.zeros((1, *shape)))['params']

    def loss(params, extra, frozen, batch, key, step):
        mask = batch['mask'].astype(jnp.float32)
        features = model.apply({'params': params}, model.normalise(batch['image']))[1]['pre_logits']
        features = jax.lax.stop_gradient(features).astype(jnp.float32)  # [B, D]
        mean, variance = moments(features, mask)
        normed = (features - mean) / jnp.sqrt(variance + epsilon)
        logits = normed @ params['head']['kernel'] + params['head']['bias']
        hits = losses.hits(logits, batch['label'])
        value = masked_mean(losses.softmax_xent(logits, batch['label']), mask)
        count = jnp.maximum(jnp.sum(mask), 2)
        aux = {'mean': mean, 'variance': variance * count / (count - 1)}
        return value, ({'loss': value, 'accuracy': masked_mean(hits, mask)}, aux)

    def extra(params):
        check_head(params)
        width = params['head']['kernel'].shape[0]
        kept = {'mean': jnp.zeros(width), 'variance': jnp.ones(width)}
        return kept | {'average': folded(params, **kept, epsilon=epsilon)}

    def update(extra, params, aux, step):
        kept = {n: decay * extra[n] + (1 - decay) * aux[n] for n in ('mean', 'variance')}
        return kept | {'average': folded(params, **kept, epsilon=epsilon)}

    def predict(params, batch):
        return model.apply({'params': params}, model.normalise(batch['image']))[1]

    rules = ((r'mean|variance', jax.sharding.PartitionSpec()),)
    return Objective(
        init, loss, predict, extra, update, rules=rules, flops=model.flops(shape),
        indivisible='features are normalised over the whole batch', settings={'loss': 'softmax'},
    )  # fmt: skip


def check_head(params: Any) -> None:
    """Raises UserError for a model whose output is more than a linear layer."""
    layers = {name.split('/')[0] for name in named_leaves(params)}
    if 'head' not in layers or 'dist_head' in layers:
        raise UserError('objective linear_probe trains the head of a model with a single one')


def moments(features: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance, [D] each, of the rows of features [B, D] with mask 1."""
    count = jnp.maximum(jnp.sum(mask), 1)
    mean = jnp.sum(features * mask[:, None], axis=0) / count
    return mean, jnp.sum((features - mean) ** 2 * mask[:, None], axis=0) / count


def folded(params: Any, *, mean: jax.Array, variance: jax.Array, epsilon: float) -> Any:
    """Parameters whose head takes features [D] as they are, of a head for normalised ones."""
    kernel = params['head']['kernel'] / jnp.sqrt(variance + epsilon)[:, None]  # [D, K]
    return params | {'head': {'kernel': kernel, 'bias': params['head']['bias'] - mean @ kernel}}
