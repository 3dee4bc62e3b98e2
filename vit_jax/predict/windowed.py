"""Label maps from windows that slide over images, at several scales and mirrored, as evaluated.

Shapes: N windows, H W of a window, Y X of an image.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from vit_jax.data import label_maps
from vit_jax.data.tasks import View, place_of
from vit_jax.data.windows import Windows
from vit_jax.errors import UserError
from vit_jax.evaluators import segment
from vit_jax.evaluators.places import STEP, Place
from vit_jax.predict import Predictor


def windows_of(
    size: tuple[int, int], stride: int | None, scales: Sequence[str] | None
) -> Windows | None:
    """The windows of the flags --stride and --scales; None without a stride. Raises UserError."""
    try:
        numbers = tuple(map(float, scales or ('1',)))
    except ValueError:
        numbers = (0.0,)
    if not all(0 < n < np.inf for n in numbers):
        raise UserError(f'--scales={",".join(scales)} are not numbers above 0')
    return segment.windows_of(size, stride, scales=numbers, where='--')


def cutter(view: View, windows: Windows | None) -> Callable:
    """A view (image, rng) -> (arrays of the image, its Place), see `read_ahead`.

    The arrays are those of `tasks.segment.whole_label_map`, without the label map: of `windows`, or
    without them of the `view`.
    """

    def cut(image, rng):
        shape = image.shape[:2]
        if windows is not None:
            return windows.cut(image), Place(shape, windows.size, np.zeros((2, 2)))
        geometry = view.place(shape, rng)
        place = place_of(geometry, shape)
        arrays = {'image': geometry.image(image), 'place': place}
        return arrays, Place(shape, geometry.size, place)

    return cut


def predicted(
    predictor: Predictor, pairs: Iterator[tuple[Hashable, Any]], windows: Windows | None, flip: bool
) -> Iterator[tuple[Hashable, Any]]:
    """Yields ((path, place), {'label_map': [Y, X]}), or (key, UserError), image by image.

    Label maps are computed for sides of multiples of STEP: few programs for images of many sizes.

    Args:
      predictor: the checkpoint, whose `compute` returns what `label_scores.predictions` reads.
      pairs: those of `dense.keyed`, by `cutter`.
      windows: where windows are; None: one view shows the image.
      flip: whether each window is also mirrored left to right.
    """
    dtype = np.uint8 if len(predictor.classes) <= label_maps.MOST_BYTE else np.uint16
    counts = windows.counts() if windows else (1,)
    compute = jax.jit(partial(
        segment.label_maps_of, predict=lambda params, batch: predictor.compute(
            params, batch['image']
        ), counts=counts, flip=flip,
    ))  # fmt: skip
    for key, arrays in pairs:
        if isinstance(arrays, UserError):
            yield key, arrays
            continue
        height, width = key[1].shape
        canvas = [-(-n // STEP) * STEP for n in (height, width)]
        batch = {name: value[None] for name, value in arrays.items()}
        batch |= {'label_map': np.zeros((1, *canvas), dtype), 'id': np.zeros(1, np.int32),
                  'mask': np.ones(1, np.float32)}  # fmt: skip
        found = jax.device_get(compute(predictor.params, batch)['predicted'])
        yield key, {'label_map': found[0, :height, :width]}
