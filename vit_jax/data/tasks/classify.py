"""Classification: an image and its class or classes."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from vit_jax.data import images
from vit_jax.data.sources import Source
from vit_jax.data.tasks import Task, make_view, size_of
from vit_jax.errors import UserError
from vit_jax.io.bounds import Size


def classify(
    source: Source,
    *,
    view: str | dict,
    image_size: Size,
    augment: tuple[str | dict, ...] = (),
) -> Task:
    """An image and its class or classes: `image` uint8 [H, W, 3], `label` int32 [] or [L].

    Where examples have several labels, `label` is padded with -1.

    Args:
      view: how an image is cropped and resized, by name or as dict(name=..., arguments), see
        Views.
      image_size: size of the images in pixels: one number, or (height, width).
      augment: augmentations that follow the view, each by name or as dict(name=..., arguments), see
        Augmentations.
    """
    most = getattr(source.records, 'max_labels', None) or 1
    shape = () if most == 1 else (most,)
    blank = {
        'image': np.zeros((*size_of(image_size), 3), np.uint8),
        'label': np.full(shape, -1 if shape else 0, np.int32),
    }
    read = partial(
        image_and_label, view=make_view(view, image_size, augment), shape=shape,
        classes=len(source.classes),
    )  # fmt: skip
    return Task(blank, read, {'classes': tuple(source.classes)})


def image_and_label(
    record: Mapping[str, Any],
    rng: np.random.Generator,
    out: Mapping[str, np.ndarray] | None = None,
    *,
    view: Callable,
    shape: tuple[int, ...],
    classes: int,
) -> dict[str, np.ndarray]:
    """Makes the arrays of `classify`; `shape` is that of the label, `out` as in `Task`."""
    if 'label' not in record:
        raise UserError("it has no label; data.task='image' reads images alone")
    label = np.asarray(record['label'], np.int32).reshape(shape)
    with images.naming('image'):
        # a JPEG is decoded here
        image = view(images.read(record['image']), rng, out and out['image'])
    least = -1 if shape else 0
    for one in label.ravel().tolist():  # faster than NumPy for a few
        if not least <= one < classes:
            raise UserError(f'label {one} is out of range: the data set has {classes} classes')
    return {'image': image, 'label': label}
