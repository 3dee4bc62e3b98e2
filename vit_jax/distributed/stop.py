"""Stops a run on a signal, at the same step in all processes."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np

from vit_jax.io import streams


class Stop:
    """Signal handler, true once SIGTERM, SIGINT or SIGHUP arrived; a second one ends the process.

    Several processes must stop at the same step even if only one of them gets the signal. So each
    adds its vote to its rows of every batch. The train step returns the sum over the batch, which
    is the same in all processes; `Stop` becomes true when it is positive.

    Attributes:
      signum: the signal that arrived; None: none.
      shared: whether the run has several processes.
      agreed: whether the processes have agreed to stop.
      trouble: an exception of the data a few batches ahead, see pipeline.read_ahead.
    """

    def __init__(self):
        self.signum = None
        self.shared = self.agreed = False
        self.trouble = None

    def __bool__(self) -> bool:
        return self.agreed if self.shared else self.signum is not None

    def add_vote(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Adds this process's vote to a batch if the run has several processes."""
        if not self.shared:
            return batch
        vote = self.signum is not None or self.trouble is not None
        return batch | {'stop': np.full(len(batch['mask']), vote, np.float32)}

    def read_votes(self, sums: dict[str, Any]) -> dict[str, Any]:
        """Removes the sum of all votes from the metrics of a step, a dict of arrays; records it."""
        self.agreed |= bool(sums.pop('stop', 0))
        return sums

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)
        name = signal.Signals(signum).name
        # print() is not reentrant, and the signal may have interrupted one.
        text = f'{name}: stopping at the next step; press again to quit without saving'
        streams.write_error(f'\n{text}\n')


@contextlib.contextmanager
def on_signal() -> Iterator[Stop]:
    """Yields a Stop that handles signals; a SIGHUP that nohup ignores stays ignored."""
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
