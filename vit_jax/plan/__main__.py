"""Plans a run before any device is reserved: whether it fits, what bounds it, how long it takes.

    python -m vit_jax.plan --config FILE[:ARG] --topology v4:4x4x8 [--config.KEY=VALUE]

Compiles the real train step for that topology with the TPU compiler (extra `plan`), on a machine
without TPUs, and reads memory, FLOPs, traffic and collectives from the compiled program. Without
--topology it compiles for the devices of this machine; cpu:8 simulates eight. estimate.py documents
how times are derived.
Exit status 1 if the run does not fit; --fit then searches for settings that do.
"""

import sys

import jax
from absl import flags

from vit_jax import cli
from vit_jax import config as configs
from vit_jax.distributed import devices, topologies
from vit_jax.errors import UserError
from vit_jax.io.text import aligned, to_json
from vit_jax.plan import estimate, fitting
from vit_jax.plan.estimate import size

CONFIG = flags.DEFINE_string(
    'config', None, 'Experiment file, with an argument after a colon where it takes one. '
    '--config.KEY=VALUE changes one of its settings.', required=True,
)  # fmt: skip
TOPOLOGY = flags.DEFINE_string('topology', None, 'v4:4x4x8, v5e:16x16, v5p:..., v6e:..., cpu:8.')
CHIPS = flags.DEFINE_integer(
    'chips', None, 'With --topology=v4: a slice of so many chips.', lower_bound=1
)
SLICES = flags.DEFINE_integer(
    'slices', 1, 'So many slices, joined by the data centre network.', lower_bound=1
)
EFFICIENCY = flags.DEFINE_float(
    'efficiency', 0.5, 'Share of the peaks of arithmetic and memory that a step reaches.',
    lower_bound=0.001, upper_bound=1,
)  # fmt: skip
FIT = flags.DEFINE_bool('fit', False, 'Search for settings that fit, by compiling.')
JSON = flags.DEFINE_bool('json', False, 'Print one JSON object in place of tables.')
EXAMPLES = flags.DEFINE_integer(
    'examples', None, 'Of a data set that is not here: its length.', lower_bound=1
)
CLASSES = flags.DEFINE_integer(
    'classes', None, 'Of a data set that is not here: its classes.', lower_bound=1
)


def duration(seconds):
    return f'{seconds:,.2f} s' if seconds >= 1 else f'{seconds * 1e3:,.3g} ms'


def table(rows):
    """A table as text: the first column left-aligned, the others right-aligned."""
    return aligned(rows, right=range(1, len(rows[0])))


def text(result):
    """A plan as text."""
    config, memory, peaks = result['config'], result['memory'], result['peaks']
    mesh = ' '.join(f'{axis}={n}' for axis, n in result['mesh'].items())
    lines = [
        f'{config["model"]} at {"x".join(map(str, config["image_size"]))}, {config["dtype"]}, '
        f'remat {config["remat"]}, batches of {config["batch_size"]:,} in {config["accumulate"]}',
        f'{result["topology"]}: {result["devices"]:,} x {result["kind"]}, mesh {mesh}',
        f'{result["parameters"]:,} parameters, {result["steps"]:,} steps, '
        f'{result["images"]:,} images',
        '', f'Memory of a device: {estimate.verdict(memory)}',
    ]  # fmt: skip
    names = {'parameters': 'parameters', 'state': 'state, parameters among it',
             'batch': 'batch, and padding of the state', 'activations': 'activations and gradients',
             'code': 'code'}  # fmt: skip
    rows = [(f'  {name}', size(memory[key])) for key, name in names.items() if key in memory]
    lines += [table(rows)]
    if not memory['fits']:
        lines += ['', 'settings that fit are found by --fit']
    if 'seconds' in result:
        lines += ['', *performance(result, peaks)]
    return '\n'.join(lines + ([''] if result['notes'] else []) + result['notes'])


def performance(result, peaks):
    seconds, batch = result['seconds'], result['config']['batch_size']
    yield table([
        ('Work', 'an image', 'a step and device', 'at peak'),
        ('  arithmetic', f'{result["flops_per_image"] / 1e9:,.4g} GFLOP',
         f'{result["flops"] / 1e12:,.4g} TFLOP', duration(seconds['compute'])),
        ('  memory', f'{result["bytes_per_image"] / 1e6:,.4g} MB', size(result['traffic']),
         duration(seconds['memory'])),
    ])  # fmt: skip
    if result['collectives']:
        rows = [('Collectives', 'a step', 'arrays', 'sent by a device', 'at peak')] + [
            (f'  {kind}', f'{row["times"]:,}', size(row['bytes']), size(row['sent']),
             duration(result['exchange_seconds'][kind]))
            for kind, row in result['collectives'].items()
        ]  # fmt: skip
        yield from ('', table(rows))
    compute = result['model_flops_per_image'] * batch / result['devices'] / peaks['flops']
    yield ''
    rows = [
        (f'Roofline: {result["bound"]}', duration(seconds['roofline'])),
        ('Exchanges that nothing hides', duration(seconds['exposed'])),
        (f'A step at {seconds["efficiency"]:.0%} efficiency', duration(seconds['step'])),
    ]
    if 'compiler' in seconds:
        rows += [("A step by the compiler's own estimate", duration(seconds['compiler']))]
    rows += [
        ('Model FLOPs utilisation of such a step', f'{compute / seconds["step"]:.0%}'),
        ('Images a second', f'{result["images_per_second"]:,.0f}'),
        ('Days to the end', f'{result["days"]:,.3g}'),
    ]
    if result['kind'].startswith('TPU'):
        generation = result['topology'].rpartition(' ')[2].partition(':')[0]
        rows += [(f'TPU{generation}-core-days', f'{result["core_days"]:,.4g}')]
    yield table(rows)


def main(argv, overrides):
    if argv[1:]:
        raise UserError(f'unexpected argument {argv[1]!r}; flags begin with --')
    if TOPOLOGY.value:
        if not TOPOLOGY.value.startswith('cpu'):
            jax.config.update('jax_platforms', 'cpu')
        found, title = topologies.get_devices(TOPOLOGY.value, CHIPS.value, SLICES.value)
    else:
        found = jax.devices()
        title = f'{len(found)} here'
    config = configs.load(CONFIG.value, overrides)
    source, note = estimate.data_set(config.data.source, EXAMPLES.value, CLASSES.value)
    options = dict(efficiency=EFFICIENCY.value, peaks=devices.peaks(found))
    result = estimate.plan(config, source, found, title, **options)
    result['notes'] += [note] if note else []
    if not JSON.value:
        print(text(result), flush=True)
    if FIT.value and not result['memory']['fits']:
        say = (lambda line: None) if JSON.value else lambda line: print(line, flush=True)
        say('')
        changes, fitted = fitting.fit(
            config, source, found, title, result, say, **options
        )
        result['fit'] = changes and {'flags': fitting.as_flags(changes), 'plan': fitted}
        if changes:
            say(f'\nWith {fitting.as_flags(changes)}:\n\n{text(fitted)}')
        else:
            say('nothing that was tried fits')
    if JSON.value:
        print(to_json(result | {'command': sys.argv[1:]}))
    return 0 if result['memory']['fits'] else 1


if __name__ == '__main__':
    cli.run(main, 'config')
