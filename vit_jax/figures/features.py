"""Principal components of a ViT's patches beside label maps of the same images.

Shapes: B images, h w grid of patches, D width, Y X of an image.
"""

from collections.abc import Iterator

import jax
import numpy as np
from etils import epath

from vit_jax import assembly
from vit_jax import config as configs
from vit_jax.convert.fit import Loaded
from vit_jax.data import images, mixture, sources, tasks
from vit_jax.data.overlays import BACKGROUND
from vit_jax.data.tasks.segment import read_both
from vit_jax.errors import UserError
from vit_jax.figures import anatomy, model_page, overlaid, page
from vit_jax.io import experiment
from vit_jax.models.vit import Vit
from vit_jax.run import workdir

SHOWN = 6  # images
LEAST = 400  # pixels of the longer side of a picture, at least
VIEW = 'fit'


def data_set_of(
    checkpoint: str, run: epath.Path | None, masks: str | None
) -> tuple[sources.Source, tasks.Task] | None:
    """A data set with label maps and its task, None if there is none.

    It is that of the first evaluation of label maps, else of training.

    Args:
      checkpoint: its address, for an experiment that names no model.
      run: the workdir of a run.
      masks: an experiment, in place of the run's config.
    """
    if masks is None and run is None:
        return None
    if masks is None:
        config = configs.complete(workdir.read_json(run / 'config.json'))
    else:
        named = experiment.read(masks).get('model', {}).get('name')
        config = configs.load(masks, [] if named else [('init_from', checkpoint)])
    if config.data.task != 'segment':
        if masks is None:
            return None
        raise UserError(f'--masks={masks}: data.task is {config.data.task}, not segment')
    measured = [x.source for x in config.evals.values() if x.type == 'segment']
    source = mixture.load(**(measured or [config.data.source])[0])
    return source, assembly.task_of(config, source)


def parts(
    found: Loaded, source: sources.Source, task: tasks.Task, out: epath.Path
) -> Iterator[page.Part]:
    """Draws images of a data set, their label maps and patches; yields the part of a page.

    Args:
      found: a checkpoint of a ViT, whose head is not used.
      source: the data set.
      task: what it is, by `tasks.segment`.
      out: folder of the picture.
    """
    if not isinstance(found.model, Vit):
        raise UserError(f'features of patches are those of a ViT, not of a {found.source} model')
    size, names, how = model_page.size_of(found), task.names['classes'], task.read.keywords
    view, ids = tasks.whole_view(VIEW, size), np.linspace(0, len(source) - 1, SHOWN)
    ids = np.unique(ids.round().astype(int)).tolist()
    pairs = [read_both(source.records[i], how['mask'], how['ids']) for i in ids]
    geometries = [view.place(labels.shape, None) for _, labels in pairs]
    seen = [place.image(image) for place, (image, _) in zip(geometries, pairs, strict=True)]
    features = patches_of(found, np.stack(seen))
    grid, shapes = features.shape[1:3], [labels.shape for _, labels in pairs]
    cells = [cells_of(tasks.place_of(g, shape), size, shape, grid)
             for g, shape in zip(geometries, shapes, strict=True)]  # fmt: skip
    kept = np.zeros(features.shape[:3], bool)
    for mask, (rows, columns) in zip(kept, cells, strict=True):
        mask[rows[:, None], columns] = True  # patches of padding have no image in them
    colours, shares = anatomy.patch_components(features, kept)
    lines, drawn = [], set()
    for (image, labels), (rows, columns), patches in zip(pairs, cells, colours, strict=True):
        example = {'image': images.whole(image), 'label_map': labels}
        made = np.uint8(255 * patches[rows[:, None], columns])
        alone, over, map_ = (
            overlaid.drawn(x, names, LEAST) for x in (
                {'image': example['image'], **overlaid.NOTHING}, example,
                {'image': made, **overlaid.NOTHING},
            )
        )  # fmt: skip
        lines.append([(alone, ()), (over, ()), (map_, ())])
        drawn |= set(np.unique(labels).tolist())
    entries = {k: name for k, name in enumerate(names) if k in drawn and name != BACKGROUND}
    captions = [source.name(i) for i in ids]
    overlaid.sheet(
        out / 'features.png', lines, ('', 'label map', 'components of patches'), captions, entries
    )
    yield 'Features of patches', (
        'Red, green and blue are the first three principal components of the patches of all '
        f'images, {shares.sum():.0%} of their variance (arXiv:2304.07193 figure 1).'
    ), out / 'features.png'


def patches_of(found: Loaded, batch: np.ndarray) -> np.ndarray:
    """Patches after the last norm [B, h, w, D] of images uint8 [B, H, W, 3], one at a time."""
    model = found.model.clone(pool='none', cls_token='cls' in found.model.prefix, num_classes=None)

    @jax.jit
    def compute(params, image):
        return model.apply({'params': params}, model.normalise(image))[1]['encoded']

    rows = [np.asarray(compute(found.params, image[None]), np.float32) for image in batch]
    return np.concatenate(rows).reshape(len(batch), *model.grid(batch.shape[1:]), -1)


def cells_of(
    place: np.ndarray, size: tuple[int, int], shape: tuple[int, int], grid: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The row and the column of the patch under each row and column of an image's pixels.

    Args:
      place: where the image is in its view, see `tasks.place_of`.
      size: that of the view, in pixels.
      shape: (Y, X) of the image.
      grid: (h, w).
    """
    found = []
    for (scale, offset), pixels, length, count in zip(place, size, shape, grid, strict=True):
        at = scale * (np.arange(length) + 0.5) + offset
        found.append(np.clip(at * count / pixels, 0, count - 1).astype(int))
    return tuple(found)
