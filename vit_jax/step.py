"""The state of a run and the pure functions that advance it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax import optim, sharding
from vit_jax.models import interface
from vit_jax.objectives import Objective, check_extra, check_metrics
from vit_jax.optim.sharpness import ascended


@flax.struct.dataclass
class State:
    """State of training, all of which a checkpoint contains."""

    step: jax.Array  # int32 scalar: number of updates
    params: Any
    opt_state: Any
    extra: Any = flax.struct.field(default_factory=dict)  # state of the objective


def abstract_params(objective: Objective) -> Any:
    """The tree of parameters, as shapes and dtypes."""
    return jax.eval_shape(objective.init, jax.random.key(0))


def state_at_0(params: Any, *, objective: Objective, tx: optim.Optimizer) -> State:
    """A state at step 0 with these parameters."""
    return State(jnp.int32(0), params, tx.init(tx.trainable(params)), objective.extra(params))


def fresh(key: jax.Array, *, objective: Objective, tx: optim.Optimizer) -> State:
    """A state at step 0 with random parameters."""
    return state_at_0(objective.init(key), objective=objective, tx=tx)


def abstract_state(objective: Objective, tx: optim.Optimizer, mesh: Mesh) -> State:
    """Shapes, dtypes and shardings of the state, without allocating it."""
    begin = partial(state_at_0, objective=objective, tx=tx)
    shapes = jax.eval_shape(begin, abstract_params(objective))  # JAX has these cached
    return sharding.add_shardings(shapes, sharding.shardings(shapes, mesh, objective.rules))


def init(objective: Objective, tx: optim.Optimizer, seed: int, abstract: State) -> State:
    """A state at step 0 with random parameters, each shard created on its device."""
    begin = partial(fresh, objective=objective, tx=tx)
    make = jax.jit(begin, out_shardings=sharding.shardings_of(abstract))
    return make(jax.random.key(seed))


def random_params(objective: Objective, seed: int, abstract: State) -> Any:
    """The parameters of `init`, each shard created on its device."""
    make = jax.jit(objective.init, out_shardings=sharding.shardings_of(abstract).params)
    return make(jax.random.key(seed))


def begin(params: Any, objective: Objective, tx: optim.Optimizer, abstract: State) -> State:
    """A state at step 0 with loaded parameters, numpy or JAX arrays, sharded as `abstract` is."""
    shardings = sharding.shardings_of(abstract)
    make = jax.jit(partial(state_at_0, objective=objective, tx=tx), out_shardings=shardings)
    return make(on_devices(params, shardings.params))


def on_devices(tree: Any, shardings: Any) -> Any:
    """Makes global arrays with these shardings from arrays that each process has in full."""

    def place(x, sharding):
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, shardings)


def frozen(objective: Objective, mesh: Mesh) -> Any:
    """The objective's frozen arrays, on their devices."""
    shardings = sharding.by_name(objective.frozen, mesh, objective.rules)
    return on_devices(objective.frozen, shardings)


def accumulated(
    grad_fn: Callable, trainable: Any, batch: dict[str, jax.Array], key: jax.Array, parts: int
) -> tuple[dict[str, jax.Array], Any, Any]:
    """(metrics, aux, gradients) of a batch, accumulated over `parts` micro-batches in sequence.

    Each is the mean weighted by the number of examples with mask 1 in a micro-batch.
    """
    # Micro-batch i has examples i, i + parts, ... of each device, so none leaves its device.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    total = jnp.maximum(jnp.sum(batch['mask'].astype(jnp.float32)), 1)

    def body(sums, xs):
        i, micro = xs
        (_, outputs), grads = grad_fn(trainable, micro, jax.random.fold_in(key, i))
        weight = jnp.sum(micro['mask'].astype(jnp.float32)) / total
        return jax.tree.map(lambda s, x: s + weight * x, sums, (*outputs, grads)), None

    first = jax.tree.map(lambda x: x[0], split)
    (_, outputs), grads = jax.eval_shape(grad_fn, trainable, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (*outputs, grads))
    return jax.lax.scan(body, zeros, (jnp.arange(parts), split))[0]


def checked_loss(objective: Objective, *arguments: Any) -> tuple[jax.Array, tuple[dict, Any]]:
    """`objective.loss`; raises UserError, while it is traced, for metrics of another form."""
    loss, (metrics, aux) = objective.loss(*arguments)
    check_metrics(metrics)
    return loss, (metrics, aux)


def checked_update(objective: Objective, extra: Any, *arguments: Any) -> Any:
    """`objective.update`; raises UserError, while it is traced, for another structure."""
    updated = objective.update(extra, *arguments)
    check_extra(extra, updated)
    return updated


def check(objective: Objective, state: State, batch: dict[str, Any], frozen: Any) -> None:
    """Traces loss and update for shapes of state and batch; raises UserError as the step does."""

    def outputs(state, batch, frozen):
        tail = (batch, jax.random.key(0), state.step)
        _, (_, aux) = checked_loss(objective, state.params, state.extra, frozen, *tail)
        return checked_update(objective, state.extra, state.params, aux, state.step)

    jax.eval_shape(outputs, state, batch, frozen)


def train_step(
    state: State,
    batch: dict[str, jax.Array],
    frozen: Any,
    *,
    objective: Objective,
    tx: optim.Optimizer,
    seed: int = 0,
    accumulate: int = 1,
) -> tuple[State, dict[str, jax.Array]]:
    """One update: (state, batch, frozen) -> (state, metrics).

    Metrics are float32 scalars: the objective's, lr, grad_norm (before clipping; with optim.sam_rho
    that of the gradient uphill), param_norm (after the update) and skipped (examples with mask 0).
    If loss and norms are finite, the new state is.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    trainable = tx.trainable(state.params)

    def loss_fn(trainable, batch, key):
        params = optim.merge(trainable, state.params)
        return checked_loss(objective, params, state.extra, frozen, batch, key, state.step)

    def gradients(trainable):
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        if accumulate > 1:
            return accumulated(grad_fn, trainable, batch, key, accumulate)
        (_, (metrics, aux)), grads = grad_fn(trainable, batch, key)
        return metrics, aux, grads

    metrics, aux, grads = gradients(trainable)
    if tx.sam_rho:  # metrics and aux remain those of the parameters themselves
        *_, grads = gradients(ascended(trainable, grads, tx.sam_rho))
    updates, opt_state = tx.update(grads, state.opt_state, trainable)
    params = optim.merge(optax.apply_updates(trainable, updates), state.params)
    extra = checked_update(objective, state.extra, params, aux, state.step)
    metrics |= {
        'lr': tx.schedule(state.step),
        'grad_norm': optax.tree.norm(grads),
        'param_norm': optax.tree.norm(params),
        'skipped': jnp.sum(batch['mask'] == 0).astype(jnp.float32),
        **stop_votes(batch),
    }
    return State(state.step + 1, params, opt_state, extra), metrics


def stop_votes(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """{'stop': number of rows that vote to stop} if the batch has votes (stop.Stop), else {}."""
    return {'stop': jnp.sum(batch['stop'])} if 'stop' in batch else {}


def compiled(
    objective: Objective,
    tx: optim.Optimizer,
    abstract: State,
    mesh: Mesh,
    *,
    seed: int = 0,
    accumulate: int = 1,
    precision: interface.Precision | None = None,
) -> Callable[[State, dict[str, jax.Array], Any], tuple[State, dict[str, jax.Array]]]:
    """`train_step` as one jitted function: state donated, shardings from the mesh.

    `precision` is that of products of float32 values, gradients included; None: the device's.
    """
    shardings = sharding.shardings_of(abstract)
    advance = partial(train_step, objective=objective, tx=tx, seed=seed, accumulate=accumulate)
    advance = interface.computed_at(precision, advance)
    return jax.jit(
        sharding.with_mesh(mesh, advance),
        donate_argnums=0,
        in_shardings=(
            shardings,
            NamedSharding(mesh, sharding.BATCH),
            sharding.by_name(objective.frozen, mesh, objective.rules),
        ),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
    )


class Programs:
    """The jitted functions of a run's steps: one, or one for each of the objective's variants.

    Arguments are those of `compiled`.
    """

    def __init__(self, objective: Objective, *arguments: Any, seed: int = 0, **settings: Any):
        self.objective, self.seed = objective, seed
        self.make = lambda objective: compiled(objective, *arguments, seed=seed, **settings)
        self.made = {}

    def of(self, n: int) -> tuple[Callable, bool]:
        """(function that `compiled` returns for step n from 0, whether it is new)."""
        name = self.objective.variant(self.seed, n) if self.objective.variants else None
        new = name not in self.made
        if new:
            objective = self.objective
            if name is not None:
                objective = objective._replace(loss=objective.variants[name])
            self.made[name] = self.make(objective)
        return self.made[name], new
