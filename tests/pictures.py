"""Image files written byte by byte from known samples, and what a viewer shows of them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from vit_jax.data import images

ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
         (1, 0, 2, 1)]  # fmt: skip
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG's colour types


def chunk(kind, content=b''):
    """A chunk of a PNG file."""
    checksum = zlib.crc32(kind + content)
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', checksum)


def packed(row, depth):
    """Samples of a row as bytes, the first at the top of the first byte, 16 bits big-endian."""
    if depth == 16:
        return row.astype('>u2').tobytes()
    if depth == 8:
        return row.astype(np.uint8).tobytes()
    bits = (row.reshape(-1, 1) >> np.arange(depth)[::-1]) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def png(samples, depth, colour, *, palette=None, trns=None, interlace=False, extra=b''):
    """A PNG of samples [H, W, C]; `trns` is the content of a tRNS chunk, `extra` more chunks."""
    height, width, _ = samples.shape
    passes = ADAM7 if interlace else [(0, 0, 1, 1)]
    rows = b''
    for y, x, down, across in passes:
        part = samples[y::down, x::across]
        if part.size:
            rows += b''.join(b'\0' + packed(row.reshape(-1), depth) for row in part)
    header = struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, interlace)
    parts = [b'\x89PNG\r\n\x1a\n', chunk(b'IHDR', header), extra]
    if palette is not None:
        parts.append(chunk(b'PLTE', np.uint8(palette).tobytes()))
    if trns is not None:
        parts.append(chunk(b'tRNS', trns))
    return b''.join([*parts, chunk(b'IDAT', zlib.compress(rows)), chunk(b'IEND')])


def tiff(
    samples, bits, photometric, *, order='<', planar=False, tags=(), compress=False, tile=None
):
    """A TIFF of samples [H, W, C] of so many bits; `tags` are more entries (tag, type, values)."""
    height, width, channels = samples.shape
    planes = np.moveaxis(samples, 2, 0)[..., None] if planar else samples[None]
    blocks = []
    for plane in planes:
        if tile:
            padded = np.pad(plane, ((0, -height % tile), (0, -width % tile), (0, 0)))
            blocks += [
                padded[y : y + tile, x : x + tile]
                for y in range(0, height, tile) for x in range(0, width, tile)
            ]  # fmt: skip
        else:
            blocks.append(plane)

    def content(block):
        if bits > 8 and bits % 8 == 0:
            kind = block.dtype.kind if block.dtype.kind == 'f' else 'u'
            data = block.astype(f'{order}{kind}{bits // 8}').tobytes()
        else:
            data = b''.join(packed(row.reshape(-1), bits) for row in block)
        return zlib.compress(data) if compress else data

    data, places = b'', []
    for block in map(content, blocks):
        places.append((8 + len(data), len(block)))
        data += block + b'\0' * (len(block) % 2)
    offsets, sizes = zip(*places, strict=True)
    where = [(324, 4, offsets), (325, 4, sizes), (322, 3, [tile]), (323, 3, [tile])] if tile else [
        (273, 4, offsets), (279, 4, sizes), (278, 3, [height])]  # fmt: skip
    entries = [
        (256, 3, [width]), (257, 3, [height]), (258, 3, [bits] * channels),
        (259, 3, [8 if compress else 1]), (262, 3, [photometric]), (277, 3, [channels]),
        (284, 3, [2 if planar else 1]), *where, *tags,
    ]  # fmt: skip
    return tiff_of(entries, data, order)


def tiff_of(entries, data=b'', order='<'):
    """A TIFF, or EXIF data, of entries (tag, type, values) behind its data."""
    start, table, beyond = 8 + len(data), b'', b''
    end = start + 2 + 12 * len(entries) + 4
    for tag, kind, values in sorted(entries, key=lambda entry: entry[0]):
        if isinstance(values, bytes):
            value, count = values, len(values)
        else:
            form = {1: 'B', 3: 'H', 4: 'I', 5: 'I', 9: 'i', 10: 'i', 11: 'f', 12: 'd'}[kind]
            value = struct.pack(f'{order}{len(values)}{form}', *values)
            count = len(values) // (2 if kind in (5, 10) else 1)
        if len(value) > 4:
            value, beyond = struct.pack(f'{order}I', end + len(beyond)), beyond + value
        table += struct.pack(f'{order}HHI', tag, kind, count) + value.ljust(4, b'\0')
    head = (b'II' if order == '<' else b'MM') + struct.pack(f'{order}HI', 42, start)
    table = struct.pack(f'{order}H', len(entries)) + table + bytes(4)
    return head + data + table + beyond


def gif(canvas, frames, *, background=0, palette=((0, 0, 0), (200, 0, 0), (0, 0, 200), (9, 9, 9))):
    """A GIF of a canvas (height, width) and frames (y, x, indices [H, W], transparent or None,
    disposal); indices are below 4."""
    height, width = canvas
    data = b'GIF89a' + struct.pack('<HHBBB', width, height, 0x80 | 1, background, 0)
    data += np.uint8(palette).tobytes()
    for y, x, indices, transparent, disposal in frames:
        flags = disposal << 2 | (transparent is not None)
        data += b'\x21\xf9\4' + struct.pack('<BHBB', flags, 10, transparent or 0, 0)
        data += b'\x2c' + struct.pack('<HHHHB', x, y, indices.shape[1], indices.shape[0], 0)
        bits, count = '', 0
        for value in indices.reshape(-1):  # codes of 3 bits, cleared before they grow
            if count % 2 == 0:
                bits = f'{4:03b}' + bits
            bits, count = f'{value:03b}' + bits, count + 1
        bits = f'{5:03b}' + bits
        codes = int(bits, 2).to_bytes(-(-len(bits) // 8), 'little')
        data += b'\2' + b''.join(
            bytes([len(codes[k : k + 255])]) + codes[k : k + 255] for k in range(0, len(codes), 255)
        ) + b'\0'  # fmt: skip
    return data + b'\x3b'


def jpeg(height, width, sampling, rng, *, adobe=None):
    """A baseline JPEG of random low frequencies, with any (across, down) sampling a component."""
    most = np.max(sampling, 0)
    mcus = [-(-width // (8 * most[0])), -(-height // (8 * most[1]))]
    order = [(c, k) for c, (x, y) in enumerate(sampling) for k in range(x * y)]
    if len(sampling) == 1:
        mcus, order = [-(-width // 8), -(-height // 8)], [(0, 0)]
    bits, before = [], [0] * len(sampling)

    def add(code, length, value):
        """A code, and a value in the bits that T.81 F.1.2.1 has for its size."""
        size = int(abs(value)).bit_length()
        bits.append(f'{code(size):0{length}b}')
        if size:
            bits.append(f'{value if value > 0 else value + 2**size - 1:0{size}b}')

    for _ in range(mcus[0] * mcus[1]):
        for c, _ in order:
            level = int(rng.integers(-30, 30))
            add(lambda size: size, 4, level - before[c])
            before[c] = level
            for _ in range(3):
                add(lambda size: size, 8, int(rng.integers(1, 9)) * int(rng.choice([-1, 1])))
            bits.append(f'{0:08b}')  # the end of the block
    data = ''.join(bits)
    data += '1' * (-len(data) % 8)
    scan = int(data, 2).to_bytes(len(data) // 8).replace(b'\xff', b'\xff\0')

    def segment(marker, content):
        return bytes([0xFF, marker]) + struct.pack('>H', len(content) + 2) + content

    frame = struct.pack('>BHHB', 8, height, width, len(sampling))
    frame += b''.join(bytes([c + 1, x << 4 | y, 0]) for c, (x, y) in enumerate(sampling))
    scans = bytes([len(sampling)]) + b''.join(bytes([c + 1, 0]) for c in range(len(sampling)))
    dc = bytes([0, 0, 0, 0, 12, *[0] * 12, *range(12)])
    ac = bytes([0x10, *[0] * 7, 16, *[0] * 8, *range(16)])
    head = b'' if adobe is None else segment(0xEE, b'Adobe\0d\0\0\0\0' + bytes([adobe]))
    return b''.join([
        b'\xff\xd8', head, segment(0xDB, b'\0' + b'\x10' * 64), segment(0xC0, frame),
        segment(0xC4, dc), segment(0xC4, ac), segment(0xDA, scans + b'\0\x3f\0'), scan, b'\xff\xd9',
    ])  # fmt: skip


PHOTO = np.uint8(np.stack([np.add.outer(np.arange(24) * 3, np.arange(40) * k) for k in (0, 2, 4)],
                          -1))  # fmt: skip


def saved(kind, image=PHOTO, **options):
    out = io.BytesIO()
    options = dict(lossless=True) | options if kind == 'WEBP' else options
    Image.fromarray(image).save(out, kind, **options)
    return out.getvalue()


def decoded(data):
    """uint8 [H, W, 3], by both paths."""
    image, whole = images.read(data), images.decode(data)
    assert tuple(image.shape) == whole.shape
    np.testing.assert_array_equal(image, whole)
    return whole


def assert_shows(data, expected, within=1):
    expected = np.broadcast_to(expected, (*expected.shape[:2], 3))
    np.testing.assert_allclose(decoded(data).astype(float), expected, atol=within)
