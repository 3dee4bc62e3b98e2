"""Joins several processes into one run and ends all of them if one is lost.

All connect to process 0 at one port: first by a plain socket, which tells which processes are
missing, then by jax.distributed. In its key-value store each process regularly writes a heartbeat
with its phase. All processes end if one stops reporting, or if the others wait for it too long.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

import vit_jax
from vit_jax.distributed import private
from vit_jax.distributed.clusters import Place
from vit_jax.distributed.rendezvous import meet
from vit_jax.distributed.watch import EXIT_STATUS, Watch
from vit_jax.errors import UserError


def facts(settings: ConfigDict) -> dict[str, str]:
    """{name: value} that must be equal in all processes of a run."""
    text = json.dumps(settings.to_dict(), sort_keys=True, default=str)
    return {
        'vit_jax': vit_jax.__version__, 'jax': jax.__version__,
        'config': hashlib.sha256(text.encode()).hexdigest()[:12],
    }  # fmt: skip


def check_processes(place: Place | None, processes: int | None) -> None:
    """Raises UserError unless the run has `processes` processes (None: any number)."""
    found = place.processes if place else 1
    if processes not in (None, found):
        raise UserError(
            f'--expect_processes is {processes}, but this is one of {found}; several are detected '
            'from the variables of SLURM, Open MPI or a TPU, or given by --coordinator, '
            '--num_processes and --process_id'
        )


def check_devices(devices: int | None) -> None:
    """Raises UserError unless all processes together have `devices` devices (None: any number)."""
    if devices not in (None, jax.device_count()):
        raise UserError(
            f'--expect_devices is {devices}, but there are {jax.device_count()}: '
            f'{jax.local_device_count()} here, of {jax.process_count()} processes'
        )


@contextlib.contextmanager
def join(
    place: Place | None, facts: dict[str, str], *, timeout: float, start_timeout: float
) -> Iterator[tuple[Callable[[str], None], Callable[[dict[str, Any]], None]]]:
    """Joins this process to a run until all processes reach the end of the block.

    If the block raises, all processes end with its message. This one ends at once, as an orderly
    exit would wait for the others.

    Args:
      place: clusters.Place of this process. None: it is the only one.
      facts: {name: value} that must be equal in all processes before anything is read.
      timeout: seconds that a process may not report, or that the others may wait for it. Then all
        end with EXIT_STATUS and one line that names it.
      start_timeout: seconds that the others may wait for a process in one of the LONG_PHASES.

    Yields:
      (set_phase, agree), which all processes call in the same order: set_phase(phase) as a phase
      begins, and agree(facts), which raises UserError in all of them if the facts of one differ
      from those of process 0.

    Raises:
      Lost, UserError: before the block.
    """
    if place is None:
        yield (lambda phase: None), (lambda facts: None)
        return
    meeting = meet(place, facts, start_timeout)
    watch = Watch(place, timeout, start_timeout)
    jax.config.update('jax_enable_preemption_service', False)  # which would handle SIGTERM
    with meeting.guard(timeout, lambda reason: watch.exit(reason, EXIT_STATUS)):
        jax.distributed.initialize(
            place.coordinator, place.processes, place.process, place.devices,
            cluster_detection_method='deactivate', initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=10 * timeout,  # so that Watch reports first
            shutdown_timeout_seconds=timeout, coordinator_bind_address=meeting.bind,
        )  # fmt: skip
        watch.start(private.key_value_store())
    try:
        yield watch.set_phase, watch.agree
    except BaseException as e:
        watch.fail(e)
    watch.finish()
