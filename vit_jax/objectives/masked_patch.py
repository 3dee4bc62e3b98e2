"""Masked patch prediction (arXiv:2010.11929 appendix B.1.2), BERT's objective for patches.

Shapes: B batch, N patches, P patch, C channels, D width, Q colours that are predicted per patch.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError
from vit_jax.io.bounds import Share
from vit_jax.models import embedding
from vit_jax.objectives import Examples, Objective, corruption, headless, masked_mean, targets

SIDE = 4  # of a patch that is made smaller
RULES = ((r'mask_token', P(), 'stem'),)


def metrics(*, target: str = 'mean', **settings: object) -> dict[str, str]:
    """Declares whether less or more of each metric is better."""
    return {'loss': 'min'} | ({} if target == 'pixels' else {'accuracy': 'max'})


def masked_patch(
    model: nn.Module,
    examples: Examples,
    *,
    corrupt: Share = 0.5,
    target: Literal['mean', 'small', 'pixels'] = 'mean',
) -> Objective:
    """Predicts the colours of corrupted patches from the others.

    Of the corrupted patches, 80% are replaced by a learnt embedding, 10% by the embedding of
    another patch of the image, and 10% are kept. The shares are those of each image, up to one
    patch, and exact on average.

    Args:
      model: a ViT, which is trained without a head.
      examples: the training examples, with `image` [H, W, C] in the spec.
      corrupt: share of the patches of an image that are corrupted.
      target: mean: the mean colour of a patch, one of 512, 3 bits a channel. small: the colours of
        the patch made smaller to 4 x 4. pixels: its pixels, normalised as the model's input, by the
        squared error.
    """
    model = headless(model, examples, 'masked_patch')
    shape = examples.spec['image'].shape
    check(model, shape, target)
    colours = 1 if target == 'mean' else SIDE**2
    outputs = model.patch_size[0] * model.patch_size[1] * shape[-1]
    if target != 'pixels':
        outputs = colours << targets.BITS * shape[-1]
    head = nn.Dense(outputs, kernel_init=nn.initializers.zeros)
    normal = nn.initializers.normal(0.02)

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            'vit': model.init(keys[0], jnp.zeros((1, *shape)))['params'],
            'mask_token': normal(keys[1], (model.width,)),
            'head': head.init(keys[2], jnp.zeros((1, model.width)))['params'],
        }

    def loss_fn(params, extra, frozen, batch, key, step):
        images, mask = model.normalise(batch['image']), batch['mask'].astype(jnp.float32)
        count = model.grid(shape)[0] * model.grid(shape)[1]
        kinds, others = corruption.draw(key, (len(images), count), corrupt)

        def replace(x):
            other = jnp.take_along_axis(x, others[:, :, None], axis=1)
            x = jnp.where((kinds == 1)[:, :, None], other, x)
            return jnp.where((kinds == 0)[:, :, None], params['mask_token'].astype(x.dtype), x)

        _, out = model.apply(
            {'params': params['vit']}, images, train=True, corrupt=replace, rngs={'dropout': key}
        )
        made = head.apply({'params': params['head']}, out['encoded'].astype(jnp.float32))
        if target == 'pixels':
            wanted = embedding.cut(images, model.patch_size)
            per_patch, hits = jnp.mean((made - wanted) ** 2, axis=-1), None  # [B, N]
        else:
            wanted = targets.colours(batch['image'], model.patch_size, colours)  # [B, N, Q]
            logits = made.reshape(*wanted.shape, -1)
            log_probs = jax.nn.log_softmax(logits)
            own = jnp.take_along_axis(log_probs, wanted[..., None], axis=-1)[..., 0]
            per_patch = -jnp.mean(own, axis=-1)
            hits = jnp.mean(jnp.argmax(logits, axis=-1) == wanted, axis=-1)
        weights = (kinds < 3).astype(jnp.float32)
        means = {'loss': per_patch} if hits is None else {'loss': per_patch, 'accuracy': hits}
        means = {n: masked_mean(corruption.of_each(x, weights), mask) for n, x in means.items()}
        return means['loss'], (means, {})

    def predict(params, batch):
        return model.apply({'params': params['vit']}, model.normalise(batch['image']))[1]

    grid = model.grid(shape)
    flops = model.flops(shape) + 2 * grid[0] * grid[1] * model.width * outputs
    return Objective(init, loss_fn, predict, rules=RULES, flops=flops)


def check(model: nn.Module, shape: tuple[int, ...], target: str) -> None:
    """Raises UserError for a model or images that have no such target."""
    y, x = model.patch_size
    if target == 'small' and (y % SIDE or x % SIDE):
        raise UserError(
            f"objective.target 'small' divides patches into {SIDE} x {SIDE}, and model.patch_size "
            f'is {y} x {x}'
        )
    grid = model.grid(shape)
    if grid == (1, 1):
        raise UserError('objective masked_patch needs several patches, and an image has one')
