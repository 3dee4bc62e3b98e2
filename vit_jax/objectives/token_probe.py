"""A classifier on frozen tokens of the last blocks: linear (DINO), or with attention pooling (AIM).

A batch is {image: uint8 [B, H, W, C], label: int [B] or int [B, L] padded with -1, mask: [B]}.
Shapes: N patches, n blocks that are read, D width, F features, H heads, K classes.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError
from vit_jax.io.bounds import Positive, Rate
from vit_jax.models import memory
from vit_jax.objectives import Examples, Objective, headless, losses, masked_mean
from vit_jax.objectives.linear_probe import moments

METRICS = {'loss': 'min', 'accuracy': 'max'}
RULES = (
    (r'probe/(key|value)/kernel', P('fsdp', 'tensor')),  # [D, D]
    (r'probe/query', P()),
    (r'probe/head/kernel', P('fsdp', None)),
    (r'probe/head/bias', P()),
    (r'statistics/(mean|variance)', P()),
)


class Head(nn.Module):
    """The classifier: features [B, F] or, with `heads`, tokens [B, N, D] -> logits [B, K].

    With `heads`, a learnt query attends to the tokens by keys and values without biases, and the
    output layer has none either (AttentionPoolingClassifier of apple/ml-aim).
    """

    classes: int
    heads: int | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.heads is None:
            init = nn.initializers.normal(0.01)  # facebookresearch/dino eval_linear.py
            return nn.Dense(self.classes, kernel_init=init, name='head')(x)
        width = x.shape[-1]
        split = self.heads, width // self.heads
        uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
        dense = dict(use_bias=False, kernel_init=uniform)
        query = self.param('query', nn.initializers.normal(0.02), (width,)).reshape(split)
        key, value = (
            memory.shard_batch(nn.Dense(width, **dense, name=name)(x), whole=False).reshape(
                *x.shape[:2], *split
            )
            for name in ('key', 'value')
        )
        logits = jnp.einsum('hc,bnhc->bhn', query / split[1] ** 0.5, key)
        pooled = jnp.einsum('bhn,bnhc->bhc', nn.softmax(logits), value).reshape(len(x), width)
        return nn.Dense(self.classes, **dense, name='head')(memory.shard_batch(pooled))


def token_probe(
    model: nn.Module,
    examples: Examples,
    *,
    pool: Literal['cls', 'cls_gap', 'attention'] = 'cls',
    blocks: Positive[int] = 1,
    norm: bool = True,
    batch_norm: bool = False,
    decay: Rate = 0.9,
    epsilon: Positive[float] = 1e-6,
) -> Objective:
    """Trains a classifier on the tokens of a frozen ViT, which is `vit` among the parameters.

    `optim.only` is to be ('^probe/',), as all else is frozen; dropout is off. Evaluations use the
    moving averages of the statistics of `batch_norm`.

    Args:
      model: a ViT. `model.num_classes` is the number of classes.
      examples: the training examples, with `image` [H, W, C] in the spec.
      pool: 'cls' concatenates the class tokens of the last blocks, 'cls_gap' adds the mean of the
        last block's patches (both arXiv:2104.14294, facebookresearch/dino eval_linear.py), and
        'attention' pools the mean of the blocks' patches by attention (arXiv:2401.08541).
      blocks: number n of last blocks that are read.
      norm: whether tokens pass the model's last norm.
      batch_norm: whether each channel has mean 0 and variance 1 over the global batch, and over
        the patches with 'attention'.
      decay: decay of the moving averages of mean and variance.
      epsilon: term added to the variance.
    """
    classes = model.num_classes
    model = headless(model, examples, 'token_probe')
    check(model, classes, examples, pool, blocks)
    shape = examples.spec['image'].shape
    rows, columns = model.grid(shape)
    attends = pool == 'attention'
    features = model.width * (1 if attends else blocks + (pool == 'cls_gap'))
    blank = jnp.zeros((1, rows * columns, features) if attends else (1, features))
    head = Head(classes, model.num_heads if attends else None)

    def init(key):
        keys = jax.random.split(key)
        params = {
            'vit': model.init(keys[0], jnp.zeros((1, *shape)))['params'],
            'probe': head.init(keys[1], blank)['params'],
        }
        if batch_norm:
            params['statistics'] = {'mean': jnp.zeros(features), 'variance': jnp.ones(features)}
        return params

    def read(params, batch):
        """Features of a batch, float32 [B, F] or [B, N, D]."""
        name = 'normed_by_block' if norm else 'tokens_by_block'
        images = model.normalise(batch['image'])
        _, out = model.apply({'params': params['vit']}, images, capture=name)
        tokens = jax.lax.stop_gradient(out[name][-blocks:]).astype(jnp.float32)  # [n, B, T, D]
        first = tokens.shape[2] - rows * columns
        if attends:
            return tokens[:, :, first:].mean(axis=0)
        parts = list(tokens[:, :, list(model.prefix).index('cls')])
        if pool == 'cls_gap':
            parts.append(tokens[-1, :, first:].mean(axis=1))
        return jnp.concatenate(parts, axis=-1)

    def normalised(x, statistics):
        return (x - statistics['mean']) / jnp.sqrt(statistics['variance'] + epsilon)

    def loss_fn(params, extra, frozen, batch, key, step):
        x, mask, aux = read(params, batch), batch['mask'].astype(jnp.float32), {}
        if batch_norm:
            per_example = x.size // len(x) // features
            weights = jnp.repeat(mask, per_example)
            mean, variance = moments(x.reshape(-1, features), weights)
            x = normalised(x, {'mean': mean, 'variance': variance})
            count = jnp.maximum(jnp.sum(weights), 2)
            aux = {'mean': mean, 'variance': variance * count / (count - 1)}
        logits = head.apply({'params': params['probe']}, x)
        value = masked_mean(losses.softmax_xent(logits, batch['label']), mask)
        accuracy = masked_mean(losses.hits(logits, batch['label']), mask)
        return value, ({'loss': value, 'accuracy': accuracy}, aux)

    def predict(params, batch):
        x = read(params, batch)
        if batch_norm:
            x = normalised(x, params['statistics'])
        return {'logits': head.apply({'params': params['probe']}, x)}

    def extra(params):
        return {'average': params} if batch_norm else {}

    def update(extra, params, aux, step):
        if not batch_norm:
            return extra
        old = extra['average']['statistics']
        kept = {name: decay * old[name] + (1 - decay) * aux[name] for name in aux}
        return {'average': params | {'statistics': kept}}

    flops = model.flops(shape) + head_flops(classes, features, rows * columns if attends else 0)
    return Objective(
        init, loss_fn, predict, extra, update, rules=RULES, flops=flops,
        indivisible='features are normalised over the whole batch' if batch_norm else '',
        settings={'loss': 'softmax'},
    )  # fmt: skip


def check(model: Any, classes: int | None, examples: Examples, pool: str, blocks: int) -> None:
    """Raises UserError for a model without the tokens, blocks or classes that are asked for."""
    known = len(examples.names.get('classes', ()))
    if (classes or 0) < max(known, 1):
        raise UserError(
            f'objective token_probe: the data set has {known} classes, model.num_classes is '
            f'{classes}'
        )
    if blocks > model.depth:
        raise UserError(f'objective.blocks is {blocks}; the model has {model.depth}')
    if pool != 'attention' and 'cls' not in model.prefix:
        raise UserError(
            f"objective.pool {pool!r} needs model.cls_token; without it there is 'attention'"
        )


def head_flops(classes: int, features: int, patches: int) -> int:
    """FLOPs of the classifier for one image; with `patches`, of one that attends to them."""
    return 2 * features * (classes + patches * (2 * features + 2))
