"""Scores of classes at the pixels of images, of views or of windows that slide over them.

Shapes: B batch, N windows, S scales, K classes, Q queries, h w of the logits, H W of a window, Y X
of the label maps, R rows of a block.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.evaluators.pixels import in_blocks, weights, weights_inside
from vit_jax.models.memory import shard_batch

MOST_BYTES = 2**34  # of maps of windows on a device
interpolated = partial(jnp.einsum, precision='highest')


def count_classes(outputs: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Number of classes K by the shapes of outputs; raises UserError if they are no label map."""
    if 'semantic' in outputs:
        return outputs['semantic'].shape[1]
    if {'logits', 'masks'} <= outputs.keys():
        return outputs['logits'].shape[2] - 1
    raise UserError(
        'evals of type segment read `semantic`, or `logits` and `masks`, as the objectives segment '
        f'and masks predict them; this one predicts {", ".join(sorted(outputs))}'
    )


def check_windows(
    outputs: Mapping[str, jax.ShapeDtypeStruct], counts: tuple[int, ...], flip: bool, examples: int
) -> None:
    """Raises UserError if the maps of all windows of `examples` images are above MOST_BYTES.

    They are on a device at once; `counts` and `flip` are those of `predictions`.
    """
    maps = outputs['semantic' if 'semantic' in outputs else 'masks']
    needed = 4 * examples * sum(counts) * (1 + flip) * math.prod(maps.shape[1:])
    if needed > MOST_BYTES:
        mirrored = ', mirrored ones too,' if flip else ''
        raise UserError(
            f'evals: {sum(counts):,} windows of an image{mirrored} have maps of '
            f'{needed / 2**30:.0f} GiB on a device with {examples} images of a batch, above '
            f'{MOST_BYTES / 2**30:.0f}; a larger stride, fewer scales or a smaller batch have fewer'
        )


class Group(NamedTuple):
    """Predictions for the windows of each image at one scale.

    Attributes:
      maps: logits of classes, [B, N, K, h, w], or of masks, [B, N, Q, h, w].
      shares: probabilities of classes of each mask, [B, N, Q, K]; None of logits of classes.
      place: [B, N, 2, 2], as `tasks.place_of` for each window.
      size: (H, W).
      count: int32 [B], the windows of each image.
    """

    maps: jax.Array
    shares: jax.Array | None
    place: jax.Array
    size: tuple[int, int]
    count: jax.Array

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return self.maps.shape[2] if self.shares is None else self.shares.shape[3]

    def weights(self, pixels: int, axis: int) -> jax.Array:
        """Weights of cells in pixels along an axis, [B, N, pixels, cells]; 0 outside of a window.

        A single window shows all pixels.
        """
        function = weights if self.maps.shape[1] == 1 else weights_inside
        along = jax.vmap(partial(function, pixels, self.maps.shape[3 + axis], self.size[axis]))
        return along(self.place[:, :, axis])

    def blocks(self, pixels: int) -> jax.Array:
        """`weights` of `pixels` rows in blocks, [Y / R, B, N, R, h]."""
        rows = self.weights(pixels, 0)
        found = in_blocks(rows.reshape(-1, *rows.shape[2:]), 0.0)
        return found.reshape(len(found), *rows.shape[:2], *found.shape[2:])

    def scores(self, rows: jax.Array, columns: jax.Array) -> jax.Array:
        """Means over windows at the pixels of a block, [B, K, R, X].

        Args:
          rows: a block of `blocks`, [B, N, R, h].
          columns: `weights` of columns, [B, N, X, w].
        """

        def of_window(i):
            part = interpolated('byh,bkhw->bkyw', rows[:, i], self.maps[:, i])
            found = interpolated('bkyw,bxw->bkyx', part, columns[:, i])
            if self.shares is not None:
                found = interpolated('bqk,bqyx->bkyx', self.shares[:, i], jax.nn.sigmoid(found))
            return found

        if self.maps.shape[1] == 1:
            return of_window(0)

        def add(i, sums):
            total, count = sums
            inside = rows[:, i].sum(-1)[:, :, None] * columns[:, i].sum(-1)[:, None] > 0.5
            inside = (inside & (i < self.count)[:, None, None])[:, None]  # [B, 1, R, X]
            return total + jnp.where(inside, of_window(i), 0), count + inside

        b, _, r, _ = rows.shape
        x = columns.shape[2]
        start = jnp.zeros((b, self.classes, r, x)), jnp.zeros((b, 1, r, x), jnp.int32)
        total, count = jax.lax.fori_loop(0, jnp.max(self.count), add, start)
        return total / jnp.maximum(count, 1)


def sum_of_scores(
    groups: list[Group], rows: list[jax.Array], columns: list[jax.Array]
) -> jax.Array:
    """Sum of the groups' scores at the pixels of a block, [B, K, R, X].

    These are logits of one group, else probabilities.
    """
    total = 0.0
    for group, own, across in zip(groups, rows, columns, strict=True):
        found = group.scores(own, across)
        if len(groups) > 1 and group.shares is None:
            found = jax.nn.softmax(found, axis=1)
        total += found
    return total


def predictions(
    params: Any, batch: Mapping[str, jax.Array], predict: Callable, counts: tuple[int, ...],
    flip: bool,
) -> list[Group]:  # fmt: skip
    """Predicts the windows of each image: a Group for each scale, and one mirrored with `flip`.

    Args:
      params: parameters of the objective.
      batch: `image` [B, H, W, 3] and `place` [B, 2, 2], or `image` [B, N, H, W, 3], `place`
        [B, N, 2, 2] and `windows` int32 [B, S], see `tasks.segment.whole_label_map`.
      predict: (params, batch) -> {'semantic': [B, K, h, w]}, or {'logits': [B, Q, K + 1], 'masks':
        [B, Q, h, w]}.
      counts: most windows of each scale.
      flip: whether windows are also predicted mirrored; their maps are mirrored back.
    """
    images, place = batch['image'], batch['place']
    if 'windows' in batch:
        number = batch['windows']
    else:
        images, place, number = images[:, None], place[:, None], jnp.ones((len(images), 1), int)
    first, groups = 0, []
    for s, most in enumerate(counts):
        part = slice(first, first + most)
        for mirrored in (False, True)[: 1 + flip]:
            one = partial(window_of, params, batch, predict, images[:, part], mirrored)
            maps, shares = of_windows(one, most, jnp.max(number[:, s]))
            groups.append(Group(maps, shares, place[:, part], images.shape[2:4], number[:, s]))
        first += most
    return groups


def window_of(
    params: Any, batch: Mapping[str, jax.Array], predict: Callable, images: jax.Array,
    mirrored: bool, i: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """Maps and shares, as in `Group`, of window i of `images` [B, N, H, W, 3]."""
    x = images[:, i]
    found = predict(params, {**batch, 'image': x[:, :, ::-1] if mirrored else x})
    count_classes(found)
    maps = found['semantic' if 'semantic' in found else 'masks'].astype(jnp.float32)
    maps = maps[..., ::-1] if mirrored else maps
    if 'semantic' in found:
        return maps, None
    return maps, jax.nn.softmax(found['logits'].astype(jnp.float32))[..., :-1]


def of_windows(one: Callable, most: int, count: jax.Array) -> Any:
    """Stacks one(i) of `count` windows along axis 1, where there is room for `most`."""
    if most == 1:
        return jax.tree.map(lambda x: x[:, None], one(0))

    def room(x):
        return shard_batch(jnp.zeros((x.shape[0], most, *x.shape[1:]), x.dtype))

    def put(i, found):
        return jax.tree.map(lambda kept, x: kept.at[:, i].set(x), found, one(i))

    start = jax.tree.map(room, jax.eval_shape(one, 0))
    return jax.lax.fori_loop(0, count, put, start)
