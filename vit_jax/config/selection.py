"""The section `select` of a config: what the development runs of a selection change."""

from collections.abc import Mapping
from typing import Any

from vit_jax.config.sections import section
from vit_jax.errors import UserError, choices, shown


def development(given: Mapping) -> Mapping:
    """The config of a development run where `select.development` is true; else `given` as it is."""
    select = section(given, 'select')
    if select.get('development') is not True:
        return given
    changed = {**given, 'expected': ()}
    if select.get('evals') is not None:
        changed['evals'] = select['evals']
    if select.get('split') is not None:
        data = section(given, 'data')
        source = {**section(data, 'source', 'data.source'), 'split': select['split']}
        changed['data'] = {**data, 'source': source}
    return changed


def evals(config: Mapping) -> Mapping[str, Any]:
    """Evaluations of the development runs of a complete config."""
    return config['evals'] if config['select']['evals'] is None else config['select']['evals']


def retrains(select: Mapping) -> bool:
    """Whether the final run is a run of its own, as development runs differ from it."""
    return select['split'] is not None or select['evals'] is not None


def check_metric(select: Mapping, known: Mapping[str, str]) -> None:
    """Raises UserError unless the metric is one of those `known` of the development runs."""
    if select['metric'] not in known:
        raise UserError(
            f'config select.metric is {shown(select["metric"])}, no metric of the development '
            f'runs; {choices(select["metric"], known)}'
        )
