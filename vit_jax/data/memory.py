"""Shared memory that names its owner, so that the next start removes what a killed run has left.

A process that starts workers claims a prefix, vit_jax-HEX, for their blocks (batches in transit)
and its semaphores. Linux keeps both as files in /dev/shm. The process locks the file
vit_jax-HEX.lock there; the kernel releases the lock however the process ends, in any container.
Without /dev/shm, names are Python's own and nothing is removed.
"""

import contextlib
import fcntl
import functools
import multiprocessing
import os
import pathlib
import re
import secrets
from multiprocessing import resource_tracker, shared_memory, util

FOLDER = pathlib.Path('/dev/shm')
NAME = re.compile(r'(?:sem\.)?(vit_jax-[0-9a-f]{16})[-.].*')


@functools.cache
def claim() -> str | None:
    """Claims a prefix for this process until it ends; returns None without /dev/shm.

    Removes what dead owners have left. Semaphores created from here on have the prefix.
    """
    sweep()
    prefix = f'vit_jax-{secrets.token_hex(8)}'
    path = FOLDER / f'{prefix}.lock'
    try:  # the file is named once it is locked: no process sees it unlocked
        descriptor = os.open(FOLDER, os.O_TMPFILE | os.O_RDWR, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # An absolute path needs no src_dir_fd, but with it Python follows the link to the file.
        os.link(f'/proc/self/fd/{descriptor}', path, src_dir_fd=descriptor, follow_symlinks=True)
    except (OSError, AttributeError):
        return None
    util.Finalize(None, release, args=(prefix,), exitpriority=-100)  # last: workers have ended
    multiprocessing.current_process()._config['semprefix'] = f'/{prefix}'
    return prefix


def release(prefix: str) -> None:
    """Removes the blocks of this process's prefix, which no worker uses any more, and its lock.

    Grain leaves the blocks of batches that were not consumed. Python's resource tracker, which has
    them registered, would warn of each after the last output of the command.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(FOLDER):
            if name.startswith(f'{prefix}-'):
                with contextlib.suppress(FileNotFoundError):  # a thread of Grain removed it
                    os.unlink(FOLDER / name)
                    # A worker that was killed may not have registered it.
                    resource_tracker.register(f'/{name}', 'shared_memory')
                    resource_tracker.unregister(f'/{name}', 'shared_memory')
        os.unlink(FOLDER / f'{prefix}.lock')


def adopt(prefix: str | None) -> None:
    """Makes this worker name its blocks with the prefix of the process that started it."""
    if prefix:
        shared_memory._make_filename = lambda: f'/{prefix}-{secrets.token_hex(8)}'


def sweep() -> None:
    """Removes the blocks and semaphores of dead owners; leaves those of other programs alone."""
    with contextlib.suppress(OSError):
        files = [(match[1], match[0]) for match in map(NAME.fullmatch, os.listdir(FOLDER)) if match]
        alive = functools.cache(has_owner)
        for prefix, name in sorted(files, key=lambda file: file[1].endswith('.lock')):
            if not alive(prefix):
                with contextlib.suppress(OSError):  # another user's, or removed by another start
                    os.unlink(FOLDER / name)


def has_owner(prefix: str) -> bool:
    """Whether a process holds the prefix; it takes the lock before it creates anything else."""
    try:
        descriptor = os.open(FOLDER / f'{prefix}.lock', os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:  # another user's: unknown
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
