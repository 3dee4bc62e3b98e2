"""Views of training on label maps and boxes: the image is scaled at random, then cropped or padded.

Signatures are those of `augment`. Images keep their aspect ratio; padding is black, on the right
and below, and ignored in label maps.
"""

import numpy as np

from vit_jax.data.central import Generator, Method, fitted
from vit_jax.data.geometry import Geometry
from vit_jax.data.images import Size
from vit_jax.io.bounds import Interval, Pixels, Positive, Share

DRAWS = 10  # of a window, while one class covers too much of it


def large_scale_jitter(
    shape: Size,
    rng: Generator,
    *,
    size: Size,
    scale: Interval[Positive[float]] = (0.1, 2.0),
    flip: bool = True,
    method: Method = 'bilinear',
    antialias: bool = True,
) -> Geometry:
    """Resizes the image to fit into the size times a random scale, then crops or pads to the size.

    Large-scale jittering (arXiv:2012.07177 section 3). As in its code, one random number places the
    window along both axes (detectron2, ResizeScale and FixedSizeCrop).

    Args:
      scale: the scale is uniform in this range.
      flip: whether to mirror left to right with probability 1/2.
      method: interpolation: 'area' averages the pixels that an output pixel covers.
      antialias: whether to widen the filter where the image shrinks, as Pillow does.
    """
    whole = fitted(shape, size, rng.uniform(*scale))
    share = rng.random()
    y, x = (round(max(n - part, 0) * share) for n, part in zip(whole, size, strict=True))
    mirrored = mirror(rng, flip)
    return Geometry((0, 0, *shape), whole, size, (y, x), None, mirrored, method, antialias)


def resize_or_crop(
    shape: Size,
    rng: Generator,
    *,
    size: Size,
    smaller: tuple[Pixels, ...] = tuple(range(480, 801, 32)),
    before: tuple[Pixels, ...] = (400, 500, 600),
    crop: Interval[Pixels] = (384, 600),
    flip: bool = True,
    method: Method = 'bilinear',
    antialias: bool = True,
) -> Geometry:
    """Resizes the image, or with probability 1/2 a random window of it, to one of several sizes.

    DETR's training view (facebookresearch/detr datasets/coco.py), in one step, so that windows
    begin and end at pixels of the image. The aspect ratio is kept; padding is on the right and
    below in mirrored images, too.

    Args:
      smaller: the smaller side becomes one of these, or less where the other would not fit into the
        size.
      before: a window is cut from the image after its smaller side has become one of these.
      crop: the window's sides are uniform in this range, as far as this image reaches.
      flip: whether to mirror left to right with probability 1/2.
      method: interpolation: 'area' averages the pixels that an output pixel covers.
      antialias: whether to widen the filter where the image shrinks, as Pillow does.
    """
    window = (0, 0, *shape)
    if rng.integers(2):
        factor = int(rng.choice(before)) / min(shape)
        whole = [max(1, int(n * factor)) for n in shape]
        low, high = crop
        sides = [int(rng.integers(min(low, n), min(high, n) + 1)) for n in whole]
        start = [int(rng.integers(n - part + 1)) for n, part in zip(whole, sides, strict=True)]
        corner = [min(round(n / factor), most - 1) for n, most in zip(start, shape, strict=True)]
        ends = [
            min(max(round((n + part) / factor), first + 1), most)
            for n, part, first, most in zip(start, sides, corner, shape, strict=True)
        ]
        window = (*corner, ends[0] - corner[0], ends[1] - corner[1])
    part = window[2:]
    whole = fitted(part, size)
    wanted = int(rng.choice(smaller)) / min(part)
    if wanted < min(n / side for n, side in zip(size, part, strict=True)):
        whole = tuple(max(1, int(n * wanted + 1e-6)) for n in part)
    mirrored = mirror(rng, flip)
    x = whole[1] - size[1] if mirrored else 0
    return Geometry(window, whole, size, (0, x), None, mirrored, method, antialias)


def scale_crop(
    shape: Size,
    rng: Generator,
    labels: np.ndarray | None = None,
    *,
    size: Size,
    scale: Interval[Positive[float]] = (0.5, 2.0),
    smaller: Pixels | None = None,
    larger: Pixels | None = None,
    largest_class: Share = 0.75,
    flip: bool = True,
    method: Method = 'bilinear',
    antialias: bool = True,
) -> Geometry:
    """Scales the image at random and takes a window at random, padded where the image is smaller.

    The training view of mmsegmentation's recipes (RandomResize, RandomCrop, RandomFlip). A window
    is drawn again, up to ten times, while it shows a single class or one class covers more of its
    labelled pixels than `largest_class`; the last one is taken as it is. Tasks without label maps
    take the first.

    Args:
      scale: the scale is uniform in this range.
      smaller: smaller side of the image at scale 1, in pixels. None: that of the image size.
      larger: bound of its larger side at scale 1. None: 4 times `smaller`.
      largest_class: largest share of a window's labelled pixels that one class may cover; 1: any.
      flip: whether to mirror left to right with probability 1/2.
      method: interpolation: 'area' averages the pixels that an output pixel covers.
      antialias: whether to widen the filter where the image shrinks, as Pillow does.
    """
    smaller = smaller or min(size)
    factor = rng.uniform(*scale) * min(
        smaller / min(shape), (larger or 4 * smaller) / max(shape)
    )
    whole = tuple(max(1, int(n * factor + 0.5)) for n in shape)

    def draw():
        offset = tuple(
            int(rng.integers(max(n - part, 0) + 1)) for n, part in zip(whole, size, strict=True)
        )
        return Geometry((0, 0, *shape), whole, size, offset, method=method, antialias=antialias)

    geometry = draw()
    if labels is not None and largest_class < 1:
        for _ in range(DRAWS):
            if geometry.is_mixed(labels, largest_class):
                break
            geometry = draw()
    return geometry._replace(flip=mirror(rng, flip))


def mirror(rng: Generator, flip: bool) -> bool:
    """Draws whether to mirror the image: with probability 1/2 where `flip` is true."""
    return bool(flip and rng.integers(2))
