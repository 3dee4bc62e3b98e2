"""Times the command until the first step: python -m benchmarks.startup --config FILE

Prints a JSON line of medians over --rounds: seconds from the start of the process until step 1 is
done, with an empty cache of compiled programs (cold) and with that of an earlier start (warm), and
seconds of --help. With --processes the run has so many on this machine, which share the cache;
`apart` is a warm start in which all but process 0 have empty caches of their own.
--config.KEY=VALUE changes a setting: with 4 processes the digits need
--config.evals.test.batch_size=360.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import jax
from absl import flags

from vit_jax import cli

CONFIG = flags.DEFINE_string('config', 'experiments/digits.py', 'Experiment file.')
ROUNDS = flags.DEFINE_integer('rounds', 5, 'Starts of each kind.')
PROCESSES = flags.DEFINE_integer('processes', 1, 'Processes of the run.', lower_bound=1)


def seconds(commands, start, environment):
    """Seconds until the first process prints a line that begins with `start`; then kills all."""
    began, lines = time.perf_counter(), []
    how = dict(env=environment, text=True, stderr=subprocess.STDOUT)
    others = [subprocess.Popen(c, **how, stdout=subprocess.DEVNULL) for c in commands[1:]]
    first = subprocess.Popen(commands[0], **how, stdout=subprocess.PIPE)
    try:
        for line in first.stdout:
            lines.append(line)
            if line.startswith(start):
                return time.perf_counter() - began
    finally:
        for process in (first, *others):
            process.kill()
            process.wait()
    raise RuntimeError(f'{commands[0]} has not printed {start!r}: {"".join(lines)}')


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def commands_of(workdir, caches, changes):
    """The commands of all processes of a run, each with its cache."""
    base = [
        sys.executable, '-m', 'vit_jax.main', '--config', CONFIG.value, '--workdir', workdir,
        *(f'--config.{key}={text}' for key, text in changes),
    ]  # fmt: skip
    count, port = len(caches), free_port()
    where = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={count}']
    commands = [[*base, f'--compilation_cache={cache}'] for cache in caches]
    if count == 1:
        return commands
    return [[*command, *where, f'--process_id={i}'] for i, command in enumerate(commands)]


def main(argv, changes):
    environment = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
    count = PROCESSES.value
    kinds = ['cold', 'warm', *(['apart'] if count > 1 else [])]
    figures = {kind: [] for kind in (*kinds, 'help')}
    for _ in range(ROUNDS.value):
        with tempfile.TemporaryDirectory() as folder:
            for kind in kinds:
                own = [f'{folder}/{i}' if kind == 'apart' and i else f'{folder}/compiled'
                       for i in range(count)]  # fmt: skip
                commands = commands_of(f'{folder}/{kind}', own, changes)
                figures[kind].append(seconds(commands, 'step 1/', environment))
        helped = [[sys.executable, '-m', 'vit_jax.main', '--help']]
        figures['help'].append(seconds(helped, '  --workdir', environment))
    print(json.dumps({
        'config': CONFIG.value, 'device': jax.devices()[0].device_kind, 'rounds': ROUNDS.value,
        'processes': count, **{k: round(statistics.median(v), 2) for k, v in figures.items()},
    }))  # fmt: skip


if __name__ == '__main__':
    cli.run(main, 'config')
