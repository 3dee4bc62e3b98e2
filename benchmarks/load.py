"""Seconds and peak memory of loading a checkpoint: python -m benchmarks.load --model vit-b/16.

Writes random weights in each format and loads each in new processes, in turn. Prints a JSON line
per format: the median seconds of `vit_jax.load` (file in the page cache), and by how much its peak
resident memory exceeds that of loading a checkpoint of a few hundred kilobytes, as a ratio to the
file's size. The peer is numpy.load or safetensors' load_file of the same file, which read every
array and make no model.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import models
from vit_jax.convert.save import save

MODEL = flags.DEFINE_string('model', 'vit-b/16', 'Model by name.')
ROUNDS = flags.DEFINE_integer('rounds', 5, 'Processes for each format.')
FORMATS = flags.DEFINE_list('formats', 'official,big_vision,timm,hf', 'Formats to write and load.')
FIELDS = {  # that each format can express
    'official': {}, 'big_vision': dict(cls_posemb=False), 'timm': dict(gelu='exact'),
    'hf': dict(gelu='exact'),
}  # fmt: skip

LOADING = """
import json, re, sys, time
import jax, numpy as np, safetensors.numpy
from vit_jax.convert.load import load
which, path, file = sys.argv[1:]
jax.devices()
start = time.perf_counter()
if which == 'ours':
    model, params = load(path)
    jax.block_until_ready(params)
elif file.endswith('.npz'):
    arrays = dict(np.load(file))
else:
    arrays = safetensors.numpy.load_file(file)
seconds = time.perf_counter() - start
peak = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())  # its own, not its parent's
print(json.dumps([seconds, int(peak[1]) * 1024]))
"""


def write(path, name, format, image_size):
    """A checkpoint of random weights."""
    model = models.build(name, **FIELDS[format])
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), images)['params'])
    rng = np.random.default_rng(0)
    params = {k: rng.standard_normal(x.shape, np.float32) for k, x in shapes.items()}
    save(path, model, unflatten_dict(params), format)


def file_of(path):
    """The file with the arrays."""
    return path / 'model.safetensors' if path.is_dir() else path


def measured(which, path, file):
    """(seconds, peak bytes) of a new process that loads."""
    arguments = [sys.executable, '-c', LOADING, which, str(path), str(file)]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main(argv):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        paths = {}
        for format in FORMATS.value:
            suffix = '.npz' if format in ('official', 'big_vision') else ''
            path, small = folder / f'{format}{suffix}', folder / f'small_{format}{suffix}'
            write(path, MODEL.value, format, 224)
            write(small, 'vit-mu/16', format, 32)
            paths[format] = path, file_of(path), small
        times = {key: [] for f in paths for key in ((f, 'ours'), (f, 'peer'))}
        peaks, baseline = {}, {}
        for _ in range(ROUNDS.value):
            for format, (path, file, small) in paths.items():
                for which in ('ours', 'peer'):
                    base = measured(which, small, file_of(small))[1]
                    baseline[format, which] = min(base, baseline.get((format, which), base))
                    seconds, peak = measured(which, path, file)
                    times[format, which].append(seconds)
                    peaks[format, which] = max(peak, peaks.get((format, which), 0))
        for format, (_, file, _) in paths.items():
            size = file.stat().st_size
            row = dict(model=MODEL.value, format=format, megabytes=round(size / 1e6, 1))
            for which in ('ours', 'peer'):
                row[f'{which}_seconds'] = round(statistics.median(times[format, which]), 3)
                above = peaks[format, which] - baseline[format, which]
                row[f'{which}_memory_ratio'] = round(above / size, 3)
            print(json.dumps(row), flush=True)


if __name__ == '__main__':
    app.run(main)
