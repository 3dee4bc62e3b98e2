"""Times saving and restoring checkpoints: python -m benchmarks.checkpoint [--models vit-b/16].

For each model: the float32 state of AdamW, in a process of its own, alone and beside as many busy
processes as there are cores. Prints medians of --rounds as a JSON line, and a sentence on stderr:

    held_ms      time that `Checkpoints.save` blocks the training loop, after the previous write
    copy_ms      a plain copy of the same arrays from the device to the host
    step_ms      a step that changes every array in place
    after_ms     the same, as the first step after a save: on the CPU, where the host's copy is the
                 array itself, it allocates new memory and waits until fingerprints are computed
    write_gb_s   bytes of the state by the seconds from the call to the end of the write
    read_gb_s    the same of `Checkpoints.restore`, fingerprints compared, file in the page cache
    exit_ms      a save directly after another one, as at a SIGTERM, until all is written

Then, for a state saved from 8 simulated devices (fsdp=8), read_gb_s onto 8, 4, 2 and 1 of them.
Writes to a temporary folder below --folder.
"""

import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from benchmarks import peers
from vit_jax import models, optim, sharding, step
from vit_jax.run.checkpoint import Checkpoints

MODELS = flags.DEFINE_list('models', 'vit-b/16,vit-l/16', 'Models by name.')
ROUNDS = flags.DEFINE_integer('rounds', 5, 'Saves and reads of each state.')
FOLDER = flags.DEFINE_string('folder', None, 'Folder to write to. Default: for temporary files.')
ONE = flags.DEFINE_string('one', None, 'Internal: saves or devices, for one model in this process.')
IMAGE = (224, 224, 3)
RATES = ('write', 'read')


def abstract_state(name, devices, **mesh):
    """Shapes and shardings of a model's state, on some of the devices."""
    model = models.build(name, num_classes=1000)
    objective = peers.classifier(model, IMAGE)
    tx = optim.make(step.abstract_params(objective), 1000, weight_decay=0.1)
    return step.abstract_state(objective, tx, sharding.make_mesh(devices, **mesh))


def noise(abstract):
    """A state of random numbers, which do not compress."""
    rng = np.random.default_rng(0)

    def place(x):
        if x.dtype != jnp.float32:
            return jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding)
        return jax.device_put(rng.standard_normal(x.shape, np.float32), x.sharding)

    return jax.tree.map(place, abstract)


@jax.jit(donate_argnums=0)
def advance(state):
    """A stand-in for a step: changes every array in place."""
    return jax.tree.map(lambda x: x + jnp.ones_like(x), state)


def copied(x):
    """A host copy of an array; on the CPU device_get would be the array itself."""
    return np.array(x) if jax.default_backend() == 'cpu' else jax.device_get(x)


def seconds(work):
    """Calls `work`; (seconds that it takes, its result)."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def step_seconds(state):
    return seconds(lambda: jax.block_until_ready(advance(state)))


def round_of_saves(checkpoints, abstract, state, n):
    """({what: seconds}, the state) of three saves, at the steps from n on, and a read."""
    row = {}
    _, state = step_seconds(state)
    row['step'], state = step_seconds(state)
    row['copy'], _ = seconds(lambda: jax.tree.map(copied, state))
    _, state = step_seconds(state)  # arrays keep what was copied of them once
    began = time.perf_counter()
    row['held'], _ = seconds(lambda: checkpoints.save(n, state, {}))
    row['after'], state = step_seconds(state)
    checkpoints.wait()
    row['write'] = time.perf_counter() - began
    checkpoints.save(n + 1, state, {})
    _, state = step_seconds(state)
    row['exit'], _ = seconds(
        lambda: (checkpoints.save(n + 2, state, {}), checkpoints.wait())
    )
    row['read'], _ = seconds(lambda: checkpoints.restore(n + 2, abstract))
    return row, state


def measure_saves(name, folder):
    """Medians over the rounds, of one model on one device."""
    abstract = abstract_state(name, jax.devices()[:1])
    state = jax.block_until_ready(noise(abstract))
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9
    rows = []
    with Checkpoints(folder, keep=1) as checkpoints:
        for n in range(ROUNDS.value + 1):
            row, state = round_of_saves(checkpoints, abstract, state, 3 * n)
            rows += [row] if n else []  # the first one compiles
    median = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return dict(
        device=jax.devices()[0].device_kind, gigabytes=round(size, 3),
        **{f'{key}_ms': round(1000 * median[key], 1) for key in median if key not in RATES},
        held_by_copy=round(statistics.median(row['held'] / row['copy'] for row in rows), 2),
        **{f'{key}_gb_s': round(size / median[key], 3) for key in RATES},
    )  # fmt: skip


def measure_devices(name, folder):
    """GB/s of restoring onto 8, 4, 2 and 1 devices a state that eight have saved."""
    state = noise(abstract_state(name, jax.devices(), fsdp=8))
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9
    found = {}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(0, state, {})
        checkpoints.wait()
        for devices in (8, 4, 2, 1):
            abstract = abstract_state(name, jax.devices()[:devices], fsdp=devices)
            restore = functools.partial(checkpoints.restore, 0, abstract)
            times = [seconds(restore)[0] for _ in range(ROUNDS.value + 1)]
            found[f'read_gb_s_onto_{devices}'] = round(size / statistics.median(times[1:]), 3)
    return dict(gigabytes=round(size, 3), saved_from=8, **found)


@contextlib.contextmanager
def busy(count):
    """Keeps `count` processes busy."""
    processes = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def in_new_process(which, model):
    """Measures in a new process; the JSON object that it prints."""
    environment = os.environ | {'XLA_FLAGS': ''}
    if which == 'devices':
        environment['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
        environment['JAX_PLATFORMS'] = 'cpu'
    command = [sys.executable, '-m', 'benchmarks.checkpoint', f'--one={which}', f'--models={model}']
    command += [f'--rounds={ROUNDS.value}', *([f'--folder={FOLDER.value}'] if FOLDER.value else [])]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    return json.loads(done.stdout)


def say(row):
    print(json.dumps(row), flush=True)


def main(argv):
    logging.set_verbosity(logging.WARNING)
    if ONE.value:
        with tempfile.TemporaryDirectory(dir=FOLDER.value) as folder:
            measure = dict(saves=measure_saves, devices=measure_devices)[ONE.value]
            say(measure(MODELS.value[0], folder))
        return
    for model in MODELS.value:
        for count in (0, os.cpu_count()):
            with busy(count):
                row = in_new_process('saves', model)
            say(dict(model=model, busy=count, **row))
            print(
                f'{model}, {row["gigabytes"]} GB beside {count} busy processes: the loop is '
                f'blocked for {row["held_ms"]:.0f} ms, {row["held_by_copy"]} of a copy; written at '
                f'{row["write_gb_s"]} GB/s, read at {row["read_gb_s"]} GB/s', file=sys.stderr,
            )  # fmt: skip
        say(dict(model=model, **in_new_process('devices', model)))


if __name__ == '__main__':
    app.run(main)
