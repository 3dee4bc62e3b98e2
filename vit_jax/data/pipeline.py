"""Batches as a function of (seed, step), on any number of hosts.

A batch is {image: uint8 [B, H, W, 3], label: int32 [B], mask: float32 [B], id: int64 [B]}; mask 0
marks padding and images that could not be read.
"""

from functools import partial

import grain
import numpy as np
from absl import flags

from vit_jax.data import augment, images
from vit_jax.errors import UserError


def size_of(image_size):
    """An int or (height, width) to (height, width)."""
    return (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size)


def check_view(name):
    """The name of a function of `augment`, as it came; UserError where there is none."""
    if name not in augment.VIEWS:
        raise UserError(f'no view {name!r}; there are {", ".join(sorted(augment.VIEWS))}')
    return name


def make_view(view, image_size):
    """A function of `augment` by name, or dict(name=..., its arguments), at a size."""
    view = dict(name=view) if isinstance(view, str) else dict(view)
    name = check_view(view.pop('name', None))
    return partial(augment.VIEWS[name], size=size_of(image_size), **view)


def example(i, rng, *, source, view, image_size):
    """Example i as the model sees it; one that can't be read has mask 0 and says why."""
    data, label = source.records[i]
    try:
        image, error = view(images.decode(data), rng), ''
    except images.Unreadable as e:
        image, error = np.zeros((*size_of(image_size), 3), np.uint8), str(e)
    return {
        'image': image,
        'label': np.int32(label),
        'mask': np.float32(not error),
        'id': np.int64(i),
        'error': np.array(error[:200], '<U200'),
    }


def order(source, *, seed):
    """Example indices without end: each epoch another permutation of them all."""
    return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()


def ids(source, *, batch_size, seed, step):
    """The examples [B] of the global batch of a step (0 is the first)."""
    indices = order(source, seed=seed)
    return np.array([indices[i] for i in range(step * batch_size, (step + 1) * batch_size)])


def batches(
    source,
    seed,
    start=0,
    host=0,
    hosts=1,
    *,
    view: str | dict,
    image_size: int | tuple,
    batch_size: int,
    threads: int = 4,
    workers: int = 0,
    prefetch: int = 8,
    tolerance: float = 0.0,
):
    """Training batches of this host from step `start` on, without end.

    Shuffle, repeat and augment act on the global data set, which is then cut by host: the global
    batch of a step does not depend on `hosts`, nor on where the run began. More unreadable images
    than `tolerance` (a share of the data set) raise UserError with the name of the last.
    """
    load = partial(
        example, source=source, view=make_view(view, image_size), image_size=image_size
    )
    data = order(source, seed=seed).random_map(load)
    data = data[host::hosts].batch(batch_size // hosts)[start:]
    return readable(stream(data, threads, workers, prefetch), source, tolerance)


def examples(
    source,
    host=0,
    hosts=1,
    *,
    view,
    image_size,
    batch_size,
    threads=4,
    workers=0,
    prefetch=8,
    tolerance=0.0,
):
    """This host's batches of one pass, each example once; the last ones are padded with mask 0.

    Every host gets the same number of batches.
    """
    load = partial(
        example, source=source, view=make_view(view, image_size), image_size=image_size
    )
    steps = -(-len(source) // batch_size)
    data = grain.MapDataset.range(steps * batch_size)
    data = data.map(partial(padded, load=load, count=len(source)))
    data = data[host::hosts].batch(batch_size // hosts)
    return readable(stream(data, threads, workers, prefetch), source, tolerance)


def padded(i, *, load, count):
    """Example i, or one with mask 0 past the end."""
    if i < count:
        return load(i, np.random.default_rng(0))
    return {**load(0, np.random.default_rng(0)), 'mask': np.float32(0), 'id': np.int64(-1)}


def stream(data, threads, workers, prefetch):
    """Batches in order, read ahead by threads, of worker processes where there are any."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    data = data.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads flags, also where no absl app runs
            flags.FLAGS.mark_as_parsed()
        data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(data)


def readable(feed, source, tolerance):
    """The batches of `feed`, until more than the tolerated share of the data set is unreadable."""
    bad = set()
    for batch in feed:
        check_labels(batch, source)
        for i, error in zip(batch['id'], batch.pop('error'), strict=True):
            if error and i >= 0:
                bad.add(int(i))
                if len(bad) > tolerance * len(source):
                    raise UserError(
                        f'unreadable image {source.name(int(i))}: {error} ({len(bad)} of '
                        f'{len(source)} images so far; tolerance is {tolerance:g})'
                    )
        yield batch


def check_labels(batch, source):
    """Raises UserError for a label that is no index into the classes of the source."""
    wrong = (batch['label'] < 0) | (batch['label'] >= len(source.classes))
    for i, label in zip(batch['id'][wrong], batch['label'][wrong], strict=True):
        raise UserError(
            f'label {label} of {source.name(int(i))} is out of range: '
            f'the data set has {len(source.classes)} classes'
        )
