"""Pictures of a run or a checkpoint: python -m vit_jax.figures X [--images FILE,...] [--out DIR].

Of a run's workdir: DIR/summary.png (DIR: the workdir) from the newest checkpoint: curves of loss
and accuracy, images of the first evaluation with what the model says of them, attention of the
class token. With --images, or of any other checkpoint that vit_jax.load takes, what
arXiv:2010.11929 has in figures 6, 7 and 14: filters.png, positions.png and, over the images,
distance.png, rollout.png and heads.png.
"""

from functools import partial

import jax
import numpy as np
from absl import flags

from vit_jax import (
    anatomy,
    assembly,
    checkpoint,
    cli,
    optim,
    plates,
    report,
    storage,
    summary,
    workdir,
)  # fmt: skip
from vit_jax import config as configs
from vit_jax.convert import load as weights
from vit_jax.convert import run
from vit_jax.data import files, mixture, pipeline
from vit_jax.errors import UserError

ATTENDED = 4  # images


def class_attention(attention, grid, registers=0):
    """What the class token of the last block attends to, mean over heads, among patches alone.

    attention [L, B, H, T, T] of tokens (class, registers, patches by rows), grid (h, w) ->
    float32 [B, h, w], of sum 1 over the patches.
    """
    h, w = grid
    last = np.asarray(attention[-1], np.float32)
    if last.shape[-1] != 1 + registers + h * w:
        raise ValueError(
            f'attention over {last.shape[-1]} tokens is not that of a class token, {registers} '
            f'registers and {h} x {w} patches'
        )
    patches = last[:, :, 0, 1 + registers :].mean(axis=1)  # [B, H, T, T] -> [B, N]
    total = patches.sum(axis=-1, keepdims=True)
    # In low precision all patches can round to 0, when the class token sees itself alone.
    patches = patches / np.maximum(total, np.finfo(np.float32).tiny)
    return patches.reshape(-1, h, w)


class Images:
    """Examples of a data set as the model sees them, each read when it is asked for."""

    def __init__(self, source, ids, view, image_size):
        self.ids = ids
        self.read = partial(
            pipeline.example, source=source, view=pipeline.make_view(view, image_size),
            image_size=image_size,
        )  # fmt: skip

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return self.read(int(self.ids[i]), np.random.default_rng(0))['image']


def draw_summary(path, out):
    """Writes the picture of the run in `path`, from its newest checkpoint, to the file `out`."""
    settings = workdir.read_json(path / 'config.json')
    if settings is None:
        raise UserError(f'{path} is no workdir of a run: it has no config.json')
    config = configs.complete(settings)
    parts = assembly.make(config)
    classifying = {n: e for n, e in parts.evals.items() if config.evals[n].type == 'classify'}
    if not classifying:
        raise UserError(f'{path}: its config has no evals, so there are no predictions to draw')
    try:
        state = checkpoint.newest(path, parts.abstract)
    except checkpoint.Damaged as e:
        raise UserError(f'the newest checkpoint of {path} is damaged: {e}') from e
    if state is None:
        raise UserError(f'{path} has no checkpoint yet')
    params = optim.averaged(state)
    name, evaluation = next(iter(classifying.items()))
    found = evaluation.predictions(params)
    found['label'] = summary.one_label(found['label'], found['prediction'])
    images = Images(
        evaluation.source, found['id'], config.evals[name].view, config.evals[name].image_size
    )
    order = summary.mistakes_first(found['label'], found['prediction'], found['confidence'])
    attended = np.stack([images[i] for i in order[:ATTENDED]])
    if not storage.remote(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    summary.draw(
        out,
        title=f'{config.model.name} on {mixture.title(config.data.source)}, '
        f'step {int(state.step):,}',
        lines=report.read_lines(path), images=images, labels=found['label'],
        predictions=found['prediction'], confidences=found['confidence'],
        classes=evaluation.source.classes, attended=attended,
        attention=attention_over(parts.model, params, attended),
    )  # fmt: skip


def attention_over(model, params, images):
    """class_attention [B, h, w] over images uint8 [B, H, W, 3]; None without a class token."""
    prefix = getattr(model, 'prefix', {})
    if 'cls' not in prefix:
        return None
    grid = model.grid(images.shape[1:])
    return class_attention(captured(model, params, images), grid, sum(prefix.values()) - 1)


def captured(model, params, images):
    """Attention probabilities [L, B, H, T, T] over images uint8 [B, H, W, 3]."""

    @jax.jit
    def probabilities(params, images):
        variables = {'params': params}
        _, out = model.apply(variables, model.normalise(images), capture=('attention',))
        return out['attention']

    return probabilities(params, images)


def draw_anatomy(address, paths, out, image_size=None):
    """Writes what can be drawn of a checkpoint's model and images; yields each file."""
    found = weights.read(address, image_size=image_size, ema=None)
    model, params = found.model, found.params
    if 'embedding' not in params:
        raise UserError(f'{address} is a {type(model).__name__}, which has no patches to draw')
    kernel = np.asarray(params['embedding']['kernel'])
    if kernel.shape[2] in (1, 3):
        yield out / 'filters.png'
        plates.filters(out / 'filters.png', *anatomy.filter_components(kernel))
    size = found.image_size or (files.DEFAULT_SIZE,) * 2
    grid = model.grid(size)
    if 'posemb' in params:
        yield out / 'positions.png'
        table = np.asarray(params['posemb'])
        plates.positions(out / 'positions.png', anatomy.position_similarity(table, grid))
    if not paths:
        return
    view = pipeline.make_view(found.view, size)
    images = np.stack([files.pixels(path, view) for path in paths])
    attention = captured(model, params, images)
    yield out / 'distance.png'
    distance = anatomy.attention_distance(attention, grid, model.stride)
    plates.distances(out / 'distance.png', distance)
    if 'cls' not in model.prefix:
        return
    yield out / 'rollout.png'
    plates.rollouts(out / 'rollout.png', images, anatomy.rollout(attention, grid))
    yield out / 'heads.png'
    plates.heads(out / 'heads.png', images, anatomy.head_maps(attention, grid))


def main(argv):
    if len(argv) != 2:
        raise UserError('usage: python -m vit_jax.figures X [--images FILE,...] [--out DIR]')
    options = flags.FLAGS
    is_run = run.is_run(argv[1])
    if not is_run and not options.out:
        raise UserError(f'{argv[1]} is no workdir of a run; give --out, a folder for the pictures')
    out = workdir.located(options.out or argv[1])
    if not storage.remote(out):
        out.mkdir(parents=True, exist_ok=True)
    if is_run and not options.images:
        draw_summary(workdir.located(argv[1]), out / 'summary.png')
        print(f'Picture: {out / "summary.png"}')
        return
    paths = files.found(options.images)
    for path in draw_anatomy(argv[1], paths, out, options.image_size):
        print(f'Picture: {path}', flush=True)


if __name__ == '__main__':
    flags.DEFINE_string('out', None, 'Folder for the pictures; the workdir if not given.')
    flags.DEFINE_list('images', [], 'Images or folders of them, for pictures of attention.')
    flags.DEFINE_integer('image_size', None, "Pixels a side, if not the checkpoint's own.")
    cli.run(main)
