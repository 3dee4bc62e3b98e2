"""What a step minimises: each function here makes (params, batch, key) -> (loss, metrics).

A batch is {image: uint8 [B, H, W, C], label: int [B], int [B, L] padded with -1 or float [B, K],
mask: [B]}; loss and metrics are means over the examples with mask 1.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from vit_jax.io.bounds import NonNegative, Positive, Rate
from vit_jax.models import interface
from vit_jax.objectives import losses, mixing

MIX = 0x6D6978  # folded into the key for mixing; dropout has the key as it comes


def masked_mean(values, mask):
    """Mean of values [B] where mask [B] is 1; 0 where it nowhere is."""
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)


METRICS = {'loss': 'min', 'accuracy': 'max'}  # of `supervised`, and which is better


def supervised(
    model,
    *,
    loss: Literal['softmax', 'sigmoid'] = 'softmax',
    label_smoothing: Rate = 0.0,
    mixup: NonNegative[float] = 0.0,
    cutmix: NonNegative[float] = 0.0,
    mix_by: Literal['batch', 'example'] = 'batch',
    mix_shift: Positive[int] = 1,
):
    """Classification with a softmax or a sigmoid (multi-label) cross-entropy.

    `mixup` and `cutmix` are alphas of `mixing.mix`, for the batch or by 'example', with the example
    `mix_shift` before; where gradients are accumulated, partners and draws are of a micro-batch.
    Accuracy is then of mixed images: it counts the class of greatest weight in the mixed label.
    """

    interface.check_output(model)

    def objective(params, batch, key):
        images, labels = seen(
            batch, key, model=model, loss=loss, mixup=mixup, cutmix=cutmix, mix_by=mix_by,
            mix_shift=mix_shift,
        )  # fmt: skip
        logits, _ = model.apply({'params': params}, images, train=True, rngs={'dropout': key})
        by_example = losses.LOSSES[loss](logits, labels, label_smoothing=label_smoothing)
        hit = losses.hits(logits, losses.heaviest(labels) if mixup or cutmix else labels)
        mask = batch['mask'].astype(jnp.float32)
        value = masked_mean(by_example, mask)
        return value, {'loss': value, 'accuracy': masked_mean(hit, mask)}

    return objective


def seen(batch, key, *, model, loss, mixup, cutmix, mix_by, mix_shift):
    """What the model trains on: (normalised images [B, H, W, C], labels), mixed where asked for."""
    images, labels = model.normalise(batch['image']), batch['label']
    if not mixup and not cutmix:
        return images, labels
    return mixing.mix(
        images, losses.TARGETS[loss](labels, model.num_classes), jax.random.fold_in(key, MIX),
        mask=batch['mask'], mixup=mixup, cutmix=cutmix, by=mix_by, shift=mix_shift,
    )  # fmt: skip
