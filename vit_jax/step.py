"""The state of a run and the pure functions that advance it."""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax import optim, sharding
from vit_jax.objectives import losses

BINS = 15  # of confidence, as arXiv:1706.04599 section 5 has them
TOP = 5  # classes of the metric top5


@flax.struct.dataclass
class State:
    """Everything that a checkpoint holds."""

    step: jax.Array  # int32 scalar: updates made
    params: Any
    opt_state: Any


def abstract_params(model, image_shape):
    """Shapes and dtypes of the parameters for images of [H, W, C]."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)['params']


def fresh(key, *, model, tx, image_shape):
    """A state at step 0, with random parameters."""
    params = model.init(key, jnp.zeros((1, *image_shape)))['params']
    return State(jnp.int32(0), params, tx.init(tx.trainable(params)))


def abstract_state(model, tx, image_shape, mesh):
    """The state's shapes, dtypes and shardings; takes no memory."""
    shapes = jax.eval_shape(
        partial(fresh, model=model, tx=tx, image_shape=image_shape), jax.random.key(0)
    )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        sharding.shardings(shapes, mesh),
    )


def init(model, tx, image_shape, seed, abstract):
    """A state at step 0, each shard made on the device that holds it."""
    places = jax.tree.map(lambda x: x.sharding, abstract)
    make = jax.jit(
        partial(fresh, model=model, tx=tx, image_shape=image_shape), out_shardings=places
    )
    return make(jax.random.key(seed))


def begin(params, tx, abstract):
    """A state at step 0 with parameters that were loaded, numpy or JAX arrays, on their devices."""

    def state(params):
        return State(jnp.int32(0), params, tx.init(tx.trainable(params)))

    def place(x, where):
        if where.is_fully_addressable:
            return jax.device_put(x, where)
        x = np.asarray(x)  # each process has all of it, and gives what its own devices hold
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    places = jax.tree.map(lambda x: x.sharding, abstract)
    params = jax.tree.map(place, params, places.params)
    return jax.jit(state, out_shardings=places)(params)


def accumulated(grad_fn, trainable, batch, key, parts):
    """Metrics and gradients of the whole batch from `parts` micro-batches, one at a time."""
    # Examples i, i + parts, ... of each device: no example leaves its device.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    total = jnp.maximum(jnp.sum(batch['mask'].astype(jnp.float32)), 1)

    def body(sums, xs):
        i, micro = xs
        (_, metrics), grads = grad_fn(trainable, micro, jax.random.fold_in(key, i))
        weight = jnp.sum(micro['mask'].astype(jnp.float32)) / total
        return jax.tree.map(lambda s, x: s + weight * x, sums, (metrics, grads)), None

    first = jax.tree.map(lambda x: x[0], split)
    shapes = jax.eval_shape(grad_fn, trainable, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0][1], shapes[1]))
    return jax.lax.scan(body, zeros, (jnp.arange(parts), split))[0]


def train_step(state, batch, *, objective, tx, seed=0, accumulate=1):
    """One update: (state, batch) -> (state, metrics).

    Metrics are float32 scalars: the objective's, lr, grad_norm (before clipping), param_norm (after
    the update) and skipped (examples with mask 0). If loss and norms are finite, the new state is.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    trainable = tx.trainable(state.params)

    def loss_fn(trainable, batch, key):
        return objective(optim.merge(trainable, state.params), batch, key)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate == 1:
        (_, metrics), grads = grad_fn(trainable, batch, key)
    else:
        metrics, grads = accumulated(grad_fn, trainable, batch, key, accumulate)
    updates, opt_state = tx.update(grads, state.opt_state, trainable)
    params = optim.merge(optax.apply_updates(trainable, updates), state.params)
    metrics |= {
        'lr': tx.schedule(state.step),
        'grad_norm': optax.tree.norm(grads),
        'param_norm': optax.tree.norm(params),
        'skipped': jnp.sum(batch['mask'] == 0).astype(jnp.float32),
        **wishes(batch),
    }
    return State(state.step + 1, params, opt_state), metrics


def wishes(batch):
    """{'stop': how many rows of the batch have it} where processes have put that in, see Stop."""
    return {'stop': jnp.sum(batch['stop'])} if 'stop' in batch else {}


def eval_step(params, batch, *, model, loss='softmax', among=None):
    """What a classifier makes of a batch: (sums over mask 1, values by example [B]).

    The sums, float32: hits, losses, examples; hits among the best five, where more classes can be
    predicted; examples, hits and confidence by bin of confidence [3, BINS]; hits and examples by
    class [2, K], where an image has one label. An image without any label counts nowhere. `among`
    [S] are the only classes that may be predicted.
    """
    logits, _ = model.apply({'params': params}, model.normalise(batch['image']))
    logits, labels = logits.astype(jnp.float32), batch['label']
    classes = logits.shape[-1]
    if among is not None:
        logits = jnp.where(jnp.zeros(classes, bool).at[among].set(True), logits, -1e9)
    several = labels.reshape(len(labels), -1)  # [B, L]
    mask = batch['mask'].astype(jnp.float32) * jnp.any(several >= 0, axis=1)
    hits = losses.hits(logits, labels) * mask
    confidence = jnp.max(losses.probabilities(logits, loss), axis=-1)
    bins = jnp.clip((confidence * BINS).astype(int), 0, BINS - 1)
    sums = {
        'accuracy': jnp.sum(hits),
        'loss': jnp.sum(losses.LOSSES[loss](logits, labels) * mask),
        'examples': jnp.sum(mask),
        'bins': jnp.stack(
            [jnp.zeros(BINS).at[bins].add(x) for x in (mask, hits, confidence * mask)]
        ),
        **wishes(batch),
    }
    if (classes if among is None else len(among)) > TOP:  # else all are among the best
        _, best = jax.lax.top_k(logits, TOP)
        among_best = jnp.any(several[:, :, None] == best[:, None], axis=(1, 2))
        sums['top5'] = jnp.sum(among_best * mask)
    if labels.ndim == 1:
        sums['by_class'] = jnp.stack([jnp.zeros(classes).at[labels].add(x) for x in (hits, mask)])
    return sums, {'prediction': jnp.argmax(logits, axis=-1), 'confidence': confidence}


def compiled(objective, tx, abstract, mesh, *, seed=0, accumulate=1):
    """`train_step` as one jitted function: state donated, shardings from the mesh."""
    places = jax.tree.map(lambda x: x.sharding, abstract)
    advance = partial(train_step, objective=objective, tx=tx, seed=seed, accumulate=accumulate)
    return jax.jit(
        sharding.on(mesh, advance),
        donate_argnums=0,
        in_shardings=(places, NamedSharding(mesh, sharding.BATCH)),
        out_shardings=(places, NamedSharding(mesh, PartitionSpec())),
    )
