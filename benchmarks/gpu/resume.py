"""Whether a run on a GPU that is killed and resumed has the bits of one that is not.

    python -m benchmarks.gpu.resume --out resume.json

Processes of their own train B/16 with dropout on noise, with the step and the checkpoints of a run;
it has four blocks, so that six processes compile within the time.
One trains to the end; one is killed (SIGKILL) and another one resumes it. As with --deterministic,
operations that add in any order are excluded and the kernels are kept in the workdir; those of the
first process go to the other workdir, too. The same without it shows whether it was needed, and
what it costs.
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
    from etils import epath

    from vit_jax.run import determinism

    workdir = epath.Path(settings['workdir'])
    with determinism.repeatable(workdir, settings['deterministic']) as keep_kernels:
        small = settings['small'] or jax.default_backend() == 'cpu'
        found = train(workdir, small, settings['stop'], keep_kernels)
    print(json.dumps(found | {'device': jax.devices()[0].device_kind}), flush=True)


def train(workdir, small, stop, keep_kernels):
    """The steps that are missing in a workdir; what is to be said of them."""
    import jax

    from benchmarks import peers
    from vit_jax import models, optim, sharding, step
    from vit_jax.run.checkpoint import Checkpoints

    side, batch = (32, 4) if small else (224, 64)
    model = models.build(
        'vit-b/16', num_classes=1000, dtype='bfloat16', dropout=0.1,
        **(SMALL if small else dict(depth=4)),
    )  # fmt: skip
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
                    keep_kernels()
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


def started(report, workdir, small, deterministic, stop=None):
    """The line of a process that trains in a workdir; one that stops is killed."""
    workdir.mkdir(exist_ok=True)
    settings = dict(
        workdir=str(workdir), small=small, stop=stop, deterministic=deterministic
    )  # fmt: skip
    # Else JAX would read the compiled program, in which the kernels are.
    environment = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
    process = subprocess.Popen(
        [sys.executable, '-m', 'benchmarks.gpu.resume', '--child', json.dumps(settings)],
        stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment,
    )  # fmt: skip
    report.children.append(process)
    line = process.stdout.readline()
    if stop is not None and line:
        process.send_signal(signal.SIGKILL)
    if process.wait() != (0 if stop is None else -signal.SIGKILL) or not line:
        raise RuntimeError(f'a process ended with status {process.returncode}')
    return json.loads(line)


def size_of_kernels(workdir):
    """Bytes of the kernels that are kept in a workdir."""
    return sum(path.stat().st_size for path in (workdir / 'kernels').glob('*'))


def compared(report, folder, small, deterministic):
    """Trains without a break, and killed and resumed; all with the kernels of the first."""
    one, other = folder / 'one', folder / 'other'

    def run(workdir, stop=None):
        return started(report, workdir, small, deterministic, stop)

    whole = run(one)
    if (one / 'kernels').exists():
        shutil.copytree(one / 'kernels', other / 'kernels')
    kept = size_of_kernels(one)
    killed, resumed = run(other, KILLED), run(other)
    first = resumed['first']
    return {
        'device': whole['device'], 'resumed_after': first,
        'same_bits': whole['digest'] == resumed['digest'],
        'same_losses_before_the_kill': whole['losses'][: killed['stopped']] == killed['losses'],
        'same_losses_after': whole['losses'][first:] == resumed['losses'],
        'kernels_kept': kept, 'kernels_after_the_resume': size_of_kernels(other),
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
