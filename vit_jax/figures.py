"""Pictures of a run: python -m vit_jax.figures WORKDIR [--out DIR].

Draws DIR/summary.png (DIR: the workdir) from the newest checkpoint: curves of loss and accuracy,
images of the first evaluation with what the model says of them, attention of the class token.
"""

from functools import partial

import jax
import numpy as np
from absl import flags

from vit_jax import assembly, checkpoint, cli, optim, report, storage, summary, workdir
from vit_jax import config as configs
from vit_jax.data import mixture, pipeline
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

    @jax.jit
    def probabilities(params, images):
        variables = {'params': params}
        _, out = model.apply(variables, model.normalise(images), capture=('attention',))
        return out['attention']

    return class_attention(probabilities(params, images), grid, sum(prefix.values()) - 1)


def main(argv):
    if len(argv) != 2:
        raise UserError('usage: python -m vit_jax.figures WORKDIR [--out DIR]')
    path = workdir.located(argv[1])
    out = workdir.located(OUT.value or argv[1])
    draw_summary(path, out / 'summary.png')
    print(f'Picture: {out / "summary.png"}')


if __name__ == '__main__':
    OUT = flags.DEFINE_string('out', None, 'Folder for the pictures; the workdir if not given.')
    cli.run(main)
