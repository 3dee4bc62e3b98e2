"""Strips image files of metadata, and reads the orientation from EXIF.

Decoders stumble over texts, profiles and malformed EXIF entries that image viewers ignore. They are
given only what defines the pixels of the first image.
"""

import re
import struct
import zlib
from collections.abc import Sequence

ORIENTATION = 0x0112  # tag of EXIF and TIFF; the tags below are TIFF's
BITS, PHOTOMETRIC, SAMPLES = 258, 262, 277
EXIF = b'Exif\0\0'
# TIFF tags that say where pixels are and what they mean (TIFF 6.0, its supplements, BigTIFF).
PIXEL_TAGS = frozenset([
    254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324,
    325, 332, 334, 336, 338, 339, 347, 512, 513, 514, 515, 519, 520, 521, 529, 530, 531, 532,
])  # fmt: skip


def apart(data: bytes) -> tuple[bytes, bytes]:
    """Splits a file into (a file that decodes to the same pixels, its EXIF data or b'').

    The EXIF data of a TIFF file is the file itself. WebP and AVIF keep theirs. Other formats are
    returned unchanged.
    """
    if data[:2] == b'\xff\xd8':
        return jpeg(data)
    if data[:8] == b'\x89PNG\r\n\x1a\n':
        return png(data)
    if data[:2] in BYTE_ORDERS:
        return tiff(data), data
    if data[4:8] == b'ftyp':  # AVIF has its orientation in other boxes, so its EXIF is ignored
        return re.sub(rb'(infe\x02.{7})Exif', rb'\1none', data, flags=re.DOTALL), b''
    return data, b''


def jpeg(data: bytes) -> tuple[bytes, bytes]:
    """Strips a JPEG of APP1 to APP13, APP15, comments, and bytes between its segments."""
    pieces, exif, at, begin = [], b'', 2, 0
    while 0 <= at <= len(data) - 4:
        kind = data[at + 1]
        if data[at] != 0xFF or not kind:  # no marker: skip to the next, as libjpeg
            pieces.append(data[begin:at])
            at = begin = data.find(b'\xff', at + 1)
            continue
        if kind in (0xFF, 0x01):  # a fill byte; a marker without a length
            at += 1 if kind == 0xFF else 2
            continue
        if kind == 0xDA or 0xD0 <= kind <= 0xD9:
            break
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if end > len(data):
            break
        if kind == 0xE1 and not exif and data[at + 4 : at + 10] == EXIF:
            exif = data[at + 4 : end]
        if (0xE1 <= kind <= 0xEF and kind != 0xEE) or kind == 0xFE:
            pieces.append(data[begin:at])
            begin = end
        at = end
    return joined(pieces, data, begin if begin >= 0 else len(data)), exif


def png(data: bytes) -> tuple[bytes, bytes]:
    """Strips a PNG of ancillary chunks but tRNS; damaged EXIF data and tRNS are ignored."""
    pieces, exif, at, begin, seen = [], b'', 8, 0, {}
    while at + 12 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4])
        if end > len(data) or not kind.isalpha():
            break
        good = not kind[0] & 32
        if kind == b'eXIf' and not exif and has_valid_checksum(data, at, end):
            exif = data[at + 8 : end - 4]
        if kind == b'tRNS' and b'IDAT' not in seen and b'tRNS' not in seen:
            colours = {0: (2,), 2: (6,), 3: range(1, seen.get(b'PLTE', 0) // 3 + 1)}
            good = end - at - 12 in colours.get(data[25], ())
            good = good and has_valid_checksum(data, at, end)
        if not good:
            pieces.append(data[begin:at])
            begin = end
        seen[kind] = end - at - 12
        at = end
    return joined(pieces, data, begin), exif


def has_valid_checksum(data: bytes, start: int, end: int) -> bool:
    """Whether the checksum of a PNG chunk is correct."""
    return zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])


def joined(pieces: Sequence[bytes], data: bytes, begin: int) -> bytes:
    """Joins the pieces of a file and the rest of it from `begin` on."""
    return b''.join((*pieces, data[begin:])) if pieces else data


BYTE_ORDERS = {b'II': '<', b'MM': '>'}


def directory(data: bytes) -> tuple[int, str, str, str] | None:
    """Finds (offset of the first TIFF directory, formats of its count, of an entry, of an offset).

    None if the data is not a TIFF.
    """
    order = BYTE_ORDERS.get(data[:2])
    if order is None or len(data) < 16:
        return None
    big = struct.unpack(f'{order}H', data[2:4])[0] == 43
    count, entry, offset = ('Q', 'HHQ8s', 'Q') if big else ('H', 'HHI4s', 'I')
    start = struct.unpack_from(order + offset, data, 8 if big else 4)[0]
    return start, order + count, order + entry, order + offset


def entries(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Lists (tag, type, count, value or its offset) of the first directory of a TIFF."""
    place = directory(data)
    if place is None or place[0] + struct.calcsize(place[1]) > len(data):
        return []
    start, count, entry, _ = place
    length = struct.unpack_from(count, data, start)[0]
    start, size = start + struct.calcsize(count), struct.calcsize(entry)
    length = min(length, (len(data) - start) // size)
    return [struct.unpack_from(entry, data, start + k * size) for k in range(length)]


def tiff(data: bytes) -> bytes:
    """Strips a TIFF of all entries but those of pixels, and of all directories but the first.

    Pillow reads more than 8 bits as if 0 were black; a file where 0 is white is marked as that.
    """
    kept = [found for found in entries(data) if found[0] in PIXEL_TAGS]
    if not kept:
        return data
    start, count, entry, offset = directory(data)
    if white_is_zero(data):
        one = struct.pack(BYTE_ORDERS[data[:2]] + 'H', 1)
        kept = [(*f[:3], one + f[3][2:]) if f[0] == PHOTOMETRIC else f for f in kept]
    packed = struct.pack(count, len(kept)) + b''.join(struct.pack(entry, *one) for one in kept)
    packed += struct.pack(offset, 0)
    return b''.join((data[:start], packed, data[start + len(packed) :]))


def number(
    data: bytes, tag: int, default: int | None, most: int | None = None
) -> int | None:
    """Reads the first value of a TIFF's tag of 16-bit numbers.

    Returns `default` if there is no such tag, it has more than `most` values, or they lie outside
    of the file.
    """
    for found, kind, count, value in entries(data):
        if found == tag and kind == 3 and 0 < count <= (most or count):
            order, at = BYTE_ORDERS[data[:2]], 0
            if count * 2 > len(value):
                at = struct.unpack(order + ('Q' if len(value) == 8 else 'I'), value)[0]
                value = data
            if at + 2 <= len(value):
                return struct.unpack_from(order + 'H', value, at)[0]
    return default


def white_is_zero(data: bytes) -> bool:
    """Whether 0 is white in a TIFF of one channel and more than 8 bits."""
    grey = number(data, SAMPLES, 1) == 1 and number(data, PHOTOMETRIC, None) == 0
    return grey and number(data, BITS, 1) > 8


def orientation(exif: bytes) -> int:
    """Orientation of an image, 1 (upright) to 8, from EXIF data or a TIFF file.

    As in browsers, damaged or invalid entries are ignored, and so is XMP.
    """
    exif = exif.removeprefix(EXIF)
    turn = number(exif, ORIENTATION, 1, most=1)
    return turn if turn in range(1, 9) else 1
