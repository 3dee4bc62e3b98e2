"""The exceptions that stand for something other than a bug."""

import difflib
import errno
import re
from collections.abc import Iterable

MOST_LISTED = 30  # names in a message
MOST_SHOWN = 200  # characters of a value in a message


class UserError(ValueError):
    """Something that a user can mend; the command line prints it in one line, exit status 2.

    A newline in the message is part of a name from outside and is escaped, unless the message is
    said to have several lines, as one with a table.
    """

    def __init__(self, message: object = '', *, several_lines: bool = False):
        super().__init__(message)
        self.several_lines = several_lines


def shown(value: object) -> str:
    """A value as Python writes it, in one line of bounded length."""
    try:
        text = repr(value)
    except Exception:  # of an object of the user's, or an int of thousands of digits
        text = f'a value of type {type(value).__name__}'
    text = ' '.join(text.split())
    return text if len(text) <= MOST_SHOWN else f'{text[:MOST_SHOWN]}...'


def choices(name: object, known: Iterable[str]) -> str:
    """'there are a, b, c', or of many the nearest to `name`: the end of a line on a wrong name."""
    known = list(known)
    if len(known) <= MOST_LISTED:
        return f'there are {", ".join(known)}' if known else 'there is none'
    near = difflib.get_close_matches(str(name)[:MOST_SHOWN], known, 5, cutoff=0)
    return f'the nearest of {len(known)} are {", ".join(near)}'


def check_choice(kind: str, name: object, known: Iterable[str]) -> None:
    """Raises UserError, with the names there are, unless `name` is among them."""
    if not isinstance(name, str) or name not in known:
        raise UserError(f'no {kind} {shown(name)}; {choices(name, known)}')


class Lost(Exception):
    """Another process of the run is missing, dead or stalled: to be tried again (exit status 4)."""


def refusal(error):
    """One line on what the system refuses, a file, memory or a thread; None for any other error."""
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
