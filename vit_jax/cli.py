"""What all commands share: a user's mistake is one line and exit status 2, a bug a traceback.

What the system refuses (a file, memory, a thread) is one line, too. SIGINT, SIGTERM and SIGHUP end
a command with exit status 130, 143 and 129. Where nobody reads what is printed any more, a command
goes on without a word, as its files matter; where it can't be written, status and line say so.
"""

import errno
import math
import os
import re
import signal
import sys
import threading

from absl import app, flags, logging

from vit_jax.errors import UserError, refusal
from vit_jax.io import streams
from vit_jax.io.text import printable


def split_changes(argv, section):
    """Arguments without those of the form --SECTION.KEY=VALUE, and these as (key, text)."""
    rest, changes = [], []
    for arg in argv:
        match = re.fullmatch(rf'--?{section}\.([^=]+)(=(.*))?', arg, re.DOTALL)
        if match and match[2] is None:
            raise UserError(f'{arg} has no value; write {arg}=VALUE')
        changes.append((match[1], match[3])) if match else rest.append(arg)
    return rest, changes


class Interrupted(KeyboardInterrupt):
    """One of streams.SIGNALS came."""

    def __init__(self, signum):
        super().__init__()
        self.signum = signum


def interrupt(signum, frame):
    """A signal handler: unwinds, so that no half-written file stays; a second signal is the end."""
    streams.leave_at_signals()
    raise Interrupted(signum)


def not_lost(unraisable):
    """A sys.unraisablehook that repeats a signal which came within a destructor.

    Python prints an exception of a destructor and goes on, and the user would have to ask again.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        signum = getattr(unraisable.exc_value, 'signum', signal.SIGINT)
        # Not at once, as this is still within the destructor.
        threading.Timer(0.05, os.kill, (os.getpid(), signum)).start()
        streams.leave_at_signals(interrupt)
    else:
        sys.__unraisablehook__(unraisable)


class Printable(logging.PythonFormatter):
    """Log lines, whatever name they hold, without a terminal's escape sequences."""

    def format(self, record):
        return printable(super().format(record), keep='\n\t')


def run(main, section=None, *, goes_on=False):
    """Parses sys.argv, calls main(arguments) and exits with what it returns.

    With a `section`, flags of the form --SECTION.KEY=VALUE are left to main as its second
    argument: a list of (key, text). A command that `goes_on` without its output, as files have all
    that it prints, says when it does so.
    """
    changes = []

    def parse(argv):
        rest, found = split_changes(argv, section) if section else (argv, [])
        changes.extend(found)
        try:
            rest = flags.FLAGS([*rest[:1], *('--help' if a == '-h' else a for a in rest[1:])])
        except SystemExit:  # absl's status of --help and its kin is 1
            sys.exit(0)
        for name, value in flags.FLAGS.flag_values_dict().items():
            if value in ('', [''], []) and flags.FLAGS[name].present:  # an unset shell variable
                raise UserError(f'flag --{name} is empty; give it a value, or leave it out')
            if isinstance(value, float) and not math.isfinite(value):  # absl lets it pass
                raise UserError(f'flag --{name} is {value}, not a finite number')
        return rest

    logging.use_absl_handler()  # alone: it takes handlers of the stderr away that it finds
    streams.begin()
    if goes_on and streams.output('stdout'):
        streams.output('stdout').tell = without_output
    sys.unraisablehook = not_lost
    logging.get_absl_handler().setFormatter(Printable())
    logging.set_verbosity(logging.WARNING)  # --verbosity overrules; absl's own default is INFO
    try:
        streams.leave_at_signals(interrupt)
        try:
            app.run((lambda argv: main(argv, changes)) if section else main, flags_parser=parse)
        finally:
            streams.leave_at_signals()
    except SystemExit as e:  # which is how app.run ends
        status = e.code
    except (UserError, flags.Error) as e:
        status = mistake(e)
    except KeyboardInterrupt as e:
        print('interrupted', file=sys.stderr)
        status = 128 + getattr(e, 'signum', signal.SIGINT)
    except Exception as e:
        line = refusal(e)
        if line is None:
            raise
        status = mistake(line)
    sys.exit(finished(status, goes_on))


def mistake(error):
    """Prints the one line of what a user can mend; its exit status."""
    own = '\n' if getattr(error, 'several_lines', True) else ''  # absl's have some, too
    print('error:', printable(error, keep=own), file=sys.stderr)
    return 2


def without_output(error):
    """Says that output is lost, once, where all that it says is in files, too."""
    # A progress bar has replaced sys.stderr, and would print this to standard output.
    streams.write_error(f'standard output: {error.strerror}; going on without it\n')


def finished(status, goes_on):
    """The exit status, once all that was printed is written or refused."""
    sys.stdout.flush()
    output = streams.output('stdout')
    refused = None if goes_on or output is None else output.refused
    if status in (0, None) and refused is not None and refused.errno != errno.EPIPE:
        return mistake(f'can not write to standard output: {refused.strerror}')
    return status
