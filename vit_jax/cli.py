"""What all commands share: a user's mistake is one line and exit status 2, a bug a traceback, and
Ctrl-C one word and exit status 130."""

import os
import re
import signal
import sys
import threading

from absl import app, flags, logging

from vit_jax.errors import UserError
from vit_jax.text import printable


def split_changes(argv, section):
    """Arguments without those of the form --SECTION.KEY=VALUE, and these as (key, text)."""
    rest, changes = [], []
    for arg in argv:
        match = re.fullmatch(rf'--?{section}\.([^=]+)(=(.*))?', arg, re.DOTALL)
        if match and match[2] is None:
            raise UserError(f'{arg} has no value; write {arg}=VALUE')
        changes.append((match[1], match[3])) if match else rest.append(arg)
    return rest, changes


def not_lost(unraisable):
    """A sys.unraisablehook that repeats a Ctrl-C which came within a destructor.

    Python prints an exception of a destructor and goes on, and the user would have to ask again.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        # Not at once, as this is still within the destructor.
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


class Printable(logging.PythonFormatter):
    """Log lines, whatever name they hold, without a terminal's escape sequences."""

    def format(self, record):
        return printable(super().format(record), keep='\n\t')


def run(main, section=None):
    """Parses sys.argv, calls main(arguments) and exits with what it returns.

    With a `section`, flags of the form --SECTION.KEY=VALUE are left to main as its second
    argument: a list of (key, text).
    """
    changes = []

    def parse(argv):
        rest, found = split_changes(argv, section) if section else (argv, [])
        changes.extend(found)
        return flags.FLAGS(rest)

    sys.unraisablehook = not_lost
    for stream in (sys.stdout, sys.stderr):  # names print where the encoding is ASCII, too
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    logging.get_absl_handler().setFormatter(Printable())
    logging.set_verbosity(logging.WARNING)  # --verbosity overrules; absl's own default is INFO
    try:
        app.run((lambda argv: main(argv, changes)) if section else main, flags_parser=parse)
    except (UserError, flags.Error) as e:
        own = '\n' if getattr(e, 'several_lines', True) else ''  # absl's have some, too
        print('error:', printable(e, keep=own), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read what is printed has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
