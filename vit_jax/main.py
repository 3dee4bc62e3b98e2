"""Trains one experiment: python -m vit_jax.main --config FILE[:ARG] --workdir DIR.

Any setting can be changed on the command line: --config.optim.lr=3e-4. The same command goes on
with a run that was stopped or killed.

Exit status: 0 done, 2 a mistake that its one line names, 3 a loss or gradient that is no number,
130 and 143 stopped by SIGINT and SIGTERM with everything saved.
"""

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


def main(argv, overrides):
    if argv[1:]:
        raise UserError(f'unexpected argument {argv[1]!r}; flags begin with --')
    with stopping.on_signal() as stop:
        return run(overrides, stop)


def run(overrides, stop):
    """Trains and reports; the exit status."""
    from vit_jax import config, report, train, workdir  # a signal is heard while these load

    begun = workdir.read_json(workdir.located(WORKDIR.value) / 'config.json')
    settings = config.load(CONFIG.value, overrides, begun)
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


if __name__ == '__main__':
    cli.run(main, 'config')
