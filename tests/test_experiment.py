"""Experiment files are the user's own code: what goes wrong in them is theirs, told in one line."""

import random
import subprocess
import sys

import launched
import pytest

from vit_jax import config
from vit_jax.errors import UserError
from vit_jax.io import experiment

EXPERIMENTS = launched.TINY.parents[1] / 'experiments'


@pytest.mark.parametrize('text, arg, words', [
    ('def get_config(:', '', r'x\.py, line 1: SyntaxError'),
    ('import json\nimport nosuch\n', '', r"x\.py, line 2: ModuleNotFoundError: No module named"),
    ('def get_config():\n    return {}[3]\n', '', r'x\.py, line 2: KeyError: 3'),
    ('import sys\nsys.exit(0)\n', '', r'x\.py, line 2: SystemExit: 0'),
    ('def get_config():\n    return get_config()\n', '', r'x\.py, line 2: RecursionError'),
    ('def get_config():\n    return 3\n', '', 'returns 3, not a ConfigDict'),
    ('def get_config():\n    pass\n', '', 'returns None, not a ConfigDict'),
    ('def get_config():\n    return {1: 2}\n', '', 'unknown key 1'),
    ('def get_config(a, b):\n    return {}\n', 'a', 'does not take one argument'),
    ('def get_config(*, a):\n    return {}\n', '', 'does not take one argument'),
    ('get_config = 3\n', '', r'has no function get_config\(\)'),
    ('def get_config():\n    return {}\n', 'foo', "takes no argument, not 'foo'"),
    ('def get_config(path):\n    return {}\n', '', r'needs an argument .* x\.py:PATH|x\.py:PATH'),
    ('def get_config():\n    return dict(steps=1, evals={"a.b": {}}, model=dict(name="vit-b/16"), '
     'data=dict(source=dict(name="x"), view="resize", image_size=8, batch_size=8))\n', '',
     "has the name 'a.b'"),
])  # fmt: skip
def test_a_mistake_in_an_experiment_is_one_line_of_its_own(tmp_path, text, arg, words):
    file = tmp_path / 'x.py'
    file.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        config.load(f'{file}:{arg}' if arg else str(file))
    first, *frames = str(error.value).splitlines()
    assert str(file) in first or first.startswith('config ')
    assert bool(frames) == error.value.several_lines
    assert all('x.py' in line for line in frames if line.startswith('  File'))


def test_the_command_shows_the_users_frames_alone_and_is_not_started_again(tmp_path):
    (tmp_path / 'lib.py').write_text('import json\n\n\ndef read():\n    return json.loads("{")\n')
    file = tmp_path / 'x.py'
    file.write_text('import lib\n\n\ndef get_config():\n    return lib.read()\n')
    run = subprocess.run(
        [sys.executable, '-m', 'vit_jax.main', f'--config={file}', f'--workdir={tmp_path}/run'],
        capture_output=True, text=True, env=launched.ENVIRONMENT | {'PYTHONPATH': str(tmp_path)},
    )  # fmt: skip
    lines = run.stderr.splitlines()
    assert run.returncode == 2, run.stderr
    assert lines[0].startswith(f'error: {tmp_path}/lib.py, line 5: JSONDecodeError: Expecting')
    files = [line.split('"')[1] for line in lines if line.startswith('  File')]
    assert files == [f'{tmp_path}/x.py', f'{tmp_path}/lib.py']


@pytest.mark.parametrize('name', [
    'digits.py:foo', 'folder.py', 'folder.py:', 'pretrain.py:zz', 'pretrain.py:G/14-i21k',
    'posemb.py:zz', 'study.py:vit,5k', 'augreg.py:zz', 'imagenet.py:zz', 'fashion_2k.py:zz',
    'finetune_augreg.py:vtab:svhn,s/16-i21k300,grid', 'finetune_augreg.py:cifar10,s/16-i21k300',
    'finetune_augreg.py:resisc45,s/16-i1k300,grid', 'finetune_augreg.py:resisc45',
    'finetune_augreg.py:imagenet2012,s/16-i21k300,grid,v2',
    'finetune.py:cifar10,b/16-i21k,zz', 'finetune.py:cifar10,b/16,steps=', 'vit_s16_i1k.py:91',
])  # fmt: skip
def test_recipes_refuse_an_argument_that_they_do_not_know(name):
    with pytest.raises(UserError):
        config.load(f'{EXPERIMENTS}/{name}')


def test_a_path_may_have_commas_and_colons(tmp_path):
    folder = tmp_path / 'a,b:c'
    (folder / 'dog').mkdir(parents=True)
    given = experiment.read(f'{EXPERIMENTS}/finetune.py:{folder},b/16-i21k,224')
    assert given['data']['source']['name'] == str(folder) and given['data']['image_size'] == 224
    file = folder / 'x.py'
    file.write_text('def get_config(arg):\n    return dict(init_from=arg)\n')
    assert experiment.read(f'{file}:gs://a/b') == dict(init_from='gs://a/b')


def test_a_task_that_no_table_has_is_still_a_run():
    given = experiment.read(f'{EXPERIMENTS}/finetune.py:vtab:svhn,b/16-i21k')
    assert given['expected'] == [] and given['init_from'] == 'vit/b_16-i21k'


def test_steps_on_the_command_line_stand_in_for_epochs(caplog):
    digits = f'{EXPERIMENTS}/digits.py'
    full = config.load(digits, [('steps', '5')])
    assert full.steps == 5 and full.epochs is None
    assert 'steps is given: epochs=70 is not used' in caplog.text
    assert config.load(f'{launched.TINY}:/x', [('epochs', '5')]).steps is None
    for given in [('steps', '5'), ('epochs', '3')], [('steps', 'None'), ('epochs', 'None')]:
        with pytest.raises(UserError, match='both steps|neither steps'):
            config.load(digits, given)
    with pytest.raises(UserError, match=r'both steps \(60\) and epochs \(2\); leave one out'):
        config.complete(experiment.read(f'{launched.TINY}:/x') | dict(epochs=2))


KEYS = (
    'seed', 'steps', 'expected', 'evals', 'evals.val', 'evals.', 'evals.é.source.name', 'data.view',
    'data.view.name', 'data.view.area', 'data.augment', 'data.augment.0.layers', 'optim.lr.x',
    'model.name', 'model.patch_size', 'data.source', 'data.source.mixture', '', '.', 'a..b', 'mesh',
    'data.source.mixture.a.b.c', 'checkpoint.best', 'init_from.x', 'evals.val.type', 'optim.decay',
    'data.source.name', 'objective', 'model', 'evals.a b.source.name', 'evals.val.source',
)  # fmt: skip
TEXTS = (
    '', ' ', '()', '[]', '{}', '{1: 2}', '{[]: 1}', '(' * 1000, '[' * 100_000, '-' * 10_000 + '1',
    '9' * 5000, '1e999', 'nan', '-inf', '1j', 'b"x"', '{1, 2}', '...', '"\\d"', '1 .real', '\0',
    '\n', 'None', 'true', '[None]', '((1, 2), 3)', '{"name": []}', '{"name": 3}',
    '{"name": "inception", "area": 3}',
    '{"a": {}}', '{"a": {"name": "/x", "weight": -1}}', '[{"metric": 1}]', '[3]', '[{}]', '\udcff',
    "{'mixture': 3}", "{'mixture': {'a': 3}}", "{'mixture': {'': {'name': 'x'}}}", 'vit-b/0',
    "{'type': []}", '10' * 20, '-1', '0', '2**3', '1_0', '0x', "{'source': 3}", "('(', '[')",
)  # fmt: skip


def test_any_override_is_taken_or_a_mistake_of_one_line():
    draw = random.Random(0)
    given = [(key, text) for key in KEYS for text in TEXTS]
    refused = 0
    for key, text in given:
        overrides = [(key, text), *draw.sample(given, draw.randrange(2))]
        try:
            config.load(f'{launched.TINY}:/images', overrides)
        except UserError as e:
            refused += 1
            assert len(str(e)) < 2000, overrides
    assert refused > len(given) / 2
