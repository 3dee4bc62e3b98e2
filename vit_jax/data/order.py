"""The order of training examples, a function of (seed, position) on any number of processes."""

from collections.abc import Sequence

import numpy as np
from grain.experimental import index_shuffle

from vit_jax.data.sources import Source


def batch_ids(
    source: Source, *, batch_size: int, seed: int, step: int, repeats: int = 1
) -> np.ndarray:
    """Returns the examples int64 [B] of the global batch of a step; the first step is 0."""
    return example_ids(
        source, np.arange(step * batch_size, (step + 1) * batch_size) // repeats, seed
    )


def example_ids(source: Source, positions: np.ndarray, seed: int) -> np.ndarray:
    """Returns the examples int64 [N] at positions of an endless order.

    Each epoch is a permutation. A mixture takes examples from each part by its weight, in a fixed
    pattern; each part has epochs of its own.
    """
    parts = getattr(source.records, 'parts', None)
    if parts is None:
        return shuffled(positions, len(source), seed)
    which, within = interleaved(positions, [part.weight for part in parts])
    chosen = np.empty(len(positions), np.int64)
    for k, part in enumerate(parts):
        chosen[which == k] = part.offset + shuffled(within[which == k], part.length, seed, k)
    return chosen


def shuffled(positions: np.ndarray, length: int, *seed: int) -> np.ndarray:
    """Maps positions to 0 ... length - 1, in another order each epoch, without any table."""
    epochs, rounds = (positions // length).tolist(), 4
    seeds = {e: int(np.random.SeedSequence([*seed, e]).generate_state(1)[0]) for e in set(epochs)}
    return np.array([
        index_shuffle(i, length - 1, seeds[e], rounds)
        for i, e in zip((positions % length).tolist(), epochs, strict=True)
    ], np.int64)  # fmt: skip


def interleaved(positions: np.ndarray, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Divides positions among parts by weight: (part [N], position in it [N]).

    Each part in turn takes its share, evenly spaced, of the positions that those before it leave.
    """
    left = positions.astype(np.uint64)
    which, within = np.full(len(left), len(weights) - 1), left.copy()
    for k in range(len(weights) - 1):
        share = round(2**32 * weights[k] / sum(weights[k:]))
        before, after = (multiply_share(n, share) for n in (left, left + 1))
        taken = (after > before) & (which == len(weights) - 1)
        which[taken], within[taken] = k, before[taken]
        left = left - before
        within = np.where(which == len(weights) - 1, left, within)
    return which, within.astype(np.int64)


def multiply_share(n: np.ndarray, share: int) -> np.ndarray:
    """Computes floor(n x share / 2^32) of uint64 [N]."""
    factor, half = np.uint64(share), np.uint64(32)
    return (n >> half) * factor + ((n & np.uint64(2**32 - 1)) * factor >> half)
