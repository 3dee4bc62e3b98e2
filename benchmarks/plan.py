"""Plans at scale, and predictions beside measurements: python -m benchmarks.plan WHAT.

    table      the recipes of experiments/pretrain.py on slices of TPUs, as a Markdown table
    weak       B/16 with 128 images a chip, from 8 to 2,048 chips
    published  TPUv3-core-days of arXiv:2010.11929 table 2, predicted and published
    measure    this machine: predicted and measured seconds of a step, a JSON line for each model

The first three run `python -m vit_jax.plan --json` once for each row, a minute or more each, and
save its output, by command, in docs/plans.json; --again repeats them.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import time

from absl import app, flags

AGAIN = flags.DEFINE_bool('again', False, 'Repeat plans that docs/plans.json has.')
STEPS = flags.DEFINE_integer('steps', 7, 'measure: timed steps of each model.')
KEPT = pathlib.Path('docs/plans.json')
PRETRAIN = '--config=experiments/pretrain.py:'
TABLE = (
    (f'{PRETRAIN}h/14', '--topology=v4:4x4x8'),
    (f'{PRETRAIN}h/14', '--topology=v4:8x8x16'),
    (f'{PRETRAIN}G/14', '--topology=v4:4x4x8'),
    (f'{PRETRAIN}G/14', '--topology=v4:8x8x16'),
    (f'{PRETRAIN}e/14', '--topology=v5p:8x8x8'),
    (f'{PRETRAIN}l/16-i21k', '--topology=v5e:16x16'),
)
WEAK = tuple(
    (f'{PRETRAIN}b/16', f'--topology=v4:{shape}', f'--config.data.batch_size={128 * chips}',
     '--config.optim.warmup=1000')
    for shape, chips in (
        ('2x2x2', 8), ('2x4x4', 32), ('4x4x8', 128), ('8x8x8', 512), ('8x16x16', 2048),
    )
)  # fmt: skip
PUBLISHED = {  # arXiv:2010.11929 table 2
    (f'{PRETRAIN}h/14', '--topology=v3:16x16'): 2500,
    (f'{PRETRAIN}l/16', '--topology=v3:16x16'): 680,
    (f'{PRETRAIN}l/16-i21k', '--topology=v3:16x16', '--config.epochs=30'): 230,
}


def planned(arguments):
    """The plan of these arguments, from docs/plans.json or newly compiled."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    command = ' '.join(['python -m vit_jax.plan', *arguments])
    if AGAIN.value or command not in kept:
        print(f'compiling: {command}', file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, '-m', 'vit_jax.plan', *arguments, '--json'],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode not in (0, 1):
            raise SystemExit(done.stderr)
        kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        kept[command] = json.loads(done.stdout)
        KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + '\n')
    return kept[command]


def markdown(heading, rows):
    rule = '|'.join(['---'] * len(heading))
    for row in (heading, None, *rows):
        print(f'|{rule}|' if row is None else '| ' + ' | '.join(map(str, row)) + ' |')


def gib(count):
    return f'{count / 2**30:.2f}'


def table():
    rows = []
    for arguments in TABLE:
        plan = planned(arguments)
        config, memory = plan['config'], plan['memory']
        mesh = ' '.join(f'{k}={v}' for k, v in plan['mesh'].items() if v > 1)
        name = [config['model'].removeprefix('vit-'), plan['topology'], mesh, config['remat']]
        if not memory['fits']:
            rows.append([*name, gib(memory['state']), gib(memory['needed']), *['does not fit'] * 6])
            continue
        seconds = plan['seconds']
        sent = sum(row['sent'] for row in plan['collectives'].values())
        rows.append([
            *name, gib(memory['state']), f'{gib(memory["needed"])} of {gib(memory["available"])}',
            f'{1e3 * seconds["roofline"]:,.0f} ({plan["bound"]})',
            f'{1e3 * seconds["compiler"]:,.0f}' if 'compiler' in seconds else '',
            f'{sent / 1e9:.2f}', f'{plan["images_per_second"]:,.0f}', f'{plan["days"]:,.1f}',
            f'{plan["core_days"]:,.0f}',
        ])  # fmt: skip
    markdown(['', 'slice', 'mesh', 'remat', 'state, GiB', 'memory, GiB', 'roofline, ms',
              "compiler's estimate, ms", 'sent a step, GB', 'images/s', 'days', 'core-days'],
             rows)  # fmt: skip


def weak():
    rows, first = [], None
    for arguments in WEAK:
        plan = planned(arguments)
        seconds = plan['seconds']
        first = first or seconds
        sent = sum(row['sent'] for row in plan['collectives'].values())
        rows.append([
            f'{plan["devices"]:,}', f'{plan["config"]["batch_size"]:,}',
            f'{plan["memory"]["state"] / 1e9:.3f}', f'{sent / 1e6:.1f}',
            f'{1e3 * seconds["exposed"]:.2f}', f'{1e3 * seconds["step"]:.1f}',
            f'{first["step"] / seconds["step"]:.1%}',
        ])  # fmt: skip
    markdown(['chips', 'batch', 'state a chip, GB', 'sent a chip, MB', 'exchanges, ms',
              'step at 50%, ms', 'efficiency'], rows)  # fmt: skip


def published():
    rows = []
    for arguments, days in PUBLISHED.items():
        plan = planned(arguments)
        if not plan['memory']['fits']:
            rows.append([plan['config']['model'], f'{days:,}', 'does not fit', ''])
            continue
        part = 1 / plan['seconds']['step'] * plan['core_days']
        rows.append([
            plan['config']['model'], f'{days:,}', f'{plan["core_days"]:,.0f}',
            f'{part * plan["seconds"]["compiler"]:,.0f}',
        ])  # fmt: skip
    markdown(['', 'published TPUv3-core-days', 'at 50% efficiency', "compiler's estimate"], rows)


def measure():
    """Times steps of small models on all devices of this machine, beside their plans."""
    import jax
    import numpy as np

    from vit_jax import assembly, sharding, step
    from vit_jax import config as configs
    from vit_jax.distributed import devices
    from vit_jax.plan import data_sets, estimate

    found = jax.devices()
    peaks = devices.peaks(found)
    for name, size, batch in (
        ('vit-ti/16', 224, 16), ('vit-s/16', 224, 8), ('vit-s/32', 224, 32), ('vit-b/32', 224, 8),
    ):  # fmt: skip
        config = configs.complete({
            'steps': 100, 'model': {'name': name, 'num_classes': 1000},
            'data': {'source': {'name': 'stated'}, 'view': 'resize', 'image_size': size,
                     'batch_size': batch},
        })  # fmt: skip
        source, _ = data_sets.load(config.data.source, examples=10**6, classes=1000)
        plan = estimate.plan(config, source, found, 'here', efficiency=1.0, peaks=peaks)
        parts = assembly.make(config, source, found)
        state = step.init(parts.objective, parts.tx, 0, parts.abstract)
        advance = step.compiled(parts.objective, parts.tx, parts.abstract, parts.mesh)
        arrays = {
            key: np.ones(x.shape, x.dtype)
            for key, x in estimate.batch_of(config, parts).items()
        }
        data = sharding.put(arrays, parts.mesh)
        seconds = []
        for _ in range(STEPS.value + 2):
            begin = time.perf_counter()
            state, metrics = advance(state, data, {})
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - begin)
        measured = statistics.median(seconds[2:])
        bounds = plan['seconds']
        print(json.dumps(dict(
            model=name, batch_size=batch, device=found[0].device_kind, devices=len(found),
            gflops_peak=round(peaks.flops / 1e9), gb_per_s_peak=round(peaks.bandwidth / 1e9, 1),
            compute_ms=round(1e3 * bounds['compute'], 1),
            memory_ms=round(1e3 * bounds['memory'], 1),
            roofline_ms=round(1e3 * bounds['roofline'], 1), measured_ms=round(1e3 * measured, 1),
            roofline_over_measured=round(bounds['roofline'] / measured, 3),
        )), flush=True)  # fmt: skip


def main(argv):
    parts = {f.__name__: f for f in (table, weak, published, measure)}
    if len(argv) != 2 or argv[1] not in parts:
        raise SystemExit(f'one of {", ".join(parts)}')
    parts[argv[1]]()


if __name__ == '__main__':
    app.run(main)
