"""Completes an experiment's settings: checks every key and fills in every default.

A section of a config is the keyword-only arguments of one function. Its signature says which keys,
types, ranges and defaults the section has, its docstring what they mean; `python -m vit_jax.config`
prints both.
"""

import ast
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from vit_jax import optim, sharding
from vit_jax.config import keys, selection
from vit_jax.config.sections import (
    REQUIRED,
    check_name,
    complete_data,
    complete_model,
    dtypes_named,
    filled,
    keys_of,
    section,
)
from vit_jax.data import pipeline, sources
from vit_jax.errors import UserError, choices, shown
from vit_jax.io import bounds, experiment
from vit_jax.run import report, results
from vit_jax.run.checkpoint import Checkpoints

INHERITED = ('image_size', 'batch_size')  # by evaluations, from the section data
ROOMS = {  # key that names a function: (where the package has them, their positional arguments)
    'objective.name': ('vit_jax.objectives', ('model', 'examples')),
    'data.task': ('vit_jax.data.tasks', ('source',)),
    'evals.type': ('vit_jax.evaluators', ('subject',)),
}
SECTIONS = {  # sections whose keys are all arguments of one function
    'optim': optim.make,
    'mesh': sharding.make_mesh,
    'checkpoint': Checkpoints,
    'report': report.Report,
}


FREE_SECTIONS = ('checkpoint', 'evals', 'mesh', 'report', 'select')  # do not affect the result


def load(
    path: os.PathLike | str,
    overrides: Iterable[tuple[str, str]] = (),
    begun: Mapping | None = None,
    absent: bool = False,
) -> ConfigDict:
    """Loads an experiment file, 'FILE' or 'FILE:ARG', or a run's config.json, as a complete config.

    `overrides` are (dotted key, text) pairs; a text is a Python literal, or else a string. `begun`
    is the config of a run to resume, whose model is used if the checkpoint `init_from` can no
    longer be read. Without `begun`, an unreadable `init_from` raises UserError, unless it may be
    `absent`: `model` is then the section as it is given, and has no name.
    """
    return override(experiment.read(path), overrides, begun, absent)


def override(
    given: dict,
    overrides: Iterable[tuple[str, str]],
    begun: Mapping | None = None,
    absent: bool = False,
) -> ConfigDict:
    """Completes a nested dict with `overrides`, which are as in `load`.

    `steps` among the overrides replaces given `epochs`, and the other way round.
    """
    overrides = list(overrides)
    new = {key for key, text in overrides if parse_value(text) is not None}
    for key, other in ('steps', 'epochs'), ('epochs', 'steps'):
        if key in new and other not in new and given.get(other) is not None:
            logging.warning('%s is given: %s=%s is not used', key, other, given.pop(other))
    for key, text in overrides:
        *parents, last = key.split('.')
        part = given
        for parent in parents:
            if not isinstance(part.setdefault(parent, {}), dict):
                part[parent] = {}  # a view that was a name gets arguments
            part = part[parent]
        part[last] = parse_value(text)
    return complete(given, begun, absent)


def parse_value(text: str) -> Any:
    """Parses a Python literal, true or false; any other text is a string."""
    if text in ('true', 'false'):
        return text == 'true'
    try:
        with warnings.catch_warnings(action='ignore'):  # about the text as Python
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def complete(given: Mapping, begun: Mapping | None = None, absent: bool = False) -> ConfigDict:
    """Checks a nested dict, as an experiment returns it, and fills in every default.

    Raises UserError for an unknown key (and names the nearest known one), for a value of the wrong
    type or range, and for a missing key that is required.
    """
    given = selection.development(dtypes_named(given))
    names = ('model', 'data', 'objective', 'evals', 'select', *SECTIONS)
    outside = {k: v for k, v in given.items() if k not in names}
    full = filled('', outside, keys_of(keys.scalars), also=names)
    full['expected'] = tuple(
        filled(f'expected[{i}]', row, keys_of(keys.expectation))
        for i, row in enumerate(full['expected'])
    )
    values = section(given, 'objective')
    method = named('objective.name', values.get('name', 'supervised'))
    model = next(iter(inspect.signature(method.function).parameters.values()))
    needed = model.default is REQUIRED  # else the method may have a network of its own
    full['model'] = complete_model(section(given, 'model'), full, begun, absent, needed)
    full['objective'] = filled('objective', values, method_keys(method.function))
    values = section(given, 'data')
    task = named('data.task', values.get('task', 'classify'))
    full['data'] = complete_data('data', values, data_keys(task.function))
    for name, function in SECTIONS.items():
        full[name] = filled(name, section(given, name), keys_of(function))
    full['evals'] = complete_evals('evals', section(given, 'evals'), full['data'])
    full['select'] = section(given, 'select')
    if full['select']:
        full['select'] = filled('select', full['select'], keys_of(keys.select))
        if full['select']['evals'] is not None:
            evals = complete_evals('select.evals', full['select']['evals'], full['data'])
            full['select']['evals'] = evals
        selection.check_metric(full['select'], metrics(selection.evals(full)))
    if (full['steps'] is None) == (full['epochs'] is None):
        which = 'neither steps nor epochs' if full['steps'] is None else (
            f'both steps ({full["steps"]}) and epochs ({full["epochs"]}); leave one out'
        )
        raise UserError(f'config has {which}')
    full['checkpoint']['mode'] = mode_of(full)
    return ConfigDict(full)


def complete_evals(path: str, sections: Mapping, data: Mapping) -> dict[str, Any]:
    """Completes evaluations by name; INHERITED keys are those of the complete section `data`."""
    full = {}
    for name in sections:
        where = f'{path}.{name}'
        check_name(where, name)
        values = section(sections, name, where)
        evaluator = named('evals.type', values.get('type', 'classify'), f'{where}.type')
        known = evaluation_keys(evaluator.function)
        inherited = {k: v for k, v in data.items() if k in INHERITED and k in known}
        full[name] = complete_data(where, inherited | values, known)
    return full


def method_keys(function: Callable) -> dict[str, tuple]:
    """Keys of the section `objective` with a training method, as in `keys_of`."""
    return keys_of(keys.objective) | keys_of(function)


def data_keys(function: Callable) -> dict[str, tuple]:
    """Keys of the section `data` with a task."""
    return keys_of(keys.data) | keys_of(function) | keys_of(pipeline.batches)


def evaluation_keys(function: Callable) -> dict[str, tuple]:
    """Keys of a section of `evals` with an evaluator."""
    return keys_of(keys.evaluation) | keys_of(function)


def named(kind: str, name: Any, key: str | None = None) -> experiment.Component:
    """The Component that a config names, of a kind in ROOMS; raises UserError."""
    room, given = ROOMS[kind]
    found = experiment.component(room, name, key or kind)
    signature = inspect.signature(found.function)
    try:
        signature.bind_partial(*given)
    except TypeError:
        raise UserError(
            f'config {key or kind} is {shown(name)}, whose arguments are {signature}; they begin '
            f'with {", ".join(given)}, and settings follow after a *'
        ) from None
    return found


def settings_of(section: Mapping | ConfigDict, function: Callable) -> dict[str, Any]:
    """Settings of a section that are keyword arguments of a function."""
    return {key: section[key] for key in keys_of(function) if key in section}


def may_change(key: str) -> bool:
    """Whether a dotted key affects neither batches, model nor optimizer, see bounds.MayChange."""
    section, _, rest = key.partition('.')
    if section in FREE_SECTIONS:
        return True
    if section == 'data':
        function = sources.load if rest.startswith('source.') else pipeline.batches
        known, name = keys_of(function), rest.rpartition('.')[2]
    else:
        known, name = keys_of(keys.scalars), key
    return name in known and bounds.may_change(known[name][0])


def metrics(evals: Mapping | ConfigDict) -> dict[str, str]:
    """{'val/accuracy': 'max', 'val/loss': 'min'} of a complete section: which value is better."""
    return {
        f'{name}/{metric}': which
        for name, settings in evals.items()
        for metric, which in named('evals.type', settings['type']).metrics(settings).items()
    }


def better(config: ConfigDict) -> dict[str, str]:
    """Same as `metrics` for all that a run of a config measures, with its costs and training."""
    method = named('objective.name', config.objective.name)
    trained = method.metrics(settings_of(config.objective, method.function))
    return metrics(config.evals) | trained | results.COSTS


def mode_of(full: Mapping) -> str | None:
    """checkpoint.mode as the metric checkpoint.best declares it; raises UserError if unknown."""
    best, mode = full['checkpoint']['best'], full['checkpoint']['mode']
    if best is None:
        return mode
    known = metrics(full['evals'])
    if best not in known:
        raise UserError(
            f'config checkpoint.best is {shown(best)}, no metric of the evals; '
                f'{choices(best, known)}'
        )
    if mode not in (None, known[best]):
        raise UserError(
            f'config checkpoint.mode is {mode}, but the best {best} is its {known[best]}; leave '
            'the key out'
        )
    return known[best]
