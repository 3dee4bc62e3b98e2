"""Times the start-up of a very large data set: python -m benchmarks.scale.

Writes the manifest of 3 billion examples in 100,000 shards and draws the first batch of a run from
step 0 and from step 10^8, in turn, each in a new process. Shuffle, index and pipeline are the real
ones; instead of the shards, which would fill many disks, one image is read for every example.
Prints a JSON line for each step: median seconds to read the manifest and to the first batch, and
the process's peak memory above that of the same with 1,000 examples in one shard.
"""

import io
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

EXAMPLES = flags.DEFINE_integer('examples', 3_000_000_000, 'Length of the data set.')
SHARDS = flags.DEFINE_integer('shards', 100_000, 'Shards that it lies in.')
STEPS = flags.DEFINE_list('steps', '0,100000000', 'Steps to start at.')
ROUNDS = flags.DEFINE_integer('rounds', 5, 'Processes for each step.')
BATCH = flags.DEFINE_integer('batch_size', 256, 'Images in the batch.')
MEASURE = flags.DEFINE_list('measure', None, 'For processes that the benchmark starts itself.')


def write(folder, examples, shards):
    """A folder with a manifest and no shard."""
    from vit_jax.data.readers import records

    folder.mkdir()
    each = np.diff(np.linspace(0, examples, shards + 1).astype(int)).tolist()
    files = [
        dict(file=records.shard_name('train', k, shards), examples=n, bytes=n, sha256='0' * 64)
        for k, n in enumerate(each)
    ]
    manifest = dict(
        format=records.FORMAT, version=records.VERSION, classes=['a', 'b'], max_labels=1,
        splits=dict(train=files), source={}, options={},
    )  # fmt: skip
    (folder / records.MANIFEST).write_text(json.dumps(manifest))


def measure(folder, step):
    """[seconds to the manifest, seconds to the first batch, peak bytes, ids of it]."""
    from PIL import Image

    from vit_jax.data import pipeline, sources
    from vit_jax.data.readers import prepared
    from vit_jax.data.tasks import classify

    out = io.BytesIO()
    Image.new('RGB', (64, 64), 'grey').save(out, 'JPEG')

    class Records(prepared.Prepared):
        def decode(self, i):
            assert self.locate(i)[1] >= 0
            return {'image': out.getvalue(), 'label': (0,), 'name': ''}

    begin = time.perf_counter()
    data = Records(folder)
    opened = time.perf_counter() - begin
    source = sources.Source(data, data.classes)
    task = classify.classify(source, view='resize', image_size=32)
    feed = pipeline.batches(
        source, task, 0, step, batch_size=BATCH.value, threads=1, prefetch=1
    )
    batch = next(feed)
    done = time.perf_counter() - begin
    peak = re.search(r'VmHWM:\s+(\d+)', pathlib.Path('/proc/self/status').read_text())
    return [opened, done, int(peak[1]) * 1024, len(set(batch['id'].tolist()))]


def measured(folder, step):
    done = subprocess.run(
        [sys.executable, '-m', 'benchmarks.scale', f'--measure={folder},{step}',
         f'--batch_size={BATCH.value}'], check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def main(argv):
    if MEASURE.value:
        print(json.dumps(measure(MEASURE.value[0], int(MEASURE.value[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        large, small = pathlib.Path(folder, 'large'), pathlib.Path(folder, 'small')
        write(large, EXAMPLES.value, SHARDS.value)
        write(small, 1000, 1)
        rows = {step: [] for step in STEPS.value}
        base = []
        for _ in range(ROUNDS.value):
            base.append(measured(small, 0)[2])
            for step, values in rows.items():
                values.append(measured(large, step))
        for step, values in rows.items():
            opened, batch, peak, distinct = map(statistics.median, zip(*values, strict=True))
            print(json.dumps(dict(
                examples=EXAMPLES.value, shards=SHARDS.value, step=int(step),
                manifest_seconds=round(opened, 3), first_batch_seconds=round(batch, 3),
                megabytes_above_small=round((peak - statistics.median(base)) / 1e6, 1),
                distinct_ids=distinct,
            )), flush=True)  # fmt: skip


if __name__ == '__main__':
    app.run(main)
