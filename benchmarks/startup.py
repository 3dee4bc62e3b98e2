"""Times the command until the first step: python -m benchmarks.startup --config FILE

Prints a JSON line of medians over --rounds: seconds from the start of the process until step 1 is
done, with an empty cache of compiled programs (cold) and with that of an earlier start (warm), and
seconds of --help. --config.KEY=VALUE changes a setting.
"""

import json
import os
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


def seconds(command, start, environment):
    """Seconds until a process prints a line that begins with `start`; then terminates it."""
    began = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith(start):
                taken = time.perf_counter() - began
                process.terminate()
                process.stdout.read()
                return taken
    raise RuntimeError(f'{command} has not printed {start!r}: {"".join(lines)}')


def main(argv, changes):
    environment = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
    base = [sys.executable, '-m', 'vit_jax.main']
    figures = {'cold': [], 'warm': [], 'help': []}
    for _ in range(ROUNDS.value):
        with tempfile.TemporaryDirectory() as folder:
            for kind in ('cold', 'warm'):
                command = [
                    *base, '--config', CONFIG.value, '--workdir', f'{folder}/{kind}',
                    '--compilation_cache', f'{folder}/compiled',
                    *(f'--config.{key}={text}' for key, text in changes),
                ]  # fmt: skip
                figures[kind].append(seconds(command, 'step 1/', environment))
        figures['help'].append(seconds([*base, '--help'], '  --workdir', environment))
    print(json.dumps({
        'config': CONFIG.value, 'device': jax.devices()[0].device_kind, 'rounds': ROUNDS.value,
        **{k: round(statistics.median(v), 2) for k, v in figures.items()},
    }))  # fmt: skip


if __name__ == '__main__':
    cli.run(main, 'config')
