"""Examples as the model sees them, and what becomes of those that can't be read."""

import errno

import numpy as np
from absl import logging

from vit_jax.data import images
from vit_jax.errors import UserError, refusal
from vit_jax.io import reasons
from vit_jax.io.text import printable


def size_of(image_size):
    """An int or (height, width) to (height, width)."""
    return (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size)


def example(i, rng, *, source, view, image_size):
    """Example i as the model sees it; one that can't be used has mask 0 and says why.

    Whatever a reader raises makes its example unusable: the disk and servers fail in many ways, and
    damaged files lead parsers to any. What a view raises, but for UserError, is a mistake in it.
    """
    image, label, error = None, no_label(source), ''
    try:
        data, found = source.records[i]
        found = np.asarray(found, np.int32).reshape(label.shape)
        image = images.read(data)
    except images.Unreadable as e:
        error = f'unreadable image: {e}'
    except UserError as e:  # a damaged record
        error = str(e)
    except Exception as e:
        error = f'can not be read: {why(e)}'
    try:
        if not error:
            image, error = view(image, rng), wrong_label(found, source)
            label = label if error else found
    except images.Unreadable as e:  # a JPEG is decoded here
        error = f'unreadable image: {e}'
    except UserError as e:  # an argument of the view
        error = str(e)
    return {
        'image': np.zeros((*size_of(image_size), 3), np.uint8) if image is None else image,
        'label': label,
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


def no_label(source):
    """What stands for the label, or the labels [L], of an example that can't be used."""
    most = getattr(source.records, 'max_labels', None) or 1
    return np.int32(0) if most == 1 else np.full(most, -1, np.int32)


def wrong_label(labels, source):
    """What is wrong with a label, or labels [L] padded with -1; nothing is an empty text."""
    least = 0 if labels.ndim == 0 else -1
    bad = labels[(labels < least) | (labels >= len(source.classes))]
    if not bad.size:
        return ''
    return f'label {bad.flat[0]} is out of range: the data set has {len(source.classes)} classes'


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
