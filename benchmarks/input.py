"""Images per second of the input pipeline: python -m benchmarks.input, or with --config FILE.

Creates, once, 1,024 JPEGs of ImageNet's shape from scikit-learn's two photographs (mean 500 x 375
pixels and about 110 KB, 2% progressive, 15% with full-resolution colours, 8 very large), as
ArrayRecord and as TFRecord, and measures inception crop to 224 with flip, end to end to batches of
uint8 in host memory, on one core and on all. Each measurement is a process of its own, pinned to
its cores; contenders take turns. Prints a JSON line each: medians over the rounds; `ratio` is to
tf.data on as many cores in the same round. Ours shuffles 1,281,167 examples: the files repeated.

- ours: through Grain, with antialias=False, which is what tf.data computes, and with our default;
  threads and worker processes as by default, threads alone, or a process a core; and with
  RandAugment on top
- tf.data: decode_and_crop_jpeg, bilinear, flip, batch (pip install "vit_jax[tf]")
- decoder: our JPEG decoder alone on the same windows, files in memory, one thread a core
- whole: the same on whole images; pillow: Pillow on whole images

With --config FILE[:ARG] measures that recipe's pipeline, without a model, and prints how many such
cores an accelerator of a given speed needs. --config.KEY=VALUE changes a setting.
"""

import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import flags

from vit_jax import cli
from vit_jax.errors import UserError
from vit_jax.io import atomic

CONFIG = flags.DEFINE_string('config', None, 'Experiment whose pipeline is to be measured.')
FOLDER = flags.DEFINE_string('folder', 'runs/input', 'Folder of the images.')
ROUNDS = flags.DEFINE_integer('rounds', 5, 'Measurements of each contender.', lower_bound=1)
SECONDS = flags.DEFINE_float('seconds', 4.0, 'Length of a measurement, after a warm-up of half.')
BATCH = flags.DEFINE_integer('batch_size', 64, 'Images in a batch.')
ONLY = flags.DEFINE_list('only', None, 'Contenders to measure. Default: all.')
CORES = flags.DEFINE_list('cores', None, 'Numbers of cores. Default: 1 and all.')
RATES = flags.DEFINE_list('rates', '1000,3000,10000', 'With --config: images/s to be fed.')
MEASURE = flags.DEFINE_string('measure', None, 'Internal: the contender of this process.')

IMAGES, SIZE, SEED = 1024, 224, 0
VIEW = dict(name='inception', antialias=False)
OURS = {
    'ours': dict(view=VIEW),
    'ours antialiased': dict(view=dict(name='inception')),
    'ours threads': dict(view=VIEW, workers=0),
    'ours workers': dict(view=VIEW, threads=1),
    'ours randaugment': dict(
        view=VIEW, augment=(dict(name='randaugment', layers=2, magnitude=15),)
    ),
}
CONTENDERS = [*OURS, 'tf.data', 'decoder', 'whole', 'pillow']


def photographs(count):
    """JPEG files: windows of two photographs at other sizes, colours and qualities, with grain."""
    from PIL import Image, ImageEnhance
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    rng = np.random.default_rng(SEED)
    for i in range(count):
        photo, large = photos[i % 2], i % 128 == 127
        w, h = rng.normal(485, 50), rng.normal(364, 40)
        w, h = (int(np.clip(side, 200, 800)) * (5 if large else 1) for side in (w, h))
        share = rng.uniform(0.7, 1) * min(photo.width / w, photo.height / h)
        x, y = rng.uniform(0, photo.width - share * w), rng.uniform(0, photo.height - share * h)
        box = x, y, x + share * w, y + share * h
        image = photo.resize((w, h), Image.Resampling.BICUBIC, box=box)
        image = ImageEnhance.Color(image).enhance(rng.uniform(0.6, 1.4))
        grain = rng.normal(0, 3 if large else 8, (h, w, 1))
        pixels = np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(
            out, 'JPEG', quality=int(rng.integers(90, 98)), progressive=bool(rng.random() < 0.03),
            subsampling=0 if rng.random() < 0.15 else 2, optimize=bool(rng.random() < 0.3),
        )  # fmt: skip
        yield out.getvalue()


def make(folder):
    """Writes the images as a prepared folder, unless it exists."""
    from vit_jax.data.readers import example, records

    if (folder / records.MANIFEST).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    print(f'making {IMAGES} JPEGs in {folder}', file=sys.stderr, flush=True)
    examples = (
        example.encode(data, [i % 2], f'{i}.jpg') for i, data in enumerate(photographs(IMAGES))
    )
    name = records.shard_name('train', 0, 1)
    count, size, digest = records.write_shard(folder / name, examples)
    shard = dict(file=name, examples=count, bytes=size, sha256=digest)
    manifest = dict(
        format=records.FORMAT, version=records.VERSION, classes=['china', 'flower'], max_labels=1,
        splits=dict(train=[shard]), source={}, options={},
    )  # fmt: skip
    (folder / records.MANIFEST).write_text(json.dumps(manifest))


def describe(folder):
    """Statistics of the files."""
    from PIL import Image

    files = [record['image'] for record in source_of(folder).records]
    images = [Image.open(io.BytesIO(data)) for data in files]
    w, h = np.mean([image.size for image in images], axis=0)
    return dict(
        images=len(files), mean_kilobytes=round(np.mean([len(f) for f in files]) / 1e3, 1),
        mean_width=round(w), mean_height=round(h),
        progressive=sum('progression' in image.info for image in images),
        full_colour=sum(image.layer[0][1] == 1 for image in images),
        megapixels_or_more=sum(image.width * image.height > 1e6 for image in images),
    )  # fmt: skip


def source_of(folder):
    from vit_jax.data import sources

    return sources.load(name=str(folder))


class Repeated:
    """Repeats records to the length of ImageNet-1k; picklable."""

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return 1_281_167

    def __getitem__(self, i):
        return self.records[i % len(self.records)]


def rate(batches, images):
    """Images per second of an endless iterator in its steady state."""
    batches, seconds = iter(batches), SECONDS.value
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds / 2:
        next(batches)
    count, begin = 0, time.perf_counter()
    while (now := time.perf_counter()) - begin < seconds:
        next(batches)
        count += 1
    return count * images / (now - begin)


def measure_ours(folder, cores, **fields):
    from vit_jax.data import pipeline, sources
    from vit_jax.data.tasks import classify

    source = source_of(folder)
    source = sources.Source(Repeated(source.records), source.classes)
    if fields.get('threads') == 1:
        fields['workers'] = cores
    view = {key: fields.pop(key) for key in ('view', 'augment') if key in fields}
    task = classify.classify(source, image_size=SIZE, **view)
    feed = pipeline.batches(source, task, SEED, batch_size=BATCH.value, **fields)
    return rate(feed, BATCH.value)


def measure_tf(folder, cores):
    os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
    import tensorflow as tf

    from vit_jax.data.readers import example

    path = str(folder / 'train.tfrecord')
    if not os.path.exists(path):
        with atomic.replace_file(path) as part, tf.io.TFRecordWriter(str(part)) as writer:
            source = source_of(folder)
            for i in range(len(source)):
                record = source.records.decode(i)
                writer.write(example.encode(record['image'], record['label'], record['name']))
    features = dict(
        image=tf.io.FixedLenFeature([], tf.string), label=tf.io.FixedLenFeature([], tf.int64)
    )

    def view(record):
        parsed = tf.io.parse_single_example(record, features)
        shape = tf.image.extract_jpeg_shape(parsed['image'])
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape, tf.zeros([0, 0, 4]), area_range=(0.05, 1.0), min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.io.decode_and_crop_jpeg(parsed['image'], window, channels=3)
        image = tf.image.random_flip_left_right(tf.image.resize(image, (SIZE, SIZE)))
        return tf.cast(image, tf.uint8), parsed['label']

    data = tf.data.TFRecordDataset(path).repeat().map(view, tf.data.AUTOTUNE)
    options = tf.data.Options()
    options.threading.private_threadpool_size = cores
    data = data.batch(BATCH.value, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    return rate(data.with_options(options).as_numpy_iterator(), BATCH.value)


def measure_decoder(folder, cores, which):
    """Images per second of a decoder alone, with one thread per core."""
    from PIL import Image

    from vit_jax.data import augment, images

    files = [record['image'] for record in source_of(folder).records]
    rng = np.random.default_rng(SEED)
    boxes = [augment.random_box(images.read(data).shape[:2], rng) for data in files]

    def decode(i):
        data, box = files[i % len(files)], boxes[i % len(files)]
        if which == 'pillow':
            Image.open(io.BytesIO(data)).load()
            return
        image = images.read(data)
        box = box if which == 'decoder' else (0, 0, *image.shape[:2])
        # to one pixel, of all: little but decoding costs
        images.resized(image, box, (1, 1), 'area', antialias=False)

    def chunks():
        with ThreadPoolExecutor(cores) as pool:
            for start in range(0, sys.maxsize, BATCH.value * cores):
                yield list(pool.map(decode, range(start, start + BATCH.value * cores)))

    return rate(chunks(), BATCH.value * cores)


def measure_config(config):
    from vit_jax import assembly
    from vit_jax import config as configs
    from vit_jax.data import mixture, pipeline

    source = mixture.load(**config.data.source)
    data = configs.settings_of(config.data, pipeline.batches)
    feed = pipeline.batches(source, assembly.task_of(config, source), config.seed, **data)
    return rate(feed, config.data.batch_size)


def measure(name, folder, cores):
    if name in OURS:
        return measure_ours(folder, cores, **OURS[name])
    if name == 'tf.data':
        return measure_tf(folder, cores)
    return measure_decoder(folder, cores, name)


def measured(name, cores, *arguments):
    """Images per second of a contender, in a new process on `cores` cores."""
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    command = [
        sys.executable, '-m', 'benchmarks.input', f'--measure={name}', f'--folder={FOLDER.value}',
        f'--seconds={SECONDS.value}', f'--batch_size={BATCH.value}', *arguments,
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True,
        env=os.environ | {'JAX_PLATFORMS': 'cpu'},
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip() or f'exit status {done.returncode}').splitlines()[-1]
        raise UserError(f'{name}: {last.removeprefix("error: ")}')
    return float(done.stdout.splitlines()[-1])


def summary(name, cores, rates, peers):
    """A row: median, least and most images/s, images/s per core, median ratio to the peer."""
    row = dict(
        contender=name, cores=cores, images_per_s=round(statistics.median(rates)),
        least=round(min(rates)), most=round(max(rates)),
        per_core=round(statistics.median(rates) / cores),
    )  # fmt: skip
    if peers and name != 'tf.data':
        ratios = [a / b for a, b in zip(rates, peers, strict=True)]
        row['ratio'] = round(statistics.median(ratios), 2)
    return row


def compare(folder):
    make(folder)
    print(json.dumps(describe(folder)), flush=True)
    everything = len(os.sched_getaffinity(0))
    cores = [int(c) for c in CORES.value or sorted({1, everything})]
    names = ONLY.value or CONTENDERS
    if unknown := set(names) - set(CONTENDERS):
        raise UserError(f'no contender {", ".join(unknown)}; there are {", ".join(CONTENDERS)}')
    if max(cores) > everything:
        raise UserError(f'--cores={max(cores)}, but this process has {everything}')
    try:
        import tensorflow  # noqa: F401
    except ModuleNotFoundError:
        names = [n for n in names if n != 'tf.data']
        print('tf.data is left out: pip install "vit_jax[tf]"', file=sys.stderr)
    rates = {(n, c): [] for c in cores for n in names}
    for _ in range(ROUNDS.value):
        for name, count in rates:
            rates[name, count].append(measured(name, count))
    for (name, count), values in rates.items():
        print(json.dumps(summary(name, count, values, rates.get(('tf.data', count)))), flush=True)


def recipe(path, changes):
    """The pipeline of an experiment on the cores that this process has."""
    cores = len(os.sched_getaffinity(0))
    arguments = [f'--config={path}', *(f'--config.{key}={text}' for key, text in changes)]
    rates = [measured('config', cores, *arguments) for _ in range(ROUNDS.value)]
    each = statistics.median(rates) / cores
    need = {r: -(-float(r) // each) for r in RATES.value}
    print(json.dumps(
        summary(path, cores, rates, None) | dict(cores_for={r: int(c) for r, c in need.items()})
    ))  # fmt: skip


def main(argv, changes):
    folder = pathlib.Path(FOLDER.value)
    if MEASURE.value == 'config':
        from vit_jax import config as configs

        print(measure_config(configs.load(CONFIG.value, changes)))
    elif MEASURE.value:
        cores = len(os.sched_getaffinity(0))
        print(measure(MEASURE.value, folder, cores))
    elif CONFIG.value:
        recipe(CONFIG.value, changes)
    else:
        compare(folder)


if __name__ == '__main__':
    cli.run(main, 'config')
