"""The choice of a run among others, and its record in the result of the final run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from vit_jax.errors import UserError, choices
from vit_jax.run import results, workdir

FINISHED, NOT_FINITE = 'finished', 'not finite'  # states of runs that stay as they are
OWN = ('.lock', 'config.json', 'result.json', 'select', 'logs', 'compiled')  # are not copied


class Outcome(NamedTuple):
    """A development run as it stands."""

    point: Mapping[str, Any]  # its settings by dotted key
    run: str  # its workdir
    state: str  # 'finished', or in other words
    metrics: Mapping[str, float | None] | None  # of result.json


def record(
    metric: str, mode: str, outcomes: Sequence[Outcome], *, skip_unfinished: bool = False
) -> dict[str, Any]:
    """Chooses the outcome with the best value of a metric, the first of equal ones.

    Args:
      metric: name of the metric.
      mode: 'max' or 'min', which value is best.
      outcomes: the runs in the order of the grid.
      skip_unfinished: whether to choose although runs have neither finished nor diverged.

    Returns:
      What the final result.json has as `selection`: metric, mode, results (point, value, state and
      run of each outcome; value None where there is no finite one) and chosen, the point.

    Raises:
      UserError: runs are unfinished or lack the metric, or no value is finite.
    """
    left = [x for x in outcomes if x.state != FINISHED and not x.state.endswith(NOT_FINITE)]
    if left and not skip_unfinished:
        raise UserError(
            f'{len(left)} of {len(outcomes)} development runs have no result: {listed(left)}; '
            'give the command that started them again, or choose among the others with '
            '--skip_unfinished'
        )
    rows, named = [], []
    for one in outcomes:
        value, state = None, one.state
        if one.metrics is not None:
            if metric not in one.metrics:
                raise UserError(f'{one.run} has no {metric}; {choices(metric, one.metrics)}')
            value = one.metrics[metric]
        if value is None or not math.isfinite(value):
            value, state = None, f'{metric} is {NOT_FINITE}' if state == FINISHED else state
        rows.append({'point': dict(one.point), 'value': value, 'state': state, 'run': one.run})
        named.append(one._replace(state=state))
    finite = [row for row in rows if row['value'] is not None]
    if not finite:
        raise UserError(f'no development run has a finite {metric}: {listed(named)}')
    best = (max if mode == 'max' else min)(finite, key=lambda row: row['value'])
    return {'metric': metric, 'mode': mode, 'results': rows, 'chosen': best['point']}


def listed(outcomes: Sequence[Outcome]) -> str:
    """'WORKDIR (STATE), ...' of outcomes."""
    return ', '.join(f'{one.run} ({one.state})' for one in outcomes)


def add_record(path: epath.Path, selection: Mapping[str, Any]) -> None:
    """Adds the record of a selection to the result.json of the final run in `path`."""
    result = workdir.read_result(path)
    if result.get('selection') != selection:
        workdir.write_json(path / 'result.json', {**result, 'selection': selection})


def copy_run(
    source: epath.Path, target: epath.Path, config: ConfigDict, better: Mapping[str, str]
) -> None:
    """Copies a finished run to the workdir `target`, as the run of `config`.

    The configs differ at most in sections that do not affect the result, and in `expected`, by
    which the copy's result is judged again; `better` is as in `results.judge`. config.json and
    result.json are written last, so a copy that was interrupted is made again.
    """
    with workdir.lock_workdir(target):
        for path in source.iterdir():
            if path.name not in OWN:
                copy_tree(path, target / path.name)
        result = workdir.read_result(source)
        known = result['metrics'] | results.costs(result)
        result['expected'] = results.judge(config.to_dict()['expected'], known, better)
        workdir.write_json(target / 'config.json', config.to_dict())
        workdir.write_json(target / 'result.json', result)


def copy_tree(source: epath.Path, target: epath.Path) -> None:
    """Copies a file or a folder over what `target` has."""
    if not source.is_dir():
        source.copy(target, overwrite=True)
        return
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        copy_tree(path, target / path.name)
