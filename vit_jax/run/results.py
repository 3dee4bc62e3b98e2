"""The result of a run, result.json: costs, comparison with what was expected, provenance."""

import datetime
import importlib.metadata
import pathlib
import subprocess
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

import vit_jax
from vit_jax.distributed import devices
from vit_jax.io.text import number, printable
from vit_jax.run import machine

VERDICTS = {True: 'pass', False: 'FAIL', None: 'not measured'}  # of a row of `expected`
COSTS = dict.fromkeys(('exaflops', 'device_hours', 'tpu_core_days'), 'min')  # lower is better


def complete(
    result: Mapping[str, Any], expected: Iterable[Mapping[str, Any]], better: Mapping[str, str]
) -> dict[str, Any]:
    """Adds to what `Report.result` returns the costs, the verdicts and the provenance.

    `expected` and `better` are as in `judge`.
    """
    values = costs(result)
    verdicts = judge(expected, result['metrics'] | values, better)
    return {**result, 'costs': values, 'expected': verdicts, **provenance()}


def costs(result: Mapping[str, Any]) -> dict[str, float]:
    """{name: value} of the costs of a run, from its result.json, in the units of the papers.

    exaflops: three forward passes for each image seen, in 1e18 (arXiv:2010.11929 table 6);
    device_hours: devices as JAX counts them, evaluations included; tpu_core_days, on TPUs: table 2.
    """
    hours = result['seconds'] * result['device_count'] / 3600
    values = {'device_hours': hours}
    if result['flops_per_image'] is not None:
        values['exaflops'] = 3 * result['flops_per_image'] * result['examples_seen'] / 1e18
    kind = devices.DEVICES.get(result['device_kind'])
    if kind is not None and kind.kind.startswith('TPU'):
        values['tpu_core_days'] = hours / 24 * kind.cores
    return values


def judge(
    expected: Iterable[Mapping[str, Any]], metrics: Mapping[str, float], better: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Adds to the rows of `expected` the measured value and whether it passes.

    Args:
      expected: rows with a metric, a value, a tolerance, a source and perhaps the cell of a
        published table.
      metrics: {metric: measured value}.
      better: {metric: 'max' or 'min'}, as declared beside the metrics' definitions. 'min' passes up
        to value + tolerance, 'max' from value - tolerance on, others within both bounds.

    Returns:
      Rows with `measured` and `pass`, both None if not measured.
    """
    rows = []
    for row in expected:
        measured, passed = metrics.get(row['metric']), None
        if measured is not None:
            value, tolerance, which = row['value'], row['tolerance'], better.get(row['metric'])
            low_enough = which == 'max' or measured <= value + tolerance
            passed = low_enough and (which == 'min' or measured >= value - tolerance)
        rows.append({**row, 'measured': measured, 'pass': passed})
    return rows


def provenance() -> dict[str, Any]:
    """Versions of the libraries, what computed, git commit and time."""
    names = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')
    versions = {name: importlib.metadata.version(name) for name in names}
    return {
        'versions': {'vit_jax': vit_jax.__version__} | versions,  # which need not be installed
        'machine': machine.facts(),
        'git_commit': git_commit(),
        'finished': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    }


def git_commit() -> str | None:
    """The commit of this source tree, with '+' if files differ from it; None outside of git."""
    folder = pathlib.Path(__file__).parents[1]

    def git(*args):
        return subprocess.run(
            ['git', '-C', str(folder), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git('rev-parse', 'HEAD') + ('+' if git('status', '--porcelain', '.') else '')
    except (OSError, subprocess.CalledProcessError):
        return None


def print_result(path: epath.Path, result: Mapping[str, Any]) -> None:
    """Prints the result of the run in the workdir `path`."""
    for key, value in result['metrics'].items():
        if '/' in key:
            print(f'{printable(key)}  {number(value)}')
    for row in result['expected']:
        expected = f'{row["metric"]} {row["value"]} +- {row["tolerance"]}'
        print(f'expected {printable(expected)}: {VERDICTS[row["pass"]]}')
    print(f'{result["seconds"]:.0f} s in all. Result: {printable(path / "result.json")}')
