"""Trains one experiment: python -m vit_jax.main --config FILE[:ARG] --workdir DIR.

Any setting can be changed on the command line: --config.optim.lr=3e-4. The same command goes on
with a run that was stopped or killed.

Exit status: 0 done, 2 a mistake that its one line names, 3 a loss or gradient that is no number,
130 and 143 stopped by SIGINT and SIGTERM with everything saved.
"""

import re
import sys

from absl import flags

from vit_jax import cli
from vit_jax import stop as stopping
from vit_jax.errors import UserError

CONFIG = flags.DEFINE_string(
    'config', None, 'Experiment file, with an argument after a colon where it takes one. '
    '--config.KEY=VALUE changes one of its settings: --config.optim.lr=3e-4',
    required=True,
)  # fmt: skip
WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Folder of the run, local or gs://...', required=True
)
ALLOW = flags.DEFINE_bool(
    'allow_config_change', False,
    'Go on with a run although model, data, seed or optimizer differ from what it was begun with.',
)  # fmt: skip


def main(argv):
    rest, overrides = split_overrides(argv[1:])
    if rest:
        raise UserError(f'unexpected argument {rest[0]!r}; flags begin with --')
    with stopping.on_signal() as stop:
        return run(overrides, stop)


def split_overrides(argv):
    """Arguments without those of the form --config.KEY=VALUE, and these as (key, value)."""
    rest, overrides = [], []
    for arg in argv:
        match = re.fullmatch(r'--?config\.([^=]+)(=(.*))?', arg, re.DOTALL)
        if match and match[2] is None:
            raise UserError(f'{arg} has no value; write {arg}=VALUE')
        overrides.append((match[1], match[3])) if match else rest.append(arg)
    return rest, overrides


def run(overrides, stop):
    """Trains and reports; the exit status."""
    from vit_jax import config, report, train, workdir  # a signal is heard while these load

    settings = config.load(CONFIG.value, overrides)
    with workdir.held(WORKDIR.value) as path:
        try:
            result = train.train(settings, path, stop, allow_config_change=ALLOW.value)
        except report.NotFinite as e:
            print(f'error: {e}', file=sys.stderr)
            return 3
    if result is None:
        print(f'Stopped and saved. To go on, give the same command again (workdir {path}).')
        return 128 + stop.signum
    report.print_result(path, result)
    return 0


def parse(argv):
    """absl's parsing, which leaves --config.KEY=VALUE to `main`."""
    rest, overrides = split_overrides(argv)
    return flags.FLAGS(rest) + [f'--config.{key}={value}' for key, value in overrides]


if __name__ == '__main__':
    cli.run(main, parse)
