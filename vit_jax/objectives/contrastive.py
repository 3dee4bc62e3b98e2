"""Images and their texts: two towers learn which of a batch belong together.

A batch is {image: uint8 [B, H, W, C], text: int [B, L], mask: [B]}; with kept features it has
`features` [B, D] in place of the image. Shapes: D input of the image tower's head, E dimensions of
the space of both, M micro-batches.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.io.bounds import Finite, Positive
from vit_jax.models import layers
from vit_jax.models import text as texts
from vit_jax.models.memory import shard_batch
from vit_jax.models.two_towers import TwoTowers, build_towers, unit_length
from vit_jax.models.vit import Vit
from vit_jax.objectives import Examples, Kept, Objective, pairs

METRICS = {'loss': 'min', 'accuracy': 'max'}
PAIRS = 'each image is compared with the texts of the whole batch; objective.micro_batches has the '
PAIRS += 'memory of micro-batches, and the same loss'


def contrastive(
    model: Vit,
    examples: Examples,
    *,
    text: texts.Fields | None = None,
    loss: Literal['sigmoid', 'softmax'] = 'sigmoid',
    temperature: Positive[float] = 10.0,
    temperature_max: Positive[float] | None = None,
    bias: Finite[float] = -10.0,
    micro_batches: Positive[int] = 1,
    keep_features: bool = False,
) -> Objective:
    """Trains an image and a text tower to give the image and text of a pair similar embeddings.

    Parameters are in the subtrees `image` and `text`, beside the logarithm of the temperature and
    the bias. The loss is that of all pairs of the global batch, of which each device has its share
    (objectives/pairs.py). With `optim.freeze` '^image/' the image tower stays as it is, as in LiT
    (arXiv:2111.07991). Evaluations read the image tower's outputs, `image_embedding` and, with
    texts, `text_embedding` [B, E].

    `accuracy` is the share of images to which no text of the batch is more similar than their own.

    Args:
      model: the image tower, a ViT as `models.build` makes it. `model.num_classes` is the number E
        of a linear projection; without it the pooled tokens are the embedding.
      examples: the training examples, with `image` and `text` in the spec, as of the task
        `image_text`.
      text: the text tower, see models/text.py. Its vocabulary and length default to those of the
        tokenizer, and `num_classes` to the size of the image tower's output.
      loss: sigmoid of each pair (arXiv:2303.15343), or softmax over texts and over images
        (arXiv:2103.00020).
      temperature: initial factor of the cosines, whose logarithm is learnt: 10 in arXiv:2303.15343,
        1 / 0.07 in arXiv:2103.00020.
      temperature_max: bound of that factor; 100 in arXiv:2103.00020. None: none.
      bias: initial term added to all logits, with the loss sigmoid.
      micro_batches: number M of parts of a batch whose embeddings are computed one after the
        other, and again for the gradient (arXiv:2101.06983): the loss and its gradient are those of
        the whole batch, in the memory of a part.
      keep_features: whether each training image passes the image tower once, before the first step,
        and steps then read its features, the input of the tower's head. All of the tower but its
        head is to be frozen, and the view is not to be random. Evaluations read images.
    """
    net = towers(
        model, examples, text, use_bias=loss == 'sigmoid', temperature_init=temperature,
        bias_init=bias, temperature_max=temperature_max,
    )  # fmt: skip
    image, tokens = examples.spec['image'].shape, examples.spec['text'].shape

    def init(key):
        blank = jnp.zeros((1, *image)), jnp.zeros((1, *tokens), jnp.int32)
        return net.init(key, *blank)['params']

    def embed(params, batch, key):
        images = None if keep_features else net.normalise(batch['image'])
        out = net.apply({'params': params}, images, batch['text'], train=True,
                        rngs={'dropout': key})[1]  # fmt: skip
        if keep_features:
            out['image_embedding'] = embedding_of(net.image, params['image'], batch['features'])
        scalars = {name: out[name] for name in ('temperature', 'bias')}
        return {name: out[name] for name in ('image_embedding', 'text_embedding')}, scalars

    def loss_fn(params, extra, frozen, batch, key, step):
        inputs = {name: batch[name] for name in ('features' if keep_features else 'image', 'text')}
        embeddings, scalars = in_parts(embed, params, inputs, key, micro_batches)
        value, accuracy = pairs.loss(
            pairs.Pairs(
                embeddings['image_embedding'], embeddings['text_embedding'],
                scalars['temperature'], scalars['bias'], batch['mask'].astype(jnp.float32),
            ), loss,
        )  # fmt: skip
        metrics = {'loss': value, 'accuracy': accuracy, 'temperature': scalars['temperature']}
        return value, (metrics | ({'bias': scalars['bias']} if net.use_bias else {}), {})

    flops = net.text.flops(tokens[-1]) if keep_features else net.flops(image, tokens[-1])
    return Objective(
        init, loss_fn, partial(predict, net), indivisible=PAIRS, flops=flops,
        settings={'pairs': loss}, kept=kept_features(net) if keep_features else None,
    )  # fmt: skip


def kept_features(net: TwoTowers) -> Kept:
    """The features of images, `features` [B, D]; raises UserError for an image tower with dropout.

    They are float32, whatever the tower computes in.
    """
    for name in ('dropout', 'attention_dropout', 'drop_path'):
        if rate := getattr(net.image, name):
            raise UserError(
                f'objective.keep_features: model.{name} is {rate:g}, so the features of an image '
                'differ from step to step; set it to 0'
            )
    if net.image.dist_head:
        raise UserError(
            'objective.keep_features: model.dist_head is a second head, which reads other features'
        )

    def compute(params, batch):
        images = net.normalise(batch['image'])
        out = net.image.apply({'params': params['image']}, images)[1]
        return {'features': out['pre_logits'].astype(jnp.float32)}

    return Kept(compute, '^image/(?!head/)', 'objective.keep_features')


def embedding_of(model: Vit, params: Any, features: jax.Array) -> jax.Array:
    """The embedding [B, E] of an image's features [B, D], by the tower's head if it has one."""
    if model.num_classes is not None:
        head = layers.head(model.num_classes, model.head_bias, model.dtype)
        features = head.apply({'params': params['head']}, features)
    return unit_length(features)


def predict(
    net: TwoTowers, params: Any, batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """What evaluations read of images, texts or both, see `contrastive`.

    `temperature` [B] is the same for all.
    """
    images = net.normalise(batch['image']) if 'image' in batch else None
    out = net.apply({'params': params}, images, batch.get('text'))[1]
    names = [n for n in ('image_embedding', 'text_embedding') if n in out]
    each = jnp.ones(len(out[names[0]]))
    found = {name: out[name] for name in names} | {'temperature': out['temperature'] * each}
    return out.get('image', {}) | found


def towers(model: nn.Module, examples: Examples, text: Any, **fields: Any) -> TwoTowers:
    """The two towers, checked; raises UserError for a model or examples of another kind."""
    if not isinstance(model, Vit):
        raise UserError(
            'objective contrastive trains a ViT as image tower, and model.name is that of a '
            f'{type(model).__name__}'
        )
    if missing := {'image', 'text'} - examples.spec.keys():
        raise UserError(
            f'objective contrastive trains on images with texts, and data.task makes no '
            f"{min(missing)}; set data.task to 'image_text'"
        )
    values = {'length': examples.spec['text'].shape[0]} | dict(text or {})
    if 'vocab_size' not in values and examples.tokenizer is not None:
        values['vocab_size'] = examples.tokenizer.loaded.vocab_size
    net = build_towers(model, values, **fields)
    if net.text.pool == 'eos' and net.text.eos_id is not None and examples.tokenizer is not None:
        end = examples.tokenizer.loaded.eos
        if net.text.eos_id != end:
            raise UserError(
                f'config objective.text.eos_id is {net.text.eos_id}, and texts of '
                f'{examples.tokenizer.address} end with {end}; set it to that'
            )
    try:
        net.grid(examples.spec['image'].shape)
    except UserError as e:
        raise UserError(f'config data.image_size: {e}') from e
    return net


def in_parts(
    embed: Callable, params: Any, inputs: dict[str, jax.Array], key: jax.Array, count: int
) -> tuple[Any, Any]:
    """`embed` (params, inputs, key) -> (rows, scalars) of a batch, part after part.

    Activations of a part are computed again for the gradient, so only rows are saved of all parts.
    """
    if count == 1:
        return embed(params, inputs, key)
    size, mesh = len(inputs['text']), jax.sharding.get_abstract_mesh()
    least = count * math.prod(mesh.shape.get(axis, 1) for axis in pairs.AXES)
    if size % least:
        raise UserError(
            f'data.batch_size {size} in {count} micro-batches (objective.micro_batches) is not '
            f'divisible by the devices of mesh axes data and fsdp; {least} and its multiples are'
        )

    def body(carry, xs):
        i, part = xs
        part = jax.tree.map(shard_batch, part)
        return carry, jax.checkpoint(embed)(params, part, jax.random.fold_in(key, i))

    # Part i has rows i, i + count, ... of each device, so that none leaves its device.
    split = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), inputs)
    _, (rows, scalars) = jax.lax.scan(body, None, (jnp.arange(count), split))
    whole = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(size, *x.shape[2:]), rows)
    return jax.tree.map(shard_batch, whole), jax.tree.map(lambda x: x[0], scalars)
