"""Masks as run lengths in COCO's json; `annotations` reads them."""

from collections.abc import Iterable

import numpy as np


def encoded(mask: np.ndarray) -> dict:
    """{'size': [H, W], 'counts': compressed text} of a mask [H, W], as pycocotools writes it."""
    return {'size': list(mask.shape), 'counts': compressed(lengths(mask))}


def lengths(mask: np.ndarray) -> list[int]:
    """Lengths of runs of a mask [H, W], column by column; the first run is of pixels outside."""
    flat = np.asarray(mask, bool).T.reshape(-1)
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]) + 1, flat.size)
    counts = np.diff(ends, prepend=0).tolist()
    return [0, *counts] if flat[:1].any() else counts


def compressed(counts: Iterable[int]) -> str:
    """The text that `annotations.uncompressed` reads as these run lengths.

    Numbers from the fourth on are differences to that before the last (cocoapi common/maskApi.c,
    rleToString).
    """
    counts, digits = list(counts), []
    for i, value in enumerate(counts):
        value -= counts[i - 2] if i > 2 else 0
        while True:
            digit, value = value & 31, value >> 5
            last = value == (-1 if digit & 16 else 0)
            digits.append(digit + (48 if last else 80))
            if last:
                break
    return bytes(digits).decode()
