"""Detection: an image, the boxes of its objects and their classes; instances have masks too."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data import annotations, images
from vit_jax.data.readers.record import field
from vit_jax.data.sources import Source
from vit_jax.data.tasks import (
    Task,
    check_canvas,
    class_names,
    make_view,
    place_of,
    size_of,
    whole_view,
)
from vit_jax.io.bounds import Positive, Share, Size


class Fields(NamedTuple):
    """Names of the fields of a record, see `detect`, and how its boxes are written."""

    boxes: str
    labels: str
    crowd: str | None
    segmentation: str
    box_format: annotations.BoxFormat


def detect(
    source: Source,
    *,
    view: str | dict,
    image_size: Size,
    augment: tuple[str | dict, ...] = (),
    masks: bool = False,
    most: Positive[int] = 100,
    least: Share = 0.0,
    boxes: str = 'boxes',
    labels: str = 'labels',
    crowd: str | None = 'crowd',
    segmentation: str = 'segmentation',
    box_format: annotations.BoxFormat = 'xywh',
    classes: Positive[int] | tuple[str, ...] | None = None,
) -> Task:
    """An image and its objects: `image` uint8 [H, W, 3], `boxes` float32 [M, 4], `labels` int32.

    A box is (x0, y0, x1, y1) in shares of the width and height of the output. `labels` [M] are
    padded with -1, `boxes` with zeros. With `masks` there is `masks` uint8 [M, H, W] of 0 and 1,
    moved as the image is, without a filter; objects of which no pixel is left are dropped. Objects
    that are annotated as crowds are left out. An annotation that can't be right makes its example
    unusable.

    Args:
      view: how an image is cropped and resized, by name or as dict(name=..., arguments), see
        Views.
      image_size: size of the images in pixels: one number, or (height, width).
      augment: augmentations that follow the view, each by name or as dict(name=..., arguments), see
        Augmentations; those that move pixels are refused.
      masks: whether examples have the masks of their objects.
      most: number M of objects that an example has room for. An image that shows more of them is
        unusable: leaving some out would teach that they are background.
      least: share of an object's box that must be in the view for the object to be kept; one
        without any area there is dropped.
      boxes: field of the boxes, such as objects/bbox.
      labels: field of their classes.
      crowd: field of booleans, true of objects that are left out: crowds, or difficult ones. None:
        there is none.
      segmentation: field of the objects' masks: polygons (pip install "vit_jax[coco]") or run
        lengths as in COCO's json, or a PNG whose pixels are k + 1 where object k is.
      box_format: 'xywh', (x, y, width, height) in pixels, as in COCO; 'xyxy', (x0, y0, x1, y1) in
        pixels; 'yxyx', (y0, x0, y1, x1) in shares of height and width, as in TFDS.
      classes: names of the classes, or how many there are. None: those of the data set.
    """
    found, size = class_names(source, classes, 'data.classes'), size_of(image_size)
    blank = {
        'image': np.zeros((*size, 3), np.uint8),
        'boxes': np.zeros((most, 4), np.float32),
        'labels': np.full(most, -1, np.int32),
    } | ({'masks': np.zeros((most, *size), np.uint8)} if masks else {})
    view = make_view(view, image_size, augment, in_place=True)
    fields = Fields(boxes, labels, crowd, segmentation, box_format)
    read = partial(
        image_and_objects, view=view, fields=fields, blank=blank, least=least, classes=len(found)
    )
    return Task(blank, read, {'classes': found})


def image_and_objects(
    record: Mapping[str, Any],
    rng: np.random.Generator,
    *,
    view: Callable,
    fields: Fields,
    blank: Mapping[str, np.ndarray],
    least: float,
    classes: int,
) -> dict[str, np.ndarray]:
    """Makes the arrays of `detect`; `blank` are those of an example without objects."""
    with images.naming('image'):
        image = images.read(record['image'])
    shape = image.shape[:2]
    objects = annotations.read(
        record, shape, fields.boxes, fields.labels, fields.crowd, fields.box_format, classes
    )
    geometry = view.place(shape, rng)
    with images.naming('image'):
        moved = geometry.image(image)  # a JPEG is decoded here
    boxes, kept = geometry.boxes(objects.boxes, least)
    made = {key: value.copy() for key, value in blank.items() if key != 'image'}
    masks = None
    if 'masks' in blank:
        whole = annotations.masks(
            field(record, fields.segmentation), objects.places[kept], objects.names, shape
        )
        masks = [geometry.label_map(mask, 0) for mask in whole]
        seen = np.array([mask.any() for mask in masks], bool)
        boxes, kept = boxes[seen], kept[seen]
        masks = [mask for mask in masks if mask.any()]
    if len(kept) > len(made['labels']):
        raise images.Unreadable(
            f'it shows {len(kept)} objects, above data.most={len(made["labels"])}'
        )
    made['boxes'][: len(kept)] = boxes / np.float32([*geometry.size[::-1]] * 2)
    made['labels'][: len(kept)] = objects.labels[kept]
    if masks:
        made['masks'][: len(kept)] = masks
    return {'image': view.distort(moved, rng), **made}


def whole_objects(
    source: Source,
    *,
    view: str | dict,
    image_size: Size,
    most: Positive[int],
    fields: Fields,
    areas: str | None,
    canvas: Size | None,
    classes: Positive[int] | tuple[str, ...] | None = None,
) -> Task:
    """`detect` for evaluation: objects as they are annotated, crowds among them, in pixels.

    `boxes` float32 [M, 4] are (x, y, width, height) in pixels of the image, `labels` int32 [M] are
    padded with -1, `crowd` is bool [M], `areas` float32 [M] are in pixels. `size` int32 [2] is that
    of the image, `place` says where it is in `image`, see `tasks.place_of`. With a `canvas` (Y, X)
    there is `masks` uint8 [M, Y, X / 8]: their bits, 8 columns in a byte, the first the highest.

    Args:
      view: 'fit' or 'resize', which keep the whole image, by name or with arguments.
      fields: names of the fields of a record.
      areas: field of the objects' areas in pixels; of records without it, those of the masks, or
        without a canvas of the boxes.
      canvas: size (Y, X) of the masks in pixels; an image that is larger is unusable.
      image_size, most, classes: as in `detect`.
    """
    found, size = class_names(source, classes, 'data.classes'), size_of(image_size)
    blank = {
        'image': np.zeros((*size, 3), np.uint8),
        'boxes': np.zeros((most, 4), np.float32), 'labels': np.full(most, -1, np.int32),
        'crowd': np.zeros(most, bool), 'areas': np.zeros(most, np.float32),
        'size': np.ones(2, np.int32), 'place': np.tile(np.float32([1, 0]), (2, 1)),
    }  # fmt: skip
    if canvas is not None:
        height, width = canvas = size_of(canvas)
        blank['masks'] = np.zeros((most, height, -(-width // 8)), np.uint8)
    read = partial(
        image_and_whole_objects, view=whole_view(view, image_size), fields=fields, areas=areas,
        canvas=canvas, blank=blank, classes=len(found),
    )  # fmt: skip
    return Task(blank, read, {'classes': found})


def image_and_whole_objects(
    record: Mapping[str, Any],
    rng: np.random.Generator,
    *,
    view: Callable,
    fields: Fields,
    areas: str | None,
    canvas: tuple[int, int] | None,
    blank: Mapping[str, np.ndarray],
    classes: int,
) -> dict[str, np.ndarray]:
    """Makes the arrays of `whole_objects`; `blank` are those of an example without objects."""
    with images.naming('image'):
        image = images.read(record['image'])
    shape = image.shape[:2]
    objects = annotations.read(
        record, shape, fields.boxes, fields.labels, fields.crowd, fields.box_format, classes,
        as_annotated=True,
    )  # fmt: skip
    count, most = len(objects.labels), len(blank['labels'])
    if count > most:
        raise images.Unreadable(f'it has {count} objects, above most_objects={most}')
    geometry = view.place(shape, rng)
    made = {key: value.copy() for key, value in blank.items() if key != 'image'}
    made['place'], made['size'][:] = place_of(geometry, shape), shape
    sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
    made['boxes'][:count] = np.concatenate([objects.boxes[:, :2], sides], axis=1)
    made['labels'][:count], made['crowd'][:count] = objects.labels, objects.crowd
    made['areas'][:count] = sides.prod(axis=1)
    if canvas is not None:
        check_canvas(shape, canvas)
        whole = annotations.masks(
            field(record, fields.segmentation), objects.places, objects.names, shape
        )
        for k, mask in enumerate(whole):
            bits = np.packbits(mask, axis=1)
            made['masks'][k, : shape[0], : bits.shape[1]] = bits
            made['areas'][k] = mask.sum()
    if areas is not None and (areas in record or areas.split('/')[0] in record):
        made['areas'][:count] = annotated_areas(record, areas, count)
    with images.naming('image'):
        return {'image': geometry.image(image), **made}


def annotated_areas(record: Mapping[str, Any], areas: str, count: int) -> np.ndarray:
    """The areas [count] in a field of a record; raises Unreadable if they are none."""
    found = annotations.numbers(field(record, areas), areas).ravel()
    if len(found) != count or not np.isfinite(found).all():
        raise images.Unreadable(f'its {areas} are not {count} finite numbers')
    return found
