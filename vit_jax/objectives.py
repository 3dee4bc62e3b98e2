"""What a step minimises: each function here makes (params, batch, key) -> (loss, metrics).

A batch is {image: uint8 [B, H, W, C], label: int [B] or float [B, K], mask: [B]}; loss and metrics
are means over the examples with mask 1.
"""

import jax.numpy as jnp

from vit_jax import losses
from vit_jax.errors import UserError


def masked_mean(values, mask):
    """Mean of values [B] where mask [B] is 1; 0 where it nowhere is."""
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)


def supervised(model, *, loss='softmax', label_smoothing=0.0):
    """Classification with a softmax or a sigmoid (multi-label) cross-entropy."""
    kinds = {'softmax': losses.softmax_xent, 'sigmoid': losses.sigmoid_xent}
    if loss not in kinds:
        raise UserError(f'objective.loss is {loss!r}, not one of {", ".join(kinds)}')

    def objective(params, batch, key):
        logits, _ = model.apply(
            {'params': params}, model.normalise(batch['image']), train=True, rngs={'dropout': key}
        )
        by_example = kinds[loss](logits, batch['label'], label_smoothing=label_smoothing)
        hit = hits(logits, batch['label'])
        mask = batch['mask'].astype(jnp.float32)
        value = masked_mean(by_example, mask)
        return value, {'loss': value, 'accuracy': masked_mean(hit, mask)}

    return objective


def hits(logits, labels):
    """1 where the class of highest logit is a true label: [B, K], [B] or [B, K] -> float [B]."""
    wanted = losses.targets(labels, logits.shape[-1])
    best = jnp.argmax(logits, axis=-1)
    return (jnp.take_along_axis(wanted, best[:, None], axis=-1)[:, 0] > 0).astype(jnp.float32)
