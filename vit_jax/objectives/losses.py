"""Losses per example: logits [B, K] and labels to float32 [B].

Labels are int [B], one class; int [B, L], up to L classes, padded with -1; or float [B, K],
weights of all classes.
"""

import jax
import jax.numpy as jnp


def targets(labels: jax.Array, num_classes: int) -> jax.Array:
    """Converts labels to float32 [B, K]: 1 for each true class; weights [B, K] are not changed."""
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        return labels.astype(jnp.float32)
    hot = jax.nn.one_hot(labels, num_classes)
    return hot if labels.ndim == 1 else hot.max(axis=1)


def distribution(labels: jax.Array, num_classes: int) -> jax.Array:
    """Converts labels to probabilities, float32 [B, K]: 1 / n for each of n true classes.

    This is the target of a softmax with several labels (arXiv:1805.00932). Without any label it is
    zero, and so is the loss. Weights [B, K] are not changed.
    """
    weights = targets(labels, num_classes)
    if labels.ndim == 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
        return weights
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1)


def smoothed(weights: jax.Array, labels: jax.Array, label_smoothing: float) -> jax.Array:
    """Mixes the uniform distribution into weights [B, K] of `labels` (arXiv:1512.00567).

    Weights of an example without labels stay 0. Weights that sum to less than 1, such as after
    mixup with an example without labels, are smoothed in proportion to their sum.
    """
    if jnp.issubdtype(labels.dtype, jnp.integer):
        labelled = jnp.any(labels.reshape(len(labels), -1) >= 0, axis=-1)
    else:
        labelled = jnp.minimum(jnp.sum(weights, axis=-1), 1)
    uniform = label_smoothing / weights.shape[-1] * labelled[:, None]
    return (1 - label_smoothing) * weights + uniform


def softmax_xent(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Cross-entropy in float32; 0 for an example without labels."""
    weights = smoothed(distribution(labels, logits.shape[-1]), labels, label_smoothing)
    return -jnp.sum(weights * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def sigmoid_xent(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Binary cross-entropy summed over classes (arXiv:2006.07159 section 3), multi-label or not.

    Label smoothing s makes (1 - s) y + s (1 - y) of each class's target y: a true class has 1 - s,
    any other s, in an example without labels too.
    """
    weights = targets(labels, logits.shape[-1])
    weights = (1 - 2 * label_smoothing) * weights + label_smoothing
    logits = logits.astype(jnp.float32)
    positive, negative = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -jnp.sum(weights * positive + (1 - weights) * negative, axis=-1)


LOSSES = {'softmax': softmax_xent, 'sigmoid': sigmoid_xent}
PROBABILITIES = {'softmax': jax.nn.softmax, 'sigmoid': jax.nn.sigmoid}
TARGETS = {'softmax': distribution, 'sigmoid': targets}  # the targets of each loss


def probabilities(logits: jax.Array, loss: str | None = None) -> jax.Array:
    """Class probabilities, float32 [B, K], of a classifier trained with a loss of LOSSES.

    None: the loss is unknown, and a softmax is used.
    """
    return PROBABILITIES[loss or 'softmax'](logits.astype(jnp.float32))


def hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 where the class of highest logit is a true label: [B, K] and labels -> float [B]."""
    best = jnp.argmax(logits, axis=-1)[:, None]
    if jnp.issubdtype(labels.dtype, jnp.integer):  # without an array [B, K] of labels
        return jnp.any(labels.reshape(len(labels), -1) == best, axis=-1).astype(jnp.float32)
    return (jnp.take_along_axis(labels, best, axis=-1)[:, 0] > 0).astype(jnp.float32)


def heaviest(weights: jax.Array) -> jax.Array:
    """1 for the classes of largest weight, if it is above 0: [B, K] -> float [B, K]."""
    largest = weights == jnp.max(weights, axis=-1, keepdims=True)
    return (largest & (weights > 0)).astype(jnp.float32)
