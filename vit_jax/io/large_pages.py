"""Gives commands on CPUs memory in pages of 2 MiB.

XLA takes the temporaries of a step from the system anew at each step and returns them, hundreds of
megabytes. In pages of 4 KiB, touching them first and finding them later takes a tenth to a
quarter of the step (benchmarks/RESULTS.md). glibc asks Linux for large pages if a variable says so
when the process starts.
"""

import contextlib
import glob
import os
import sys

NAME, KEY = 'GLIBC_TUNABLES', 'glibc.malloc.hugetlb'
RESTARTED = 'VIT_JAX_RESTARTED'  # has the number of a process that was restarted
ACCELERATORS = ('/dev/nvidia[0-9]*', '/dev/kfd', '/dev/accel*', '/dev/vfio/[0-9]*')


def on_cpu() -> bool:
    """Whether JAX will compute on CPUs: it is told to, or there is no GPU or TPU."""
    platforms = os.environ.get('JAX_PLATFORMS')
    if platforms:
        return platforms.split(',')[0] == 'cpu'
    return not any(glob.glob(pattern) for pattern in ACCELERATORS)


def variables() -> dict[str, str]:
    """Environment variables that a process with large pages is started with.

    Empty if they are of no use, or the user has set GLIBC_TUNABLES to have such pages or not.
    """
    tunables = os.environ.get(NAME, '')
    if sys.platform != 'linux' or KEY in tunables or not on_cpu():
        return {}
    return {NAME: ':'.join(filter(None, (tunables, f'{KEY}=1')))}


def restart() -> None:
    """Replaces this process by the same command with `variables`, if there are any; once.

    glibc itself removes them where the interpreter has capabilities of its own. Goes on without
    them if the interpreter cannot be started again.
    """
    added, own = variables(), str(os.getpid())
    if added and sys.executable and os.environ.get(RESTARTED) != own:
        with contextlib.suppress(OSError):
            os.execve(sys.executable, sys.orig_argv, os.environ | added | {RESTARTED: own})
