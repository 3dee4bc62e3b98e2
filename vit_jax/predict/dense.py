"""What detectors and segmenters find in images, at the images' own size: as numbers and drawn."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from vit_jax.convert import load as weights
from vit_jax.convert import run
from vit_jax.data import files, images, label_maps, run_lengths
from vit_jax.data.overlays import BACKGROUND
from vit_jax.data.tasks import WHOLE, View, place_of
from vit_jax.errors import UserError
from vit_jax.evaluators import classify, places
from vit_jax.evaluators.places import Place
from vit_jax.io import fetch
from vit_jax.models.masks import MaskClassifier
from vit_jax.models.patch_classifier import PatchClassifier
from vit_jax.models.segmenter import Segmenter
from vit_jax.predict import Predictor

OBJECTIVES = ('detect', 'masks', 'segment')
AROUND = ('a detector', 'a mask classifier')  # names of `convert.stages.Around`
LEAST = 5e-4  # share of the pixels below which a class is not in the legend of a picture
Masks = Literal['semantic', 'instances']


class Found(NamedTuple):
    """What is in an image [Y, X]: a class for each pixel, or N objects by falling score.

    Attributes:
      shape: (Y, X).
      label_map: [Y, X], as `places.label_map` returns it; None where there are objects.
      scores, labels: [N], probabilities and classes of objects.
      boxes: [N, 4], (x, y, width, height) in pixels.
      masks: bool [N, Y, X]; None where objects have boxes alone.
    """

    shape: tuple[int, int]
    label_map: np.ndarray | None = None
    scores: np.ndarray | None = None
    labels: np.ndarray | None = None
    boxes: np.ndarray | None = None
    masks: np.ndarray | None = None


class Finder(NamedTuple):
    """A checkpoint that finds classes or objects in images.

    Attributes:
      predictor: its `Predictor`, whose `classes` has a name for each class.
      find: (outputs of one image, its place) -> Found.
    """

    predictor: Predictor
    find: Callable[[Any, Place], Found]


def is_dense(checkpoint: str) -> bool:
    """Whether a checkpoint is a detector or segmenter with its head; reads no array."""
    address, tower = weights.split_tower(weights.resolve(checkpoint))
    if run.is_run(address):
        return run.config_of(address)[1].get('objective', {}).get('name') in OBJECTIVES
    with weights.open_checkpoint(fetch.local(address), tower) as parsed:
        return parsed.around is not None and parsed.around.name in AROUND


def finder(
    checkpoint: str,
    *,
    threshold: float,
    masks: Masks | None = None,
    ema: bool | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
) -> Finder:
    """Loads a detector or segmenter.

    Args:
      checkpoint: as for vit_jax.load.
      threshold: score above which an object counts.
      masks: of a mask classifier, whether its masks become a class for each pixel or objects. None:
        as it was trained, if it is a run, else a class for each pixel.
      ema, image_size, patch_size: as in `classifier`.
    """
    fields = {} if patch_size is None else {'patch_size': patch_size}
    found = weights.read(
        checkpoint, image_size=image_size, ema=ema, as_input=True, whole=True, **fields
    )
    model, task = found.model, (found.config or {}).get('data', {}).get('task')
    is_classifier = isinstance(model, MaskClassifier)
    if masks is not None and not is_classifier:
        raise UserError(f'--masks={masks} is for mask classifiers, and {checkpoint} is none')
    objects = masks == 'instances' or masks is None and task == 'detect'

    def compute(params, images):
        logits, out = model.apply({'params': params}, model.normalise(images))
        if isinstance(model, (PatchClassifier, Segmenter)):
            return {'semantic': logits.transpose(0, 3, 1, 2)}
        return {name: out[name] for name in ('logits', 'masks', 'boxes') if name in out}

    def find(outputs, place):
        if 'semantic' in outputs:
            return Found(place.shape, places.label_map(outputs['semantic'], place))
        if is_classifier and not objects:
            made = places.label_map(outputs['masks'], place, outputs['logits'])
            return Found(place.shape, made)
        if is_classifier:
            rows = places.objects(outputs['logits'], outputs['masks'], place, threshold)
            scores, labels, made = rows
            boxes = np.array(list(map(box_of, made)), float).reshape(-1, 4)
            return Found(place.shape, None, scores, labels, boxes, made)
        rows = places.detections(outputs['logits'], outputs['boxes'], place)
        seen = rows[2][:, 2:].min(1) > 0  # those in the padding are nowhere in the image
        kept = (rows[0] > threshold) & seen
        return Found(place.shape, None, *(row[kept] for row in rows))

    size = found.image_size or (files.DEFAULT_SIZE,) * 2
    names = [classify.class_name(found.classes, k) for k in range(model.num_classes)]
    return Finder(Predictor(compute, found.params, size, whole_view(found.view), names), find)


def whole_view(view: str | dict) -> str | dict:
    """A view if it shows the whole image, else 'fit': what is cut off is not found."""
    given = dict(name=view) if isinstance(view, str) else view
    return view if given['name'] in WHOLE and given.get('crop', 1) == 1 else 'fit'


def box_of(mask: np.ndarray) -> list[int]:
    """The box (x, y, width, height) around a mask [Y, X] that has a pixel."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]


def with_places(view: View) -> Callable:
    """A view (image, rng) -> (uint8 [H, W, 3], its Place), see `read_ahead`."""

    def placed(image, rng):
        shape = image.shape[:2]
        geometry = view.place(shape, rng)
        return geometry.image(image), Place(shape, geometry.size, place_of(geometry, shape))

    return placed


def keyed(pairs: Iterator[tuple[str, Any]]) -> Iterator[tuple[tuple[str, Place | None], Any]]:
    """Yields ((path, place), pixels) of what `read_ahead` yields by `with_places`, or an error."""
    for path, read in pairs:
        yield ((path, None), read) if isinstance(read, UserError) else ((path, read[1]), read[0])


def record(path: str, found: Found, names: Sequence[str]) -> dict[str, Any]:
    """What was found in an image as a JSON object.

    `classes` has each class that occurs, with its share of the pixels; `objects` each object with
    its score and box (x, y, width, height), in pixels. Masks are run lengths as in COCO's json.
    """
    start = {'image': str(path), 'width': found.shape[1], 'height': found.shape[0]}
    if found.label_map is not None:
        classes = [
            dict(index=k, name=names[k], share=share,
                 segmentation=run_lengths.encoded(found.label_map == k))
            for k, share in shares(found)
        ]  # fmt: skip
        return start | {'classes': classes}
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


def lines(found: Found, names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Rows of text: (share or score, class, box as x y width height)."""
    if found.label_map is not None:
        return [(f'{share:7.2%}', names[k], '') for k, share in shares(found)]
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
    order = np.arange(len(found.labels))[::-1]  # the best one is on top
    height, width = found.shape
    start, sides = np.split(found.boxes[order], 2, axis=1)
    boxes = np.concatenate([start, start + sides], axis=1) / [width, height, width, height]
    example = dict(image=image, labels=found.labels[order], boxes=boxes)
    if found.masks is not None:
        example['masks'] = found.masks[order]
    words = [f'{names[found.labels[i]]} {found.scores[i]:.2f}' for i in order]
    entries = {}
    for k in dict.fromkeys(found.labels.tolist()):
        scores = found.scores[found.labels == k]
        times = f'{len(scores)} \N{MULTIPLICATION SIGN} ' if len(scores) > 1 else ''
        entries[k] = f'{times}{names[k]} {scores.max():.2f}'
    overlaid.write(path, example, names, words, entries)


def original(path: str) -> np.ndarray:
    """An image file as it is shown, uint8 [Y, X, 3]."""
    return files.pixels(path, lambda image, rng: images.whole(image))
