"""Times training and inference on a GPU, beside timm and plain linen.

    python -m benchmarks.gpu.speed --out speed.json

Contenders: ours, as it is by default (attention by cuDNN, unrolled blocks); timm under
torch.compile in bfloat16 autocast with fused AdamW, its weights as they are or channels_last; a
linen encoder of nn.MultiHeadDotProductAttention with our optimizer (linen); ours with attention by
XLA (xla), with scanned blocks (scanned), with both. A contender takes turns of 0.3 s with ours.
First come the cases of the bars, then the rest in order of interest, until the seconds are over:
--only 'vit-l/16' or --only 'infer' begins elsewhere. ms is the median of the turns, ours_is_faster
that of the ratios of two turns, memory what the compiled program needs, and of torch the peak; mfu
is relative to the peak of the device's data sheet, with three forward passes a step.
"""

import itertools
import statistics
import sys

from benchmarks.gpu import report as reports
from benchmarks.gpu.worker import Ended, Worker

ROUNDS, TURN = 5, 0.3  # turns of a contender, and seconds of one
ALONE = 15  # seconds in which ours is timed if a contender takes all others to compile
SIZES = {'vit-b/16': (256, 64, 512), 'vit-l/16': (128, 64, 256), 'vit-s/16': (512, 128, 1024)}
SMALL = dict(width=32, depth=2, num_heads=4, mlp_dim=64)  # fields of models for CPUs
VARIANTS = {
    'linen': dict(plain=True), 'xla': dict(attention='xla'), 'scanned': dict(unroll=1),
    'xla scanned': dict(attention='xla', unroll=1),
}  # fmt: skip
TIMM = {'timm': {}, 'timm channels_last': dict(channels_last=True)}
BARS = {'vit-b/16': 0.45, 'vit-l/16': 0.52, 'vit-s/16': 0.35}  # MFU at 224 pixels, on Hopper
OF_TIMM = 1.2  # images/s of B/16, each at its best


def groups():
    """(model, what, batch, contenders beside ours), the most interesting first."""
    middle = [(model, sizes[0]) for model, sizes in SIZES.items()]
    others = [(model, size) for model, sizes in SIZES.items() for size in sizes[1:]]
    for model, size in middle:
        yield model, 'train', size, ['timm']
    yield 'vit-b/16', 'train', SIZES['vit-b/16'][0], ['linen', 'scanned', 'xla']
    for model, size in middle:
        yield model, 'infer', size, ['timm', 'linen']
    for model, size in others:
        yield model, 'train', size, ['timm']
    for (model, size), what in itertools.product(middle + others, ('train', 'infer')):
        yield model, what, size, [*TIMM, *VARIANTS]


class Comparison:
    """The workers, and what they have built."""

    def __init__(self, report, small):
        self.report, self.small, self.rounds = report, small, 2 if small else ROUNDS
        self.workers, self.built, self.tried = {}, {}, set()

    def worker(self, contender):
        """That of JAX or of torch; a new one if it has ended."""
        kind = 'torch' if contender in TIMM else 'jax'
        if kind not in self.workers or self.workers[kind].ended():
            self.workers[kind] = Worker(self.report)
            self.built = {
                name: value for name, value in self.built.items()
                if (value['kind'] == 'timm') != (kind == 'torch')
            }  # fmt: skip
        return self.workers[kind]

    def settings(self, group, contender):
        """(name of the builder, its arguments)."""
        model, what, batch = group
        common = dict(model=model, size=224, batch=batch, train=what == 'train')
        if self.small:
            common |= dict(model='vit-ti/16', size=32, batch=2)
        if contender in TIMM:
            return 'timm', common | TIMM[contender]
        return 'ours', common | (SMALL if self.small else {}) | VARIANTS.get(contender, {})

    def send(self, group, contender):
        """Begins to build a contender."""
        kind, settings = self.settings(group, contender)
        self.worker(contender).send(
            build=kind, name=case(group, contender), settings=settings,
            seconds=0 if self.small else TURN,
        )  # fmt: skip

    def receive(self, group, contender, spare=2):
        """Waits until it is built, or until so many seconds are left."""
        found = self.worker(contender).receive(spare)
        self.built[case(group, contender)] = found | {'kind': self.settings(group, contender)[0]}

    def seconds(self, group, contender):
        """Seconds of a run, by one turn."""
        return self.worker(contender).ask(turn=case(group, contender))['seconds']

    def run(self, group, contenders):
        """Times ours and then each contender beside it, of those that are new."""
        report = self.report
        wanted = [
            c for c in contenders
            if case(group, c) not in self.tried and report.wants(case(group, c))
        ]  # fmt: skip
        if not wanted:
            return
        self.tried |= {case(group, c) for c in wanted}
        # Torch builds one while JAX compiles; nothing is timed meanwhile.
        beside = wanted[0] if wanted[0] in TIMM else None
        if beside:
            self.send(group, beside)
        with report.case(case(group, 'ours')):
            if case(group, 'ours') not in self.built:
                self.send(group, 'ours')
                self.receive(group, 'ours')
        if beside:
            with report.case(case(group, beside)):
                self.receive(group, beside, ALONE)  # else ours is timed by itself
        self.time_ours(group)
        for contender in wanted:
            if contender == beside and case(group, beside) not in self.built:
                continue  # the file says why
            with report.case(case(group, contender)):
                if contender != beside:
                    if not report.wants(case(group, contender)):
                        continue
                    self.send(group, contender)
                    self.receive(group, contender)
                self.compare(group, contender)

    def time_ours(self, group):
        """Times ours by itself, unless it was not built or has been timed."""
        name = case(group, 'ours')
        if name in self.built and name not in self.report.results['cases']:
            with self.report.case(name):
                (seconds,) = reports.turns([lambda: self.seconds(group, 'ours')], self.rounds)
                self.add(group, 'ours', seconds)

    def compare(self, group, contender):
        """Lets a contender take turns with ours, and forgets it."""
        missing = [c for c in ('ours', contender) if case(group, c) not in self.built]
        if missing:
            raise Ended(f'{missing[0]} was not built')
        runs = [lambda c=c: self.seconds(group, c) for c in ('ours', contender)]
        ours, seconds = reports.turns(runs, self.rounds)
        ratios = [b / a for a, b in zip(ours, seconds, strict=True)]
        self.add(group, contender, seconds, ours_is_faster=statistics.median(ratios))
        self.built.pop(case(group, contender))
        self.worker(contender).ask(drop=case(group, contender))

    def add(self, group, contender, seconds, **more):
        model, what, _ = group
        built, device = self.built[case(group, contender)], self.report.results['device']
        middle = statistics.median(seconds)
        rate = built['flops'] / middle
        count = self.settings(group, contender)[1]['batch']
        more |= {k: built[k] for k in ('note',) if k in built}
        self.report.add(
            case(group, contender), model=model, what=what, batch=count, contender=contender,
            ms=1e3 * middle, spread=reports.spread(seconds), images_per_s=count / middle,
            mfu=device['peak'] and rate / device['peak'], of_product=rate / device['product'],
            memory_gb=built['memory'] and built['memory'] / 1e9, build_s=built['build_s'], **more,
        )  # fmt: skip


def case(group, contender):
    model, what, batch = group
    return f'{model} {what} {batch} {contender}'


def best(report, model, contenders, figure):
    """The largest figure of a model's training among contenders and batch sizes; None without."""
    found = [
        c[figure] for c in report.results['cases'].values()
        if c['model'] == model and c['what'] == 'train' and c['contender'] in contenders
    ]  # fmt: skip
    return max((x for x in found if x is not None), default=None)


def set_bars(report):
    for model, wanted in BARS.items():
        report.bar(f'{model} train, MFU', wanted, best(report, model, ['ours'], 'mfu'))
    ours, timm = (best(report, 'vit-b/16', c, 'images_per_s') for c in (['ours'], TIMM))
    report.bar('vit-b/16 train, images/s to timm', OF_TIMM, ours and timm and ours / timm)


def main():
    options = reports.arguments(__doc__)
    report = reports.Report(options)
    worker = Worker(report)
    report.results['device'] = device = worker.ask(facts=True)
    small = options.small or device['platform'] == 'cpu'
    comparison = Comparison(report, small)
    comparison.workers['jax'] = worker
    for *group, contenders in groups():
        if not small or group[0] == 'vit-b/16' and group[2] == SIZES['vit-b/16'][0]:
            comparison.run(tuple(group), contenders)
            set_bars(report)
    return report.end()


if __name__ == '__main__':
    sys.exit(main())
