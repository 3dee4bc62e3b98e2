"""Selection: development runs, the choice among them, the final run and what its result records."""

import json
import os
import pathlib
import re
import signal
import sys
import types

import launched
import pytest
from launching import EXPERIMENT, GKE, finish

from vit_jax import config, sweep
from vit_jax.errors import UserError
from vit_jax.run import choice, report, results, workdir

SELECTED = str(pathlib.Path(__file__).with_name('selected.py'))


def test_a_plain_run_is_the_final_run_and_a_development_run_sees_no_test_data():
    plain = config.load(SELECTED)
    assert plain.data.source.split == 'train' and list(plain.evals) == ['test']
    assert len(plain.expected) == 1
    trial = config.load(SELECTED, [('select.development', 'true'), ('optim.lr', '0.5')])
    assert trial.data.source.split == 'train[:90%]' and trial.expected == ()
    assert trial.evals == plain.select.evals and trial.evals.val.source.split == 'train[90%:]'
    assert trial.evals.val.image_size == 8  # inherited from the section data, as in evals
    changed = ('data.source.split', 'evals', 'expected', 'select.development', 'optim.lr')
    left = [(path, value) for path, value in leaves(trial) if not path.startswith(changed)]
    assert left == [(p, v) for p, v in leaves(plain) if not p.startswith(changed)]
    assert config.complete(trial.to_dict()).to_dict() == trial.to_dict()  # as from config.json
    assert config.load(launched.TINY.as_posix() + ':/x').select.to_dict() == {}


def leaves(full, prefix=''):
    for key, value in full.to_dict().items() if not prefix else full.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f'{prefix}{key}.')
        else:
            yield prefix + key, value


@pytest.mark.parametrize('changes, words', [
    ({'select.metric': 'test/accuracy'}, "select.metric is 'test/accuracy', no metric of the"),
    ({'select.split': '3'}, 'select.split is 3, not str or None'),
    ({'select.grid': "({'optim.lr': 1}, 2)"}, 'config select.grid is '),
    ({'select.gird': '()'}, 'unknown key select.gird; the nearest valid key is select.grid'),
    ({'select.evals.val.viw': 'x'}, 'unknown key select.evals.val.viw'),
])  # fmt: skip
def test_mistakes_in_the_section_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        config.load(SELECTED, changes.items())


def outcomes(*values, state=choice.FINISHED):
    return [
        choice.Outcome({'optim.lr': i}, f'run_{i}', state, {'val/loss': value})
        for i, value in enumerate(values)
    ]


def test_the_first_of_the_best_is_chosen():
    """With rates in ascending order the smallest of those with the best value."""
    for mode, best in ('max', 1), ('min', 0):
        record = choice.record('val/loss', mode, outcomes(0.1, 0.3, 0.3, 0.1, 0.2))
        assert record['chosen'] == {'optim.lr': best}
        assert [row['value'] for row in record['results']] == [0.1, 0.3, 0.3, 0.1, 0.2]


def test_runs_that_are_not_finite_are_named_and_never_chosen():
    diverged = choice.Outcome({'optim.lr': 9}, 'run_9', 'step 2, not finite', None)
    for mode in 'max', 'min':
        found = [*outcomes(float('inf'), None, 0.5, float('-inf'), float('nan')), diverged]
        record = choice.record('val/loss', mode, found)
        assert record['chosen'] == {'optim.lr': 2}
        assert [row['value'] for row in record['results']] == [None, None, 0.5, None, None, None]
        assert record['results'][1]['state'] == 'val/loss is not finite'
        assert record['results'][5]['state'] == 'step 2, not finite'
    with pytest.raises(UserError, match=(
        r'no development run has a finite val/loss: run_0 \(val/loss is not finite\), '
        r'run_9 \(step 2, not finite\)'
    )):  # fmt: skip
        choice.record('val/loss', 'max', [*outcomes(float('nan')), diverged])


def test_nothing_is_chosen_before_all_have_ended():
    late = choice.Outcome({'optim.lr': 9}, 'run_9', 'step 2', None)
    with pytest.raises(UserError, match=r'1 of 3 development runs have no result: run_9 \(step 2'):
        choice.record('val/loss', 'max', [*outcomes(1, 2), late])
    record = choice.record('val/loss', 'max', [*outcomes(1, 2), late], skip_unfinished=True)
    assert record['chosen'] == {'optim.lr': 1}
    with pytest.raises(UserError, match='run_0 has no val/accuracy; there are val/loss'):
        choice.record('val/accuracy', 'max', outcomes(1))


def test_points_are_runs_of_their_own():
    select = config.load(SELECTED).select
    select.grid = ({'optim.lr': 0.1, 'steps': 5}, {'data.view': 'resize', 'init_from': '1e3'},
                   {'model.patch_size': (2, 4)})  # fmt: skip
    runs = sweep.runs_of_selection('x.py', 'runs/x', select, [])
    assert [run.workdir for run in runs] == [
        'runs/x/select/optim.lr=0.1,steps=5', 'runs/x/select/data.view=resize,init_from=_1e3_',
        'runs/x/select/model.patch_size=_2_4_',
    ]  # fmt: skip
    for run, point in zip(runs, select.grid, strict=True):
        assert {key: config.parse_value(text) for key, text in run.overrides} == {
            'select.development': True, **point
        }  # fmt: skip
    views = [{'data.view': dict(name='inception', area=(a, 1.0)), 'data.augment': ('é' * 99,)}
             for a in (0.1, 0.2)]  # fmt: skip
    select.grid = tuple(views)
    names = [run.workdir for run in sweep.runs_of_selection('x.py', 'runs/x', select, [])]
    assert names[0] != names[1] and all(len(n.encode()) < 200 for n in names)
    given = sweep.runs_of_selection('x.py', 'runs/x', select, [(('optim.lr', '1e-3'),)])
    assert [run.point for run in given] == [{'optim.lr': 1e-3}]  # in place of the grid
    select.split, select.evals, select.grid = None, None, ({'arg': 'b/16-none'}, {'arg': 'c'})
    runs = sweep.runs_of_selection(f'{SELECTED}:b/16', 'runs/x/b_16', select, [])
    assert [run.line('finished') for run in runs] == [
        f'finished\truns/x/b_16-none\t{SELECTED}:b/16-none', f'finished\truns/x/c\t{SELECTED}:c',
    ]  # fmt: skip
    for grid in [{'arg': 'c', 'seed': 1}], [{'arg': 'b/16'}], []:
        select.grid = tuple(grid)
        with pytest.raises(UserError, match='config select.grid '):
            sweep.runs_of_selection(f'{SELECTED}:b/16', 'runs/x/b_16', select, [])


def leave(path, settings, metrics):
    """A run's folder as train leaves it, with `metrics` in place of a training."""
    workdir.located(path).mkdir(parents=True, exist_ok=True)
    result = dict(metrics=metrics, steps=30, examples_seen=1, seconds=1.0, flops_per_image=None,
                  device_kind='cpu', device_count=1)  # fmt: skip
    result['expected'] = results.judge(settings.to_dict()['expected'], metrics, {})
    workdir.write_json(workdir.located(path) / 'config.json', settings.to_dict())
    workdir.write_json(workdir.located(path) / 'result.json', result)
    (workdir.located(path) / 'checkpoints' / '30').mkdir(parents=True)
    (workdir.located(path) / 'checkpoints' / '30' / 'array').write_bytes(b'a' * len(str(path)))


def chosen(path, root):
    select = config.load(path).select
    runs = sweep.runs_of_selection(path, root, select, [])
    loaded = [config.load(run.config, run.overrides) for run in runs]
    for run, settings in zip(runs, loaded, strict=True):
        if not pathlib.Path(run.workdir).exists():
            metrics = {select.metric: 1 - abs(run.point['optim.lr'] - 3e-3)}
            leave(run.workdir, settings, metrics | {'test/top5': 0.5})
    rows = [
        (run.point, *sweep.state_of(workdir.located(run.workdir), settings))
        for run, settings in zip(runs, loaded, strict=True)
    ]
    return sweep.best(path, root, [], runs, rows)


def test_where_nothing_is_trained_anew_the_best_run_is_the_result(tmp_path):
    root = str(tmp_path / 'x')
    final, state, record = chosen(f'{SELECTED}:best', root)
    assert (state, final.point, final.workdir) == ('finished', {'optim.lr': 3e-3}, root)
    result = workdir.read_result(workdir.located(root))
    assert result['selection'] == json.loads(json.dumps(record))
    assert result['metrics'] == {'test/accuracy': 1, 'test/top5': 0.5}
    assert [(row['measured'], row['pass']) for row in result['expected']] == [(1, True)]
    source = record['results'][1]['run']
    copied = pathlib.Path(root, 'checkpoints/30/array').read_bytes()
    assert copied == pathlib.Path(source, 'checkpoints/30/array').read_bytes()
    assert not workdir.read_result(workdir.located(source))['expected']  # counts for no cell
    (found,) = workdir.finished([tmp_path])  # so do the runs below, once there is the final one
    assert found[0] == root and found[1]['optim']['lr'] == 3e-3
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    assert chosen(f'{SELECTED}:best', root) == (final, state, record)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}


def test_the_record_is_added_to_the_final_run_of_the_chosen_settings_alone(tmp_path):
    root = str(tmp_path / 'x')
    assert chosen(SELECTED, root)[1] == 'not started'
    other = tmp_path / 'other'
    leave(root, config.load(SELECTED, [('optim.lr', '0.003')]), {'test/accuracy': 0.9})
    _, state, record = chosen(SELECTED, root)
    result = workdir.read_result(workdir.located(root))
    assert state == 'finished' and result['selection']['chosen'] == {'optim.lr': 3e-3}
    assert result['metrics'] == {'test/accuracy': 0.9}
    leave(other, config.load(SELECTED), {'test/accuracy': 0.9})  # at another rate
    with pytest.raises(UserError, match='has a run with other settings than the chosen ones'):
        chosen(SELECTED, str(other))
    assert 'selection' not in workdir.read_result(workdir.located(other))


def test_the_state_of_a_run_that_diverged_is_in_its_metrics(tmp_path):
    settings = config.load(SELECTED)
    leave(tmp_path, settings, {})
    (tmp_path / 'result.json').unlink()
    state = lambda: sweep.state_of(workdir.located(tmp_path), settings)  # noqa: E731
    with report.Report(tmp_path, 30, 64, 0, None, every=1) as log:
        values = dict(loss=1.0, grad_norm=1.0, param_norm=1.0, lr=0.1)
        log.write(1, values)
        log.sync()
        assert state() == ('step 1', None)
        log.write(2, values | dict(param_norm=float('inf')))
        with pytest.raises(report.NotFinite, match='step 2: not finite'):
            log.sync()
    assert state() == ('step 2, not finite', None)
    with report.Report(tmp_path, 30, 64, 1, None, every=1):  # it begins again from a checkpoint
        assert state() == ('step 1', None)


def told(monkeypatch, capsys, *argv, path=SELECTED, overrides=()):
    values = dict(CONFIG=path, WORKDIR='/nowhere/x', PLAN=True, SKIP=False)
    for name, value in values.items():
        monkeypatch.setattr(sweep, name, types.SimpleNamespace(value=value), raising=False)
    sweep.main(['sweep', *argv], overrides)
    return capsys.readouterr().out


def test_the_command_lists_runs_for_launch_sh(monkeypatch, capsys):
    trial = '--config.select.development=true\t--config.optim.lr='
    assert told(monkeypatch, capsys, 'select') == ''.join(
        f'not started\t/nowhere/x/select/optim.lr={lr}\t{SELECTED}\t{trial}{lr}\n'
        for lr in ('0.0001', '0.003', '1e+38')
    )
    assert told(monkeypatch, capsys, 'seed=1') == (
        f'not started\t/nowhere/x/seed=1\t{SELECTED}\t--config.seed=1\n'
    )
    with pytest.raises(UserError, match='3 of 3 development runs have no result: /nowhere/x/sel'):
        told(monkeypatch, capsys, 'best')
    with pytest.raises(UserError, match=r'tiny.py:/x has no section select.*select.metric=METRIC'):
        told(monkeypatch, capsys, 'select', path=f'{launched.TINY}:/x')


DIGITS = (  # three images of four in development runs; long enough to be killed on the way
    '--config.steps=300', '--config.optim.warmup=2', '--config.checkpoint.every=30',
    '--config.model.depth=1', '--config.model.width=16', '--config.model.mlp_dim=32',
    '--config.model.num_heads=2', '--config.model.patch_size=(4, 4)',
    '--config.evals.test.every=0',
    '--config.select.metric=val/accuracy', '--config.select.split=train[:75%]',
    "--config.select.evals={'val': {'source': {'name': 'digits', 'split': 'train[75%:]'}}}",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_selection_that_is_killed_goes_on_where_it_was(place):
    place.environment |= {'VIT_JAX_PYTHON': sys.executable}
    words = ('local', '--select', f'--workdir={place.workdir}', '--sweep',
             'optim.lr=1e-5,3e-3', EXPERIMENT, *DIGITS)  # fmt: skip
    low, high = (place.workdir / f'select/optim.lr={lr}' for lr in ('1e-05', '0.003'))
    process = place.start(*words)
    for path in low / 'config.json', low / 'result.json', high / 'config.json':
        place.wait(path.exists)
    place.wait(lambda: launched.checkpoints(high))
    process.kill()  # before it starts another run
    os.kill(int((high / '.lock').read_text()), signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL and not (place.workdir / 'config.json').exists()
    assert (low / 'result.json').exists() and not (high / 'result.json').exists()
    before = (low / 'result.json').stat().st_mtime_ns
    status, output, errors = place.launch(*words)
    assert status == 0, errors
    assert f'# {low}: finished' in output and 'resumed at step' in output
    assert (low / 'result.json').stat().st_mtime_ns == before
    result = json.loads((place.workdir / 'result.json').read_text())
    selection = result['selection']
    assert (selection['metric'], selection['chosen']) == ('val/accuracy', {'optim.lr': 0.003})
    for run, row in zip((low, high), selection['results'], strict=True):
        trial = json.loads((run / 'result.json').read_text())
        assert row['run'] == str(run) and row['value'] == trial['metrics']['val/accuracy']
        assert trial['expected'] == [] and 'test/accuracy' not in trial['metrics']
    facts = [json.loads((run / 'facts.json').read_text()) for run in (high, place.workdir)]
    assert [fact['data.examples'] for fact in facts] == [1078, 1438]  # 75% and all of `train`
    assert len(result['expected']) == 1 and result['metrics']['test/examples'] == 359
    assert json.loads((place.workdir / 'config.json').read_text())['optim']['lr'] == 0.003
    assert output.splitlines()[-1] == (
        f'Best by val/accuracy: optim.lr=0.003. Final run: {place.workdir} (finished)'
    )


@pytest.mark.slow
def test_jobs_are_awaited_before_the_choice(place, tmp_path):
    """Nothing is trained anew here, so the best of two jobs is copied."""
    place.environment |= {'VIT_JAX_PYTHON': sys.executable}
    images = launched.write_images(tmp_path / 'images', {'train': 8, 'val': 4})
    words = (f'--workdir={place.workdir}', f'{launched.TINY}:{images}', '--select', '--sweep',
             'seed=1,2', '--config.steps=6', '--config.select.metric=val/loss')  # fmt: skip
    dry = place.launch(*GKE, *words, '--dry-run')
    assert dry[0] == 0 and re.findall(r'^  name: (.*)$', dry[1], re.M) == ['tiny-1', 'tiny-2']
    assert 'vit_jax.sweep best' in dry[1].splitlines()[-1] and not place.calls('kubectl')
    status, output, errors = place.launch('slurm', '--nodes=1', '--gpus-per-node=1', *words)
    assert status == 0, errors
    assert len(place.calls('sbatch')) == 2
    result = json.loads((place.workdir / 'result.json').read_text())
    losses = [row['value'] for row in result['selection']['results']]
    assert result['metrics']['val/loss'] == min(losses) and losses[0] != losses[1]
    seed = result['selection']['chosen']['seed']
    assert output.splitlines()[-1].startswith(f'Best by val/loss: seed={seed}. Final run: ')
    assert launched.checkpoints(place.workdir)
    best = place.workdir / f'select/seed={seed}'
    launched.assert_same_bits(launched.state(place.workdir, 6), launched.state(best, 6))
