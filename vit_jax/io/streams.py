"""Sets up the output streams and signals of a command, before it imports anything large.

`vit_jax/__init__.py` calls `begin` when Python starts one of the package's commands. A program that
imports the package keeps its own streams and signals.
"""

import errno
import io
import os
import re
import select
import signal
import sys
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that end a command
NAMES = {'stdout': 1, 'stderr': 2}
LAST = '-[^-cmWX]*m'  # the last of Python's own options: -m, also behind others as in -um


class Output(io.RawIOBase):
    """Writes to a file descriptor and never raises: what can't be written is dropped.

    Args:
      number: the file descriptor.
      closed: the OSError of a descriptor that is closed from the start.

    Attributes:
      refused: the first OSError; None if everything was written.
      on_error: called with that error.
    """

    def __init__(self, number: int, closed: OSError | None = None):
        self.number, self.unopened, self.refused = number, closed, None
        self.on_error: Callable[[OSError], None] = lambda error: None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.number

    def isatty(self) -> bool:
        return os.isatty(self.number)

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        count = len(rest)
        while len(rest) and self.refused is None:
            try:
                if self.unopened:
                    raise self.unopened
                rest = rest[os.write(self.number, rest) :]
            except BlockingIOError:  # another program has made the pipe non-blocking
                select.select([], [self.number], [])
            except OSError as e:
                self.refused = e
                self.on_error(e)
        return count


def is_command() -> bool:
    """Whether `python -m vit_jax.X` is being started: Python has not found X yet."""
    words = sys.orig_argv[1:]
    for i, word in enumerate(words):
        if match := re.fullmatch(f'{LAST}(.*)', word):
            module = match[1] or ''.join(words[i + 1 : i + 2])
            return sys.argv[:1] == ['-m'] and module.startswith('vit_jax.')
    return False


def begin() -> None:
    """Makes sys.stdout and sys.stderr an `Output` each, and lets signals end the process at once.

    Closed file descriptors among 0 to 2 are opened on /dev/null: the next file to be opened would
    get the number, and the output with it. Does nothing if it was called before.
    """
    if output('stdout'):
        return
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    for name, number in NAMES.items():
        before = getattr(sys, name)
        if before is None:  # it was closed
            raw = Output(number, OSError(errno.EBADF, os.strerror(errno.EBADF)))
            made = io.TextIOWrapper(raw, 'utf-8', 'backslashreplace', write_through=True)
        else:
            before.flush()
            raw = Output(number)
            made = io.TextIOWrapper(  # prints all names, even if the encoding is ASCII
                raw if before.write_through else io.BufferedWriter(raw), before.encoding,
                'backslashreplace', line_buffering=before.line_buffering,
                write_through=before.write_through,
            )  # fmt: skip
        made.output = raw
        setattr(sys, name, made)
    leave_at_signals()


def output(name: str) -> Output | None:
    """The `Output` below sys.stdout or sys.stderr; None if it is another stream."""
    return getattr(getattr(sys, name), 'output', None)


def leave_at_signals(handler: Callable[[int, FrameType | None], None] | None = None) -> None:
    """Makes SIGNALS call `handler`, or `leave` by default; ignored signals stay ignored."""
    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # by nohup, or in a script's background
            signal.signal(signum, handler or leave)


def leave(signum: int, frame: FrameType | None) -> None:
    """Ends the process, before anything has begun or after everything is done."""
    write_error(f'{signal.Signals(signum).name}: ended\n')
    os._exit(128 + signum)


def write_error(text: str) -> None:
    """Writes to stderr without a buffer, as a signal handler must; never raises."""
    try:
        os.write(2, text.encode(errors='backslashreplace'))
    except OSError:
        pass
