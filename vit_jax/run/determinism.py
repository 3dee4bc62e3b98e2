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
import pathlib
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator

import jax
import jaxlib
from absl import logging
from etils import epath

from vit_jax.errors import UserError
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
      UserError: a file can't be read or written, or is damaged.
    """
    if not wanted or not uses_gpu():
        yield lambda: None
        return
    kept = kept_in(workdir)
    before = storage.read(kept)
    if before is not None and not is_whole(before):
        raise UserError(
            f'{kept} is damaged; remove it to go on with other kernels, after which the last bits '
            'may be others'
        )
    if before is None and has_lost_kernels(workdir):
        logging.warning('from here on the last bits may be others: %s is missing', kept)
    # JAX's keys of compiled programs contain these paths. As the first start has a path of its own,
    # it compiles, and so chooses, every program; later ones share theirs with all processes, but
    # not with those of a copy of the workdir.
    key = hashlib.sha256(f'{workdir}\n'.encode() + (before or b'')).hexdigest()[:32]
    name, own = (uuid.uuid4().hex, True) if before is None else (key, False)
    with folder_of_kernels() as folder:
        source, found = (folder / f'{name}.{part}.textproto' for part in ('load', 'dump'))
        if before is not None:
            storage.write(source, before)
        add_flags({EXCLUDE: 'true', DUMP: str(found)} | ({LOAD: str(source)} if before else {}))
        # JAX's own files, one for each fusion, lack some kernels and don't go with these.
        jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')

        def keep() -> None:
            nonlocal before
            now = storage.read(found) or b''
            # The same kernels are written in any order, and not in one step: another process of
            # this machine may just write them.
            if is_whole(now) and len(now) > len(before or b''):
                storage.make_folder(kept.parent)
                storage.write(kept, now, sync=True)
                before = now

        try:
            yield keep
            own = True
        finally:
            if own:  # else the run of the workdir may go on in another process, with these files
                for path in (source, found):
                    path.unlink(missing_ok=True)


def has_lost_kernels(workdir: epath.Path) -> bool:
    """Whether a run without kernels has checkpoints that some of this jaxlib led to."""
    facts = storage.read_json(workdir / 'facts.json')
    if facts.get('jaxlib') != jaxlib.__version__ or EXCLUDE not in str(facts.get('xla_flags')):
        return False
    folder = workdir / 'checkpoints'
    return folder.exists() and any(path.name.isdecimal() for path in folder.iterdir())


@contextlib.contextmanager
def folder_of_kernels() -> Iterator[pathlib.Path]:
    """Yields a folder below `storage.cache()`, or a temporary one if that can't be written."""
    with contextlib.ExitStack() as stack:
        try:
            folder = storage.make_folder(storage.cache() / 'kernels')
        except UserError:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield folder


def is_whole(text: bytes) -> bool:
    """Whether XLA's text of kernels ends where its writer ended it."""
    bare = re.sub(rb'"(\\.|[^"\\])*"', b'', text)
    closed = b'"' not in bare and bare.count(b'{') == bare.count(b'}')
    return closed and text.endswith(b'\n') and text.isascii() and b'\0' not in text


def flags_of(text: str) -> list[str]:
    """The flags in the text of XLA_FLAGS, in which spaces within quotes divide nothing."""
    return re.findall(r"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|\S)+""", text)


def add_flags(flags: dict[str, str]) -> None:
    """Adds flags to XLA_FLAGS, or to those in the file that it names, that are not set there.

    Raises UserError if the file can't be read.
    """
    given = os.environ.get('XLA_FLAGS', '').strip()
    if given and not given.startswith('--'):
        data = storage.read(pathlib.Path(given))
        if data is None:
            raise UserError(f'XLA_FLAGS is {given!r}: neither flags nor a file that has some')
        given = data.decode(errors='replace').strip()
    names = {flag.partition('=')[0] for flag in flags_of(given)}
    new = [f'{name}={quoted(value)}' for name, value in flags.items() if name not in names]
    os.environ['XLA_FLAGS'] = ' '.join([*new, given]).strip()


def quoted(value: str) -> str:
    """A value of a flag as XLA reads it."""
    if not re.search(r"""[\s"'\\]""", value):
        return value
    return '"' + re.sub(r'(["\\])', r'\\\1', value) + '"'
