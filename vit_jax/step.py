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


@flax.struct.dataclass
class State:
    """State of training, all of which a checkpoint contains."""

    step: jax.Array  # int32 scalar: number of updates
    params: Any
    opt_state: Any
    extra: Any = flax.struct.field(default_factory=dict)  # state of the objective


def abstract_params(objective):
    """Shapes and dtypes of the parameters."""
    return jax.eval_shape(objective.init, jax.random.key(0))


def state_at_0(params, *, objective, tx):
    """A state at step 0 with these parameters."""
    return State(jnp.int32(0), params, tx.init(tx.trainable(params)), objective.extra(params))


def fresh(key, *, objective, tx):
    """A state at step 0 with random parameters."""
    return state_at_0(objective.init(key), objective=objective, tx=tx)


def abstract_state(objective, tx, mesh):
    """Shapes, dtypes and shardings of the state, without allocating it."""
    shapes = jax.eval_shape(partial(fresh, objective=objective, tx=tx), jax.random.key(0))
    return sharding.placed(shapes, sharding.shardings(shapes, mesh, objective.rules))


def init(objective, tx, seed, abstract):
    """A state at step 0 with random parameters, each shard created on its device."""
    begin = partial(fresh, objective=objective, tx=tx)
    make = jax.jit(begin, out_shardings=sharding.places(abstract))
    return make(jax.random.key(seed))


def begin(params, objective, tx, abstract):
    """A state at step 0 with loaded parameters, numpy or JAX arrays, sharded as `abstract` is."""
    where = sharding.places(abstract)
    make = jax.jit(partial(state_at_0, objective=objective, tx=tx), out_shardings=where)
    return make(on_devices(params, where.params))


def on_devices(tree, where):
    """Makes global arrays with the shardings `where` from arrays that each process has in full."""

    def place(x, sharding):
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, where)


def frozen(objective, mesh):
    """The objective's frozen arrays, on their devices."""
    where = sharding.by_name(objective.frozen, mesh, objective.rules)
    return on_devices(objective.frozen, where)


def accumulated(grad_fn, trainable, batch, key, parts):
    """(metrics, aux, gradients) of a batch, accumulated over `parts` micro-batches in sequence.

    Each is the mean weighted by the number of examples with mask 1 in a micro-batch.
    """
    # Micro-batch i has examples i, i + parts, ... of each device, so none leaves its device.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    total = jnp.maximum(jnp.sum(batch['mask'].astype(jnp.float32)), 1)

    def body(sums, xs):
        i, micro = xs
        (_, found), grads = grad_fn(trainable, micro, jax.random.fold_in(key, i))
        weight = jnp.sum(micro['mask'].astype(jnp.float32)) / total
        return jax.tree.map(lambda s, x: s + weight * x, sums, (*found, grads)), None

    first = jax.tree.map(lambda x: x[0], split)
    (_, found), grads = jax.eval_shape(grad_fn, trainable, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (*found, grads))
    return jax.lax.scan(body, zeros, (jnp.arange(parts), split))[0]


def train_step(state, batch, frozen, *, objective, tx, seed=0, accumulate=1):
    """One update: (state, batch, frozen) -> (state, metrics).

    Metrics are float32 scalars: the objective's, lr, grad_norm (before clipping), param_norm (after
    the update) and skipped (examples with mask 0). If loss and norms are finite, the new state is.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    trainable = tx.trainable(state.params)

    def loss_fn(trainable, batch, key):
        params = optim.merge(trainable, state.params)
        return objective.loss(params, state.extra, frozen, batch, key, state.step)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate == 1:
        (_, (metrics, aux)), grads = grad_fn(trainable, batch, key)
    else:
        metrics, aux, grads = accumulated(grad_fn, trainable, batch, key, accumulate)
    updates, opt_state = tx.update(grads, state.opt_state, trainable)
    params = optim.merge(optax.apply_updates(trainable, updates), state.params)
    extra = objective.update(state.extra, params, aux, state.step)
    metrics |= {
        'lr': tx.schedule(state.step),
        'grad_norm': optax.tree.norm(grads),
        'param_norm': optax.tree.norm(params),
        'skipped': jnp.sum(batch['mask'] == 0).astype(jnp.float32),
        **stop_votes(batch),
    }
    return State(state.step + 1, params, opt_state, extra), metrics


def stop_votes(batch):
    """{'stop': number of rows that vote to stop} if the batch has votes (stop.Stop), else {}."""
    return {'stop': jnp.sum(batch['stop'])} if 'stop' in batch else {}


def compiled(objective, tx, abstract, mesh, *, seed=0, accumulate=1):
    """`train_step` as one jitted function: state donated, shardings from the mesh."""
    places = sharding.places(abstract)
    advance = partial(train_step, objective=objective, tx=tx, seed=seed, accumulate=accumulate)
    return jax.jit(
        sharding.with_mesh(mesh, advance),
        donate_argnums=0,
        in_shardings=(
            places,
            NamedSharding(mesh, sharding.BATCH),
            sharding.by_name(objective.frozen, mesh, objective.rules),
        ),
        out_shardings=(places, NamedSharding(mesh, PartitionSpec())),
    )
