"""Semantic segmentation: intersection over union, from one confusion matrix of all pixels.

Shapes: B batch, K classes, Y X of the label maps, R rows of a block.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import evaluators
from vit_jax.data import label_maps
from vit_jax.data.tasks import size_of
from vit_jax.data.tasks.segment import whole_label_map
from vit_jax.data.windows import Windows
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.evaluators import Subject, label_scores
from vit_jax.evaluators.pixels import in_blocks
from vit_jax.io.bounds import (
    NonNegative,
    Pixels,
    Positive,
    Prefetch,
    Rate,
    Size,
    Threads,
    Workers,
)

METRICS = {'miou': 'max', 'pixel_accuracy': 'max', 'class_accuracy': 'max'}


class Segment:
    """Measures a segmenter at the size of the images: every pixel that is not ignored counts once.

    The logits `semantic` that the objective predicts, [K, h, w] for the view of an image, are
    interpolated at the centres of the image's own pixels, bilinearly without aligned corners; the
    largest is the prediction. Of a mask classifier, `masks` [Q, h, w] are interpolated, and a class
    has the sum over queries of its probability times the mask's (arXiv:2107.06278 section 3.4). One
    confusion matrix counts all pixels of the data set, exactly.

    With a `stride`, windows of the image size slide over the image, which is resized so that its
    smaller side has `smaller` pixels; a pixel has the mean logits of the windows that show it. The
    windows of a batch, and the logits of each, are in memory at once, up to 16 GiB of a device. Of
    several scales, and of mirrored images, the mean of the probabilities counts (mmsegmentation,
    encoder_decoder.py; there logits are interpolated to the resized image, then to the image).

    - miou: mean over classes of intersection over union, of those that occur in labels or
      predictions
    - pixel_accuracy: share of the pixels whose class is predicted
    - class_accuracy: mean over the classes that occur in labels of the share that is predicted
    - iou/CLASS: intersection over union of each class, with `by_class`

    Args:
      source: the data set, see Data sets.
      image_size: size of the images in pixels: one number, or (height, width).
      batch_size: examples in a batch, over all devices and processes.
      canvas: size of the largest image of the data set in pixels; label maps are padded to it.
      view: 'fit' pads images at their aspect ratio, 'resize' stretches them; see Views. Without a
        stride.
      stride: pixels from one window to the next; the last one ends where the image does. None: one
        view shows the image.
      even: whether as many windows are at equal distances (tue-mps/eomt lightning_module.py, with
        the stride of a whole window).
      smaller: smaller side of the image at scale 1, in pixels. None: that of the image size.
      larger: bound of its larger side at scale 1. None: 4 times `smaller`.
      scales: scales of the image.
      flip: whether each view or window is also mirrored left to right.
      mask: field of the records that holds the mask.
      zero: what id 0 of a mask is, as in the task `segment`.
      ignored: other ids that are ignored. None: 255, or 65535 of more than 255 classes.
      by_class: whether to measure each class.
      threads, workers, prefetch, tolerance: as in the section `data`.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        source: dict,
        image_size: Size,
        batch_size: Positive[int],
        canvas: Size,
        view: str | dict = 'fit',
        stride: Positive[int] | None = None,
        even: bool = False,
        smaller: Pixels | None = None,
        larger: Pixels | None = None,
        scales: tuple[Positive[float], ...] = (1.0,),
        flip: bool = False,
        mask: str = 'mask',
        zero: label_maps.Zero = 'class',
        ignored: tuple[NonNegative[int], ...] | None = None,
        by_class: bool = False,
        threads: Threads | None = None,
        workers: Workers = 0,
        prefetch: Prefetch = 8,
        tolerance: Rate = 0.0,
    ) -> None:
        self.mesh, self.by_class = subject.mesh, by_class
        read = evaluators.reader(
            self.mesh, batch_size, threads=threads, workers=workers, prefetch=prefetch,
            tolerance=tolerance,
        )  # fmt: skip
        height, width = size_of(canvas)
        if batch_size * height * width >= 2**31:
            raise UserError(
                f'evals: batch_size {batch_size} of canvas {width} x {height} are more pixels than '
                'are counted at once, 2^31; a smaller batch has fewer'
            )
        count = label_scores.count_classes(subject.outputs)
        windows = windows_of(image_size, stride, even, smaller, larger, scales)
        # the background that `zero` adds is no class of the data set
        first = int(zero == 'background')
        opened = evaluators.open_source(subject, source, count, first)
        self.source, self.classes = opened.source, opened.classes
        self.sources = {'source': self.source}
        task = whole_label_map(
            self.source, view=view, image_size=image_size, canvas=canvas, mask=mask,
            classes=self.classes[first:], zero=zero, ignored=ignored, windows=windows,
        )  # fmt: skip
        self.feed = partial(read, self.source, task)
        self.metrics = METRICS | {
            f'iou/{name}': 'max' for name in (self.classes if by_class else ())
        }
        counts = windows.counts() if windows else (1,)
        share = batch_size // (self.mesh.shape['data'] * self.mesh.shape['fsdp'])
        label_scores.check_windows(subject.outputs, counts, flip, share)
        how = dict(predict=subject.predict, flip=flip, counts=counts)
        self.step = evaluators.compiled(partial(confusion_of, **how), self.mesh)
        self.label_maps = evaluators.compiled(partial(label_maps_of, **how), self.mesh)

    def __call__(
        self,
        params: Any,
        stop: Stop | None = None,
        set_phase: Callable[[str], None] = lambda phase: None,
        advance: Callable[[int], None] = lambda images: None,
    ) -> dict[str, float] | None:
        """Measures {metric: value}; returns None if `stop` becomes true.

        Calls `set_phase` and `advance` as `evaluators.totals` does.
        """
        total = evaluators.totals(
            self.step, self.feed, params, self.mesh, stop, set_phase, advance
        )
        if total is None:
            return None
        found = summary(total['confusion'])
        if self.by_class:
            each = iou(total['confusion'])
            found |= {
                f'iou/{name}': float(value)
                for name, value in zip(self.classes, each, strict=True) if not np.isnan(value)
            }  # fmt: skip
        return found | {'examples': int(total['examples'])}


segment = Segment  # by its name in a config


def windows_of(
    image_size: Size, stride: int | None, even: bool = False, smaller: int | None = None,
    larger: int | None = None, scales: tuple[float, ...] = (1.0,), where: str = 'evals: ',
) -> Windows | None:  # fmt: skip
    """The windows of settings of `Segment`, None without a stride.

    Raises UserError, whose message begins with `where`.
    """
    size = size_of(image_size)
    if stride is None:
        given = dict(even=even, smaller=smaller, larger=larger, scales=tuple(scales) != (1.0,))
        for name in (name for name, value in given.items() if value):
            raise UserError(f'{where}{name} is a setting of windows; give their stride, too')
        return None
    if stride > min(size):
        raise UserError(f'{where}stride {stride} leaves gaps between windows of {min(size)} pixels')
    if not scales:
        raise UserError(f'{where}scales has no number; (1.0,) is the image as it is')
    smaller = smaller or min(size)
    larger = larger or 4 * smaller
    if larger < smaller:
        raise UserError(f'{where}larger is {larger}, below smaller={smaller}')
    return Windows(size, stride, even, smaller, larger, tuple(scales))


def confusion_of(
    params: Any, batch: Mapping[str, jax.Array], *, predict: Callable, counts: tuple[int, ...],
    flip: bool,
) -> dict[str, jax.Array]:  # fmt: skip
    """Counts pixels of a batch by label and prediction: `confusion` int32 [K, K], `examples`.

    Args:
      params: parameters of the objective.
      batch: `label_map` [B, Y, X], `mask` [B], and what `label_scores.predictions` reads.
      predict, counts, flip: as in `label_scores.predictions`.
    """
    groups = label_scores.predictions(params, batch, predict, counts, flip)
    labels, classes = batch['label_map'], groups[0].classes
    valid = (labels < classes) & (batch['mask'][:, None, None] > 0)
    # a cell beyond the matrix takes what does not count
    cells = jnp.where(valid, labels.astype(jnp.int32) * classes, classes**2)  # [B, Y, X]
    rows = [group.blocks(labels.shape[1]) for group in groups]
    columns = [group.weights(labels.shape[2], 1) for group in groups]

    def add(counts, block):
        offsets, own = block  # [B, R, X]
        scores = label_scores.sum_of_scores(groups, own, columns)
        predicted = jnp.argmax(scores, axis=1)  # [B, R, X]
        return counts.at[(offsets + predicted).reshape(-1)].add(1, mode='drop'), None

    blocks = in_blocks(cells, classes**2), rows
    found, _ = jax.lax.scan(add, jnp.zeros(classes**2, jnp.int32), blocks)
    return {'confusion': found.reshape(classes, classes), 'examples': jnp.sum(batch['mask'] > 0)}


def label_maps_of(
    params: Any, batch: Mapping[str, jax.Array], *, predict: Callable, counts: tuple[int, ...],
    flip: bool,
) -> dict[str, jax.Array]:  # fmt: skip
    """The `predicted` class of each pixel, of the type and shape of the batch's `label_map`.

    Beside it there are `label_map`, `id` and `mask`. Arguments are those of `confusion_of`.
    """
    groups = label_scores.predictions(params, batch, predict, counts, flip)
    labels = batch['label_map']
    rows = [group.blocks(labels.shape[1]) for group in groups]
    columns = [group.weights(labels.shape[2], 1) for group in groups]

    def classes_of(own):
        return jnp.argmax(label_scores.sum_of_scores(groups, own, columns), axis=1)  # [B, R, X]

    found = jnp.moveaxis(jax.lax.map(classes_of, rows), 0, 1)  # [B, Y / R, R, X]
    found = found.reshape(len(labels), -1, labels.shape[2])[:, : labels.shape[1]]
    kept = {name: batch[name] for name in ('label_map', 'id', 'mask')}
    return kept | {'predicted': found.astype(labels.dtype)}


def iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class [K], NaN of one that occurs nowhere.

    `confusion` [K, K] counts pixels, labels by row.
    """
    hits = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hits
    return np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)


def summary(confusion: np.ndarray) -> dict[str, float]:
    """Computes miou, pixel_accuracy and class_accuracy of a confusion matrix, see `Segment`.

    Raises UserError if no pixel has a label.
    """
    hits, labelled = np.diag(confusion), confusion.sum(1)
    if not labelled.sum():
        raise UserError('evals: no pixel of the data set has a label that is a class')
    occurs = labelled > 0
    return {
        'miou': float(np.nanmean(iou(confusion))),
        'pixel_accuracy': float(hits.sum() / labelled.sum()),
        'class_accuracy': float(np.mean(hits[occurs] / labelled[occurs])),
    }
