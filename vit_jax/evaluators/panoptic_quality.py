"""Panoptic quality (arXiv:1801.00868), by the rules of cocodataset/panopticapi evaluation.py.

Shapes: Q queries, P predicted segments, M true segments, K classes. Tables count the pixels of an
image by true segment, in the last row void ones, and by prediction, in the last column void ones.
"""

from collections.abc import Collection, Sequence

import numpy as np

COUNTS = ('iou', 'tp', 'fp', 'fn')  # rows of tallies: the sum of matches' IoU, and numbers
MEASURES = ('pq', 'sq', 'rq')


def merged(
    table: np.ndarray, won: np.ndarray, areas: np.ndarray, labels: np.ndarray, *,
    stuff: Collection[int], overlap: float,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Makes segments of queries: (table [M + 1, P + 1], labels int [P]).

    A query is dropped if it has too little of its mask. Those of a class of stuff are one segment
    (tue-mps/eomt training/lightning_module.py, to_per_pixel_preds_panoptic).

    Args:
      table: [M + 1, Q + 1], pixels that a query wins and has in its mask.
      won: pixels that a query wins, [Q].
      areas: pixels of its mask, [Q].
      labels: its class, [Q]; -1 of queries that do not count.
      stuff: classes that are stuff.
      overlap: least share of `areas` that `won` must be.
    """
    own, of_stuff, columns, found = table[:, :-1].sum(0), {}, [], []
    for query in np.flatnonzero(labels >= 0):
        if not own[query] or won[query] / areas[query] < overlap:
            continue
        label = int(labels[query])
        if label in of_stuff:
            columns[of_stuff[label]] = columns[of_stuff[label]] + table[:, query]
            continue
        if label in stuff:
            of_stuff[label] = len(columns)
        columns.append(table[:, query])
        found.append(label)
    kept = np.array(columns, np.int64).reshape(-1, len(table)).T
    void = table.sum(1) - kept.sum(1)
    return np.concatenate([kept, void[:, None]], axis=1), np.array(found, np.int64)


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
