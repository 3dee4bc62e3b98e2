"""Semantic segmentation: an image and the class of each pixel."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from vit_jax.data import annotations, images, label_maps
from vit_jax.data.readers import names
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
from vit_jax.data.windows import Windows
from vit_jax.errors import UserError
from vit_jax.io.bounds import NonNegative, Positive, Size

MOST_CLASSES = 2**16 - 1


def segment(
    source: Source,
    *,
    view: str | dict,
    image_size: Size,
    augment: tuple[str | dict, ...] = (),
    mask: str = 'mask',
    classes: Positive[int] | tuple[str, ...] | None = None,
    zero: label_maps.Zero = 'class',
    ignored: tuple[NonNegative[int], ...] | None = None,
) -> Task:
    """An image and its classes by pixel: `image` uint8 [H, W, 3], `label_map` [H, W].

    `label_map` is uint8, or uint16 of more than 255 classes; its largest number, 255 or 65535, is
    that of ignored pixels: the padding, and the ids that are ignored. A mask is a PNG whose pixels
    are class ids, grey values or indices of a palette, of the size of the image as it is shown. It
    is moved as the image is, without a filter.

    Args:
      view: how an image is cropped and resized, by name or as dict(name=..., arguments), see
        Views.
      image_size: size of the images in pixels: one number, or (height, width).
      augment: augmentations that follow the view, each by name or as dict(name=..., arguments), see
        Augmentations; those that move pixels are refused.
      mask: field of the records that holds the mask.
      classes: names of the classes, or how many there are. None: those of the data set.
      zero: what id 0 is: 'class', the first class; 'background', a class before those of the data
        set, as in Pascal VOC; 'ignored', nothing, so that id 1 is the first class, as in ADE20K.
      ignored: other ids that are ignored. None: 255, or 65535 of more than 255 classes.
    """
    found = class_names(source, classes, 'data.classes', zero == 'background')
    if len(found) > MOST_CLASSES:
        raise UserError(f'{len(found)} classes are more than {MOST_CLASSES}')
    others = None if ignored is None else tuple(ignored)
    ids, size = label_maps.Ids(len(found), zero, others), size_of(image_size)
    blank = {
        'image': np.zeros((*size, 3), np.uint8), 'label_map': np.full(size, ids.fill, ids.dtype)
    }
    view = make_view(view, image_size, augment, in_place=True)
    read = partial(image_and_label_map, view=view, mask=mask, ids=ids)
    return Task(blank, read, {'classes': found})


def whole_label_map(
    source: Source,
    *,
    view: str | dict,
    image_size: Size,
    canvas: Size,
    mask: str = 'mask',
    classes: Positive[int] | tuple[str, ...] | None = None,
    zero: label_maps.Zero = 'class',
    ignored: tuple[NonNegative[int], ...] | None = None,
    windows: Windows | None = None,
) -> Task:
    """`segment` for evaluation: label maps keep the size of the images.

    `label_map` [Y, X] has that of an image in its upper left corner and ignored pixels in the rest.
    `place` float32 [2, 2] says where the image is in `image`, see `tasks.place_of`. With `windows`
    there are `image` [N, H, W, 3], `place` [N, 2, 2] and `windows` int32 [S], see `Windows.cut`.

    Args:
      view: 'fit' or 'resize', which keep the whole image, by name or with arguments; unused with
        `windows`.
      canvas: size (Y, X) of the label maps in pixels; an image that is larger is unusable.
      windows: where windows are cut from the image; None: one view shows it.
      image_size, mask, classes, zero, ignored: as in `segment`.
    """
    task = segment(
        source, view=view, image_size=image_size, mask=mask, classes=classes, zero=zero,
        ignored=ignored,
    )  # fmt: skip
    whole_view(view, image_size)
    fill, dtype = task.read.keywords['ids'].fill, task.blank['label_map'].dtype
    empty = np.full(size_of(canvas), fill, dtype)
    if windows is None:
        cut = partial(one_view, view=task.read.keywords['view'])
        blank = {'image': task.blank['image'], 'place': np.tile(np.float32([1, 0]), (2, 1))}
    else:
        cut = windows.cut
        blank = cut(np.zeros((1, 1, 3), np.uint8))
    keywords = {k: task.read.keywords[k] for k in ('mask', 'ids')}
    blank = blank | {'label_map': empty}
    read = partial(image_and_whole_label_map, blank=blank, cut=cut, **keywords)
    return Task(blank, read, task.names)


def one_view(
    image: np.ndarray | images.Encoded, *, view: Callable
) -> dict[str, np.ndarray]:
    """The `image` of a view and its `place`; raises Unreadable if it does not show all."""
    geometry = view.place(image.shape[:2], None)
    place = place_of(geometry, image.shape[:2])
    return {'image': geometry.image(image), 'place': place}


def image_and_whole_label_map(
    record: Mapping[str, Any],
    rng: np.random.Generator,
    *,
    blank: Mapping[str, np.ndarray],
    cut: Callable,
    mask: str,
    ids: label_maps.Ids,
) -> dict[str, np.ndarray]:
    """Makes the arrays of `whole_label_map`: the label map, and what `cut` makes of the image.

    `blank` has the arrays of an example without an image.
    """
    image, labels = read_both(record, mask, ids)
    height, width = labels.shape
    check_canvas(labels.shape, blank['label_map'].shape)
    with images.naming('image'):
        found = cut(image)
    padded = blank['label_map'].copy()
    padded[:height, :width] = labels
    return found | {'label_map': padded}


def read_both(
    record: Mapping[str, Any], mask: str, ids: label_maps.Ids
) -> tuple[np.ndarray | images.Encoded, np.ndarray]:
    """The image and the label map of a record; raises Unreadable."""
    with images.naming('image'):
        image = images.read(record['image'])
    with images.naming(mask):
        found = label_maps.read(field(record, mask))
        check_size(found.shape, image.shape)
        return image, ids.labels(found, record.get(names.TABLE))


def image_and_label_map(
    record: Mapping[str, Any],
    rng: np.random.Generator,
    *,
    view: Callable,
    mask: str,
    ids: label_maps.Ids,
) -> dict[str, np.ndarray]:
    """Makes the arrays of `segment`."""
    image, labels = read_both(record, mask, ids)
    geometry = view.place(image.shape[:2], rng, labels)
    with images.naming('image'):
        moved = geometry.image(image)  # a JPEG is decoded here
    return {
        'image': view.distort(moved, rng), 'label_map': geometry.label_map(labels, ids.fill)
    }


def check_size(mask: tuple[int, ...], image: tuple[int, ...]) -> None:
    """Raises Unreadable unless a mask has the shape of its image."""
    if mask[:2] != image[:2]:
        raise images.Unreadable(
            f'it has {annotations.sized(mask)} pixels, the image {annotations.sized(image)}'
            f'{annotations.turned(mask, image)}'
        )
