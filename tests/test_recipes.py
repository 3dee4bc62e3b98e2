"""Recipes: each builds at its full size, is what its source says, and trains at a toy size."""

import itertools
import re

import jax
import pytest
import recipes

from vit_jax import config
from vit_jax.convert.load import catalogue
from vit_jax.data import distort
from vit_jax.distributed import devices
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.plan import data_sets, estimate, rehearsal
from vit_jax.tables import published
from vit_jax.tables import recipes as tables
from vit_jax.train import train


@pytest.fixture(scope='module')
def known():
    return tables.recipes()


def test_a_run_that_others_begin_from_is_a_recipe_of_the_same_model(known):
    _, places = known
    begun = [one for one in places.values() if one.begins]
    assert len(begun) > 150
    for one in begun:
        befores = [places[begin] for begin in one.begins]  # or there is no such recipe
        assert not any(before.begins for before in befores)
        models = {
            recipes.given(r.file.split('/')[1][:-3], r.arg)['model']['name']
            for r in (one, *befores)
        }
        assert len(models) == 1


def test_expected_numbers_are_those_of_the_tables(known):
    cells, _ = known
    assert len(cells) > 555
    for cell, recipe in cells.items():
        found = published.table(cell[0])
        value = published.number(published.row_of(found, cell[1])[found.columns.index(cell[2])])
        rows = recipes.given(recipe.file.split('/')[1][:-3], recipe.arg)['expected']
        row = next(r for r in rows if tables.key_of(r['cell']) == cell)
        assert row['value'] / row['scale'] == pytest.approx(value.value, abs=1e-3)
        assert row['source'] == found.source


def one_of_each():
    """{file: one argument for each model and image size that no file before has}."""
    found, seen = {}, set()
    for name in recipes.PUBLISHED:
        for arg in recipes.module(name).ARGS:
            values = recipes.given(name, arg)
            model, size = values['model'], values['data']['image_size']
            size = None if model['name'].startswith('bit') else size  # no array depends on it
            key = model['name'], model.get('posemb'), size
            if key not in seen or name not in found:
                found.setdefault(name, []).append(arg)
            seen.add(key)
    return found


@pytest.mark.parametrize('name, arg', [
    *(('pretrain', a) for a in ('h/14', 'r50x1', 'l/16-i21k', 'G/14')),
    ('posemb', '2d-layers'), ('augreg', 'r+ti/16-i1k300'), ('vit_s16_i1k', '90'),
    ('finetune', 'cifar10,h/14'), ('finetune', 'imagenet2012,r50+b/16-i21k'),
    ('finetune', 'cifar10,mixer/b_16-i1k,224'), ('finetune', 'vtab:kitti_distance,l/16-i21k'),
    ('finetune', 'imagenet2012,h/14,512,polyak'),
    ('dino', 's/16,300'), ('deit', 'ti/16,tokens'), ('deit3', 'h/14,154'), ('deit3', 'b/16'),
    ('siglip', 'so400m/14'), ('lit', 'l/16'), ('clip', 'l/14'),
])  # fmt: skip
def test_builds_at_its_full_size(name, arg):
    text = rehearsal.describe(config.complete(recipes.given(name, arg)), 'runs/x')
    assert 'parameters' in text and 'exaFLOPs' in text


@pytest.mark.slow
@pytest.mark.parametrize('name', recipes.PUBLISHED)
def test_every_model_builds_at_its_full_size(name):
    for arg in one_of_each()[name]:
        rehearsal.describe(config.complete(recipes.given(name, arg)), 'runs/x')


TOYS = [
    *(('pretrain', a) for a in ('b/16-i1k', 'r50x1-sgd', 'G/14')), ('posemb', 'rel'),
    ('augreg', 's/16-i1k300-strong2-wd_0.03-do_0.1'), ('vit_s16_i1k', '90'), ('mixer_i1k', '60'),
    ('finetune', 'imagenet2012,l/16-i21k,512,polyak'), ('finetune', 'vtab:svhn,l/16'),
    ('finetune_augreg', 'kitti_distance,s/16-i21k300,grid'), ('transfer', 'cifar100'),
    ('mae', 'l/16,block75'), ('finetune_mae', 'b/16,repo'),
    ('mae_probe', 'b/16'),
    ('finetune_readme', 'cifar10,mixer/b_16-i1k'), ('study', 'vit-m,20k'),
    ('study', 'digits,resnet-m,5k'), ('ssl_study', 'next_patch,jft'), ('dino', 's/16,300'),
    ('dino_probe', 'b/16,400'), ('aim', '0.6b'), ('aim', '0.6b,probe'), ('deit', 's/16,tokens'),
    ('deit3', 's/16'), ('dinov2_ade20k', 's/14'), ('dinov2_ade20k', 'g/14,ms'),
    ('eomt', 'ade20k,l/16'), ('eomt', 'coco,s/16'), ('eomt', 'instances,l/16'),
    ('yolos', 's/16'),
    ('segmenter', 'b/16,mask'), ('segmenter', 'deit-b/16,linear'), ('siglip', 'b/16'),
    ('siglip', 'b/16,unlocked'), ('lit', 'b/16'), ('clip', 'b/32'),
]  # fmt: skip


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp('tfds'))


@pytest.mark.slow
@pytest.mark.parametrize('name, arg', TOYS)
def test_plans_and_trains_two_steps_at_a_toy_size(tmp_path, data_dir, name, arg):
    values = recipes.toy(recipes.given(name, arg), data_dir)
    full = config.complete(values)
    source, _ = data_sets.load(full.data.source)
    peaks = devices.DEVICES['TPU v4']  # those of a CPU would be measured
    plan = estimate.plan(full, source, jax.devices(), 'cpu:8', efficiency=0.5, peaks=peaks)
    assert plan['memory']['fits'] and plan['seconds']['step'] > 0
    result = train(full, tmp_path / 'run', Stop())
    assert result['steps'] == 2 and result['metrics']['param_norm'] > 0
    measured = [row for row in result['expected'] if row['measured'] is not None]
    wanted = {row['metric'] for row in result['expected']} - {'tpu_core_days'}
    assert {row['metric'] for row in measured} == wanted  # each is a metric that the run has


def test_recipes_are_what_the_papers_say():
    """Against arXiv:2010.11929 table 3, as data."""
    names = {'JFT-300M': '', 'ImageNet-21k': '-i21k', 'ImageNet': '-i1k'}
    table = published.table('vit.table3')
    seen = 0
    for models, data, epochs, lr, schedule, decay, dropout in table.rows:
        base, power = (lr if ' x ' in lr else f'1 x {lr}').split(' x 10^')
        rate = float(base) * 10 ** float(power)
        for arg in args_of(models, names[data]):
            values = recipes.given('pretrain', arg)
            assert str(values['epochs']) in epochs.split('/'), arg
            assert values['optim']['lr'] == pytest.approx(rate), arg
            assert values['optim']['schedule'] == schedule
            assert values['optim']['weight_decay'] == float(decay)
            assert values['model'].get('dropout', 0.0) == float(dropout)
            assert values['data']['batch_size'] == 4096 and values['optim']['warmup'] == 10_000
            assert values['optim'].get('clip') == (1.0 if data == 'ImageNet' else None)
            seen += 1
    assert seen >= 20


def args_of(models, data):
    """['b/16', 'b/32'] of 'ViT-B/{16,32}', and likewise of ResNets and hybrids."""
    if models == 'ViT-*':
        return [f'{m}{data}' for m in ('b/16', 'b/32', 'l/16', 'l/32')]
    head, _, rest = models.partition('{')
    tails = rest.rstrip('}').split(',') if rest else ['']
    names = [head.replace('ViT-', '').lower() + tail for tail in tails]
    return [f'{name}{data}' for name in names]


def test_augreg_is_the_grid_of_the_paper():
    found = recipes.module('augreg')
    assert len(found.GRID) == 28 and len(set(found.ARGS)) == 27 + 27 * 28
    values = recipes.given('augreg', 's/16-i21k300')  # its best, by the name of its checkpoint
    assert values['optim']['weight_decay'] == 0.03 and values['model']['drop_path'] == 0.0
    assert values['data']['augment'] == distort.AUGREG['light2']['augment']
    best = {name: one['address'] for name, one in catalogue().items()}
    for pair, point in found.BEST.items():
        model, data = pair.split('-')
        if data == 'i21k300':
            name = f'augreg/{model.replace("/", "_").replace("+", "_")}-i21k'
            point = point.replace('light2', 'light1')  # the file's word for it
            assert f'aug_{point}' in best[name] and f'sd_{point[-3:]}' in best[name]


def test_augreg_fine_tunes_by_the_sweep_of_the_paper():
    """Against arXiv:2106.10270 table 4, as data; the word grid has it for each upstream model."""
    names = dict(zip(('imagenet2012', 'oxford_iiit_pet', 'kitti_distance', 'cifar100', 'resisc45'),
                     published.table('augreg.table4').rows, strict=True))  # fmt: skip
    for name, (_, rates, lengths) in names.items():
        rates = [float(x) for x in rates.strip('{}').split(',')]
        lengths = [
            (float(n) * (1000 if kilo else 1), int(warmup))
            for n, kilo, warmup in re.findall(r'\(([\d.]+)(k?),(\d+)\)', lengths)
        ]
        plain, grid = (
            recipes.given('finetune_augreg', f'{name},b/32-i21k300{words}')
            for words in (',224', ',224,grid')
        )
        swept = list(itertools.product(lengths, rates))
        assert settings_of(plain) == swept, name
        assert settings_of(grid) == swept * 28, name
        starts = {point['init_from'] for point in grid['select']['grid']}
        best = catalogue()[plain['init_from']]['address']
        assert len(starts) == 28 and best in starts and grid['init_from'] == best
        assert plain['select']['metric'] == grid['select']['metric'] == 'val/accuracy'
        assert plain['data'] == grid['data'] and plain['optim'] == grid['optim']


def settings_of(values):
    """[((steps, warm-up), rate)] of a recipe's grid."""
    own = {'steps': values['steps'], 'optim.warmup': values['optim']['warmup']}
    points = [own | point for point in values['select']['grid']]
    return [((p['steps'], p['optim.warmup']), p['optim.lr']) for p in points]


def test_every_combination_of_words_is_a_run_or_one_clear_error():
    """Data sets and starts that no table combines too, where claims once were sought by name."""
    found = recipes.module('finetune')
    starts = (*found.OWN, *found.OTHERS, 'augreg:s/16-i1k300', 'augreg/zz', 'h/14-i1k', 'zz')
    words = ('', ',224', ',512,polyak', ',dropout', ',crop,v2', ',objectnet,steps=50', ',224,512')
    runs = 0
    for data in ('cifar10', 'imagenet2012', 'vtab:svhn', 'resisc45', 'vtab:zz'):
        for start, word in itertools.product(starts, words):
            arg = f'{data},{start}{word}'
            try:
                values = found.get_config(arg).to_dict()
            except UserError as e:
                assert '\n' not in str(e)
                assert {data, start} & {'vtab:zz', 'augreg/zz', 'h/14-i1k', 'zz'} or (
                    word == ',224,512' or 'dropout' in word and start.startswith('r')
                ), (arg, e)  # fmt: skip
                continue
            assert arg in found.ARGS or not values['expected']
            runs += 1
    assert runs > 1000


@pytest.mark.slow
def test_learns_in_200_steps_of_fine_tuning(tmp_path, data_dir):
    """Digits by a rate of the grid, BiT's crops and the published momentum: 65%, 10% by chance."""
    values = recipes.toy(recipes.given('finetune', 'cifar10,r50x1,crop'), data_dir, 200, 'test')
    values['data']['batch_size'] = 16
    values['optim'] |= dict(lr=0.03, warmup=20)
    result = train(config.complete(values | dict(expected=())), tmp_path / 'run', Stop())
    assert result['metrics']['test/accuracy'] > 0.4
