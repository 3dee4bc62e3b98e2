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


def supervised(model, *, loss: str = 'softmax', label_smoothing: float = 0.0):
    """Classification with a softmax or a sigmoid (multi-label) cross-entropy."""
    if loss not in losses.LOSSES:
        raise UserError(f'objective.loss is {loss!r}, not one of {", ".join(losses.LOSSES)}')

    def objective(params, batch, key):
        logits, _ = model.apply(
            {'params': params}, model.normalise(batch['image']), train=True, rngs={'dropout': key}
        )
        by_example = losses.LOSSES[loss](logits, batch['label'], label_smoothing=label_smoothing)
        hit = losses.hits(logits, batch['label'])
        mask = batch['mask'].astype(jnp.float32)
        value = masked_mean(by_example, mask)
        return value, {'loss': value, 'accuracy': masked_mean(hit, mask)}

    return objective
