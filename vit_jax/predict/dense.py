"""What detectors and segmenters find in images, at the images' own size."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from vit_jax.convert import load as weights
from vit_jax.convert import run
from vit_jax.data import files, mixture
from vit_jax.data.tasks import WHOLE, View, place_of
from vit_jax.errors import UserError
from vit_jax.evaluators import classify, panoptic, places
from vit_jax.evaluators.places import Place
from vit_jax.io import fetch
from vit_jax.models.detector import Detector
from vit_jax.models.masks import MaskClassifier
from vit_jax.models.patch_classifier import PatchClassifier
from vit_jax.models.segmenter import Segmenter
from vit_jax.predict import Predictor
from vit_jax.predict.findings import Found

OBJECTIVES = ('detect', 'masks', 'segment')
AROUND = ('a detector', 'a mask classifier')  # names of `convert.stages.Around`
OVERLAP = 0.8  # least share of its mask that a query of a panoptic segment has
THRESHOLDS = {'panoptic': 0.8}  # of scores, where none is given; those of EoMT
THRESHOLD = 0.5
TASKS = {'detect': 'instances', 'panoptic': 'panoptic'}  # what masks of a run become, by data.task
Masks = Literal['semantic', 'instances', 'panoptic']


class Finder(NamedTuple):
    """A checkpoint that finds classes or objects in images.

    Attributes:
      predictor: its `Predictor`, whose `classes` has a name for each class.
      find: (outputs of one image, its place) -> Found.
      by_pixel: whether it finds a class for each pixel.
    """

    predictor: Predictor
    find: Callable[[Any, Place], Found]
    by_pixel: bool = False


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
    threshold: float | None = None,
    masks: Masks | None = None,
    stuff: Sequence[str] | None = None,
    ema: bool | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
) -> Finder:
    """Loads a detector or segmenter.

    Args:
      checkpoint: as for vit_jax.load.
      threshold: score above which an object or segment counts. None: 0.5, or 0.8 of segments.
      masks: of a mask classifier, whether its masks become a class for each pixel, objects or
        panoptic segments. None: as it was trained, if it is a run, else a class for each pixel.
      stuff: names of the classes that are no things, for segments, see `stuff_of`.
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
    masks = masks or TASKS.get(task, 'semantic') if is_classifier else None
    threshold = THRESHOLDS.get(masks, THRESHOLD) if threshold is None else threshold
    names = [classify.class_name(found.classes, k) for k in range(model.num_classes)]
    stuff = stuff_of(stuff, found.config or {}, names) if masks == 'panoptic' else ()

    def compute(params, images):
        logits, out = model.apply({'params': params}, model.normalise(images))
        if isinstance(model, (PatchClassifier, Segmenter)):
            return {'semantic': logits.transpose(0, 3, 1, 2)}
        return {name: out[name] for name in ('logits', 'masks', 'boxes') if name in out}

    size = found.image_size or (files.DEFAULT_SIZE,) * 2
    predictor = Predictor(compute, found.params, size, whole_view(found.view), names)
    find = partial(found_in, masks=masks, threshold=threshold, stuff=stuff)
    by_pixel = not isinstance(model, Detector) and masks in (None, 'semantic')
    return Finder(predictor, find, by_pixel)


def found_in(
    outputs: Mapping[str, np.ndarray], place: Place, *, masks: Masks | None, threshold: float,
    stuff: Collection[int],
) -> Found:  # fmt: skip
    """What outputs of one image say; other arguments are those of `finder`."""
    if 'label_map' in outputs:
        return Found(place.shape, outputs['label_map'])
    if 'semantic' in outputs:
        return Found(place.shape, places.label_map(outputs['semantic'], place))
    logits = outputs['logits']
    if masks == 'semantic':
        return Found(place.shape, places.label_map(outputs['masks'], place, logits))
    if masks == 'panoptic':
        how = threshold, OVERLAP, stuff
        numbers, labels, scores = places.segments(logits, outputs['masks'], place, *how)
        return Found(place.shape, segments=numbers, scores=scores, labels=labels)
    if masks == 'instances':
        scores, labels, made = places.objects(logits, outputs['masks'], place, threshold)
        boxes = np.array(list(map(box_of, made)), float).reshape(-1, 4)
        return Found(place.shape, scores=scores, labels=labels, boxes=boxes, masks=made)
    rows = places.detections(logits, outputs['boxes'], place)
    seen = rows[2][:, 2:].min(1) > 0  # those in the padding are nowhere in the image
    kept = (rows[0] > threshold) & seen
    rows = dict(zip(('scores', 'labels', 'boxes'), (row[kept] for row in rows), strict=True))
    return Found(place.shape, **rows)


def stuff_of(
    given: Sequence[str] | None, config: Mapping[str, Any], classes: Sequence[str]
) -> frozenset[int]:
    """Numbers of the classes that are no things.

    Args:
      given: their names. None: as in the first panoptic evaluation of a run, whose data set says so
        if its settings do not; of other checkpoints, none.
      config: that of a run, or {}.
      classes: names of all classes.
    """
    evals = [one for one in config.get('evals', {}).values() if one.get('type') == 'panoptic']
    if given is not None or not evals:
        return panoptic.stuff_of(tuple(given or ()), None, tuple(classes), 0, '--stuff')
    settings, first = evals[0], int(evals[0].get('zero') == 'background')
    named = settings.get('stuff')
    try:
        own = mixture.load(**settings['source']) if named is None else None
    except UserError as e:
        raise UserError(
            f'the data set that says which classes are stuff is not here ({e}); --stuff=NAME,... '
            'names them, --stuff= none'
        ) from e
    return panoptic.stuff_of(named, own, tuple(classes), first)


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
