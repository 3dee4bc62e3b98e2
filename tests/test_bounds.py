"""Every setting declares its values, and no other reaches a run."""

import ast
import copy
import dataclasses
import inspect
import math
import pathlib
import types
import typing
from typing import Annotated

import launched
import pytest

from vit_jax import assembly, config, errors, models
from vit_jax.data import augment, distort, sources
from vit_jax.data.tasks import classify as classify_task
from vit_jax.errors import UserError
from vit_jax.evaluators import classify, probe
from vit_jax.io import bounds, experiment
from vit_jax.models import block, pooling, relative, rotary
from vit_jax.objectives import supervised

MODELS = ('vit-ti/4', 'mixer-s/4', 'bit-r50x1')
GROUPS = {  # groups of a model's settings
    'style': block.Style, 'style.rope': rotary.Rope, 'style.bias': relative.Bias,
    'pool_style': pooling.Pool,
}  # fmt: skip
WRONG = None, True, 1, 0.5, 1j, 'text', b'1', (), [[]], ('text', 1, ()), {}, {'a': 1}, {1}, ...
NEVER = math.nan, math.inf, -math.inf, 10**400, -(10**400), [math.nan]  # for any setting


def sections():
    """[(dotted name, {key: (annotation, default)}, what else the section has)] of all there are."""
    yield '', config.keys_of(config.keys.scalars), {}
    for name, function in config.SECTIONS.items():
        yield name, config.keys_of(function), {}
    yield 'expected.0', config.keys_of(config.keys.expectation), dict(
        metric='val/loss', value=1, tolerance=1, source='x'
    )
    yield 'data', config.data_keys(classify_task.classify), {}
    yield 'objective', config.keys_of(supervised.supervised), {}
    yield 'data.source', config.keys_of(sources.load), {}
    parts = config.keys_of(sources.load) | config.keys_of(config.keys.mixture_part)
    yield 'data.source.mixture.part', parts, {}
    for name in MODELS:
        yield 'model', models.fields(name) | {'name': (str, name)}, {'name': name}
    for path, group in GROUPS.items():
        keys = {f.name: (f.type, bounds.section(f.default)) for f in dataclasses.fields(group)}
        yield f'model.{path}', keys, {}
    for place, functions in ('data.view', augment.VIEWS), ('data.augment.0', distort.AUGMENTATIONS):
        for name, function in functions.items():
            keys = config.keys_of(function)
            keys.pop('size', None)
            yield place, keys, {'name': name}
    for name, function in (('classify', classify.Classify), ('probe', probe.Probe)):
        yield f'evals.{name}', config.keys_of(function), dict(
            type=name, source=dict(name='/x'), train_source=dict(name='/x')
        ) if name == 'probe' else dict(type=name, source=dict(name='/x'))


def given(path, values):
    """A config, as an experiment gives it, with `values` in the section at a dotted path."""
    whole = copy.deepcopy(TINY)
    part = whole
    for name, inner in zip(path.split('.'), [*path.split('.')[1:], None], strict=True):
        if not name:
            break
        name = int(name) if name.isdigit() else name
        if inner is not None and inner.isdigit():
            part[name] = [{}]
        elif name == 'mixture':
            part.clear()
            part[name] = {inner: dict(name='/x')}
        elif isinstance(part, dict):
            part.setdefault(name, {})
        part = part[name]
    if 'name' in values:
        part.clear()
    part.update(values)
    return whole


def leaves(annotation, ranges=()):
    """[(type or Literal, the ranges about it)] of an annotation."""
    kind, of = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind is Annotated:
        return leaves(of[0], (*ranges, *(r for r in of[1:] if isinstance(r, bounds.Range))))
    if kind in (types.UnionType, typing.Union) or kind is tuple and of:
        inner = [leaf for one in of if one is not ... for leaf in leaves(one, ranges)]
        return [(tuple, ()), *inner] if kind is tuple else inner
    return [(annotation, ranges)]


def wrong(annotation):
    """Values of types that it does not take, and numbers and texts outside of what it declares."""
    found = leaves(annotation)
    choices = {one for leaf, _ in found for one in typing.get_args(leaf)}
    kinds = {leaf for leaf, _ in found if isinstance(leaf, type)}
    kinds |= set(map(type, choices)) | {int for kind in kinds if kind is float}
    kinds |= {list for kind in kinds if kind is tuple}
    if any(map(dataclasses.is_dataclass, kinds)):
        kinds.add(dict)
        yield {'a': 1}
    yield from NEVER
    yield from (value for value in WRONG if type(value) not in kinds)
    if str in kinds and not any(leaf is str for leaf, _ in found):
        yield 'text'
    for leaf, ranges in found:
        for r in ranges if leaf in (int, float) and tuple not in kinds else ():
            ends = ((r.low, -1, r.ends[0] == '('), (r.high, 1, r.ends[1] == ')'))
            for end, step, excluded in ends:
                just_outside = [end + step if leaf is int else end + step / 1000]
                for value in just_outside + [end] * excluded if math.isfinite(end) else ():
                    if value not in choices:
                        yield value


def test_every_setting_declares_its_values_and_has_a_default_among_them():
    seen = 0
    for path, keys, _ in sections():
        for key, (annotation, default) in keys.items():
            assert annotation is not inspect.Parameter.empty, (path, key)
            for leaf, ranges in leaves(annotation):
                assert leaf not in (int, float) or ranges, f'{path}.{key} declares no range'
            if default is not config.REQUIRED:
                bounds.check(f'{path}.{key}', default, annotation)
            seen += 1
    assert seen > 150


def test_numbers_among_the_flags_have_their_bounds_too():
    seen = 0
    for file in pathlib.Path(errors.__file__).parent.rglob('*.py'):
        for call in ast.walk(ast.parse(file.read_text())):
            name = getattr(getattr(call, 'func', None), 'attr', '')
            if name in ('DEFINE_integer', 'DEFINE_float'):
                given = {keyword.arg for keyword in call.keywords}
                assert 'lower_bound' in given, f'{file}: {call.args[0].value}'
                seen += 1
    assert seen > 25


@pytest.mark.parametrize(
    'path, keys, values', [pytest.param(*s, id=f'{s[0]}-{s[2].get("name")}') for s in sections()]
)
def test_no_value_outside_of_what_is_declared_is_taken(path, keys, values):
    config.complete(given(path, values))
    for key, (annotation, _) in keys.items():
        for value in wrong(annotation):
            try:
                config.complete(given(path, {**values, key: value}))
            except UserError as e:
                assert '\n' not in str(e) and key in str(e), e
            else:
                pytest.fail(f'{path}.{key} took {errors.shown(value)}')


@pytest.mark.parametrize('path, values, words', [
    ('optim', dict(clip=-1), 'optim.clip is -1, not float above 0 or None'),
    ('optim', dict(freeze='('), r"optim.freeze is '\(', not tuple of str that is a reg"),
    ('objective', dict(mixup=-0.1), 'objective.mixup is -0.1, not float of 0 or above'),
    ('objective', dict(mix_by='pair'), "objective.mix_by is 'pair', not one of batch, example"),
    ('data', dict(image_size=(8,)), r'data.image_size is \(8,\), not int in \[1, 65536\] or \(int'),
    ('data.view', dict(name='inception', area=(2, 1)), r'area is \(2, 1\), not \(float in '),
    ('data.view', dict(name='inception', area=(1, 0.5)), r'\(1, 0.5\), not .* in ascending order'),
    ('data.augment.0', dict(name='erase', fill='grey'), r"augment\[0\].fill is 'grey', not one of"),
    ('data.augment.0', dict(name='randaugment', layers=-1), r'augment\[0\].layers is -1, not int'),
    ('model', dict(patch_size=(2,)), r'patch_size is \(2,\), not int above 0 or \(int above 0'),
    ('model', dict(registers=-1), 'model.registers is -1, not int of 0 or above'),
    ('', dict(seed=10**23), 'seed is 1000.*, not int in'),
    ('', dict(expected=[dict(metric='a', value=1, source='b')]), r'has no expected\[0\].tolerance'),
])
def test_the_line_names_key_value_and_range(path, values, words):
    with pytest.raises(UserError, match=words):
        config.complete(given(path, values))


def test_randaugment_of_no_layers_is_one():
    full = config.complete(given('data.augment.0', dict(name='randaugment', layers=0)))
    assert full.data.augment[0]['layers'] == 0


TINY = experiment.read(f'{launched.TINY}:/images')


@pytest.mark.parametrize('epochs', [1e9, 1e308])
def test_epochs_that_make_too_many_steps_are_named(epochs):
    values = types.SimpleNamespace(batch_size=8)
    settings = types.SimpleNamespace(steps=None, epochs=epochs, data=values)
    with pytest.raises(UserError, match='epochs is 1e.*above 2,147,483,647'):
        assembly.steps_of(settings, range(1000))
