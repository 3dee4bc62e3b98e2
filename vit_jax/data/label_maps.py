"""Label maps: the class of each pixel, from a mask whose pixels are class ids.

The largest number of a label map's dtype, 255 or 65535, is that of ignored pixels.
"""

import functools
import io
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from vit_jax.data import metadata
from vit_jax.data.decoding import Unreadable, reason

Zero = Literal['class', 'background', 'ignored']
BACKGROUND = 'background'  # name of class 0 where `zero` is so
MOST_BYTE = 255  # classes of a label map of bytes


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
        used = np.flatnonzero(id_counts(ids))
        if (wrong := used[table[used] < 0]).size:
            raise Unreadable(f'it has the id {wrong[0]}, and there are {self.classes} classes')
        if classes is not None:
            first = int(self.zero == 'background')
            own = np.flatnonzero((table >= first) & (table != self.fill))
            table = table.copy()
            table[own] = classes[table[own] - first] + first
        if ids.dtype == self.dtype and (table[used] == used).all():
            return ids
        return table.astype(self.dtype).take(ids)


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
    if ids.dtype == np.uint8:  # Pillow counts twice as fast
        return np.array(Image.fromarray(ids).histogram())
    return np.bincount(ids.ravel(), minlength=2**16)


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
        picture, _ = metadata.apart(data)
        with Image.open(io.BytesIO(picture), formats=['PNG']) as file:
            depth, colour = picture[24], picture[25]
            if colour not in (0, 3):
                kind = {2: 'RGB', 4: 'grey with alpha', 6: 'RGB with alpha'}.get(colour, colour)
                raise Unreadable(
                    f'its pixels are {kind}, not ids; save it as grey values or with a palette'
                )
            ids = np.asarray(file)
    except Unreadable:
        raise
    except Exception as e:  # Pillow's parsers raise any exception for damaged data
        raise Unreadable(reason(e)) from e
    if colour == 0 and depth < 8 and ids.dtype == np.uint8:
        return ids // np.uint8(255 // (2**depth - 1))  # Pillow scales them to 0 ... 255
    return ids.astype(np.uint8 if depth <= 8 else np.uint16, copy=False)
