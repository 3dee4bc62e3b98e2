"""Random crops of one image, for methods that compare them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from vit_jax.data import images
from vit_jax.data.sources import Source
from vit_jax.data.tasks import Task, make_view, size_of
from vit_jax.io.bounds import Interval, NonNegative, Share, Size

# Distortions of each kind of crop in DINO, in order (facebookresearch/dino main_dino.py:421-456).
COLOURS = (
    dict(name='color_jitter', brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1,
         probability=0.8),
    dict(name='greyscale', probability=0.2),
)  # fmt: skip
MULTI_CROP = {
    'first': (*COLOURS, dict(name='blur', probability=1.0)),
    'second': (
        *COLOURS, dict(name='blur', probability=0.1), dict(name='solarize', probability=0.2)
    ),
    'local': (*COLOURS, dict(name='blur', probability=0.5)),
}  # fmt: skip


def crops(
    source: Source,
    *,
    image_size: Size = 224,
    local_size: Size = 96,
    local_count: NonNegative[int] = 8,
    global_area: Interval[Share] = (0.4, 1.0),
    local_area: Interval[Share] = (0.05, 0.4),
    distort: bool = True,
) -> Task:
    """Random crops of one image: `global` uint8 [2, H, W, 3], `local` uint8 [L, h, w, 3].

    Crops and distortions are those of DINO (arXiv:2104.14294; facebookresearch/dino main_dino.py,
    DataAugmentationDINO): a window as torchvision draws it, resized by a bicubic filter and
    mirrored with probability 1/2, then `MULTI_CROP`, other distortions for the first global crop,
    the second and the local ones. Labels are not read.

    Args:
      image_size: size of the global crops in pixels: one number, or (height, width).
      local_size: size of the local crops in pixels.
      local_count: number L of local crops; without any, examples have no `local`.
      global_area: range of a global crop's share of the image's area.
      local_area: range of a local crop's share of the image's area.
      distort: whether colours are jittered and crops blurred and solarised, as `MULTI_CROP` says.
    """
    sizes = {'global': (2, *size_of(image_size)), 'local': (local_count, *size_of(local_size))}
    blank = {name: np.zeros((*size, 3), np.uint8) for name, size in sizes.items() if size[0]}
    view = dict(name='inception_torchvision', method='bicubic')
    large, small = view | dict(area=global_area), view | dict(area=local_area)
    after = MULTI_CROP if distort else dict.fromkeys(MULTI_CROP, ())
    views = {
        'global': [make_view(large, image_size, after[name]) for name in ('first', 'second')],
        'local': [make_view(small, local_size, after['local'])] * local_count,
    }
    return Task(blank, partial(crops_of, views={name: views[name] for name in blank}))


def crops_of(
    record: Mapping[str, Any], rng: np.random.Generator, *, views: Mapping[str, Sequence[Callable]]
) -> dict[str, np.ndarray]:
    """Makes {name: uint8 [number of views, H, W, 3]} of an image, which is decoded once."""
    image = np.asarray(images.read(record['image']))
    return {name: np.stack([view(image, rng) for view in each]) for name, each in views.items()}
