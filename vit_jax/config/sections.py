"""Completes the sections of a config: checks each key against what its function declares."""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vit_jax import models
from vit_jax.config import keys
from vit_jax.convert import load as weights
from vit_jax.data import augment, distort, sources, tasks
from vit_jax.errors import UserError, choices, shown
from vit_jax.io import bounds
from vit_jax.models import interface

REQUIRED = inspect.Parameter.empty


def keys_of(function: Callable) -> dict[str, tuple]:
    """{name: (annotation, default)} of a function's keyword-only arguments; object: any value."""
    return {
        name: (object if p.annotation is p.empty else p.annotation, p.default)
        for name, p in inspect.signature(function, eval_str=True).parameters.items()
        if p.kind == p.KEYWORD_ONLY
    }


def filled(
    path: str, values: Mapping, known: Mapping[str, tuple], also: Sequence[str] = ()
) -> dict[str, Any]:
    """Checks `values` against `known` {key: (annotation, default)}, and fills in the defaults."""
    prefix = f'{path}.' if path else ''
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key)[:200], [*known, *also], 1, cutoff=0)
            hint = f'; the nearest valid key is {prefix}{near[0]}' if near else ''
            raise UserError(f'config has an unknown key {prefix}{str(key)[:200]}{hint}')
        bounds.check(f'config {prefix}{key}', value, known[key][0])
    for key, (annotation, default) in known.items():
        if default is REQUIRED and key not in values:
            raise UserError(f'config has no {prefix}{key} ({bounds.describe(annotation)})')
    return {key: values.get(key, default) for key, (_, default) in known.items()}


def section(given: Mapping, name: str, path: str | None = None) -> dict:
    """A section of the config as a dict, empty if it is not given."""
    value = given.get(name, {})
    if not isinstance(value, dict):
        raise UserError(f'config {path or name} is {shown(value)}, not a section with keys')
    return value


def check_name(path: str, name: Any) -> None:
    """Raises UserError unless a user's name for a section can be part of keys and file names."""
    if not isinstance(name, str) or not re.fullmatch(r'[\w-]+(/[\w-]+)*', name):
        raise UserError(
            f'config {path} has the name {shown(name)}; names are of letters, digits, _ and '
            '-, with a slash between parts'
        )


def dtypes_named(value: Any) -> Any:
    """Nested dicts with 'bfloat16' in place of jnp.bfloat16, as in JSON."""
    if isinstance(value, dict):
        return {key: dtypes_named(inner) for key, inner in value.items()}
    return interface.dtype_name(value)


def complete_model(
    values: dict,
    scalars: Mapping,
    begun: Mapping | None = None,
    absent: bool = False,
    needed: bool = True,
) -> dict[str, Any]:
    """Completes the section `model`; its keys depend on the model's name, or on `init_from`.

    Without a name every field has the value that it has in the checkpoint `init_from`.
    """
    name = values.get('name')
    read = {}
    if name is None and scalars['init_from'] is not None:
        try:
            read = model_of(scalars, begun)
        except UserError:
            if absent:
                return {**values, 'name': None}
            raise
        name = read['name']
    if name is None and needed:
        raise UserError(
            "config has neither model.name (as 'vit-b/16') nor init_from, a checkpoint that tells "
            'what the model is (--config.init_from=PATH)'
        )
    if name is None:
        return filled('model', values, {'name': keys_of(keys.model)['name']})
    if not isinstance(name, str):
        raise UserError(f"config model.name is {shown(name)}, not a name as 'vit-b/16'")
    known = models.fields(name) | keys_of(keys.model)
    known = {k: (kind, read.get(k, default)) for k, (kind, default) in known.items()}
    kept = read.get('num_classes') if scalars['keep_head'] else None
    known['num_classes'] = (known['num_classes'][0], kept)
    full = filled('model', values, known | {'name': (str, name)})
    groups = {k: kind for k, (kind, _) in known.items() if bounds.group_of(kind) is not None}
    return full | {k: bounds.section(bounds.grouped(kind, full[k])) for k, kind in groups.items()}


def model_of(scalars: Mapping, begun: Mapping | None) -> dict[str, Any]:
    """{field: value} of the model in the checkpoint `init_from`, without its head."""
    path = scalars['init_from']
    new_head = None if scalars['keep_head'] else 1
    try:
        found = weights.read(
            path, part='encoder', num_classes=new_head, values=False,
            keep_pre_logits=scalars['keep_pre_logits'],
        )  # fmt: skip
    except UserError:
        kept = (begun or {}).get('model', {})
        if 'name' in kept and begun.get('init_from') == path:
            return kept
        raise
    return models.describe(found.model)


def complete_data(path: str, values: dict, known: Mapping[str, tuple]) -> dict[str, Any]:
    """Completes a section with `known` keys that may have data sets, a view and augmentations."""
    sets = [k for k in known if k == 'source' or k.endswith('_source')]
    full = filled(path, values, known)
    for name in sets:
        full[name] = complete_source(f'{path}.{name}', section(full, name))
    if 'view' in known:
        full['view'] = complete_call(f'{path}.view', full['view'], augment.VIEWS, tasks.check_view)
    if 'augment' in known:
        full['augment'] = tuple(
            complete_call(
                f'{path}.augment[{i}]', call, distort.AUGMENTATIONS, tasks.check_augmentation
            )
            for i, call in enumerate(full['augment'])
        )
    return full


def complete_source(path: str, values: dict) -> dict[str, Any]:
    """Completes a data set, or with the key `mixture` several by name, each with a weight."""
    known = keys_of(sources.load)
    if 'mixture' not in values:
        return filled(path, values, known, also=('mixture',))
    parts = section(values, 'mixture', f'{path}.mixture')
    if len(values) > 1 or not parts:
        raise UserError(f'config {path}.mixture is a section of data sets, and no key is beside it')
    for name in parts:
        check_name(f'{path}.mixture.{name}', name)
    return {'mixture': {
        name: filled(
            f'{path}.mixture.{name}', section(parts, name, f'{path}.mixture.{name}'),
            known | keys_of(keys.mixture_part),
        )
        for name in parts
    }}  # fmt: skip


def complete_call(
    path: str, call: Any, functions: Mapping[str, Callable], check: Callable[[Any], Any]
) -> Any:
    """Completes the name of one of `functions`, or a dict of its name and its arguments."""
    if not isinstance(call, dict):
        check(call)
        return call
    values = dict(call)
    if 'name' not in values:
        raise UserError(f'config {path} has no name; {choices("", sorted(functions))}')
    name = check(values.pop('name'))
    known = keys_of(functions[name])
    known.pop('size', None)
    return {'name': name, **filled(path, values, known, also=('name',))}
