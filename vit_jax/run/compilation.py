"""Configures JAX's persistent cache of compiled programs."""

import os
import pathlib
import zlib

import jax

from vit_jax.errors import UserError
from vit_jax.io import storage

GIB = 2**30
LIMIT = 8 * GIB  # size of a local cache; the least recently used programs are evicted


def enable_cache(named: str | None, workdir: str) -> None:
    """Enables JAX's persistent compilation cache.

    Args:
      named: folder of the cache; 'off' disables it. None: JAX_COMPILATION_CACHE_DIR, else a folder
        below `workdir` if that is remote, because the machines of a pod are new after each
        preemption, else below `storage.cache()`.
      workdir: workdir of the run.

    Raises:
      UserError: the folder `named` can't be created or written.
    """
    if named == 'off':
        jax.config.update('jax_enable_compilation_cache', False)
        return
    if named is None and os.environ.get('JAX_COMPILATION_CACHE_DIR'):
        return
    home = workdir if storage.is_remote(workdir) else storage.cache()
    folder = named or f'{home}/compiled'
    if not storage.is_remote(folder):
        # Programs compiled for a CPU fit that kind only, and machines may share a home folder.
        folder = pathlib.Path(folder).expanduser().absolute() / cpu_id()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f'no right to write in {folder}')
        except OSError as e:
            if named is not None:
                raise UserError(
                    f'--compilation_cache={named} cannot be used: {e}; name another folder, or off'
                ) from e
            return
        jax.config.update('jax_compilation_cache_max_size', LIMIT)
    jax.config.update('jax_compilation_cache_dir', str(folder))


def cpu_id() -> str:
    """A short identifier of this machine's kind of processor."""
    try:
        text = pathlib.Path('/proc/cpuinfo').read_text()
    except OSError:
        return 'any'
    lines = {line for line in text.splitlines() if line.startswith(('flags', 'Features', 'model '))}
    return f'{zlib.crc32(" ".join(sorted(lines)).encode()):08x}'
