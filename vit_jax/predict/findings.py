"""What was found in an image, at its own size: as numbers, as text and drawn."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data import files, images, label_maps, run_lengths
from vit_jax.data.overlays import BACKGROUND

LEAST = 5e-4  # share of the pixels below which a class is not in the legend of a picture


class Found(NamedTuple):
    """What is in an image [Y, X]: a class for each pixel, N segments, or N objects by score.

    Attributes:
      shape: (Y, X).
      label_map: [Y, X], as `places.label_map` returns it; None where there are objects.
      segments: [Y, X], as `places.segments` returns them; None where there are objects or classes.
      scores, labels: [N], probabilities and classes of objects or segments.
      boxes: [N, 4], (x, y, width, height) in pixels.
      masks: bool [N, Y, X]; None where objects have boxes alone.
    """

    shape: tuple[int, int]
    label_map: np.ndarray | None = None
    segments: np.ndarray | None = None
    scores: np.ndarray | None = None
    labels: np.ndarray | None = None
    boxes: np.ndarray | None = None
    masks: np.ndarray | None = None


def record(path: str, found: Found, names: Sequence[str]) -> dict[str, Any]:
    """What was found in an image as a JSON object.

    `classes` has each class that occurs, with its share of the pixels; `segments` each segment with
    its score and share; `objects` each object with its score and box (x, y, width, height), in
    pixels. Masks are run lengths as in COCO's json.
    """
    start = {'image': str(path), 'width': found.shape[1], 'height': found.shape[0]}
    if found.label_map is not None:
        classes = [
            dict(index=k, name=names[k], share=share,
                 segmentation=run_lengths.encoded(found.label_map == k))
            for k, share in shares(found)
        ]  # fmt: skip
        return start | {'classes': classes}
    if found.segments is not None:
        each = zip(found.labels.tolist(), found.scores.tolist(), masks_of(found), strict=True)
        segments = [
            dict(index=k, name=names[k], score=score, share=float(mask.mean()),
                 segmentation=run_lengths.encoded(mask))
            for k, score, mask in each
        ]  # fmt: skip
        return start | {'segments': segments}
    objects = []
    for i, (k, score) in enumerate(zip(found.labels.tolist(), found.scores, strict=True)):
        box = found.boxes[i].tolist()
        one = dict(index=k, name=names[k], score=float(score), box=box)
        if found.masks is not None:
            one['segmentation'] = run_lengths.encoded(found.masks[i])
        objects.append(one)
    return start | {'objects': objects}


def shares(found: Found) -> list[tuple[int, float]]:
    """(class, share of the image's pixels) of the classes of a label map, the largest first."""
    counts = label_maps.class_counts(found.label_map)
    order = [int(k) for k in np.argsort(-counts, kind='stable') if counts[k]]
    return [(k, float(counts[k] / found.label_map.size)) for k in order]


def masks_of(found: Found) -> Iterator[np.ndarray]:
    """The mask of each panoptic segment, bool [Y, X]."""
    return (found.segments == k for k in range(len(found.labels)))


def lines(found: Found, names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Rows of text: (share or score, class, box as x y width height or a segment's share)."""
    if found.label_map is not None:
        return [(f'{share:7.2%}', names[k], '') for k, share in shares(found)]
    if found.segments is not None:
        each = zip(found.labels, found.scores, masks_of(found), strict=True)
        return [(f'{score:7.2%}', names[k], f'{m.mean():.2%} of it') for k, score, m in each]
    rows = zip(found.labels, found.scores, found.boxes.round().astype(int), strict=True)
    return [(f'{score:7.2%}', names[k], ' '.join(map(str, box))) for k, score, box in rows]


def draw(path: os.PathLike, image: np.ndarray, found: Found, names: Sequence[str]) -> None:
    """Writes a PNG of an image uint8 [Y, X, 3] with what was found over it, above a legend."""
    from vit_jax.figures import overlaid

    if found.label_map is not None:
        entries = {
            k: f'{names[k]} {share:.1%}' for k, share in shares(found)
            if names[k] != BACKGROUND and share >= LEAST
        }  # fmt: skip
        example = dict(image=image, label_map=found.label_map)
        overlaid.write(path, example, names, (), entries)
        return
    entries = entries_of(found, names)
    if found.segments is not None:
        example = dict(image=image, segments=found.segments, labels=found.labels)
        overlaid.write(path, example, names, (), entries)
        return
    order = np.arange(len(found.labels))[::-1]  # the best one is on top
    height, width = found.shape
    start, sides = np.split(found.boxes[order], 2, axis=1)
    boxes = np.concatenate([start, start + sides], axis=1) / [width, height, width, height]
    example = dict(image=image, labels=found.labels[order], boxes=boxes)
    if found.masks is not None:
        example['masks'] = found.masks[order]
    words = [f'{names[found.labels[i]]} {found.scores[i]:.2f}' for i in order]
    overlaid.write(path, example, names, words, entries)


def entries_of(found: Found, names: Sequence[str]) -> dict[int, str]:
    """{class: text} of a legend: how many objects or segments, and the best score."""
    entries = {}
    for k in (k for k in dict.fromkeys(found.labels.tolist()) if names[k] != BACKGROUND):
        scores = found.scores[found.labels == k]
        times = f'{len(scores)} \N{MULTIPLICATION SIGN} ' if len(scores) > 1 else ''
        entries[k] = f'{times}{names[k]} {scores.max():.2f}'
    return entries


def original(path: str) -> np.ndarray:
    """An image file as it is shown, uint8 [Y, X, 3]."""
    return files.pixels(path, lambda image, rng: images.whole(image))
