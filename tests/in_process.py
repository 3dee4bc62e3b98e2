"""Runs of tests/tiny.py in the tests' own process, on its eight devices."""

import launched

from vit_jax import config, train
from vit_jax.distributed.stop import Stop
from vit_jax.run import workdir


def run(folder, path, *overrides, stop=None, **options):
    """A run of 12 steps; the result, or None if it was stopped."""
    fixed = ('steps=12', 'evals.val.batch_size=8', 'evals.val.every=4', 'checkpoint.every=4')
    pairs = [o.split('=', 1) for o in fixed + overrides]
    stop = Stop() if stop is None else stop
    with workdir.lock_workdir(str(path)) as path:
        return train.train(config.load(f'{launched.TINY}:{folder}', pairs), path, stop, **options)


class StopAfter(Stop):
    """True once metrics.jsonl has a line of that step."""

    def __init__(self, path, step):
        super().__init__()
        self.path, self.step = path, step

    def __bool__(self):
        return launched.last_step(self.path) >= self.step
