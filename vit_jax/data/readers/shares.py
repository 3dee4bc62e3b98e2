"""Shares of a split of files, chosen by a hash of their names."""

import bisect
import hashlib
import os
from collections.abc import Sequence


def chosen(files: Sequence[str], low: float, high: float) -> Sequence[str]:
    """Files in a share from `low` to `high` percent, in their order.

    The hash of its name places a file, so that it keeps its place when others are added; but each
    bound has at least one file on both sides. Shares that do not overlap have no file in common.
    """
    if (low, high) == (0, 100):
        return files
    order = sorted(files, key=percentile)
    hashes = [percentile(file) for file in order]

    def place(bound):
        if bound in (0, 100):
            return len(files) if bound else 0
        k = bisect.bisect_left(hashes, bound)
        return min(max(k, 1), len(files) - 1) if len(files) > 1 else k

    within = set(order[place(low) : place(high)])
    return [file for file in files if file in within]


def percentile(name: str) -> float:
    """Hash of a file's name as a number in [0, 100)."""
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return int.from_bytes(digest[:8], 'big') / 2**64 * 100
