"""Estimates memory, work, communication and time of a run from its compiled train step.

The roofline is the longest of the times of arithmetic, memory and interconnect at their peaks. The
estimate for a step is the longer of arithmetic and memory, divided by an efficiency, plus all
communication that the compiled program does not overlap with other work. Input is not included: see
benchmarks.input.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import assembly, sharding, step
from vit_jax import config as configs
from vit_jax.data import mixture, sources
from vit_jax.data.readers import splits, vtab
from vit_jax.distributed import devices, interconnect
from vit_jax.errors import UserError
from vit_jax.plan import hlo
from vit_jax.run import report

# Examples of the training split and classes, for plans without the data. Sources: arXiv:2010.11929
# section 4.1 (ImageNet, JFT-300M), arXiv:2106.04560 section 3.1 (JFT-3B; its "nearly 3 billion" in
# round numbers), tensorflow.org/datasets/catalog (the others).
KNOWN = {
    'imagenet2012': (1_281_167, 1000), 'imagenet21k': (14_197_122, 21_843),
    'jft_300m': (303_000_000, 18_291), 'jft_3b': (3_000_000_000, 29_593),
    'cifar10': (50_000, 10), 'cifar100': (50_000, 100), 'oxford_iiit_pet': (3_680, 37),
    'oxford_flowers102': (1_020, 102), 'places365_small': (1_803_460, 365),
}  # fmt: skip


VTAB_1K = {'train800': 800, 'val200': 200, 'train800val200': 1000}  # examples per split


class Refused(Exception):
    """The compiler reports that the program, or its temporaries, don't fit; sizes in bytes."""

    def __init__(self, needed, available):
        self.needed, self.available = needed, available
        super().__init__(f'{needed} bytes, {available} available')


class Stated(NamedTuple):
    """Records of a data set of which only the size is known."""

    length: int
    max_labels: int = 1

    def __len__(self):
        return self.length


def data_set(settings, examples=None, classes=None):
    """(the data set that a config names, or a stand-in of its size; a note on the latter).

    `examples` and `classes` override the size. Raises UserError if it is unknown.
    """
    if examples is None and classes is None:
        try:
            return mixture.load(**settings), None
        except (UserError, OSError) as e:
            missing = str(e).partition('; ')[0].partition(' Did you')[0]
    else:
        missing = 'its size is given'
    name = mixture.title(settings)
    split = settings.get('split', 'train')
    known = KNOWN.get(name.partition('/')[0].partition(':')[0], (None, None))
    part, low, high = splits.parse(split)
    if examples is None and known[0] and part in ('train', 'full'):
        examples = round(known[0] * (high - low) / 100)
    classes = classes or known[1]
    if name.startswith('vtab:'):
        examples, classes = examples or VTAB_1K[split], classes or vtab.task(name).classes
    if not examples or not classes:
        raise UserError(
            f'{missing}; state its size with --examples and --classes, or use one of '
            + ', '.join(KNOWN)
        )
    note = f'{name}: {missing}; taken to have {examples:,} examples and {classes:,} classes'
    return stated(examples, classes), note


def stated(examples, classes):
    """A data set of that size without any data."""
    return sources.Source(Stated(examples), tuple(map(str, range(classes))))


def without_evals(config):
    """A copy of a config without evaluations, which don't affect the train step."""
    plain = configs.ConfigDict(config.to_dict())
    plain.evals = configs.ConfigDict()
    plain.checkpoint.best = None
    return plain


def batch_of(config, parts):
    """Shapes of a global batch as the training loop puts it on the devices."""
    size = config.data.batch_size
    arrays = {name: (x.shape, x.dtype) for name, x in parts.spec.items()}
    arrays |= {'mask': ((), jnp.float32), 'id': ((), jnp.int32)}
    return {
        name: jax.ShapeDtypeStruct((size, *shape), dtype) for name, (shape, dtype) in arrays.items()
    }


def compiled(config, parts):
    """Compiles the train step of a run for the devices of its mesh."""
    advance = step.compiled(
        parts.objective, parts.tx, parts.abstract, parts.mesh, seed=config.seed,
        accumulate=config.accumulate,
    )  # fmt: skip
    where = sharding.by_name(parts.objective.frozen, parts.mesh, parts.objective.rules)
    frozen = sharding.add_shardings(jax.eval_shape(lambda: parts.objective.frozen), where)
    return compile_or_refuse(
        advance.lower(parts.abstract, batch_of(config, parts), frozen)
    )


def compile_or_refuse(lowered):
    """Compiles `lowered`; raises Refused if the TPU compiler reports that it does not fit."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        found = re.search(r'temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)', str(e))
        found = found or re.search(r'Used ([\d.]+\w) of ([\d.]+\w) hbm', str(e))
        if 'RESOURCE_EXHAUSTED' not in str(e) or not found:
            raise
        raise Refused(*map(in_bytes, found.groups())) from e


def in_bytes(text):
    """Parses a size such as '30.75G' to bytes."""
    return float(text[:-1]) * 2 ** {'K': 10, 'M': 20, 'G': 30, 'T': 40}[text[-1]]


def bytes_a_device(tree):
    """Bytes of sharded arrays on the device that has the most."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def plan(config, source, found, title, *, efficiency, peaks=None):
    """Plans a run: a dict of its size, memory, work and time.

    Args:
      config: config of the run.
      source: its data set, or a stand-in of its size.
      found: devices to compile for.
      title: name of these devices.
      efficiency: share of the peaks of arithmetic and memory that a step reaches.
      peaks: devices.Device. None: that of `found`.
    """
    peaks = peaks or devices.peaks(found)
    parts = assembly.make(without_evals(config), source, found)
    batch = config.data.batch_size
    image = parts.spec.get('image')
    result = {
        'config': {'model': report.model_name(config),
                   'image_size': None if image is None else list(image.shape[:2]),
                   'batch_size': batch, 'accumulate': config.accumulate,
                   'dtype': config.model.get('dtype'), 'remat': config.model.get('remat'),
                   'optimizer': config.optim.name},
        'topology': title, 'devices': len(found), 'kind': found[0].device_kind,
        'mesh': dict(parts.mesh.shape), 'peaks': peaks._asdict(),
        'parameters': sum(count for _, _, count, *_ in parts.tx.table),
        'forward_flops': parts.objective.flops,
        'steps': parts.steps, 'images': parts.steps * batch, 'notes': [],
        'memory': {'parameters': bytes_a_device(parts.abstract.params),
                   'state': bytes_a_device(parts.abstract), 'available': peaks.usable},
    }  # fmt: skip
    memory = result['memory']
    try:
        executable = compiled(config, parts)
    except Refused as e:
        memory |= {'available': e.available, 'needed': max(e.needed, memory['state']),
                   'activations': e.needed, 'fits': False}  # fmt: skip
        return result
    stats = executable.memory_analysis()
    memory['batch'] = stats.argument_size_in_bytes - memory['state']
    memory['activations'] = stats.temp_size_in_bytes
    memory['code'] = stats.generated_code_size_in_bytes
    memory['needed'] = stats.argument_size_in_bytes + stats.temp_size_in_bytes + memory['code'] + (
        stats.output_size_in_bytes - stats.alias_size_in_bytes
    )
    memory['fits'] = memory['needed'] <= memory['available']
    program = hlo.read(executable.as_text())
    forward = parts.objective.flops
    expected = program.flops if forward is None else 3 * forward * batch / len(found)
    result |= work(program, len(found), batch, expected)
    result['notes'] += remarks(program, expected)
    result |= times(program, list(parts.mesh.devices.flat), peaks, efficiency)
    rate = batch / result['seconds']['step']
    days = parts.steps * result['seconds']['step'] / 86_400
    result |= {'images_per_second': rate, 'days': days,
               'core_days': days * len(found) * peaks.cores}  # fmt: skip
    return result


def work(program, count, batch, expected):
    """Work of a step per image and per device, and its collectives by kind."""
    kinds = {}
    for c in program.collectives:
        row = kinds.setdefault(c.kind, {'times': 0, 'bytes': 0, 'sent': 0.0})
        row['times'] += c.times
        row['bytes'] += c.times * c.bytes
        row['sent'] += c.times * c.wire
    return {
        'flops_per_image': program.flops * count / batch,
        'model_flops_per_image': expected * count / batch,
        'bytes_per_image': program.traffic * count / batch,
        'flops': program.flops, 'traffic': program.traffic, 'collectives': kinds,
    }  # fmt: skip


def remarks(program, expected):
    """Notes on what can't be read from the compiled program."""
    notes = [
        f'custom call {target} runs {times} times a step; its arithmetic is not counted, its '
        'operands and results are'
        for target, times in program.uncounted.items()
    ]
    notes += [
        f'loop {name}: its text does not tell how often it runs; counted once'
        for name, count in program.loops.items() if count is None
    ]  # fmt: skip
    if program.flops < 0.9 * expected:
        notes.append(
            f'the program has {program.flops / expected:.0%} of three forward passes of the '
            'model: frozen parts, or work that is not in its text'
        )
    return notes


def times(program, found, peaks, efficiency):
    """Seconds of a step by resource, and of its communication by kind."""
    kinds, exposed = {}, 0.0
    for c in program.collectives:
        seconds = c.times * interconnect.exchange_seconds(c, found, peaks)
        kinds[c.kind] = kinds.get(c.kind, 0.0) + seconds
        exposed += 0 if c.hidden else seconds
    bounds = {
        'compute': program.flops / peaks.flops,
        'memory': program.traffic / peaks.bandwidth,
        'interconnect': sum(kinds.values()),
    }
    bound = max(bounds, key=bounds.get)
    busy = max(bounds['compute'], bounds['memory'])
    seconds = bounds | {
        'roofline': bounds[bound], 'exposed': exposed, 'efficiency': efficiency,
        'step': max(busy / efficiency + exposed, bounds[bound]),
    }  # fmt: skip
    if program.cycles and peaks.clock:
        seconds['compiler'] = program.cycles / peaks.clock + exposed
    return {'seconds': seconds, 'bound': bound, 'exchange_seconds': kinds}


def size(count):
    """Formats bytes in a suitable unit."""
    for unit, factor in (('GiB', 2**30), ('MiB', 2**20), ('KiB', 2**10)):
        if abs(count) >= factor:
            return f'{count / factor:,.2f} {unit}'
    return f'{count:,.0f} B'


def verdict(memory):
    word = 'fits' if memory['fits'] else 'does not fit'
    return f'{word}, {size(memory["needed"])} of {size(memory["available"])}'
