"""Pictures with label maps and objects, in memory, whose colours say what they show."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from vit_jax.data import sources


class Records(list):
    """A list of records, as a data set."""

    def name(self, i):
        return f'scene {i}'


def source(*records, classes=('a', 'b', 'c', 'd', 'e')):
    return sources.Source(Records(records), tuple(classes))


def png(array, **options):
    out = io.BytesIO()
    Image.fromarray(np.asarray(array)).save(out, 'PNG', **options)
    return out.getvalue()


def png_with_palette(ids):
    """Ids as indices of a palette of other colours, as in Pascal VOC."""
    picture = Image.frombytes('P', ids.shape[::-1], ids.tobytes())
    picture.putpalette(np.random.default_rng(1).integers(0, 256, 768, np.uint8).tobytes())
    out = io.BytesIO()
    picture.save(out, 'PNG')
    return out.getvalue()


def raw_png(ids, depth, colour, rows=b''):
    """A PNG of grey values (colour 0) or of a palette (3), with `depth` bits a pixel.

    `rows` are its pixels as they are compressed; without them, unfiltered.
    """
    def chunk(name, data):
        check = zlib.crc32(name + data)
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', check)

    for row in [] if rows else ids:
        bits = ''.join(f'{value:0{depth}b}' for value in row)
        bits += '0' * (-len(bits) % 8)
        rows += b'\0' + int(bits, 2).to_bytes(len(bits) // 8, 'big')
    head = struct.pack('>IIBBBBB', len(ids[0]), len(ids), depth, colour, 0, 0, 0)
    colours = np.random.default_rng(0).integers(0, 256, 3 * 2 ** min(depth, 8), np.uint8).tobytes()
    palette = chunk(b'PLTE', colours) + chunk(b'tRNS', b'\0') if colour == 3 else b''
    parts = chunk(b'IHDR', head), palette, chunk(b'IDAT', zlib.compress(rows)), chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


def blocks(shape, rng, classes=5, side=14):
    """A label map [H, W] of blocks, and its picture: class k has the colour 40 k + 20."""
    grid = rng.integers(0, classes, [-(-n // side) for n in shape])
    labels = np.kron(grid, np.ones((side, side), int))[: shape[0], : shape[1]].astype(np.uint8)
    return labels, np.repeat(np.uint8(40 * labels + 20)[..., None], 3, 2)


def objects(shape, rng, count=4):
    """Boxes int [N, 4] (x0, y0, x1, y1) that do not overlap much, and the masks that fill them."""
    y, x = (
        np.sort([rng.choice(n + 1, 2, replace=False) for _ in range(count)], 1) for n in shape
    )
    masks = np.zeros((count, *shape), np.uint8)
    for mask, (top, bottom), (left, right) in zip(masks, y, x, strict=True):
        mask[top:bottom, left:right] = 1
    return np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1), masks


def rectangle(box):
    """A polygon, as COCO has it, around a box (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = map(float, box)
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]
