"""What frozen features know: nearest neighbours and a linear classifier, beside raw pixels.

Features are computed once, by the model alone; no parameter is trained but those of the linear
classifier, which L-BFGS finds on the device.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax import sharding, step
from vit_jax.data import mixture, pipeline
from vit_jax.errors import UserError
from vit_jax.stop import Stop


def nearest(train, labels, test, *, k, classes, chunk=1024):
    """Predicted labels [M] by a vote among the k nearest of `train` [N, D] to each of `test`
    [M, D], in Euclidean distance; of classes with equal votes the one with the lowest number."""

    @jax.jit
    def vote(part):
        # |a - b|^2 without |a|^2, which is the same for all; float32 products in full
        dots = jnp.matmul(part, train.T, precision='highest')
        _, near = jax.lax.top_k(2 * dots - jnp.sum(train**2, axis=1), k)
        return jnp.argmax(jax.nn.one_hot(labels[near], classes).sum(axis=1), axis=1)

    train, labels = jnp.asarray(train, jnp.float32), jnp.asarray(labels)
    return np.concatenate(
        [vote(jnp.asarray(test[i : i + chunk], jnp.float32)) for i in range(0, len(test), chunk)]
    )


def standardised(train, *others):
    """Features [*, D] with mean 0 and deviation 1 over `train`; constant ones become 0."""
    mean, std = (f(train, axis=0, dtype=np.float64) for f in (np.mean, np.std))
    std = np.where(std > 0, std, 1)
    return [((x - mean) / std).astype(np.float32) for x in (train, *others)]


def logistic(train, labels, *, classes, l2=1.0, steps=1000, tolerance=1e-4):
    """(weights [D, K], bias [K]) of multinomial logistic regression by L-BFGS.

    Minimises the summed cross-entropy + l2 / 2 |weights|^2, as scikit-learn does with C = 1 / l2,
    until no entry of its mean's gradient exceeds `tolerance` or `steps` are done.
    """
    train, labels = jnp.asarray(train, jnp.float32), jnp.asarray(labels)

    def loss(params):
        logits = jnp.matmul(train, params[0], precision='highest') + params[1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses) + l2 / (2 * len(train)) * jnp.sum(params[0] ** 2)

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


def features(model, params, images):
    """(class token [B, D], or the mean of the patches without one; the linear classifier's
    [B, 2 D], class token and mean together, or the mean alone) of uint8 images [B, H, W, 3]."""
    _, out = model.apply({'params': params}, model.normalise(images))
    mean = out['encoded'].mean(axis=1).astype(jnp.float32)
    if 'cls' not in out:
        return mean, mean
    cls = out['cls'].astype(jnp.float32)
    return cls, jnp.concatenate([cls, mean], axis=1)


class Probe:
    """An evaluation of frozen features, trained on `train_source` and tested on `source`.

    Gives `accuracy` (logistic regression on standardised class token and patch mean together,
    penalty `l2`), `knn` (k nearest class tokens) and `knn_pixels` (k nearest images, no model).
    """

    def __init__(
        self,
        model,
        mesh,
        *,
        type: str = 'probe',
        source: dict,
        train_source: dict,
        image_size: int | tuple,
        batch_size: int,
        view: str | dict = 'resize',
        k: int = 10,
        l2: float = 1.0,
        every: int = 0,
        threads: int | None = None,
        workers: int = 0,
        prefetch: int = 8,
        tolerance: float = 0.0,
    ):
        self.mesh, self.every, self.k, self.l2 = mesh, every, k, l2
        self.source, self.train_source = mixture.load(**source), mixture.load(**train_source)
        if self.source.classes != self.train_source.classes:
            raise UserError('evals: source and train_source have different classes')
        if not 0 < k <= len(self.train_source):
            raise UserError(f'evals: k is {k}, of {len(self.train_source)} training images')
        sharding.check_batch(batch_size, mesh)
        self.feed = partial(
            pipeline.examples, rows=sharding.rows(batch_size, mesh), view=view,
            image_size=image_size, batch_size=batch_size, threads=threads, workers=workers,
            prefetch=prefetch, tolerance=tolerance,
        )  # fmt: skip
        replicated = NamedSharding(mesh, PartitionSpec())
        self.step = jax.jit(
            lambda params, batch: (
                (*features(model, params, batch['image']), batch['image'], batch['label']),
                batch['mask'], step.wishes(batch),
            ),
            out_shardings=replicated,
        )  # fmt: skip

    def due(self, n, steps):
        return n == steps or (n > 0 and self.every > 0 and n % self.every == 0)

    def gathered(self, params, source, stop, at):
        """(tokens [N, D], both [N, 2 D], pixels [N, H * W * 3], labels [N]); None if stopped."""
        parts = []
        for i, batch in enumerate(self.feed(source)):
            at(f'evaluation, batch {i}' if i else 'compile, of an evaluation')
            batch = sharding.put(stop.within(batch), self.mesh)
            values, mask, wishes = self.step(params, batch)
            stop.hear(wishes)
            if stop:
                return None
            kept = np.asarray(mask) > 0
            parts.append([np.asarray(v)[kept] for v in values])
        token, both, pixels, labels = (np.concatenate(p) for p in zip(*parts, strict=True))
        return token, both, pixels.reshape(len(pixels), -1).astype(np.float32), labels

    def __call__(self, params, stop=None, at=lambda phase: None):
        """{'accuracy', 'knn', 'knn_pixels', 'examples'}; None where `stop` became true.

        `at` is told of each batch, as hosts.joined wants it.
        """
        stop = Stop() if stop is None else stop
        train = self.gathered(params, self.train_source, stop, at)
        test = self.gathered(params, self.source, stop, at) if train is not None else None
        if test is None:
            return None
        at('compile, of a classifier')
        labels, wanted, classes = train[3], test[3], len(self.source.classes)
        results = {}
        x, y = standardised(train[1], test[1])
        weights, bias = logistic(x, labels, classes=classes, l2=self.l2)
        predicted = np.argmax(y @ np.asarray(weights) + np.asarray(bias), axis=1)
        results['accuracy'] = float(np.mean(predicted == wanted))
        for name, i in (('knn', 0), ('knn_pixels', 2)):
            predicted = nearest(train[i], labels, test[i], k=self.k, classes=classes)
            results[name] = float(np.mean(predicted == wanted))
        return results | {'examples': len(wanted)}
