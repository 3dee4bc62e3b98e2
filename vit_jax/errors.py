"""The exceptions that stand for something other than a bug."""

import errno
import re


class UserError(ValueError):
    """Something that a user can mend; the command line prints it in one line, exit status 2.

    A newline in the message is part of a name from outside and is escaped, unless the message is
    said to have several lines, as one with a table.
    """

    def __init__(self, message: object = '', *, several_lines: bool = False):
        super().__init__(message)
        self.several_lines = several_lines


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
