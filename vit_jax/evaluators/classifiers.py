"""Classifiers on features: nearest neighbours, least squares, logistic regression."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

Linear = tuple[jax.Array, jax.Array]  # weights [D, K], bias [K]


def nearest(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    k: int,
    classes: int,
    temperature: float | None = None,
    chunk: int = 1024,
) -> np.ndarray:
    """Predicted labels [M] by the k nearest of `train` [N, D] to each of `test` [M, D].

    Without a temperature, the nearest in Euclidean distance vote; with one, those of largest cosine
    similarity s, with weights exp(s / temperature) (arXiv:1805.01978 section 3.4). In a tie the
    class with the lowest number is predicted.
    """

    def unit(x):
        return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    @jax.jit
    def vote(part):
        # |a - b|^2 without |a|^2, which is the same for all; products in full float32
        dots = jnp.matmul(part, x.T, precision='highest')
        if temperature is None:
            _, near = jax.lax.top_k(2 * dots - jnp.sum(x**2, axis=1), k)
            votes = jnp.ones(near.shape)
        else:
            similar, near = jax.lax.top_k(dots, k)
            votes = jnp.exp((similar - similar[:, :1]) / temperature)
        votes = votes[..., None] * jax.nn.one_hot(y[near], classes)
        return jnp.argmax(votes.sum(axis=1), axis=1)

    x, y = jnp.asarray(train, jnp.float32), jnp.asarray(labels)
    parts = (jnp.asarray(test[i : i + chunk], jnp.float32) for i in range(0, len(test), chunk))
    if temperature is not None:
        x, parts = unit(x), map(unit, parts)
    return np.concatenate([vote(part) for part in parts])


def sample_per_class(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Indices of `shots` random examples of each class, or of all if it has fewer.

    With the same seed, the examples of fewer shots are among those of more.
    """
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [rng.permutation(np.flatnonzero(labels == c))[:shots] for c in np.unique(labels)]
    )


@partial(jax.jit, static_argnames='classes')
def fit_ridge(
    train: jax.Array | np.ndarray, labels: jax.Array | np.ndarray, *, classes: int, l2: float
) -> Linear:
    """Fits regularised least squares to features [N, D] and labels [N].

    The targets are 1 for the example's class and -1 for others (arXiv:2010.11929 section 4.1).
    Minimises the sum of squares + l2 |weights|^2 in closed form, as scikit-learn's Ridge does with
    alpha = l2; the bias has no penalty.
    """
    dot = partial(jnp.matmul, precision='highest')
    inverse = partial(jax.scipy.linalg.solve, assume_a='pos')
    targets = 2 * jax.nn.one_hot(labels, classes) - 1
    x_mean, y_mean = jnp.mean(train, axis=0), jnp.mean(targets, axis=0)
    x, y = train - x_mean, targets - y_mean
    n, d = x.shape
    if n > d:
        weights = inverse(dot(x.T, x) + l2 * jnp.eye(d), dot(x.T, y))
    else:  # the same weights, by the smaller of the two matrices
        weights = dot(x.T, inverse(dot(x, x.T) + l2 * jnp.eye(n), y))
    return weights, y_mean - dot(x_mean, weights)


def standardise(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Scales features [*, D] to mean 0 and deviation 1 over `train`; constant ones become 0."""
    mean, std = (f(train, axis=0, dtype=np.float64) for f in (np.mean, np.std))
    std = np.where(std > 0, std, 1)
    return [((x - mean) / std).astype(np.float32) for x in (train, *others)]


def fit_logistic(
    train: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int,
    l2: float = 1.0,
    steps: int = 1000,
    tolerance: float = 1e-4,
) -> Linear:
    """Fits multinomial logistic regression to features [N, D] and labels [N] by L-BFGS.

    Minimises the summed cross-entropy + l2 / 2 |weights|^2, as scikit-learn does with C = 1 / l2,
    until no entry of its mean's gradient exceeds `tolerance` or `steps` are done.
    """
    x, y = jnp.asarray(train, jnp.float32), jnp.asarray(labels)

    def loss(params):
        logits = jnp.matmul(x, params[0], precision='highest') + params[1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.mean(losses) + l2 / (2 * len(x)) * jnp.sum(params[0] ** 2)

    solver = optax.lbfgs(memory_size=20)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def advance(carry):
        params, state, _ = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(
            grad, state, params, value=value, grad=grad, value_fn=loss
        )
        return optax.apply_updates(params, updates), state, optax.tree.norm(grad, ord=jnp.inf)

    def unfinished(carry):
        _, state, largest = carry
        return (optax.tree.get(state, 'count') < steps) & (largest > tolerance)

    @jax.jit
    def solve(params):
        return jax.lax.while_loop(unfinished, advance, (params, solver.init(params), jnp.inf))[0]

    return solve((jnp.zeros((train.shape[1], classes)), jnp.zeros(classes)))


def linear_accuracy(linear: Linear, x: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy of a linear classifier on features [M, D]."""
    weights, bias = (np.asarray(a) for a in linear)
    return float(np.mean(np.argmax(x @ weights + bias, axis=1) == labels))
