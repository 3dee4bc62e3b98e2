"""Images per second of the task segment beside those of its images alone, one JSON line a view.

    python -m benchmarks.segment_input [--cores 1] [--rounds 5] [--seconds 4]

Writes a folder of JPEGs of 512 x 683 pixels, the median of ADE20K, with masks of as many pixels:
windows of scikit-learn's photographs, and regions of similar colour in them, numbered at random
among 150 classes. Measures both in turn, each in its steady state; `ratio` is the median over the
rounds of segment's rate to that of the same view, augmentations and threads without the mask.
"""

import functools
import io
import json
import os
import pathlib
import statistics
import sys
import time

import numpy as np
from absl import flags

from vit_jax import cli

FOLDER = flags.DEFINE_string('folder', 'runs/segment_input', 'Folder of the images.')
ROUNDS = flags.DEFINE_integer('rounds', 5, 'Measurements of each contender.', lower_bound=1)
SECONDS = flags.DEFINE_float('seconds', 4.0, 'Length of a measurement, after a warm-up.')
CORES = flags.DEFINE_integer('cores', 1, 'Cores to use.', lower_bound=1)

IMAGES, SHAPE, CLASSES, SIZE, BATCH = 128, (512, 683), 150, 512, 16
VIEWS = {
    'fit': dict(view='fit'),
    'scale_crop': dict(view='scale_crop'),
    'scale_crop, photometric': dict(view='scale_crop', augment=('photometric',)),
}


def pairs(count):
    """Yields (bytes of a JPEG, bytes of a PNG)."""
    from PIL import Image
    from scipy import ndimage
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    rng = np.random.default_rng(0)
    for i in range(count):
        photo, share = photos[i % 2], rng.uniform(0.4, 0.75)
        w, h = share * SHAPE[1], share * SHAPE[0]
        x, y = rng.uniform(0, photo.width - w), rng.uniform(0, photo.height - h)
        image = photo.resize(SHAPE[::-1], Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
        pixels = np.float32(image)
        smooth = ndimage.gaussian_filter(pixels, (4, 4, 0)) // 48
        _, regions = np.unique(smooth.reshape(-1, 3), axis=0, return_inverse=True)
        ids = rng.integers(0, CLASSES + 1, regions.max() + 1)[regions].reshape(SHAPE)
        grain = np.clip(pixels + rng.normal(0, 4, (*SHAPE, 1)), 0, 255).astype(np.uint8)
        files = io.BytesIO(), io.BytesIO()
        Image.fromarray(grain).save(files[0], 'JPEG', quality=85)
        Image.fromarray(ids.astype(np.uint8)).save(files[1], 'PNG')
        yield tuple(file.getvalue() for file in files)


def make(folder):
    """Writes the folder, unless it exists."""
    if folder.exists():
        return
    print(f'making {IMAGES} pairs in {folder}', file=sys.stderr, flush=True)
    for kind in ('images', 'masks'):
        (folder / kind).mkdir(parents=True)
    for i, (image, mask) in enumerate(pairs(IMAGES)):
        (folder / 'images' / f'{i}.jpg').write_bytes(image)
        (folder / 'masks' / f'{i}.png').write_bytes(mask)


def image_alone(record, rng, *, view):
    """What segment makes without its label map."""
    from vit_jax.data import images

    return {'image': view(images.read(record['image']), rng)}


def rate(source, task):
    """Images per second of the pipeline in its steady state."""
    from vit_jax.data import pipeline

    feed = pipeline.batches(source, task, 0, batch_size=BATCH, threads=CORES.value, workers=0)
    begin = time.perf_counter()
    while time.perf_counter() - begin < SECONDS.value / 4:
        next(feed)
    count, begin = 0, time.perf_counter()
    while (now := time.perf_counter()) - begin < SECONDS.value:
        next(feed)
        count += BATCH
    return count / (now - begin)


def main(argv):
    from vit_jax.data import sources, tasks
    from vit_jax.data.tasks import segment

    allowed = sorted(os.sched_getaffinity(0))[: CORES.value]
    os.sched_setaffinity(0, allowed)
    folder = pathlib.Path(FOLDER.value)
    make(folder)
    source = sources.load(name=str(folder))
    sizes = {
        kind: round(np.mean([file.stat().st_size for file in (folder / kind).iterdir()]) / 1e3, 1)
        for kind in ('images', 'masks')
    }
    print(json.dumps(dict(kilobytes=sizes)), flush=True)
    for name, settings in VIEWS.items():
        whole = segment.segment(
            source, image_size=SIZE, classes=CLASSES, zero='ignored', **settings
        )
        view = tasks.make_view(settings['view'], SIZE, settings.get('augment', ()))
        alone = tasks.Task(
            {'image': whole.blank['image']}, functools.partial(image_alone, view=view)
        )
        rounds = [(rate(source, alone), rate(source, whole)) for _ in range(ROUNDS.value)]
        images, both = (statistics.median(rates) for rates in zip(*rounds, strict=True))
        ratio = statistics.median(b / a for a, b in rounds)
        print(json.dumps(dict(
            view=name, cores=CORES.value, images_per_s=round(images, 1),
            segment_per_s=round(both, 1), ratio=round(ratio, 3),
        )), flush=True)  # fmt: skip


if __name__ == '__main__':
    cli.run(main)
