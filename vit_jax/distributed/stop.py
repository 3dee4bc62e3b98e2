"""Signals that ask a run to stop."""

import contextlib
import signal

import numpy as np

from vit_jax.io import streams


class Stop:
    """True once SIGTERM, SIGINT or SIGHUP came; a second one ends the process at once.

    Several processes must stop at the same step, also where the signal came to one alone. So there
    it is true once all know: each has its wish in its rows of every batch, and the sum over the
    batch, which the step returns, is the same for all.
    """

    def __init__(self):
        self.signum = None
        self.shared = False  # with other processes
        self.agreed = False
        self.trouble = None  # an exception that comes soon, see pipeline.foreseen

    def __bool__(self):
        return self.agreed if self.shared else self.signum is not None

    def within(self, batch):
        """The batch, with this process's wish in it where there are others."""
        if not self.shared:
            return batch
        wish = self.signum is not None or self.trouble is not None
        return batch | {'stop': np.full(len(batch['mask']), wish, np.float32)}

    def hear(self, sums):
        """Takes the sum of all wishes out of what a step has returned."""
        self.agreed |= bool(sums.pop('stop', 0))
        return sums

    def __call__(self, signum, frame):
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)
        name = signal.Signals(signum).name
        # print() can't be entered twice, and the signal may have come in the midst of one.
        streams.write_error(f'\n{name}: stopping at the next step; once more to lose it.\n')


@contextlib.contextmanager
def on_signal():
    """A Stop that listens as long as the block runs; nohup has SIGHUP ignored, which stays so."""
    stop = Stop()
    signals = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signals.remove(signal.SIGHUP)
    before = {s: signal.signal(s, stop) for s in signals}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
