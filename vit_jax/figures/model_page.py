"""Parts of a page (see `page`) about any model: filters, positions and attention over images.

Shapes: L layers, B images, H heads, T tokens, K classes.
"""

import os
import sys

import jax
import numpy as np

from vit_jax import models
from vit_jax.data import files, tasks
from vit_jax.errors import UserError
from vit_jax.evaluators import classify
from vit_jax.figures import anatomy, page, plates
from vit_jax.io.progress import Bar
from vit_jax.io.text import flop, printable
from vit_jax.objectives import losses

TOP = 5  # classes listed per image


def class_attention(attention, grid, registers=0):
    """Attention of the class token to the patches in the last block, averaged over heads.

    Args:
      attention: [L, B, H, T, T] over tokens (class, registers, patches by rows).
      grid: (h, w) of the patches.
      registers: number of register tokens.

    Returns:
      float32 [B, h, w], normalized to sum to 1 over the patches.
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
    # In low precision all patches can round to 0, if the class token attends to itself alone.
    patches = patches / np.maximum(total, np.finfo(np.float32).tiny)
    return patches.reshape(-1, h, w)


def attention_over(model, params, images):
    """class_attention [B, h, w] over images uint8 [B, H, W, 3]; None without a class token."""
    prefix = getattr(model, 'prefix', {})
    if 'cls' not in prefix:
        return None
    see, grid = seeing(model), model.grid(images.shape[1:])
    registers = sum(prefix.values()) - 1
    maps = [class_attention(see(params, x[None])['attention'], grid, registers) for x in images]
    return np.concatenate(maps)


def seeing(model):
    """Makes a function (params, images uint8 [B, H, W, 3]) -> {name: intermediate}.

    The intermediates are `logits` and, if the model has it, `attention` [L, B, H, T, T].
    """

    @jax.jit
    def see(params, images):
        capture = dict(capture=('attention',)) if hasattr(model, 'num_heads') else {}
        _, out = model.apply({'params': params}, model.normalise(images), **capture)
        return {name: out[name] for name in ('attention', 'logits') if name in out}

    return see


def of_model(found, out):
    """Draws filters and position embeddings of a model; yields the parts of its page."""
    size, params = size_of(found), found.params
    kernel = np.asarray(params['embedding']['kernel']) if 'embedding' in params else None
    if kernel is not None and kernel.shape[2] in (1, 3):
        plates.filters(out / 'filters.png', *anatomy.filter_components(kernel))
        yield 'Patch filters', 'Principal components (arXiv:2010.11929 figure 7, left).', (
            out / 'filters.png')
    if 'posemb' in params:
        table = np.asarray(params['posemb'])
        similarity = anatomy.position_similarity(table, found.model.grid(size))
        plates.positions(out / 'positions.png', similarity)
        yield 'Position embeddings', 'Similarity of each to all others (figure 7, middle).', (
            out / 'positions.png')


def of_fields(found, name):
    """The part of the page with the fields of a model."""
    count = sum(x.size for x in jax.tree.leaves(found.params))
    flops = flop(found.model.flops((*size_of(found), len(found.model.mean))))
    fields = models.describe(found.model) | {'name': name}
    return 'Model', f'{count:,} parameters, {flops} an image.', [
        ('field', 'value'), *((k, page.said(v)) for k, v in fields.items())]


def size_of(found):
    """(height, width) of a model's input images."""
    return found.image_size or (files.DEFAULT_SIZE,) * 2


def chosen(paths, most):
    """At most `most` of the paths, evenly spaced."""
    places = np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int)
    return [paths[i] for i in places]


class Looks:
    """Predictions and attention of a model over image files, one at a time to save memory."""

    def __init__(self, found, paths):
        self.found, self.paths, self.failed = found, [], 0
        self.images, self.logits, self.distances, self.rollouts, self.heads = [], [], [], [], []
        see, view = seeing(found.model), tasks.fixed_view(found.view, size_of(found))
        with Bar('images', len(paths)) as bar:
            for path in paths:
                try:
                    image = files.pixels(path, view)
                except UserError as e:
                    print(f'skipped: {printable(e)}', file=sys.stderr)
                    self.failed += 1
                else:
                    self.paths.append(path)
                    self.images.append(image)
                    self.add(see(found.params, image[None]))
                bar.add(1)

    def add(self, looks):
        """Reduces the intermediates of an image to what is drawn."""
        if 'logits' in looks:
            self.logits.append(looks['logits'])
        if 'attention' not in looks:
            return
        model = self.found.model
        attention, grid = looks['attention'], model.grid(size_of(self.found))
        self.distances.append(anatomy.attention_distance(attention, grid, model.stride))
        if 'cls' in model.prefix:
            self.rollouts.append(anatomy.rollout(attention, grid))
            self.heads.append(anatomy.head_maps(attention, grid))

    def parts(self, out):
        """Draws the attention; yields the parts of a page."""
        if self.logits:
            count = min(TOP, self.found.model.num_classes)
            note = f'The {count} most likely classes of each image.'
            if self.found.loss == 'sigmoid':
                note += ' Each has a probability of its own, of a sigmoid.'
            yield 'What the model says', note, [
                ('image', 'class', 'probability'), *self.most_likely(count)]
        if self.distances:
            plates.distances(out / 'distance.png', np.mean(self.distances, axis=0))
            yield 'Attention distance', 'A point for each head (figure 7, right).', (
                out / 'distance.png')
        if self.rollouts:
            plates.rollouts(out / 'rollout.png', self.images, np.concatenate(self.rollouts))
            yield 'Attention rollout', 'What of an image reaches the class token (figure 6).', (
                out / 'rollout.png')
            plates.heads(out / 'heads.png', self.images, np.concatenate(self.heads))
            yield 'Attention of the class token', 'In the last layer, by head.', out / 'heads.png'

    def most_likely(self, count):
        """Yields rows (image, class, probability) of the `count` most likely classes."""
        shares = np.asarray(losses.probabilities(np.concatenate(self.logits), self.found.loss))
        for path, row in zip(self.paths, shares, strict=True):
            for i in np.argsort(-row, kind='stable')[:count]:
                name = classify.class_name(self.found.classes, int(i))
                yield os.path.basename(str(path)), name, f'{row[i]:.2%}'
