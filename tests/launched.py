"""Real runs of tests/tiny.py for tests: in processes of their own, and what they left behind."""

import itertools
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import xla_flags
from etils import epath
from PIL import Image

from vit_jax import step
from vit_jax.run import workdir
from vit_jax.run.checkpoint import Checkpoints

TINY = pathlib.Path(__file__).with_name('tiny.py')
ENVIRONMENT = os.environ | {'XLA_FLAGS': xla_flags.devices(1)}
TIMES = ('seconds', 'images_per_s', 'data_wait')


def write_images(path, counts, classes=('ant', 'bee', 'cat'), seed=0):
    """path/part/class/i.png: noise, brighter by class, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    for (part, count), (label, name) in itertools.product(counts.items(), enumerate(classes)):
        for i in range(count):
            file = path / part / name / f'{i}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 96, (10, 8, 3)) + 70 * label
            Image.fromarray(pixels.astype(np.uint8)).save(file)
    return path


def log_of(workdir):
    """The file with what the runs in a workdir have said."""
    return pathlib.Path(f'{workdir}.log')


def command(folder, workdir, *flags, config=TINY):
    return [sys.executable, '-m', 'vit_jax.main', f'--config={config}:{folder}',
            f'--workdir={workdir}', *flags]  # fmt: skip


def start(
    folder, workdir, *flags, config=TINY, devices=1, log=None, environment=None, **options
):
    """A running process on CPU devices; its output is appended to `log`, or else workdir.log.

    `environment` are variables beside the usual ones, `options` are those of Popen.
    """
    variables = ENVIRONMENT | {'XLA_FLAGS': xla_flags.devices(devices)} | (environment or {})
    with (log_of(workdir) if log is None else log).open('a') as file:
        return subprocess.Popen(
            command(folder, workdir, *flags, config=config), stdout=file, stderr=file,
            env=variables, **options,
        )  # fmt: skip


def finish(folder, workdir, *flags, **options):
    """Exit status and output of a whole run; `options` are those of `start`."""
    status = start(folder, workdir, *flags, **options).wait(timeout=200)
    return status, (options.get('log') or log_of(workdir)).read_text()


def kill(process):
    """Kills a process, which can't prepare for it, and waits for its end."""
    process.kill()
    return process.wait()


def passes(code, *arguments):
    """Runs Python code on its own in a new process, which must end with status 0."""
    done = subprocess.run(
        [sys.executable, '-c', code, *arguments], env=ENVIRONMENT, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def run(module, *arguments, environment=None):
    """Exit status, stdout and stderr of a whole command of the package, on one device."""
    done = subprocess.run(
        [sys.executable, '-m', f'vit_jax.{module}', *map(str, arguments)],
        capture_output=True, text=True, env=ENVIRONMENT | (environment or {}), timeout=250,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def wait_for(condition, process, workdir):
    """Returns as soon as the condition holds; fails where the process ends before."""
    deadline = time.time() + 120
    while not condition():
        assert process.poll() is None, log_of(workdir).read_text()
        assert time.time() < deadline, log_of(workdir).read_text()
        time.sleep(0.001)


def metrics(workdir):
    """The complete lines of metrics.jsonl."""
    path = pathlib.Path(workdir) / 'metrics.jsonl'
    text = path.read_text() if path.exists() else ''
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith('\n')]


def timeless(workdir):
    """The metrics without what a clock has measured."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(workdir)]


def last_step(workdir):
    """The last step that metrics.jsonl has a training line of."""
    return max((line['step'] for line in metrics(workdir) if 'loss' in line), default=0)


def checkpoints(workdir):
    """Steps with a finished checkpoint."""
    folder = pathlib.Path(workdir) / 'checkpoints'
    return sorted(int(p.name) for p in folder.glob('*') if p.name.isdigit())


def unfinished(workdir):
    """Folders of checkpoints that are being, or were never completely, written."""
    return list((pathlib.Path(workdir) / 'checkpoints').glob('*-tmp*'))


def state(workdir, step):
    """All arrays of a checkpoint, by Orbax alone: {name: numpy array}."""
    path = pathlib.Path(workdir).resolve() / 'checkpoints' / str(step) / 'state'
    with ocp.PyTreeCheckpointer() as checkpointer:
        plain = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            checkpointer.metadata(path).item_metadata.tree,
        )
        tree = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=plain))
    return {
        jax.tree_util.keystr(k, simple=True, separator='/'): v
        for k, v in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same_bits(a, b):
    assert a.keys() == b.keys() and len(a) > 30
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


def write_run(path, config, parts, params):
    """A workdir as a run leaves it that ends with these parameters, and trains nothing."""
    with Checkpoints(path) as saved:
        saved.save(config.steps, step.begin(params, parts.objective, parts.tx, parts.abstract), {})
    workdir.write_json(epath.Path(path) / 'config.json', config.to_dict())
    workdir.write_json(epath.Path(path) / 'classes.json', list(parts.task.names['classes']))
    return path
