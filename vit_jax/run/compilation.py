"""Configures JAX's persistent cache of compiled programs."""

import contextlib
import os
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import jax
from absl import logging
from etils import epath

from vit_jax.errors import UserError
from vit_jax.io import storage
from vit_jax.run import machine

GIB = 2**30
LIMIT = 8 * GIB  # size of a local cache; the least recently used programs are evicted
PATIENCE = 60  # seconds that a start waits for programs at an address
PERIOD = 10  # seconds between two looks for new programs, which JAX writes in far less
SUFFIX, READ = '-cache', '-atime'  # of JAX's files: a program, and when it was last read


@contextlib.contextmanager
def cache(named: str | None, workdir: str) -> Iterator[None]:
    """Enables JAX's persistent compilation cache; of a remote one, see `mirrored`.

    Args:
      named: folder of the cache; 'off' disables it. None: JAX_COMPILATION_CACHE_DIR, else a folder
        below `workdir` if that is remote, because the machines of a pod are new after each
        preemption, else below `storage.cache()`.
      workdir: workdir of the run.

    Raises:
      UserError: the folder `named` can't be created or written.
    """
    home = workdir if storage.is_remote(workdir) else storage.cache()
    of_jax = os.environ.get('JAX_COMPILATION_CACHE_DIR')
    folder = named or of_jax or f'{home}/compiled'
    if named == 'off':
        jax.config.update('jax_enable_compilation_cache', False)
    elif named is None and of_jax and not of_jax.startswith('gs://'):
        pass
    elif storage.is_remote(folder):
        with mirrored(folder) as local:
            jax.config.update('jax_compilation_cache_dir', local)
            yield
        return
    else:
        enable_local(folder, named)
    yield


def enable_local(folder: str, named: str | None) -> None:
    """Enables a cache on a disk; without one if nobody has `named` it and it can't be written."""
    # Programs compiled for a CPU fit that kind only, and machines may share a home folder.
    path = pathlib.Path(folder).expanduser().absolute() / machine.cpu_id()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(f'no right to write in {path}')
        remove_unfinished(path)
    except OSError as e:
        if named is not None:
            raise UserError(
                f'--compilation_cache={named} cannot be used: {e}; name another folder, or off'
            ) from e
        return
    jax.config.update('jax_compilation_cache_max_size', LIMIT)
    jax.config.update('jax_compilation_cache_dir', str(path))


def remove_unfinished(path: pathlib.Path) -> None:
    """Removes programs that a killed process was writing, or for which a disk had no room.

    JAX writes when a program was read after the program. It never replaces a damaged program, and
    JAX 0.10 keeps no other one, either, as long as there is one without.
    """
    for program in path.glob(f'*{SUFFIX}'):
        if not program.with_name(program.name.removesuffix(SUFFIX) + READ).exists():
            program.unlink(missing_ok=True)


@contextlib.contextmanager
def mirrored(address: str) -> Iterator[str]:
    """Yields a temporary folder with the programs at an address, to which new ones are copied.

    JAX itself would ask the store for each program, however small, and wait for each answer. A
    store that is slow or away costs PATIENCE seconds once, and a warning: programs are compiled.
    """
    storage.set_up()
    remote = epath.Path(address)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        local = epath.Path(folder)
        known: set[str] = set()
        in_time(lambda: download(remote, local, known), f'compiled programs of {address} are read')
        ended = threading.Event()

        def copy() -> None:
            while not ended.wait(PERIOD):
                with contextlib.suppress(Exception):  # tried again, and said at the end
                    upload(local, remote, known)

        thread = threading.Thread(target=copy, daemon=True)
        thread.start()

        def rest() -> None:
            thread.join()
            upload(local, remote, known, settled=0)

        try:
            yield folder
        finally:
            ended.set()
            in_time(rest, f'compiled programs are copied to {address}')


def download(remote: epath.Path, local: epath.Path, known: set[str]) -> None:
    """Copies programs from an address to a folder, and adds their names to `known`."""
    names = [path.name for path in remote.iterdir()] if remote.exists() else []
    for name in sorted(name for name in names if name.endswith(SUFFIX)):
        storage.write(local / name, (remote / name).read_bytes())  # whole or not at all
        known.add(name)


def upload(
    local: epath.Path, remote: epath.Path, known: set[str], settled: float = PERIOD
) -> None:
    """Copies programs that are not `known` the other way, if they are `settled` seconds old.

    JAX writes programs in process 0 alone.
    """
    for path in sorted(pathlib.Path(local).glob(f'*{SUFFIX}')):
        if path.name not in known and time.time() - path.stat().st_mtime >= settled:
            (remote / path.name).write_bytes(path.read_bytes())
            known.add(path.name)


def in_time(action: Callable[[], None], meaning: str) -> None:
    """Runs an action for PATIENCE seconds at most; warns if it fails or goes on for longer."""
    failure = [f'it takes more than {PATIENCE} s']

    def run() -> None:
        try:
            action()
            failure.clear()
        except Exception as e:
            failure[:] = [storage.explain(e)]

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    for why in failure:
        logging.warning('not all %s: %s; the run goes on without', meaning, why)
