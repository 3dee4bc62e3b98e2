"""Classifies images: python -m vit_jax.predict --checkpoint X IMAGE...

X is anything that vit_jax.load takes. Images are files, folders of them, or their addresses. Prints
the most likely classes of each image and their probabilities (of a softmax, or of a sigmoid where
the model was trained with one), by name where names are known. --json prints one JSON object per
image, with names exactly as they are. An image that can't be read is reported on stderr and
skipped; the exit status is then 2.

--features FILE.npz writes, instead of classes, the input of the head for each image, even if the
checkpoint has no head: `features` float32 [images, D] and `files`, their names.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import pathlib
import sys

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from vit_jax import cli
from vit_jax.convert import load as weights
from vit_jax.convert.save import complete
from vit_jax.data import files, tasks
from vit_jax.errors import UserError
from vit_jax.evaluators import classify
from vit_jax.io import storage
from vit_jax.io.progress import Bar
from vit_jax.io.text import printable, to_json
from vit_jax.models import interface
from vit_jax.objectives import losses


def read_ahead(paths, view, count):
    """Yields (path, uint8 [H, W, 3]) in order, `count` of them read ahead by threads.

    For an image that can't be read, yields its UserError instead of pixels.
    """

    def pixels(path):
        try:
            return files.pixels(path, view)
        except UserError as e:
            return e

    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = collections.deque()
        for path in paths:
            waiting.append((path, pool.submit(pixels, path)))
            if len(waiting) > count:
                path, image = waiting.popleft()
                yield path, image.result()
        for path, image in waiting:
            yield path, image.result()


def predicted(model, params, images, batch_size, loss=None, features=False):
    """Yields (path, probabilities float32 [K]), or (path, UserError), for pairs of `read_ahead`.

    All batches have one size, so that the step is compiled once. `loss` is the training loss. With
    `features`, yields pre_logits, float32 [D], instead of probabilities.
    """

    @jax.jit
    def step(params, batch):
        logits, out = model.apply({'params': params}, model.normalise(batch))
        if features:
            return out['pre_logits'].astype(np.float32)
        return losses.probabilities(logits, loss)

    while group := list(itertools.islice(images, batch_size)):
        yield from (pair for pair in group if isinstance(pair[1], UserError))
        paths, batch = [], []
        for path, image in group:
            if not isinstance(image, UserError):
                paths.append(path)
                batch.append(image)
        if batch:
            batch += batch[-1:] * (batch_size - len(batch))
            yield from zip(paths, np.asarray(step(params, np.stack(batch))), strict=False)


def main(argv):
    options = flags.FLAGS
    if not argv[1:]:
        raise UserError('no image is named; give paths of images or folders')
    if options.features:
        check_output(options.features)
    paths = files.found(argv[1:])
    ema = None if options.ema else False
    found = weights.read(
        options.checkpoint, image_size=options.image_size, ema=ema, as_input=True
    )
    if found.model.num_classes is None and not options.features:
        raise UserError(f'{options.checkpoint} has no head, so it knows no classes')
    interface.check_output(found.model)
    size = found.image_size or (files.DEFAULT_SIZE,) * 2
    view = tasks.fixed_view(found.view if options.view is None else options.view, size)
    batch_size = min(options.batch_size, len(paths))
    images = read_ahead(paths, view, 2 * batch_size)
    results = predicted(
        found.model, found.params, images, batch_size, found.loss, bool(options.features)
    )
    failed, rows = 0, []
    with progress(len(paths)) as advance:
        for path, values in results:
            if isinstance(values, UserError):
                if len(paths) == 1:
                    raise values
                print(f'skipped: {printable(values)}', file=sys.stderr)
                failed += 1
            elif options.features:
                rows.append((path, values))
            else:
                show(path, values, found.classes, options.top)
            advance(1)
    if rows:
        write_features(options.features, rows)
    if failed:
        raise UserError(f'{failed:,} of {len(paths):,} images can not be read')


def check_output(path):
    """Raises UserError if the file of features can't be written, before any computation."""
    if not path.endswith('.npz') or '://' in path:
        raise UserError(f'--features={path}: name a file here that ends in .npz')
    path = pathlib.Path(path).absolute()
    storage.check_free(path, flags.FLAGS.force)
    storage.file(path)


def write_features(path, rows):
    """Writes [(name, float32 [D])] as an .npz in one step: complete, or as it was."""
    names, features = zip(*rows, strict=True)
    with complete(pathlib.Path(path)) as part, part.open('wb') as file:
        np.savez(file, features=np.stack(features), files=np.array(list(map(str, names))))
    print(f'Written: {printable(path)}: features of {len(rows):,} images')


@contextlib.contextmanager
def progress(total):
    """Yields `advance(count)`; shows a bar if stderr is a terminal and stdout is not."""
    if total == 1 or sys.stdout.isatty() or not sys.stderr.isatty():
        yield lambda count: None
        return
    with Bar('images', total) as bar:
        yield bar.add


def show(path, values, classes, top):
    """Prints the `top` classes of an image by their probabilities [K]."""
    best = np.argsort(-values, kind='stable')[:top]
    rows = [(int(i), classify.class_name(classes, i), float(values[i])) for i in best]
    if flags.FLAGS.json:
        found = [dict(index=i, name=n, probability=p) for i, n, p in rows]
        print(to_json({'image': str(path), 'top': found}), flush=True)
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for _, name, probability in rows:
        table.add_row(f'{probability:7.2%}', printable(name))
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    console.print(printable(path), soft_wrap=True)
    console.print(table)


if __name__ == '__main__':
    flags.DEFINE_string(
        'checkpoint', None, 'What to predict with: a path, an address, a name of the catalogue.',
        required=True,
    )  # fmt: skip
    flags.DEFINE_integer('top', 5, 'Classes to name for each image.', lower_bound=1)
    flags.DEFINE_integer('batch_size', 32, 'Images a step.', lower_bound=1)
    flags.DEFINE_integer(
        'image_size', None, "Pixels a side, if not the checkpoint's own.", lower_bound=1,
        upper_bound=65_536,
    )  # fmt: skip
    flags.DEFINE_string(
        'view', None, 'How an image becomes a square: central (crop, the default) or resize '
        '(squeeze). Of a run: as its first evaluation does.',
    )  # fmt: skip
    flags.DEFINE_bool('ema', True, 'Of a run: the moving average of the parameters, if kept.')
    flags.DEFINE_string('features', None, 'An .npz to write: what the head reads of each image.')
    flags.DEFINE_bool('force', False, 'Replace a file of --features that is there.')
    flags.DEFINE_bool('json', False, 'Print one JSON object an image.')
    cli.run(main)
