"""Classification with labels.

A batch is {image: uint8 [B, H, W, C], label: int [B], int [B, L] padded with -1 or float [B, K],
mask: [B]}; of a text tower {text: int [B, T]} in place of the images.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.io.bounds import NonNegative, Positive, Rate
from vit_jax.models import interface
from vit_jax.objectives import Examples, Objective, flexible, losses, masked_mean, mixing

MIX = 0x6D6978  # folded into the key for mixing; dropout uses the key itself
METRICS = {'loss': 'min', 'accuracy': 'max'}  # whether less or more is better
HEADS = ('logits_cls', 'logits_dist')  # of a model with `dist_head`; logits are their mean


def supervised(
    model: nn.Module,
    examples: Examples,
    *,
    loss: Literal['softmax', 'sigmoid'] = 'softmax',
    label_smoothing: Rate = 0.0,
    mixup: NonNegative[float] = 0.0,
    cutmix: NonNegative[float] = 0.0,
    mix_by: Literal['batch', 'example'] = 'batch',
    mix_shift: Positive[int] = 1,
    mix_union: bool = False,
    patch_sides: tuple[Positive[int], ...] = (),
    patch_grid: Positive[int] = 7,
    predict_side: Positive[int] | None = None,
) -> Objective:
    """Trains a classifier by the cross-entropy with its labels.

    Mixup and CutMix mix each example with another one of the batch (of the micro-batch where
    gradients are accumulated); with both, each has an even chance. The training accuracy then
    counts the class of greatest weight in the mixed label. Both heads of a model with
    `model.dist_head` learn from the labels, each by a loss of its own, which are averaged.

    Args:
      model: classifier, as `models.build` makes it, of images or texts.
      examples: the training examples, with `image` [H, W, C] or `text` [T] in the spec.
      loss: cross-entropy of a softmax over the classes, or of a sigmoid for each class
        (multi-label).
      label_smoothing: share of a label that a softmax spreads over all classes (arXiv:1512.00567);
        with a sigmoid, the target of each false class, and 1 minus it that of each true one.
      mixup: alpha of the Beta distribution of mixup weights (arXiv:1710.09412). 0: no mixup.
      cutmix: alpha of the Beta distribution of CutMix areas (arXiv:1905.04899). 0: no CutMix.
      mix_by: one mixing weight for the whole batch, or one for each example.
      mix_shift: distance in the batch from an example to the one that it is mixed with. At least
        `data.repeats`, so that no example is mixed with a copy of itself.
      mix_union: whether a mixed image has the labels of both, each in full, in place of their
        weighted mean (arXiv:2110.00476 section 2.1, for the loss sigmoid).
      patch_sides: sides of patches in pixels, of which each step has one at random (FlexiViT,
        arXiv:2212.08013): the kernel, of the model's own `patch_size`, and the positions are
        resized. Empty: the model's own patches.
      patch_grid: side of the table of positions that is resized for `patch_sides`.
      predict_side: side of the patches in evaluations. None: the median of `patch_sides`.
    """
    name = reads(model)
    if name not in examples.spec:
        raise UserError(
            f'the model reads {name}, and data.task makes {", ".join(examples.spec)}'
        )
    if name != 'image' and (mixup or cutmix):
        raise UserError(f'objective.mixup and cutmix mix images, and the model reads {name}')
    shape = examples.spec[name].shape
    patches = flexible.Patches(model, shape, patch_sides, patch_grid, predict_side)
    for side in patches.drawn:
        check_model(patches.model_of(side), examples)
    if (mixup or cutmix) and mix_shift < examples.copies:
        raise UserError(
            f'objective.mix_shift is {mix_shift} with {examples.copies} copies of an image in '
            'succession (data.repeats): images would be mixed with themselves; set it to '
            f'{examples.copies}'
        )

    def init(key):
        blank = patches.blank() if name == 'image' else jnp.zeros((1, *shape), jnp.int32)
        return model.init(key, blank)['params']

    def loss_of(side):
        def loss_fn(params, extra, frozen, batch, key, step):
            images, labels = model_inputs(
                batch, key, model=model, loss=loss, mixup=mixup, cutmix=cutmix, mix_by=mix_by,
                mix_shift=mix_shift, mix_union=mix_union,
            )  # fmt: skip
            logits, out = patches.apply(params, images, side, train=True, rngs={'dropout': key})
            per_head = [
                losses.LOSSES[loss](head, labels, label_smoothing=label_smoothing)
                for head in [out[name] for name in HEADS if name in out] or [logits]
            ]
            per_example = per_head[0] if len(per_head) == 1 else sum(per_head) / len(per_head)
            hits = losses.hits(logits, losses.heaviest(labels) if mixup or cutmix else labels)
            mask = batch['mask'].astype(jnp.float32)
            mean = masked_mean(per_example, mask)
            return mean, ({'loss': mean, 'accuracy': masked_mean(hits, mask)}, {})

        return loss_fn

    def predict(params, batch):
        return patches.apply(params, model.normalise(batch[name]), patches.predicted)[1]

    flops = [flops_of(patches.model_of(side), shape) for side in patches.drawn]
    return Objective(
        init, predict=predict, flops=sum(flops) / len(flops), settings={'loss': loss},
        **patches.variants(loss_of),
    )


def reads(model: nn.Module) -> str:
    """The array of an example that a model reads, 'image' or 'text'."""
    return getattr(model, 'reads', 'image')


def flops_of(model: nn.Module, shape: tuple[int, ...]) -> int:
    """FLOPs of a forward pass over one image [H, W, C] or text [T]."""
    return model.flops(shape) if reads(model) == 'image' else model.flops(*shape)


def check_model(model: nn.Module, examples: Examples) -> None:
    """Raises UserError unless the model takes the examples and has an output for each class."""
    interface.check_output(model)
    try:
        flops_of(model, examples.spec[reads(model)].shape)
    except UserError as e:  # of images without patches
        raise UserError(f'config data.image_size: {e}') from e
    classes = examples.names.get('classes', ())
    if (model.num_classes or 0) < len(classes):
        raise UserError(
            f'labels are out of range: the data set has {len(classes)} classes, model.num_classes '
            f'is {model.num_classes}'
        )
    if reads(model) != 'image':
        return
    channels = examples.spec['image'].shape[-1]
    if not len(model.mean) == len(model.std) == channels:
        raise UserError(
            f'images have {channels} channels, model.mean is {model.mean}, model.std {model.std}'
        )


def model_inputs(
    batch: dict[str, jax.Array], key: jax.Array, *, model: nn.Module, loss: str, mixup: float,
    cutmix: float, mix_by: str, mix_shift: int, mix_union: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(normalised images [B, H, W, C], labels) that a step trains on, mixed if configured.

    Of a text tower (tokens [B, T], labels).
    """
    images, labels = model.normalise(batch[reads(model)]), batch['label']
    if not mixup and not cutmix:
        return images, labels
    images, labels = mixing.mix(
        images, losses.TARGETS[loss](labels, model.num_classes), jax.random.fold_in(key, MIX),
        mask=batch['mask'], mixup=mixup, cutmix=cutmix, by=mix_by, shift=mix_shift,
    )  # fmt: skip
    return images, (labels > 0).astype(labels.dtype) if mix_union else labels
