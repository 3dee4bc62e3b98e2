"""Runs a command: parses its flags, handles signals and errors, and exits with a status.

A mistake of the user is one line and exit status 2; so is a file, memory or a thread that the
system refuses. A bug is a traceback. SIGINT, SIGTERM and SIGHUP end a command with exit status 130,
143 and 129. If the reader of standard output goes away (EPIPE), a command continues silently, as
its files matter; any other write error is reported by a line and the exit status.
"""

import errno
import logging as std_logging
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from vit_jax.errors import UserError, refusal
from vit_jax.io import streams
from vit_jax.io.text import printable


def split_changes(
    argv: Sequence[str], section: str
) -> tuple[list[str], list[tuple[str, str]]]:
    """Splits arguments into those not of the form --SECTION.KEY=VALUE and [(key, text)]."""
    rest, changes = [], []
    for arg in argv:
        match = re.fullmatch(rf'--?{section}\.([^=]+)(=(.*))?', arg, re.DOTALL)
        if match and match[2] is None:
            raise UserError(f'{arg} has no value; write {arg}=VALUE')
        changes.append((match[1], match[3])) if match else rest.append(arg)
    return rest, changes


class Interrupted(KeyboardInterrupt):
    """Raised when one of streams.SIGNALS arrives."""

    def __init__(self, signum: int):
        super().__init__()
        self.signum = signum


def interrupt(signum: int, frame: Any) -> None:
    """Signal handler that unwinds the stack, which removes half-written files.

    A second signal ends the process at once.
    """
    streams.leave_at_signals()
    raise Interrupted(signum)


def repeat_signal(unraisable: Any) -> None:
    """A sys.unraisablehook that repeats a signal which arrived during a destructor.

    Python only prints an exception raised in a destructor, so the signal would be lost.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        signum = getattr(unraisable.exc_value, 'signum', signal.SIGINT)
        # With a delay, as this still runs within the destructor.
        threading.Timer(0.05, os.kill, (os.getpid(), signum)).start()
        streams.leave_at_signals(interrupt)
    else:
        sys.__unraisablehook__(unraisable)


class Printable(logging.PythonFormatter):
    """Formats log lines with the terminal's escape sequences, as in a file's name, escaped."""

    def format(self, record: std_logging.LogRecord) -> str:
        return printable(super().format(record), keep='\n\t')


def run(
    main: Callable[..., int | None], section: str | None = None, *, goes_on: bool = False
) -> NoReturn:
    """Parses sys.argv, calls main(arguments) and exits with the status that it returns.

    Args:
      main: the command.
      section: name of a section whose flags, of the form --SECTION.KEY=VALUE, are passed to `main`
        as its second argument, [(key, text)]. None: no second argument.
      goes_on: whether the command continues, with a warning, if standard output can't be written,
        because its files contain all that it prints.
    """
    changes = []

    def parse(argv):
        rest, found = split_changes(argv, section) if section else (argv, [])
        changes.extend(found)
        try:
            rest = flags.FLAGS([*rest[:1], *('--help' if a == '-h' else a for a in rest[1:])])
        except SystemExit:  # absl exits with status 1 after --help and its variants
            sys.exit(0)
        for name, value in flags.FLAGS.flag_values_dict().items():
            if value in ('', [''], []) and flags.FLAGS[name].present:  # an unset shell variable
                raise UserError(f'flag --{name} is empty; give it a value, or leave it out')
            if isinstance(value, float) and not math.isfinite(value):  # which absl accepts
                raise UserError(f'flag --{name} is {value}, not a finite number')
        return rest

    logging.use_absl_handler()  # removes other handlers that write to stderr
    streams.begin()
    if goes_on and streams.output('stdout'):
        streams.output('stdout').on_error = warn_of_lost_output
    sys.unraisablehook = repeat_signal
    logging.get_absl_handler().setFormatter(Printable())
    logging.set_verbosity(logging.WARNING)  # unless --verbosity is given; absl's default is INFO
    try:
        streams.leave_at_signals(interrupt)
        try:
            app.run((lambda argv: main(argv, changes)) if section else main, flags_parser=parse)
        finally:
            streams.leave_at_signals()
    except SystemExit as e:  # raised by app.run at its end
        status = e.code
    except (UserError, flags.Error) as e:
        status = report_mistake(e)
    except KeyboardInterrupt as e:
        print('interrupted', file=sys.stderr)
        status = 128 + getattr(e, 'signum', signal.SIGINT)
    except Exception as e:
        line = refusal(e)
        if line is None:
            raise
        status = report_mistake(line)
    sys.exit(final_status(status, goes_on))


def report_mistake(error: Exception | str) -> int:
    """Prints an error that the user can fix, and returns its exit status, 2."""
    own = '\n' if getattr(error, 'several_lines', True) else ''  # absl's errors have several, too
    print('error:', printable(error, keep=own), file=sys.stderr)
    return 2


def warn_of_lost_output(error: OSError) -> None:
    """Warns once that standard output is lost."""
    # Not through sys.stderr, which a progress bar redirects to standard output.
    streams.write_error(f'standard output: {error.strerror}; going on without it\n')


def final_status(status: int | None, goes_on: bool) -> int | None:
    """Flushes standard output and returns the exit status."""
    sys.stdout.flush()
    output = streams.output('stdout')
    refused = None if goes_on or output is None else output.refused
    if status in (0, None) and refused is not None and refused.errno != errno.EPIPE:
        return report_mistake(f'cannot write to standard output: {refused.strerror}')
    return status
