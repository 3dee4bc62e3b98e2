"""An experiment's settings: every key checked, every default filled in, runs compared.

A section of a config is the keyword-only arguments of one function, and that function's signature
is all there is to say which keys, types and defaults it has.
"""

import ast
import difflib
import importlib.util
import inspect
import pathlib
from typing import Literal

from ml_collections import ConfigDict

from vit_jax import bounds, models, objectives, optim, report, sharding
from vit_jax.bounds import Finite, NonNegative, Positive, Seed, Steps
from vit_jax.checkpoint import Checkpoints
from vit_jax.convert import documents
from vit_jax.convert import load as weights
from vit_jax.data import augment, distort, pipeline, sources
from vit_jax.errors import UserError
from vit_jax.evaluators import classify, probe

REQUIRED = inspect.Parameter.empty
EVALUATORS = {'classify': classify.Classify, 'probe': probe.Probe}
SECTIONS = {  # those of which every key is an argument of one function
    'objective': objectives.supervised,
    'optim': optim.make,
    'mesh': sharding.make_mesh,
    'checkpoint': Checkpoints,
    'report': report.Report,
}


def load(path, overrides=(), begun=None):
    """The complete config of an experiment file, 'FILE' or 'FILE:ARG', or of a run's config.json.

    `overrides` are (dotted key, text) pairs; a text is a Python literal, or else itself. `begun`
    is the config that a run goes on with: its model stands in for a checkpoint `init_from` that
    can no longer be read.
    """
    return changed(from_file(path), overrides, begun)


def changed(given, overrides, begun=None):
    """The complete config of a nested dict with `overrides`, as `load` has them."""
    for key, text in overrides:
        *parents, last = key.split('.')
        part = given
        for parent in parents:
            if not isinstance(part.setdefault(parent, {}), dict):
                part[parent] = {}  # a view that was a name gets arguments
            part = part[parent]
        part[last] = parsed(text)
    return complete(given, begun)


def from_file(path):
    """What an experiment file, 'FILE' or 'FILE:ARG', or a config.json gives, as a nested dict."""
    file, _, arg = path.partition(':')
    if not pathlib.Path(file).is_file():
        raise UserError(f'no experiment file {file}')
    if file.endswith('.json'):
        return documents.read_json(pathlib.Path(file))
    spec = importlib.util.spec_from_file_location('experiment', file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
        raise UserError(f'experiment file {file} has no function get_config(arg=None)')
    given = module.get_config(arg) if arg else module.get_config()
    return given.to_dict()


def parsed(text):
    """A Python literal, true or false; any other text is a string."""
    if text in ('true', 'false'):
        return text == 'true'
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
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
    """The keys outside of sections. `steps` overrules `epochs`.

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
    """{name: (annotation, default)} of a function's keyword-only arguments."""
    return {
        name: (p.annotation, p.default)
        for name, p in inspect.signature(function).parameters.items()
        if p.kind == p.KEYWORD_ONLY
    }


def complete(given, begun=None):
    """A nested dict, as an experiment gives it, checked and with every default filled in.

    Raises UserError for a key that nothing reads (and names the nearest that is read), a value of
    the wrong type or range, and a key that must be given and is not.
    """
    names = ('model', 'data', 'evals', *SECTIONS)
    outside = {k: v for k, v in given.items() if k not in names}
    full = filled('', outside, keys_of(scalars), also=names)
    for i, row in enumerate(full['expected']):
        filled(f'expected[{i}]', row, keys_of(expectation))
    full['model'] = complete_model(section(given, 'model'), full, begun)
    full['data'] = complete_data('data', section(given, 'data'), pipeline.batches)
    for name, function in SECTIONS.items():
        full[name] = filled(name, section(given, name), keys_of(function))
    full['evals'] = {}
    for name in section(given, 'evals'):
        path = f'evals.{name}'
        values = section(given['evals'], name, path)
        kind = values.get('type', 'classify')
        bounds.check(f'config {path}.type', kind, Literal[tuple(EVALUATORS)])
        inherited = {k: full['data'][k] for k in ('image_size', 'batch_size')}
        full['evals'][name] = complete_data(path, inherited | values, EVALUATORS[kind])
    if full['steps'] is None and full['epochs'] is None:
        raise UserError('config has neither steps nor epochs')
    return ConfigDict(full)


def section(given, name, path=None):
    """A part of the config as a dict, empty where it is not given."""
    value = given.get(name, {})
    if not isinstance(value, dict):
        raise UserError(f'config {path or name} is {value!r}, not a section with keys')
    return value


def complete_model(values, scalars, begun=None):
    """The model section: its keys depend on the model's name, or on the checkpoint to begin from.

    Without a name every field has the value that the checkpoint `init_from` tells of.
    """
    name = values.get('name')
    read = {}
    if name is None and scalars['init_from'] is not None:
        read = model_of(scalars, begun)
        name = read['name']
    if name is None:
        raise UserError(
            "config has neither model.name (as 'vit-b/16') nor init_from, a checkpoint that tells "
            'what the model is (--config.init_from=PATH)'
        )
    if not isinstance(name, str):
        raise UserError(f"config model.name is {name!r}, not a name as 'vit-b/16'")
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
        if begun is not None and begun.get('init_from') == path:
            return begun['model']
        raise
    return models.describe(found.model)


def complete_data(path, values, function):
    """A section that has a source, a view and, in training, augmentations after it."""
    keys = keys_of(function)
    sets = {'source', *(k for k in keys if k.endswith('_source'))}  # data sets, each a section
    full = filled(path, values, keys | {name: (dict, REQUIRED) for name in sets})
    for name in sets:
        full[name] = complete_source(f'{path}.{name}', section(full, name))
    full['view'] = complete_call(f'{path}.view', full['view'], augment.VIEWS, pipeline.check_view)
    if 'augment' in keys:
        full['augment'] = tuple(
            complete_call(
                f'{path}.augment[{i}]', call, distort.AUGMENTATIONS, pipeline.check_augmentation
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
    name = check(values.pop('name', None))
    known = keys_of(functions[name])
    known.pop('size', None)
    return {'name': name, **filled(path, values, known, also=('name',))}


def filled(path, values, keys, also=()):
    """`values`, checked against {name: (annotation, default)}, with the defaults of the rest."""
    prefix = f'{path}.' if path else ''
    for key, value in values.items():
        if key not in keys:
            near = difflib.get_close_matches(key, [*keys, *also], 1, cutoff=0)
            hint = f'; the nearest valid key is {prefix}{near[0]}' if near else ''
            raise UserError(f'config has an unknown key {prefix}{key}{hint}')
        bounds.check(f'config {prefix}{key}', value, keys[key][0])
    for key, (annotation, default) in keys.items():
        if default is REQUIRED and key not in values:
            raise UserError(f'config has no {prefix}{key} ({bounds.describe(annotation)})')
    return {key: values.get(key, default) for key, (_, default) in keys.items()}

