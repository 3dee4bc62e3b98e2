"""Windows that slide over an image at several scales, for evaluation.

Sizes and places are (rows, columns), in pixels.
"""

import itertools
from typing import NamedTuple

import numpy as np

from vit_jax.data import images
from vit_jax.data.geometry import cropped
from vit_jax.data.images import Encoded, Size


class Windows(NamedTuple):
    """Where windows are.

    Attributes:
      size: that of a window.
      stride: pixels from one window to the next; the last one ends where the image does.
      even: whether windows are as many, but at equal distances.
      smaller: smaller side of the image at scale 1.
      larger: bound of its larger side at scale 1.
      scales: the scales.
    """

    size: Size
    stride: int
    even: bool
    smaller: int
    larger: int
    scales: tuple[float, ...] = (1.0,)

    def counts(self) -> tuple[int, ...]:
        """Most windows of an image, at each scale."""
        found = []
        for scale in self.scales:
            sides = [int(n * scale + 0.5) for n in (self.smaller, self.larger)]
            found.append(max(len(self.corners(sides)), len(self.corners(sides[::-1]))))
        return tuple(found)

    def corners(self, whole: Size) -> list[tuple[int, int]]:
        """Places of the windows in an image of this size, row by row."""
        return list(itertools.product(*map(self.starts, whole, self.size)))

    def starts(self, whole: int, part: int) -> list[int]:
        """Places of windows of `part` pixels along a side of `whole` pixels."""
        rest = max(whole - part, 0)
        count = -(-rest // self.stride) + 1
        if self.even:
            return [rest * i // max(count - 1, 1) for i in range(count)]
        return [min(i * self.stride, rest) for i in range(count)]

    def resized(self, shape: Size, scale: float) -> Size:
        """Size of an image at a scale; its aspect ratio is kept."""
        factor = scale * min(self.smaller / min(shape), self.larger / max(shape))
        return tuple(max(1, int(n * factor + 0.5)) for n in shape)

    def cut(self, image: np.ndarray | Encoded) -> dict[str, np.ndarray]:
        """Cuts an image, uint8 [H, W, 3], into windows; padding is black.

        Returns:
          image: uint8 [N, *size, 3], as many of each scale as `counts` says; others are black.
          place: float32 [N, 2, 2], (scale, offset) of rows and of columns: what is at p in the
            image is at scale * p + offset in the window.
          windows: int32 [S], the number of windows of each scale that are there.
        """
        most = self.counts()
        found = np.zeros((sum(most), *self.size, 3), np.uint8)
        places = np.tile(np.float32([1, 0]), (sum(most), 2, 1))
        counts, first, shape = [], 0, image.shape[:2]
        for scale, room in zip(self.scales, most, strict=True):
            whole = self.resized(shape, scale)
            scaled = images.resized(image, (0, 0, *shape), whole, 'bilinear', True, False)
            corners = self.corners(whole)
            for i, corner in enumerate(corners, first):
                found[i] = cropped(scaled, corner, self.size)
                places[i] = np.stack([np.divide(whole, shape), np.negative(corner)], axis=1)
            counts.append(len(corners))
            first += room
        return {'image': found, 'place': places, 'windows': np.int32(counts)}
