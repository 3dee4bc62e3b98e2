"""The scripts for GPUs: on a CPU with tiny sizes, with nothing installed but what a step needs."""

import json
import math
import os
import pathlib
import subprocess
import sys
import time

import jax
import pytest
import xla_flags

from benchmarks.gpu import checks, speed, trace
from benchmarks.gpu import report as reports
from benchmarks.gpu.worker import Ended, Worker

ROOT = pathlib.Path(__file__).parents[1]
# Of what vit_jax depends on, all that jax, flax, optax, orbax, torch and timm do not need.
ABSENT = (
    'ml_collections', 'grain', 'array_record', 'tensorflow', 'tensorflow_datasets', 'tensorboard',
    'importlib_resources', 'google_crc32c', 'qwix', 'sklearn', 'matplotlib', 'pyarrow', 'gcsfs',
    'pycocotools', 'pytest',
)  # fmt: skip
BLOCKER = f"""
import sys
from importlib.machinery import PathFinder
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition('.')[0] not in {ABSENT}:
            return PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run(tmp_path, script, *arguments):
    """(exit status, results) of a script without ABSENT, and without torch.compile's compiler."""
    (tmp_path / 'sitecustomize.py').write_text(BLOCKER)
    environment = os.environ | {
        'PYTHONPATH': f'{tmp_path}:{ROOT}', 'XLA_FLAGS': xla_flags.devices(1),
        'TORCHDYNAMO_DISABLE': '1', 'OMP_NUM_THREADS': '1',
    }  # fmt: skip
    out = tmp_path / 'out.json'
    done = subprocess.run(
        [sys.executable, '-W', 'error::DeprecationWarning', '-m', f'benchmarks.gpu.{script}',
         '--out', str(out), '--seconds', '800', *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert out.exists(), done.stdout + done.stderr
    return done, json.loads(out.read_text())


def unexpected(results):
    """What was skipped for another reason than --only, or a GPU that is not here."""
    reasons = 'not asked for by --only', 'cuDNN is for NVIDIA GPUs'
    return {k: v for k, v in results['skipped'].items() if not v.startswith(reasons)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_checks(tmp_path):
    only = r'attention .* 5 tokens|^model float32, unroll|^model bfloat16|^random|^step .* on a CPU'
    done, results = run(tmp_path, 'checks', '--only', only)
    assert not done.returncode and not unexpected(results), done.stdout + done.stderr
    cases = results['cases']
    assert all(case['ok'] and case['error'] <= case['tolerance'] for case in cases.values())
    assert len(cases) == 6 + 6 + 1 + 4
    assert any('cudnn' in name for name in results['skipped'])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_speed(tmp_path):
    only = r'train 256 (timm|linen)$|infer 256 linen$'
    done, results = run(tmp_path, 'speed', '--only', only)
    assert not done.returncode and not unexpected(results), done.stdout + done.stderr
    cases = results['cases']
    found = {(case['what'], case['contender']) for case in cases.values()}
    assert found == {
        ('train', 'ours'), ('train', 'timm'), ('train', 'linen'),
        ('infer', 'ours'), ('infer', 'linen'),
    }  # fmt: skip
    for case in cases.values():
        assert math.isclose(case['images_per_s'] * case['ms'], 2000, rel_tol=1e-2)
        assert ('ours_is_faster' in case) == (case['contender'] != 'ours')
        assert case['memory_gb'] is None if 'timm' in case['contender'] else case['memory_gb'] > 0
    of_timm = results['bars']['vit-b/16 train, images/s to timm']
    assert of_timm['wanted'] == 1.2 and of_timm['met'] == (of_timm['found'] >= 1.2)
    assert results['bars']['vit-b/16 train, MFU']['met'] is None  # this CPU has no known peak


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_methods(tmp_path):
    only = '(mae vit-b/16 512|dino vit-s/16 64) default'
    done, results = run(tmp_path, 'methods', '--only', only)
    assert not done.returncode and not unexpected(results), done.stdout + done.stderr
    assert {name.partition(' ')[0] for name in results['cases']} == {'mae', 'dino'}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_has_the_bits_of_one_that_is_not(tmp_path):
    done, results = run(tmp_path, 'resume', '--small', '--only', '^deterministic')
    assert not done.returncode and not unexpected(results), done.stdout + done.stderr
    case = results['cases']['deterministic']
    assert case['same_bits'] and case['same_losses_after'] and 0 < case['resumed_after'] < 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trace(tmp_path):
    done, results = run(tmp_path, 'trace')
    assert not done.returncode and not unexpected(results), done.stdout + done.stderr
    (case,) = results['cases'].values()
    assert 0 <= case['idle'] < 1 and case['host_ms'] > 0 and case['computes_ms'] > 0


def test_the_seconds_of_a_script_end_it_and_keep_what_there_is(tmp_path):
    text = (
        'import sys, subprocess, time\nfrom benchmarks.gpu import report as r\n'
        'report = r.Report(r.arguments(""))\nreport.add("one", ms=1/3)\n'
        'child = subprocess.Popen(["sleep", "600"], start_new_session=True)\n'
        'report.children.append(child)\nprint(child.pid)\n'
        'with report.case("two"):\n    raise ValueError("no\\nmore")\n'
        'report.timer.function.__self__ is report or exit(4)\n'
        'import threading; threading.Timer(0.2, report.timer.function).start()\n'
        'with report.case("three"):\n    time.sleep(600)\n'
    )
    out = tmp_path / 'out.json'
    done = subprocess.run(
        [sys.executable, '-c', text, '--out', str(out), '--seconds', '500'], cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    results = json.loads(out.read_text())
    assert done.returncode == 3 and results['cases'] == {'one': {'ms': 0.3333}}, done.stderr
    assert results['skipped'] == {
        'two': 'ValueError: no', 'three': 'it was not finished when the seconds were over'
    }  # fmt: skip
    child, deadline = int(done.stdout.splitlines()[1]), time.monotonic() + 60
    while (pathlib.Path(f'/proc/{child}').exists()
           and ') Z ' not in pathlib.Path(f'/proc/{child}/stat').read_text()):  # fmt: skip
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Instant:
    """A worker whose programs are built and run at once, or of torch never."""

    def __init__(self, report, torch=False):
        self.report, self.torch, self.over = report, torch, False

    def ended(self):
        return self.over

    def send(self, **request):
        pass

    def receive(self, spare=2):
        if self.torch:
            self.over, self.report.spent = True, 225 - spare
            raise Ended('not finished')
        if self.report.left() <= spare:
            raise Ended('no seconds were left')
        return {'flops': 1.0, 'memory': 1, 'build_s': 1.0, 'seconds': 0.1}

    def ask(self, **request):
        return self.receive()


def test_ours_is_timed_where_a_contender_takes_all_seconds_to_compile(tmp_path, monkeypatch):
    class Clock(reports.Report):
        spent = 0

        def left(self):
            return 225 - self.spent

    out = ['x', '--out', str(tmp_path / 'out.json')]
    monkeypatch.setattr(reports.sys, 'argv', out)
    report = Clock(reports.arguments(''))
    report.results['device'] = {'peak': None, 'product': 1.0}
    comparison = speed.Comparison(report, small=False)
    comparison.workers = {'jax': Instant(report), 'torch': Instant(report, torch=True)}
    try:
        comparison.run(('vit-b/16', 'train', 256), ['timm'])
    finally:
        report.end()
    assert list(report.results['cases']) == ['vit-b/16 train 256 ours']
    assert report.results['skipped'] == {'vit-b/16 train 256 timm': 'Ended: not finished'}


def test_a_silent_worker_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(reports.sys, 'argv', ['x', '--out', str(tmp_path / 'out.json')])
    monkeypatch.setattr(reports, 'BEGAN', time.monotonic())  # else its seconds may be over
    report = reports.Report(reports.arguments(''))
    silent = Worker(report)  # as it is asked nothing
    with pytest.raises(Ended, match='not finished when 225 s were left'):
        silent.receive(225)
    assert silent.ended()
    report.end()


def test_the_first_cases_are_those_of_the_bars():
    first = [group[:2] for group in speed.groups()][: len(speed.BARS)]
    assert first == [(model, 'train') for model in speed.BARS]
    everything = {
        (model, what, batch, contender)
        for model, what, batch, contenders in speed.groups() for contender in contenders
    }  # fmt: skip
    assert len(everything) == 3 * 3 * 2 * 6


def test_what_a_timeline_says():
    """Two streams: kernels with a gap of 2 of 20 ms, a copy half of which is behind them."""
    found = {
        'put': [(0, 1), (2, 3), (11, 12)], 'dispatch': [(1, 2), (3, 4), (12, 13)],
        'wait': [(4, 10), (13, 16)],
        'computes': [(2, 8), (5, 9), (11, 15), (15, 23)], 'crosses': [(8, 10)],
    }  # fmt: skip
    figures = trace.figures(found, 3)
    assert figures['host_ms'] == 2 and figures['wait_ms'] == 4.5 and figures['put_ms'] == 1
    assert figures['idle'] == pytest.approx(2 / 20) and figures['hidden'] == 0.5
    assert figures['computes_ms'] == 19 / 3 and figures['ahead'] == 1
    assert trace.kind_of('/device:GPU:0', 'Stream #7(MemcpyH2D)', 'MemcpyH2D') == 'crosses'
    assert trace.kind_of('/device:GPU:0', 'Stream #1(Compute)', 'fusion_3') == 'computes'
    assert trace.kind_of('/device:GPU:0', 'Stream #1(Compute)', 'MemcpyD2D') == 'computes'
    assert trace.kind_of('/device:GPU:0', 'Stream #2(MemcpyD2H)', 'MemcpyD2H') is None
    assert trace.kind_of('/device:GPU:0', 'XLA Modules', 'jit_on_mesh') is None
    host = trace.figures(found | {'computes': [], 'crosses': []}, 3)
    assert host['host_ms'] == 2 and 'nothing of the device' in host['note'] and len(host) == 4


def test_numbers_of_the_file_are_those_of_json():
    found = reports.rounded({'a': [1 / 3, float('inf')], 'b': float('nan'), 'c': 123456})
    assert found == {'a': [0.3333, 'inf'], 'b': 'nan', 'c': 123456}


def test_the_error_by_default_is_of_products_as_the_device_has_them(monkeypatch):
    """Loaded models compute in float32 by themselves."""
    monkeypatch.syspath_prepend(ROOT / 'tests')
    seen = []

    def on(device, function, *arguments):
        seen.append(str(jax.make_jaxpr(function)(*arguments)))
        return function(*arguments)

    monkeypatch.setattr(checks, 'on', on)
    found, tolerance, more = checks.converted('official_vit_prelogits', True)
    assert max(found, more['error_by_default']) < tolerance
    assert sorted(text.count('Precision.HIGHEST') > 0 for text in seen) == [False, True]


def test_turns_alternate():
    calls = []
    runs = [lambda: calls.append('a') or 1, lambda: calls.append('b') or 2]
    assert reports.turns(runs, 3) == ([1] * 3, [2] * 3) and calls == list('abbaab')
