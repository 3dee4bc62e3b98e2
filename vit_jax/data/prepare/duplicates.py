"""Finds exact and near duplicates of test images among training images.

Papers remove images of downstream test sets from pre-training data, so that no accuracy is due to
images seen before (arXiv:2010.11929 section 4.1, arXiv:1912.11370).

Exact duplicates have the same pixels, by their SHA-256. Near duplicates have similar perceptual
hashes: the image is converted to grey and resized to 32 x 32, and the signs of the 16 x 16 lowest
frequencies of its discrete cosine transform, without the mean, are the 255 bits of the hash. Two
images are near if at most `distance` bits differ, for the image or its mirror image. Unrelated
images differ in half of the bits.

Measured with distance 48 on 400 windows of two photographs, of 64 to 260 pixels: share found of all
windows, and of the two thirds with the most contrast (the others are sky, whose hash is noise):

    mirrored, grey, twice the size          100%         100%
    half the size; resized to a square      98%, 97%     100%, 100%
    JPEG of quality 90, 70, 50, 20          97 92 91 88% 100% each
    brightness x 1.3, x 0.7, contrast       96 96 98%    100% each
    rotated by one degree                   89%          100%
    a third of the size, nearest pixel      85%          91%
    cropped by 1%, 2%, 5%, 10% on each side 98 83 5 0%   100 94 7 0%

Crops are not found. Of 119,480 pairs of windows that do not overlap, none is nearer than 90, and
none is nearer than 62 when mirrored. Where all images are alike (clothes of 28 x 28 pixels), check
removed.jsonl.

The search compares an image with all hashes and rules out most after 128 bits. Among 100,000 hashes
an image and its mirror image take 0.3 ms on one core; digest and hashes of 500 x 375 pixels take
0.7 ms.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vit_jax.data import images
from vit_jax.io import atomic

SIDE, FREQUENCIES = 32, 16  # pixels of the grey image; frequencies per axis
DISTANCE = 48  # bits of 255
MARGIN = 0.5  # least coefficient above rounding errors: 1 / 2,000 of a grey level per pixel


def cosines(rows: int, side: int) -> np.ndarray:
    """First rows of the discrete cosine transform: float64 [rows, side]."""
    return np.cos(np.pi * np.arange(rows)[:, None] * (2 * np.arange(side) + 1) / (2 * side))


COSINES = cosines(FREQUENCIES, SIDE)
MIRRORED = np.where(np.arange(FREQUENCIES) % 2, -1, 1)  # signs of the columns of a mirror image


def hashes(image: np.ndarray) -> np.ndarray:
    """Hashes of an image uint8 [H, W, 3] and of its mirror image: uint64 [2, 4]."""
    grey = Image.fromarray(np.ascontiguousarray(image)).convert('L')
    grey = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float64)
    coefficients = COSINES @ grey @ COSINES.T  # [rows, columns]
    coefficients[0, 0] = 0  # the mean, which is positive for every image
    both = np.stack([coefficients, coefficients * MIRRORED]) > MARGIN
    return np.packbits(both.reshape(2, -1), axis=1).view(np.uint64)


def digest(image: np.ndarray) -> bytes:
    """SHA-256 of the shape and pixels of an image [H, W, 3], 32 bytes."""
    sha256 = hashlib.sha256(repr(image.shape).encode())
    sha256.update(np.ascontiguousarray(image))
    return sha256.digest()


def fingerprint(data: bytes) -> tuple[bytes, np.ndarray]:
    """(digest, hash uint64 [4]) of an encoded image; raises Unreadable if it is damaged."""
    image = images.decode(data)
    return digest(image), hashes(image)[0]


class Index:
    """Images to search for: their names, digests and hashes uint64 [N, 4]."""

    def __init__(self, names: Sequence[str], digests: Sequence[bytes], hashes: np.ndarray) -> None:
        self.names = names
        self.digests = {}
        for i, value in enumerate(digests):
            self.digests.setdefault(value, i)
        self.words = np.ascontiguousarray(np.asarray(hashes, np.uint64).reshape(-1, 4).T)  # [4, N]

    def find(self, image: np.ndarray, distance: int = DISTANCE) -> dict[str, Any] | None:
        """Finds what an image uint8 [H, W, 3] is a duplicate of.

        A negative `distance` finds exact duplicates only.

        Returns:
          {'of': name, 'kind': 'exact', 'near' or 'mirrored', 'distance': bits that differ}; None
          if it is no duplicate.
        """
        same = self.digests.get(digest(image))
        if same is not None:
            return {'of': self.names[same], 'kind': 'exact', 'distance': 0}
        best = None
        for kind, words in zip(('near', 'mirrored'), hashes(image), strict=True):
            nearest = self.nearest(words, distance if best is None else best['distance'] - 1)
            if nearest:
                best = {'of': self.names[nearest[0]], 'kind': kind, 'distance': nearest[1]}
        return best

    def nearest(self, words: np.ndarray, distance: int) -> tuple[int, int] | None:
        """(index, bits that differ) of the first of the hashes nearest to uint64 [4].

        None if all differ in more bits than `distance`.
        """
        if distance < 0:
            return None
        bits = np.bitwise_count(self.words[0] ^ words[0])
        bits += np.bitwise_count(self.words[1] ^ words[1])  # at most 128: fits its uint8
        (left,) = np.nonzero(bits <= distance)
        if not left.size:
            return None
        rest = np.bitwise_count(self.words[2:, left] ^ words[2:, None]).sum(axis=0, dtype=np.int64)
        rest += bits[left]
        i = int(np.argmin(rest))
        return (int(left[i]), int(rest[i])) if rest[i] <= distance else None


def save(
    path: str | os.PathLike, names: Sequence[str], digests: Sequence[bytes], hashes: np.ndarray
) -> None:
    """Writes the arguments of Index to an .npz file, atomically."""
    with atomic.replace_file(path) as part, part.open('wb') as file:
        np.savez(
            file,
            names=np.frombuffer(json.dumps(names).encode(), np.uint8),
            digests=np.frombuffer(b''.join(digests), np.uint8).reshape(-1, 32),
            hashes=np.asarray(hashes, np.uint64).reshape(-1, 4),
        )


def read(path: str | os.PathLike) -> Index:
    """Reads an Index from a file that `save` wrote."""
    with np.load(path, allow_pickle=False) as file:
        names = json.loads(file['names'].tobytes())
        return Index(names, [row.tobytes() for row in file['digests']], file['hashes'])
