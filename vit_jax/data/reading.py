"""Examples as a task makes them, and what becomes of those that can't be read."""

import errno

import numpy as np
from absl import logging

from vit_jax.errors import UserError, refusal
from vit_jax.io import reasons
from vit_jax.io.text import printable


def example(i, rng, *, source, task):
    """Example i, {name: array}; one that can't be used has mask 0, and `error` says why.

    Whatever a reader raises makes its example unusable: the disk and servers fail in many ways, and
    damaged files lead parsers to any. What a task raises, but for UserError, is a mistake in it.
    """
    found, error = None, ''
    try:
        record = source.records[i]
    except UserError as e:  # a damaged record
        error = str(e)
    except Exception as e:
        error = f'can not be read: {why(e)}'
    try:
        found = None if error else task.read(record, rng)
    except UserError as e:
        error = str(e)
    return {
        **(task.blank if found is None else found),
        'mask': np.float32(not error),
        'id': np.int64(i),
        'error': np.array(error[:200], '<U200'),
    }


def why(error):
    """Why a reader failed, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        short = error.errno in (errno.EMFILE, errno.ENFILE)  # of descriptors, no fault of the file
        return refusal(error) if short else error.strerror
    name, reason = type(error).__name__, reasons.reason(error)
    return reason if isinstance(error, OSError) or name == reason else f'{name}: {reason}'


def usable(feed, source, tolerance):
    """The batches of `feed`, until more than the tolerated share of the data set is unusable."""
    bad = set()
    for batch in feed:
        for i, error in zip(batch['id'], batch.pop('error'), strict=True):
            if error and i >= 0 and int(i) not in bad:
                bad.add(int(i))
                if len(bad) > tolerance * len(source):
                    raise UserError(
                        f'{name(source, int(i))}: {error} ({len(bad)} of {len(source)} examples '
                        f'so far; tolerance is {tolerance:g}; a larger one leaves these out)'
                    )
                logging.warning('skipped %s', printable(f'{name(source, int(i))}: {error}'))
        yield batch


def name(source, i):
    """What a person would call example i, also where its reader is not able to say."""
    try:
        return source.name(i)
    except Exception:  # the name may stand in the file that can't be read
        return f'example {i}'


def unbroken(feed, blank, count, stop):
    """`count` batches of `feed`, and copies of `blank` from where it raises.

    Other processes wait for each batch of an evaluation. What was raised becomes `stop.trouble`,
    by which the next batch tells them to stop.
    """
    for _ in range(count):
        batch = blank
        try:
            if stop.trouble is None:
                batch = next(feed)
        except Exception as e:
            stop.trouble = e
        yield batch
