"""Parts of a page (see `page`) about any model: filters, positions and attention over images.

Shapes: L layers, B images, H heads, T tokens, K classes.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vit_jax import models
from vit_jax.convert.fit import Loaded
from vit_jax.data import files, tasks
from vit_jax.errors import UserError
from vit_jax.evaluators import classify
from vit_jax.figures import anatomy, page, plates
from vit_jax.io.progress import Bar
from vit_jax.io.text import flop, printable
from vit_jax.objectives import losses

TOP = 5  # classes listed per image


def class_attention(
    attention: np.ndarray | jax.Array, grid: tuple[int, int], registers: int = 0
) -> np.ndarray:
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


def attention_over(model: nn.Module, params: Any, images: np.ndarray) -> np.ndarray | None:
    """class_attention [B, h, w] over images uint8 [B, H, W, 3]; None without a class token."""
    prefix = getattr(model, 'prefix', {})
    if 'cls' not in prefix:
        return None
    compute, grid = intermediates_of(model), model.grid(images.shape[1:])
    registers = sum(prefix.values()) - 1
    return np.concatenate([
        class_attention(compute(params, image[None])['attention'], grid, registers)
        for image in images
    ])  # fmt: skip


def intermediates_of(model: nn.Module) -> Callable[[Any, np.ndarray], dict[str, jax.Array]]:
    """Makes a jitted function (params, images uint8 [B, H, W, 3]) -> {name: intermediate}.

    The intermediates are `logits` and, if the model has it, `attention` [L, B, H, T, T].
    """

    @jax.jit
    def compute(params, images):
        capture = dict(capture=('attention',)) if hasattr(model, 'num_heads') else {}
        _, out = model.apply({'params': params}, model.normalise(images), **capture)
        return {name: out[name] for name in ('attention', 'logits') if name in out}

    return compute


def of_model(found: Loaded, out: os.PathLike) -> Iterator[page.Part]:
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


def of_fields(found: Loaded, name: str) -> page.Part:
    """The part of the page with the fields of a model."""
    count = sum(x.size for x in jax.tree.leaves(found.params))
    flops = flop(found.model.flops((*size_of(found), len(found.model.mean))))
    fields = models.describe(found.model) | {'name': name}
    return 'Model', f'{count:,} parameters, {flops} an image.', [
        ('field', 'value'), *((k, page.format_value(v)) for k, v in fields.items())]


def size_of(found: Loaded) -> tuple[int, int]:
    """(height, width) of a model's input images."""
    return found.image_size or (files.DEFAULT_SIZE,) * 2


def choose(paths: Sequence[str], most: int) -> list[str]:
    """At most `most` of the paths, evenly spaced."""
    places = np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int)
    return [paths[i] for i in places]


class ImageResults:
    """Predictions and attention of a model over image files, one at a time to save memory."""

    def __init__(self, found: Loaded, paths: Sequence[str | os.PathLike]) -> None:
        self.found, self.paths, self.failed = found, [], 0
        self.images, self.logits, self.distances, self.rollouts, self.heads = [], [], [], [], []
        compute, view = intermediates_of(found.model), tasks.fixed_view(found.view, size_of(found))
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
                    self.add(compute(found.params, image[None]))
                bar.add(1)

    def add(self, intermediates: Mapping[str, jax.Array]) -> None:
        """Reduces the intermediates of an image to what is drawn."""
        if 'logits' in intermediates:
            self.logits.append(intermediates['logits'])
        if 'attention' not in intermediates:
            return
        model = self.found.model
        attention, grid = np.asarray(intermediates['attention']), model.grid(size_of(self.found))
        self.distances.append(anatomy.attention_distance(attention, grid, model.stride))
        if 'cls' in model.prefix:
            self.rollouts.append(anatomy.rollout(attention, grid))
            self.heads.append(anatomy.head_maps(attention, grid))

    def parts(self, out: os.PathLike) -> Iterator[page.Part]:
        """Draws the attention; yields the parts of a page."""
        if self.logits:
            count = min(TOP, self.found.model.num_classes)
            note = f'The {count} most likely classes of each image.'
            if self.found.loss == 'sigmoid':
                note += ' Probabilities are of a sigmoid per class and do not sum to 1.'
            yield 'Predictions', note, [
                ('image', 'class', 'probability'), *self.most_likely(count)]
        if self.distances:
            plates.distances(out / 'distance.png', np.mean(self.distances, axis=0))
            yield 'Attention distance', 'A point for each head (figure 7, right).', (
                out / 'distance.png')
        if self.rollouts:
            plates.rollouts(out / 'rollout.png', self.images, np.concatenate(self.rollouts))
            note = 'How much of each patch reaches the class token (figure 6).'
            yield 'Attention rollout', note, out / 'rollout.png'
            plates.heads(out / 'heads.png', self.images, np.concatenate(self.heads))
            yield 'Attention of the class token', 'In the last layer, by head.', out / 'heads.png'

    def most_likely(self, count: int) -> Iterator[tuple[str, str, str]]:
        """Yields rows (image, class, probability) of the `count` most likely classes."""
        logits = np.concatenate(self.logits)
        probabilities = np.asarray(losses.probabilities(logits, self.found.loss))
        for path, row in zip(self.paths, probabilities, strict=True):
            for i in np.argsort(-row, kind='stable')[:count]:
                name = classify.class_name(self.found.classes, int(i))
                yield os.path.basename(str(path)), name, f'{row[i]:.2%}'
