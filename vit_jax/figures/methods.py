"""Draws training methods side by side: features and fine-tuning, by what was pre-trained on.

Works on any folder with runs of several objectives, or with runs that start from these.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from vit_jax.data import mixture
from vit_jax.figures import scaling, style

NONE = 'random weights'


class Point(NamedTuple):
    """An accuracy of a pre-trained encoder, or of random weights."""

    measure: str  # a panel: 'probe/accuracy', 'fashion_mnist_debian, fine-tuned'
    method: str  # a row: 'mae'
    images: str  # a colour: the data set of the pre-training; of random weights, the pooling
    value: float


def points(runs: Sequence[tuple[str, dict, dict]]) -> list[Point]:
    """[Point] of finished runs [(workdir, config, result)], as returned by workdir.finished.

    Empty unless runs with a probe have several objectives. A run of one step is random weights.
    """
    probed = {
        path: run for path, *run in runs
        if any(given['type'] == 'probe' for given in run[0]['evals'].values())
    }  # fmt: skip
    if len({name_of(config) for config, _ in probed.values()}) < 2:
        return []
    found = []
    for config, result in probed.values():
        for name, given in config['evals'].items():
            for metric, value in result['metrics'].items():
                if given['type'] == 'probe' and metric in measures(name, given):
                    found.append(Point(metric, *begun(config), value))
    for path, config, result in runs:
        value = scaling.accuracy(config, result)
        if path not in probed and value is not None:
            begin = (config.get('init_from') or '').rstrip('/')
            before = [c for p, (c, _) in probed.items() if begin and f'/{p}'.endswith(f'/{begin}')]
            task = f'{mixture.title(config["data"]["source"])}, fine-tuned'
            if before or not begin:
                found.append(Point(task, *(begun(before[0]) if before else random(config)), value))
    return found


def measures(name: str, given: Mapping) -> list[str]:
    """Metrics of an evaluation of type probe that are drawn."""
    kinds = [] if given.get('l2') is None else ['accuracy']
    return [f'{name}/{kind}' for kind in (*kinds, f'{given["k"][0]}_nn_cosine')]


def begun(config: Mapping) -> tuple[str, str]:
    """(method, data set) of a pre-training; a run of one step has random weights."""
    if config.get('steps') == 1:
        return random(config)
    title = mixture.title(config['data']['source'])
    return name_of(config), title.rstrip('/').rpartition('/')[2]


def random(config: Mapping) -> tuple[str, str]:
    """(NONE, pooling) of a model with random weights."""
    return NONE, config['model'].get('pool') or ''


def name_of(config: Mapping) -> str:
    """The objective's name; without a section, that of labels."""
    return config.get('objective', {}).get('name', 'supervised')


def draw(path: os.PathLike, found: Sequence[Point]) -> None:
    """Draws a panel for each measure, a row for each method, a colour for each data set.

    Each run is a small dot, the mean of several a large one. Random weights are dashed lines, one
    for each pooling.
    """
    panels = list(dict.fromkeys(p.measure for p in found))
    sources = sorted({p.images for p in found if p.method != NONE})
    rows = sorted({p.method for p in found} - {NONE}, key=lambda m: -best(found, panels[-1], m))
    size = (1.2 + 2.6 * len(panels), 1.0 + 0.38 * len(rows))
    figure = Figure(figsize=size, layout='constrained')
    for ax, measure in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels,
                           strict=True):  # fmt: skip
        pools = sorted({p.images for p in found if p[:2] == (measure, NONE)})
        for pool, dashes in zip(pools, itertools.cycle(('--', ':', '-.'))):  # noqa: B905
            mean = np.mean([p.value for p in found if p[:3] == (measure, NONE, pool)])
            label = f'{NONE}, {pool}' if pool else NONE
            ax.axvline(mean, color=style.GREY, lw=1, ls=dashes, label=label)
        for i, source in enumerate(sources):
            mark = dict(color=style.LINES[i], marker=style.MARKERS[i], ls='')
            for y, method in enumerate(rows):
                key = measure, method, source
                values = [p.value for p in found if p[:3] == key]
                height = [y + 0.2 * (i - (len(sources) - 1) / 2)] * len(values)
                ax.plot(values, height, ms=2.5, alpha=0.5, **mark)
                if values:
                    ax.plot(np.mean(values), height[0], ms=6, label=source if y == 0 else None,
                            **mark)  # fmt: skip
        ax.set_title(measure, fontsize=9, loc='left', parse_math=False)
        ax.set_yticks(range(len(rows)), rows)
        ax.grid(color='#E5E5E5', lw=0.6)
        ax.tick_params(labelsize=8)
        ax.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=(1, 2, 5, 10)))
        ax.xaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
        ax.spines[['top', 'right']].set_visible(False)
    figure.axes[0].invert_yaxis()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside upper center', ncols=5, frameon=False, fontsize=8)
    style.save(path, figure)


def best(found: Sequence[Point], measure: str, method: str) -> float:
    """Highest mean over runs of a method, by the data set of the pre-training."""
    values = {}
    for p in found:
        if (p.measure, p.method) == (measure, method):
            values.setdefault(p.images, []).append(p.value)
    return max(map(np.mean, values.values()), default=0.0)
