"""Compares two runs: python -m vit_jax.compare A B [--metric loss] [--out FILE.png].

A and B are workdirs, or files in the format of metrics.jsonl, such as a stored reference curve.
Prints the step at which they first differ, the step from which on they differ by more than noise,
the differences in settings and versions, and the last values of both. Draws both curves and their
difference.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import flags
from matplotlib.figure import Figure

from vit_jax import cli
from vit_jax.config import may_change
from vit_jax.errors import UserError, choices, shown
from vit_jax.figures import style
from vit_jax.io import storage
from vit_jax.io.text import aligned, number, printable
from vit_jax.run import changes, history, workdir

LEAST = 5  # lines in a window
SIGMAS = 4.0  # exceeded by chance in one window out of 16,000


class Divergence(NamedTuple):
    """Steps at which two curves diverge; None: nowhere."""

    first: int | None  # first step at which any bit differs
    significant: int | None  # first step of a window that differs by more than noise
    sigma: float  # standard deviation of the noise in the difference


def lines_of(path: str) -> list[dict]:
    """Reads the lines of metrics of a workdir or a file; raises UserError if there are none."""
    path = workdir.located(path)
    if path.is_dir():
        lines = history.read_lines(path)
    elif path.exists():
        lines = history.read_file(path)
    else:
        raise UserError(f'no run and no file {path}')
    if not lines:
        raise UserError(f'{path} has no line of metrics')
    return lines


def curve(lines: Sequence[Mapping], metric: str) -> dict[int, float]:
    """{step: value} of a metric."""
    return {line['step']: line[metric] for line in lines if line.get(metric) is not None}


def check_metric(metric: str, path: str, lines: Sequence[Mapping]) -> None:
    """Raises UserError, with the known names, unless the lines have numbers of the metric."""
    names = {
        name for line in lines for name, value in line.items()
        if name != 'step' and type(value) in (int, float)
    }  # fmt: skip
    if metric not in names:
        raise UserError(f'{path} has no --metric {shown(metric)}; {choices(metric, sorted(names))}')


def divergence(a: Mapping[int, float], b: Mapping[int, float]) -> Divergence:
    """Finds where two curves {step: value} diverge.

    d is the difference at common steps. Its noise is sigma = 1.48 median|d_t - d_(t-1)| / sqrt(2),
    which is robust to a slow drift and to a few outliers. The curves diverge at the first window of
    n lines (a twentieth of all, at least LEAST) whose mean exceeds SIGMAS sigma / sqrt(n).
    """
    steps = np.array(sorted(a.keys() & b.keys()))
    if not len(steps):
        return Divergence(None, None, 0.0)
    d = np.array([b[s] - a[s] for s in steps], np.float64)
    differ = np.flatnonzero(d)
    first = int(steps[differ[0]]) if len(differ) else None
    n = min(max(LEAST, len(d) // 20), len(d))
    sigma = 1.4826 * float(np.median(np.abs(np.diff(d)))) / 2**0.5 if len(d) > 1 else 0.0
    means = np.convolve(d, np.full(n, 1 / n), 'valid')
    floor = 1e-6 * float(np.median(np.abs([a[s] for s in steps])))  # smaller is rounding
    far = np.flatnonzero(np.abs(means) > np.maximum(SIGMAS * sigma / n**0.5, floor))
    return Divergence(first, int(steps[far[0]]) if len(far) else None, sigma)


def documents(path: str) -> tuple[dict, dict]:
    """Reads (config.json, result.json) of a workdir; {} for a file that is absent."""
    path = workdir.located(path)
    if not path.is_dir():
        return {}, {}
    return tuple(workdir.read_json(path / f'{name}.json') or {} for name in ('config', 'result'))


def text(
    a: str, b: str, lines: Sequence[Sequence[Mapping]], metric: str, found: Divergence
) -> str:
    """Formats the comparison of runs `a` and `b`; raises UserError if they share no step."""
    common = len(curve(lines[0], metric).keys() & curve(lines[1], metric).keys())
    if not common:
        raise UserError(f'{a} and {b} have no step in common with a {metric}')
    parts = [f'{metric} at {common:,} common steps']
    if found.first is None:
        parts.append('equal to the last bit')
    else:
        parts.append(f'differ first at step {found.first:,}')
        parts.append(
            f'differ by more than noise from step {found.significant:,} on'
            if found.significant is not None else 'never differ by more than noise'
        )
        parts.append(f'standard deviation of the noise in the difference: {found.sigma:.3g}')
    (config_a, result_a), (config_b, result_b) = documents(a), documents(b)
    if config_a and config_b:
        differing = changes.differences(config_a, config_b, may_change)
        differ = '\nsettings\n' + changes.table(differing, 'A', 'B')
        parts.append(differ if differing else '\nsettings are equal')
    if result_a and result_b:
        versions = [
            r.get('versions', {}) | {'commit': r.get('git_commit')} for r in (result_a, result_b)
        ]
        other = [
            f'{name}  {versions[0].get(name)}  {versions[1].get(name)}'
            for name in sorted(versions[0].keys() | versions[1].keys())
            if versions[0].get(name) != versions[1].get(name)
        ]
        parts.append('\nversions\n' + '\n'.join(other) if other else '\nversions are equal')
    last = [{k: v for line in part for k, v in line.items()} for part in lines]
    names = [k for k in last[0] if k in last[1] and k not in ('step', 'seconds')]
    rows = [('', 'A', 'B')] + [(k, *(number(part[k]) for part in last)) for k in names]
    parts.append('\nlast values\n' + aligned(rows))
    return '\n'.join(parts)


def draw(
    path: os.PathLike,
    names: Sequence[str],
    curves: Sequence[Mapping[int, float]],
    metric: str,
    found: Divergence,
) -> None:
    """Draws a PNG: both curves, their difference below, and a line where they diverge."""
    figure = Figure(figsize=(8, 5), dpi=150, layout='constrained')
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for name, one, colour, line in zip(
        names, curves, (style.RIGHT, style.WRONG), ('-', '--'), strict=True
    ):
        above.plot(list(one), list(one.values()), line, color=colour, lw=1.2, label=name)
    steps = sorted(curves[0].keys() & curves[1].keys())
    below.plot(steps, [curves[1][s] - curves[0][s] for s in steps], color='black', lw=0.8)
    below.axhspan(-2 * found.sigma, 2 * found.sigma, color=style.GREY, alpha=0.2, lw=0)
    if found.significant is not None:
        for ax in (above, below):
            ax.axvline(found.significant, color=style.GREY, lw=1, ls=':')
        above.annotate(
            f'diverge at step {found.significant:,}', (found.significant, 1),
            xycoords=('data', 'axes fraction'), xytext=(4, -4), textcoords='offset points',
            va='top', fontsize=8, color=style.GREY,
        )  # fmt: skip
    above.set_ylabel(metric, parse_math=False)
    below.set_ylabel('B - A')
    below.set_xlabel('step')
    legend = figure.legend(loc='outside upper left', ncols=2, frameon=False, fontsize=8)
    style.disable_math(legend)
    for ax in (above, below):
        ax.yaxis.set_major_formatter(style.PlainFormatter())
        ax.spines[['top', 'right']].set_visible(False)
    style.save(path, figure)


def main(argv: Sequence[str]) -> int:
    if len(argv) != 3:
        raise UserError('usage: python -m vit_jax.compare A B [--metric NAME] [--out FILE]')
    a, b = argv[1:]
    options = flags.FLAGS
    out = storage.prepare_file(workdir.located(options.out))
    if out.suffix.lower() != '.png':
        raise UserError(f'--out={options.out}: name a file that ends in .png')
    with storage.explained(out, 'read'):
        storage.check_free(out, options.force)
    lines = [lines_of(a), lines_of(b)]
    for path, part in ((a, lines[0]), (b, lines[1])):
        check_metric(options.metric, path, part)
    curves = [curve(part, options.metric) for part in lines]
    found = divergence(*curves)
    print(printable(text(a, b, lines, options.metric, found), keep='\n'))
    names = [style.shorten(f'{k}  {name}', 3.5, 8) for k, name in (('A', a), ('B', b))]
    draw(out, names, curves, options.metric, found)
    print(f'\nPicture: {printable(out)}')
    return 0


if __name__ == '__main__':
    flags.DEFINE_string('metric', 'loss', 'Metric to compare: loss, accuracy, test/accuracy, ...')
    flags.DEFINE_string('out', 'compare.png', 'PNG file to write.')
    flags.DEFINE_bool('force', False, 'Replace the PNG file if it exists.')
    cli.run(main)
