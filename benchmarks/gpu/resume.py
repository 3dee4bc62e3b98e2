"""Whether a run on a GPU that is killed and resumed has the bits of one that is not.

    python -m benchmarks.gpu.resume --out resume.json

Processes of their own train B/16 with dropout on noise, with the step and the checkpoints of a run.
One trains to the end; one is killed (SIGKILL) and another one resumes it. XLA's flags exclude
operations that add in any order, and each process loads the kernels that the first one has chosen,
as --deterministic has them kept in a workdir. The same without these flags shows whether they were
needed, and what they cost.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.gpu import report as reports

STEPS, KILLED, EVERY = 10, 5, 2  # a checkpoint each second step
SMALL = dict(width=32, depth=2, num_heads=4, mlp_dim=64)


def child(settings):
    """Trains to the last step, or to `stop` and then waits to be killed; prints a line of JSON."""
    import jax

    small = settings['small'] or jax.default_backend() == 'cpu'
    found = train(settings['workdir'], small, settings['stop'])
    print(json.dumps(found | {'device': jax.devices()[0].device_kind}), flush=True)


def train(workdir, small, stop):
    """The steps that are missing in a workdir; what is to be said of them."""
    import jax

    from benchmarks import peers
    from vit_jax import models, optim, sharding, step
    from vit_jax.run.checkpoint import Checkpoints

    side, batch = (32, 4) if small else (224, 64)
    model = models.build(
        'vit-b/16', num_classes=1000, dtype='bfloat16', dropout=0.1, **(SMALL if small else {})
    )
    mesh = sharding.make_mesh(jax.devices()[:1])
    objective = peers.classifier(model, (side, side, 3))
    tx = optim.make(step.abstract_params(objective), 100, lr=1e-3, clip=1.0, ema=0.9)
    abstract = step.abstract_state(objective, tx, mesh)
    advance = step.compiled(objective, tx, abstract, mesh)
    seconds, losses = [], []
    with Checkpoints(workdir, every=EVERY) as checkpoints:
        state = checkpoints.resume(abstract)
        if state is None:
            state = step.init(objective, tx, 0, abstract)
        first = int(state.step)
        for n in range(first, STEPS):
            data = peers.arrays(side, batch, 1000)
            data['image'] = data['image'] + data['image'].dtype.type(n)  # a batch of each step
            began = time.perf_counter()
            state, metrics = advance(state, sharding.put(data, mesh), {})
            losses.append(float(metrics['loss']))
            seconds.append(time.perf_counter() - began)
            if stop is None or n + 1 < stop:
                if (n + 1) % EVERY == 0:
                    checkpoints.save(n + 1, state, {})
                continue
            checkpoints.wait()
            print(json.dumps({'losses': losses, 'stopped': n + 1}), flush=True)
            time.sleep(600)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(state)):
        digest.update(leaf.tobytes())
    return {
        'first': first, 'losses': losses, 'digest': digest.hexdigest()[:16],
        'compile_s': seconds[0], 'ms': 1e3 * statistics.median(seconds[1:]),
    }  # fmt: skip


def environment_of(workdir, deterministic):
    """What a process in a workdir is started with."""
    # Else JAX would read the compiled program, in which the kernels are.
    environment = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
    flags = [environment.get('XLA_FLAGS', '')]
    if deterministic:
        kept = workdir / 'kernels.textproto'
        flags.append('--xla_gpu_exclude_nondeterministic_ops=true')
        flags.append(f'--xla_gpu_dump_autotune_results_to={workdir / "dump.textproto"}')
        flags += [f'--xla_gpu_load_autotune_results_from={kept}'] if kept.exists() else []
    return environment | {'XLA_FLAGS': ' '.join(flags).strip()}


def size(path):
    return path.stat().st_size if path.exists() else 0


def started(report, workdir, small, deterministic, stop=None):
    """The line of a process that trains in a workdir; one that stops is killed."""
    workdir.mkdir(exist_ok=True)
    settings = dict(workdir=str(workdir), small=small, stop=stop)
    process = subprocess.Popen(
        [sys.executable, '-m', 'benchmarks.gpu.resume', '--child', json.dumps(settings)],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=environment_of(workdir, deterministic),
    )  # fmt: skip
    report.children.append(process)
    line = process.stdout.readline()
    if stop is not None and line:
        process.send_signal(signal.SIGKILL)
    if process.wait() != (0 if stop is None else -signal.SIGKILL) or not line:
        raise RuntimeError(f'a process ended with status {process.returncode}')
    kept, dumped = workdir / 'kernels.textproto', workdir / 'dump.textproto'
    if size(dumped) > size(kept):
        shutil.copy(dumped, kept)
    return json.loads(line)


def compared(report, folder, small, deterministic):
    """Trains without a break, and killed and resumed; all with the kernels of the first."""
    one, other = folder / 'one', folder / 'other'

    def run(workdir, stop=None):
        return started(report, workdir, small, deterministic, stop)

    whole = run(one)
    if deterministic and size(one / 'kernels.textproto'):
        other.mkdir()
        shutil.copy(one / 'kernels.textproto', other)
    kept = size(one / 'kernels.textproto')
    killed, resumed = run(other, KILLED), run(other)
    first = resumed['first']
    return {
        'device': whole['device'], 'resumed_after': first,
        'same_bits': whole['digest'] == resumed['digest'],
        'same_losses_before_the_kill': whole['losses'][: killed['stopped']] == killed['losses'],
        'same_losses_after': whole['losses'][first:] == resumed['losses'],
        'kernels_kept': kept, 'kernels_after_the_resume': size(other / 'kernels.textproto'),
        'ms': whole['ms'], 'compile_s': whole['compile_s'],
        'compile_s_resumed': resumed['compile_s'],
    }  # fmt: skip


def main():
    options = reports.arguments(__doc__, child=dict(help=argparse.SUPPRESS))
    if options.child:
        return child(json.loads(options.child))
    report = reports.Report(options)
    for name, deterministic in (('deterministic', True), ('not deterministic', False)):
        if not report.wants(name, 60 if not options.small else 5):
            continue
        with report.case(name), tempfile.TemporaryDirectory() as folder:
            found = compared(report, pathlib.Path(folder), options.small, deterministic)
            right = found['same_bits'] and 0 < found['resumed_after'] < STEPS
            report.add(name, **({'ok': right} if deterministic else {}), **found)
    return report.end()


if __name__ == '__main__':
    sys.exit(main())
