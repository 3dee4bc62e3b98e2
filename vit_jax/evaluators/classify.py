"""Accuracy, calibration and loss over a whole data set, every example counted once."""

import csv
import io
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax import sharding, step
from vit_jax.data import mixture, pipeline
from vit_jax.data.readers import names
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.io.bounds import NonNegative, Positive, Prefetch, Rate, Size, Threads, Workers
from vit_jax.io.text import cell
from vit_jax.models import interface

MOST_CONFUSED = 2000  # classes: 4 million numbers


def present(source):
    """The labels that occur in a data set, sorted."""
    return np.unique(np.concatenate([np.ravel(source.records[i][1]) for i in range(len(source))]))


def calibration_error(bins):
    """Expected calibration error of (examples, hits, confidence) by bin [3, N].

    The mean over examples of |accuracy - confidence| of their bin (arXiv:1706.04599 eq. 3).
    """
    examples, hits, confidence = bins
    return float(np.sum(np.abs(hits - confidence)) / np.sum(examples))


METRICS = {  # of `summary`, and which is better
    'accuracy': 'max', 'top5': 'max', 'loss': 'min', 'ece': 'min', 'class_accuracy': 'max',
}  # fmt: skip


class Classify:
    """An evaluation of a classifier, due every `every` steps (0: at the end alone).

    `classes` are the names of the model's, None where it has none; labels of the data become those
    of the model by name (`names.relabelled`). With `subset` only those classes are predicted that
    occur in the data, as of ImageNet-A and -R, whose 200 have numbers among all 1,000; a data set
    whose class names are some of the model's is always so. `loss` is that of training if not given
    ('softmax' where nothing tells), and says what a probability is: of a softmax or a sigmoid.
    """

    def __init__(
        self,
        model,
        mesh,
        classes=None,
        *,
        type: Literal['classify'] = 'classify',
        source: dict,
        image_size: Size,
        batch_size: Positive[int],
        view: str | dict = 'resize',
        loss: Literal['softmax', 'sigmoid'] | None = None,
        subset: bool = False,
        every: NonNegative[int] = 0,
        threads: Threads | None = None,
        workers: Workers = 0,
        prefetch: Prefetch = 8,
        tolerance: Rate = 0.0,
    ):
        self.mesh, self.every = mesh, every
        own, title = mixture.load(**source), f'data set {mixture.title(source)}'
        sharding.check_batch(batch_size, mesh)
        interface.check_output(model)
        outputs = model.num_classes or 0
        classes = classes or tuple(map(str, range(outputs)))
        self.source = names.relabelled(own, classes, title) if outputs else own
        if len(self.source.classes) > outputs:
            raise UserError(
                f'{title} has {len(own.classes)} classes, the model {outputs or "no head"} '
                '(model.num_classes)'
            )
        among = None
        if isinstance(self.source.records, names.Mapped) and len(own.classes) < len(classes):
            among = np.sort(self.source.records.labels)
        elif subset:
            among = present(self.source)
        self.feed = partial(
            pipeline.examples, self.source, sharding.rows(batch_size, mesh), view=view,
            image_size=image_size, batch_size=batch_size, threads=threads, workers=workers,
            prefetch=prefetch, tolerance=tolerance,
        )  # fmt: skip
        among = None if among is None else jnp.asarray(among[among >= 0])
        self.step = jax.jit(
            sharding.on(
                mesh,
                partial(step.eval_step, model=model, loss=loss or 'softmax', among=among),
            ),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
        )

    @staticmethod
    def metrics(**settings):
        """{metric: 'max' or 'min'}: what such an evaluation measures, and which is better."""
        return METRICS

    def due(self, n, steps):
        return n == steps or (n > 0 and self.every > 0 and n % self.every == 0)

    def __call__(
        self, params, stop=None, at=lambda phase: None, advance=lambda images: None
    ):  # fmt: skip
        """Means by name, see `summary`; None where `stop` became true before the end.

        `at` is told of each batch, as hosts.joined wants it, `advance` of the images in it.
        """
        stop = Stop() if stop is None else stop
        total = {}
        for i, batch in enumerate(self.feed(stop=stop)):
            at(f'evaluation, batch {i}' if i else 'compile, of an evaluation')
            sums, _ = self.step(params, sharding.put(stop.within(batch), self.mesh))
            sums = stop.hear(sums)
            if stop:
                return None
            total = {k: total.get(k, 0) + np.asarray(v, np.float64) for k, v in sums.items()}
            advance(int(np.sum(batch['mask'] > 0)))
        return summary(total)

    def predictions(self, params, advance=lambda images: None):
        """One process's view of each example: {'id', 'label', 'prediction', 'confidence': [N]}.

        `advance` is told of the images in each batch.
        """
        parts = []
        for batch in self.feed():
            _, by_example = self.step(params, sharding.put(batch, self.mesh))
            by_example = jax.device_get(by_example) | {k: batch[k] for k in ('id', 'label')}
            parts.append({k: v[batch['mask'] > 0] for k, v in by_example.items()})
            advance(len(parts[-1]['id']))
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def summary(total):
    """{'accuracy', 'top5', 'loss', 'ece', 'class_accuracy', 'examples'} of `eval_step`'s sums.

    `ece` is the expected calibration error of the probabilities; `class_accuracy` the mean accuracy
    of the classes that occur, where an image has one label. `top5` is left out where at most five
    classes can be predicted.
    """
    count = total['examples']
    if not count:
        raise UserError('evals: no example of the data set has a label')
    names = [name for name in ('accuracy', 'top5', 'loss') if name in total]
    results = {name: float(total[name] / count) for name in names}
    results['ece'] = calibration_error(total['bins'])
    if 'by_class' in total:
        hits, examples = total['by_class']
        results['class_accuracy'] = float(np.mean(hits[examples > 0] / examples[examples > 0]))
    return results | {'examples': int(count)}


def one_label(labels, predictions):
    """Of labels [N], or [N, L] padded with -1, one each: the predicted one where it is one."""
    if labels.ndim == 1:
        return labels
    hit = (labels == predictions[:, None]).any(axis=1)
    return np.where(hit, predictions, labels[:, 0])


def class_name(classes, index):
    """The class's name; its number where it has none, as a head can have more outputs."""
    known = classes is not None and 0 <= index < len(classes)
    return classes[index] if known else f'class {index}'


def confusion(labels, predictions, classes):
    """How often [K, K] each class, by row, was taken for each; a label below 0 is none."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels[labels >= 0], predictions[labels >= 0]), 1)
    return counts


def by_class(found, classes, count):
    """CSV, a line a class: images, accuracy, how often it was taken for each of `count` classes
    (where they are at most MOST_CONFUSED).

    `found` is what `Classify.predictions` gives, `classes` the names, or None; they are written as
    `text.cell` has them.
    """
    prediction = found['prediction']
    labels = one_label(found['label'], prediction)
    images = np.bincount(labels[labels >= 0], minlength=count)
    hits = np.bincount(labels[labels == prediction], minlength=count)
    names = [cell(class_name(classes, i)) for i in range(count)]
    few = count <= MOST_CONFUSED
    counts = confusion(labels, prediction, count).tolist() if few else [()] * count
    file = io.StringIO()
    write = csv.writer(file, lineterminator='\n')
    write.writerow(['class', 'images', 'accuracy', *(names if few else ())])
    for name, hit, of, row in zip(names, hits, images, counts, strict=True):
        write.writerow([name, of, hit / of if of else '', *row])
    return file.getvalue()


def means(results):
    """{'c/mean': {'accuracy': value}} of evaluations whose names share what is before a slash."""
    groups = {}
    for name, metrics in results.items():
        group, slash, _ = name.rpartition('/')
        if slash and 'accuracy' in metrics:
            groups.setdefault(f'{group}/mean', []).append(metrics['accuracy'])
    return {name: {'accuracy': sum(found) / len(found)} for name, found in groups.items()}
