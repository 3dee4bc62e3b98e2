"""Panoptic segmentation: an image, and the segment of each pixel; things and stuff alike."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from vit_jax.data import images, label_maps, segments
from vit_jax.data.segments import Fields
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
from vit_jax.errors import UserError
from vit_jax.io.bounds import NonNegative, Positive, Size


def panoptic(
    source: Source,
    *,
    view: str | dict,
    image_size: Size,
    augment: tuple[str | dict, ...] = (),
    most: Positive[int] = 100,
    segments: str = 'segments',
    labels: str = 'labels',
    crowd: str | None = 'crowd',
    ids: str | None = 'ids',
    zero: segments.Zero = 'void',
    ignored: tuple[NonNegative[int], ...] = (),
    classes: Positive[int] | tuple[str, ...] | None = None,
) -> Task:
    """An image and its segments: `image` uint8 [H, W, 3], `segments` [H, W], `labels` int32 [M].

    A pixel of `segments` is the number of its segment, whose class `labels` has; `labels` are
    padded with -1. It is uint8, or uint16 of more than 255 segments; its largest number, 255 or
    65535, is that of pixels in no segment: void ones, the padding and those of crowds. Segments are
    moved as the image is, without a filter; those of which no pixel is left are dropped. A segment
    that can't be right makes its example unusable.

    Args:
      view: how an image is cropped and resized, by name or as dict(name=..., arguments), see
        Views.
      image_size: size of the images in pixels: one number, or (height, width).
      augment: augmentations that follow the view, each by name or as dict(name=..., arguments), see
        Augmentations; those that move pixels are refused.
      most: number M of segments that an example has room for. An image that shows more of them is
        unusable.
      segments: field of the segments: a PNG of their ids, in colours as in COCO's panoptic
        segmentation (red + 256 green + 65536 blue), or grey values or indices of a palette.
      labels: field of the segments' classes.
      crowd: field of booleans, true of segments that are void: crowds. None: there is none.
      ids: field of the segments' ids. None: they are 1, 2, ...
      zero: what id 0 is: 'void', no segment; 'background', a segment of a class before those of the
        data set.
      ignored: other ids that are void, such as 255 in Pascal VOC.
      classes: names of the classes, or how many there are. None: those of the data set.
    """
    found = class_names(source, classes, 'data.classes', zero == 'background')
    blank = blank_of(image_size, size_of(image_size), most)
    read = partial(
        image_and_segments, view=make_view(view, image_size, augment, in_place=True), blank=blank,
        fields=Fields(segments, labels, crowd, ids, zero, tuple(ignored)), classes=len(found),
    )  # fmt: skip
    return Task(blank, read, {'classes': found})


def blank_of(
    image_size: Size, size: tuple[int, int], most: int
) -> dict[str, np.ndarray]:
    """Arrays of an example without segments, the map of which has a size [Y, X]."""
    if most >= segments.VOID:
        raise UserError(f'{most} segments are not fewer than {segments.VOID}')
    dtype = np.dtype(np.uint8 if most <= label_maps.MOST_BYTE else np.uint16)
    return {
        'image': np.zeros((*size_of(image_size), 3), np.uint8),
        'segments': np.full(size, label_maps.ignored(dtype), dtype),
        'labels': np.full(most, -1, np.int32),
    }


def read_both(
    record: Mapping[str, Any], fields: Fields, classes: int
) -> tuple[np.ndarray | images.Encoded, segments.Segments]:
    """The image and the segments of a record; raises Unreadable.

    `classes` is the number of all classes, the background included.
    """
    classes -= fields.zero == 'background'
    with images.naming('image'):
        image = images.read(record['image'])
    return image, segments.read(record, image.shape[:2], fields, classes)


def image_and_segments(
    record: Mapping[str, Any],
    rng: np.random.Generator,
    *,
    view: Callable,
    fields: Fields,
    blank: Mapping[str, np.ndarray],
    classes: int,
) -> dict[str, np.ndarray]:
    """Makes the arrays of `panoptic`; `blank` are those of an example without segments."""
    image, found = read_both(record, fields, classes)
    geometry = view.place(image.shape[:2], rng)
    with images.naming('image'):
        moved = geometry.image(image)  # a JPEG is decoded here
    numbers = geometry.label_map(found.numbers, segments.VOID)
    pixels = np.bincount(numbers.ravel(), minlength=len(found.labels))[: len(found.labels)]
    kept = np.flatnonzero((pixels > 0) & ~found.crowd)
    labels = blank['labels'].copy()
    if len(kept) > len(labels):
        raise images.Unreadable(f'it shows {len(kept)} segments, above data.most={len(labels)}')
    labels[: len(kept)] = found.labels[kept]
    numbers = segments.renumbered(numbers, kept, blank['segments'].dtype)
    return {'image': view.distort(moved, rng), 'segments': numbers, 'labels': labels}


def whole_segments(
    source: Source,
    *,
    view: str | dict,
    image_size: Size,
    canvas: Size,
    most: Positive[int],
    fields: Fields,
    classes: Positive[int] | tuple[str, ...] | None = None,
) -> Task:
    """`panoptic` for evaluation: segments keep the size of the images, and crowds are there.

    `segments` [Y, X] has those of an image in its upper left corner and void pixels in the rest.
    `crowd` is bool [M], `size` int32 [2] that of the image; `place` says where it is in `image`,
    see `tasks.place_of`.

    Args:
      view: 'fit' or 'resize', which keep the whole image, by name or with arguments.
      canvas: size (Y, X) of the maps in pixels; an image that is larger is unusable.
      fields: names of the fields of a record, and what its ids are.
      image_size, most, classes: as in `panoptic`.
    """
    found = class_names(source, classes, 'data.classes', fields.zero == 'background')
    blank = blank_of(image_size, size_of(canvas), most) | {
        'crowd': np.zeros(most, bool), 'size': np.ones(2, np.int32),
        'place': np.tile(np.float32([1, 0]), (2, 1)),
    }  # fmt: skip
    read = partial(
        image_and_whole_segments, view=whole_view(view, image_size), fields=fields, blank=blank,
        classes=len(found),
    )  # fmt: skip
    return Task(blank, read, {'classes': found})


def image_and_whole_segments(
    record: Mapping[str, Any],
    rng: np.random.Generator,
    *,
    view: Callable,
    fields: Fields,
    blank: Mapping[str, np.ndarray],
    classes: int,
) -> dict[str, np.ndarray]:
    """Makes the arrays of `whole_segments`; `blank` are those of an example without an image."""
    image, found = read_both(record, fields, classes)
    (height, width), count = image.shape[:2], len(found.labels)
    made = {key: value.copy() for key, value in blank.items() if key != 'image'}
    check_canvas((height, width), made['segments'].shape)
    if count > len(made['labels']):
        raise images.Unreadable(
            f'it has {count} segments, above most_segments={len(made["labels"])}'
        )
    geometry = view.place((height, width), rng)
    made['place'], made['size'][:] = place_of(geometry, (height, width)), (height, width)
    made['segments'][:height, :width] = segments.renumbered(
        found.numbers, np.arange(count), made['segments'].dtype
    )
    made['labels'][:count], made['crowd'][:count] = found.labels, found.crowd
    with images.naming('image'):
        return {'image': geometry.image(image), **made}
