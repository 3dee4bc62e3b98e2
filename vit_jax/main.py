"""Trains one experiment: python -m vit_jax.main --config FILE[:ARG] --workdir DIR.

Any setting can be changed on the command line: --config.optim.lr=3e-4. The same command resumes a
run that was stopped or killed.

Several processes, one per host or per GPU, are detected on TPU pods and under SLURM and Open MPI;
elsewhere, give --coordinator, --num_processes and --process_id.

Exit status: 0 done, 1 results not as expected (with --check), 2 a mistake of the user, named in one
line, 3 a non-finite loss or gradient, 4 another process was lost, 129, 130 and 143 stopped by
SIGHUP, SIGINT and SIGTERM with everything saved.
"""

import signal
import sys
from collections.abc import Callable

from absl import flags

from vit_jax import cli
from vit_jax.distributed import stop as stopping
from vit_jax.errors import Lost, UserError
from vit_jax.io.text import printable

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
COORDINATOR = flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of process 0, which listens there.'
)
PROCESSES = flags.DEFINE_integer(
    'num_processes', None, 'Processes of the run.', lower_bound=1, upper_bound=100_000
)
PROCESS = flags.DEFINE_integer('process_id', None, 'Number of this process, from 0.', lower_bound=0)
EXPECT_PROCESSES = flags.DEFINE_integer(
    'expect_processes', None, 'Processes that the run must have, no more and no fewer.',
    lower_bound=1,
)
EXPECT_DEVICES = flags.DEFINE_integer(
    'expect_devices', None, 'Devices that all processes together must have, no more and no fewer.',
    lower_bound=1,
)  # fmt: skip
TIMEOUT = flags.DEFINE_integer(
    'peer_timeout', 60, 'Seconds after which a process that does not report, or that others wait '
    'for, ends the run.', lower_bound=5, upper_bound=1_000_000,
)  # fmt: skip
START = flags.DEFINE_integer(
    'start_timeout', 600, 'Seconds that processes wait for one that starts, restores, compiles or '
    'saves.', lower_bound=1, upper_bound=1_000_000,
)  # fmt: skip
CHECK = flags.DEFINE_bool(
    'check', False, 'Exit with status 1 unless every number that the experiment expects was '
    'measured and is within its tolerance.',
)  # fmt: skip
DRY_RUN = flags.DEFINE_bool(
    'dry_run', False, 'Check the settings, say what the run would be, and train nothing. Neither '
    'its data nor the checkpoint that it begins from need be there; what they alone tell '
    'is unknown. A checkpoint that is there must fit the model.',
)  # fmt: skip
PROFILE = flags.DEFINE_string(
    'profile', None, 'STEP:COUNT: trace so many steps from that one on, into WORKDIR/profile, for '
    'XProf and Perfetto.',
)  # fmt: skip
CACHE = flags.DEFINE_string(
    'compilation_cache', None, 'Folder in which compiled programs are kept for the next start, or '
    'off; by default ~/.cache/vit_jax/compiled, or WORKDIR/compiled where that is on gs://.',
)  # fmt: skip
DETERMINISTIC = flags.DEFINE_bool(
    'deterministic', True, 'On GPUs, exclude operations that add in any order and keep in '
    'WORKDIR/kernels which kernels XLA chose, so that a resumed run repeats to the bit. CPUs and '
    'TPUs need neither.',
)  # fmt: skip


def main(argv: list[str], overrides: list[tuple[str, str]]) -> int:
    """Runs the command and returns its exit status."""
    if argv[1:]:
        raise UserError(f'unexpected argument {argv[1]!r}; flags begin with --')
    with stopping.on_signal() as stop:
        return run(overrides, stop)


def run(overrides: list[tuple[str, str]], stop: stopping.Stop) -> int:
    """Trains, prints the results and returns the exit status."""
    # Imported here, so that a signal during the imports is handled.
    from vit_jax.data import memory
    from vit_jax.run import determinism, workdir

    memory.sweep()
    path, wanted = workdir.located(WORKDIR.value), DETERMINISTIC.value and not DRY_RUN.value
    with determinism.repeatable(path, wanted) as keep_kernels:  # a checkpoint's model needs JAX
        return trained(overrides, stop, keep_kernels)


def trained(
    overrides: list[tuple[str, str]], stop: stopping.Stop, keep_kernels: Callable[[], None]
) -> int:
    """As `run`, with the flags of XLA set; `keep_kernels` is as for train.train."""
    from vit_jax import config, train
    from vit_jax.distributed import clusters, hosts, watch
    from vit_jax.run import compilation, report, results, workdir

    begun = workdir.read_json(workdir.located(WORKDIR.value) / 'config.json')
    settings = config.load(CONFIG.value, overrides, begun, absent=DRY_RUN.value)
    if DRY_RUN.value:
        from vit_jax.plan import rehearsal

        print(printable(rehearsal.describe(settings, WORKDIR.value), keep='\n'))
        return 0
    limits = dict(timeout=TIMEOUT.value, start_timeout=START.value)
    try:
        where = clusters.place(
            COORDINATOR.value, PROCESSES.value, PROCESS.value, timeout=START.value
        )
        hosts.check_processes(where, EXPECT_PROCESSES.value)
        with (
            compilation.cache(CACHE.value, WORKDIR.value),
            hosts.join(where, hosts.facts(settings), **limits) as (set_phase, agree),
        ):
            hosts.check_devices(EXPECT_DEVICES.value)
            stop.shared = where is not None
            with workdir.lock_workdir(WORKDIR.value) as path:
                try:
                    result = train.train(
                        settings, path, stop, set_phase, agree, allow_change=ALLOW.value,
                        profile=PROFILE.value, keep_kernels=keep_kernels,
                    )  # fmt: skip
                except report.NotFinite as e:  # raised at the same step in all processes
                    print(f'error: {e}', file=sys.stderr)
                    return 3
    except Lost as e:
        print('error:', printable(e, keep='\n'), file=sys.stderr)
        return watch.EXIT_STATUS
    first = where is None or where.process == 0
    if result is None:
        if first:
            again = f'give the same command again (workdir {printable(path)})'
            print(f'Stopped and saved. To go on, {again}.')
        return 128 + (stop.signum or signal.SIGTERM)
    if first:
        results.print_result(path, result)
    return int(CHECK.value and not all(row['pass'] for row in result['expected']))


if __name__ == '__main__':
    cli.run(main, 'config', goes_on=True)
