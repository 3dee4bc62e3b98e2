"""Compares the train step with that of other libraries: python -m benchmarks.train_step.

    python -m benchmarks.train_step --model vit-b/16 --batch 128 --peer timm,flax_mha
    python -m benchmarks.train_step --model vit-s/16 --batch 8 --dtype float32 --peer flax_mha,torch

Each contender is a process of its own. In each of --rounds rounds they take turns, each making
--steps steps on the same batch of noise while the others wait. The first turn is for compilation
and warm-up. Prints a JSON line per contender: medians over the rounds of the milliseconds of a
step, of images/s and of the ratio to ours in the same round; MFU relative to the datasheet's peak
and to a matrix product measured in the same run; peak memory; seconds to compile.

On CPUs ours has the large pages of the package's commands (vit_jax/io/large_pages.py). With
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 all contenders have them, with hugetlb=0 none.

Peers (peers.py): flax_mha, a plain linen encoder with the same optimizer; timm, under torch.compile
with fused AdamW; torch, the same with transformers' ViT, where timm does not import. Their blocks
are unrolled, as ours are by default on accelerators; --variant unroll=1 adds scanned blocks,
unroll=12 unrolled ones. --inference times forward passes: --batch is a list, of which 1 gives the
latency. --set FIELD=VALUE,... changes fields of our model; --variant FIELD=VALUE,... adds a variant
of it as another contender.
"""

import json
import os
import statistics
import subprocess
import sys
import time

import jax
from absl import app, flags

from benchmarks import peers
from vit_jax.io import large_pages

MODEL = flags.DEFINE_string('model', 'vit-b/16', 'Model by name.')
BATCH = flags.DEFINE_list('batch', '64', 'Images per step; one comparison for each number.')
SIZE = flags.DEFINE_integer('image_size', 224, 'Pixels of a side.')
CLASSES = flags.DEFINE_integer('classes', 1000, 'Classes.')
DTYPE = flags.DEFINE_enum('dtype', 'bfloat16', ['bfloat16', 'float32'], 'Of the computation.')
PEER = flags.DEFINE_list('peer', [], f'Of {", ".join(p for p in peers.PEERS if p != "ours")}.')
VARIANT = flags.DEFINE_multi_string('variant', [], 'FIELD=VALUE,... of another contender.')
SET = flags.DEFINE_string('set', '', 'FIELD=VALUE,... of our model.')
INFERENCE = flags.DEFINE_bool('inference', False, 'Time forward passes instead of steps.')
STEPS = flags.DEFINE_integer('steps', 10, 'Steps per turn.')
ROUNDS = flags.DEFINE_integer('rounds', 7, 'Turns per contender.')
SERVE = flags.DEFINE_string('serve', None, 'Internal: the contender that this process serves.')
# bfloat16 without sparsity, from NVIDIA's datasheets.
PEAKS = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12}


def value(text):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def fields(text):
    return {k: value(v) for k, _, v in (pair.partition('=') for pair in text.split(',') if pair)}


def peak_memory(name):
    """Peak bytes of the accelerator if there is one, else of the process."""
    if name in ('timm', 'torch'):
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    stats = jax.local_devices()[0].memory_stats() if name in ('ours', 'flax_mha') else None
    if stats:
        return stats['peak_bytes_in_use']
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(contender):
    """Makes a turn for each line of stdin, and writes a JSON line to stdout."""
    name, _, changes = contender.partition(':')
    out = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print is no answer
    began = time.perf_counter()
    run, flops = peers.PEERS[name](
        MODEL.value, SIZE.value, int(BATCH.value[0]), CLASSES.value, not INFERENCE.value,
        DTYPE.value, fields(SET.value) | fields(changes) if name == 'ours' else {},
    )  # fmt: skip
    made = time.perf_counter()
    run(1)
    compiled = time.perf_counter() - made
    run(2)
    device = jax.devices()[0].device_kind if name in ('ours', 'flax_mha') else ''
    first = dict(seconds_to_build=made - began, seconds_to_compile=compiled, flops=flops)
    if name == 'ours':
        first |= dict(device=device, product=peers.product(DTYPE.value))
    print(json.dumps(first), file=out, flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        run(STEPS.value)
        seconds = (time.perf_counter() - began) / STEPS.value
        print(json.dumps(dict(seconds=seconds, memory=peak_memory(name))), file=out, flush=True)


class Contender:
    """A process that makes turns."""

    def __init__(self, name, batch):
        self.name, self.seconds, self.last = name, [], {}
        flagged = [
            f'--model={MODEL.value}', f'--batch={batch}', f'--image_size={SIZE.value}',
            f'--classes={CLASSES.value}', f'--dtype={DTYPE.value}', f'--steps={STEPS.value}',
            f'--set={SET.value}', f'--inference={INFERENCE.value}',
        ]  # fmt: skip
        added = large_pages.variables() if name.startswith('ours') else {}  # as our commands have
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'benchmarks.train_step', f'--serve={name}', *flagged],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'} | added,
        )  # fmt: skip
        self.first = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f'{self.name} ended with status {self.process.wait()}')
        return json.loads(line)

    def turn(self):
        self.process.stdin.write('\n')
        self.process.stdin.flush()
        self.last = self.answer()
        self.seconds.append(self.last['seconds'])

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def compare(batch):
    """Lets all contenders take turns and prints a JSON line for each."""
    names = ['ours', *(f'ours:{v}' for v in VARIANT.value), *PEER.value]
    contenders = []
    for name in names:
        print(f'{name}: compiling', file=sys.stderr, flush=True)
        contenders.append(Contender(name, batch))
    for n in range(ROUNDS.value):
        for contender in contenders if n % 2 else contenders[::-1]:
            contender.turn()
    best = contenders[0]
    device, measured = best.first['device'], best.first['product']
    peak = next((v for k, v in PEAKS.items() if k in device), None)
    for c in contenders:
        c.end()
        middle = statistics.median(c.seconds)
        ratios = [a / b for a, b in zip(c.seconds, best.seconds, strict=True)]
        rate = best.first['flops'] / middle  # of the model: the same for all
        print(json.dumps(dict(
            contender=c.name, model=MODEL.value, batch=batch, dtype=DTYPE.value, device=device,
            what='forward' if INFERENCE.value else 'train', ms=round(1e3 * middle, 3),
            spread=round((max(c.seconds) - min(c.seconds)) / middle, 3),
            images_per_s=round(batch / middle, 1),
            ours_is_faster=round(statistics.median(ratios), 3),
            mfu=peak and round(rate / peak, 4), of_product=round(rate / measured, 4),
            peak_mb=round(c.last['memory'] / 1e6),
            compile_s=round(c.first['seconds_to_compile'], 1),
        )), flush=True)  # fmt: skip


def main(argv):
    if argv[1:]:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    if SERVE.value:
        serve(SERVE.value)
        return
    for batch in BATCH.value:
        compare(int(batch))


if __name__ == '__main__':
    app.run(main)
