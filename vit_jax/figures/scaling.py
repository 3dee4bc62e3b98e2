"""Draws transfer accuracy against the size and compute of pre-training (arXiv:2010.11929 fig. 3-5).

Works on any folder with runs that start from others in it. Runs from random weights are drawn for
comparison, and few-shot results of the pre-training runs.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_jax.data import mixture
from vit_jax.figures import style
from vit_jax.io.text import flop
from vit_jax.run import heading

FAMILIES = ('ViT', 'hybrid', 'ResNet', 'Mixer')
UNITS = (('exa', 1), ('peta', 1e-3), ('tera', 1e-6), ('giga', 1e-9))  # in exaFLOP


class Point(NamedTuple):
    """A measurement of a model, pre-trained or from random weights."""

    task: str  # 'digits, fine-tuned'
    model: str  # 'ViT, 7.5 MFLOP'
    family: str  # one of FAMILIES
    images: int  # in the pre-training's data set; 0: from random weights
    exaflops: float  # of the pre-training
    value: float


def family_of(model: Mapping) -> str:
    """The family of a config's section `model`."""
    if model['name'].startswith('bit'):
        return 'ResNet'
    if model['name'].startswith('mixer'):
        return 'Mixer'
    return 'ViT' if model.get('resnet') is None else 'hybrid'


def label_of(config: Mapping, result: Mapping) -> str:
    """Label of a model in a picture: its published name, else its family and compute."""
    name = heading.model_name(config)
    if '-' in name or config['model']['name'] is None:
        return name
    return f'{family_of(config["model"])}, {flop(result["flops_per_image"])}'


def points(runs: Sequence[tuple[str, dict, dict]]) -> list[Point]:
    """[Point] of finished runs [(workdir, config, result)], as returned by workdir.finished."""
    sizes, before, begun = {}, {}, {}
    for path, config, _ in runs:
        begin = (config.get('init_from') or '').rstrip('/')
        found = [run for run in runs if begin and f'/{run[0]}'.endswith(f'/{begin}')]
        if found:
            before[path] = found[0]
            begun[same_model(found[0][1])] = found[0]
    tasks = {mixture.title(config['data']['source']) for path, config, _ in runs if path in before}
    points = []

    def add(task, upstream, value, images=None, exaflops=None):
        _, config, result = upstream
        images = images_of(config, sizes) if images is None else images
        exaflops = result['costs']['exaflops'] if exaflops is None else exaflops
        family = family_of(config['model'])
        points.append(Point(task, label_of(config, result), family, images, exaflops, value))

    for path, config, result in runs:
        task, value = mixture.title(config['data']['source']), accuracy(config, result)
        if path in before:
            if value is not None:
                add(f'{task}, fine-tuned', before[path], value)
        elif task in tasks and same_model(config) in begun and not config.get('init_from'):
            if value is not None:  # labelled as the pre-trained model, whose head may be larger
                add(f'{task}, fine-tuned', begun[same_model(config)], value, 0, 0.0)
        else:
            for name, few in result['metrics'].items():
                data, _, shots = name.rpartition('/')
                if shots.endswith('_shot'):
                    count = shots.removesuffix('_shot')
                    add(f'{data}, {count} shots of each class', (path, config, result), few)
    return points


def same_model(config: Mapping) -> str:
    """Key that is equal for runs of the same model, whatever their number of classes."""
    return str(sorted((k, v) for k, v in config['model'].items() if k != 'num_classes'))


def accuracy(config: Mapping, result: Mapping) -> float | None:
    """Accuracy in the run's first evaluation of type classify; None without one."""
    names = (name for name, given in config['evals'].items() if given['type'] == 'classify')
    values = (result['metrics'].get(f'{name}/accuracy') for name in names)
    return next((value for value in values if value is not None), None)


def images_of(config: Mapping, counts: dict[str, int]) -> int:
    """Number of images that a run was trained on; `counts` caches it by data set."""
    source = config['data']['source']
    key = str(source)
    if key not in counts:
        counts[key] = len(mixture.load(**source))
    return counts[key]


def draw_images(path: os.PathLike, found: Sequence[Point]) -> bool:
    """Draws accuracy against images of the pre-training: a line per model, a panel per task.

    Draws only models that were pre-trained on several numbers of images; returns False if none was.
    """
    trained = {}
    for p in found:
        trained.setdefault(p.model, set()).add(p.images)
    chosen = [p for p in found if len(trained[p.model] - {0}) > 1]
    sizes = sorted({p.images for p in chosen})
    places = {size: i for i, size in enumerate(sizes)}  # evenly spaced, as 0 has no logarithm
    if not chosen:
        return False

    def panel(ax, of_task):
        for model in dict.fromkeys(p.model for p in of_task):
            line = curve((places[p.images], p.value) for p in of_task if p.model == model)
            family = next(p.family for p in of_task if p.model == model)
            ax.plot(*line, lw=1.3, ms=5, label=model, **family_style(family))
        ax.set_xticks(range(len(sizes)), [f'{s:,}' if s else 'none' for s in sizes])
        ax.set_xlim(-0.2, len(sizes) - 0.8)

    panels(path, chosen, panel, 'images of the pre-training')
    return True


def draw_compute(path: os.PathLike, found: Sequence[Point]) -> None:
    """Draws accuracy against compute of the pre-training on the most images, a point per model."""
    most = max(p.images for p in found)
    chosen = [p for p in found if p.images == most]
    low, high = (f(p.exaflops for p in chosen) for f in (min, max))
    unit, scale = next((u, s) for u, s in UNITS if high >= s or u == UNITS[-1][0])
    ticks = [float(f'{t:.2g}') for t in np.geomspace(low / scale, high / scale, 4)]

    def panel(ax, of_task):
        for family in FAMILIES:
            line = curve((p.exaflops / scale, p.value) for p in of_task if p.family == family)
            if line[0]:
                ax.plot(*line, ls=':', lw=0.8, ms=5, label=family, **family_style(family))
        ax.set_xscale('log')
        ax.xaxis.set_minor_locator(ticker.NullLocator())
        ax.set_xticks(ticks, [f'{t:g}' for t in ticks])
        ax.set_xlim(low / scale / 1.1, 1.1 * high / scale)

    panels(path, chosen, panel, f'compute of the pre-training on {most:,} images, {unit}FLOP')


def curve(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """(xs, ys) of points (x, y), sorted; points with equal x, such as seeds, are averaged."""
    values = {}
    for x, y in points:
        values.setdefault(x, []).append(y)
    return sorted(values), [float(np.mean(values[x])) for x in sorted(values)]


def family_style(family: str) -> dict[str, str]:
    """Colour and marker of a family, distinct in print and to colour-blind readers."""
    i = FAMILIES.index(family)
    return dict(color=style.LINES[i], marker=style.MARKERS[i])


def panels(
    path: os.PathLike,
    found: Sequence[Point],
    panel: Callable[[Axes, list[Point]], None],
    xlabel: str,
) -> None:
    """Writes a PNG with a panel for each task, drawn by `panel(axes, points)`."""
    tasks = list(dict.fromkeys(p.task for p in found))
    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.4 * columns, 0.5 + 2.9 * rows), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(tasks) :]:
        ax.set_axis_off()
    for ax, task in zip(axes, tasks, strict=False):
        panel(ax, [p for p in found if p.task == task])
        ax.set_title(task, fontsize=9, loc='left', parse_math=False)
        ax.grid(color='#E5E5E5', lw=0.6)
        ax.tick_params(labelsize=8)
        ax.yaxis.set_major_formatter(ticker.PercentFormatter(1))
        ax.spines[['top', 'right']].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside upper center', ncols=4, frameon=False, fontsize=8)
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel('accuracy', fontsize=9)
    style.save(path, figure)
