"""Errors of Orbax and TensorStore: each is reported once, and in words if a file system refused.

A write that fails in the background is raised by the next call of Orbax. Until then Orbax, asyncio
and TensorStore log it, and print it from destructors, once for each array.
"""

import asyncio
import contextlib
import errno
import functools
import logging
import os
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from vit_jax.errors import Damaged, UserError
from vit_jax.io import storage

REFUSALS = (  # of a file system; the libraries raise them as exceptions of several types
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ENOTDIR, errno.ENOENT, errno.EISDIR, errno.EMFILE, errno.ENFILE, errno.ESTALE,
    errno.ENODEV, errno.ENXIO, errno.ENOMEM, errno.ELOOP, errno.ENAMETOOLONG, errno.ETIMEDOUT,
)  # fmt: skip
BACKGROUND = ('future.py', 'base_events.py', 'async_checkpointer.py')  # they log failed writes
ROUTINE = ('read only', 'Metadata file does not exist', 'Waiting for previous save')


def refusal_in(text: str) -> str | None:
    """The first message of a refusal (see REFUSALS) in a text."""
    return next((words for words in map(os.strerror, REFUSALS) if words in text), None)


@contextlib.contextmanager
def explain_write_errors(path: epath.Path) -> Iterator[None]:
    """Turns a refusal of the file system, as checkpoint `path` is written, into UserError."""
    try:
        with storage.explained(path, 'write checkpoint'):
            yield
    except UserError:
        raise
    except Exception as e:  # OSError, or TensorStore's ValueError with the reason in its text
        absent = os.strerror(errno.ENOENT)  # which TensorStore and Orbax word differently
        text = re.sub('NOT_FOUND|missing .zarray|No ArrayMetadata', absent, f'{e} {e.__cause__}')
        if (refusal := refusal_in(text)) is None:
            raise
        raise UserError(
            f'cannot write checkpoint {path}: {refusal}; what was saved before is unchanged'
        ) from e


def read_error(path: epath.Path, what: str, error: Exception) -> Damaged | UserError:
    """The exception to raise for a failed read: UserError if a server did not answer."""
    if storage.is_remote(path) and storage.is_unavailable(error):
        return UserError(f'cannot read checkpoint {path}: {storage.explain(error)}')
    return Damaged(f'{what} cannot be read ({root_cause(error)})')


def root_cause(error: BaseException) -> str:
    """The first exception of a chain, as one line."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return re.sub(r'\s+', ' ', str(error))[:300] or repr(error)


def check_space(path: epath.Path, state: Any) -> None:
    """Raises OSError if a local disk lacks the space for this process's shards of `state`.

    Orbax would fail in the background, with a traceback for each array.
    """
    if storage.is_remote(path):
        return
    shards = [s for x in jax.tree.leaves(state) for s in x.addressable_shards if not s.replica_id]
    if shutil.disk_usage(path).free < sum(s.data.nbytes for s in shards) * 1.05 + 2**18:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def silence_repeats() -> None:
    """Silences messages of Orbax that repeat the errors that it raises."""
    for logger in ('asyncio', 'absl'):
        logging.getLogger(logger).addFilter(is_news)
    warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
    if getattr(sys.unraisablehook, 'func', None) is not drop_repeats:
        sys.unraisablehook = functools.partial(drop_repeats, hook=sys.unraisablehook)


def is_news(record: logging.LogRecord) -> bool:
    """Logging filter that drops Orbax's messages on failed background writes and on routine."""
    repeated = record.filename in BACKGROUND or 'orbax' in record.pathname and record.exc_info
    return not repeated and not any(words in str(record.msg) for words in ROUTINE)


def drop_repeats(unraisable: Any, hook: Callable[[Any], Any]) -> None:
    """A sys.unraisablehook that drops further errors of a failed checkpoint after the first.

    `hook` gets all others.
    """
    files = [frame.filename for frame in traceback.extract_tb(unraisable.exc_traceback)]
    repeated = any('orbax' in file for file in files)
    repeated |= str(unraisable.exc_value) == 'Event loop is closed'
    # An event loop that got no file descriptor.
    repeated |= unraisable.object is asyncio.BaseEventLoop.__del__
    if not repeated or issubclass(unraisable.exc_type, KeyboardInterrupt):
        hook(unraisable)
