"""The loop in this process: what it writes, when it goes on, when it refuses."""

import contextlib
import json
import math
import os
import pathlib
import pty
import re
import shutil
import subprocess
import time
from types import SimpleNamespace

import jax
import launched
import numpy as np
import pytest
from compared import compiled
from in_process import StopAfter, run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_jax import assembly, config, models, sharding, train
from vit_jax.data import tasks
from vit_jax.errors import UserError
from vit_jax.evaluators.classify import Classify
from vit_jax.run import history, profiling, report, results
from vit_jax.run.checkpoint import Checkpoints


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return launched.write_images(tmp_path_factory.mktemp('images'), {'train': 8, 'val': 5})


@pytest.fixture(scope='module')
def finished(folder, tmp_path_factory):
    """(workdir, what its loop put on devices and read from there, in order) of a finished run."""
    path, order = tmp_path_factory.mktemp('whole') / 'run', []

    def put(batch, mesh):
        order.append('put')
        return sharding.put(batch, mesh)

    class Report(report.Report):
        def read(self, step, metrics):
            order.append(step)
            super().read(step, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'sharding', SimpleNamespace(put=put, rows=sharding.rows))
        patch.setattr(train.report, 'Report', Report)
        run(folder, path)
    return path, order


@pytest.fixture(scope='module')
def whole(finished):
    return finished[0]


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of the workdir of a finished run."""
    return shutil.copytree(whole, tmp_path / 'copied')


def test_a_batch_is_put_on_the_devices_before_the_step_before_is_waited_for(finished):
    _, order = finished
    assert [x for x in order if x != 'put'] == list(range(1, 13)) and order.count('put') == 12
    for n in (1, 2, 3, 5, 6, 7):  # 4 and 8 are saved and evaluated
        assert order[: order.index(n)].count('put') == n + 1, order


@pytest.mark.slow
def test_stop_and_resume_on_other_devices(folder, whole, tmp_path):
    assert run(folder, tmp_path / 'run', stop=StopAfter(tmp_path / 'run', 5)) is None
    assert not (tmp_path / 'run' / 'result.json').exists()
    stopped = launched.checkpoints(tmp_path / 'run')[-1]
    assert 5 <= stopped <= 7
    run(folder, tmp_path / 'run', 'mesh.data=2', 'mesh.fsdp=4')
    whole, resumed = (launched.timeless(path) for path in (whole, tmp_path / 'run'))
    assert [line['step'] for line in whole] == [line['step'] for line in resumed]
    for a, b in zip(whole, resumed, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert math.isclose(a[key], b[key], rel_tol=1e-4), (key, a, b)


def test_tensorboard_reads_what_metrics_jsonl_has(folder, tmp_path):
    run(folder, tmp_path, stop=StopAfter(tmp_path, 6))
    lost = launched.checkpoints(tmp_path)[-1]
    with Checkpoints(tmp_path) as checkpoints:  # as a kill would: the last steps are made again
        checkpoints.manager.delete(lost)
    run(folder, tmp_path)
    events = EventAccumulator(str(tmp_path / 'tensorboard'), size_guidance={'scalars': 0})
    events.Reload()
    for key in ('loss', 'grad_norm', 'lr', 'images_per_s', 'val/accuracy'):
        written = {x['step']: x[key] for x in launched.metrics(tmp_path) if key in x}
        shown = {e.step: e.value for e in events.Scalars(key)}
        assert len(events.Scalars(key)) == len(written) > 2, key
        for step, value in written.items():
            assert math.isclose(shown[step], value, rel_tol=1e-6)


def test_a_finished_run_says_so(folder, copied, capsys):
    first, lines = json.loads((copied / 'result.json').read_text()), launched.metrics(copied)
    assert run(folder, copied, 'report.every=2') == first and first['steps'] == 12
    assert 'is finished: 12 steps are done' in capsys.readouterr().out
    assert launched.metrics(copied) == lines


@pytest.mark.slow
def test_a_changed_config_stops_the_run_where_it_changes_the_result(folder, tmp_path):
    run(folder, tmp_path, stop=StopAfter(tmp_path, 1))
    before = json.loads((tmp_path / 'config.json').read_text())
    for override in ('optim.lr=1e-4', 'seed=5', 'model.dropout=0.2', 'data.view.pixels=0',
                     'steps=20', 'objective.label_smoothing=0.1', 'accumulate=2'):
        key = override.split('=')[0]
        with pytest.raises(UserError, match=f'{key}  .*changes the result') as e:
            run(folder, tmp_path, override, 'report.every=3', 'data.batch_size=16')
        assert 'report.every' in str(e.value) and '--allow_config_change' in str(e.value)
    assert json.loads((tmp_path / 'config.json').read_text()) == before
    result = run(folder, tmp_path, 'steps=20', 'optim.lr=1e-4', allow_change=True)
    assert result['steps'] == 20
    lines = launched.metrics(tmp_path)
    assert 0 < max(x['lr'] for x in lines if 'lr' in x and x['step'] > 4) <= 1e-4


@pytest.mark.slow
def test_a_longer_run_goes_on_from_a_finished_one(folder, copied):
    first = launched.timeless(copied)
    result = run(folder, copied, 'steps=16', allow_change=True)
    assert result['steps'] == 16 and launched.timeless(copied)[: len(first)] == first
    assert launched.last_step(copied) == 16


def test_a_config_that_never_trained_may_change(folder, tmp_path):
    with pytest.raises(UserError):
        run(folder, tmp_path, 'data.image_size=9')
    assert run(folder, tmp_path)


def test_a_missing_evaluation_is_made_up_for(folder, copied):
    before = launched.timeless(copied)
    assert [x['step'] for x in before if 'val/loss' in x] == [4, 8, 12]
    path = copied / 'metrics.jsonl'
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(''.join(lines[:-1]) + lines[-1][:9])  # a kill in the middle of a line
    (copied / 'result.json').unlink()
    run(folder, copied)
    assert launched.timeless(copied) == before


def test_evaluation_uses_the_average_and_counts_each_example_once(folder, tmp_path):
    result = run(folder, tmp_path, 'evals.val.batch_size=16', 'optim.ema=0.5', 'optim.lr=0.01')
    settings = json.loads((tmp_path / 'config.json').read_text())
    model = models.build(**settings['model'] | {'num_classes': 3})
    params = average(launched.state(tmp_path, 12))
    assert not np.allclose(params['head']['bias'], launched.state(tmp_path, 12)['params/head/bias'])
    hits, losses = [], []
    for path in sorted((folder / 'val').rglob('*.png')):
        image = tasks.make_view('resize', 8)(np.asarray(Image.open(path)), None)
        label = ('ant', 'bee', 'cat').index(path.parent.name)
        logits, _ = compiled(model)(params, model.normalise(image[None]))
        logits = np.asarray(logits[0], np.float64)
        hits.append(logits.argmax() == label)
        losses.append(np.log(np.exp(logits).sum()) - logits[label])
    assert result['metrics']['val/examples'] == len(hits) == 15
    assert math.isclose(result['metrics']['val/accuracy'], np.mean(hits))
    assert math.isclose(result['metrics']['val/loss'], np.mean(losses), rel_tol=1e-5)


def average(arrays):
    """The averaged parameters of a checkpoint as a nested dict."""
    tree = {}
    for name, array in arrays.items():
        _, found, name = name.partition('/average/')
        if found:
            *parents, last = name.split('/')
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = array
    return tree


def test_predictions_are_by_example(folder):
    parts = assembly.make(config.load(f'{launched.TINY}:{folder}', [('evals.val.batch_size', '8')]))
    params = jax.jit(parts.model.init)(jax.random.key(0), np.zeros((1, 8, 8, 3)))['params']
    params['head']['bias'] = np.array([0.0, 1.0, 0.0])
    found = parts.evals['val'].predictions(params)
    assert sorted(found['id']) == list(range(15)) and (found['prediction'] == 1).all()
    np.testing.assert_allclose(found['confidence'], np.e / (np.e + 2), rtol=1e-5)
    assert sorted(found['label']) == [0] * 5 + [1] * 5 + [2] * 5


def test_an_unreadable_image_loses_nothing(folder, whole, tmp_path):
    folder = shutil.copytree(folder, tmp_path / 'images')
    run(folder, tmp_path / 'run', stop=StopAfter(tmp_path / 'run', 2))
    before = launched.checkpoints(tmp_path / 'run')[-1]
    victim = folder / 'train' / 'bee' / '3.png'
    sound = victim.read_bytes()
    victim.write_bytes(sound[:50])
    changed = dict(allow_change=True)  # the contents of the data set are others
    with pytest.raises(UserError, match=f'{victim}: unreadable image'):
        run(folder, tmp_path / 'run', 'steps=12', **changed)
    assert launched.checkpoints(tmp_path / 'run')[-1] >= before
    shutil.copytree(tmp_path / 'run', tmp_path / 'tolerant')
    result = run(folder, tmp_path / 'tolerant', 'data.tolerance=0.05', **changed)  # 1 of 24
    lines = history.read_lines(tmp_path / 'tolerant')
    skipped = [line for line in lines if 'skipped' in line]
    assert skipped and all(line['skipped'] == 1 for line in skipped)
    assert result['examples_skipped'] == len(skipped) and 'skipped' not in result['metrics']
    victim.write_bytes(sound)
    run(folder, tmp_path / 'run', **changed)
    assert launched.timeless(tmp_path / 'run') == launched.timeless(whole)


@pytest.mark.parametrize('override, words', [
    ('data.batch_size=9', 'batch size 9 is not divisible by the 8 devices'),
    ('evals.val.batch_size=3', 'batch size 3 is not divisible by the 8 devices'),
    ('data.image_size=9', 'config data.image_size: image size 9 x 9 is not divisible by the patch'),
    ('evals.val.image_size=9',
     'evals.val.image_size is 9, data.image_size 8: image size 9 x 9 is not divisible'),
    ('evals.val.image_size=24',
     'val.image_size is 24, data.image_size 8: .* positions for 4 in place of 36'),
    ('model.num_classes=2', 'labels are out of range: .* has 3 classes, model.num_classes is 2'),
    ('data.source.name=/nowhere', 'no folder /nowhere'),
    (('data.repeats=4', 'objective.cutmix=1.0', 'accumulate=2', 'data.batch_size=16'),
     r'mix_shift is 1 with 2 copies .* mixed with themselves; set it to 2'),
    ('data.source.split=test', "has no split 'test'; it has train, val"),
    ('optim.warmup=13', r'optim.warmup 13 \+ optim.cooldown 0 exceed 12 steps'),
    ('mesh.fsdp=3', 'fsdp=3 tensor=1 does not cover 8 devices'),
    ('objective.loss=hinge', "objective.loss is 'hinge'"),
    ('evals.val.loss=hinge', "loss is 'hinge'"),
    ('optim.name=adam', "optim.name is 'adam'"),
    ('optim.freeze=("nothing",)', "optim.freeze 'nothing' matches no parameter"),
    ('checkpoint.best=accuracy', "best is 'accuracy', .* there are val/accuracy, val/top5"),
    ('model.std=(1.0,)', r'images have 3 channels, .* model.std \(1.0,\)'),
    (('checkpoint.best=val/loss', 'checkpoint.mode=max'), 'the best val/loss is its min'),
])
def test_mistakes_are_named_before_anything_is_trained(folder, tmp_path, override, words):
    with pytest.raises(UserError, match=words):
        run(folder, tmp_path, *([override] if isinstance(override, str) else override))
    assert [path.name for path in tmp_path.iterdir()] == ['.lock']


def test_judgement_of_what_was_expected():
    expected = [
        dict(metric='val/accuracy', value=0.9, tolerance=0.02, source='paper'),
        dict(metric='val/loss', value=0.5, tolerance=0.1, source='paper'),
        dict(metric='real/accuracy', value=0.5, tolerance=0.1, source='paper'),
    ]
    better = {'val/accuracy': 'max', 'val/loss': 'min', 'real/accuracy': 'max'}
    rows = results.judge(expected, {'val/accuracy': 0.881, 'val/loss': 0.61}, better)
    assert [r['pass'] for r in rows] == [True, False, None]
    rows = results.judge(expected, {'val/accuracy': 0.879, 'val/loss': 0.1}, better)
    assert [r['pass'] for r in rows] == [False, True, None]
    for loss, passes in (0.1, False), (0.45, True), (0.61, False):  # neither is better
        rows = results.judge(expected, {'val/loss': loss}, {})
        assert rows[1]['pass'] == passes


@pytest.mark.slow
def test_the_heading_names_each_parameter(folder, tmp_path, capsys):
    run(folder, tmp_path, 'optim.freeze=("^embedding/",)', 'optim.layer_decay=0.5', 'steps=6')
    rows = [x.split() for x in capsys.readouterr().out.splitlines()]
    table = {r[0]: r[1:] for r in rows if len(r) > 3}
    assert table['embedding/kernel'] == ['4x4x3x16', '768', '0.125', '0', 'frozen']
    assert table['encoder/mlp/fc1/kernel'] == ['2x16x32', '1,024', '0.25', '...', '0.5', '0.1']
    assert table['head/kernel'] == ['16x3', '48', '1', '0.1']


def test_a_relative_workdir_has_only_the_lines_asked_for(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(folder, 'runs/one', 'report.every=5')
    path = tmp_path / 'runs' / 'one'
    assert launched.checkpoints(path) == [8, 12]
    assert [x['step'] for x in launched.metrics(path) if 'loss' in x] == [5, 10, 12]


def test_speed_leaves_out_compilation_and_evaluation(folder, tmp_path, monkeypatch):
    plain, clock, slept = Classify.__call__, time.time, []

    def sleepy(self, params, stop, at):
        slept.append(1000)  # seconds by the clock of the report
        return plain(self, params, stop, at)

    monkeypatch.setattr(Classify, '__call__', sleepy)
    monkeypatch.setattr(report, 'time', SimpleNamespace(time=lambda: clock() + sum(slept)))
    run(folder, tmp_path, 'checkpoint.every=0')  # a first save compiles what makes fingerprints
    lines = [x for x in launched.metrics(tmp_path) if 'images_per_s' in x]
    after = [x for x in lines if x['step'] == 5]
    assert len(lines) == 11 and after[0]['images_per_s'] > 8 / 900
    assert launched.metrics(tmp_path)[-1]['seconds'] > 3000


def test_not_finite_names_the_examples():
    e = report.NotFinite(7, dict(loss=np.nan, grad_norm=1.5, param_norm=2.0, lr=0.1))
    assert str(e.with_examples([3, 1])).endswith('ids of the batch: 3 1')
    assert 'step 7: not finite: loss nan, gradient norm 1.5' in str(e)


@pytest.mark.slow
def test_a_terminal_gets_a_bar(folder, tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        launched.command(folder, tmp_path / 'run', '--config.steps=20'),
        stdout=theirs, stderr=theirs,
        env=launched.ENVIRONMENT | {'COLUMNS': '120', 'TERM': 'xterm'},
    )  # fmt: skip
    os.close(theirs)
    shown = b''
    with contextlib.suppress(OSError):  # the other side was closed
        while chunk := os.read(ours, 65536):
            shown += chunk
    os.close(ours)
    assert process.wait() == 0
    text = re.sub(r'\x1b\[[0-9;?]*[a-zA-Z]', '', shown.decode())
    assert re.search(r'step 20/20 .*loss \d\.\d+  accuracy \d\.\d+  [\d,]+ images/s .*left', text)
    assert 'step 20  val: accuracy' in text and text.count('step 1/20') < 3


def test_a_trace_that_can_not_be_written_loses_no_step(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, 'unsupported_libtpu', lambda platforms: None)
    monkeypatch.setattr(profiling.jax.profiler, 'start_trace', start_trace)
    monkeypatch.setattr(profiling.jax.profiler, 'stop_trace', lambda: None)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'profile').write_text('')
    with pytest.raises(UserError, match=f'cannot write {tmp_path}/run/profile: '):
        run(folder, tmp_path / 'run', profile='2:2')
    assert launched.checkpoints(tmp_path / 'run') == [3]
    assert run(folder, tmp_path / 'run')['steps'] == 12
    steps = [line['step'] for line in launched.metrics(tmp_path / 'run') if 'loss' in line]
    assert steps == list(range(1, 13))


def start_trace(path, **options):
    (pathlib.Path(path) / 'trace').write_text('')
