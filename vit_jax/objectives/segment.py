"""Semantic segmentation by a class for each patch, resized to the label map.

A batch is {image: uint8 [B, H, W, C], label_map: uint8 or uint16 [B, Y, X], mask: [B]}; pixels of a
label that is no class, such as 255, are ignored. Shapes: h w grid of patches, N patches, D width, K
classes.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError
from vit_jax.io.bounds import Positive, Rate
from vit_jax.models import around, resizing, segmenter
from vit_jax.models.patch_classifier import PatchClassifier, logits_of, patches_of
from vit_jax.models.vit import Vit
from vit_jax.objectives import Examples, Objective, class_count, headless, linear_probe

METRICS = {'loss': 'min', 'accuracy': 'max'}
EPSILON = 1e-5  # of batch norm, that of PyTorch
BESIDE = 'batch norm and the losses of pixels are those of the whole batch'


def segment(
    model: Vit,
    examples: Examples,
    *,
    head: Literal['linear', 'segmenter'] = 'linear',
    blocks: Positive[int] = 1,
    batch_norm: bool = True,
    norm_decay: Rate = 0.9,
    decoder_depth: Positive[int] = 2,
    decoder_dropout: Rate = 0.1,
) -> Objective:
    """Trains the ViT to segment images: a class for each patch, by a head on its last tokens.

    Parameters of the ViT are in the subtree `vit`, beside those of the head. The loss is the mean
    cross-entropy of all pixels of the batch that are not ignored; logits are resized to the label
    map, bilinearly without aligned corners. With `optim.only` '^(head|batch_norm)/' the ViT is
    frozen, as in arXiv:2304.07193 section 7.4.

    Evaluations read `semantic`, the logits [B, K, h, w] of the patches.

    Args:
      model: ViT, as `models.build` makes it; its own head is left out.
      examples: the training examples, with `image` and `label_map` in the spec.
      head: batch norm and a linear layer, as facebookresearch/dinov2 (linear_head.py), or the mask
        transformer of arXiv:2105.05633, `models.segmenter.Segmenter`.
      blocks: number of the last blocks whose patches the head linear reads, side by side, after the
        last norm.
      batch_norm: whether the head linear has batch norm.
      norm_decay: decay of the moving averages of batch norm, with head linear. Evaluations, and
        what loads the run, have these averages, multiplied into the head.
      decoder_depth: blocks of the mask transformer.
      decoder_dropout: dropout rate in them.
    """
    classes = class_count(model, examples, 'segment')
    model = headless(model, examples, 'segment', pixels=False)
    encoder = around.encoder_of(model, 'a segmenter')
    check_spec(examples, classes)
    if head == 'linear':
        net = PatchClassifier(encoder, classes, blocks, batch_norm)
    else:
        net = segmenter.Segmenter(encoder, classes, decoder_depth, decoder_dropout)
    net.check()
    shape = examples.spec['image'].shape
    if head == 'linear' and batch_norm:
        return with_batch_norm(net, shape, norm_decay)

    def init(key):
        return net.init(key, jnp.zeros((1, *shape)))['params']

    def loss(params, extra, frozen, batch, key, step):
        images = encoder.normalise(batch['image'])
        logits, _ = net.apply({'params': params}, images, train=True, rngs={'dropout': key})
        metrics = pixel_metrics(logits, batch['label_map'], batch['mask'])
        return metrics['loss'], (metrics, {})

    def predict(params, batch):
        logits, _ = net.apply({'params': params}, encoder.normalise(batch['image']))
        return {'semantic': logits.transpose(0, 3, 1, 2)}

    rules = segmenter.RULES if head == 'segmenter' else ()
    return Objective(
        init, loss, predict, rules=rules, flops=net.flops(shape), indivisible=BESIDE
    )


def with_batch_norm(net: PatchClassifier, shape: tuple[int, ...], decay: float) -> Objective:
    """`segment` with batch norm and a linear layer, of images [H, W, C]."""
    width, (h, w) = net.features, net.grid(shape)
    capture = ('normed_by_block',) if net.blocks > 1 else ()

    def init(key):
        return net.init(key, jnp.zeros((1, *shape)))['params']

    def features(params, batch, **how):
        """Patches after the last norm, float32 [B, N, F]."""
        images = net.normalise(batch['image'])
        out = net.vit.apply({'params': params['vit']}, images, capture=capture, **how)[1]
        return patches_of(out, net.blocks)

    def loss(params, extra, frozen, batch, key, step):
        mask = batch['mask'].astype(jnp.float32)
        x = features(params, batch, train=True, rngs={'dropout': key})
        mean, variance = moments(x, mask)
        logits = logits_of(params, (x - mean) * jax.lax.rsqrt(variance + EPSILON))
        logits = logits.reshape(-1, h, w, net.num_classes)
        metrics = pixel_metrics(logits, batch['label_map'], mask)
        count = jnp.maximum(jnp.sum(mask) * h * w, 2)
        aux = {'mean': mean, 'variance': variance * count / (count - 1)}
        return metrics['loss'], (metrics, jax.lax.stop_gradient(aux))

    def extra(params):
        kept = {'mean': jnp.zeros(width), 'variance': jnp.ones(width)}
        return kept | {'average': folded(params, **kept)}

    def update(extra, params, aux, step):
        kept = {n: decay * extra[n] + (1 - decay) * aux[n] for n in ('mean', 'variance')}
        return kept | {'average': folded(params, **kept)}

    def predict(params, batch):
        logits, _ = net.apply({'params': params}, net.normalise(batch['image']))
        return {'semantic': logits.transpose(0, 3, 1, 2)}

    rules = ((r'mean|variance', P()),)
    return Objective(
        init, loss, predict, extra, update, rules=rules, flops=net.flops(shape), indivisible=BESIDE
    )


def check_spec(examples: Examples, classes: int) -> None:
    """Raises UserError unless examples have a label map whose type has a number to ignore."""
    if 'label_map' not in examples.spec:
        raise UserError(
            "the objective needs `label_map`, as data.task 'segment' has it; these examples have "
            f'{", ".join(examples.spec)}'
        )
    most = jnp.iinfo(examples.spec['label_map'].dtype).max
    if classes > most:
        raise UserError(
            f'model.num_classes is {classes}, and the label map has {most} of them at most'
        )


def moments(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance, [D] each, of the patches x [B, N, D] of examples with mask 1."""
    b, n, d = x.shape
    rows = jnp.broadcast_to(mask[:, None], (b, n)).reshape(-1)
    return linear_probe.moments(x.reshape(-1, d), rows)


def folded(params: Any, *, mean: jax.Array, variance: jax.Array) -> Any:
    """Parameters whose batch norm is that by this mean and variance, for patches as they are."""
    scale = params['batch_norm']['scale'] * jax.lax.rsqrt(variance + EPSILON)
    bias = params['batch_norm']['bias'] - mean * scale
    return params | {'batch_norm': {'scale': scale, 'bias': bias}}


def pixel_metrics(
    logits: jax.Array, label_map: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
    """Means over all pixels of the batch that are not ignored: `loss`, `accuracy`.

    Args:
      logits: [B, h, w, K], which are resized to the label map.
      label_map: integers [B, Y, X]; those that are no class are ignored.
      mask: [B], 1 for the examples that count.
    """
    classes = logits.shape[-1]
    logits = resizing.maps(logits.astype(jnp.float32), label_map.shape[1:])
    labels = label_map.astype(jnp.int32)
    counts = (labels < classes) & (mask[:, None, None] > 0)
    true = jnp.take_along_axis(logits, jnp.where(counts, labels, 0)[..., None], axis=-1)[..., 0]
    rows = {
        'loss': jax.nn.logsumexp(logits, axis=-1) - true,
        'accuracy': jnp.argmax(logits, axis=-1) == labels,
    }
    count = jnp.maximum(jnp.sum(counts), 1)
    return {name: jnp.sum(jnp.where(counts, x, 0)) / count for name, x in rows.items()}
