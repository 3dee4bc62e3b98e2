"""Images alone, for methods that learn without labels."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from vit_jax.data import images
from vit_jax.data.sources import Source
from vit_jax.data.tasks import Task, make_view, size_of
from vit_jax.io.bounds import Size


def image(
    source: Source,
    *,
    view: str | dict,
    image_size: Size,
    augment: tuple[str | dict, ...] = (),
) -> Task:
    """An image: `image` uint8 [H, W, 3]. Labels are not read, and need not exist.

    Args:
      view, image_size, augment: as in the task `classify`.
    """
    blank = {'image': np.zeros((*size_of(image_size), 3), np.uint8)}
    return Task(blank, partial(image_of, view=make_view(view, image_size, augment)))


def image_of(
    record: Mapping[str, Any],
    rng: np.random.Generator,
    out: Mapping[str, np.ndarray] | None = None,
    *,
    view: Callable,
) -> dict[str, np.ndarray]:
    """Makes the array of `image`; `out` as in `Task`."""
    return {'image': view(images.read(record['image']), rng, out and out['image'])}
