"""Says what is in images: python -m vit_jax.predict --checkpoint X IMAGE...

X is anything that vit_jax.load takes. Images are files, or folders of them. The most likely classes
come with their probabilities, by name where names are known; --json prints one object an image.
"""

import json
import sys

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from vit_jax import cli
from vit_jax.convert import load as weights
from vit_jax.data import files, pipeline
from vit_jax.errors import UserError
from vit_jax.evaluators import classify

CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None, 'What to predict with: a path, an address, a name of the catalogue.',
    required=True,
)  # fmt: skip
TOP = flags.DEFINE_integer('top', 5, 'Classes to name for each image.', lower_bound=1)
BATCH = flags.DEFINE_integer('batch_size', 32, 'Images a step.', lower_bound=1)
SIZE = flags.DEFINE_integer('image_size', None, "Pixels a side, if not the checkpoint's own.")
VIEW = flags.DEFINE_string(
    'view', None, 'How an image becomes a square: central (crop, the default) or resize (squeeze). '
    'Of a run: as its first evaluation does.',
)  # fmt: skip
EMA = flags.DEFINE_bool('ema', True, 'Of a run: the moving average of the parameters, if kept.')
JSON = flags.DEFINE_bool('json', False, 'Print one JSON object an image.')


def probabilities(model, params, images, batch_size):
    """Yields float32 [K] for each of the images [H, W, 3], computed in batches of one size."""

    @jax.jit
    def step(params, batch):
        logits, _ = model.apply({'params': params}, model.normalise(batch))
        return jax.nn.softmax(logits.astype(np.float32))

    batch = []

    def run():
        padded = batch + [batch[-1]] * (batch_size - len(batch))
        return np.asarray(step(params, np.stack(padded)))[: len(batch)]

    for image in images:
        batch.append(image)
        if len(batch) == batch_size:
            yield from run()
            batch.clear()
    if batch:
        yield from run()


def main(argv):
    if not argv[1:]:
        raise UserError('no image is named; give paths of images or folders')
    paths = files.found(argv[1:])
    ema = None if EMA.value else False
    found = weights.read(CHECKPOINT.value, image_size=SIZE.value, ema=ema)
    if found.model.num_classes is None:
        raise UserError(f'{CHECKPOINT.value} has no head, so it knows no classes')
    size = found.image_size or (files.DEFAULT_SIZE,) * 2
    view = pipeline.make_view(found.view if VIEW.value is None else VIEW.value, size)
    stream = (files.pixels(path, view) for path in paths)
    top = min(TOP.value, found.model.num_classes)
    results = probabilities(found.model, found.params, stream, min(BATCH.value, len(paths)))
    for path, values in zip(paths, results, strict=True):
        best = np.argsort(-values, kind='stable')[:top]
        rows = [(int(i), classify.class_name(found.classes, i), float(values[i])) for i in best]
        if JSON.value:
            classes = [dict(index=i, name=n, probability=p) for i, n, p in rows]
            print(json.dumps({'image': str(path), 'top': classes}), flush=True)
        else:
            show(path, rows)


def show(path, rows):
    """One image's classes as a table."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for _, name, probability in rows:
        table.add_row(f'{probability:7.2%}', name)
    console = Console(file=sys.stdout, highlight=False, markup=False)
    console.print(str(path))
    console.print(table)


if __name__ == '__main__':
    cli.run(main)
