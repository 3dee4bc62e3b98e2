"""Frozen features measured by nearest neighbours, linear and few-shot classifiers.

Features are computed once. Only the parameters of the linear classifiers are fitted, by L-BFGS or
in closed form, on the device.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax import sharding
from vit_jax.data import mixture, pipeline, tasks
from vit_jax.data.readers import names
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.io.bounds import NonNegative, Positive, Prefetch, Rate, Size, Threads, Workers
from vit_jax.step import stop_votes


def nearest(train, labels, test, *, k, classes, temperature=None, chunk=1024):
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
        dots = jnp.matmul(part, train.T, precision='highest')
        if temperature is None:
            _, near = jax.lax.top_k(2 * dots - jnp.sum(train**2, axis=1), k)
            votes = jnp.ones(near.shape)
        else:
            similar, near = jax.lax.top_k(dots, k)
            votes = jnp.exp((similar - similar[:, :1]) / temperature)
        votes = votes[..., None] * jax.nn.one_hot(labels[near], classes)
        return jnp.argmax(votes.sum(axis=1), axis=1)

    train, labels = jnp.asarray(train, jnp.float32), jnp.asarray(labels)
    parts = (jnp.asarray(test[i : i + chunk], jnp.float32) for i in range(0, len(test), chunk))
    if temperature is not None:
        train, parts = unit(train), map(unit, parts)
    return np.concatenate([vote(part) for part in parts])


def some_of_each(labels, shots, seed):
    """Indices of `shots` random examples of each class, or of all if it has fewer.

    With the same seed, the examples of fewer shots are among those of more.
    """
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [rng.permutation(np.flatnonzero(labels == c))[:shots] for c in np.unique(labels)]
    )


@partial(jax.jit, static_argnames='classes')
def ridge(train, labels, *, classes, l2):
    """(weights [D, K], bias [K]) of regularised least squares from features [N, D].

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


def standardised(train, *others):
    """Features [*, D] with mean 0 and standard deviation 1 over `train`; constant ones become 0."""
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


def score(linear, x, labels):
    """Accuracy of (weights, bias) on features x [M, D]."""
    weights, bias = (np.asarray(a) for a in linear)
    return float(np.mean(np.argmax(x @ weights + bias, axis=1) == labels))


def features(out):
    """Features in a model's outputs, float32.

    token       [B, D]    class token, or the mean of the patches without one
    both        [B, 2 D]  class token and mean of the patches; [B, D] without a class token
    pre_logits  [B, D]    what the head reads, or `token` in a model without pooling
    """
    mean = out['encoded'].mean(axis=1)
    token = out.get('cls', mean)
    both = jnp.concatenate([token, mean], axis=1) if 'cls' in out else mean
    pre_logits = out['pre_logits'] if out['pre_logits'].ndim == 2 else token
    found = dict(token=token, both=both, pre_logits=pre_logits)
    return {name: x.astype(jnp.float32) for name, x in found.items()}


def metrics(*, k, pixels, l2, shots, **settings):
    """{metric: 'max'}: the accuracies that an evaluation with these settings measures."""
    kinds = ('', '_cosine', '_pixels') if pixels else ('', '_cosine')
    names = [] if l2 is None else ['accuracy']
    names += [f'{n}_nn{kind}' for n in k for kind in kinds] + [f'{n}_shot' for n in shots]
    return dict.fromkeys(names, 'max')


class Probe:
    """Measures frozen features by classifiers trained on `train_source` and tested on `source`.

    - accuracy: logistic regression on class token and patch mean together, standardised
    - N_nn: vote of the N nearest class tokens (patch means in a model without one)
    - N_nn_cosine: the same, weighted by cosine similarity (arXiv:1805.01978 section 3.4)
    - N_nn_pixels: vote of the N nearest images, without the model
    - N_shot: least squares on the standardised pre-logits of N images per class, mean over random
      draws (arXiv:2010.11929 section 4.1); N_shot_std is the standard deviation

    Args:
      source: the data set to test on, see Data sets.
      train_source: the data set to train the classifiers on.
      image_size: size of the images in pixels: one number, or (height, width).
      batch_size: examples in a batch, over all devices and processes.
      view: how an image is cropped and resized, see Views.
      k: numbers N of nearest neighbours.
      pixels: whether to measure N_nn_pixels.
      temperature: temperature of the weights in N_nn_cosine.
      l2: penalty of the logistic regression. None: no regression.
      shots: numbers N of training images per class in N_shot.
      seeds: random draws of the training images in N_shot.
      shot_l2: penalty of the least squares in N_shot. The paper gives none; big_vision has 2^10.
      threads, workers, prefetch, tolerance: as in the section `data`.
    """

    def __init__(
        self,
        subject,
        *,
        source: dict,
        train_source: dict,
        image_size: Size,
        batch_size: Positive[int],
        view: str | dict = 'resize',
        k: tuple[Positive[int], ...] = (10, 20),
        pixels: bool = False,
        temperature: Positive[float] = 0.07,
        l2: NonNegative[float] | None = 1.0,
        shots: tuple[Positive[int], ...] = (),
        seeds: Positive[int] = 3,
        shot_l2: NonNegative[float] = 1024.0,
        threads: Threads | None = None,
        workers: Workers = 0,
        prefetch: Prefetch = 8,
        tolerance: Rate = 0.0,
    ):
        self.mesh = mesh = subject.mesh
        self.k, self.pixels, self.l2 = k, pixels, l2
        self.temperature, self.shots, self.seeds, self.shot_l2 = temperature, shots, seeds, shot_l2
        own, self.train_source = mixture.load(**source), mixture.load(**train_source)
        self.source = names.relabel(
            own, self.train_source.classes, f'data set {mixture.title(source)}', "train_source's"
        )
        if len(self.source.classes) > len(self.train_source.classes):
            raise UserError(
                f'evals: source has {len(self.source.classes)} classes, train_source '
                f'{len(self.train_source.classes)}'
            )
        for name, one in ('source', self.source), ('train_source', self.train_source):
            if (getattr(one.records, 'max_labels', None) or 1) > 1:
                raise UserError(f'evals: {name} has several labels an image, a probe needs one')
        if max(k, default=0) > len(self.train_source):
            raise UserError(f'evals: k is {tuple(k)}, of {len(self.train_source)} training images')
        sharding.check_batch(batch_size, mesh)
        self.sources = {'source': self.source, 'train_source': self.train_source}
        self.task = partial(tasks.classify, view=view, image_size=image_size)
        self.feed = partial(
            pipeline.examples, rows=sharding.rows(batch_size, mesh), batch_size=batch_size,
            threads=threads, workers=workers, prefetch=prefetch, tolerance=tolerance,
        )  # fmt: skip
        replicated = NamedSharding(mesh, PartitionSpec())
        self.step = jax.jit(
            lambda params, batch: (
                dict(
                    **features(subject.predict(params, batch)), labels=batch['label'],
                    **({'pixels': batch['image']} if pixels else {}),
                ),
                batch['mask'], stop_votes(batch),
            ),
            out_shardings=replicated,
        )  # fmt: skip

    def gathered(self, params, source, stop, set_phase, advance=lambda images: None):
        """`features` and `labels` [N] of all images, and `pixels` [N, H * W * 3] if measured.

        Returns None if `stop` becomes true.
        """
        parts = []
        for i, batch in enumerate(self.feed(source, self.task(source), stop=stop)):
            set_phase(f'evaluation, batch {i}' if i else 'compile, of an evaluation')
            batch = sharding.put(stop.add_vote(batch), self.mesh)
            values, mask, votes = self.step(params, batch)
            stop.read_votes(votes)
            if stop:
                return None
            kept = np.asarray(mask) > 0
            parts.append({name: np.asarray(v)[kept] for name, v in values.items()})
            advance(int(np.sum(kept)))
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if self.pixels:
            whole['pixels'] = whole['pixels'].reshape(len(whole['pixels']), -1).astype(np.float32)
        return whole

    def few_shot(self, train, test):
        """{'5_shot': mean, '5_shot_std': deviation, ...} from the results of `gathered`."""
        results, classes = {}, len(self.train_source.classes)
        for shots in self.shots:
            scores = []
            for seed in range(self.seeds):
                some = some_of_each(train['labels'], shots, seed)
                x, y = standardised(train['pre_logits'][some], test['pre_logits'])
                scores.append(score(
                    ridge(x, train['labels'][some], classes=classes, l2=self.shot_l2),
                    y, test['labels'],
                ))  # fmt: skip
            results[f'{shots}_shot'] = float(np.mean(scores))
            results[f'{shots}_shot_std'] = float(np.std(scores))
        return results

    def __call__(
        self, params, stop=None, set_phase=lambda phase: None, advance=lambda images: None
    ):  # fmt: skip
        """{metric: accuracy} and `examples`; None if `stop` becomes true.

        Calls `at` and `advance` as `evaluators.totals` does.
        """
        stop = Stop() if stop is None else stop
        train = self.gathered(params, self.train_source, stop, set_phase, advance)
        if train is None:
            return None
        test = self.gathered(params, self.source, stop, set_phase, advance)
        if test is None:
            return None
        set_phase('compile, of a classifier')
        labels, wanted, classes = train['labels'], test['labels'], len(self.train_source.classes)
        results = {}
        if self.l2 is not None:
            x, y = standardised(train['both'], test['both'])
            linear = logistic(x, labels, classes=classes, l2=self.l2)
            results['accuracy'] = score(linear, y, wanted)
        kinds = [('', 'token', None), ('_cosine', 'token', self.temperature)]
        kinds += [('_pixels', 'pixels', None)] if self.pixels else []
        for k in self.k:
            for name, kind, temperature in kinds:
                predicted = nearest(
                    train[kind], labels, test[kind], k=k, classes=classes, temperature=temperature
                )
                results[f'{k}_nn{name}'] = float(np.mean(predicted == wanted))
        return results | self.few_shot(train, test) | {'examples': len(wanted)}


probe = Probe  # by its name in a config
