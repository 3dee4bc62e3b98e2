"""Synthetic images with many labels, like those of JFT; example i is a function of (seed, i).

    python -m vit_jax.data.jft_like DST --examples N --classes K [--image_size 224] [--seed 0]
        [--max_labels 4] [--cells 2] [--grey] [--test_examples N/10] [--shard_examples 2000]
        [--workers N]

A class is a pair of colours, a texture, its frequency and a shape. An image shows one object per
label on a cloudy background. The probability of class c is proportional to 1 / (c + 1), that of n
labels to 1 / n^2. No class depends on left and right, so a flip keeps the labels. DST becomes a
folder of records with splits train and test, identical to the byte for any number of workers. A run
that was stopped resumes where it stopped.
"""

import concurrent.futures
import functools
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import re

import numpy as np
from absl import flags
from PIL import Image

from vit_jax import cli
from vit_jax.data import memory
from vit_jax.data.readers import example, names, records, splits
from vit_jax.data.workers import end_with_parent, ignore_signals
from vit_jax.errors import UserError

COLOURS = {
    'red': (220, 30, 30), 'blue': (40, 60, 220), 'yellow': (245, 225, 40), 'green': (30, 150, 50),
    'magenta': (220, 50, 200), 'cyan': (40, 210, 220), 'orange': (245, 140, 20),
    'purple': (110, 40, 150), 'lime': (150, 235, 60), 'brown': (110, 65, 30),
    'white': (245, 245, 245), 'black': (20, 20, 20),
}  # fmt: skip
PAIRS = [(a, b) for a in range(len(COLOURS)) for b in range(len(COLOURS)) if a != b]
RGB = np.array(list(COLOURS.values()), np.float32)
SHAPES = ('disk', 'square', 'triangle', 'diamond', 'cross')
TEXTURES = ('rows', 'columns', 'checks', 'grid', 'dots', 'rings')
CYCLES = (2, 3, 4, 5, 6, 8, 10, 13)  # across an object
MOST_CLASSES = len(PAIRS) * len(SHAPES) * len(TEXTURES) * len(CYCLES)  # 31,680
MOST_LABELS = 16
GRAIN = 6  # standard deviation of the noise; it makes files as large as those of photos
SPLITS = ('train', 'test')
SETTINGS = 'jft_like.json'  # settings of a folder that is being written


def parts(label):
    """(colour pair, shape, texture, cycles) of a class, as indices; unique to each class.

    The first 132, the frequent ones, each have their own colours; shapes and textures vary in all.
    """
    rest, pair = divmod(label, len(PAIRS))
    rest, shape = divmod(rest, len(SHAPES))
    cycles, texture = divmod(rest, len(TEXTURES))
    return (
        pair,
        (shape + pair) % len(SHAPES),
        (texture + pair // 5 + shape) % len(TEXTURES),
        (cycles + pair // 7 + shape + texture) % len(CYCLES),
    )


def class_name(label):
    """Describes a class: 'red on blue checks, 4 across, in a disk'."""
    pair, shape, texture, cycles = parts(label)
    a, b = (list(COLOURS)[colour] for colour in PAIRS[pair])
    return f'{a} on {b} {TEXTURES[texture]}, {CYCLES[cycles]} across, in a {SHAPES[shape]}'


def inside(shape, y, x):
    """Mask of a shape: bool [h, w] for y [h, 1] and x [1, w] in [-1, 1]."""
    if shape == 'disk':
        return y * y + x * x <= 1
    if shape == 'square':
        return np.maximum(abs(y), abs(x)) <= 0.88
    if shape == 'triangle':
        return 2 * abs(x) <= y + 1
    if shape == 'diamond':
        return abs(y) + abs(x) <= 1
    return np.minimum(abs(y), abs(x)) <= 0.4  # a cross


def upper(texture, y, x, cycles):
    """Mask of the first colour of a texture, on about two thirds of the area: bool [h, w]."""
    sy, sx = np.sin(np.pi * cycles * y), np.sin(np.pi * cycles * x)
    if texture == 'rows':
        return np.broadcast_to(sy > -0.5, (len(y), x.shape[1]))
    if texture == 'columns':
        return np.broadcast_to(sx > -0.5, (len(y), x.shape[1]))
    if texture == 'checks':
        return sy * sx > -0.2
    if texture == 'grid':
        return np.minimum(sy, sx) > -0.8
    if texture == 'dots':
        return sy + sx < 0.6
    return np.sin(np.pi * cycles * np.sqrt(y * y + x * x)) > -0.5  # rings


@functools.cache
def grain(size):
    """Noise that windows are cut from: int16 [2 size, 2 size, 1]."""
    return np.random.default_rng(0).normal(0, GRAIN, (2 * size, 2 * size, 1)).astype(np.int16)


def draw(rng, labels, size, cells=2):
    """Draws an image uint8 [size, size, 3] with an object per label; objects do not overlap.

    Each object has a cell of at least `cells` x `cells`, and fills 0.65 or more of the cell's side.
    """
    ground = rng.integers(70, 170, (6, 6, 1)) + rng.integers(-20, 20, (6, 6, 3))
    ground = ground.astype(np.uint8)
    image = np.array(Image.fromarray(ground).resize((size, size), Image.Resampling.BICUBIC))
    side = max(cells, int(np.ceil(np.sqrt(len(labels)))))
    cell = size / side
    places = rng.permutation(side * side)
    for label, place in zip(labels, places, strict=False):
        pair, shape, texture, cycles = parts(int(label))
        extent = int(cell * rng.uniform(0.65, 1.0))
        top, left = (int(cell * k + rng.uniform(0, cell - extent)) for k in divmod(place, side))
        at = np.linspace(-1, 1, extent, dtype=np.float32)
        y, x = at[:, None], at[None]
        shift = rng.uniform(0, 1, 2).astype(np.float32)
        over = upper(TEXTURES[texture], y + shift[0], x + shift[1], CYCLES[cycles])
        colours = RGB[list(PAIRS[pair])] + rng.normal(0, 8, (2, 3))
        colours = np.clip(colours, 0, 255).astype(np.uint8)
        window = image[top : top + extent, left : left + extent]
        mask = np.broadcast_to(inside(SHAPES[shape], y, x), over.shape)
        np.copyto(window, colours[np.where(over, 0, 1)], where=mask[..., None])
    top, left = rng.integers(0, size, 2)
    noise = grain(size)[top : top + size, left : left + size]
    return np.clip(image + noise, 0, 255).astype(np.uint8)


class Drawn:
    """Records (JPEG bytes, label) that are drawn when they are read, and take no disk space.

    A label is int32 [max_labels], padded with -1, or an int where max_labels is 1.
    """

    def __init__(
        self, examples, classes, *, split='train', image_size=224, seed=0, max_labels=4, quality=90,
        cells=2, grey=False,
    ):  # fmt: skip
        if not 2 <= classes <= MOST_CLASSES:
            raise UserError(f'{classes} classes; jft_like has 2 to {MOST_CLASSES:,}')
        if not 1 <= max_labels <= min(MOST_LABELS, classes):
            raise UserError(
                f'max_labels is {max_labels}, not 1 to {min(MOST_LABELS, classes)} of {classes} '
                'classes'
            )
        self.examples, self.classes, self.split = examples, classes, split
        self.image_size, self.seed, self.max_labels = image_size, seed, max_labels
        self.quality, self.cells, self.grey = quality, cells, grey
        shares = 1 / np.arange(1, classes + 1)
        self.shares = np.cumsum(shares / shares.sum())
        counts = 1 / np.arange(1, max_labels + 1) ** 2
        self.counts = np.cumsum(counts / counts.sum())

    def __len__(self):
        return self.examples

    def rng(self, i):
        if not 0 <= i < self.examples:
            raise IndexError(f'no example {i} among {self.examples}')
        return np.random.default_rng((self.seed, SPLITS.index(self.split), int(i)))

    def labels(self, rng):
        """Draws different labels, the frequent ones more often: a list of 1 to max_labels ints."""
        count = 1 + int(np.searchsorted(self.counts[:-1], rng.random(), side='right'))
        found = []
        while len(found) < count:
            label = int(np.searchsorted(self.shares[:-1], rng.random(), side='right'))
            if label not in found:
                found.append(label)
        return found

    def read(self, i):
        """(JPEG bytes, list of labels) of example i."""
        rng = self.rng(i)
        labels = self.labels(rng)
        out = io.BytesIO()
        image = Image.fromarray(draw(rng, labels, self.image_size, self.cells))
        if self.grey:  # with three channels still, as all the others
            image = image.convert('L').convert('RGB')
        image.save(out, 'JPEG', quality=self.quality)
        return out.getvalue(), labels

    def __getitem__(self, i):
        data, labels = self.read(i)
        return {'image': data, 'label': names.padded(labels, self.max_labels)}

    def traits(self):
        settings = (self.examples, self.classes, self.split, self.image_size, self.seed,
                    self.max_labels, self.quality, self.cells, self.grey)  # fmt: skip
        return [str(settings)], []

    def name(self, i):
        return f'jft_like:{self.examples}x{self.classes}/{self.split}[{i}]'


def tenth(examples):
    """Default number of test examples: a tenth of the training examples, 1 to 50,000."""
    return max(1, min(examples // 10, 50_000))


def class_names(classes):
    return tuple(map(class_name, range(classes)))


def named(name, split):
    """(records, class names) of 'jft_like:10000x1000', or at another image size '...x1000@64'."""
    match = re.fullmatch(r'jft_like:(\d{1,18})x(\d{1,9})(?:@(\d{1,4}))?', name)
    if not match or not int(match[1]) or int(match[3] or 224) < 8:
        raise UserError(f'{name!r} is not of the form jft_like:EXAMPLESxCLASSES[@SIZE]')
    if split not in SPLITS:
        raise splits.missing(name, split, SPLITS)
    examples, classes, size = int(match[1]), int(match[2]), int(match[3] or 224)
    examples = examples if split == 'train' else tenth(examples)
    found = Drawn(
        examples, classes, split=split, image_size=size, max_labels=min(4, classes)
    )
    return found, class_names(classes)


def plan(drawn, shard_examples):
    """[(split, index of the shard, number of shards, first example, one past the last)]."""
    work = []
    for split, one in drawn.items():
        count = -(-len(one) // shard_examples)
        for k in range(count):
            stop = min((k + 1) * shard_examples, len(one))
            work.append((split, k, count, k * shard_examples, stop))
    return work


def write(dst, one, k, count, start, stop):
    """Draws a shard unless it exists, and returns its entry in the manifest."""
    path = pathlib.Path(dst) / records.shard_name(one.split, k, count)
    if path.exists():  # complete: a shard is given this name once it is
        size = path.stat().st_size
        with path.open('rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
    else:
        examples = (
            example.encode(*one.read(i), f'{one.split}/{i}') for i in range(start, stop)
        )
        _, size, digest = records.write_shard(path, examples)
    return {'file': path.name, 'examples': stop - start, 'bytes': size, 'sha256': digest}


def make(
    dst, *, examples, classes, test_examples=None, image_size=224, seed=0, max_labels=4,
    cells=2, grey=False, shard_examples=2000, workers=1, told=lambda done, of: None,
):  # fmt: skip
    """Writes a folder of records; calls told(shards done, shards in all) after each shard."""
    counts = {'train': examples, 'test': test_examples or tenth(examples)}
    options = dict(
        image_size=image_size, seed=seed, max_labels=max_labels, cells=cells, grey=grey
    )
    drawn = {
        split: Drawn(count, classes, split=split, **options) for split, count in counts.items()
    }
    dst = pathlib.Path(dst).expanduser()
    settings = {**options, **counts, 'classes': classes, 'shard_examples': shard_examples}
    begin(dst, json.dumps(settings) + '\n')
    splits = {split: [] for split in drawn}
    context = multiprocessing.get_context('spawn')  # not fork: threads hold locks
    memory.claim()
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=end_with_parent
    ) as pool:
        work = plan(drawn, shard_examples)
        with ignore_signals():
            jobs = [(split, pool.submit(write, dst, drawn[split], *rest)) for split, *rest in work]
        try:
            for done, (split, job) in enumerate(jobs):
                splits[split].append(job.result())
                told(done + 1, len(jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    finish(dst, {
        'format': records.FORMAT, 'version': records.VERSION, 'max_labels': max_labels,
        'classes': list(class_names(classes)), 'splits': splits,
    })  # fmt: skip


def begin(dst, settings):
    """Creates the folder, or resumes one with the same settings; raises UserError otherwise."""
    try:
        dst.mkdir(parents=True, exist_ok=True)
        path = dst / SETTINGS
        if path.exists():
            if path.read_text() != settings:
                raise UserError(f'{path} has other settings than these; choose another folder')
        elif any(dst.iterdir()):
            raise UserError(f'{dst} is not empty; choose another folder')
        else:
            path.write_text(settings)
    except OSError as e:
        raise UserError(f'can not write to {dst}: {e.strerror or e}') from e


def finish(dst, manifest):
    """Writes the manifest, which makes the folder complete."""
    part = dst / f'.{records.MANIFEST}.part'
    with part.open('w') as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, dst / records.MANIFEST)


def define_flags():
    """Not at import, since `sources` imports this and other commands have flags of these names."""
    flags.DEFINE_integer('examples', None, 'Examples of the split train.', lower_bound=1)
    flags.DEFINE_integer(
        'test_examples', None, 'Examples of the split test, else a tenth.', lower_bound=1
    )
    flags.DEFINE_integer('classes', None, f'Classes, up to {MOST_CLASSES:,}.', lower_bound=2)
    flags.DEFINE_integer('image_size', 224, 'Height and width in pixels.', lower_bound=8)
    flags.DEFINE_integer(
        'max_labels', 4, 'Most labels of an image.', lower_bound=1, upper_bound=MOST_LABELS
    )
    flags.DEFINE_integer('cells', 2, 'Least cells along a side, one object in each.', lower_bound=1)
    flags.DEFINE_bool('grey', False, 'Greyscale images, in which colours are but shades.')
    flags.DEFINE_integer('seed', 0, 'What example i looks like.', lower_bound=0)
    flags.DEFINE_integer('shard_examples', 2000, 'Examples in a shard.', lower_bound=1)
    flags.DEFINE_integer('workers', os.cpu_count(), 'Processes that draw.', lower_bound=1)


def main(argv):
    options = flags.FLAGS
    if len(argv) != 2 or options.examples is None or options.classes is None:
        raise UserError('usage: python -m vit_jax.data.jft_like DST --examples N --classes K')
    names = (
        'examples', 'classes', 'test_examples', 'image_size', 'seed', 'max_labels', 'cells', 'grey',
        'shard_examples', 'workers',
    )  # fmt: skip
    settings = {name: getattr(options, name) for name in names}
    make(argv[1], **settings, told=lambda done, of: print(f'{done} of {of} shards', flush=True))


if __name__ == '__main__':
    define_flags()
    cli.run(main)
