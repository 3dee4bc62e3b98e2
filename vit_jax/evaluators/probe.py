"""Frozen features measured by nearest neighbours, linear and few-shot classifiers.

Features are computed once. Only the parameters of the linear classifiers are fitted, by L-BFGS or
in closed form, on the device.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax import sharding
from vit_jax.data import mixture
from vit_jax.data.readers import names
from vit_jax.data.sources import Source
from vit_jax.data.tasks import classify
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.evaluators import Subject, classifiers, reader
from vit_jax.io.bounds import NonNegative, Positive, Prefetch, Rate, Size, Threads, Workers
from vit_jax.step import stop_votes


def features(out: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Selects the features in a model's outputs, float32.

    token       [B, D]    class token, or the mean of the patches without one
    both        [B, 2 D]  class token and mean of the patches; [B, D] without a class token
    pre_logits  [B, D]    what the head reads, or `token` in a model without pooling
    """
    mean = out['encoded'].mean(axis=1)
    token = out.get('cls', mean)
    both = jnp.concatenate([token, mean], axis=1) if 'cls' in out else mean
    pre_logits = out['pre_logits'] if out['pre_logits'].ndim == 2 else token
    selected = dict(token=token, both=both, pre_logits=pre_logits)
    return {name: x.astype(jnp.float32) for name, x in selected.items()}


def metrics(
    *, k: Sequence[int], pixels: bool, l2: float | None, shots: Sequence[int], **settings: Any
) -> dict[str, str]:
    """Names the accuracies that an evaluation with these settings measures, {metric: 'max'}."""
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
        subject: Subject,
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
    ) -> None:
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
                raise UserError(f'evals: {name} has several labels per image; a probe needs one')
        if max(k, default=0) > len(self.train_source):
            raise UserError(
                f'evals: k is {tuple(k)}; there are {len(self.train_source)} training images'
            )
        self.sources = {'source': self.source, 'train_source': self.train_source}
        self.task = partial(classify.classify, view=view, image_size=image_size)
        self.feed = reader(
            mesh, batch_size, threads=threads, workers=workers, prefetch=prefetch,
            tolerance=tolerance,
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

    def compute_features(
        self,
        params: Any,
        source: Source,
        stop: Stop,
        set_phase: Callable[[str], None],
        advance: Callable[[int], None] = lambda images: None,
    ) -> dict[str, np.ndarray] | None:
        """Computes `features` of all images, with `labels` [N] and, if measured, `pixels` [N, P].

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
            unmasked = np.asarray(mask) > 0
            parts.append({name: np.asarray(v)[unmasked] for name, v in values.items()})
            advance(int(np.sum(unmasked)))
        results = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if self.pixels:
            pixels = results['pixels']
            results['pixels'] = pixels.reshape(len(pixels), -1).astype(np.float32)
        return results

    def few_shot(
        self, train: Mapping[str, np.ndarray], test: Mapping[str, np.ndarray]
    ) -> dict[str, float]:
        """Measures {'5_shot': mean, '5_shot_std': deviation} on results of `compute_features`."""
        results, classes = {}, len(self.train_source.classes)
        for shots in self.shots:
            scores = []
            for seed in range(self.seeds):
                some = classifiers.sample_per_class(train['labels'], shots, seed)
                x, y = classifiers.standardise(train['pre_logits'][some], test['pre_logits'])
                labels = train['labels'][some]
                linear = classifiers.fit_ridge(x, labels, classes=classes, l2=self.shot_l2)
                scores.append(classifiers.linear_accuracy(linear, y, test['labels']))
            results[f'{shots}_shot'] = float(np.mean(scores))
            results[f'{shots}_shot_std'] = float(np.std(scores))
        return results

    def __call__(
        self,
        params: Any,
        stop: Stop | None = None,
        set_phase: Callable[[str], None] = lambda phase: None,
        advance: Callable[[int], None] = lambda images: None,
    ) -> dict[str, float] | None:
        """Measures {metric: accuracy} and `examples`; returns None if `stop` becomes true.

        Calls `set_phase` and `advance` as `evaluators.totals` does.
        """
        stop = Stop() if stop is None else stop
        train = self.compute_features(params, self.train_source, stop, set_phase, advance)
        if train is None:
            return None
        test = self.compute_features(params, self.source, stop, set_phase, advance)
        if test is None:
            return None
        set_phase('compile, of a classifier')
        labels, true = train['labels'], test['labels']
        classes = len(self.train_source.classes)
        results = {}
        if self.l2 is not None:
            x, y = classifiers.standardise(train['both'], test['both'])
            linear = classifiers.fit_logistic(x, labels, classes=classes, l2=self.l2)
            results['accuracy'] = classifiers.linear_accuracy(linear, y, true)
        kinds = [('', 'token', None), ('_cosine', 'token', self.temperature)]
        kinds += [('_pixels', 'pixels', None)] if self.pixels else []
        for k in self.k:
            for name, kind, temperature in kinds:
                predicted = classifiers.nearest(
                    train[kind], labels, test[kind], k=k, classes=classes, temperature=temperature
                )
                results[f'{k}_nn{name}'] = float(np.mean(predicted == true))
        return results | self.few_shot(train, test) | {'examples': len(true)}


probe = Probe  # by its name in a config
