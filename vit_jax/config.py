"""An experiment's settings: every key checked, every default filled in, runs compared.

A section of a config is the keyword-only arguments of one function, and that function's signature
is all there is to say which keys, types and defaults it has.
"""

import ast
import difflib
import importlib.util
import inspect
import pathlib
import types
import typing

from ml_collections import ConfigDict

from vit_jax import models, objectives, optim, report, sharding
from vit_jax.checkpoint import Checkpoints
from vit_jax.convert import documents
from vit_jax.convert import load as weights
from vit_jax.data import augment, distort, pipeline, sources
from vit_jax.errors import UserError
from vit_jax.evaluators import classify, probe

REQUIRED = inspect.Parameter.empty
POSITIVE = (
    'accumulate', 'batch_size', 'depth', 'epochs', 'fsdp', 'image_size', 'keep', 'keep_every',
    'layers', 'lr', 'mlp_dim', 'num_classes', 'num_heads', 'patch_size', 'prefetch', 'repeats',
    'smaller', 'steps', 'tensor', 'threads', 'unroll', 'weight', 'width',
)  # fmt: skip
SHARES = (
    'attention_dropout', 'b1', 'b2', 'drop_path', 'dropout', 'ema', 'label_smoothing', 'momentum',
    'tolerance',
)  # fmt: skip

EVALUATORS = {'classify': classify.Classify, 'probe': probe.Probe}


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
    seed: int = 0,
    steps: int | None = None,
    epochs: float | None = None,
    accumulate: int = 1,
    init_from: str | None = None,
    keep_head: bool = False,
    keep_pre_logits: bool = False,
    expected: tuple = (),
):
    """The keys outside of sections. `steps` overrules `epochs`.

    `init_from` is anything that `vit_jax.load` takes: its weights are where training begins, with
    a new zero head unless `keep_head` (which keeps a representation layer too) and without a
    representation layer unless `keep_pre_logits`.
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
    sections = {
        'objective': objectives.supervised,
        'optim': optim.make,
        'mesh': sharding.make_mesh,
        'checkpoint': Checkpoints,
        'report': report.Report,
    }
    names = ('model', 'data', 'evals', *sections)
    outside = {k: v for k, v in given.items() if k not in names}
    full = filled('', outside, keys_of(scalars), also=names)
    full['model'] = complete_model(section(given, 'model'), full, begun)
    full['data'] = complete_data('data', section(given, 'data'), pipeline.batches)
    for name, function in sections.items():
        full[name] = filled(name, section(given, name), keys_of(function))
    full['evals'] = {}
    for name in section(given, 'evals'):
        path = f'evals.{name}'
        values = section(given['evals'], name, path)
        kind = values.get('type', 'classify')
        if kind not in EVALUATORS:
            raise UserError(f'config {path}.type is {kind!r}, not one of {", ".join(EVALUATORS)}')
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
    keys['num_classes'] = (int | None, None)  # None: the data set's
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
            known | {'weight': (float, 1.0)},
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
        if not conforms(value, keys[key][0]):
            raise UserError(f'config {prefix}{key} is {value!r}, not {describe(keys[key][0])}')
        check_range(prefix + key, key, value)
    for key, (annotation, default) in keys.items():
        if default is REQUIRED and key not in values:
            raise UserError(f'config has no {prefix}{key} ({describe(annotation)})')
    return {key: values.get(key, default) for key, (_, default) in keys.items()}


def check_range(path, key, value):
    """Raises UserError for a number that can't be meant."""
    for number in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(number, (int, float)):
            if key in POSITIVE and not number > 0:
                raise UserError(f'config {path} is {value!r}, not above 0')
            if key in SHARES and not 0 <= number < 1:
                raise UserError(f'config {path} is {value!r}, not in [0, 1)')


def conforms(value, annotation):
    """Whether a value is of an annotated type; an int is a float too, a list a tuple."""
    if isinstance(annotation, types.UnionType):
        return any(conforms(value, kind) for kind in typing.get_args(annotation))
    if annotation is None:
        return value is None
    kind = typing.get_origin(annotation) or annotation
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is tuple:
        return isinstance(value, (tuple, list))
    return isinstance(value, kind)


def describe(annotation):
    """'int or None' for int | None."""
    if isinstance(annotation, types.UnionType):
        return ' or '.join(describe(kind) for kind in typing.get_args(annotation))
    return getattr(annotation, '__name__', str(annotation)).replace('NoneType', 'None')
