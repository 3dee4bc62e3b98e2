"""Where a view takes each pixel from: one value that moves images, label maps and boxes alike.

Positions are in pixels; the first pixel reaches from 0 to 1, its centre is at 0.5.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from vit_jax.data import label_maps
from vit_jax.data.images import Box, Encoded, Size, resized


class Geometry(NamedTuple):
    """What a view does to an image: resize, crop or pad, warp, mirror; in this order.

    Attributes:
      window: (y, x, height, width) of the part of the image that is resized.
      resized: size of the resized window.
      size: size of the output.
      offset: (y, x) of the output in the resized window. Where the output is outside of the window
        it is padded.
      warp: [2, 3], maps a position (x, y, 1) in the output to that in the cropped window; where
        this is outside, the output is padded. None: the identity.
      flip: whether the output is mirrored left to right.
      method, antialias: those of images.resized.
    """

    window: Box
    resized: Size
    size: Size
    offset: tuple[int, int] = (0, 0)
    warp: np.ndarray | None = None
    flip: bool = False
    method: str = 'bilinear'
    antialias: bool = True

    def image(self, image: np.ndarray | Encoded, out: np.ndarray | None = None) -> np.ndarray:
        """Applies the view to an image, uint8 [H, W, 3] -> [*size, 3]; padding is black.

        Decodes no more of a JPEG than the window. `out` may be filled and returned, as by
        images.resized. Raises Unreadable.
        """
        whole = self.warp is None and self.offset == (0, 0) and self.resized == self.size
        flip = self.flip and whole
        out = resized(
            image, self.window, self.resized, self.method, self.antialias, flip,
            out if whole else None,
        )  # fmt: skip
        if whole:
            return out
        out = cropped(out, self.offset, self.size)
        if self.warp is not None:
            picture = Image.fromarray(np.ascontiguousarray(out))
            out = np.asarray(picture.transform(
                self.size[::-1], Image.Transform.AFFINE, self.warp.ravel(),
                Image.Resampling.BILINEAR,
            ))  # fmt: skip
        return out[:, ::-1] if self.flip else out

    def label_map(self, labels: np.ndarray, fill: int) -> np.ndarray:
        """Applies the view to labels or masks [..., H, W] of the image's pixels -> [..., *size].

        Each output pixel has the label of the pixel under its centre, or `fill` in the padding.
        """
        height, width = self.size
        if self.warp is None and label_maps.has_fast_views(labels):
            return label_maps.view(labels, *self.axes, self.flip, fill)
        y, x = np.arange(height) + 0.5, np.arange(width) + 0.5
        x = width - x if self.flip else x
        if self.warp is not None:
            x, y = (a * x + b * y[:, None] + c for a, b, c in self.warp)
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        (rows, in_rows), (columns, in_columns) = self.nearest(y, 0), self.nearest(x, 1)
        if self.warp is not None:
            inside = inside & in_rows & in_columns
            return np.where(inside, labels[..., rows, columns], np.asarray(fill, labels.dtype))
        out = labels.take(rows, -2)[..., columns]  # whole rows, then columns of these
        if not in_rows.all():
            out[..., ~in_rows, :] = fill
        if not in_columns.all():
            out[..., ~in_columns] = fill
        return out

    def is_mixed(self, labels: np.ndarray, most: float) -> bool:
        """Whether `label_map` of labels [H, W], of a view without a warp, shows several classes.

        None of them may cover `most` of the labelled pixels, a share up to 1.
        """
        if label_maps.has_fast_views(labels):
            return label_maps.view_is_mixed(labels, most, *self.axes)
        found = (self.nearest(np.arange(n) + 0.5, axis) for axis, n in enumerate(self.size))
        rows, columns = (indices[inside] for indices, inside in found)
        return label_maps.is_mixed(labels.take(rows, 0)[:, columns], most)

    @property
    def axes(self) -> tuple[Size, Box, Size, tuple[int, int]]:
        """What makes rows and columns of the output: (size, window, resized, offset)."""
        return self.size, self.window, self.resized, self.offset

    def nearest(self, places: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the image's pixels under places in the output along an axis, before a flip.

        Also whether there are such pixels: the indices are within the window in any case.
        """
        places = places + self.offset[axis]
        start, length, whole = self.window[axis], self.window[2 + axis], self.resized[axis]
        indices = np.floor(places * length / whole).clip(0, length - 1).astype(np.int64)
        return start + indices, (places >= 0) & (places < whole)

    def boxes(self, boxes: np.ndarray, least: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Moves boxes [N, 4], (x0, y0, x1, y1), with the image and clips them to what is seen.

        A warped box is the smallest upright one around it, clipped to the output.

        Args:
          boxes: edges in pixels of the image.
          least: share of a moved box's area that must be seen for the box to be kept. Boxes without
            any area are dropped.

        Returns:
          (float32 [M, 4] in pixels of the output, int [M]: indices of the boxes that are kept).
        """
        (height, width), (top, left, h, w) = self.size, self.window
        corners = boxes.astype(np.float64).reshape(-1, 4)[:, [[0, 1], [2, 1], [0, 3], [2, 3]]]
        scale = self.resized[1] / w, self.resized[0] / h
        moved = (corners - (left, top)) * scale - self.offset[::-1]  # [N, 4 corners, (x, y)]
        low, high = np.zeros(2), np.array([width, height])
        if self.warp is not None:
            moved = (moved - self.warp[:, 2]) @ np.linalg.inv(self.warp[:, :2]).T
        else:
            low = np.maximum(low, np.negative(self.offset[::-1]))
            high = np.minimum(high, np.subtract(self.resized, self.offset)[::-1])
        if self.flip:
            moved[..., 0] = width - moved[..., 0]
            low[0], high[0] = width - high[0], width - low[0]
        moved = np.concatenate([moved.min(1), moved.max(1)], axis=1)
        clipped = np.clip(moved, [*low, *low], [*high, *high])
        area, seen = area_of(moved), area_of(clipped)
        kept = np.flatnonzero((seen > 0) & (seen >= least * area))
        return clipped[kept].astype(np.float32), kept


def area_of(boxes: np.ndarray) -> np.ndarray:
    """Areas [N] of boxes [N, 4]."""
    return np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)


def cropped(image: np.ndarray, offset: tuple[int, int], size: Size) -> np.ndarray:
    """The part of an image [H, W, 3] at an offset, [*size, 3]; black outside of the image."""
    (y, x), (h, w) = offset, size
    part = image[max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)]
    if part.shape[:2] == size:
        return part
    out = np.zeros((*size, 3), np.uint8)
    top, left = max(-y, 0), max(-x, 0)
    out[top : top + part.shape[0], left : left + part.shape[1]] = part
    return out
