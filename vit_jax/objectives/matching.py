"""Assigns targets to predictions at the least total cost, and the loss of their classes.

Shapes: B batch, M targets, Q predictions, K classes.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

LARGEST = 1e9  # stands for a cost that is not finite


def assign(cost: jax.Array, valid: jax.Array) -> jax.Array:
    """The prediction of each target, int32 [B, M], by which the sum of costs is the least.

    Each device assigns its own examples, so that no loop waits for other devices. No gradient flows
    through the costs.

    Args:
      cost: float [B, M, Q].
      valid: bool [B, M], at most Q of each example; other targets are assigned 0.
    """
    cost = lax.stop_gradient(cost.astype(jnp.float32))
    cost = jnp.clip(jnp.nan_to_num(cost, nan=LARGEST), -LARGEST, LARGEST)
    function = jax.vmap(assign_one)
    mesh = jax.sharding.get_abstract_mesh()
    if {'data', 'fsdp'} <= set(mesh.axis_names):
        spec = PartitionSpec(('data', 'fsdp'))
        function = jax.shard_map(
            function, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False
        )
    return function(cost, valid)


def assign_one(cost: jax.Array, valid: jax.Array) -> jax.Array:
    """`assign` of one example: cost [M, Q] and valid [M] to [M].

    Shortest augmenting paths with dual variables, a target at a time: doi:10.1109/TAES.2016.140952.
    """
    m, q = cost.shape
    state = (
        jnp.zeros(m), jnp.zeros(q), jnp.full(q, -1, jnp.int32), jnp.full(m, -1, jnp.int32)
    )
    *_, predictions = lax.fori_loop(0, m, partial(add_target, cost, valid), state)
    return jnp.maximum(predictions, 0)


def add_target(cost: jax.Array, valid: jax.Array, target: jax.Array, state: tuple) -> tuple:
    """Assigns one more target, where it is valid.

    The state is (duals of targets [M], duals of predictions [Q], target of each prediction [Q],
    prediction of each target [M]), -1 for none.
    """
    u, v, targets, predictions = state
    q = cost.shape[1]
    columns = jnp.arange(q)

    def search(val):
        row, reached, lengths, path, done, _ = val
        new = reached + cost[row] - u[row] - v
        better = (new < lengths) & ~done
        lengths, path = jnp.where(better, new, lengths), jnp.where(better, row, path)
        nearest = jnp.argmin(jnp.where(done, jnp.inf, lengths)).astype(jnp.int32)
        done = done | (columns == nearest)
        return targets[nearest], lengths[nearest], lengths, path, done, nearest

    start = jnp.where(valid[target], target, -1).astype(jnp.int32)
    begun = (
        start, jnp.float32(0), jnp.full(q, jnp.inf), jnp.full(q, -1, jnp.int32),
        jnp.zeros(q, bool), jnp.int32(-1),
    )
    _, total, lengths, path, done, sink = lax.while_loop(lambda val: val[0] >= 0, search, begun)
    # Duals of the targets and predictions that the search passed, but for its end.
    passed = done & (columns != sink)
    slack = jnp.where(passed, total - jnp.where(passed, lengths, 0), 0)
    u = u.at[jnp.where(passed, targets, target)].add(slack)
    u = u.at[target].add(jnp.where(start >= 0, total, 0))
    v = v - slack

    def augment(val):
        column, targets, predictions = val
        row = path[column]
        before = predictions[row]
        more = jnp.where(row == target, -1, before)
        return more, targets.at[column].set(row), predictions.at[row].set(column)

    _, targets, predictions = lax.while_loop(
        lambda val: val[0] >= 0, augment, (sink, targets, predictions)
    )
    return u, v, targets, predictions


def true_probabilities(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Probability of each target's class by each prediction, [B, M, Q].

    Args:
      logits: [B, Q, K + 1].
      labels: int [B, M], -1 for none.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32)).swapaxes(1, 2)  # [B, K + 1, Q]
    return jnp.take_along_axis(probabilities, jnp.maximum(labels, 0)[:, :, None], axis=1)


def class_loss(
    logits: jax.Array, labels: jax.Array, matched: jax.Array, mask: jax.Array, no_object: float
) -> jax.Array:
    """Cross-entropy of all predictions of the batch, their mean by the weights of their classes.

    Args:
      logits: [B, Q, K + 1]; the last class is no object, the target of what is not matched.
      labels: int [B, M], -1 for none.
      matched: int [B, M], the prediction of each label.
      mask: [B], 1 for the examples that count.
      no_object: weight of that class; others have 1.
    """
    q, none = logits.shape[1], logits.shape[2] - 1
    hits = (matched[:, :, None] == jnp.arange(q)) & (labels >= 0)[:, :, None]  # [B, M, Q]
    targets = none + jnp.sum(hits * (labels[:, :, None] - none), axis=1)  # [B, Q]
    weights = jnp.where(targets == none, no_object, 1.0) * mask[:, None]
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))
    errors = -jnp.take_along_axis(logs, targets[:, :, None], axis=2)[:, :, 0]
    total = jnp.sum(weights)
    return jnp.sum(errors * weights) / jnp.where(total > 0, total, 1)
