"""The worst images of an evaluation of segmentation or detection: image, truth and prediction.

Shapes: B batch, K classes, Y X of an image, M true objects, D detections.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from vit_jax import evaluators
from vit_jax.data import images
from vit_jax.data.overlays import BACKGROUND
from vit_jax.distributed.stop import Stop
from vit_jax.evaluators import average_precision, panoptic_quality
from vit_jax.evaluators.detect import Detect, by_id
from vit_jax.evaluators.panoptic import Panoptic
from vit_jax.evaluators.segment import Segment, iou
from vit_jax.figures import overlaid, page
from vit_jax.io.progress import Bar
from vit_jax.io.text import printable

SHOWN = 6  # images
THRESHOLD = 0.5  # score of detections that are drawn
MATCHED = 0.5  # intersection over union from which a detection is of an object
LEAST = 400  # pixels of the longer side of a picture, at least
IOU = 'The lowest mean of intersection over union of the classes in an image.'
SCORES = (
    'The lowest mean over objects of the best score of their class at a box of theirs '
    f'(intersection over union {MATCHED} or more). Drawn are scores above {THRESHOLD}, and the '
    'highest.'
)
QUALITY = 'The lowest panoptic quality of an image, the mean over its classes.'


class Row(NamedTuple):
    """An image and what is over it, as `overlays.picture` draws it."""

    caption: str
    image: np.ndarray
    truth: Mapping[str, np.ndarray]
    found: Mapping[str, np.ndarray]
    words: Sequence[str] = ()  # beside the boxes that were found


def parts(
    name: str, evaluation: Segment | Panoptic | Detect, params: Any, out: epath.Path
) -> Iterator[page.Part]:
    """Draws the worst images of an evaluation, SHOWN at most; yields the part of a page.

    Args:
      name: that of the evaluation.
      evaluation: what it is.
      params: parameters of the run.
      out: folder of the picture.
    """
    make, note = next(row for kind, *row in KINDS if isinstance(evaluation, kind))
    with Bar(printable(name), len(evaluation.source), brief=True) as bar:
        rows = make(evaluation, params, bar.add)
    if rows:
        draw(out / 'worst.png', rows, evaluation.classes)
        yield 'Worst images', f'The evaluation {name}. {note}', out / 'worst.png'


def draw(path: os.PathLike, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Writes a PNG with a line for each row: the image, with what is there, with what was found."""
    pictures, seen = [], set()
    for row in rows:
        line = [(overlaid.drawn({'image': row.image, **overlaid.NOTHING}, names, LEAST), ())]
        for over, words in ((row.truth, None), (row.found, row.words)):
            one = overlaid.drawn({'image': row.image, **over}, names, LEAST)
            line.append((one, [names[k] for k in one.classes] if words is None else words))
            seen |= set(np.unique(over.get('label_map', over.get('labels'))).tolist())
        pictures.append(line)
    entries = {k: name for k, name in enumerate(names) if k in seen and name != BACKGROUND}
    heads = ('', 'truth', 'prediction')
    overlaid.sheet(path, pictures, heads, [row.caption for row in rows], entries)


def of_label_maps(
    evaluation: Segment, params: Any, advance: Callable[[int], None]
) -> list[Row]:
    """The images whose own confusion has the lowest mean intersection over union."""
    source, kept = evaluation.source, []
    for batch in measured(evaluation, evaluation.label_maps, params, advance):
        for i in np.flatnonzero(batch['mask'] > 0):
            truth, found = batch['label_map'][i], batch['predicted'][i]
            score = score_of_map(truth, found, len(evaluation.classes))
            if not np.isnan(score):
                kept.append((score, int(batch['id'][i]), truth, found))
        kept = sorted(kept, key=lambda row: row[:2])[:SHOWN]
    rows = []
    for score, i, truth, found in kept:
        image = images.whole(images.read(source.records[i]['image']))
        height, width = image.shape[:2]
        truth, found = ({'label_map': x[:height, :width]} for x in (truth, found))
        rows.append(Row(f'{source.name(i)}: {score:.1%}', image, truth, found))
    return rows


def score_of_map(truth: np.ndarray, found: np.ndarray, classes: int) -> float:
    """Mean of intersection over union of the classes in a label map; NaN if none is labelled."""
    labelled = truth < classes
    cells = truth[labelled].astype(int) * classes + found[labelled]
    counts = np.bincount(cells, minlength=classes**2).reshape(classes, classes)
    return float(np.nanmean(iou(counts))) if len(cells) else np.nan


def of_segments(
    evaluation: Panoptic, params: Any, advance: Callable[[int], None]
) -> list[Row]:
    """The images of the lowest panoptic quality, without those that have no class."""
    source, kept = evaluation.source, []
    for batch in measured(evaluation, evaluation.maps, params, advance):
        for i in np.flatnonzero(batch['mask'] > 0):
            one = {name: values[i] for name, values in batch.items()}
            quality = panoptic_quality.summary(evaluation.tally(one), ())
            if quality:
                truth = one['segments'], one['labels']
                kept.append((quality['pq'], int(one['id']), truth, evaluation.numbers(one)))
        kept = sorted(kept, key=lambda row: row[:2])[:SHOWN]
    rows = []
    for score, i, *both in kept:
        image = images.whole(images.read(source.records[i]['image']))
        height, width = image.shape[:2]
        truth, found = (dict(segments=x[:height, :width], labels=labels) for x, labels in both)
        rows.append(Row(f'{source.name(i)}: {score:.1%}', image, truth, found))
    return rows


def of_objects(
    evaluation: Detect, params: Any, advance: Callable[[int], None]
) -> list[Row]:
    """The images whose objects have the lowest scores."""
    found = {}
    for batch in measured(evaluation, evaluation.step, params, advance):
        found |= by_id(batch)
    scores = {i: score_of(one) for i, one in found.items() if not one.crowd.all()}
    source, rows = evaluation.source, []
    for i in sorted(scores, key=lambda i: (scores[i], i))[:SHOWN]:
        image, one = images.whole(images.read(source.records[i]['image'])), found[i]
        order = np.argsort(-one.scores, kind='stable')
        kept = order[: max(np.sum(one.scores > THRESHOLD), 1)][::-1]  # the best one is on top
        truth = dict(labels=one.labels, boxes=in_shares(one.boxes, image))
        made = dict(labels=one.found_labels[kept], boxes=in_shares(one.found_boxes[kept], image))
        words = [f'{evaluation.classes[k]} {s:.2f}'
                 for k, s in zip(made['labels'], one.scores[kept], strict=True)]  # fmt: skip
        rows.append(Row(f'{source.name(i)}: {scores[i]:.2f}', image, truth, made, words))
    return rows


def score_of(image: average_precision.Image) -> float:
    """Mean over objects, but crowds, of the best score of a detection that is of it, else 0."""
    true, found = corners(image.boxes[~image.crowd]), corners(image.found_boxes)
    common = np.minimum(true[:, None, 2:], found[:, 2:]) - np.maximum(true[:, None, :2],
                                                                      found[:, :2])  # fmt: skip
    common = np.prod(common.clip(0), axis=2)  # [M, D]
    areas = [np.prod(x[:, 2:] - x[:, :2], axis=1) for x in (true, found)]
    union = areas[0][:, None] + areas[1] - common
    same = image.labels[~image.crowd][:, None] == image.found_labels
    of_it = same & (common >= MATCHED * union) & (common > 0)
    return float(np.where(of_it, image.scores, 0).max(axis=1, initial=0).mean())


def corners(boxes: np.ndarray) -> np.ndarray:
    """(x0, y0, x1, y1) of boxes [N, 4], (x, y, width, height)."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def in_shares(boxes: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Corners of boxes in pixels as shares of an image's sides."""
    return corners(boxes) / np.tile(image.shape[1::-1], 2)


def measured(
    evaluation: Callable, step: Callable, params: Any, advance: Callable[[int], None]
) -> Any:
    """The results of a step for each batch of an evaluation's data set."""
    return evaluators.results(
        step, evaluation.feed, params, evaluation.mesh, Stop(), lambda phase: None, advance
    )


KINDS = (
    (Segment, of_label_maps, IOU), (Panoptic, of_segments, QUALITY), (Detect, of_objects, SCORES)
)
