"""An experiment's settings: every key checked, every default filled in, runs compared.

A section of a config is the keyword-only arguments of one function, and that function's signature
is all there is to say which keys, types and defaults it has.
"""

import ast
import difflib
import inspect
import re
import warnings

from absl import logging
from ml_collections import ConfigDict

from vit_jax import models, optim, sharding
from vit_jax.convert import load as weights
from vit_jax.data import augment, distort, pipeline, sources, tasks
from vit_jax.errors import UserError, choices, shown
from vit_jax.io import bounds, experiment
from vit_jax.io.bounds import Finite, NonNegative, Positive, Seed, Steps
from vit_jax.models import interface
from vit_jax.run import report
from vit_jax.run.checkpoint import Checkpoints

REQUIRED = inspect.Parameter.empty
INHERITED = ('image_size', 'batch_size')  # by evaluations, from the section data
ROOMS = {  # of the functions that a config names, by the key, and what such a function is given
    'objective.name': ('vit_jax.objectives', ('model', 'examples')),
    'data.task': ('vit_jax.data.tasks', ('source',)),
    'evals.type': ('vit_jax.evaluators', ('subject',)),
}
SECTIONS = {  # those of which every key is an argument of one function
    'optim': optim.make,
    'mesh': sharding.make_mesh,
    'checkpoint': Checkpoints,
    'report': report.Report,
}


def load(path, overrides=(), begun=None, absent=False):
    """The complete config of an experiment file, 'FILE' or 'FILE:ARG', or of a run's config.json.

    `overrides` are (dotted key, text) pairs; a text is a Python literal, or else itself. `begun`
    is the config that a run goes on with: its model stands in for a checkpoint `init_from` that
    can no longer be read. Without either, that is a mistake, unless it may be `absent`: `model`
    is then the section as it is given, and has no name.
    """
    return changed(experiment.read(path), overrides, begun, absent)


def changed(given, overrides, begun=None, absent=False):
    """The complete config of a nested dict with `overrides`, as `load` has them.

    `steps` among the overrides stands in for given `epochs`, and the other way round.
    """
    new = {key for key, text in overrides if parsed(text) is not None}
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
        part[last] = parsed(text)
    return complete(given, begun, absent)


def parsed(text):
    """A Python literal, true or false; any other text is a string."""
    if text in ('true', 'false'):
        return text == 'true'
    try:
        with warnings.catch_warnings(action='ignore'):  # of what text means in Python
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def scalars(
    *,
    seed: Seed = 0,
    steps: Steps | None = None,
    epochs: Positive[float] | None = None,
    accumulate: Positive[int] = 1,
    init_from: str | None = None,
    keep_head: bool = False,
    keep_pre_logits: bool = False,
    expected: tuple[dict, ...] = (),
):
    """The keys outside of sections, with either `steps` or `epochs`.

    `init_from` is anything that `vit_jax.load` takes: its weights are where training begins, with
    a new zero head unless `keep_head` (which keeps a representation layer too) and without a
    representation layer unless `keep_pre_logits`.
    """


def expectation(
    *,
    metric: str,
    value: Finite[float],
    tolerance: NonNegative[float],
    source: str,
    cell: tuple[str, tuple[str | Finite[float], ...], str] | None = None,
    scale: Positive[float] = 1.0,
):
    """A row of `expected`: what `metric` is to be, and in which cell of a published table it is.

    The cell is (table, the row's first cells, column), its number times `scale` the value.
    """


def keys_of(function):
    """{name: (annotation, default)} of a function's keyword-only arguments; object: any value."""
    return {
        name: (object if p.annotation is p.empty else p.annotation, p.default)
        for name, p in inspect.signature(function, eval_str=True).parameters.items()
        if p.kind == p.KEYWORD_ONLY
    }


def dtypes_named(value):
    """Nested dicts with 'bfloat16' in place of jnp.bfloat16, as JSON has it."""
    if isinstance(value, dict):
        return {key: dtypes_named(inner) for key, inner in value.items()}
    return interface.dtype_name(value)


def complete(given, begun=None, absent=False):
    """A nested dict, as an experiment gives it, checked and with every default filled in.

    Raises UserError for a key that nothing reads (and names the nearest that is read), a value of
    the wrong type or range, and a key that must be given and is not.
    """
    given = dtypes_named(given)
    names = ('model', 'data', 'objective', 'evals', *SECTIONS)
    outside = {k: v for k, v in given.items() if k not in names}
    full = filled('', outside, keys_of(scalars), also=names)
    rows = enumerate(full['expected'])
    full['expected'] = tuple(filled(f'expected[{i}]', row, keys_of(expectation)) for i, row in rows)
    values = section(given, 'objective')
    method = named('objective.name', values.get('name', 'supervised'))
    model = next(iter(inspect.signature(method.function).parameters.values()))
    needed = model.default is REQUIRED  # else the method may have a network of its own
    full['model'] = complete_model(section(given, 'model'), full, begun, absent, needed)
    keys = {'name': (str, 'supervised')} | keys_of(method.function)
    full['objective'] = filled('objective', values, keys)
    values = section(given, 'data')
    task = named('data.task', values.get('task', 'classify'))
    keys = keys_of(pipeline.batches) | keys_of(task.function)
    keys |= {'source': (dict, REQUIRED), 'task': (str, 'classify')}
    full['data'] = complete_data('data', values, keys)
    for name, function in SECTIONS.items():
        full[name] = filled(name, section(given, name), keys_of(function))
    full['evals'] = {}
    for name in section(given, 'evals'):
        path = f'evals.{name}'
        check_name(path, name)
        values = section(given['evals'], name, path)
        evaluator = named('evals.type', values.get('type', 'classify'), f'{path}.type')
        keys = {'type': (str, 'classify'), 'every': (NonNegative[int], 0)}
        keys |= keys_of(evaluator.function)
        inherited = {k: v for k, v in full['data'].items() if k in INHERITED and k in keys}
        full['evals'][name] = complete_data(path, inherited | values, keys)
    if (full['steps'] is None) == (full['epochs'] is None):
        which = 'neither steps nor epochs' if full['steps'] is None else (
            f'both steps ({full["steps"]}) and epochs ({full["epochs"]}); leave one out'
        )
        raise UserError(f'config has {which}')
    full['checkpoint']['mode'] = mode_of(full)
    return ConfigDict(full)


def named(kind, name, key=None):
    """The Component that a config names, of a kind in ROOMS. Raises UserError."""
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


def settings_of(section, function):
    """Those settings of a section that are keyword arguments of a function."""
    return {key: section[key] for key in keys_of(function) if key in section}


def metrics(evals):
    """{'val/accuracy': 'max', 'val/loss': 'min'} of a complete section: which is better of each."""
    return {
        f'{name}/{metric}': which
        for name, settings in evals.items()
        for metric, which in named('evals.type', settings['type']).metrics(settings).items()
    }


def better(config):
    """Likewise of all that a run of a complete config measures: its costs and training, too."""
    method = named('objective.name', config.objective.name)
    trained = method.metrics(settings_of(config.objective, method.function))
    return metrics(config.evals) | trained | report.COSTS


def mode_of(full):
    """checkpoint.mode as the metric checkpoint.best declares it; UserError for no such metric."""
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


def check_name(path, name):
    """Raises UserError unless a name that a user gave a section can stand in keys and files."""
    if not isinstance(name, str) or not re.fullmatch(r'[\w-]+(/[\w-]+)*', name):
        raise UserError(
            f'config {path} has the name {shown(name)}; names are of letters, digits, _ and '
            '-, with a slash between parts'
        )


def section(given, name, path=None):
    """A part of the config as a dict, empty where it is not given."""
    value = given.get(name, {})
    if not isinstance(value, dict):
        raise UserError(f'config {path or name} is {shown(value)}, not a section with keys')
    return value


def complete_model(values, scalars, begun=None, absent=False, needed=True):
    """The model section: its keys depend on the model's name, or on the checkpoint to begin from.

    Without a name every field has the value that the checkpoint `init_from` tells of.
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
        return filled('model', values, {'name': (str | None, None)})
    if not isinstance(name, str):
        raise UserError(f"config model.name is {shown(name)}, not a name as 'vit-b/16'")
    keys = models.fields(name)
    keys = {k: (kind, read.get(k, default)) for k, (kind, default) in keys.items()}
    kept = read.get('num_classes') if scalars['keep_head'] else None
    keys['num_classes'] = (keys['num_classes'][0], kept)  # None: the data set's
    return filled('model', values, keys)


def model_of(scalars, begun):
    """{field: value} of the model in the checkpoint `init_from`, without its head."""
    path = scalars['init_from']
    new_head = None if scalars['keep_head'] else 1
    try:
        found = weights.read(
            path, num_classes=new_head, keep_pre_logits=scalars['keep_pre_logits'], values=False
        )
    except UserError:
        kept = (begun or {}).get('model', {})
        if 'name' in kept and begun.get('init_from') == path:
            return kept
        raise
    return models.describe(found.model)


def complete_data(path, values, keys):
    """A section that may have data sets, a view and augmentations after it, by its `keys`."""
    sets = [k for k in keys if k == 'source' or k.endswith('_source')]
    full = filled(path, values, keys)
    for name in sets:
        full[name] = complete_source(f'{path}.{name}', section(full, name))
    if 'view' in keys:
        full['view'] = complete_call(f'{path}.view', full['view'], augment.VIEWS, tasks.check_view)
    if 'augment' in keys:
        full['augment'] = tuple(
            complete_call(
                f'{path}.augment[{i}]', call, distort.AUGMENTATIONS, tasks.check_augmentation
            )
            for i, call in enumerate(full['augment'])
        )
    return full


def complete_source(path, values):
    """A data set, or with the key `mixture` several by name, each with a weight."""
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
            known | {'weight': (Positive[float], 1.0)},
        )
        for name in parts
    }}  # fmt: skip


def complete_call(path, call, functions, check):
    """The name of one of `functions`, or a dict of it and its arguments, with the defaults."""
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


def filled(path, values, keys, also=()):
    """`values`, checked against {name: (annotation, default)}, with the defaults of the rest."""
    prefix = f'{path}.' if path else ''
    for key, value in values.items():
        if key not in keys:
            near = difflib.get_close_matches(str(key)[:200], [*keys, *also], 1, cutoff=0)
            hint = f'; the nearest valid key is {prefix}{near[0]}' if near else ''
            raise UserError(f'config has an unknown key {prefix}{str(key)[:200]}{hint}')
        bounds.check(f'config {prefix}{key}', value, keys[key][0])
    for key, (annotation, default) in keys.items():
        if default is REQUIRED and key not in values:
            raise UserError(f'config has no {prefix}{key} ({bounds.describe(annotation)})')
    return {key: values.get(key, default) for key, (_, default) in keys.items()}

