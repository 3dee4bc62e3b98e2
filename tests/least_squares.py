"""Least squares of stacked and other parameters, and what an optimizer of ours makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax import optim
from vit_jax.models import parameters

SHAPES = {  # stacks of two layers, and of more than Adafactor factors
    'embedding/kernel': (4, 4, 3, 36), 'encoder/attn/qkv/kernel': (2, 36, 3, 2, 33),
    'encoder/attn/out/kernel': (2, 2, 33, 36), 'encoder/mlp/fc1/kernel': (2, 36, 40),
    'encoder/mlp/fc1/bias': (34, 40), 'posemb': (1, 37, 36), 'head/kernel': (36, 10),
    'head/bias': (10,),
}  # fmt: skip


def tree(leaves):
    """A nested dict of leaves by name."""
    nested = {}
    for name, leaf in leaves.items():
        *parents, last = name.split('/')
        part = nested
        for parent in parents:
            part = part.setdefault(parent, {})
        part[last] = leaf
    return nested


def problem(steps, seed=0):
    """(parameters by name, gradient(t, parameters)) of noisy, badly scaled least squares."""
    rng = np.random.default_rng(seed)
    normal = lambda shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    start, target = ({n: normal(s) for n, s in SHAPES.items()} for _ in range(2))
    scale = {n: 10 ** normal(s) for n, s in SHAPES.items()}
    noise = [{n: normal(s) for n, s in SHAPES.items()} for _ in range(steps)]

    def gradient(t, values):
        return {n: scale[n] * (values[n] - target[n] + noise[t][n]) for n in values}

    return start, gradient


def ours(start, gradient, steps, count=0, **fields):
    """Parameters by name after each step, from a state at update `count` on."""
    params = tree(start)
    tx = optim.make(params, 10_000, **fields)
    state = optax.tree.set(tx.init(params), count=jnp.int32(count))
    update, found = jax.jit(tx.update), []
    for t in range(steps):
        grads = tree(gradient(t, parameters.named_leaves(params)))
        updates, state = update(grads, state, params)
        params = jax.device_get(optax.apply_updates(params, updates))
        found.append(parameters.named_leaves(params))
    return found, state


def assert_close(found, expected, start):
    """Parameters by name differ by less than 3e-5 of the way that they have come, on average."""
    for name, value in expected.items():
        moved, error = (np.abs(value - x[name]).mean() for x in (start, found))
        assert error < 3e-5 * moved, (name, error / moved)


def layers_of(name, array):
    """The arrays that are parameters of their own in PyTorch: the layers of a stack."""
    return list(array) if name.startswith('encoder/') else [array]
