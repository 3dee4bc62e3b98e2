"""Detection and instance segmentation: COCO's average precision."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from vit_jax import evaluators
from vit_jax.data import annotations
from vit_jax.data.tasks import size_of
from vit_jax.data.tasks.detect import Fields, whole_objects
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.evaluators import Subject, average_precision, instances
from vit_jax.io.bounds import Positive, Prefetch, Rate, Size, Threads, Workers

MASK = 'mask_'  # before the names of metrics of masks


def metrics(*, masks: bool = False, **settings: Any) -> dict[str, str]:
    """{metric: 'max'}, as Detect measures them; more is better of all."""
    starts = ('', MASK) if masks else ('',)
    return {f'{start}{name}': 'max' for start in starts for name in average_precision.NAMES}


class Detect:
    """Measures a detector, or a mask classifier, by COCO's average precision.

    Boxes that the objective predicts for the view of an image are moved to the image's own pixels
    and cut off at its edges, which DETR's and YOLOS's evaluations leave out. The score of a query
    is the probability of its best class (arXiv:2005.12872). Of a mask classifier, the best pairs of
    a query and a class count, with the probability times the mean of the mask's (arXiv:2112.01527);
    masks are interpolated to the view, then to the image, and their boxes are those around them.

    Objects are as they are annotated: crowds are no misses, and detections in them do not count.
    Ranges of areas are COCO's, in pixels of the image: below 32^2, up to 96^2, above.

    - ap: average precision, mean over classes and thresholds of intersection over union, 0.5, 0.55,
      ..., 0.95
    - ap50, ap75: at one threshold
    - ap_small, ap_medium, ap_large: of objects of these areas; left out if there are none
    - ar: recall of `most` detections, mean over classes and thresholds
    - ap/CLASS: of each class that has objects, with `by_class`
    - mask_ap, mask_ap50, ...: the same of masks, with `masks`

    Args:
      source: the data set, see Data sets.
      image_size: size of the images in pixels: one number, or (height, width).
      batch_size: examples in a batch, over all devices and processes.
      masks: whether masks are measured, too.
      canvas: size of the largest image of the data set in pixels, for masks: theirs are padded to
        it.
      view: 'fit' pads images at their aspect ratio, 'resize' stretches them; see Views.
      most: detections of an image that count, those of the largest scores.
      most_objects: objects that an image may have.
      boxes, labels, crowd, segmentation, box_format: as in the task `detect`.
      areas: field of the objects' areas in pixels. Of records without it they are those of the
        masks, with `masks`, else of the boxes.
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
        masks: bool = False,
        canvas: Size | None = None,
        view: str | dict = 'fit',
        most: Positive[int] = 100,
        most_objects: Positive[int] = 100,
        boxes: str = 'boxes',
        labels: str = 'labels',
        crowd: str | None = 'crowd',
        segmentation: str = 'segmentation',
        areas: str | None = 'areas',
        box_format: annotations.BoxFormat = 'xywh',
        by_class: bool = False,
        threads: Threads | None = None,
        workers: Workers = 0,
        prefetch: Prefetch = 8,
        tolerance: Rate = 0.0,
    ) -> None:
        self.mesh, self.masks, self.most, self.each = subject.mesh, masks, most, by_class
        average_precision.check_installed()
        read = evaluators.reader(
            self.mesh, batch_size, threads=threads, workers=workers, prefetch=prefetch,
            tolerance=tolerance,
        )  # fmt: skip
        count = count_classes(subject.outputs, masks, canvas)
        opened = evaluators.open_source(subject, source, count)
        self.source, self.classes = opened.source, opened.classes
        self.sources = {'source': self.source}
        fields = Fields(boxes, labels, crowd, segmentation, box_format)
        task = whole_objects(
            self.source, view=view, image_size=image_size, most=most_objects, fields=fields,
            areas=areas, canvas=canvas if masks else None, classes=self.classes,
        )  # fmt: skip
        self.feed = partial(read, self.source, task)
        self.metrics = metrics(masks=masks) | {
            f'{start}ap/{name}': 'max'
            for start in (('', MASK) if masks else ('',))
            for name in (self.classes if by_class else ())
        }
        step = partial(
            instances.detections, predict=subject.predict, most=most,
            canvas=None if canvas is None else size_of(canvas),
        )  # fmt: skip
        self.step = evaluators.compiled(step, self.mesh)

    def __call__(
        self,
        params: Any,
        stop: Stop | None = None,
        set_phase: Callable[[str], None] = lambda phase: None,
        advance: Callable[[int], None] = lambda images: None,
    ) -> dict[str, float] | None:
        """Measures {metric: value}; returns None if `stop` becomes true.

        Calls `set_phase` and `advance` as `evaluators.results` does.
        """
        stop, found = Stop() if stop is None else stop, {}
        for batch in evaluators.results(
            self.step, self.feed, params, self.mesh, stop, set_phase, advance
        ):
            found |= by_id(batch)
        if stop:
            return None
        images, made = [found[i] for i in sorted(found)], {}
        for start, masks in (('', False), (MASK, True))[: 1 + self.masks]:
            curves = average_precision.curves(images, len(self.classes), self.most, masks)
            made |= {
                f'{start}{name}': x for name, x in average_precision.summary(curves).items()
            }
            if self.each:
                each = average_precision.by_class(curves, self.classes)
                made |= {f'{start}ap/{name}': x for name, x in each.items()}
        if 'ap' not in made:
            raise UserError('evals: no image of the data set has an object that is no crowd')
        return made | {'examples': len(images)}


detect = Detect  # by its name in a config


def count_classes(
    outputs: Mapping[str, jax.ShapeDtypeStruct], masks: bool, canvas: Size | None
) -> int:
    """Number of classes K by the shapes of outputs; raises UserError if they can't be measured."""
    if 'logits' not in outputs or not {'boxes', 'masks'} & outputs.keys():
        raise UserError(
            'evals of type detect read `logits` and `boxes` or `masks`, as the objectives detect '
            f'and masks predict them; this one predicts {", ".join(sorted(outputs))}'
        )
    if masks and 'masks' not in outputs:
        raise UserError('evals of type detect: masks=True, and the objective predicts boxes alone')
    if 'boxes' not in outputs and canvas is None:
        raise UserError(
            'evals of type detect: of predicted masks it needs canvas, the size of the largest '
            'image of the data set'
        )
    return outputs['logits'].shape[2] - 1


def by_id(batch: Mapping[str, np.ndarray]) -> dict[int, average_precision.Image]:
    """{id: Image} of the examples of a batch that count, of what `instances.detections` makes."""
    made = {}
    for i in np.flatnonzero(batch['true_mask'] > 0):
        true = batch['true_labels'][i] >= 0
        kept = ('boxes', 'labels', 'crowd', 'areas')
        own = {name: batch[f'true_{name}'][i][true] for name in kept}
        own |= {name: batch[name][i] for name in ('found_boxes', 'found_labels', 'scores')}
        if 'common' in batch:
            own['found_areas'] = batch['found_areas'][i]
            own['true_pixels'] = batch['true_pixels'][i][true]
            own['common'] = batch['common'][i][:, true]
        made[int(batch['true_id'][i])] = average_precision.Image(**own)
    return made
