"""What all commands share: a user's mistake is one line and exit status 2, a bug a traceback."""

import sys

from absl import app, flags, logging

from vit_jax.errors import UserError


def run(main, parse=flags.FLAGS):
    """Calls main(arguments) after parse(sys.argv), and exits with what it returns."""
    logging.set_verbosity(logging.WARNING)  # --verbosity overrules; absl's own default is INFO
    try:
        app.run(main, flags_parser=parse)
    except (UserError, flags.Error) as e:
        print(f'error: {e}', file=sys.stderr)
        sys.exit(2)
