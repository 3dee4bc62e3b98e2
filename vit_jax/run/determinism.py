"""Keeps the kernels that XLA has chosen for a run on GPUs: each start computes the same bits.

On a GPU XLA times several kernels of an operation as it compiles and takes the fastest, which may
be another one at each start, and some kernels add in any order. Flags of XLA exclude the latter and
write what was chosen to a file. The file is in the workdir, before each checkpoint that these
kernels led to, and is loaded at every later start by all processes. CPUs and TPUs need nothing.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import uuid
from collections.abc import Callable, Iterator

import jax
import jaxlib
from etils import epath

from vit_jax.io import storage

EXCLUDE = '--xla_gpu_exclude_nondeterministic_ops'
DUMP = '--xla_gpu_dump_autotune_results_to'
LOAD = '--xla_gpu_load_autotune_results_from'
PLUGINS = ('xla_cuda', 'xla_rocm')


def uses_gpu() -> bool:
    """Whether JAX may run on a GPU: a plugin for one is installed, and JAX_PLATFORMS allows it."""
    platforms = os.environ.get('JAX_PLATFORMS')
    if platforms and not {'cuda', 'gpu', 'rocm'} & set(platforms.lower().split(',')):
        return False
    installed = importlib.metadata.entry_points(group='jax_plugins')
    return any(plugin.name.startswith(PLUGINS) for plugin in installed)


def kept_in(workdir: epath.Path) -> epath.Path:
    """The file of a run's kernels; other versions of jaxlib have other ones."""
    return workdir / 'kernels' / f'jaxlib-{jaxlib.__version__}.textproto'


@contextlib.contextmanager
def repeatable(workdir: epath.Path, wanted: bool) -> Iterator[Callable[[], None]]:
    """Sets the flags of XLA; yields a function that keeps in the workdir what was chosen so far.

    Call this before JAX starts its backend, and the function in one process, when all have compiled
    and before a checkpoint is written. Flags that the user has set in XLA_FLAGS are left alone.
    Without a GPU, or if it is not `wanted`, nothing is set or kept.

    Raises:
      UserError: a file can't be read or written.
    """
    if not wanted or not uses_gpu():
        yield lambda: None
        return
    kept = kept_in(workdir)
    before = storage.read(kept)
    # JAX's keys of compiled programs contain these paths. As the first start has a path of its own,
    # it compiles, and so chooses, every program; later ones share theirs with all processes.
    name = uuid.uuid4().hex if before is None else hashlib.sha256(before).hexdigest()[:32]
    folder = storage.make_folder(storage.cache() / 'kernels')
    source, found = (folder / f'{name}.{part}.textproto' for part in ('load', 'dump'))
    if before is not None:
        storage.write(source, before)
    add_flags({EXCLUDE: 'true', DUMP: str(found)} | ({LOAD: str(source)} if before else {}))
    # JAX's own files, one for each fusion, lack some kernels and don't go together with these.
    jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')

    def keep() -> None:
        nonlocal before
        now = storage.read(found) or b''
        if len(now) > len(before or b''):  # the same kernels are written in any order
            storage.make_folder(kept.parent)
            storage.write(kept, now, sync=True)
            before = now

    own = before is None
    try:
        yield keep
        own = True
    finally:
        if own:  # else the run of the workdir may go on in another process, with these files
            for path in (source, found):
                path.unlink(missing_ok=True)


def add_flags(flags: dict[str, str]) -> None:
    """Adds flags to XLA_FLAGS that are not set there."""
    given = os.environ.get('XLA_FLAGS', '')
    names = {flag.partition('=')[0] for flag in given.split()}
    new = [f'{name}={value}' for name, value in flags.items() if name not in names]
    os.environ['XLA_FLAGS'] = ' '.join([*new, given]).strip()
