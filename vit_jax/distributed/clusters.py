"""Determines the number of processes and the index of this one, from flags or its launcher."""

import os
import re
from typing import NamedTuple

from vit_jax.distributed import private
from vit_jax.errors import Lost, UserError


class Place(NamedTuple):
    """A process of a run with several."""

    coordinator: str  # HOST:PORT of process 0
    processes: int
    process: int
    devices: list[int] | None  # indices of its machine's GPUs that this process uses; None: all

    def address(self) -> tuple[str, int]:
        """(host, port) of the coordinator; an IPv6 address without brackets."""
        host, _, port = self.coordinator.rpartition(':')
        return host.removeprefix('[').removesuffix(']'), int(port)


# Environment variables with the number of processes, the index of this process, its index on its
# machine and the number of processes there. SLURM sets them for processes that srun starts, not for
# the job's script.
LAUNCHERS = {
    'slurm': ('SLURM_STEP_NUM_TASKS', 'SLURM_PROCID', 'SLURM_LOCALID', 'SLURM_STEP_TASKS_PER_NODE'),
    'ompi': ('OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK',
             'OMPI_COMM_WORLD_LOCAL_SIZE'),
}  # fmt: skip


def place(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: int = 300,
) -> Place | None:
    """The Place of this process from flags and environment; None if it is the only one.

    Flags take precedence. On TPUs, queries the metadata server for up to `timeout` seconds.

    Raises:
      UserError: values are missing or invalid.
      Lost: the metadata server does not answer.
    """
    launcher = detect_launcher()
    if launcher is None and not uses_tpu():
        return place_of_flags(coordinator, processes, process)
    devices = None
    if launcher:
        count, index, local_index, local_count = LAUNCHERS[launcher]
        processes = read_number(count) if processes is None else processes
        process = read_number(index) if process is None else process
        # One process per GPU; the only process of a machine uses all of them.
        several = leading_number(os.environ.get(local_count)) != 1
        devices = [read_number(local_index)] if several else None
        coordinator = coordinator or os.environ.get('JAX_COORDINATOR_ADDRESS')
    if None in (coordinator, processes, process):
        try:
            coordinator, processes, process, _ = private.detect_cluster(
                coordinator, processes, process, devices, launcher or tpu_environment(), timeout
            )
        except KeyError as e:  # Open MPI 5 and later have no address of process 0
            raise UserError(
                f'this is process {process} of {processes}, but {e}, which says where process 0 '
                'is, is not set; give --coordinator=HOST:PORT'
            ) from e
        except (OSError, RuntimeError) as e:
            raise Lost(f'the address of process 0 cannot be determined: {e}') from e
    if processes == 1:
        return None
    return checked(Place(coordinator, processes, process, devices))


def detect_launcher() -> str | None:
    """'slurm' or 'ompi' if that launched more than one process, else None."""
    for name, (count, *_) in LAUNCHERS.items():
        if os.environ.get(count) and read_number(count) > 1:
            return name
    return None


def read_number(variable: str) -> int:
    """The number in an environment variable; raises UserError for any other text."""
    text = os.environ.get(variable, '')
    if not re.fullmatch('[0-9]{1,9}', text):
        raise UserError(f'{variable} is {text!r}, not a number; it tells which process this is')
    return int(text)


def uses_tpu() -> bool:
    """Whether this machine has TPUs, and $JAX_PLATFORMS does not choose the CPU."""
    return private.on_tpu_vm() and os.environ.get('JAX_PLATFORMS') != 'cpu'


def tpu_environment() -> str:
    """JAX's name for the TPU's environment: 'gketpu' with Kubernetes' variables, else 'gcetpu'."""
    variables = {'TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES'}
    return 'gketpu' if variables & os.environ.keys() else 'gcetpu'


def leading_number(text: str | None) -> int:
    """The number at the start of a text, such as 4 for '4(x2),3'; 0 if there is none."""
    return int(re.match(r'\d*', text or '')[0] or 0)


def place_of_flags(
    coordinator: str | None, processes: int | None, process: int | None
) -> Place | None:
    """The Place that flags give, None for one process; raises UserError if some are missing."""
    given = {'coordinator': coordinator, 'num_processes': processes, 'process_id': process}
    missing = [f'--{name}' for name, value in given.items() if value is None]
    if len(missing) == 3 or (processes == 1 and not process):
        return None
    if missing:
        raise UserError(f'{" and ".join(missing)} must be given too: no launcher sets it')
    return checked(Place(coordinator, processes, process, None))


def checked(place: Place) -> Place:
    """Returns a place; raises UserError if its address or its index is invalid."""
    given = f'--coordinator is {place.coordinator!r}'
    match = re.fullmatch(r'(\[[0-9a-fA-F:.%\w]+\]|[\w.-]+):([0-9]{1,5})', place.coordinator)
    if not match:
        raise UserError(f'{given}, not of the form HOST:PORT, or [ADDRESS]:PORT for IPv6')
    if not 1 <= int(match[2]) <= 65535:
        raise UserError(f'{given}; ports are from 1 to 65535')
    try:
        match[1].encode('idna')
    except UnicodeError:
        raise UserError(f'{given}, whose host is not a valid name') from None
    if not 0 <= place.process < place.processes:
        raise UserError(
            f'--process_id is {place.process}; with --num_processes={place.processes} it is '
            f'from 0 to {place.processes - 1}'
        )
    return place
