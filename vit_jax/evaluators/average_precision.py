"""COCO's average precision, by pycocotools.

Shapes: T thresholds of intersection over union, R recalls, K classes, A ranges of areas, D
detections, M objects of an image.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_jax.errors import UserError

AREAS = ('', '_small', '_medium', '_large')  # ranges of pycocotools; the first one has all
NAMES = ('ap', 'ap50', 'ap75', *(f'ap{part}' for part in AREAS[1:]), 'ar')


class Image(NamedTuple):
    """The objects of an image and what was detected in it; boxes are (x, y, width, height).

    Attributes:
      boxes: [M, 4] in pixels.
      labels: int [M].
      crowd: bool [M], which ones are COCO's crowds: no detection must find them, and those within
        them do not count.
      areas: [M], in pixels.
      found_boxes: [D, 4] in pixels.
      found_labels: int [D].
      scores: [D].
      found_areas: int [D], pixels of masks.
      true_pixels: int [M], pixels of masks.
      common: int [D, M], pixels that a detection's mask shares with an object's.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    found_boxes: np.ndarray
    found_labels: np.ndarray
    scores: np.ndarray
    found_areas: np.ndarray | None = None
    true_pixels: np.ndarray | None = None
    common: np.ndarray | None = None

    def iou(self) -> np.ndarray:
        """Intersection over union of masks, float64 [D, M]; of a crowd, over the detection."""
        own = self.found_areas[:, None].astype(np.float64)
        union = np.where(self.crowd, own, own + self.true_pixels - self.common)
        return np.divide(self.common, union, out=np.zeros(union.shape), where=union > 0)


class Curves(NamedTuple):
    """Precisions and recalls as pycocotools has them: -1 where a class has no object.

    Attributes:
      thresholds: of intersection over union, [T].
      precision: [T, R, K, A].
      recall: [T, K, A].
    """

    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray


def check_installed() -> None:
    """Raises UserError if there is no pycocotools."""
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ModuleNotFoundError as e:
        raise UserError(
            'evals of type detect need pycocotools: pip install "vit_jax[coco]"'
        ) from e


def curves(images: Sequence[Image], classes: int, most: int, masks: bool) -> Curves:
    """Compares detections with objects by their boxes, or by their masks.

    Args:
      images: all of the data set.
      classes: number of classes K.
      most: detections of an image that count for a class.
      masks: whether masks are compared.
    """
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        truth, found = (
            data_set(annotations(images, masks, kind), len(images), classes)
            for kind in ('true', 'found')
        )
        judge = COCOeval(truth, found, 'bbox')
        judge.params.maxDets = [most]
        if masks:
            matrices = [image.iou() for image in images]

            def compute_iou(number, category):
                true, own = judge._gts[number, category], judge._dts[number, category]
                order = np.argsort([-one['score'] for one in own], kind='stable')
                rows = [own[i]['row'] for i in order]
                return matrices[number - 1][np.ix_(rows, [one['row'] for one in true])]

            judge.computeIoU = compute_iou
        judge.evaluate()
        judge.accumulate()
    return Curves(
        judge.params.iouThrs, judge.eval['precision'][..., 0], judge.eval['recall'][..., 0]
    )


def data_set(annotations: list[dict], images: int, classes: int) -> Any:
    """A COCO of pycocotools; all ids count from 1, as it takes 0 for none."""
    from pycocotools.coco import COCO

    made = COCO()
    made.dataset = {
        'images': [{'id': i + 1} for i in range(images)],
        'categories': [{'id': k + 1} for k in range(classes)], 'annotations': annotations,
    }  # fmt: skip
    made.createIndex()
    return made


def annotations(images: Sequence[Image], masks: bool, kind: str) -> list[dict]:
    """The annotations of COCO's json: of the objects ('true') or of the detections ('found')."""
    made = []
    for number, image in enumerate(images, 1):
        if kind == 'true':
            columns = dict(bbox=image.boxes, area=image.areas, iscrowd=image.crowd)
            labels = image.labels
        else:
            areas = image.found_areas if masks else image.found_boxes[:, 2:].prod(axis=1)
            columns = dict(bbox=image.found_boxes, area=areas, score=image.scores)
            labels = image.found_labels
        values = zip(*(np.asarray(x, np.float64).tolist() for x in columns.values()), strict=True)
        for row, (label, one) in enumerate(zip(labels.tolist(), values, strict=True)):
            made.append({
                'id': len(made) + 1, 'image_id': number, 'category_id': label + 1, 'row': row,
                'iscrowd': 0, **dict(zip(columns, one, strict=True)),
            })  # fmt: skip
    return made


def mean(values: np.ndarray) -> float | None:
    """Mean of those that are not -1; None if all are."""
    values = values[values > -1]
    return float(values.mean()) if values.size else None


def summary(found: Curves) -> dict[str, float]:
    """Computes `NAMES`, see `detect.Detect`; without those of areas that no object has."""
    at = {round(float(t), 2): k for k, t in enumerate(found.thresholds)}
    values = [
        found.precision[..., 0], *(found.precision[at[t], ..., 0] for t in (0.5, 0.75)),
        *(found.precision[..., k] for k in range(1, len(AREAS))), found.recall[..., 0],
    ]  # fmt: skip
    means = {name: mean(x) for name, x in zip(NAMES, values, strict=True)}
    return {name: x for name, x in means.items() if x is not None}


def by_class(found: Curves, classes: Sequence[str]) -> Mapping[str, float]:
    """{class: average precision} of the classes that have objects."""
    means = {name: mean(found.precision[:, :, k, 0]) for k, name in enumerate(classes)}
    return {name: x for name, x in means.items() if x is not None}
