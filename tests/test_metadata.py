"""What is no pixel of an image file changes none; EXIF's orientation alone turns it."""

import itertools
import struct
import zlib

import numpy as np
import pictures
import pytest
from pictures import PHOTO, assert_shows, decoded, saved
from PIL import Image

from vit_jax.data import images, metadata
from vit_jax.data.readers import formats

RNG = np.random.default_rng(0)
SIZE = 9, 13


def with_exif(kind, exif, image=PHOTO):
    """An image file with EXIF data of just these bytes, a TIFF structure."""
    if kind == 'PNG':
        data = saved('PNG', image)
        return data[:33] + pictures.chunk(b'eXIf', exif) + data[33:]
    return saved(kind, image, exif=b'Exif\0\0' + exif)


def turns(image):
    """What EXIF's orientations 1 to 8 make of an image (TIFF 6.0, tag 274)."""
    across = image.swapaxes(0, 1)
    return [image, image[:, ::-1], np.rot90(image, 2), image[::-1], across, np.rot90(image, -1),
            np.rot90(across, 2), np.rot90(image)]  # fmt: skip


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF', 'MPO'])
def test_all_orientations(kind, order):
    if kind == 'TIFF':
        upright = PHOTO
    else:
        upright = decoded(saved(kind, **(dict(save_all=True) if kind == 'MPO' else {})))
    for k, expected in enumerate(turns(upright), 1):
        exif = pictures.tiff_of([(271, 2, b'maker'), (metadata.ORIENTATION, 3, [k])], order=order)
        for compress in (False, True) if kind == 'TIFF' else (False,):
            if kind == 'TIFF':
                tags = [(metadata.ORIENTATION, 3, [k])]
                data = pictures.tiff(PHOTO, 8, 2, order=order, compress=compress, tags=tags)
            elif kind == 'MPO':
                more = dict(save_all=True, append_images=[Image.fromarray(PHOTO[::-1])])
                data = saved('MPO', exif=b'Exif\0\0' + exif, **more)
            else:
                data = with_exif(kind, exif)
            np.testing.assert_array_equal(decoded(data), expected)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
def test_an_orientation_in_xmp_alone_turns_nothing(kind):
    if kind == 'JPEG':
        plain, body = saved('JPEG'), b'http://ns.adobe.com/xap/1.0/\0' + XMP
        data = plain[:2] + b'\xff\xe1' + struct.pack('>H', len(body) + 2) + body + plain[2:]
    elif kind == 'PNG':
        plain = saved('PNG')
        text = pictures.chunk(b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0' + XMP)
        data = plain[:33] + text + plain[33:]
    elif kind == 'WEBP':
        plain, data = saved('WEBP'), saved('WEBP', xmp=XMP)
    else:
        plain, data = (pictures.tiff(PHOTO, 8, 2, tags=tags) for tags in ([], [(700, 1, XMP)]))
    assert data != plain
    np.testing.assert_array_equal(decoded(data), decoded(plain))


ODD = [  # (tag, type, values) that no viewer minds
    (282, 5, [1, 0]), (282, 10, [-1, 0]), (33432, 5, [1, 0]), (33432, 2, b'\xff\xfe'),
    (271, 12, [0.5]), (282, 12, [float('nan')]), (34665, 2, b'x'), (34665, 4, [2**32 - 1]),
    (34665, 4, [8]), (37500, 7, bytes(70000)[:3000]), (0, 3, [0]), (65535, 99, b'abcd'),
    (700, 5, [0, 0]), (34853, 4, [12]), (272, 1, []), (metadata.ORIENTATION, 3, [0]),
    (metadata.ORIENTATION, 3, [9]), (metadata.ORIENTATION, 3, [6, 6]),
    (metadata.ORIENTATION, 2, b'\6\0'), (metadata.ORIENTATION, 12, [6.0]),
]  # fmt: skip


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
def test_odd_entries_make_nothing_unreadable(kind):
    plain = pictures.tiff(PHOTO, 8, 2) if kind == 'TIFF' else saved(kind)
    upright = decoded(plain)
    for (tag, number, values), order in itertools.product(ODD, '<>'):
        entry = [(tag, number, values)]
        if kind == 'TIFF':
            data = pictures.tiff(PHOTO, 8, 2, order=order, tags=entry)
        else:
            data = with_exif(kind, pictures.tiff_of(entry, order=order))
        np.testing.assert_array_equal(decoded(data), upright, err_msg=f'{tag} {number} {values}')
    for exif in (b'', b'II', b'MM\0*', b'II*\0\xff\xff\xff\xff', b'XX' + bytes(30), b'\xff' * 99):
        if kind != 'TIFF':
            np.testing.assert_array_equal(decoded(with_exif(kind, exif)), upright)


def test_bytes_between_the_segments_of_a_jpeg_are_skipped():
    plain = saved('JPEG', exif=b'Exif\0\0' + pictures.tiff_of([(metadata.ORIENTATION, 3, [6])]))
    shown, end = decoded(plain), 4 + int.from_bytes(plain[4:6]) - 2 + 2
    assert plain[end] == 0xFF and shown.shape == (40, 24, 3)
    for junk in (b'junk', b'\0', b'\xff', b'\xff\xff\xff', b'a\xff\0b', bytes(5000)):
        np.testing.assert_array_equal(decoded(plain[:2] + junk + plain[2:]), shown)
        np.testing.assert_array_equal(decoded(plain[:end] + junk + plain[end:]), shown)


def test_texts_of_a_png_do_not_count_whatever_is_in_them():
    samples = RNG.integers(0, 256, (*SIZE, 3))
    plain = pictures.png(samples, 8, 2)
    long = zlib.compress(bytes(50_000_000), 9)
    damaged = bytearray(pictures.chunk(b'tEXt', b'Comment\0a'))
    damaged[-1] ^= 1
    for extra in (pictures.chunk(b'zTXt', b'Comment\0\0' + long),
                  pictures.chunk(b'iTXt', b'Comment\0\1\0\0\0' + long),
                  pictures.chunk(b'iCCP', b'profile\0\0' + long),
                  pictures.chunk(b'tEXt', b'Comment\0' + bytes(3_000_000)), bytes(damaged),
                  pictures.chunk(b'pHYs', b'x'), pictures.chunk(b'gAMA'),
                  pictures.chunk(b'zTXt', b'Comment\0\0not deflated')):  # fmt: skip
        assert_shows(pictures.png(samples, 8, 2, extra=extra), samples, 0)
        deep = RNG.integers(0, 2**16, (*SIZE, 3))
        key = deep[2, 2].astype('>u2').tobytes()
        np.testing.assert_array_equal(
            decoded(pictures.png(deep, 16, 2, trns=key, extra=extra)),
            decoded(pictures.png(deep, 16, 2, trns=key)),
        )
    at = plain.index(b'IDAT') + 10
    broken = plain[:at] + bytes([plain[at] ^ 1]) + plain[at + 1 :]
    with pytest.raises(images.Unreadable):
        decoded(broken)
    header = struct.pack('>IIBBBBB', 20000, 20000, 8, 2, 0, 0, 0)
    bomb = plain[:8] + pictures.chunk(b'IHDR', header) + plain[33:]
    with pytest.raises(images.Unreadable, match='bomb'):
        decoded(bomb)


def test_transparency_that_is_damaged_or_in_the_wrong_place_does_not_count():
    samples = RNG.integers(0, 2, (*SIZE, 1)) * 255
    plain = pictures.png(samples, 8, 0)
    key = pictures.chunk(b'tRNS', b'\0\0')
    end = plain.index(b'IDAT') + 8 + struct.unpack('>I', plain[33:37])[0]
    for data in (plain[:33] + key[:-1] + bytes([key[-1] ^ 1]) + plain[33:],
                 plain[:end] + key + plain[end:],
                 plain[:33] + pictures.chunk(b'tRNS', b'\0\0\0\0') + plain[33:]):  # fmt: skip
        assert_shows(data, samples, 0)
    assert_shows(plain[:33] + key + plain[33:], np.full_like(samples, 255), 0)


@pytest.mark.skipif('avif' not in formats.SUFFIXES, reason='this Pillow was built without AVIF')
def test_avif_turns_by_its_own_boxes():
    for k, expected in enumerate(turns(decoded(saved('AVIF', quality=100))), 1):
        exif = pictures.tiff_of([(metadata.ORIENTATION, 3, [k]), (282, 5, [1, 0])])
        shown = decoded(saved('AVIF', quality=100, exif=exif))
        np.testing.assert_array_equal(shown, expected)
