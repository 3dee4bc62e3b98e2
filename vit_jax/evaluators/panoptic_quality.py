"""Panoptic quality (arXiv:1801.00868), by the rules of cocodataset/panopticapi evaluation.py.

Shapes: Q queries, P predicted segments, M true segments, K classes. Tables count the pixels of an
image by true segment, in the last row void ones, and by prediction, in the last column void ones.
"""

from collections.abc import Collection, Sequence

import numpy as np

from vit_jax.data.segments import VOID

COUNTS = ('iou', 'tp', 'fp', 'fn')  # rows of tallies: the sum of matches' IoU, and numbers
MEASURES = ('pq', 'sq', 'rq')


def segments_of(
    own: np.ndarray, won: np.ndarray, areas: np.ndarray, labels: np.ndarray, *,
    stuff: Collection[int], overlap: float,
) -> list[list[int]]:  # fmt: skip
    """The queries of each segment.

    A query is dropped if it has too little of its mask. Those of a class of stuff are one segment
    (tue-mps/eomt training/lightning_module.py, to_per_pixel_preds_panoptic).

    Args:
      own: pixels that a query wins and has in its mask, [Q].
      won: pixels that it wins, [Q].
      areas: pixels of its mask, [Q].
      labels: its class, [Q]; -1 of queries that do not count.
      stuff: classes that are stuff.
      overlap: least share of `areas` that `won` must be.
    """
    found, of_stuff = [], {}
    for query in np.flatnonzero(labels >= 0).tolist():
        if not own[query] or won[query] / areas[query] < overlap:
            continue
        label = int(labels[query])
        if label in of_stuff:
            of_stuff[label].append(query)
            continue
        found.append([query])
        if label in stuff:
            of_stuff[label] = found[-1]
    return found


def numbers_of(
    segments: Sequence[Sequence[int]], labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and classes of what `segments_of` makes of queries of these classes.

    Returns:
      (number of each query's segment uint16 [Q + 1], classes of the segments int [P]). The number
      is VOID where there is none, and last, for pixels of no query.
    """
    number = np.full(len(labels) + 1, VOID, np.uint16)
    for k, queries in enumerate(segments):
        number[queries] = k
    return number, np.array([labels[queries[0]] for queries in segments], np.int64)


def merged(
    table: np.ndarray, won: np.ndarray, areas: np.ndarray, labels: np.ndarray, *,
    stuff: Collection[int], overlap: float,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Makes segments of queries: (table [M + 1, P + 1], labels int [P]).

    `table` [M + 1, Q + 1] counts pixels that a query wins and has in its mask; other arguments are
    those of `segments_of`.
    """
    own = table[:, :-1].sum(0)
    found = segments_of(own, won, areas, labels, stuff=stuff, overlap=overlap)
    kept = np.array([table[:, queries].sum(1) for queries in found], np.int64)
    kept = kept.reshape(-1, len(table)).T
    void = table.sum(1) - kept.sum(1)
    return np.concatenate([kept, void[:, None]], axis=1), numbers_of(found, labels)[1]


def tally(
    table: np.ndarray, labels: np.ndarray, crowd: np.ndarray, found: np.ndarray, classes: int
) -> np.ndarray:
    """Counts matches of an image by class: float64 [4, K], see COUNTS.

    Segments of the same class match where their IoU is above 0.5, without the predicted pixels that
    are void; so none has two matches. A prediction that has none is not counted if more than half
    of it is void, or in the crowd of its class (of several, the last one).

    Args:
      table: [M + 1, P + 1].
      labels: classes of the true segments, [M].
      crowd: bool [M], which ones are crowds.
      found: classes of the predicted segments, [P].
      classes: number of classes K.
    """
    common, void = table[:-1, :-1], table[-1, :-1]
    true_areas, areas = table[:-1].sum(1), table[:, :-1].sum(0)
    union = true_areas[:, None] + areas - common - void
    iou = np.divide(common, union, out=np.zeros(common.shape), where=union > 0)
    match = (iou > 0.5) & (labels[:, None] == found) & ~crowd[:, None]
    made, (rows, columns) = np.zeros((len(COUNTS), classes)), np.nonzero(match)
    np.add.at(made[0], found[columns], iou[rows, columns])
    np.add.at(made[1], found[columns], 1)
    np.add.at(made[3], labels[~match.any(1) & ~crowd], 1)
    crowd_of = {int(labels[k]): k for k in np.flatnonzero(crowd)}
    for k in np.flatnonzero(~match.any(0)):
        among = crowd_of.get(int(found[k]))
        ignored = void[k] + (0 if among is None else common[among, k])
        made[2, found[k]] += ignored / areas[k] <= 0.5
    return made


def qualities(tallies: np.ndarray) -> np.ndarray:
    """The measures of each class, [3, K], of tallies [4, K]; NaN of a class that occurs nowhere."""
    iou, tp, fp, fn = tallies
    count = tp + (fp + fn) / 2
    pq, rq = (np.divide(x, count, out=np.full(len(x), np.nan), where=count > 0) for x in (iou, tp))
    sq = np.where(count > 0, np.divide(iou, tp, out=np.zeros(len(tp)), where=tp > 0), np.nan)
    return np.stack([pq, sq, rq])


def summary(tallies: np.ndarray, stuff: Collection[int]) -> dict[str, float]:
    """Means over classes that occur, of all, things and stuff; without those that have none."""
    each, is_stuff = qualities(tallies), np.isin(np.arange(tallies.shape[1]), list(stuff))
    every, made = np.ones(len(is_stuff), bool), {}
    for end, among in (('', every), ('_things', ~is_stuff), ('_stuff', is_stuff)):
        own = each[:, among & ~np.isnan(each[0])]
        if own.size:
            means = zip(MEASURES, own.mean(1).tolist(), strict=True)
            made |= {f'{name}{end}': value for name, value in means}
    return made


def by_class(tallies: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """{'pq/CLASS': ..., 'sq/CLASS': ..., 'rq/CLASS': ...} of the classes that occur."""
    return {
        f'{measure}/{name}': float(x)
        for measure, own in zip(MEASURES, qualities(tallies), strict=True)
        for name, x in zip(classes, own, strict=True) if not np.isnan(x)
    }  # fmt: skip
