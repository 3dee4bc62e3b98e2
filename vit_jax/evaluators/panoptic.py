"""Panoptic segmentation: the quality of segments, things and stuff alike.

Shapes: B batch, Q queries, K classes, M true segments, h w of predicted masks, Y X of the canvas, R
rows of a block.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import evaluators
from vit_jax.data import label_maps
from vit_jax.data.readers import names
from vit_jax.data.segments import Fields, Zero
from vit_jax.data.sources import Source
from vit_jax.data.tasks import size_of
from vit_jax.data.tasks.panoptic import whole_segments
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.evaluators import Subject, panoptic_quality
from vit_jax.evaluators.pixels import axes_of, in_blocks
from vit_jax.io.bounds import NonNegative, Positive, Prefetch, Rate, Share, Size, Threads, Workers

METRICS = {
    f'{name}{end}': 'max' for end in ('', '_things', '_stuff') for name in panoptic_quality.MEASURES
}


class Panoptic:
    """Measures a mask classifier by panoptic quality (arXiv:1801.00868), at the size of the images.

    Queries become segments as of EoMT (arXiv:2503.19108): those count whose best class is one, with
    a probability above `threshold`. Each pixel goes to the query with the largest probability of
    class times mask, and is void where the mask's is below 0.5. A query that wins less than
    `overlap` of its own mask is dropped; those of a class of stuff are one segment. Masks are
    interpolated to the view, then to the image.

    Segments are matched as by cocodataset/panopticapi: of the same class, above an intersection
    over union of 0.5, void pixels left out. Unmatched predictions of which more than half is void
    or in a crowd of their class do not count. Areas are counted in the maps.

    - pq: panoptic quality, mean over the classes that occur in labels or predictions
    - sq: segmentation quality, the mean intersection over union of matches
    - rq: recognition quality, the F1 score
    - pq_things, pq_stuff, ...: of classes that are things, or stuff
    - pq/CLASS, sq/CLASS, rq/CLASS: of each class, with `by_class`

    Args:
      source: the data set, see Data sets.
      image_size: size of the images in pixels: one number, or (height, width).
      batch_size: examples in a batch, over all devices and processes.
      canvas: size of the largest image of the data set in pixels; segments are padded to it.
      view: 'fit' pads images at their aspect ratio, 'resize' stretches them; see Views.
      stuff: names of the classes that are no things. None: those of the data set, as COCO's json
        has them, and the background.
      threshold: probability of its class above which a query counts.
      overlap: least share of its own mask that a query must win.
      most_segments: segments that an image may have.
      segments, labels, crowd, ids, zero, ignored: as in the task `panoptic`.
      by_class: whether to measure each class.
      threads, workers, prefetch, tolerance: as in the section `data`.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        source: dict,
        image_size: Size,
        batch_size: Positive[int],
        canvas: Size,
        view: str | dict = 'fit',
        stuff: tuple[str, ...] | None = None,
        threshold: Share = 0.8,
        overlap: Share = 0.8,
        most_segments: Positive[int] = 100,
        segments: str = 'segments',
        labels: str = 'labels',
        crowd: str | None = 'crowd',
        ids: str | None = 'ids',
        zero: Zero = 'void',
        ignored: tuple[NonNegative[int], ...] = (),
        by_class: bool = False,
        threads: Threads | None = None,
        workers: Workers = 0,
        prefetch: Prefetch = 8,
        tolerance: Rate = 0.0,
    ) -> None:
        self.mesh, self.each, self.overlap = subject.mesh, by_class, overlap
        read = evaluators.reader(
            self.mesh, batch_size, threads=threads, workers=workers, prefetch=prefetch,
            tolerance=tolerance,
        )  # fmt: skip
        if not {'logits', 'masks'} <= subject.outputs.keys():
            raise UserError(
                'evals of type panoptic read `logits` and `masks`, as the objective masks predicts '
                f'them; this one predicts {", ".join(sorted(subject.outputs))}'
            )
        count = subject.outputs['logits'].shape[2] - 1
        # the background that `zero` adds is no class of the data set
        first = int(zero == 'background')
        opened = evaluators.open_source(subject, source, count, first)
        self.source, self.classes = opened.source, opened.classes
        self.sources = {'source': self.source}
        self.stuff = stuff_of(stuff, opened.own, self.classes, first)
        task = whole_segments(
            self.source, view=view, image_size=image_size, canvas=canvas, most=most_segments,
            fields=Fields(segments, labels, crowd, ids, zero, tuple(ignored)),
            classes=self.classes[first:],
        )  # fmt: skip
        self.feed = partial(read, self.source, task)
        self.metrics = METRICS | {
            f'{measure}/{name}': 'max'
            for measure in panoptic_quality.MEASURES
            for name in (self.classes if by_class else ())
        }
        step = partial(
            tables, predict=subject.predict, threshold=threshold, canvas=size_of(canvas)
        )
        self.step = evaluators.compiled(step, self.mesh)
        self.maps = evaluators.compiled(partial(step, maps=True), self.mesh)

    def __call__(
        self,
        params: Any,
        stop: Stop | None = None,
        set_phase: Callable[[str], None] = lambda phase: None,
        advance: Callable[[int], None] = lambda images: None,
    ) -> dict[str, float] | None:
        """Measures {metric: value}; returns None if `stop` becomes true.

        Calls `set_phase` and `advance` as `evaluators.results` does.
        """
        stop = Stop() if stop is None else stop
        total, examples = np.zeros((len(panoptic_quality.COUNTS), len(self.classes))), 0
        for batch in evaluators.results(
            self.step, self.feed, params, self.mesh, stop, set_phase, advance
        ):
            for i in np.flatnonzero(batch['mask'] > 0):
                total += self.tally({name: value[i] for name, value in batch.items()})
                examples += 1
        if stop:
            return None
        found = panoptic_quality.summary(total, self.stuff)
        if not found:
            raise UserError('evals: no image of the data set has a segment that is no crowd')
        if self.each:
            found |= panoptic_quality.by_class(total, self.classes)
        return found | {'examples': examples}

    def numbers(self, one: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(numbers of segments uint16 [Y, X], classes [N]) found in an image, of what `maps` makes.

        Pixels in none have the number VOID.
        """
        found, own = one['found'], one['table'][:, :-1].sum(0)
        segments = panoptic_quality.segments_of(
            own, one['won'], one['areas'], found, stuff=self.stuff, overlap=self.overlap
        )
        number, classes = panoptic_quality.numbers_of(segments, found)
        return number[one['winner']], classes

    def tally(self, one: Mapping[str, np.ndarray]) -> np.ndarray:
        """Tallies of an image, of what `tables` makes of it."""
        table, found = panoptic_quality.merged(
            one['table'], one['won'], one['areas'], one['found'], stuff=self.stuff,
            overlap=self.overlap,
        )  # fmt: skip
        true = np.flatnonzero(one['labels'] >= 0)
        table = table[np.append(true, len(table) - 1)]
        return panoptic_quality.tally(
            table, one['labels'][true], one['crowd'][true], found, len(self.classes)
        )


panoptic = Panoptic  # by its name in a config


def stuff_of(
    given: tuple[str, ...] | None, own: Source | None, classes: tuple[str, ...], first: int,
    setting: str = 'evals.stuff',
) -> frozenset[int]:  # fmt: skip
    """Numbers of the classes that are stuff; the first ones, `first` of them, are in any case.

    Args:
      given: their names. None: those of the data set.
      own: the data set.
      classes: names of all classes.
      setting: what gave the names, for messages.
    """
    stuff = own.stuff if given is None else given
    by_number = given is None and own.labels == 'by_number'
    places = names.match(stuff, (*classes[:first], *own.classes) if by_number else classes)
    if None in places:
        raise UserError(f'{setting}: there is no class {stuff[places.index(None)]!r}')
    return frozenset([*range(first), *places])


def tables(
    params: Any, batch: Mapping[str, jax.Array], *, predict: Callable, threshold: float,
    canvas: tuple[int, int], maps: bool = False,
) -> dict[str, jax.Array]:  # fmt: skip
    """Counts pixels by true segment and query: what `panoptic_quality.merged` takes, for a batch.

    `table` int32 [B, M + 1, Q + 1], `won` and `areas` int32 [B, Q], `found` int32 [B, Q], the
    queries' classes; and of the batch `labels`, `crowd`, `mask`.

    Args:
      params: parameters of the objective.
      batch: as `tasks.panoptic.whole_segments` makes it.
      predict: (params, batch) -> {'logits': [B, Q, K + 1], 'masks': logits [B, Q, h, w]}.
      threshold: probability of its class above which a query counts.
      canvas: (Y, X).
      maps: whether to return the query that has each pixel, Q for none, as `winner` int16
        [B, Y, X], and of the batch `segments` and `id`.
    """
    out = predict(params, batch)
    shares = jax.nn.softmax(out['logits'].astype(jnp.float32))
    scores, found = shares.max(-1), shares.argmax(-1)  # [B, Q]
    counts = (found < shares.shape[2] - 1) & (scores > threshold)
    masks, (b, q) = out['masks'].astype(jnp.float32), scores.shape
    m, void = batch['labels'].shape[1], label_maps.ignored(batch['segments'].dtype)
    axes = axes_of(masks, batch, canvas)
    count = jax.vmap(lambda counts, *at: counts.at[at].add(1, mode='drop'))
    blocks = (
        in_blocks(axes.rows, 0.0), in_blocks(axes.in_rows[..., None], False),
        in_blocks(batch['segments'], void),
    )  # fmt: skip

    def add(total, block):
        own, valid, true = block  # [B, R, h], [B, R, 1], [B, R, X]
        values = jax.nn.sigmoid(axes.values(masks, own))  # [B, Q, R, X]
        inside = valid & axes.in_columns[:, None]
        weighted = jnp.where(counts[..., None, None], scores[..., None, None] * values, -1)
        winner = jnp.where(counts.any(1)[:, None, None], weighted.argmax(1), q)  # [B, R, X]
        in_mask = (values >= 0.5) & inside[:, None]
        mine = jnp.take_along_axis(in_mask, jnp.minimum(winner, q - 1)[:, None], axis=1)[:, 0]
        # pixels outside of the image are counted nowhere
        rows = jnp.where(inside, jnp.minimum(true.astype(jnp.int32), m), m + 1)
        winner_in_mask = jnp.where(mine, winner, q)
        return {
            'table': count(total['table'], rows, winner_in_mask),
            'won': count(total['won'], jnp.where(inside, winner, q)),
            'areas': total['areas'] + in_mask.sum((2, 3), dtype=jnp.int32),
        }, winner_in_mask.astype(jnp.int16) if maps else None

    zero = partial(jnp.zeros, dtype=jnp.int32)
    total, each = jax.lax.scan(
        add, {'table': zero((b, m + 1, q + 1)), 'won': zero((b, q)), 'areas': zero((b, q))}, blocks
    )
    true = {name: batch[name] for name in ('labels', 'crowd', 'mask')}
    if maps:
        each = jnp.moveaxis(each, 0, 1).reshape(b, -1, canvas[1])[:, : canvas[0]]
        true |= {'winner': each, 'segments': batch['segments'], 'id': batch['id']}
    return total | true | {'found': jnp.where(counts, found, -1)}
