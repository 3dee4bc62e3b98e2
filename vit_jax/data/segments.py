"""Panoptic segments of an image: which one each pixel belongs to, and their classes.

Every fault is an Unreadable that names the segment by its id.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from vit_jax.data import label_maps, metadata
from vit_jax.data.annotations import numbers, sized
from vit_jax.data.decoding import Unreadable, naming, reason
from vit_jax.data.readers.record import field

Zero = Literal['void', 'background']
VOID = label_maps.ignored(np.dtype(np.uint16))  # number of pixels that are in no segment
RGB = b'\x08\x02'  # depth and colour in the header of a PNG


class Fields(NamedTuple):
    """Names of the fields of a record, and what its ids are; see `tasks.panoptic`."""

    segments: str
    labels: str
    crowd: str | None
    ids: str | None
    zero: Zero
    ignored: tuple[int, ...]


class Segments(NamedTuple):
    """The segments of an image.

    Attributes:
      numbers: uint16 [H, W], number of the segment of each pixel, or VOID.
      labels: int32 [n], classes.
      crowd: bool [n], whether a segment is a crowd: several things of a class.
    """

    numbers: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray


def read(
    record: Mapping[str, Any], shape: tuple[int, int], fields: Fields, classes: int
) -> Segments:
    """Reads the segments of an image [H, W]; `classes` are those of the data set alone.

    Raises:
      Unreadable: the PNG has another size than the image or an id that no segment has, a segment
        has no pixel or a class that is none, or the fields have different lengths.
    """
    labels = numbers(field(record, fields.labels), fields.labels).ravel()
    count, crowd = len(labels), np.zeros(len(labels), bool)
    ids = np.arange(1, count + 1)
    if fields.crowd is not None:
        crowd = numbers(field(record, fields.crowd), fields.crowd).ravel() != 0
    if fields.ids is not None:
        ids = numbers(field(record, fields.ids), fields.ids).ravel().astype(np.int64)
    if not count == len(crowd) == len(ids) <= VOID - 1:
        raise Unreadable(f'it has {count} labels, {len(crowd)} crowd and {len(ids)} ids')
    for id_, label in zip(ids, labels, strict=True):
        if not 0 <= label < classes:
            raise Unreadable(f'segment {id_} has a class that is none of the {classes}')
    if 0 in ids or len(set(ids.tolist())) < count:
        raise Unreadable('two segments have the same id, or one has the id 0')
    with naming(fields.segments):
        found = read_ids(field(record, fields.segments))
        if found.shape != shape:
            raise Unreadable(f'it has {sized(found.shape)} pixels, the image {sized(shape)}')
        found, pixels = numbered(found, ids, fields)
    if (pixels[:count] == 0).any():
        raise Unreadable(f'segment {ids[pixels[:count].argmin()]} has no pixel')
    if fields.zero == 'background':
        labels = labels + 1
        if pixels[count]:
            labels, crowd = np.append(labels, 0), np.append(crowd, False)
    return Segments(found, labels.astype(np.int32), crowd)


def numbered(
    found: np.ndarray, ids: np.ndarray, fields: Fields
) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of segments uint16 [H, W], pixels of each number) of a map of ids.

    The background, where there is one, has the number len(ids). Raises Unreadable for other ids.
    """
    flat, count = found.ravel(), len(ids)
    starts = np.flatnonzero(np.append(True, flat[1:] != flat[:-1]))  # of runs of the same id
    lengths, values = np.diff(np.append(starts, flat.size)), flat[starts].astype(np.int64)
    others = np.array([0, *fields.ignored])
    known = np.append(ids, others)
    number = np.append(np.arange(count), np.full(len(others), VOID))
    number[count] = count if fields.zero == 'background' else VOID
    order = np.argsort(known, kind='stable')
    place = order[np.searchsorted(known[order], values).clip(0, len(known) - 1)]
    if (wrong := values[known[place] != values]).size:
        ignored = (*fields.ignored, int(wrong[0]))
        raise Unreadable(
            f'it has the id {wrong[0]}, which no segment has; ignored={ignored} makes its pixels '
            'void'
        )
    pixels = np.bincount(number[place], lengths, minlength=count + 1)
    return np.repeat(number[place], lengths).astype(np.uint16).reshape(found.shape), pixels


def read_ids(data: bytes) -> np.ndarray:
    """Ids of a PNG, [H, W]: red + 256 green + 65536 blue, or as in `label_maps.read`."""
    data = bytes(data)
    if data[24:26] != RGB:
        return label_maps.read(data)
    try:
        picture, _ = metadata.apart(data)
        with Image.open(io.BytesIO(picture), formats=['PNG']) as file:
            colours = np.asarray(file).astype(np.uint32)
    except Exception as e:  # Pillow's parsers raise any exception for damaged data
        raise Unreadable(reason(e)) from e
    return colours[..., 0] | colours[..., 1] << 8 | colours[..., 2] << 16


def renumbered(
    numbers: np.ndarray, kept: Sequence[int] | np.ndarray, dtype: np.dtype
) -> np.ndarray:
    """Numbers of segments in which kept[k] is k; others are the largest number of the dtype."""
    table = np.full(VOID + 1, label_maps.ignored(dtype), dtype)
    table[kept] = np.arange(len(kept))
    return table[numbers]
