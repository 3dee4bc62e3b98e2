"""Shared memory that names its owner, so that the next start removes what a killed run has left.

A process that starts workers claims a prefix, vit_jax-HEX, for their blocks (batches on their way)
and its semaphores. Linux keeps both as files in /dev/shm. The process holds a lock of the file
vit_jax-HEX.lock there, which the kernel drops however the process ends, in whatever container.
Where there is no /dev/shm, names are Python's own and nothing is removed.
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
def claim():
    """The prefix of this process, held until it ends; None where there is no /dev/shm.

    Removes what dead owners have left. Semaphores made from here on have the prefix.
    """
    sweep()
    prefix = f'vit_jax-{secrets.token_hex(8)}'
    path = FOLDER / f'{prefix}.lock'
    try:  # the file gets its name when it is locked: no one ever sees it without
        descriptor = os.open(FOLDER, os.O_TMPFILE | os.O_RDWR, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # A folder, which an absolute path needs not, makes Python follow the link to the file.
        os.link(f'/proc/self/fd/{descriptor}', path, src_dir_fd=descriptor, follow_symlinks=True)
    except (OSError, AttributeError):
        return None
    util.Finalize(None, release, args=(prefix,), exitpriority=-100)  # the last: workers have ended
    multiprocessing.current_process()._config['semprefix'] = f'/{prefix}'
    return prefix


def release(prefix):
    """Removes the blocks of this process's prefix, which no worker uses any more, and its lock.

    Grain leaves those of batches that nobody has taken; Python's resource tracker, which knows of
    them, would warn of each after all that the command has said.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(FOLDER):
            if name.startswith(f'{prefix}-'):
                with contextlib.suppress(FileNotFoundError):  # a thread of Grain's was faster
                    os.unlink(FOLDER / name)
                    # A worker that was killed may not have registered it.
                    resource_tracker.register(f'/{name}', 'shared_memory')
                    resource_tracker.unregister(f'/{name}', 'shared_memory')
        os.unlink(FOLDER / f'{prefix}.lock')


def adopt(prefix):
    """In a worker: its blocks get the prefix of the process that it works for."""
    if prefix:
        shared_memory._make_filename = lambda: f'/{prefix}-{secrets.token_hex(8)}'


def sweep():
    """Removes the blocks and semaphores whose owners are dead; other programs' are not touched."""
    with contextlib.suppress(OSError):
        files = [(match[1], match[0]) for match in map(NAME.fullmatch, os.listdir(FOLDER)) if match]
        alive = functools.cache(lives)
        for prefix, name in sorted(files, key=lambda file: file[1].endswith('.lock')):
            if not alive(prefix):
                with contextlib.suppress(OSError):  # another user's, or another start removes it
                    os.unlink(FOLDER / name)


def lives(prefix):
    """Whether a process holds the prefix. It takes the lock before it makes anything else."""
    try:
        descriptor = os.open(FOLDER / f'{prefix}.lock', os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:  # another user's: can't be told
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
