"""Annotations of objects: boxes, classes and masks, checked one by one.

Every fault is an Unreadable that names the annotation: by its id where the record has `ids`, else
by its number.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from vit_jax.data import label_maps
from vit_jax.data.decoding import Unreadable, naming
from vit_jax.data.readers.record import field
from vit_jax.errors import UserError
from vit_jax.io.text import brief

BoxFormat = Literal['xywh', 'xyxy', 'yxyx']


class Objects(NamedTuple):
    """The objects of an image.

    Attributes:
      boxes: float64 [n, 4], (x0, y0, x1, y1) in pixels.
      labels: int32 [n], classes.
      crowd: bool [n], whether it is annotated as a crowd.
      places: int64 [n], numbers of the annotations among all of the image.
      names: what each annotation of the image is called in messages.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    places: np.ndarray
    names: Sequence[str]


def read(
    record: Mapping[str, Any],
    shape: tuple[int, int],
    boxes: str,
    labels: str,
    crowd: str | None,
    box_format: BoxFormat,
    classes: int,
    as_annotated: bool = False,
) -> Objects:
    """Reads the objects of a record from the fields of these names; see `tasks.detect`.

    Crowds are left out, and boxes are cut off at the edges of the image. With `as_annotated`
    neither is.

    Raises:
      Unreadable: a box is not finite or has no area in the image, a label is no class, the fields
        have different lengths, or the annotations are of an image of another size.
    """
    annotated = record.get('annotated_shape', shape)
    if tuple(annotated) != tuple(shape):
        raise Unreadable(
            f'its annotations are of {sized(annotated)} pixels, the image has {sized(shape)}'
            f'{turned(annotated, shape)}'
        )
    corners, own = numbers(field(record, boxes), boxes), numbers(field(record, labels), labels)
    if corners.size % 4:
        raise Unreadable(f'its {boxes} are not four numbers each')
    corners, own = corners.reshape(-1, 4), own.ravel()
    crowds = np.zeros(len(own), bool)
    if crowd is not None:
        crowds = numbers(field(record, crowd), crowd).ravel() != 0
    if not len(corners) == len(own) == len(crowds):
        raise Unreadable(
            f'it has {len(corners)} {boxes}, {len(own)} {labels} and {len(crowds)} {crowd}'
        )
    ids = record.get('ids')
    known = isinstance(ids, Sequence | np.ndarray) and len(ids) == len(own)
    names = [f'annotation {brief(i)}' for i in (ids if known else range(len(own)))]
    places = np.flatnonzero(~crowds | as_annotated)
    corners, own = to_pixels(corners[places], box_format, shape), own[places]
    clipped = np.clip(corners, 0, [*shape[::-1]] * 2)
    area = np.prod(np.maximum(clipped[:, 2:] - clipped[:, :2], 0), axis=1)
    for k, box, label, inside in zip(places, corners, own, area, strict=True):
        if not np.isfinite(box).all():
            raise Unreadable(f'{names[k]} has a box that is not finite')
        if not inside > 0:
            raise Unreadable(f'{names[k]} has a box without area in the image')
        if not 0 <= label < classes:
            raise Unreadable(f'{names[k]} has a class that is none of the {classes}')
    found = corners if as_annotated else clipped
    return Objects(found, own.astype(np.int32), crowds[places], places, names)


def numbers(values: Any, name: str) -> np.ndarray:
    """Numbers as float64, of bytes as JSON; raises Unreadable for anything else."""
    try:
        values = json.loads(values) if isinstance(values, bytes) else values
        return np.asarray(values, np.float64)
    except (TypeError, ValueError, RecursionError, OverflowError) as e:
        raise Unreadable(f'its {name} are not numbers') from e


def to_pixels(boxes: np.ndarray, box_format: BoxFormat, shape: tuple[int, int]) -> np.ndarray:
    """Boxes [n, 4] of a format as (x0, y0, x1, y1) in pixels."""
    if box_format == 'xywh':
        return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    if box_format == 'yxyx':
        return boxes[:, [1, 0, 3, 2]] * [*shape[::-1], *shape[::-1]]
    return boxes


def masks(
    segmentation: Any, places: Sequence[int], names: Sequence[str], shape: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Yields the mask, uint8 [H, W] of 0 and 1, of each object of an image [H, W].

    Args:
      segmentation: of every annotation polygons or run lengths, as in COCO's json, also as its
        text; or the bytes of a PNG whose pixels are k + 1 where annotation k is.
      places: numbers of the annotations.
      names: what annotations are called in messages.
      shape: (H, W).
    """
    if isinstance(segmentation, bytes) and segmentation[:1] != b'[':
        with naming('segmentation'):
            ids = label_maps.read(segmentation)
            if ids.shape != shape:
                raise Unreadable(f'it has {sized(ids.shape)} pixels, the image {sized(shape)}')
        for k in places:
            mask = np.uint8(ids == k + 1)
            if not mask.any():
                raise Unreadable(f'{names[k]} has no pixel in the segmentation')
            yield mask
        return
    try:
        segmentation = json.loads(segmentation) if isinstance(segmentation, bytes) else segmentation
    except (ValueError, RecursionError) as e:
        raise Unreadable('its segmentation is no JSON') from e
    if not isinstance(segmentation, Sequence | np.ndarray):
        raise Unreadable('its segmentation is no list')
    if len(segmentation) != len(names):
        raise Unreadable(f'it has {len(segmentation)} segmentations of {len(names)} annotations')
    for k in places:
        try:
            yield decode(segmentation[k], shape)
        except Unreadable as e:
            raise Unreadable(f'{names[k]}: {e}') from e


def decode(segmentation: Any, shape: tuple[int, int]) -> np.ndarray:
    """Mask, uint8 [H, W], of polygons or of run lengths as in COCO's json; raises Unreadable."""
    try:
        if isinstance(segmentation, Mapping):
            return filled_runs(segmentation, shape)
        return filled_polygons(polygons(segmentation, shape), shape)
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as e:
        if isinstance(e, UserError):
            raise
        raise Unreadable('its segmentation is neither polygons nor run lengths of COCO') from e


def filled_runs(segmentation: Mapping, shape: tuple[int, int]) -> np.ndarray:
    """Mask of run lengths: {'size': [H, W], 'counts': lengths or compressed text}, by columns.

    pycocotools leaves pixels beyond the last run to chance; here the runs cover the image.
    """
    size, counts = tuple(segmentation['size']), segmentation['counts']
    if size != shape:
        raise Unreadable(f'its mask has {sized(size)} pixels, the image {sized(shape)}')
    counts = uncompressed(counts) if isinstance(counts, str | bytes) else counts
    if sum(counts) != shape[0] * shape[1]:
        raise Unreadable(f'its runs have {sum(counts)} pixels, not {shape[0] * shape[1]}')
    values = np.arange(len(counts), dtype=np.uint8) % 2
    return np.repeat(values, counts).reshape(shape[::-1]).T


def uncompressed(text: str | bytes) -> list[int]:
    """Run lengths of compressed text: digits of 5 bits, the least first, from '0' on.

    A digit has 32 added where more follow, and 16 in the last one is the sign. From the fourth on,
    numbers are differences to that before the last (cocoapi common/maskApi.c, rleToString).
    """
    counts, value, shift = [], 0, 0
    for byte in text.encode() if isinstance(text, str) else text:
        digit = byte - 48
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        value -= (1 << shift) if digit & 16 else 0
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError('the last number is not complete')
    return counts


def filled_polygons(found: Sequence[Sequence[float]], shape: tuple[int, int]) -> np.ndarray:
    """Mask of polygons as pycocotools fills them."""
    try:
        from pycocotools import mask as coco
    except ModuleNotFoundError as e:
        raise UserError(
            'masks of polygons need pycocotools: pip install "vit_jax[coco]"'
        ) from e
    return coco.decode(coco.frPyObjects(found, *shape)).any(axis=2).view(np.uint8)


def polygons(segmentation: Any, shape: tuple[int, int]) -> list[list[float]]:
    """Checks polygons, lists (x, y, x, y, ...) of three points or more, of an image [H, W].

    As a box, a polygon may leave the image, which cuts it off, but by no more than its size: that
    is no annotation of this image, and would take memory.
    """
    found = [np.asarray(polygon, np.float64) for polygon in segmentation]
    if not found or any(p.ndim != 1 or len(p) < 6 or len(p) % 2 for p in found):
        raise Unreadable('it has no polygon of three points or more')
    size = np.array(shape[::-1])
    for points in found:
        points = points.reshape(-1, 2)
        if not np.isfinite(points).all():
            raise Unreadable('its polygon is not finite')
        if (points.max(0) <= 0).any() or (points.min(0) >= size).any():
            raise Unreadable('its polygon is outside of the image')
        if (points < -size).any() or (points > 2 * size).any():
            raise Unreadable('its polygon leaves the image by more than its size')
    return [p.tolist() for p in found]


def turned(shape: Sequence[int], image: Sequence[int]) -> str:
    """The likely reason, for a message, why a shape is that of an image on its side, or ''."""
    on_side = tuple(shape[:2]) == tuple(image[1::-1]) != tuple(image[:2])
    return ' as its EXIF orientation shows it' if on_side else ''


def sized(shape: Sequence[int]) -> str:
    """A size in words: width x height."""
    return ' x '.join(map(str, shape[1::-1]))
