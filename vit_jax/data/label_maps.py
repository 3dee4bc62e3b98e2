"""Label maps: the class of each pixel, from a mask whose pixels are class ids.

The largest number of a label map's dtype, 255 or 65535, is that of ignored pixels.
"""

import functools
import io
import struct
import zlib
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from vit_jax.data import metadata
from vit_jax.data.decoding import Unreadable, reason

try:
    from vit_jax.data import _labels
except ImportError:
    _labels = None
try:
    import deflate
except ImportError:
    deflate = None

if not hasattr(_labels, 'is_mixed'):  # it is not built, or from another version of its source
    _labels = None

Box = tuple[int, int, int, int]  # (y, x, height, width) in pixels
Size = tuple[int, int]  # (height, width)
Zero = Literal['class', 'background', 'ignored']
BACKGROUND = 'background'  # name of class 0 where `zero` is so
MOST_BYTE = 255  # classes of a label map of bytes
MOST_NAMED = 8  # ids in a message
MOST_PIXELS = 2**26  # of a mask that the extension reads
MOST_INFLATED = 1032  # times as many bytes as are compressed: DEFLATE's bound


class Ids(NamedTuple):
    """What the ids of a mask stand for.

    Attributes:
      classes: number of classes of the label map, the background included.
      zero: what id 0 stands for, see `tasks.segment`.
      ignored: ids that are ignored. None: 255, or 65535 where there are more than 255 classes.
    """

    classes: int
    zero: Zero = 'class'
    ignored: tuple[int, ...] | None = None

    @property
    def dtype(self) -> np.dtype:
        """Type of the label map: uint8, or uint16 where there are more than 255 classes."""
        return np.dtype(np.uint8 if self.classes <= MOST_BYTE else np.uint16)

    @property
    def fill(self) -> int:
        """The label of ignored pixels."""
        return ignored(self.dtype)

    def labels(self, ids: np.ndarray, classes: np.ndarray | None = None) -> np.ndarray:
        """The label map [H, W] of a mask [H, W]; raises Unreadable for ids of no class.

        Args:
          ids: ids, uint8 or uint16.
          classes: int32, maps the classes of the mask's own data set to others, if they differ.
        """
        table = table_of(self, 2 ** (8 * ids.dtype.itemsize))
        if classes is not None:
            first = int(self.zero == 'background')
            own = np.flatnonzero((table >= first) & (table != self.fill))
            table = table.copy()
            table[own] = classes[table[own] - first] + first
        labels, wrong = mapped(ids, table, self.dtype)
        if wrong:
            raise Unreadable(self.advice(wrong))
        return labels

    def advice(self, wrong: list[int]) -> str:
        """What to say about ids of no class: which ones are, and the setting that would help."""
        first, own = int(self.zero == 'ignored'), wrong[0]
        said = f'it has the id {own}, and there are {self.classes} classes, '
        said += f'{first} to {first + self.classes - 1}; '
        if wrong == [self.classes] and self.zero == 'class':
            return said + "zero='ignored' or zero='background' begins them at 1"
        others = (self.fill,) if self.ignored is None else self.ignored
        return said + f'ignored={(*others, *wrong[:MOST_NAMED])} leaves its pixels out'


def mapped(
    ids: np.ndarray, table: np.ndarray, dtype: np.dtype
) -> tuple[np.ndarray, list[int]]:
    """(table[ids] as a dtype, ids that have no label: negative in the table, int32)."""
    if _labels is None or not ids.dtype == dtype == np.uint8:
        labels = table.astype(dtype).take(ids)
    else:
        labels = np.empty(ids.shape, np.uint8)
        if _labels.look_up(np.ascontiguousarray(ids), labels, table):
            return labels, []
    used = np.flatnonzero(id_counts(ids))
    return labels, used[table[used] < 0].tolist()


def has_fast_views(labels: np.ndarray) -> bool:
    """Whether `view` and `view_is_mixed` take a label map."""
    return _labels is not None and labels.ndim == 2 and labels.dtype == np.uint8


def view(
    labels: np.ndarray, size: Size, window: Box, resized: Size, offset: Size, flip: bool, fill: int
) -> np.ndarray:
    """`Geometry.label_map` of a view without a warp, of labels for which `has_fast_views`."""
    out = np.empty(size, np.uint8)
    _labels.view(np.ascontiguousarray(labels), out, window, resized, offset, flip, fill)
    return out


def view_is_mixed(
    labels: np.ndarray, most: float, size: Size, window: Box, resized: Size, offset: Size
) -> bool:
    """`is_mixed` of what `view` makes; looks at a third of it, where that decides."""
    labels = np.ascontiguousarray(labels)
    return _labels.is_mixed(labels, most, size, window, resized, offset)


def is_mixed(labels: np.ndarray, most: float) -> bool:
    """Whether none of the classes in a label map [H, W] covers a share of its labelled pixels."""
    counts = class_counts(labels)
    return bool(counts.max() < most * counts.sum())


def ignored(dtype: np.dtype) -> int:
    """The label of ignored pixels in a label map of a dtype."""
    return int(np.iinfo(dtype).max)


@functools.lru_cache
def table_of(ids: Ids, length: int) -> np.ndarray:
    """Label of each id below `length`, int32; -1 for ids of no class."""
    table = np.full(length, -1, np.int32)
    first = int(ids.zero == 'ignored')
    count = min(ids.classes, length - first)
    table[first : first + count] = np.arange(count)
    others = (ids.fill,) if ids.ignored is None else ids.ignored
    table[[i for i in (*others, *[0] * first) if i < length]] = ids.fill
    return table


def id_counts(ids: np.ndarray) -> np.ndarray:
    """Number of pixels of each id, of uint8 or uint16 [H, W]."""
    if _labels is None or ids.dtype != np.uint8:
        return np.bincount(ids.ravel(), minlength=2 ** (8 * ids.dtype.itemsize))
    counts = np.empty(256, np.int64)
    _labels.count(np.ascontiguousarray(ids), counts)
    return counts


def class_counts(labels: np.ndarray) -> np.ndarray:
    """Number of pixels of each class in a label map [H, W], without those that are ignored."""
    return id_counts(labels)[:-1]


def read(data: bytes) -> np.ndarray:
    """Reads the ids of a mask, a PNG of grey values or a palette: uint8 or uint16 [H, W].

    Ids are the numbers in the file: indices, whatever the colours of the palette, and grey values
    of 1, 2 or 4 bits as they are. Raises Unreadable for any other file.
    """
    data = bytes(data)
    if data[:8] != b'\x89PNG\r\n\x1a\n':
        lossy = '; JPEG would change ids' if data[:2] == b'\xff\xd8' else ''
        raise Unreadable(f'class ids are read from PNG files alone{lossy}')
    try:
        if _labels is not None and (ids := read_bytes(data)) is not None:
            return ids
        return read_by_pillow(metadata.apart(data)[0])
    except Unreadable:
        raise
    except Exception as e:  # Pillow's parsers raise any exception for damaged data
        raise Unreadable(reason(e)) from e


def read_by_pillow(picture: bytes) -> np.ndarray:
    """`read` of a PNG without metadata; raises Unreadable and what Pillow raises."""
    with Image.open(io.BytesIO(picture), formats=['PNG']) as file:
        depth, colour = picture[24], picture[25]
        if colour not in (0, 3):
            kind = {2: 'RGB', 4: 'grey with alpha', 6: 'RGB with alpha'}.get(colour, colour)
            raise Unreadable(
                f'its pixels are {kind}, not ids; save it as grey values or with a palette'
            )
        ids = np.asarray(file)
    if colour == 0 and depth < 8 and ids.dtype == np.uint8:
        return ids // np.uint8(255 // (2**depth - 1))  # Pillow scales them to 0 ... 255
    return ids.astype(np.uint8 if depth <= 8 else np.uint16, copy=False)


def read_bytes(picture: bytes) -> np.ndarray | None:
    """`read` in a tenth of the time, for bytes row by row; None for all else, and damage."""
    width, height, *kind = struct.unpack('>II5B', picture[16:29])
    if picture[12:16] != b'IHDR' or kind not in ([8, 0, 0, 0, 0], [8, 3, 0, 0, 0]):
        return None
    parts, at, crc32 = [], 8, (deflate or zlib).crc32
    while at + 12 <= len(picture):  # the least of a chunk; other bytes after them are ignored
        length, name = struct.unpack('>I4s', picture[at : at + 8])
        end = at + 8 + length
        if picture[end : end + 4] != crc32(picture[at + 4 : end]).to_bytes(4, 'big'):
            return None
        parts += [picture[at + 8 : end]] if name == b'IDAT' else []
        at = end + 4
    if not 0 < width * height <= MOST_PIXELS:
        return None
    rows = inflated(b''.join(parts), height * (width + 1))
    if rows is None:
        return None
    ids = np.empty((height, width), np.uint8)
    try:
        _labels.unfilter(rows, ids)
    except ValueError:
        return None
    return ids


def inflated(data: bytes, size: int) -> bytes | bytearray | None:
    """The bytes of a zlib stream; None unless there are `size` of them."""
    if size > MOST_INFLATED * len(data):
        return None
    if deflate is not None:
        try:
            rows = deflate.zlib_decompress(data, size)  # fails where there are more
            return rows if len(rows) == size else None
        except deflate.DeflateError:
            pass  # damaged, or cut behind its last byte: zlib tells
    try:
        inflater = zlib.decompressobj()
        rows = inflater.decompress(data, size)
        more = inflater.decompress(inflater.unconsumed_tail, 1)
    except zlib.error:
        return None
    return None if more or len(rows) != size else rows
