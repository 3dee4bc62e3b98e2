"""What a checkpoint makes of images: python -m vit_jax.predict is the command."""

import collections
import concurrent.futures
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.assembly import restore
from vit_jax.convert import load as weights
from vit_jax.convert import stages
from vit_jax.data import files
from vit_jax.errors import UserError
from vit_jax.io import atomic, storage
from vit_jax.io.text import printable
from vit_jax.models import interface
from vit_jax.models.mae import Mae
from vit_jax.objectives import losses

Output = Literal['classes', 'features', 'all']


def read_ahead(
    paths: Sequence[str], view: Callable, count: int
) -> Iterator[tuple[str, Any]]:
    """Yields (path, what `view` makes of it) in order, `count` of them read ahead by threads.

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
    how = dict(image_size=image_size, ema=ema, as_input=True, **fields)
    found = weights.read(checkpoint, whole=output == 'all', **how)
    if isinstance(found.model, Mae):  # whose output takes noise, too
        found = weights.read(checkpoint, **how)
    model = found.model
    interface.check_reads_images(model)
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
    predictor: Predictor, images: Iterator[tuple[Hashable, Any]], batch_size: int
) -> Iterator[tuple[Hashable, Any]]:
    """Yields (path, the path's rows of what is predicted), or (path, UserError).

    All batches have one size, so that `compute` is compiled once. Floats are float32.

    Args:
      predictor: the checkpoint.
      images: pairs of `read_ahead`, uint8 [H, W, 3]; in place of a path may be anything.
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


def write_arrays(path: str, rows: Sequence[tuple[str, dict[str, np.ndarray]]]) -> None:
    """Writes [(file name, {name: array})] as an .npz in one step: complete, or as it was.

    Its arrays are those of all rows, stacked, and `files`, the file names.
    """
    files, outputs = zip(*rows, strict=True)
    arrays = {name: np.stack([one[name] for one in outputs]) for name in outputs[0]}
    with storage.writing(path), atomic.replace_file(path) as part, part.open('wb') as file:
        np.savez(file, files=np.array(list(map(str, files))), **arrays)
    print(f'Written: {printable(path)}: {", ".join(arrays)} of {len(rows):,} images')
