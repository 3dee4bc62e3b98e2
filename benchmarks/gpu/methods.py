"""Times the steps of MAE and DINO on a GPU.

    python -m benchmarks.gpu.methods --out methods.json

MAE (arXiv:2111.06377) of B/16 and L/16 and DINO (arXiv:2104.14294) of S/16 and B/16 at 224 pixels
in bfloat16, as they are by default, with attention by XLA, and with scanned blocks. An image of
DINO is two crops of 224 and eight of 96 pixels. mfu counts three forward passes, of DINO's teacher
one.
"""

import statistics
import sys

from benchmarks.gpu import report as reports
from benchmarks.gpu.speed import ROUNDS, SMALL, TURN
from benchmarks.gpu.worker import Worker

VARIANTS = {'default': {}, 'xla': dict(attention='xla'), 'scanned': dict(unroll=1)}


def cases():
    """(method, model, images, variant), the most interesting first."""
    sizes = {
        ('mae', 'vit-b/16'): (512, 256, 1024), ('dino', 'vit-s/16'): (64, 32, 128),
        ('mae', 'vit-l/16'): (256, 128, 512), ('dino', 'vit-b/16'): (32, 16, 64),
    }  # fmt: skip
    for (method, model), batches in sizes.items():
        yield method, model, batches[0], 'default'
    for (method, model), batches in sizes.items():
        for variant in ('scanned', 'xla'):
            yield method, model, batches[0], variant
        for batch in batches[1:]:
            yield method, model, batch, 'default'


def main():
    report = reports.Report(options := reports.arguments(__doc__))
    worker = Worker(report)
    report.results['device'] = device = worker.ask(facts=True)
    small = options.small or device['platform'] == 'cpu'
    for method, model, batch, variant in cases():
        name = f'{method} {model} {batch} {variant}'
        if small and model not in ('vit-b/16', 'vit-s/16') or not report.wants(name):
            continue
        if worker.ended():
            worker = Worker(report)
        fields = (SMALL if small else {}) | VARIANTS[variant]
        settings = dict(model=model, size=224, batch=batch, small=small, **fields)
        if small:
            settings |= dict(model='vit-ti/16', size=112 if method == 'dino' else 32, batch=2)
        with report.case(name):
            built = worker.ask(
                build=method, name=name, settings=settings, seconds=0 if small else TURN
            )
            (seconds,) = reports.turns([lambda: worker.ask(turn=name)['seconds']], ROUNDS)  # noqa: B023
            middle = statistics.median(seconds)
            rate = built['flops'] / middle
            report.add(
                name, ms=1e3 * middle, spread=reports.spread(seconds),
                images_per_s=settings['batch'] / middle,
                mfu=device['peak'] and rate / device['peak'], of_product=rate / device['product'],
                memory_gb=built['memory'] and built['memory'] / 1e9, build_s=built['build_s'],
            )  # fmt: skip
            worker.ask(drop=name)
    return report.end()


if __name__ == '__main__':
    sys.exit(main())
