"""Compares an exported file with the package itself: python -m benchmarks.export --model vit-s/16.

Exports a model of random weights. A new process serves the file, with JAX alone, and this one the
model and its parameters. They take --rounds turns for each batch, while the other waits. Both
compute probabilities of images of the model's size, numpy to numpy. The file contains the view,
here resize, which does not change such images. Prints a JSON line per model:

    file_mb, weights_mb   of the file, and of the float32 weights in it
    export_s          from parameters to the bytes of the file
    load_s            from the file to a function
    first_s, own_first_s   the first image, compilation included
    by_batch          for each batch: ms and images_per_s of the file, own_ms and own_images_per_s,
                      and `slower`, seconds of the file by those of the package in the same turn
    difference        largest difference of a probability, over all batches
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from vit_jax import export, models

MODEL = flags.DEFINE_list('model', 'vit-ti/16,vit-s/16', 'Models by name.')
BATCH = flags.DEFINE_list('batch', '1,8,32', 'Images at a time.')
SIZE = flags.DEFINE_integer('image_size', 224, 'Pixels of a side.')
DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of the computation.')
ROUNDS = flags.DEFINE_integer('rounds', 7, 'Turns of each contender, for each batch.')
SECONDS = flags.DEFINE_float('seconds', 1.0, 'Length of a turn; at least one call.')
PLATFORMS = flags.DEFINE_list('platforms', list(export.PLATFORMS), 'Platforms of the file.')

# A line on stdin is a batch and the seconds of a turn; the answer is the seconds of a call.
SERVE = """
import json, sys, time
import jax, numpy as np
path, folder = sys.argv[1:]
jax.devices()

def call(images):
    return np.asarray(predict(images))

began = time.perf_counter()
predict = jax.export.deserialize(open(path, 'rb').read()).call
print(json.dumps(time.perf_counter() - began), flush=True)
for line in sys.stdin:
    batch, seconds = json.loads(line)
    images = np.load(f'{folder}/{batch}.npy')
    began, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - began < seconds:
        result = call(images)
        calls += 1
    taken = (time.perf_counter() - began) / calls
    np.save(f'{folder}/{batch}.result.npy', result)
    print(json.dumps(taken), flush=True)
"""


def noisy(model, size):
    """Random parameters without zeros, so that outputs depend on the images."""
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)['params']
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.03, x.shape), x.dtype), shapes)


def turn(call, images, seconds):
    """(seconds of a call, the last result)."""
    began, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - began < seconds:
        result = np.asarray(call(images))
        calls += 1
    return (time.perf_counter() - began) / calls, result


def compare(model, params, path, folder):
    """Measures the file and the package in turn; their figures."""

    @jax.jit
    def own(params, images):
        logits, _ = model.apply({'params': params}, model.normalise(images))
        return jax.nn.softmax(logits.astype(jnp.float32))

    def ask(*what):
        if what:
            server.stdin.write(json.dumps(what) + '\n')
            server.stdin.flush()
        return json.loads(server.stdout.readline())

    rng, rows, difference = np.random.default_rng(1), {}, 0.0
    command = [sys.executable, '-c', SERVE, str(path), str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        row = dict(load_s=round(ask(), 3))
        for batch in map(int, BATCH.value):
            images = rng.integers(0, 256, (batch, SIZE.value, SIZE.value, 3), np.uint8)
            np.save(folder / f'{batch}.npy', images)
            first = ask(batch, 0), turn(lambda x: own(params, x), images, 0)[0]
            if not rows:
                row |= dict(first_s=round(first[0], 2), own_first_s=round(first[1], 2))
            times = []
            for _ in range(ROUNDS.value):
                file = ask(batch, SECONDS.value)
                seconds, result = turn(lambda x: own(params, x), images, SECONDS.value)
                times.append((file, seconds))
            served = np.load(folder / f'{batch}.result.npy')
            difference = max(difference, float(np.abs(served - result).max()))
            file, seconds = (statistics.median(column) for column in zip(*times, strict=True))
            rows[batch] = dict(
                ms=round(1e3 * file, 1), own_ms=round(1e3 * seconds, 1),
                images_per_s=round(batch / file, 1), own_images_per_s=round(batch / seconds, 1),
                slower=round(statistics.median(a / b for a, b in times), 3),
            )  # fmt: skip
        server.stdin.close()
    return row | dict(by_batch=rows, difference=difference)


def main(argv):
    if argv[1:]:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    size = (SIZE.value, SIZE.value)
    for name in MODEL.value:
        model = models.build(name, num_classes=1000, dtype=DTYPE.value)
        params = noisy(model, size)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / 'model.jaxexport'
            began = time.perf_counter()
            exported = export.exported(
                model, params, size, view='resize', platforms=PLATFORMS.value
            )
            path.write_bytes(export.serialised(exported, {}))
            seconds = time.perf_counter() - began
            print(json.dumps(dict(
                model=name, dtype=DTYPE.value, device=jax.devices()[0].device_kind,
                file_mb=round(path.stat().st_size / 1e6, 2),
                weights_mb=round(sum(x.nbytes for x in jax.tree.leaves(params)) / 1e6, 2),
                export_s=round(seconds, 2),
                **compare(model, params, path, pathlib.Path(folder)),
            )), flush=True)  # fmt: skip


if __name__ == '__main__':
    app.run(main)
