"""Draws the effect of augmentation and regularization, as arXiv:2106.10270 figure 4 does.

Works on any folder with runs that differ in data.augment and objective.mixup or in model.dropout
and model.drop_path, and in nothing else but the seed and the weight decay.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_jax.data import distort, mixture
from vit_jax.figures import scaling, style

VARIED = (  # settings of a grid; seeds are averaged, of decays the best is drawn
    'data.augment', 'objective.mixup', 'model.dropout', 'model.drop_path', 'optim.weight_decay',
    'seed', 'expected', 'select',
)  # fmt: skip
COLORS = 'PuOr_r'  # below and above the corner, distinct to colour-blind readers


class Panel(NamedTuple):
    """Accuracy of the runs of one model on one data set."""

    title: str  # model and data
    seen: int  # images, in training
    augmentations: tuple[str, ...]  # columns, from weak to strong
    rates: tuple[str, ...]  # rows, from low to high
    values: np.ndarray  # [rows, columns]; NaN where there is no run

    @property
    def gains(self) -> np.ndarray:
        """Gains [rows, columns] in points over the weakest augmentation at the lowest rate."""
        return 100 * (self.values - self.values[0, 0])

    @property
    def regularized(self) -> float:
        """Gain in points of the best run above the lowest rate over the best one at it."""
        best = [np.nanmax(row) if not np.isnan(row).all() else np.nan for row in self.gains]
        return float(np.nanmax(best[1:]) - best[0]) if len(best) > 1 else math.nan


def augmentation_of(config: Mapping) -> tuple[tuple, str]:
    """(strength, name) of a run's augmentation; strengths sort from weak to strong and differ."""
    operations = [dict(one) for one in config['data'].get('augment') or ()]
    mixup = config.get('objective', {}).get('mixup') or 0.0
    magnitude = max((x.get('magnitude') or 0 for x in operations), default=0)
    strength = bool(operations), magnitude, mixup, json.dumps(operations, sort_keys=True)
    for name, preset in distort.AUGREG.items():
        if (operations, mixup) == ([dict(x) for x in preset['augment']], preset['mixup']):
            return strength, name
    words = [f'{x["name"].split("_")[0]} {x.get("magnitude", "")}'.strip() for x in operations]
    return strength, '\n'.join([*words, f'mixup {mixup:g}'])


def rate_of(config: Mapping) -> str:
    """Rates of dropout and stochastic depth; one where they are equal."""
    rates = [config['model'].get(key) or 0.0 for key in ('dropout', 'drop_path')]
    return ', '.join(f'{rate:g}' for rate in dict.fromkeys(rates))


def rest_of(config: Mapping) -> str:
    """Key that is equal for runs of one grid."""
    kept = {}
    for section, given in config.items():
        if isinstance(given, Mapping):
            given = {k: v for k, v in given.items() if f'{section}.{k}' not in VARIED}
        if section not in VARIED:
            kept[section] = given
    return json.dumps(kept, sort_keys=True, default=str)


def panels(runs: Sequence[tuple[str, dict, dict]]) -> list[Panel]:
    """Panels of finished runs [(workdir, config, result)], as returned by workdir.finished.

    A grid has a panel if it has several augmentations or rates.
    """
    grids = {}
    for _, config, result in runs:
        value = scaling.accuracy(config, result)
        if value is not None and config['model']['name'] is not None:
            cells = grids.setdefault(rest_of(config), (config, result, {}))[-1]
            decay = config.get('optim', {}).get('weight_decay')
            seeds = cells.setdefault((augmentation_of(config), rate_of(config)), {})
            seeds.setdefault(decay, []).append(value)
    found = []
    for config, result, cells in grids.values():
        columns = sorted({augmentation for augmentation, _ in cells})
        rows = sorted({rate for _, rate in cells})
        if len(cells) > 1:
            values = np.array([
                [max(map(np.mean, cells.get((c, r), {}).values()), default=np.nan) for c in columns]
                for r in rows
            ])  # fmt: skip
            source = config['data']['source']
            split = '' if 'mixture' in source else f' {source["split"]}'
            found.append(Panel(
                f'{scaling.label_of(config, result)}, {mixture.title(source)}{split}',
                result['examples_seen'],
                tuple(name for _, name in columns), tuple(rows), values,
            ))  # fmt: skip
    return found


def draw(path: os.PathLike, found: Sequence[Panel]) -> None:
    """Draws a panel for each grid: accuracy in percent, coloured by the gain over the corner.

    The corner is the weakest augmentation at the lowest rate. The column beside the grid is the
    gain of the best run with regularization over the best one without.
    """
    top = max(1.0, *(float(np.nanmax(np.abs(p.gains), initial=0.0)) for p in found))
    width = max(len(p.augmentations) for p in found)
    figure = Figure(figsize=(2.2 + 0.95 * width, 0.4 + 1.9 * len(found)), layout='constrained')
    axes = figure.subplots(len(found), 2, squeeze=False, width_ratios=(width, 1))
    for (left, right), panel in zip(axes, found, strict=True):
        title = style.shorten(panel.title, 0.95 * width + 1, 8)
        left.set_title(f'{title}\n{panel.seen:,} images seen', fontsize=8, loc='left')
        texts = [
            ['' if np.isnan(v) else f'{100 * v:.1f}\n{g:+.1f}' for v, g in zip(*row, strict=True)]
            for row in zip(panel.values, panel.gains, strict=True)
        ]
        cells(left, panel.gains, texts, top)
        left.set_xticks(range(len(panel.augmentations)), panel.augmentations)
        left.set_yticks(range(len(panel.rates)), panel.rates)
        if math.isfinite(panel.regularized):
            cells(right, np.array([[panel.regularized]]), [[f'{panel.regularized:+.1f}']], top)
            right.set_xticks([0], ['best with -\nbest without'])
            right.set_yticks([])
        else:
            right.set_axis_off()
    figure.supylabel('dropout and stochastic depth', fontsize=8)
    style.save(path, figure)


def cells(ax: Axes, values: np.ndarray, texts: Sequence[Sequence[str]], top: float) -> None:
    """Draws values of -top to top as coloured cells with texts."""
    drawn = ax.imshow(values, cmap=COLORS, vmin=-top, vmax=top, aspect='auto')
    for i, j in np.ndindex(*values.shape):
        dark = np.dot(drawn.to_rgba(values[i, j])[:3], (0.299, 0.587, 0.114)) < 0.5
        color = 'white' if dark else 'black'
        ax.text(j, i, texts[i][j], ha='center', va='center', fontsize=8, color=color)
    ax.tick_params(labelsize=7, length=0)
    ax.spines[:].set_visible(False)
