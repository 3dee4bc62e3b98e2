"""Predicts from images: python -m vit_jax.predict --checkpoint X IMAGE...

X is anything that vit_jax.load takes. Images are files, folders of them, or their addresses. Prints
the most likely classes of each image and their probabilities (of a softmax, or of a sigmoid where
the model was trained with one), by name where names are known. --json prints one JSON object per
image, with names exactly as they are. An image that can't be read is reported on stderr and
skipped; the exit status is then 2.

--features FILE.npz writes, instead of classes, the input of the head for each image, even if the
checkpoint has no head: `features` float32 [images, D] and `files`, their names.

--out FILE.npz writes, instead of classes, all named arrays that the checkpoint predicts: of a run,
what its objective's `predict` returns (docs/extending.md); of any other checkpoint, the model's
intermediates (pre_logits, logits, tokens, ...). `files` are the names of the images.

--hide 0.75, for a masked autoencoder with its decoder, hides a share of the patches (--seed says
which) and draws a row for each image: the image, what the model sees of it, and what it restores.
--out FILE.png names the picture, restored.png by default. A model of normalised patches does not
predict their mean and deviation, which are guessed from the visible patches.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from vit_jax import cli
from vit_jax.assembly import restore
from vit_jax.convert import load as weights
from vit_jax.convert import stages
from vit_jax.data import files, tasks
from vit_jax.errors import UserError
from vit_jax.evaluators import classify
from vit_jax.figures import restored
from vit_jax.io import atomic, storage
from vit_jax.io.progress import Bar
from vit_jax.io.text import printable, to_json
from vit_jax.models import interface
from vit_jax.objectives import losses

Output = Literal['classes', 'features', 'all']


def read_ahead(
    paths: Sequence[str], view: Callable, count: int
) -> Iterator[tuple[str, Any]]:
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


class Predictor(NamedTuple):
    """What a checkpoint makes of images.

    Attributes:
      compute: (params, images uint8 [B, H, W, C]) -> an array or {name: array}, all [B, ...].
      params: parameters.
      image_size: (height, width) of the images.
      view: how a file becomes such an image, as `tasks.make_view` takes it.
      classes: names by label; None if unknown.
    """

    compute: Callable[[Any, jax.Array], Any]
    params: Any
    image_size: tuple[int, int]
    view: str | dict
    classes: Sequence[str] | None = None


def classifier(
    checkpoint: str, output: Output, ema: bool | None = None, image_size: int | None = None,
    patch_size: int | None = None,
) -> Predictor:  # fmt: skip
    """Loads a checkpoint as a model of the package.

    Args:
      checkpoint: as for vit_jax.load.
      output: what to predict: 'classes' (probabilities [B, K]), 'features' ({'features': the input
        of the head [B, D]}) or 'all' (all intermediates by name).
      ema: whether to read the moving average of a run's parameters. None: if the run saved one.
      image_size: pixels per side. None: that of the checkpoint.
      patch_size: side to which the kernel of a ViT's patches is resized, in pixels. None: its own.
    """
    fields = {} if patch_size is None else {'patch_size': patch_size}
    found = weights.read(checkpoint, image_size=image_size, ema=ema, as_input=True, **fields)
    model = found.model
    if model.num_classes is None and output == 'classes':
        raise UserError(f'{checkpoint} has no head, so it knows no classes')
    interface.check_output(model)

    def compute(params, images):
        logits, out = model.apply({'params': params}, model.normalise(images))
        if output == 'classes':
            return losses.probabilities(logits, found.loss)
        return out if output == 'all' else {'features': out['pre_logits']}

    size = found.image_size or (files.DEFAULT_SIZE,) * 2
    return Predictor(compute, found.params, size, found.view, found.classes)


def method(
    checkpoint: str, output: Output, ema: bool | None = None, image_size: int | None = None
) -> Predictor | None:
    """Restores a run of another objective than `supervised`; None for any other checkpoint.

    It predicts what the objective's `predict` returns, for the output 'all'. For other outputs, a
    run whose parameters are those of a model of the package counts as any other checkpoint.
    """
    config = restore.config_of_method(checkpoint, with_model=output == 'all')
    if config is None:
        return None
    objective = config.objective.name
    if output != 'all':
        raise UserError(
            f'objective {objective} has a network of its own, which need not predict {output}; '
            '--out=FILE.npz writes what it predicts'
        )
    parts, params = restore.parts_and_params(checkpoint, config, ema, jax.devices()[:1])
    compute, size = restore.predict_images(config, parts), parts.inputs['image'].shape[:2]
    if image_size and (image_size,) * 2 != size:
        raise UserError(
            f'--image_size is {image_size}, but objective {objective} takes images of {size[0]} x '
            f'{size[1]} pixels alone'
        )
    return Predictor(compute, params, size, stages.view_of(config.to_dict()) or 'central')


def predicted(
    predictor: Predictor, images: Iterator[tuple[str, Any]], batch_size: int
) -> Iterator[tuple[str, Any]]:
    """Yields (path, the path's rows of what is predicted), or (path, UserError).

    All batches have one size, so that `compute` is compiled once. Floats are float32.

    Args:
      predictor: the checkpoint.
      images: pairs of `read_ahead`.
      batch_size: images in a batch.
    """

    @jax.jit
    def compute(params, batch):
        outputs = predictor.compute(params, batch)
        return jax.tree.map(
            lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, outputs
        )

    while group := list(itertools.islice(images, batch_size)):
        yield from (pair for pair in group if isinstance(pair[1], UserError))
        pairs = [pair for pair in group if not isinstance(pair[1], UserError)]
        if not pairs:
            continue
        paths, batch = zip(*pairs, strict=True)
        batch += batch[-1:] * (batch_size - len(batch))
        outputs = jax.device_get(compute(predictor.params, np.stack(batch)))
        for i, path in enumerate(paths):
            yield path, jax.tree.map(lambda x, i=i: x[i], outputs)


def main(argv: Sequence[str]) -> None:
    options = flags.FLAGS
    if not argv[1:]:
        raise UserError('no image is named; give paths of images or folders')
    if options.features and options.out:
        raise UserError('--features and --out are both given; --out writes pre_logits, too')
    if options.hide is not None:
        if options.features or options.json:
            raise UserError('--hide draws a picture; leave out --features and --json')
        out = options.out or 'restored.png'
        check_output('out', out, '.png')
        written = restored.write(
            pathlib.Path(out).absolute(), options.checkpoint, files.find_images(argv[1:]),
            hide=options.hide, seed=options.seed, image_size=options.image_size, view=options.view,
            ema=None if options.ema else False,
        )  # fmt: skip
        print(f'Written: {printable(out)}: {written}')
        return
    out = options.features or options.out
    if out:
        check_output('features' if options.features else 'out', out)
    paths = files.find_images(argv[1:])
    output = 'features' if options.features else 'all' if options.out else 'classes'
    arguments = (options.checkpoint, output, None if options.ema else False, options.image_size)
    predictor = method(*arguments) or classifier(*arguments, options.patch_size)
    view = tasks.fixed_view(
        predictor.view if options.view is None else options.view, predictor.image_size
    )
    batch_size = min(options.batch_size, len(paths))
    images = read_ahead(paths, view, 2 * batch_size)
    failed, rows = 0, []
    with progress(len(paths)) as advance:
        for path, outputs in predicted(predictor, images, batch_size):
            if isinstance(outputs, UserError):
                if len(paths) == 1:
                    raise outputs
                print(f'skipped: {printable(outputs)}', file=sys.stderr)
                failed += 1
            elif out:
                rows.append((path, outputs))
            else:
                show(path, outputs, predictor.classes, options.top)
            advance(1)
    if rows:
        write_arrays(out, rows)
    if failed:
        raise UserError(f'{failed:,} of {len(paths):,} images cannot be read')


def check_output(flag: str, path: str, suffix: str = '.npz') -> None:
    """Raises UserError if the file that a flag names can't be written, before any computation."""
    if not path.endswith(suffix) or '://' in path:
        raise UserError(f'--{flag}={path}: name a local file that ends in {suffix}')
    path = pathlib.Path(path).absolute()
    storage.check_free(path, flags.FLAGS.force)
    storage.prepare_file(path)


def write_arrays(path: str, rows: Sequence[tuple[str, dict[str, np.ndarray]]]) -> None:
    """Writes [(file name, {name: array})] as an .npz in one step: complete, or as it was.

    Its arrays are those of all rows, stacked, and `files`, the file names.
    """
    files, outputs = zip(*rows, strict=True)
    arrays = {name: np.stack([one[name] for one in outputs]) for name in outputs[0]}
    with storage.writing(path), atomic.replace_file(path) as part, part.open('wb') as file:
        np.savez(file, files=np.array(list(map(str, files))), **arrays)
    print(f'Written: {printable(path)}: {", ".join(arrays)} of {len(rows):,} images')


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """Yields `advance(count)`; shows a bar if stderr is a terminal and stdout is not."""
    if total == 1 or sys.stdout.isatty() or not sys.stderr.isatty():
        yield lambda count: None
        return
    with Bar('images', total) as bar:
        yield bar.add


def show(
    path: str, probabilities: np.ndarray, classes: Sequence[str] | None, top: int
) -> None:
    """Prints the `top` classes of an image by their probabilities [K]."""
    best = np.argsort(-probabilities, kind='stable')[:top]
    rows = [(int(i), classify.class_name(classes, i), float(probabilities[i])) for i in best]
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
        'checkpoint', None, 'Checkpoint to predict with: a path, an address or a catalogue name.',
        required=True,
    )  # fmt: skip
    flags.DEFINE_integer('top', 5, 'Number of classes to print for each image.', lower_bound=1)
    flags.DEFINE_integer('batch_size', 32, 'Number of images in a batch.', lower_bound=1)
    flags.DEFINE_integer(
        'image_size', None, "Image size in pixels. Default: the checkpoint's.", lower_bound=1,
        upper_bound=65_536,
    )  # fmt: skip
    flags.DEFINE_integer(
        'patch_size', None, "Resize the kernel of a ViT's patches to this side, in pixels.",
        lower_bound=1, upper_bound=65_536,
    )  # fmt: skip
    flags.DEFINE_string(
        'view', None, 'How to make an image square: central (crop) or resize (squeeze). Default: '
        "that of a run's first evaluation or of the checkpoint's documents, else central.",
    )  # fmt: skip
    flags.DEFINE_bool(
        'ema', True, "Predict with the moving average of a run's parameters if it was saved."
    )
    flags.DEFINE_string('features', None, 'Write the input of the head to this .npz file.')
    flags.DEFINE_string(
        'out', None, 'Write all arrays that are predicted to this .npz file, or the picture of '
        '--hide to this .png file.',
    )  # fmt: skip
    flags.DEFINE_float(
        'hide', None, 'Hide this share of the patches and draw what a masked autoencoder restores.',
        lower_bound=0, upper_bound=1,
    )  # fmt: skip
    flags.DEFINE_integer('seed', 0, 'Decides which patches --hide hides.', lower_bound=0)
    flags.DEFINE_bool('force', False, 'Replace the file of --features or --out if it exists.')
    flags.DEFINE_bool('json', False, 'Print one JSON object per image.')
    cli.run(main)
