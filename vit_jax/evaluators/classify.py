"""Accuracy, calibration and loss over a whole data set, every example counted once."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax import sharding
from vit_jax.data.readers import names
from vit_jax.data.sources import Source
from vit_jax.data.tasks import classify as classify_task
from vit_jax.data.tasks import text as text_task
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError, check_choice
from vit_jax.evaluators import Subject, open_source, reader, totals
from vit_jax.io.bounds import Positive, Prefetch, Rate, Size, Threads, Workers
from vit_jax.io.text import cell
from vit_jax.models import interface
from vit_jax.objectives import losses
from vit_jax.step import stop_votes

BINS = 15  # of confidence, as in arXiv:1706.04599 section 5
TOP = 5  # classes of the metric top5
MOST_CONFUSED = 2000  # classes: 4 million numbers


def occurring_labels(source: Source) -> np.ndarray:
    """Returns the labels that occur in a data set, sorted."""
    labels = (source.records[i]['label'] for i in range(len(source)))
    return np.unique(np.concatenate([np.ravel(label) for label in labels]))


def calibration_error(bins: np.ndarray) -> float:
    """Computes the expected calibration error of (examples, hits, confidence) by bin [3, N].

    It is the mean over examples of |accuracy - confidence| of their bin (arXiv:1706.04599 eq. 3).
    """
    examples, hits, confidence = bins
    return float(np.sum(np.abs(hits - confidence)) / np.sum(examples))


METRICS = {'accuracy': 'max', 'top5': 'max', 'loss': 'min', 'ece': 'min', 'class_accuracy': 'max'}


def eval_step(
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    predict: Callable,
    output: str = 'logits',
    loss: str = 'softmax',
    among: jax.Array | None = None,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Evaluates a classifier on a batch.

    Args:
      params: parameters of the objective.
      batch: `image`, `label` int [B] or [B, L], `mask` [B]. Images without labels do not count.
      predict: (params, batch) -> {output: [B, K]}.
      output: which of them are the logits.
      loss: one of losses.LOSSES.
      among: the classes [S] that can be predicted. None: all.

    Returns:
      (float32 sums over mask 1, {name: value by example [B]}). The sums are hits, losses and
      examples; hits among the best five, if more than five classes can be predicted; examples, hits
      and confidence by bin of confidence [3, BINS]; hits and examples by class [2, K], if an image
      has one label.
    """
    logits, labels = predict(params, batch)[output].astype(jnp.float32), batch['label']
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
        **stop_votes(batch),
    }
    if (classes if among is None else len(among)) > TOP:  # else all are among the best
        _, best = jax.lax.top_k(logits, TOP)
        among_best = jnp.any(several[:, :, None] == best[:, None], axis=(1, 2))
        sums['top5'] = jnp.sum(among_best * mask)
    if labels.ndim == 1:
        sums['by_class'] = jnp.stack([jnp.zeros(classes).at[labels].add(x) for x in (hits, mask)])
    return sums, {'prediction': jnp.argmax(logits, axis=-1), 'confidence': confidence}


class Classify:
    """Measures accuracy, top-5 accuracy, loss and calibration error of a classifier.

    Labels of the data set are matched with the model's classes by name (`names.relabel`). Where
    the class names of the data set are a part of the model's, only these are predicted.

    Args:
      source: the data set, see Data sets.
      image_size: size of the images in pixels: one number, or (height, width). None: the model
        reads texts, which are those of the task `text`.
      batch_size: examples in a batch, over all devices and processes.
      view: how an image is cropped and resized, see Views.
      output: the model's output that is measured: 'logits', or 'logits_cls' or 'logits_dist' for
        one head of a model with two (`model.dist_head`).
      loss: loss to measure, which also says what a probability is: of a softmax or a sigmoid. None:
        that of training, or 'softmax' where it is unknown.
      subset: whether to predict only classes that occur in the data set (ImageNet-A and -R).
      text: field of the texts, as in the task `text`.
      threads, workers, prefetch, tolerance: as in the section `data`.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        source: dict,
        image_size: Size | None = None,
        batch_size: Positive[int],
        view: str | dict = 'resize',
        output: str = 'logits',
        loss: Literal['softmax', 'sigmoid'] | None = None,
        subset: bool = False,
        text: str | None = None,
        threads: Threads | None = None,
        workers: Workers = 0,
        prefetch: Prefetch = 8,
        tolerance: Rate = 0.0,
    ) -> None:
        self.mesh = mesh = subject.mesh
        read = reader(
            mesh, batch_size, threads=threads, workers=workers, prefetch=prefetch,
            tolerance=tolerance,
        )  # fmt: skip
        if output != 'logits':
            check_choice('output', output, sorted(subject.outputs))
        outputs = subject.outputs[output].shape[-1] if output in subject.outputs else 0
        if len(getattr(subject.outputs.get(output), 'shape', (1, outputs))) != 2:
            raise UserError(interface.EACH_TOKEN)
        own, self.source, classes, title = open_source(subject, source, outputs)
        if len(self.source.classes) > outputs:
            raise UserError(
                f'{title} has {len(own.classes)} classes, the model {outputs or "no head"} '
                '(model.num_classes)'
            )
        among = None
        if isinstance(self.source.records, names.Relabelled) and len(own.classes) < len(classes):
            among = np.sort(self.source.records.labels)
        elif subset:
            among = occurring_labels(self.source)
        self.sources = {'source': self.source}
        if image_size is not None:
            task = classify_task.classify(self.source, view=view, image_size=image_size)
        elif subject.tokenizer is None:
            raise UserError('evals: image_size is None, and the run has no tokenizer of texts')
        else:
            task = text_task.with_labels(self.source, subject.tokenizer, text, draw=False)
        self.feed = partial(read, self.source, task)
        among = None if among is None else jnp.asarray(among[among >= 0])
        few = (outputs if among is None else len(among)) <= TOP  # then all are among the best
        self.metrics = {k: v for k, v in METRICS.items() if k != 'top5' or not few}
        loss = loss or subject.settings.get('loss') or 'softmax'
        self.step = jax.jit(
            sharding.with_mesh(
                mesh,
                partial(
                    eval_step, predict=subject.predict, output=output, loss=loss, among=among
                ),
            ),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
        )

    def __call__(
        self,
        params: Any,
        stop: Stop | None = None,
        set_phase: Callable[[str], None] = lambda phase: None,
        advance: Callable[[int], None] = lambda images: None,
    ) -> dict[str, float] | None:
        """Measures {metric: mean}, see `summary`; returns None if `stop` becomes true.

        Calls `set_phase` and `advance` as `evaluators.totals` does.
        """
        def sums(params, batch):
            return self.step(params, batch)[0]

        total = totals(sums, self.feed, params, self.mesh, stop, set_phase, advance)
        return None if total is None else summary(total)

    def predictions(
        self, params: Any, advance: Callable[[int], None] = lambda images: None
    ) -> dict[str, np.ndarray]:
        """Predicts {'id', 'label', 'prediction', 'confidence': [N]} of all examples.

        There must be one process.

        Calls `advance` with the number of images in each batch.
        """
        parts = []
        for batch in self.feed():
            _, per_example = self.step(params, sharding.put(batch, self.mesh))
            per_example = jax.device_get(per_example) | {k: batch[k] for k in ('id', 'label')}
            parts.append({k: v[batch['mask'] > 0] for k, v in per_example.items()})
            advance(len(parts[-1]['id']))
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


classify = Classify  # by its name in a config


def summary(total: Mapping[str, np.ndarray | np.float64]) -> dict[str, float]:
    """Computes accuracy, top5, loss, ece, class_accuracy and examples from `eval_step`'s sums.

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


def one_label(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Reduces labels [N], or [N, L] padded with -1, to one each: the predicted one if it is one."""
    if labels.ndim == 1:
        return labels
    hit = (labels == predictions[:, None]).any(axis=1)
    return np.where(hit, predictions, labels[:, 0])


def class_name(classes: Sequence[str] | None, index: int) -> str:
    """Names a class; by its number if it has no name, as a head can have more outputs."""
    named = classes is not None and 0 <= index < len(classes)
    return classes[index] if named else f'class {index}'


def confusion(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Counts predictions by label: int64 [K, K], labels by row; labels below 0 are left out."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels[labels >= 0], predictions[labels >= 0]), 1)
    return counts


def by_class(
    predicted: Mapping[str, np.ndarray], classes: Sequence[str] | None, count: int
) -> str:
    """Writes CSV with a row for each class: images, accuracy, row of the confusion matrix.

    Args:
      predicted: what `Classify.predictions` returns.
      classes: names, written as by `text.cell`, and `names.distinct`. None: numbers.
      count: number of classes. The matrix is left out for more than MOST_CONFUSED.
    """
    prediction = predicted['prediction']
    labels = one_label(predicted['label'], prediction)
    images = np.bincount(labels[labels >= 0], minlength=count)
    hits = np.bincount(labels[labels == prediction], minlength=count)
    titles = names.distinct([class_name(classes, i) for i in range(count)])
    titles = [cell(title) for title in titles]
    few = count <= MOST_CONFUSED
    counts = confusion(labels, prediction, count).tolist() if few else [()] * count
    file = io.StringIO()
    write = csv.writer(file, lineterminator='\n')
    write.writerow(['class', 'images', 'accuracy', *(titles if few else ())])
    for name, hit, of, row in zip(titles, hits, images, counts, strict=True):
        write.writerow([name, of, hit / of if of else '', *row])
    return file.getvalue()


def means(results: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Averages the accuracy of evaluations that have the same name before a slash.

    {'c/blur': ..., 'c/fog': ...} give {'c/mean': {'accuracy': value}}.
    """
    groups = {}
    for name, metrics in results.items():
        group, slash, _ = name.rpartition('/')
        if slash and 'accuracy' in metrics:
            groups.setdefault(f'{group}/mean', []).append(metrics['accuracy'])
    return {name: {'accuracy': sum(group) / len(group)} for name, group in groups.items()}
