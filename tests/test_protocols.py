"""Every recipe with a published number has the settings of its protocol, defaults included."""

import functools
import math
import re

import pytest
import recipes

from vit_jax import config
from vit_jax.convert.load import catalogue
from vit_jax.tables import protocols
from vit_jax.tables import recipes as tables

# Keys of a config that no number depends on, or that the model's name sets.
FREE = re.compile(
    r'model\.(width|depth|num_heads|mlp_dim|tokens_mlp_dim|patch_size|units|resnet|resnet_width|'
    r'attention|remat|unroll)|'
    r'(data|test)\.(threads|workers|prefetch|tolerance|'
    r'(train_)?source\.(mixture\.\w+\.)?(data_dir|image|labels))|'
    r'test\.(every|batch_size|k|l2|pixels|temperature|train_source\.label)|select(\..*)?|'
    r'(report|checkpoint|mesh|expected|evals)(\..*)?|seed|init_from'
)
LEAVES = ('view', 'augment', 'grid', 'decay_factors', 'expected')
DATA = {
    'jft_like:303000000x18291': 'JFT-300M', 'jft_like:3000000000x29593': 'JFT-3B',
    'dfn2b and imagenet': 'DFN-2B and ImageNet', 'data/webli': 'WebLI', 'data/wit400m': 'WIT',
}  # fmt: skip


def flat(values, path=''):
    """{dotted key: value}; a view, its augmentations and sequences are one value each."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict) and key not in LEAVES and value:
            found |= flat(value, f'{path}{key}.')
        else:
            found[path + key] = plain(value)
    return found


def plain(value):
    """Tuples as lists, as JSON has them."""
    if isinstance(value, tuple | list):
        return [plain(x) for x in value]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def named_views(section):
    """The same section with every view and augmentation as a dict, which is then completed."""
    section = dict(section)
    as_dict = lambda one: dict(name=one) if isinstance(one, str) else one  # noqa: E731
    if 'view' in section:
        section['view'] = as_dict(section['view'])
    if 'augment' in section:
        section['augment'] = tuple(map(as_dict, section['augment']))
    return section


@functools.cache
def completed(name, arg):
    """An experiment's complete config as a nested dict."""
    values = recipes.given(name, arg)
    values['data'] = named_views(values['data'])
    values['evals'] = {k: named_views(one) for k, one in values['evals'].items()}
    return config.complete(values).to_dict()


def origin(full, places):
    """What the weights of `init_from` come from, as protocols say it."""
    begin = full['init_from']
    if begin is None:
        return None
    if begin not in places:
        address = catalogue()[begin]['address'] if begin in catalogue() else begin
        point = re.search(r'-i21k-300ep-lr_0.001-aug_(.*)-sd', address)
        if point:
            return f'AugReg {point[1]}'
        if 'lvd142m' in begin:
            return 'LVD-142M'
        return 'ImageNet-21k' if 'imagenet21k' in address else 'ImageNet'
    before = recipes.given(places[begin].file.split('/')[1][:-3], places[begin].arg)
    source = before['data']['source']
    data = source['name'] if 'name' in source else ' and '.join(sorted(source['mixture']))
    data = {'imagenet21k': 'ImageNet-21k', 'imagenet2012': 'ImageNet'}.get(data, DATA.get(data))
    if before.get('objective', {}).get('name') == 'mae':
        return f'MAE, {before["epochs"]} epochs'
    if 'augreg' in places[begin].file:
        return f'AugReg {data}, {before["epochs"]} epochs'
    return f'{data} by SGD' if before['optim']['name'] == 'sgd' else data


def differences(full, wanted, metric, places):
    """Lines on the settings of a complete config that differ from `wanted`, {key: Setting}."""
    found = flat(full) | dict(upstream=origin(full, places))
    if metric:
        section = full['evals'][metric.partition('/')[0]]
        found |= {f'test.{k}': v for k, v in flat(section).items()}
    for part in ('data', 'test'):
        if name := found.get(f'{part}.source.name'):
            found[f'{part}.source.name'] = DATA.get(name, name)
    grid = found.get('select.grid') or ()
    choices = {key: [p[key] for p in grid if key in p] for point in grid for key in point}
    lines = []
    for key, (value, source) in wanted.items():
        if key == 'select.grid':
            if not same_grid(grid, value or ()):
                lines.append(f'{key} is {grid!r}, not {value!r}: {source}')
        elif key in found:
            chosen = key in choices or key == 'upstream' and 'init_from' in choices
            if not same(found[key], value) and not chosen:
                lines.append(f'{key} is {found[key]!r}, not {value!r}: {source}')
        elif key.startswith('test.') and not metric or of_a_model(key):
            continue  # a run without a number has no test; other models have fewer fields
        elif value is not None:
            lines.append(f'{key} is missing, not {value!r}: {source}')
    for key, value in found.items():
        allowed = [*choices.get(key, ()), *([wanted[key].value] if key in wanted else ())]
        if key in choices and not any(same(value, one) for one in allowed):
            lines.append(f'{key} is {value!r}, which is not in the grid')
        if key not in (*wanted, *choices) and not FREE.fullmatch(key) and (
            key != 'upstream' or value is not None
        ):
            lines.append(f'{key} is {value!r}, of which the protocol says nothing')
    return lines


def same_grid(grid, value):
    """Whether a grid is a list of points, or the product of {key: its values, or their number}.

    'KEY,KEY' are keys that vary together; each of its values is a list.
    """
    if not isinstance(value, dict):
        return list(grid) == list(value)
    names = {name for key in value for name in key.split(',')}
    if not all(set(point) == names for point in grid):
        return False
    points = [
        {key: [p[k] for k in key.split(',')] if ',' in key else p[key] for key in value}
        for p in grid
    ]
    distinct = {key: list({str(p[key]): p[key] for p in points}.values()) for key in value}
    sizes = [n if isinstance(n, int) else len(n) for n in value.values()]
    return (
        len({str(point) for point in points}) == len(grid)
        and all(len(distinct[key]) == n for key, n in zip(value, sizes, strict=True))
        and all(distinct[k] == v for k, v in value.items() if not isinstance(v, int))
        and len(grid) == math.prod(sizes)
    )


def same(found, value):
    """Whether two values are equal, numbers up to rounding."""
    if isinstance(found, float) and isinstance(value, int | float):
        return found == pytest.approx(value, rel=1e-6)
    return found == value


@functools.cache
def vit_fields():
    """Names of the fields of a ViT, of which other models have fewer."""
    return set(completed('pretrain', 'b/16')['model'])


def of_a_model(key):
    """Whether a key is a field of a ViT, or one of its group of fields, or one of BiT."""
    section, _, field = key.partition('.')
    return section == 'model' and field.split('.')[0] in (*vit_fields(), 'kernel_epsilon')


@pytest.fixture(scope='module')
def known():
    return tables.recipes()


def runs(name, arg):
    """[(name of a number, its metric)] of a recipe, or [('FILE:ARG', None)]."""
    whole = f'{name}.py:{arg}'
    if protocols.covering(whole):
        return [(whole, None)]
    rows = recipes.given(name, arg)['expected']
    return [(protocols.cell_name(row['cell']), row['metric']) for row in rows]


def check(name, args, known):
    """Asserts that recipes have the settings of their protocols."""
    wrong = []
    for arg in args:
        begin = completed(name, arg)['init_from']  # or an error for a typo
        public = begin in catalogue() or begin and begin.startswith('gs://vit_models/augreg/')
        assert begin is None or begin in known[1] or public, (arg, begin)
        numbers = runs(name, arg)
        assert numbers, f'{name}:{arg} has neither a number nor a protocol'
        for cell, metric in numbers:
            protocol = protocols.covering(cell)
            if protocol is None:
                wrong.append(f'{name}:{arg} [{cell}]: no protocol')
                continue
            wanted = protocols.settings(protocol, cell)
            lines = differences(completed(name, arg), wanted, metric, known[1])
            wrong += [f'{name}:{arg} [{cell}]: {line}' for line in lines]
    assert not wrong, f'{len(wrong)}\n' + '\n'.join(wrong)


@pytest.mark.parametrize('name', recipes.PUBLISHED)
def test_recipes_follow_their_protocols(name, known):
    args = recipes.module(name).ARGS
    if name == 'augreg':  # each pair of model and data, each point of the grid
        args = [a for a in args if a.count('-') == 1 or a.startswith('s/16-i1k300')]
    check(name, args, known)


@pytest.mark.slow
def test_every_point_of_the_grid_follows_its_protocol(known):
    check('augreg', recipes.module('augreg').ARGS, known)


@pytest.mark.parametrize('name', ['imagenet', *recipes.OWN])
def test_recipes_without_a_protocol_have_no_typo(name):
    for arg in recipes.module(name).ARGS:
        values = recipes.given(name, arg)
        values['model'].setdefault('name', 'vit-b/16')
        config.complete(values)


def test_a_number_has_one_protocol_or_none(known):
    assert protocols.covering('study: vit-m; digits') is None
    for cell in known[0]:
        if cell[0] not in recipes.OWN:
            assert protocols.covering(protocols.cell_name(cell)) or 'FLOPs' in cell[2] or (
                cell[0] in ('vit.table2', 'scalingvit.g14_verified', 'augreg.figure4')
                or 'i1k_up' in cell[2]
            ), cell
