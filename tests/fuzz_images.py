"""Valid image files of every format, and mutations of them.

`python tests/fuzz_images.py SECONDS [SEED]` looks for a file of which decoding makes anything else
than an array or Unreadable, takes long, or takes memory that its pixels do not need.
"""

import io
import itertools
import resource
import sys
import time
import warnings

import numpy as np
import pictures
from PIL import Image

from vit_jax.data import images
from vit_jax.data.readers import formats

ROOM = 3 << 30  # bytes of address space; the largest picture that is not refused takes 2 GiB
LONGEST = 60.0  # seconds
MARKS = [0, 1, 2, 127, 128, 255, 0xC0, 0xC4, 0xD8, 0xD9, 0xDA, 0xE1]


def photo(mode):
    y, x = np.mgrid[:40, :56]
    image = Image.fromarray(np.uint8(np.stack([x * 4, y * 6, x + y], -1)))
    return image.convert(mode)


def saved(kind, mode='RGB', *, frames=False, **options):
    out = io.BytesIO()
    if frames:
        options |= dict(save_all=True, append_images=[photo('RGB').rotate(9)])
    photo(mode).save(out, kind, **options)
    return out.getvalue()


def seeds():
    """A few hundred small files."""
    rng = np.random.default_rng(0)
    exif = b'Exif\0\0' + pictures.tiff_of([
        (271, 2, b'maker'), (274, 3, [6]), (282, 5, [72, 1]), (34665, 4, [8])])  # fmt: skip
    found = [
        saved('JPEG', exif=exif), saved('JPEG', 'L'), saved('JPEG', 'CMYK'),
        saved('JPEG', progressive=True), saved('JPEG', subsampling=2, restart_marker_blocks=2),
        saved('PNG', exif=exif), saved('PNG', 'P'), saved('GIF', 'P'), saved('WEBP', exif=exif),
        saved('WEBP', 'RGBA'), saved('WEBP', lossless=True), saved('BMP'), saved('BMP', 'P'),
        saved('PPM'), saved('PPM', 'L'), saved('PPM', '1'), saved('TIFF', 'LAB'),
        saved('TIFF', big_tiff=True), saved('TIFF', 'YCbCr'),
    ]  # fmt: skip
    found += [saved(kind, frames=True) for kind in ('MPO', 'PNG', 'GIF', 'WEBP', 'TIFF')]
    compressions = ('tiff_lzw', 'jpeg', 'packbits', 'tiff_adobe_deflate')
    found += [saved('TIFF', compression=name) for name in compressions]
    found += [saved('TIFF', '1', compression=name) for name in ('group3', 'group4')]
    if 'avif' in formats.SUFFIXES:
        found += [saved('AVIF', exif=exif), saved('AVIF', 'RGBA'), saved('AVIF', frames=True)]
    for depth, colour in itertools.product((1, 2, 4, 8, 16), (0, 2, 3)):
        if depth >= 8 and colour != 3 or colour == 0 or colour == 3 and depth <= 8:
            samples = rng.integers(0, 2**depth, (9, 13, pictures.CHANNELS[colour]))
            palette = rng.integers(0, 256, (2**depth, 3)) if colour == 3 else None
            trns = b'\0\1' * 3 if colour == 2 else b'\0\1'
            found += [
                pictures.png(samples, depth, colour, palette=palette, trns=trns, interlace=i)
                for i in (0, 1)
            ]  # fmt: skip
    for bits, order, planar in itertools.product((1, 8, 12, 16), '<>', (0, 1)):
        samples = rng.integers(0, 2**bits, (9, 13, 3 if planar else 1))
        found.append(pictures.tiff(samples, bits, 2 if planar else 0, order=order, planar=planar,
                                   tags=[(274, 3, [5])], tile=16 if order == '>' else None))
    found.append(pictures.tiff(rng.integers(0, 4, (9, 13, 1)), 2, 3, tags=[(320, 3, [7] * 12)]))
    indices = rng.integers(0, 4, (3, 5))
    found.append(pictures.gif((9, 13), [(2, 3, indices, 1, 2), (0, 0, indices, None, 1)]))
    for sampling in ([(1, 1)], [(2, 2), (1, 1), (1, 1)], [(2, 4), (1, 1), (1, 1)], [(1, 1)] * 4):
        found.append(pictures.jpeg(40, 56, sampling, rng))
    return found


def mutated(data, rng):
    """A file with some of its bytes changed, taken away, repeated or cut off."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        # Half of the changes are in the first bytes, where headers are.
        place = int(rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 120)))
        change, length = rng.random(), int(rng.integers(1, 9))
        if change < 0.5:
            data[place] = rng.choice(MARKS) if rng.random() < 0.5 else rng.integers(256)
        elif change < 0.65:
            data[place : place + length] = rng.bytes(length)
        elif change < 0.75:
            del data[place : place + length]
        elif change < 0.85:
            data[place:place] = data[place : place + length]
        elif change < 0.95:
            value = int(rng.choice([0, 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]))
            data[place : place + 4] = value.to_bytes(4, 'little' if rng.random() < 0.5 else 'big')
        else:
            del data[place + 1 :]
        if not data:
            data = bytearray(b'\0')
    return bytes(data)


def probe(data, rng):
    """Whether a file is read; AssertionError where its two paths differ in shape."""
    try:
        image = images.read(data)
        height, width, _ = image.shape
        y, x = int(rng.integers(height)), int(rng.integers(width))
        box = y, x, int(rng.integers(1, height - y + 1)), int(rng.integers(1, width - x + 1))
        small = images.resized(image, box, (16, 16))
        assert small.shape == (16, 16, 3) and small.dtype == np.uint8
    except images.Unreadable as e:
        message = str(e)
        assert message and '\n' not in message, repr(message)
        return False
    try:  # the whole may be damaged where the window is not
        whole = images.decode(data)
    except images.Unreadable:
        return True
    assert whole.shape == image.shape and whole.dtype == np.uint8
    return True


def limited(room=ROOM):
    """No more address space for this process than what it has and `room`."""
    with open('/proc/self/statm') as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))


def fuzz(seconds=np.inf, count=np.inf, seed=0):
    """(files read, refused) of mutations for so long, or so many; raises at the first failure."""
    rng, files, end = np.random.default_rng(seed), seeds(), time.monotonic() + seconds
    for data in files:
        try:
            images.decode(data)
        except images.Unreadable as e:
            assert 'range' in str(e) or 'identify' in str(e) or 'planes' in str(e), e
    counts = [0, 0]
    while sum(counts) < count and time.monotonic() < end:
        data, begun = mutated(files[rng.integers(len(files))], rng), time.monotonic()
        try:
            counts[not probe(data, rng)] += 1
        except BaseException:
            with open('/tmp/fuzz_images.bin', 'wb') as file:
                file.write(data)
            raise
        took = time.monotonic() - begun
        assert took < LONGEST, f'{took:.0f} s for {data[:2000]!r}'
    return counts


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    limited()
    options = dict(seconds=float(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(*fuzz(**options))
