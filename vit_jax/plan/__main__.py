"""Plans a run before any device is reserved: whether it fits, what bounds it, how long it takes.

    python -m vit_jax.plan --config FILE[:ARG] --topology v4:4x4x8 [--config.KEY=VALUE]

Compiles the real train step for that topology with the TPU compiler (extra `plan`), on a machine
without TPUs, and reads memory, FLOPs, traffic and collectives from the compiled program. Without
--topology it compiles for the devices of this machine; cpu:8 simulates eight. estimate.py documents
how times are derived.
Exit status 1 if the run does not fit; --fit then searches for settings that do.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags

from vit_jax import cli
from vit_jax import config as configs
from vit_jax.distributed import devices, topologies
from vit_jax.errors import UserError
from vit_jax.io.text import aligned, to_json
from vit_jax.plan import data_sets, estimate, fitting
from vit_jax.plan.estimate import size

CONFIG = flags.DEFINE_string(
    'config', None, 'Experiment file, with an argument after a colon where it takes one. '
    '--config.KEY=VALUE changes one of its settings.', required=True,
)  # fmt: skip
TOPOLOGY = flags.DEFINE_string('topology', None, 'v4:4x4x8, v5e:16x16, v5p:..., v6e:..., cpu:8.')
CHIPS = flags.DEFINE_integer(
    'chips', None, 'With --topology=v4: number of chips of the slice.', lower_bound=1
)
SLICES = flags.DEFINE_integer(
    'slices', 1, 'Number of slices, connected by the data centre network.', lower_bound=1
)
EFFICIENCY = flags.DEFINE_float(
    'efficiency', 0.5, 'Share of the peaks of arithmetic and memory that a step reaches.',
    lower_bound=0.001, upper_bound=1,
)  # fmt: skip
FIT = flags.DEFINE_bool('fit', False, 'Search for settings that fit, by compiling.')
JSON = flags.DEFINE_bool('json', False, 'Print one JSON object instead of tables.')
EXAMPLES = flags.DEFINE_integer(
    'examples', None, 'Number of examples of a data set that is absent.', lower_bound=1
)
CLASSES = flags.DEFINE_integer(
    'classes', None, 'Number of classes of a data set that is absent.', lower_bound=1
)


def duration(seconds: float) -> str:
    """Formats seconds with a unit: '1.50 s', '25 ms'."""
    return f'{seconds:,.2f} s' if seconds >= 1 else f'{seconds * 1e3:,.3g} ms'


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table as text: the first column left-aligned, the others right-aligned."""
    return aligned(rows, right=range(1, len(rows[0])))


def settings_text(config: dict[str, Any]) -> str:
    """Model, image size, dtypes, remat and batches of a plan, as far as its method has them."""
    size = f' at {"x".join(map(str, config["image_size"]))}' if config['image_size'] else ''
    products = f' with products in {config["matmul_dtype"]}' if config['matmul_dtype'] else ''
    parts = [f'{config["model"]}{size}']
    parts += [f'{config["dtype"]}{products}'] if config['dtype'] else []
    parts += [f'remat {config["remat"]}'] if config['remat'] else []
    parts += [f'batches of {config["batch_size"]:,} in {config["accumulate"]}']
    return ', '.join(parts)


def text(result: dict[str, Any]) -> str:
    """Formats a plan, a result of `estimate.plan`, as lines of text."""
    config, memory, peaks = result['config'], result['memory'], result['peaks']
    mesh = ' '.join(f'{axis}={n}' for axis, n in result['mesh'].items())
    lines = [
        settings_text(config),
        f'{result["topology"]}: {result["devices"]:,} x {result["kind"]}, mesh {mesh}',
        f'{result["parameters"]:,} parameters, {result["steps"]:,} steps, '
        f'{result["images"]:,} images',
        '', f'Memory per device: {estimate.verdict(memory)}',
    ]  # fmt: skip
    names = {'parameters': 'parameters', 'state': 'state, parameters included',
             'batch': 'batch, and padding of the state', 'activations': 'activations and gradients',
             'code': 'code'}  # fmt: skip
    rows = [(f'  {name}', size(memory[key])) for key, name in names.items() if key in memory]
    lines += [table(rows)]
    if not memory['fits']:
        lines += ['', '--fit searches for settings that fit']
    if 'seconds' in result:
        lines += ['', *performance(result, peaks)]
    return '\n'.join(lines + ([''] if result['notes'] else []) + result['notes'])


def collectives(kinds: dict[str, dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yields the rows of a plan's collectives by kind."""
    yield ('Collectives', 'per step', 'arrays', 'sent per device', 'asynchronous', 'at peak')
    for kind, row in kinds.items():
        share = row['hidden'] / row['sent'] if row['sent'] else 0
        yield (f'  {kind}', f'{row["times"]:,}', size(row['bytes']), size(row['sent']),
               f'{share:.0%}', duration(row['seconds']))  # fmt: skip


def performance(result: dict[str, Any], peaks: dict[str, Any]) -> Iterator[str]:
    """Yields the tables of a plan's work, collectives and times; `peaks` as in devices.Device."""
    seconds, batch = result['seconds'], result['config']['batch_size']
    yield table([
        ('Work', 'per image', 'per step and device', 'at peak'),
        ('  arithmetic', f'{result["flops_per_image"] / 1e9:,.4g} GFLOP',
         f'{result["flops"] / 1e12:,.4g} TFLOP', duration(seconds['compute'])),
        ('  memory', f'{result["bytes_per_image"] / 1e6:,.4g} MB', size(result['traffic']),
         duration(seconds['memory'])),
    ])  # fmt: skip
    if result['collectives']:
        yield from ('', table([*collectives(result['collectives'])]))
    at_peak = result['model_flops_per_image'] * batch / result['devices'] / peaks['flops']
    yield ''
    rows = [
        (f'Roofline: {result["bound"]}', duration(seconds['roofline'])),
        ('Exposed communication', duration(seconds['exposed'])),
    ]
    if seconds['network']:
        rows += [('  between slices or nodes', duration(seconds['exposed_network']))]
    rows += [
        (f'Step at {seconds["efficiency"]:.0%} efficiency', duration(seconds['step'])),
    ]
    if 'compiler' in seconds:
        rows += [("Compiler's estimate, kernels apart", duration(seconds['compiler']))]
    rows += [
        ('Model FLOPs utilisation', f'{at_peak / seconds["step"]:.0%}'),
        ('Images per second', f'{result["images_per_second"]:,.0f}'),
        ('Days', f'{result["days"]:,.3g}'),
    ]
    if result['kind'].startswith('TPU'):
        name, colon, _ = result['topology'].rpartition(' ')[2].partition(':')
        generation = name if colon else ''
        rows += [(f'TPU{generation}-core-days', f'{result["core_days"]:,.4g}')]
    yield table(rows)


def main(argv: list[str], overrides: list[tuple[str, str]]) -> int:
    """Runs the command and returns its exit status."""
    if argv[1:]:
        raise UserError(f'unexpected argument {argv[1]!r}; flags begin with --')
    if TOPOLOGY.value:
        if not TOPOLOGY.value.startswith('cpu'):
            jax.config.update('jax_platforms', 'cpu')
        target_devices, title = topologies.get_devices(TOPOLOGY.value, CHIPS.value, SLICES.value)
    else:
        target_devices = jax.devices()
        title = f'{len(target_devices)} of this machine'
    config = configs.load(CONFIG.value, overrides)
    source, note = data_sets.load(config.data.source, EXAMPLES.value, CLASSES.value)
    options = dict(efficiency=EFFICIENCY.value, peaks=devices.peaks(target_devices))
    result = estimate.plan(config, source, target_devices, title, **options)
    result['notes'] += [note] if note else []
    if not JSON.value:
        print(text(result), flush=True)
    if FIT.value and not result['memory']['fits']:
        log = (lambda line: None) if JSON.value else lambda line: print(line, flush=True)
        log('')
        changes, fitted = fitting.fit(
            config, source, target_devices, title, result, log, **options
        )
        result['fit'] = changes and {'flags': fitting.as_flags(changes), 'plan': fitted}
        if changes:
            log(f'\nWith {fitting.as_flags(changes)}:\n\n{text(fitted)}')
        else:
            log('none of the settings that were tried fits')
    if JSON.value:
        print(to_json(result | {'command': sys.argv[1:]}))
    return 0 if result['memory']['fits'] else 1


if __name__ == '__main__':
    cli.run(main, 'config')
