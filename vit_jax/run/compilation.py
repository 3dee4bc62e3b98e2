"""JAX's cache of compiled programs: where it is kept."""

import os
import pathlib
import zlib

import jax

from vit_jax.errors import UserError
from vit_jax.io import storage

GIB = 2**30
LIMIT = 8 * GIB  # of compiled programs on this machine; the ones used longest ago go first


def keep(wish, workdir):
    """Has JAX keep what it compiles, and take it from there: the same program, without the wait.

    In the folder `wish`, not at all where that is 'off', and where it is None: below
    `storage.cache()`, or below a workdir that is not on this machine, since the machines of a pod
    come new after each preemption. JAX_COMPILATION_CACHE_DIR goes before. UserError where a named
    folder can't be made.
    """
    if wish == 'off':
        jax.config.update('jax_enable_compilation_cache', False)
        return
    if wish is None and os.environ.get('JAX_COMPILATION_CACHE_DIR'):
        return
    named = wish is not None
    home = workdir if storage.remote(workdir) else storage.cache()
    folder = wish or f'{home}/compiled'
    if not storage.remote(folder):
        # A program for the CPU is for just this kind of it, and homes are shared among machines.
        folder = pathlib.Path(folder).expanduser().absolute() / cpu()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f'no right to write in {folder}')
        except OSError as e:
            if named:
                raise UserError(
                    f'--compilation_cache={wish} can not be used: {e}; name another folder, or off'
                ) from e
            return
        jax.config.update('jax_compilation_cache_max_size', LIMIT)
    jax.config.update('jax_compilation_cache_dir', str(folder))


def cpu():
    """A short name of this machine's kind of processor."""
    try:
        text = pathlib.Path('/proc/cpuinfo').read_text()
    except OSError:
        return 'any'
    lines = {line for line in text.splitlines() if line.startswith(('flags', 'Features', 'model '))}
    return f'{zlib.crc32(" ".join(sorted(lines)).encode()):08x}'
