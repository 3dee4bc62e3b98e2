"""What a run knows of its past, and what damage to it costs: no other line, no best checkpoint."""

import functools
import itertools
import json
import os
import shutil

import launched
import pytest
from in_process import StopAfter, run

import vit_jax
from vit_jax.convert import load
from vit_jax.errors import UserError
from vit_jax.run import checkpoint, history, report, results, retention, workdir
from vit_jax.tables import cells as tables

# Nothing is learnt, so all evaluations are equal, and the first of them is the best.
FIRST = ('checkpoint.best=val/loss', 'optim.lr=1e-30', 'checkpoint.keep=1')
DAMAGE = {
    'empty': b'{}', 'null': b'null', 'list': b'[]', 'binary': bytes(range(128, 255)),
    'cut': b'{"step": 7, "lo', 'deep': b'[' * 100_000, 'text': b'{"step": "7"}',
    'no value': b'{"step": 7, "loss": [1]}', 'no step': b'{"step": -1}', 'number': b'5',
    'large': b'{"step": 1e999}',
    'zeros': bytes(50), 'digits': b'{"step": 7, "loss": ' + b'9' * 9000 + b'}',
}  # fmt: skip


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return launched.write_images(tmp_path_factory.mktemp('images'), {'train': 8, 'val': 5})


@pytest.fixture(scope='module')
def stopped(folder, tmp_path_factory):
    """A run that was stopped after two evaluations; it keeps steps 4 and the last."""
    path = tmp_path_factory.mktemp('stopped') / 'run'
    assert run(folder, path, *FIRST, stop=StopAfter(path, 9)) is None
    assert launched.checkpoints(path)[0] == 4 and len(launched.checkpoints(path)) == 2
    return path


@pytest.mark.parametrize('kind', DAMAGE)
def test_a_damaged_line_costs_no_other(kind, tmp_path, capsys):
    sound = [b'{"step": %d, "loss": %g, "x/y": null}' % (i, 1 / i) for i in range(1, 9)]
    for place in (0, 3, 7):
        rows = sound[:place] + [DAMAGE[kind]] + sound[place + 1 :]
        (tmp_path / 'metrics.jsonl').write_bytes(b'\n'.join(rows) + b'\n{"step": 9, "lo')
        found = history.read_lines(tmp_path)
        assert [line['step'] for line in found] == [i for i in range(1, 9) if i != place + 1]
        words = f'{tmp_path}/metrics.jsonl: 1 damaged lines are left out: {place + 1}\n'
        assert capsys.readouterr().err == words


def test_a_line_of_a_run_that_diverged_is_sound(tmp_path, capsys):
    rows = [{'step': 1, 'loss': 1e19}, {'step': 2, 'loss': 3.4e38, 'grad_norm': -1e-45}]
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    assert history.read_lines(tmp_path) == rows and not capsys.readouterr().err


def evaluation_of(path, step):
    """(all lines of metrics.jsonl, index of the evaluation of a step)."""
    rows = (path / 'metrics.jsonl').read_bytes().splitlines(keepends=True)
    found = [i for i, r in enumerate(rows) if b'val/' in r and json.loads(r)['step'] == step]
    assert len(found) == 1
    return rows, found[0]


@pytest.mark.parametrize('lost', [
    'line', 'line and scores',
    *(pytest.param(x, marks=pytest.mark.slow) for x in ('scores', 'line, scores gone')),
])
def test_the_best_checkpoint_outlives_damage(lost, stopped, folder, tmp_path, capfd):
    path = shutil.copytree(stopped, tmp_path / 'run')
    scores = path / 'checkpoints' / 'scores.json'
    rows, place = evaluation_of(path, 4)
    if 'line' in lost:
        rows[place] = b'\0\xff' + rows[place][9:]
        (path / 'metrics.jsonl').write_bytes(b''.join(rows))
    if lost.endswith('scores'):
        scores.write_bytes(scores.read_bytes()[:-9])
    if 'gone' in lost:  # a run of before there were scores: only the line knew
        scores.unlink()
    run(folder, path, *FIRST)
    kept = launched.checkpoints(path)
    unknown = launched.checkpoints(stopped)[1:] if 'line' in lost and lost != 'line' else []
    assert kept == [4, *unknown, 12]
    said = capfd.readouterr().err
    assert (f'{path}/metrics.jsonl: 1 damaged lines are left out: {place + 1}' in said) == (
        'line' in lost
    )
    assert (f'{scores} is damaged and left out' in said) == lost.endswith('scores')
    damaged = [rows.pop(place)] if 'line' in lost else []
    assert (path / 'metrics.jsonl').read_bytes().splitlines(keepends=True)[: len(rows)] == rows
    aside = path / 'metrics.jsonl.damaged'
    assert [aside.read_bytes()] == damaged if damaged else not aside.exists()


@pytest.mark.parametrize('kept, best', [
    ('4', 4), ('12', 12), ('best', 4), (None, 12),
])
@pytest.mark.slow
def test_a_checkpoint_by_its_name(kept, best, folder, tmp_path_factory, capsys):
    path = finished(folder, tmp_path_factory)
    name = f'{path}@{kept}' if kept else str(path)
    _, params = vit_jax.load(name, ema=False)
    wanted = launched.state(path, best)['params/head/kernel']
    assert params['head']['kernel'].tobytes() == wanted.tobytes()
    told = f'{path}@best is step 4, with val/loss 0.01'
    assert (told in capsys.readouterr().err) == (kept == 'best')


def finished(folder, factory):
    """A run that is over, made once; the @ in its own name is no step."""
    path = factory.getbasetemp() / 'a@7' / 'run@1'
    if not (path / 'result.json').exists():
        run(folder, path, 'checkpoint.best=val/loss', 'checkpoint.keep=3')
        (path / 'checkpoints' / 'scores.json').write_text('{"4": {"val/loss": 0.01}}')
    return path


def test_names_of_no_checkpoint(stopped, folder, tmp_path_factory, tmp_path):
    path = finished(folder, tmp_path_factory)
    with pytest.raises(UserError, match='has no checkpoint 5, but 12, 8, 4'):
        load.read(f'{path}@5')
    with pytest.raises(UserError, match='after the @ comes best or the number of a step'):
        load.read(f'{path}@newest')
    other = shutil.copytree(stopped, tmp_path / 'run')
    config = json.loads((other / 'config.json').read_text())
    for best, words in ((None, 'no checkpoint.best; name a step, .*run@STEP: [0-9]+, 4$'),
                        ('val/top1', 'no checkpoint has a val/top1 yet; name a step')):
        config['checkpoint']['best'] = best
        (other / 'config.json').write_text(json.dumps(config))
        with pytest.raises(UserError, match=words):
            load.read(f'{other}@best')


@pytest.mark.slow
def test_an_evaluation_without_an_accuracy_is_made_once(folder, tmp_path):
    options = ('evals.p.type=probe', f'evals.p.source.name={folder}', 'evals.p.source.split=val',
               f'evals.p.train_source.name={folder}', 'evals.p.every=4', 'evals.p.l2=None',
               'evals.p.k=(1,)', 'evals.p.batch_size=8')  # fmt: skip
    run(folder, tmp_path / 'run', *options)
    before = launched.timeless(tmp_path / 'run')
    assert [x['step'] for x in before if 'p/1_nn' in x] == [4, 8, 12], before
    os.remove(tmp_path / 'run' / 'result.json')  # as a kill right before the end leaves it
    run(folder, tmp_path / 'run', *options)
    assert launched.timeless(tmp_path / 'run') == before


class Killed(Exception):
    pass


@pytest.mark.parametrize('owner, name', [
    (report.Report, 'write_evaluation'), (checkpoint.Checkpoints, 'add_results')
])
@pytest.mark.slow
def test_a_kill_beside_an_evaluation_costs_no_score(owner, name, folder, tmp_path, monkeypatch):
    run(folder, tmp_path / 'whole', *FIRST)

    before = getattr(owner, name)

    def killed(*args, **kwargs):
        before(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(owner, name, killed)
        run(folder, tmp_path / 'run', *FIRST)
    run(folder, tmp_path / 'run', *FIRST)
    assert launched.timeless(tmp_path / 'run') == launched.timeless(tmp_path / 'whole')
    kept = [history.read_scores(tmp_path / which / 'checkpoints') for which in ('run', 'whole')]
    assert kept[0] == kept[1]


def test_what_is_kept_where_scores_are_lost():
    keep = dict(keep=1, keep_every=None, largest=True)
    kept = functools.partial(retention.steps_to_keep, [4, 8, 12], **keep)
    assert kept({8: 0.5}) == {8, 12}
    assert kept({8: 0.5}, protected=[4, 8]) == {4, 8, 12}
    assert kept({8: 0.5, 4: 0.1}, protected=[4, 8]) == {8, 12}


BROKEN = {
    'empty': b'', 'number': b'5', 'null': b'null', 'text': b'"x"', 'binary': bytes(range(128, 255)),
    'deep': b'[' * 100_000, 'long number': b'9' * 9000, 'other': b'[{}]', 'object': b'{}',
    'kinds': b'{"model": 5, "metrics": [1], "steps": "x", "data": null, "expected": [{}]}',
}  # fmt: skip


@pytest.mark.parametrize('name', ['config.json', 'result.json', 'classes.json', 'facts.json'])
def test_a_damaged_file_of_a_run_is_named_with_the_way_out(
    name, folder, tmp_path_factory, tmp_path
):
    path = shutil.copytree(finished(folder, tmp_path_factory), tmp_path / 'run')
    plain = (path / name).read_bytes()
    if name == 'facts.json':
        (path / 'result.json').unlink()  # it is read where there is something to train
    readers = {
        'train': lambda: run(folder, path, 'checkpoint.best=val/loss', 'checkpoint.keep=3'),
        'load': lambda: load.read(str(path)),
        'finished': lambda: workdir.finished([path]),
    }
    named = set()
    others = {'cut': plain[: len(plain) // 2], 'huge': None, 'pipe': None}
    for kind, data in (BROKEN | others).items():
        (path / name).unlink()
        if kind == 'pipe':
            os.mkfifo(path / name)  # reading it would never end
        else:
            (path / name).write_bytes(data or b'')
        if kind == 'huge':
            os.truncate(path / name, 2**40)  # no byte of it is on the disk
        for reader in readers:
            if reader == 'train' and kind not in ('number', 'cut'):  # which takes longer
                continue
            try:
                readers[reader]()
            except UserError as e:
                if f'{path / name} ' in str(e):
                    named.add((kind, reader))
                else:
                    assert kind in ('object', 'kinds'), (kind, reader, str(e))  # other settings
        (path / name).unlink()
        (path / name).write_bytes(plain)
    kinds = {kind for kind, _ in named}
    wanted = BROKEN.keys() - {'object', 'kinds'} | others.keys()
    assert kinds >= ({'number', 'cut'} if name == 'facts.json' else wanted), named
    for reader in readers:
        readers[reader]()


def test_a_damaged_row_of_what_was_expected_is_named(tmp_path):
    sound = {
        'metric': 'val/accuracy', 'value': 0.5, 'tolerance': 0.1, 'measured': None, 'pass': None,
        'cell': ['vit.table9', ['ViT-B/16', 3], 'Mean'], 'scale': 0.01,
    }  # fmt: skip
    others = [{}, [], 'x', True, 10**400, None, ['a', ['b'], 'c', 'd'], ['a', [[]], 'c']]
    refused = set()
    for key, other in itertools.product(sound, others):
        row = {**sound, key: other}
        if workdir.are_judged([row]):
            tables.measured([('run', {}, {'expected': [row]})])
            results.print_result(tmp_path, {'metrics': {}, 'expected': [row], 'seconds': 1.0})
        else:
            refused.add(key)
    assert refused == sound.keys()
    assert not workdir.are_judged([{k: v for k, v in sound.items() if k != 'scale'}])


def test_metrics_are_printed_although_their_files_can_not_be_written(
    folder, tmp_path_factory, tmp_path
):
    path = finished(folder, tmp_path_factory)
    (tmp_path / 'out' / 'val.csv').mkdir(parents=True)
    status, output, errors = launched.run(
        'evaluate', f'--checkpoint={path}@12', f'--out={tmp_path}/out'
    )
    assert status == 2 and 'val/accuracy  ' in output
    assert errors.startswith(f'error: cannot write {tmp_path}/out/val.csv: ')
    assert errors.count('\n') == 1
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['val.csv']


@pytest.mark.slow
def test_an_evaluation_that_fails_loses_none_of_those_before_it(folder, tmp_path_factory, tmp_path):
    path = finished(folder, tmp_path_factory)
    other = launched.write_images(tmp_path / 'other', {'train': 1, 'val': 1})
    (other / 'val' / 'ant' / '0.png').write_bytes(b'no image')
    late = dict(name=other, split='val')
    status, output, errors = launched.run(
        'evaluate', f'--checkpoint={path}@12', '--json', f'--out={tmp_path}/out',
        '--config.evals.z.type=classify',
        *(f'--config.evals.z.source.{key}={value}' for key, value in late.items()),
    )  # fmt: skip
    assert status == 2, errors
    assert list(json.loads(output)) == ['checkpoint', 'val']
    assert 'ant/0.png' in errors.splitlines()[-1] and 'Traceback' not in errors
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['val.csv']
