"""Milliseconds of host a step, idle share of the device and transfers, from a trace of a few steps.

    python -m benchmarks.gpu.trace --out trace.json

The loop is that of vit_jax/train.py: put a new batch of uint8 on the device, dispatch the step,
read the metrics of the step before. From JAX's profiler: how long the host takes for the first two
(host_ms) and waits in the third (wait_ms); the share of the time in which the device does not
compute (idle); of the batches, which share is put while the device computes the step before
(ahead), and which share of the time that they take to cross is behind computation (hidden). Without
a trace: the milliseconds of a step whose batches cross, and of one whose batch is there (resident).
"""

import pathlib
import statistics
import sys
import tempfile
import time

import jax

from benchmarks import peers
from benchmarks.gpu import programs
from benchmarks.gpu import report as reports
from benchmarks.gpu.speed import SMALL
from vit_jax import models, sharding

CASES = [('vit-b/16', 256), ('vit-s/16', 512), ('vit-l/16', 128), ('vit-ti/16', 1024)]
STEPS = 6  # traced
HOST = ('put', 'dispatch', 'wait')


class Loop:
    """Trains as vit_jax/train.py does, with annotations for the trace."""

    def __init__(self, model, size, batch, fields):
        made = models.build(model, num_classes=1000, dtype='bfloat16', **fields)
        state, advance, self.mesh = programs.begin(peers.classifier(made, (size, size, 3)))
        self.state = state.replace(params=programs.with_head(state.params))
        self.batches = [peers.arrays(size, batch, 1000) for _ in range(3)]
        self.resident = sharding.put(self.batches[0], self.mesh)
        self.advance = advance.lower(self.state, self.resident, {}).compile()

    def run(self, steps, resident=False):
        """Seconds a step."""
        pending, began = None, time.perf_counter()
        for n in range(steps):
            with jax.profiler.TraceAnnotation('put'):
                batch = self.resident
                if not resident:
                    batch = sharding.put(self.batches[n % len(self.batches)], self.mesh)
            with jax.profiler.TraceAnnotation('dispatch'):
                self.state, metrics = self.advance(self.state, batch, {})
            if pending is not None:
                with jax.profiler.TraceAnnotation('wait'):
                    jax.device_get(pending)
            pending = metrics
        jax.block_until_ready((self.state, metrics))
        return (time.perf_counter() - began) / steps


def traced(run):
    """Runs a function under the profiler; returns jax.profiler.ProfileData."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it slows the host
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        (path,) = pathlib.Path(folder).rglob('*.xplane.pb')
        return jax.profiler.ProfileData.from_file(str(path))


def timeline(data):
    """{kind: [(begin, end) in ms]}: of host annotations; 'computes' and 'crosses' of the device."""
    found = {kind: [] for kind in (*HOST, 'computes', 'crosses')}
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                kind = kind_of(plane.name, line.name, event.name)
                if kind:
                    span = event.start_ns / 1e6, (event.start_ns + event.duration_ns) / 1e6
                    found[kind].append(span)
    return {kind: sorted(spans) for kind, spans in found.items()}


def kind_of(plane, line, event):
    """What an event is, by the names of its plane, its line and its own; None: nothing of these."""
    if plane.startswith('/device:GPU'):
        if not line.startswith('Stream'):
            return None  # lines of whole operations and modules, derived from these
        # A copy on the device is work of the program.
        return 'crosses' if 'MemcpyH2D' in event else None if 'MemcpyD2H' in event else 'computes'
    if event in HOST:
        return event
    # CPUs have no plane of their own: a thread of XLA waits for a program, and another one copies.
    if event == 'H2D Dispatch':
        return 'crosses'
    return 'computes' if event.startswith('ThunkExecutor::Execute (wait') else None


def merged(spans):
    """Spans without overlap."""
    whole = []
    for begin, end in sorted(spans):
        if whole and begin <= whole[-1][1]:
            whole[-1] = whole[-1][0], max(whole[-1][1], end)
        else:
            whole.append((begin, end))
    return whole


def length(spans):
    return sum(end - begin for begin, end in spans)


def overlap(spans, others):
    """Length of the parts of spans that are within others; both without overlap."""
    return sum(
        max(0.0, min(end, other_end) - max(begin, other_begin))
        for begin, end in spans for other_begin, other_end in others
    )  # fmt: skip


def figures(found, steps):
    """What a timeline of so many steps says; of the host alone if the device's is not traced."""
    host = {
        'host_ms': statistics.median(
            b - a + d - c for (a, b), (c, d) in zip(found['put'], found['dispatch'], strict=True)
        ),
        'put_ms': statistics.median(b - a for a, b in found['put']),
        'wait_ms': statistics.median(b - a for a, b in found['wait']),
    }
    if not found['computes']:
        return host | {'note': 'the trace has nothing of the device'}
    computes, crosses = merged(found['computes']), merged(found['crosses'])
    # From the second step on, as the first has nothing before it.
    begin, end = found['dispatch'][1][0], computes[-1][1]
    within = [(max(a, begin), min(b, end)) for a, b in computes if b > begin]
    return host | {
        'idle': 1 - length(within) / (end - begin), 'computes_ms': length(computes) / steps,
        'crosses_ms': length(crosses) / steps if crosses else None,
        'hidden': overlap(crosses, computes) / length(crosses) if crosses else None,
        'ahead': statistics.mean(
            any(a <= put <= b for a, b in computes) for put, _ in found['put'][2:]
        ),
    }  # fmt: skip


def main():
    report = reports.Report(options := reports.arguments(__doc__))
    device = jax.devices()[0]
    report.results['device'] = device.device_kind
    small = options.small or device.platform == 'cpu'
    for model, count in CASES[:1] if small else CASES:
        name = f'{model} {count}'
        if not report.wants(name, 30 if not small else 5):
            continue
        with report.case(name):
            sizes = ('vit-ti/16', 64, 32, SMALL) if small else (model, 224, count, {})
            loop, steps = Loop(*sizes), 2 if small else 30
            loop.run(3)
            crossing, resident = reports.turns(
                [lambda: loop.run(steps), lambda: loop.run(steps, True)], 3  # noqa: B023
            )
            found = figures(timeline(traced(lambda: loop.run(STEPS))), STEPS)  # noqa: B023
            report.add(
                name, ms=1e3 * statistics.median(crossing),
                resident_ms=1e3 * statistics.median(resident),
                mb=sum(x.nbytes for x in loop.batches[0].values()) / 1e6, **found,
            )  # fmt: skip
    return report.end()


if __name__ == '__main__':
    sys.exit(main())
