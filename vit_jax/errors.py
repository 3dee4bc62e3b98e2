"""Exceptions for mistakes of the user and lost processes, and the messages of errors."""

import difflib
import errno
import re
from collections.abc import Iterable

MOST_LISTED = 30  # names in a message
MOST_SHOWN = 200  # characters of a value in a message


class UserError(ValueError):
    """An error that the user can fix; a command prints it as one line and exits with status 2.

    A newline in the message is escaped, as it can only come from a name in the input, unless
    `several_lines` is true, as for a message with a table.
    """

    def __init__(self, message: object = '', *, several_lines: bool = False):
        super().__init__(message)
        self.several_lines = several_lines


def shown(value: object) -> str:
    """The repr of a value, in one line of bounded length."""
    try:
        text = repr(value)
    except Exception:  # from a user's own __repr__, or for an int of thousands of digits
        text = f'a value of type {type(value).__name__}'
    text = ' '.join(text.split())
    return text if len(text) <= MOST_SHOWN else f'{text[:MOST_SHOWN]}...'


def choices(name: object, known: Iterable[str]) -> str:
    """The end of a message on a wrong name: 'there are a, b, c', or the nearest of many names."""
    known = list(known)
    if len(known) <= MOST_LISTED:
        return f'there are {", ".join(known)}' if known else 'there is none'
    near = difflib.get_close_matches(str(name)[:MOST_SHOWN], known, 5, cutoff=0)
    return f'the nearest of {len(known)} are {", ".join(near)}'


def check_choice(kind: str, name: object, known: Iterable[str]) -> None:
    """Raises UserError, with the known names, unless `name` is one of them."""
    if not isinstance(name, str) or name not in known:
        raise UserError(f'no {kind} {shown(name)}; {choices(name, known)}')


class Damaged(Exception):
    """A checkpoint that cannot be read, or whose arrays differ from those that were saved."""


class Lost(Exception):
    """Another process is missing, dead or stalled; the run can be restarted (exit status 4)."""


def refusal(error: BaseException) -> str | None:
    """A line on a file, memory or a thread that the system refuses; None for any other error."""
    text = re.sub(r'\s+', ' ', str(error))[:300]
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return f'{error.strerror}: raise the limit (ulimit -n), or use fewer workers and threads'
    if isinstance(error, OSError) and error.errno == errno.ENOMEM or isinstance(error, MemoryError):
        return f'out of memory, or above the limit of ulimit -v ({text or "no more is known"})'
    if type(error).__name__ == 'JaxRuntimeError' and 'RESOURCE_EXHAUSTED' in text:
        return f'out of memory ({text}); python -m vit_jax.plan --fit says what would make it fit'
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return f"{text}: raise the limits (ulimit -u, ulimit -v), or use fewer workers and threads"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f'{error.filename}: {error.strerror}'
    return None
