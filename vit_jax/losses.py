"""Losses by example: logits [B, K] and labels to float32 [B]."""

import jax
import jax.numpy as jnp


def targets(labels, num_classes):
    """Labels as a distribution or a set: int [B] becomes one-hot [B, K], [B, K] stays."""
    if labels.ndim == 1:
        return jax.nn.one_hot(labels, num_classes)
    return labels.astype(jnp.float32)


def softmax_xent(logits, labels, *, label_smoothing=0.0):
    """Cross-entropy in float32; smoothing mixes in the uniform distribution (arXiv:1512.00567)."""
    wanted = targets(labels, logits.shape[-1])
    wanted = (1 - label_smoothing) * wanted + label_smoothing / logits.shape[-1]
    return -jnp.sum(wanted * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def sigmoid_xent(logits, labels, *, label_smoothing=0.0):
    """Binary cross-entropy summed over classes (arXiv:2006.07159 section 3), multi-label or not."""
    wanted = targets(labels, logits.shape[-1])
    wanted = (1 - label_smoothing) * wanted + label_smoothing / logits.shape[-1]
    logits = logits.astype(jnp.float32)
    positive, negative = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -jnp.sum(wanted * positive + (1 - wanted) * negative, axis=-1)


LOSSES = {'softmax': softmax_xent, 'sigmoid': sigmoid_xent}


def hits(logits, labels):
    """1 where the class of highest logit is a true label: [B, K], [B] or [B, K] -> float [B]."""
    wanted = targets(labels, logits.shape[-1])
    best = jnp.argmax(logits, axis=-1)
    return (jnp.take_along_axis(wanted, best[:, None], axis=-1)[:, 0] > 0).astype(jnp.float32)
