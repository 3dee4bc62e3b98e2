"""Tables: what is published beside what runs have measured, and the commands of the rest."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import recipes

from vit_jax import config
from vit_jax.data.readers import vtab
from vit_jax.errors import UserError
from vit_jax.plan import rehearsal
from vit_jax.run import results, workdir
from vit_jax.tables import cells, costs, published, typeset
from vit_jax.tables import recipes as known_recipes


@pytest.fixture(scope='module')
def known():
    return known_recipes.recipes()


def finished(folder, name, arg, metrics, seed=0, **result):
    """A run's folder as train leaves it, with `metrics` in place of a training."""
    full = config.complete(recipes.given(name, arg) | dict(seed=seed))
    path = folder / f'{name}-{arg.replace("/", "_")}-{seed}'
    path.mkdir(parents=True)
    result = dict(
        metrics=metrics, steps=10, examples_seen=5120, seconds=7200.0, images_per_s=100.0,
        flops_per_image=1e12, device_kind='TPU v3', device_count=8,
    ) | result  # fmt: skip
    result['costs'] = results.costs(result)
    result['expected'] = results.judge(
        full.expected, metrics | result['costs'], config.better(full)
    )
    workdir.write_json(path / 'config.json', full.to_dict())
    workdir.write_json(path / 'result.json', result)
    return path


def cell(rows, label, column):
    return next(c for c in typeset.cells_of(rows) if (c.label, c.column) == (label, column))


def rows_of(name, folder, known):
    found = cells.measured(workdir.finished([folder]))
    return cells.grid_of(published.table(name), found, known[0])


def test_seeds_are_averaged_and_stand_beside_what_is_published(tmp_path, known):
    for seed, accuracy in enumerate((0.989, 0.990, 0.9884)):
        finished(tmp_path, 'finetune', 'cifar10,b/16', {'test/accuracy': accuracy}, seed)
    rows = rows_of('vit.table5', tmp_path, known)
    one = cell(rows, ('JFT-300M', 'CIFAR-10'), 'ViT-B/16')
    scores = np.array([98.9, 99.0, 98.84])
    assert one.value == 99.0 and one.mean == pytest.approx(scores.mean())
    assert one.deviation == pytest.approx(scores.std(ddof=1)) and len(one.found) == 3
    assert one.difference == pytest.approx(scores.mean() - 99.0)
    assert one.beside() == '98.91 ± 0.08 (3), -0.09'
    # The same runs are in the table of costs, and in no other place of this one.
    other = cell(rows_of('vit.table6', tmp_path, known), ('ViT-B/16', 7), 'CIFAR-10')
    assert len(other.found) == 3
    assert sum(bool(c.found) for c in typeset.cells_of(rows)) == 1


def test_every_format_has_the_number_and_leaves_empty_places_empty(tmp_path, known):
    finished(tmp_path, 'finetune', 'cifar10,b/16', {'test/accuracy': 0.991})
    table, rows = published.table('vit.table6'), rows_of('vit.table6', tmp_path, known)
    for form in typeset.FORMATS.values():
        assert '99.10' in form(table, rows) or '99.1' in form(table, rows)
    markdown = typeset.markdown(table, rows).splitlines()
    line = next(row for row in markdown if row.startswith('| ViT-B/16 '))
    assert line == (
        '| ViT-B/16 | 7 | 84.15<br> | 88.85<br> | 99.0<br>99.10, +0.10 | 91.87<br> | 95.8<br> '
        '| 99.56<br> | 224<br> |'
    )
    lines = list(csv.DictReader(typeset.comma_separated(table, rows).splitlines()))
    assert len(lines) == 18 * 7
    measured = [row for row in lines if row['measured']]
    assert [(row['row'], row['column'], row['seeds']) for row in measured] == [
        ('ViT-B/16, 7', 'CIFAR-10', '1')
    ]
    assert float(measured[0]['device_hours']) == 16
    assert all(row['measured'] == row['runs'] == '' for row in lines if row['seeds'] == '0')
    assert all(row['recipe'].startswith('experiments/') for row in lines)


def test_costs_are_in_the_units_of_the_papers():
    """arXiv:2010.11929: 3 forward passes an image; a TPU v3 device is a core."""
    result = dict(seconds=86_400.0, device_count=8, device_kind='TPU v3', flops_per_image=35.2e9,
                  examples_seen=7 * 303_000_000)  # fmt: skip
    costs = results.costs(result)
    assert costs['exaflops'] == pytest.approx(224, rel=0.01)  # B/16, table 6
    assert costs['tpu_core_days'] == 8 and costs['device_hours'] == 192
    v4 = results.costs(result | {'device_kind': 'TPU v4'})
    assert v4.keys() == results.COSTS.keys()
    assert v4['tpu_core_days'] == 16  # two cores a device
    assert 'tpu_core_days' not in results.costs(result | {'device_kind': 'cpu'})


def test_the_mean_of_vtab_needs_all_its_tasks(tmp_path, known):
    table = published.table('vit.table9')
    row = next(r for r in table.rows if r[0] == 'ViT-H/14 (JFT)')
    for task, value in list(zip(vtab.TASKS, row[1:-1], strict=True))[:-1]:
        metrics = {'test/accuracy': value / 100}
        finished(tmp_path, 'finetune', f'vtab:{task},h/14', metrics)
    rows = rows_of('vit.table9', tmp_path, known)
    assert 'Mean' not in {c.column for c in typeset.cells_of(rows)}
    last = list(vtab.TASKS)[-1]
    finished(tmp_path, 'finetune', f'vtab:{last},h/14', {'test/accuracy': row[-2] / 100})
    rows = rows_of('vit.table9', tmp_path, known)
    assert cell(rows, (row[0],), 'Mean').mean == pytest.approx(row[-1], abs=0.05)
    second = rows_of('vit.table2', tmp_path, known)
    assert cell(second, ('VTAB (19 tasks)',), 'Ours-JFT (ViT-H/14)').found


def missing(folder, known, row, column):
    """Recipes of the cells of table 5 without a run below a folder, in order."""
    chosen = cells.select_cells(
        published.table('vit.table5'), rows_of('vit.table5', folder, known), row, column
    )
    return known_recipes.in_order((c.recipe for c in chosen if not c.found), known[1])


def test_missing_runs_come_behind_those_that_they_begin_from(tmp_path, known, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = missing(tmp_path, known, 'JFT-300M, CIFAR', 'ViT-H/14')
    assert [one.config for one in chosen] == [
        'experiments/pretrain.py:h/14', 'experiments/finetune.py:cifar10,h/14',
        'experiments/finetune.py:cifar100,h/14',
    ]  # fmt: skip
    finished(tmp_path / 'runs', 'finetune', 'cifar10,h/14', {'test/accuracy': 0.995})
    (tmp_path / 'runs/pretrain/h_14').mkdir(parents=True)
    (tmp_path / 'runs/pretrain/h_14/result.json').write_text('{}')
    chosen = missing(tmp_path, known, 'JFT-300M, CIFAR', 'ViT-H/14')
    assert [one.arg for one in chosen] == ['cifar100,h/14']


def test_a_recipe_that_selects_is_one_command():
    recipe = known_recipes.Recipe('experiments/x.py', 'a/b', (), selects=False)
    place = ['experiments/x.py:a/b', '--workdir', 'runs/x/a_b']
    assert recipe.words() == ['python', '-m', 'vit_jax.main', '--config', *place]
    assert recipe.words('slurm', ['--nodes=2']) == [
        'bash', 'launch.sh', 'slurm', '--nodes=2', *place
    ]  # fmt: skip
    recipe = recipe._replace(selects=True)
    assert recipe.words() == ['bash', 'launch.sh', 'local', '--select', *place]
    assert recipe.words('slurm', ['--nodes=2']) == [
        'bash', 'launch.sh', 'slurm', '--nodes=2', '--select', *place
    ]  # fmt: skip


def test_a_whole_name_chooses_no_other_that_contains_it(tmp_path, known):
    table, rows = published.table('vit.table5'), rows_of('vit.table5', tmp_path, known)
    found = cells.select_cells(table, rows, 'cifar-10', 'vit-b/16')
    assert {c.label[1] for c in found} == {'CIFAR-10'} and len(found) == 3  # pre-trainings
    found = cells.select_cells(table, rows, 'ImageNet-21k, CIFAR-10', 'ViT-B/16')
    assert [c.label for c in found] == [('ImageNet-21k', 'CIFAR-10')]
    found = cells.select_cells(table, rows, 'CIFAR', 'ViT-B/16')
    assert {c.label[1] for c in found} == {'CIFAR-10', 'CIFAR-100'}


def test_costs_are_those_of_the_paper():
    """arXiv:2010.11929 table 6: exaFLOPs of 18 pre-trainings, ResNets and hybrids too."""
    module = recipes.module('finetune')
    for model, row in module.TABLE_6.items():
        paper = published.row_of(published.table('vit.table6'), row)[-1]
        flops = costs.training_flops(config.complete(recipes.given('pretrain', model)))
        assert flops / 1e18 == pytest.approx(published.number(paper).value, rel=0.04), model
    slow = costs.slice_of('v3:2x2')  # 4 chips of 123 TFLOP/s, which are 8 devices
    assert slow.hours(0.5 * 4 * 123e12 * 3600, 0.5) == pytest.approx(1)
    for name, words in ('v9:2x2', "no slice 'v9:2x2'; there are v2"), ('v4:2x', 'not a shape'):
        with pytest.raises(UserError, match=words):
            costs.slice_of(name)


def test_compiled_plans_cost_somewhat_more():
    """As docs/planning.md has it, by the plans in docs/plans.json with 32 images a device or so."""
    plans = json.loads((known_recipes.EXPERIMENTS.parent / 'docs/plans.json').read_text())
    ratios = []
    for plan in plans.values():
        place = costs.slice_of(plan['topology'])
        hours = place.hours(3 * plan['forward_flops'] * plan['images'], 0.5)
        if plan['config']['batch_size'] >= 8 * plan['devices']:
            ratios.append(24 * plan['days'] / hours)
    assert len(ratios) == 12 and min(ratios) > 1 and max(ratios) < 1.4


def test_what_is_not_public_or_downloaded_by_hand_is_named(known):
    """By TFDS, which has the instructions for manual downloads."""
    import tensorflow_datasets as tfds

    names = set()
    for file in ('pretrain', 'posemb', 'augreg', 'vit_s16_i1k', 'finetune'):
        module = recipes.module(file)
        for arg in module.ARGS:
            names.update(costs.data_sets_of(module.get_config(arg)))
    names = {vtab.task(n).dataset if n.startswith('vtab:') else n for n in names}
    names = {name.partition('/')[0] for name in names if ':' not in name}
    assert len(names) > 20
    for name in names - {'imagenet21k', 'objectnet'}:
        by_hand = bool(tfds.builder_cls(name).MANUAL_DOWNLOAD_INSTRUCTIONS)
        assert by_hand == (name in costs.ACCESS), name
    full = config.complete(recipes.given('finetune', 'imagenet2012,h/14'))
    drawn = config.complete(recipes.given('pretrain', 'h/14'))
    assert costs.needs([full, drawn]) == [
        'imagenet2012 (manual download)', 'imagenet2012_real (manual download)',
        'jft_like (drawn images in place of JFT, which is not public)',
    ]  # fmt: skip
    assert costs.needs([config.complete(recipes.given('finetune', 'cifar10,b/16-i21k'))]) == []
    full.init_from = 'vit/b_16-jft'
    assert 'vit/b_16-jft (checkpoint, not public)' in costs.needs([full])


@pytest.mark.parametrize('row, column, words', [
    ('ViT-L/61', None, r"--row 'ViT-L/61' is in none: there are 'ImageNet, CIFAR-10', "),
    ('ImageNet', 'zz', "--column 'zz' is in none: there are "),
    (None, 'Pre-training', 'no recipe reproduces these numbers'),
])
def test_a_text_that_is_in_no_name_chooses_nothing(known, row, column, words):
    with pytest.raises(UserError, match=words):
        table = published.table('vit.table5')
        cells.select_cells(table, cells.grid_of(table, {}, known[0]), row, column)


def command(*args, cwd):
    return subprocess.run(
        [sys.executable, '-m', *args], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_command_line(tmp_path):
    root = known_recipes.EXPERIMENTS.parent
    finished(tmp_path / 'runs', 'pretrain', 'b/16', {})
    shown = command('vit_jax.tables', 'vit.table6', '--runs', str(tmp_path / 'runs'), '--out',
                    str(tmp_path / 'out'), cwd=root)  # fmt: skip
    assert shown.returncode == 0 and 'ViT-B/16' in shown.stdout, shown.stderr
    assert sorted(p.suffix for p in (tmp_path / 'out').iterdir()) == [
        '.csv', '.html', '.md', '.tex',
    ]  # fmt: skip
    run = command('vit_jax.tables', 'vit.table8', '--run', 'local', '--dry_run', '--row', 'Rel',
                  cwd=root)  # fmt: skip
    assert run.returncode == 0 and 'vit_jax.main' in run.stdout.splitlines()[-1]
    assert 'posemb.py:rel' in run.stdout
    options = '--nodes=2 --gpus-per-node=4 --time 9:00'
    run = command('vit_jax.tables', 'vit.table8', '--run', 'slurm', '--dry_run', '--row', 'Rel',
                  '--launch', options, cwd=root)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert f'bash launch.sh slurm {options} experiments/' in run.stdout
    assert '#SBATCH --nodes=2' in run.stdout
    count = len(published.tables())
    for args, words in (
        (['vit.table5', '--missing', '--launch', '--nodes=2'], 'for --run, which is not given'),
        (['vit.table5', '--run', 'local', '--launch', "'"], "--launch=': No closing quotation"),
        (['vit.table55'], f"no table 'vit.table55'; the nearest of {count} are vit.table5"),
        (['vit.table5', '--runs', '/nowhere'], 'no folder /nowhere'),
        (['vit.table5', '--run', 'moon'], '<local\\|hosts\\|slurm>'),
    ):
        failed = command('vit_jax.tables', *args, cwd=root)
        assert failed.returncode == 2 and 'Traceback' not in failed.stderr
        assert words.replace('\\', '') in failed.stderr


def test_runs_are_sought_in_folders_of_runs(tmp_path, monkeypatch):
    for name in ('b/2', 'b/10', 'a', '.hidden/run'):
        (tmp_path / name).mkdir(parents=True)
        workdir.write_json(tmp_path / name / 'config.json', {})
    (tmp_path / 'b' / 'more').symlink_to(tmp_path / 'b')  # a circle ends where the system says
    folder = workdir.located(tmp_path)
    assert [str(p.relative_to(folder)) for p in workdir.runs_below(folder)][:3] == [
        'a', 'b/10', 'b/2',
    ]  # fmt: skip
    for i in range(20):
        (tmp_path / 'c' / str(i)).mkdir(parents=True)
    monkeypatch.setattr(workdir, 'MOST_FOLDERS', 20)
    with pytest.raises(UserError, match=f'{tmp_path} has more than 20 folders that are no runs'):
        list(workdir.runs_below(folder))


@pytest.mark.slow
def test_check_is_the_exit_status(tmp_path):
    """A finished run: 0 without the flag, 1 with it where a number is missed, 0 where it is met."""
    root = known_recipes.EXPERIMENTS.parent
    args = ['vit_jax.main', '--config', 'experiments/digits.py', '--config.steps=2',
            '--config.optim.warmup=1', '--config.evals.test.batch_size=64',
            '--config.model.depth=1', '--workdir', str(tmp_path)]  # fmt: skip
    assert command(*args, cwd=root).returncode == 0
    assert command(*args, '--check', cwd=root).returncode == 1
    result = json.loads((tmp_path / 'result.json').read_text())
    assert result['expected'][0]['pass'] is False and result['costs']['exaflops'] > 0
    result['expected'][0]['pass'] = True
    (tmp_path / 'result.json').write_text(json.dumps(result))
    assert command(*args, '--check', cwd=root).returncode == 0


@pytest.mark.slow
def test_a_dry_run_needs_neither_data_nor_checkpoint(tmp_path):
    root = known_recipes.EXPERIMENTS.parent
    words = ('vit_jax.main', '--config', 'experiments/finetune.py:cifar100,h/14', '--workdir',
             f'{tmp_path}/x', '--dry_run')  # fmt: skip
    run = command(*words, cwd=root)
    assert run.returncode == 0 and not (tmp_path / 'x').exists(), run.stderr
    assert 'vit.table5: JFT-300M, CIFAR-100; ViT-H/14' in run.stdout
    assert ': 50,000 images, 100 classes' in run.stdout
    run = command(*words, '--config.select.development=true', cwd=root)
    assert run.returncode == 0 and '49,000 images' in run.stdout, run.stderr
    assert 'vit.table5' not in run.stdout
    run = command('vit_jax.main', '--config', 'experiments/finetune.py:/nowhere', '--workdir',
                  f'{tmp_path}/x', '--dry_run', '--config.init_from=/no/run', cwd=root)  # fmt: skip
    assert run.returncode == 0 and not run.stderr and not (tmp_path / 'x').exists()
    assert 'model    unknown, as /no/run cannot be read' in run.stdout
    assert 'data     /nowhere: unknown (' in run.stdout and '--examples' not in run.stdout
    full = config.load('experiments/folder.py:/nowhere')  # neither steps nor classes are known
    text = rehearsal.describe(full, 'x')
    assert 'parameters without the head' in text and '30 epochs of 32 images a step' in text
    with pytest.raises(UserError, match="optim.freeze 'zzz' matches no parameter"):
        overrides = [('optim.freeze', 'zzz')]
        rehearsal.describe(config.load('experiments/folder.py:/nowhere', overrides), 'x')


def test_numbers_of_cells():
    assert published.number('88.55±0.04') == (88.55, 0.04)
    assert published.number('83.73%') == (83.73, None) and published.number('2.5k') == (2500, None)
    assert published.number(None) is published.number('N/A') is published.number('30/90') is None
    with pytest.raises(UserError, match="no table 'x'"):
        published.table('x')
    with pytest.raises(LookupError, match='2 rows of vit.table6 begin with'):
        published.expected('vit.table6', 'ViT-L/16', 'ImageNet', 'x')
    with pytest.raises(LookupError, match='no number in row'):
        published.expected('vit.table8', 'No Pos. Emb.', 'Every Layer', 'x')
    row = published.expected('vit.table2', 'ImageNet', 'Ours-I21k (ViT-L/16)', 'x', tolerance=1e-4)
    assert row['value'] == 0.853 and row['tolerance'] == pytest.approx(0.0004)  # two deviations
