"""Outputs of detectors and segmenters in pixels of one image of any size, as evaluations have them.

Shapes: Q queries, K classes, h w of a map, Y X of the image.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from vit_jax.data import label_maps
from vit_jax.evaluators import instances, panoptic_quality, pixels

BLOCK = 2**24  # values of all maps that are in memory at once
STEP = 512  # weights are computed for sides of multiples of it: few programs for many sizes


class Place(NamedTuple):
    """Where an image lies in its view.

    Attributes:
      shape: (Y, X) of the image.
      size: (height, width) of the view.
      place: float32 [2, 2], see `tasks.place_of`.
    """

    shape: tuple[int, int]
    size: tuple[int, int]
    place: np.ndarray


def detections(
    logits: np.ndarray, boxes: np.ndarray, place: Place
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best class of each query, by falling score: (scores [Q], classes [Q], boxes [Q, 4]).

    A score is the probability of the class; that of no object, the last, is left out (as in
    post_process_object_detection of transformers). Boxes are (x, y, width, height) in pixels.

    Args:
      logits: of classes, [Q, K + 1].
      boxes: [Q, 4], centre x, centre y, width and height in shares of the view.
      place: where the image lies in it.
    """
    shares = softmax(logits)[None, :, :-1]
    scores, labels, queries = (np.asarray(x)[0] for x in instances.of_queries(shares, len(logits)))
    moved = instances.in_image(
        boxes[None, queries], place.size, place.place[None], np.array([place.shape])
    )
    return scores, labels, np.asarray(moved)[0]


def objects(
    logits: np.ndarray, masks: np.ndarray, place: Place, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Objects whose score is above a threshold: (scores [N], classes [N], masks bool [N, Y, X]).

    A mask has the pixels where its logit is above 0. A score is the probability of the query's best
    class times the mean over the mask's pixels of their probabilities (tue-mps/eomt
    training/mask_classification_instance.py, and transformers). Objects are by falling score.

    Args:
      logits: of classes, [Q, K + 1]; the last one is no object.
      masks: logits of masks on the view, [Q, h, w].
      place: where the image lies in it.
      threshold: of scores; objects without a pixel have none.
    """
    shares, found = softmax(logits)[:, :-1], []
    for q in np.flatnonzero(shares.max(1) > threshold):
        values = np.concatenate([x[0] for _, x in blocks(masks[q : q + 1], place, twice=True)])
        mask = values > 0
        if mask.any():
            score = shares[q].max() * sigmoid(values[mask]).mean(dtype=np.float64)
            if score > threshold:
                found.append((float(score), int(shares[q].argmax()), mask))
    found.sort(key=lambda row: -row[0])
    scores, classes, kept = zip(*found, strict=True) if found else ((), (), ())
    kept = np.array(kept, bool).reshape(-1, *place.shape)
    return np.array(scores), np.array(classes, int), kept


def label_map(maps: np.ndarray, place: Place, logits: np.ndarray | None = None) -> np.ndarray:
    """The class of each pixel, uint8 or uint16 [Y, X].

    Args:
      maps: logits of classes on the view, [K, h, w]; with `logits` those of masks, [Q, h, w].
      place: where the image lies in it.
      logits: of a mask classifier, [Q, K + 1]: a class has the sum over queries of its probability
        times the mask's (arXiv:2107.06278 section 3.4).
    """
    shares = None if logits is None else softmax(logits)[:, :-1]
    count = len(maps) if shares is None else shares.shape[1]
    found = np.zeros(place.shape, np.uint8 if count <= label_maps.MOST_BYTE else np.uint16)
    for rows, block in blocks(maps, place):
        if shares is not None:
            block = np.tensordot(shares.T, sigmoid(block), axes=1)
        found[rows] = block.argmax(0)
    return found


def segments(
    logits: np.ndarray, masks: np.ndarray, place: Place, threshold: float, overlap: float,
    stuff: Collection[int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Panoptic segments: (numbers uint16 [Y, X], classes [N], scores [N]).

    A pixel of `numbers` has the number of its segment, or VOID in none. Segments are those of the
    evaluator `panoptic`. A score is the probability of the class; that of stuff, the largest of its
    queries.

    Args:
      logits: of classes, [Q, K + 1]; the last one is no object.
      masks: logits of masks on the view, [Q, h, w].
      place: where the image lies in it.
      threshold: probability of its class above which a query counts.
      overlap: least share of its own mask that a query must win.
      stuff: classes that are stuff.
    """
    shares = softmax(logits)
    scores, labels = shares.max(1), shares.argmax(1)
    kept = np.flatnonzero((labels < shares.shape[1] - 1) & (scores > threshold))
    scores, labels, count = scores[kept], labels[kept], len(kept)
    winner = np.full(place.shape, count, np.uint16)
    own, won, areas = np.zeros((3, count), np.int64)
    for rows, block in blocks(masks[kept], place, twice=True) if count else ():
        values = sigmoid(block)
        best = (scores[:, None, None] * values).argmax(0)
        inside = np.take_along_axis(values, best[None], axis=0)[0] >= 0.5
        winner[rows] = np.where(inside, best, count)
        areas += (values >= 0.5).sum((1, 2))
        won += np.bincount(best.ravel(), minlength=count)
        own += np.bincount(best[inside], minlength=count)
    found = panoptic_quality.segments_of(own, won, areas, labels, stuff=stuff, overlap=overlap)
    number, classes = panoptic_quality.numbers_of(found, labels)
    return number[winner], classes, np.array([scores[queries].max() for queries in found])


def blocks(
    maps: np.ndarray, place: Place, twice: bool = False
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (rows, [K, rows, X]): maps [K, h, w] interpolated at the centres of pixels.

    `twice`: to the view first, see `pixels.weights_by_view`.
    """
    height, step = place.shape[0], max(BLOCK // (len(maps) * place.shape[1]), 1)
    down, along = (weights(place, axis, maps.shape[1 + axis], twice) for axis in range(2))
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        yield rows, down[rows] @ maps @ along.T


def weights(place: Place, axis: int, cells: int, twice: bool) -> np.ndarray:
    """Weights [Y or X, cells] of the cells of a map in each pixel along an axis."""
    length = place.shape[axis]
    most, own = -(-length // STEP) * STEP, place.place[None, axis]
    if twice:
        sides = np.array([length])
        found = pixels.weights_by_view(most, cells, place.size[axis], own, sides)
    else:
        found = pixels.weights(most, cells, place.size[axis], own)
    return np.asarray(found)[0, :length]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits, without overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * logits)
