"""Signals that ask a run to stop."""

import contextlib
import os
import signal


class Stop:
    """True once SIGTERM or SIGINT came; a second one ends the process at once."""

    def __init__(self):
        self.signum = None

    def __bool__(self):
        return self.signum is not None

    def __call__(self, signum, frame):
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)
        name = signal.Signals(signum).name
        # print() can't be entered twice, and the signal may have come in the midst of one.
        os.write(2, f'\n{name}: stopping at the next step; once more to lose it.\n'.encode())


@contextlib.contextmanager
def on_signal():
    """A Stop that listens as long as the block runs."""
    stop = Stop()
    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
