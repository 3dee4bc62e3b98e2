"""Autoregressive prediction of patches in raster order (AIM, arXiv:2401.08541).

Shapes: B batch, N patches, P patch, C channels, D width, W width of the prediction head.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError
from vit_jax.io.bounds import NonNegative, Positive
from vit_jax.models import embedding, layers, memory
from vit_jax.objectives import Examples, Objective, headless, masked_mean, targets

METRICS = {'loss': 'min'}
PREFIX = 0x707265  # folded into the key for the lengths of prefixes; dropout uses the key itself
RULES = (
    (r'predictor/blocks/fc1/kernel', P(None, 'fsdp', 'tensor')),  # [L, W, 4 W]
    (r'predictor/blocks/fc2/kernel', P(None, 'tensor', 'fsdp')),  # [L, 4 W, W]
    (r'predictor/blocks/(\w+/)*(bias|scale)', P()),
    (r'predictor/(enter|leave)/kernel', P('fsdp', None)),  # [D, W] and [W, P * P * C]
)


class Residual(nn.Module):
    """A block of the head, as the body of a scan: x + MLP(norm(x)) of each patch by itself."""

    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        width = x.shape[-1]
        y = layers.norm('layer', self.epsilon, self.dtype, 'norm')(x)
        dense = dict(use_bias=False, dtype=self.dtype)
        y = memory.shard_batch(nn.Dense(4 * width, **dense, name='fc1')(y), whole=False)
        y = nn.Dense(width, **dense, name='fc2')(nn.gelu(y))
        return memory.shard_batch(x + y.astype(x.dtype)), None


class Predictor(nn.Module):
    """The prediction head: [B, N, D] -> float32 [B, N, P * P * C].

    `depth` blocks of width W, without biases; 0: a linear layer.
    """

    depth: int
    width: int
    outputs: int
    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.depth:
            x = nn.Dense(self.width, use_bias=False, dtype=self.dtype, name='enter')(x)
            x = memory.shard_batch(x)
            scanned = memory.stacked(Residual, self.depth, None, False, inputs=(nn.broadcast,))
            x, _ = scanned(self.epsilon, self.dtype, name='blocks')(x, None)
            x = layers.norm('layer', self.epsilon, self.dtype, 'norm')(x)
        return nn.Dense(self.outputs, use_bias=False, name='leave')(x.astype(jnp.float32))


def next_patch(
    model: nn.Module,
    examples: Examples,
    *,
    head_depth: NonNegative[int] = 12,
    head_width: Positive[int] = 2048,
    head_posemb: bool = True,
    prefix: bool = True,
    normalise: bool = True,
) -> Objective:
    """Predicts each patch from those before it, by the squared error of its pixels.

    Args:
      model: a ViT, which is trained without a head. A class token reads the prefix alone here, so
        pool 'gap' or 'map' suits.
      examples: the training examples, with `image` [H, W, C] in the spec.
      head_depth: blocks of the MLP that makes pixels of a patch's encoding. 0: a linear layer.
      head_width: width of these blocks.
      head_posemb: whether fixed sine-cosine positions are added to the encodings before the head:
        the model's, or `sincos2d` if its own are learnt.
      prefix: whether the first patches of an image, of a number drawn between 1 and N - 1, read
        each other and are not predicted. Otherwise attention is causal throughout.
      normalise: whether the pixels of each patch are normalised by their mean and deviation, as in
        arXiv:2111.06377.
    """
    model = headless(model, examples, 'next_patch')
    shape = examples.spec['image'].shape
    rows, columns = model.grid(shape)
    count = rows * columns
    if count < 2:
        raise UserError('objective next_patch needs several patches, and an image has one')
    outputs = model.patch_size[0] * model.patch_size[1] * shape[-1]
    if head_posemb and model.width % 4:
        raise UserError(
            f'objective.head_posemb needs a model.width divisible by 4, not {model.width}'
        )
    positions = model.posemb if model.posemb in embedding.FIXED else 'sincos2d'
    head = Predictor(head_depth, head_width, outputs, model.epsilon, model.dtype)

    def init(key):
        keys = jax.random.split(key)
        return {
            'vit': model.init(keys[0], jnp.zeros((1, *shape)))['params'],
            'predictor': head.init(keys[1], jnp.zeros((1, count, model.width)))['params'],
        }

    def loss_fn(params, extra, frozen, batch, key, step):
        images, mask = model.normalise(batch['image']), batch['mask'].astype(jnp.float32)
        lengths = jnp.ones(len(images), jnp.int32)
        if prefix:
            drawn = jax.random.fold_in(key, PREFIX)
            lengths = jax.random.randint(drawn, lengths.shape, 1, count)
        attend = prefix_causal(lengths, count, sum(model.prefix.values()))
        _, out = model.apply(
            {'params': params['vit']}, images, train=True, attend=attend, rngs={'dropout': key}
        )
        encoded = out['encoded']
        if head_posemb:
            encoded += embedding.fixed(positions, rows, columns, model.width).astype(encoded.dtype)
        made = head.apply({'params': params['predictor']}, encoded)[:, :-1]
        wanted = embedding.cut(images, model.patch_size)
        wanted = targets.normalised(wanted) if normalise else wanted
        errors = jnp.mean((made - wanted[:, 1:]) ** 2, axis=-1)  # [B, N - 1]
        predicted = jnp.arange(1, count) >= lengths[:, None]
        per_image = jnp.sum(errors * predicted, axis=1) / jnp.sum(predicted, axis=1)
        mean = masked_mean(per_image, mask)
        return mean, ({'loss': mean}, {})

    def predict(params, batch):
        return model.apply({'params': params['vit']}, model.normalise(batch['image']))[1]

    flops = model.flops(shape) + 2 * count * head_flops(
        model.width, head_depth, head_width, outputs
    )
    return Objective(init, loss_fn, predict, rules=RULES, flops=flops)


def prefix_causal(lengths: jax.Array, count: int, before: int) -> jax.Array:
    """Which tokens attend to which, bool [B, T, T], after prefixes of `lengths` [B] patches.

    All attend to the prefix, and a patch to itself and those before it. `before` tokens precede the
    patches; all attend to these.
    """
    place = jnp.arange(-before, count)
    return (place <= place[:, None]) | (place < lengths[:, None])[:, None]


def head_flops(width: int, depth: int, head_width: int, outputs: int) -> int:
    """Multiply-adds of the prediction head for one patch."""
    if not depth:
        return width * outputs
    return width * head_width + depth * 8 * head_width**2 + head_width * outputs
