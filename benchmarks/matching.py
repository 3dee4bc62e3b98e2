"""Times the matching of predictions to boxes: python -m benchmarks.matching.

Three functions assign --targets to --queries at the least cost, compiled with jit: `assign` of
objectives/matching.py, Optax's Hungarian algorithm mapped over the batch, and SciPy's on the host
through jax.pure_callback. A target counts with an even chance for each number from none to all of
an example; Optax assigns all, as it takes no number of them. Costs are `random`, or `alike`: nearly
sums of a term of the target and one of the prediction, as early in training, so that paths are
long. They take --rounds turns each, one after the other, and each must reach the least cost. Prints
a JSON line for each batch and kind of costs: ms by function, the median.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from scipy.optimize import linear_sum_assignment

from vit_jax.objectives import matching

BATCH = flags.DEFINE_list('batch', '8,64', 'Examples at a time.')
QUERIES = flags.DEFINE_integer('queries', 100, 'Predictions of an example.')
TARGETS = flags.DEFINE_integer('targets', 63, 'Boxes of an example, padding included.')
ROUNDS = flags.DEFINE_integer('rounds', 15, 'Turns of each function.')


def on_host(cost, valid):
    """`matching.assign` by SciPy, in NumPy."""
    found = np.zeros(valid.shape, np.int32)
    for one, counts, out in zip(np.asarray(cost), np.asarray(valid), found, strict=True):
        out[counts] = linear_sum_assignment(one[counts])[1]
    return found


def by_callback(cost, valid):
    shape = jax.ShapeDtypeStruct(valid.shape, jnp.int32)
    return jax.pure_callback(on_host, shape, cost, valid)


def by_optax(cost, valid):
    return jax.vmap(optax.assignment.hungarian_algorithm)(cost)[1]


FUNCTIONS = {'assign': matching.assign, 'optax': by_optax, 'scipy': by_callback}


def costs(rng, kind, batch):
    """Costs [B, M, Q] and which targets count [B, M]."""
    shape = batch, TARGETS.value, QUERIES.value
    noise = rng.normal(size=shape)
    if kind == 'alike':
        noise = 0.05 * noise + rng.normal(size=(*shape[:2], 1))
        noise += rng.normal(size=(batch, 1, shape[2]))
    counts = rng.integers(0, TARGETS.value + 1, (batch, 1))
    return noise.astype(np.float32), np.arange(TARGETS.value) < counts


def total(cost, valid, found):
    """Sum of the costs of what is assigned."""
    return np.sum(np.take_along_axis(cost, found[:, :, None], axis=2)[:, :, 0] * valid)


def main(_):
    rng = np.random.default_rng(0)
    for batch in map(int, BATCH.value):
        for kind in ('random', 'alike'):
            arrays = costs(rng, kind, batch)
            least, times = total(*arrays, on_host(*arrays)), {}
            for name, function in FUNCTIONS.items():
                compiled = jax.jit(function)
                found = np.asarray(compiled(*arrays))
                if name != 'optax':
                    np.testing.assert_allclose(total(*arrays, found), least, rtol=1e-4)
                times[name] = []
                for _ in range(ROUNDS.value):
                    start = time.perf_counter()
                    jax.block_until_ready(compiled(*arrays))
                    times[name].append(1e3 * (time.perf_counter() - start))
            medians = {name: round(statistics.median(x), 2) for name, x in times.items()}
            print(json.dumps(dict(batch=batch, costs=kind, ms=medians)), flush=True)


if __name__ == '__main__':
    app.run(main)
