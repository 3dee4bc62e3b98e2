"""Settings: every key is read, every mistake named, every default written down."""

import json
import pathlib
import subprocess
import sys

import launched
import numpy as np
import pytest

from vit_jax import config, models
from vit_jax.errors import UserError
from vit_jax.objectives import Examples, supervised
from vit_jax.run import changes

EXPERIMENTS = sorted((launched.TINY.parents[1] / 'experiments').glob('*.py'))
CHECKPOINT = pathlib.Path(__file__).with_name('data') / 'official_vit_prelogits.npz'


def load(*overrides):
    return config.load(f'{launched.TINY}:/images', [o.split('=', 1) for o in overrides])


def test_defaults_are_filled_in_and_overrides_taken():
    full = load('optim.lr=1e-2', 'checkpoint.best=val/accuracy', 'data.view.flip=false',
                'model.patch_size=(2, 4)', 'evals.val.view=central', 'evals.more.source.name=/x')
    assert full.optim.lr == 0.01 and full.optim.b2 == 0.999  # given here; nowhere given
    assert full.checkpoint.best == 'val/accuracy' and full.checkpoint.every == 7
    assert full.data.view.to_dict() == dict(name='shift', pixels=1, flip=False)
    assert full.model.patch_size == (2, 4) and full.model.gelu == 'tanh' and full.model.depth == 2
    assert full.evals.val.view == 'central' and full.evals.val.image_size == 8
    assert full.evals.more.source.split == 'train' and full.evals.more.batch_size == 8


def test_a_view_that_was_a_name_gets_arguments():
    full = load('data.view=inception', 'data.view.name=inception', 'data.view.flip=false')
    assert full.data.view.to_dict() == dict(
        name='inception', area=(0.05, 1.0), aspect=(0.75, 1.33), flip=False, method='bilinear',
        antialias=True,
    )  # fmt: skip


def test_augmentations_and_mixtures_are_checked_as_the_view_is():
    given = json.loads(json.dumps(load().to_dict()))
    given['data']['augment'] = ['autoaugment', {'name': 'randaugment', 'magnitude': 15}]
    parts = {'a': {'name': '/x'}, 'b': {'name': '/y', 'weight': 3}}
    given['data']['source'] = {'mixture': parts}
    full = config.complete(given)
    assert full.data.augment == ('autoaugment', dict(name='randaugment', layers=2, magnitude=15))
    assert full.data.source.mixture.b.to_dict() == dict(
        name='/y', split='train', data_dir=None, image='image', label='label', labels='by_name',
        weight=3,
    )
    again = config.override(full.to_dict(), [('data.source.mixture.a.weight', '2.5')])
    assert again.data.source.mixture.a.weight == 2.5
    for key, value, words in (
        ('augment', [{'name': 'randaugment', 'layer': 2}], r'augment\[0\].layer; .*\[0\].layers'),
        ('augment', ['randaug'], "no augmentation 'randaug'; there are autoaugment"),
        ('source', {'mixture': {'a': {'name': '/x', 'wait': 1}}}, 'mixture.a.wait; .*weight'),
        ('source', {'mixture': {'a': {'name': '/x', 'weight': 0}}}, 'is 0, not float above 0'),
        ('source', {'mixture': parts, 'name': '/x'}, 'no key is beside it'),
    ):
        with pytest.raises(UserError, match=words):
            config.complete(given | {'data': given['data'] | {key: value}})


def test_complete_reads_back_what_it_wrote():
    full = load()
    again = config.complete(json.loads(json.dumps(full.to_dict())))
    assert changes.differences(full.to_dict(), again.to_dict(), config.may_change) == []


@pytest.mark.parametrize('override, words', [
    ('optim.lrr=3', 'unknown key optim.lrr; the nearest valid key is optim.lr'),
    ('optimm.lr=3', 'unknown key optimm; the nearest valid key is optim'),
    ('sed=3', 'unknown key sed; the nearest valid key is seed'),
    ('model.widht=3', 'unknown key model.widht; the nearest valid key is model.width'),
    ('data.sauce.name=x', 'unknown key data.sauce; the nearest valid key is data.source'),
    ('data.source.nme=x', 'unknown key data.source.nme; .* data.source.name'),
    ('data.view.pixls=2', 'unknown key data.view.pixls; the nearest valid key is data.view.pixels'),
    ('evals.val.evry=2', 'unknown key evals.val.evry; the nearest valid key is evals.val.every'),
    ('optim.lr=fast', "optim.lr is 'fast', not float"),
    ('optim.ema=x', r"optim.ema is 'x', not float in \[0, 1\) or None"),
    ('data.batch_size=8.5', 'data.batch_size is 8.5, not int'),
    ('data.view.flip=3', 'data.view.flip is 3, not bool'),
    ('data.batch_size=0', 'data.batch_size is 0, not int above 0'),
    (f'data.batch_size={10**30}', f'is {10**30}, not int above 0, of at most 64 bits$'),
    (f'checkpoint.keep={-10**30}', 'not int above 0, of at most 64 bits$'),
    (f'steps={10**30}', r'not int in \[1, 2147483647\] or None$'),
    ('data.image_size=(8, -8)', r'image_size is \(8, -8\), not int in \[1, 65536\] or \(int in'),
    ('checkpoint.mode=most', "checkpoint.mode is 'most', not one of max, min"),
    ('checkpoint.keep=0', 'checkpoint.keep is 0, not int above 0'),
    ('model.dropout=1.5', r'model.dropout is 1.5, not float in \[0, 1\)'),
    ('optim=3', 'optim is 3, not a section'),
    ('evals.val=3', 'evals.val is 3, not a section'),
    ('model.name=vit-q/16', "no model 'vit-q/16'"),
    ('data.view=blur', "no view 'blur'; there are affine, central"),
    ('data.view.name=blur', "no view 'blur'; there are affine, central"),
    ('data.view={"pixels": 1}', 'config data.view has no name; there are affine, central'),
    ('data.augment=[{"layers": 2}]', r'config data.augment\[0\] has no name; there are autoaug'),
])
def test_mistakes_are_named(override, words):
    with pytest.raises(UserError, match=words):
        load(override)


@pytest.mark.parametrize('section, words', [
    ({}, r"config has neither model.name \(as 'vit-b/16'\) nor init_from"),
    ({'model': {'name': 3}}, "model.name is 3, not a name as 'vit-b/16'"),
    ({'model': {'name': 'vit-ti/4'}}, r'config has no data\.'),
])
def test_what_must_be_given_is_asked_for(section, words):
    with pytest.raises(UserError, match=words):
        config.complete(section)


def test_steps_or_epochs_must_be_given():
    with pytest.raises(UserError, match='neither steps nor epochs'):
        load('steps=None')


def test_differences_that_change_the_result_are_told_apart():
    found = changes.differences(
        load().to_dict(), load('optim.lr=1', 'report.every=2', 'evals.val.every=3').to_dict(),
        config.may_change,
    )  # fmt: skip
    assert found == [
        ('evals.val.every', 20, 3, False), ('optim.lr', 3e-3, 1, True),
        ('report.every', 1, 2, False),
    ]
    table = changes.table(found).splitlines()
    assert table[2].split() == ['optim.lr', '0.003', '1', 'changes', 'the', 'result']


def test_the_settings_in_the_docs_are_accepted():
    text = (pathlib.Path(__file__).parents[1] / 'docs' / 'data.md').read_text()
    block = text[text.index('\ndata = dict(') : text.index('```', text.index('\ndata = dict('))]
    given = {}
    exec(block.replace(', ...', ', image_size=224, batch_size=48'), given)
    sections = {name: given[name] for name in ('data', 'objective')}
    full = config.complete({'steps': 1, 'model': {'name': 'vit-ti/16'}} | sections)
    options = config.settings_of(full.objective, supervised.supervised)
    copies = Examples({'image': np.zeros((224, 224, 3))}, copies=full.data.repeats)
    supervised.supervised(models.build('vit-ti/16'), copies, **options)
    assert full.data.repeats == 3 and full.data.source.mixture.a.weight == 3.0


@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda p: p.stem)
def test_experiments_are_complete(path):
    argument = ':/images' if path.stem == 'folder' else ''
    needs = path.stem in ('finetune', 'fashion_2k', 'imagenet', 'emoji')
    begin = [('init_from', str(CHECKPOINT))] if needs else []
    full = config.load(f'{path}{argument}', begin)
    assert full.evals and path.read_text().startswith('"""')
    for row in full.expected:
        assert row['metric'] and row['value'] and row['source']


@pytest.mark.parametrize('flags, words', [
    (['--config.optim.lrr=3'], 'unknown key optim.lrr; the nearest valid key is optim.lr'),
    (['--config.optim.lr', '3'], 'write --config.optim.lr=VALUE'),
    (['--wrkdir=x'], "Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
    (['surplus'], "unexpected argument 'surplus'"),
    (['--workdir='], '--workdir'),
])
def test_the_command_line_says_it_in_one_line(flags, words, tmp_path):
    run = subprocess.run(
        [*launched.command('/images', tmp_path / 'run'), *flags], capture_output=True, text=True
    )
    assert run.returncode == 2 and words in run.stderr
    assert run.stderr.startswith('error: ') and run.stderr.count('\n') == 1, run.stderr
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('command, words', [
    ('main --help', ('--config', '--workdir', '--[no]allow_config_change', 'Exit status')),
    ('compare --help', ('compare A B', '--metric', '--out', '--[no]force')),
])
def test_help_names_the_flags(command, words):
    run = subprocess.run(
        [sys.executable, '-m', *f'vit_jax.{command}'.split()], capture_output=True, text=True
    )
    assert run.returncode == 0 and not run.stderr
    assert all(word in run.stdout for word in words)


@pytest.mark.parametrize('key, may_change', [
    ('data.threads', True), ('data.tolerance', True), ('data.source.data_dir', True),
    ('data.source.mixture.a.data_dir', True), ('data.source.name', False), ('expected', True),
    ('data.batch_size', False), ('data.view', False), ('seed', False), ('optim.lr', False),
    ('mesh.fsdp', True), ('checkpoint.best', True), ('objective.loss', False), ('no.key', False),
])
def test_settings_that_may_change_when_a_run_resumes_are_marked(key, may_change):
    assert config.may_change(key) == may_change
