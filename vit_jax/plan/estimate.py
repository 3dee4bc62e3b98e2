"""Estimates memory, work, communication and time of a run from its compiled train step.

The roofline is the longest of the times of arithmetic, memory, interconnect, and network between
TPU slices or GPU nodes at their peaks. The estimate for a step is the longer of arithmetic and
memory, divided by an efficiency, plus all communication that the compiled program does not overlap
with other work. Input is not included: see benchmarks.input.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vit_jax import assembly, sharding, step
from vit_jax.data import sources
from vit_jax.distributed import devices
from vit_jax.plan import exchanges, hlo
from vit_jax.run import heading


class Refused(Exception):
    """The compiler reports that the program, or its temporaries, do not fit; sizes in bytes."""

    def __init__(self, needed: float, available: float) -> None:
        self.needed, self.available = needed, available
        super().__init__(f'{needed} bytes, {available} available')


def without_evals(config: ConfigDict) -> ConfigDict:
    """A copy of a config without evaluations, which do not affect the train step."""
    plain = ConfigDict(config.to_dict())
    plain.evals = ConfigDict()
    plain.checkpoint.best = None
    return plain


def batch_of(config: ConfigDict, parts: assembly.Parts) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch as the training loop puts it on the devices."""
    size = config.data.batch_size
    arrays = {name: (x.shape, x.dtype) for name, x in parts.spec.items()}
    arrays |= {'mask': ((), jnp.float32), 'id': ((), jnp.int32)}
    return {
        name: jax.ShapeDtypeStruct((size, *shape), dtype) for name, (shape, dtype) in arrays.items()
    }


def compiled(config: ConfigDict, parts: assembly.Parts) -> jax.stages.Compiled:
    """Compiles the train step of a run for the devices of its mesh; raises Refused."""
    advance = step.compiled(
        parts.objective, parts.tx, parts.abstract, parts.mesh, seed=config.seed,
        accumulate=config.accumulate, precision=config.model.get('precision'),
    )  # fmt: skip
    shardings = sharding.by_name(parts.objective.frozen, parts.mesh, parts.objective.rules)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), parts.objective.frozen
    )
    frozen = sharding.add_shardings(shapes, shardings)
    return compile_or_refuse(
        advance.lower(parts.abstract, batch_of(config, parts), frozen)
    )


def compile_or_refuse(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles `lowered`; raises Refused if the TPU compiler reports that it does not fit."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        match = re.search(r'temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)', str(e))
        match = match or re.search(r'Used ([\d.]+\w) of ([\d.]+\w) hbm', str(e))
        if 'RESOURCE_EXHAUSTED' not in str(e) or not match:
            raise
        raise Refused(*map(parse_bytes, match.groups())) from e


def parse_bytes(text: str) -> float:
    """Bytes of a size such as '30.75G'."""
    return float(text[:-1]) * 2 ** {'K': 10, 'M': 20, 'G': 30, 'T': 40}[text[-1]]


def bytes_per_device(tree: Any) -> int:
    """Bytes that each device holds of a tree of sharded arrays or shapes."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def plan(
    config: ConfigDict,
    source: sources.Source,
    target_devices: Sequence[Any],
    title: str,
    *,
    efficiency: float,
    peaks: devices.Device | None = None,
) -> dict[str, Any]:
    """Plans a run: a dict of its size, memory, work and time.

    Work and time are missing if the compiler refuses the program because it does not fit.

    Args:
      config: config of the run.
      source: its data set, or a stand-in of its size.
      target_devices: devices, of this machine or described by a topology, to compile for.
      title: name of these devices.
      efficiency: share of the peaks of arithmetic and memory that a step reaches.
      peaks: peaks of a device. None: those of `target_devices`.
    """
    peaks = peaks or devices.peaks(target_devices)
    parts = assembly.make(without_evals(config), source, target_devices)
    result = summary(config, parts, target_devices, title, peaks)
    memory = result['memory']
    try:
        executable = compiled(config, parts)
    except Refused as e:
        memory |= {'available': e.available, 'needed': max(e.needed, memory['state']),
                   'activations': e.needed, 'fits': False}  # fmt: skip
        return result
    memory |= memory_use(executable, memory['state'])
    memory['fits'] = memory['needed'] <= memory['available']
    count, batch = len(target_devices), config.data.batch_size
    program = hlo.read(executable.as_text())
    forward = parts.objective.flops
    expected = program.flops if forward is None else 3 * forward * batch / count
    result |= work(program, count, batch, expected)
    result['notes'] += remarks(program, expected)
    result['collectives'] = exchanges.by_kind(program, list(parts.mesh.devices.flat), peaks)
    result |= times(program, result['collectives'], peaks, efficiency)
    rate = batch / result['seconds']['step']
    days = parts.steps * result['seconds']['step'] / 86_400
    result |= {'images_per_second': rate, 'days': days, 'core_days': days * count * peaks.cores}
    return result


def summary(
    config: ConfigDict, parts: assembly.Parts, target_devices: Sequence[Any], title: str,
    peaks: devices.Device,
) -> dict[str, Any]:  # fmt: skip
    """The part of a plan that is known before the step is compiled."""
    batch, image = config.data.batch_size, parts.spec.get('image')
    return {
        'config': {'model': heading.model_name(config),
                   'image_size': None if image is None else list(image.shape[:2]),
                   'batch_size': batch, 'accumulate': config.accumulate,
                   'dtype': config.model.get('dtype'),
                   'matmul_dtype': config.model.get('matmul_dtype'),
                   'remat': config.model.get('remat'),
                   'optimizer': config.optim.name},
        'topology': title, 'devices': len(target_devices), 'kind': target_devices[0].device_kind,
        'mesh': dict(parts.mesh.shape), 'peaks': peaks._asdict(),
        'parameters': sum(count for _, _, count, *_ in parts.tx.table),
        'forward_flops': parts.objective.flops,
        'steps': parts.steps, 'images': parts.steps * batch, 'notes': [],
        'memory': {'parameters': bytes_per_device(parts.abstract.params),
                   'state': bytes_per_device(parts.abstract), 'available': peaks.usable},
    }  # fmt: skip


def memory_use(executable: jax.stages.Compiled, state: int) -> dict[str, int]:
    """Bytes per device of a compiled step's inputs beside the state, temporaries, code, and all."""
    stats = executable.memory_analysis()
    code = stats.generated_code_size_in_bytes
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return {
        'batch': stats.argument_size_in_bytes - state,
        'activations': stats.temp_size_in_bytes,
        'code': code,
        'needed': stats.argument_size_in_bytes + stats.temp_size_in_bytes + code + outputs,
    }


def work(program: hlo.Program, count: int, batch: int, expected: float) -> dict[str, Any]:
    """Work of a step per image and per device.

    `count` is the number of devices, `expected` the FLOPs of the model per device.
    """
    return {
        'flops_per_image': program.flops * count / batch,
        'model_flops_per_image': expected * count / batch,
        'bytes_per_image': program.traffic * count / batch,
        'flops': program.flops, 'traffic': program.traffic,
    }  # fmt: skip


def remarks(program: hlo.Program, expected: float) -> list[str]:
    """Notes on work that the text of the compiled program does not tell."""
    notes = [
        f'custom call {target} runs {times} times per step; its FLOPs are unknown and not counted, '
        'its operands and results are'
        for target, times in program.uncounted.items()
    ]
    notes += [
        f'loop {name} has an unknown number of iterations; it is counted once'
        for name, count in program.loops.items() if count is None
    ]  # fmt: skip
    if program.flops < 0.9 * expected:
        notes.append(
            f'the program has {program.flops / expected:.0%} of the FLOPs of three forward passes '
            'of the model: some parameters are frozen, some tokens of the last block are not read, '
            'or its text does not show all work'
        )
    return notes


def times(
    program: hlo.Program, collectives: dict[str, dict[str, Any]], peaks: devices.Device,
    efficiency: float,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of a step by resource; `collectives` are those of `exchanges.by_kind`."""
    taken, exposed = (
        {network: sum(row[key] for row in collectives.values() if row['network'] is network)
         for network in (False, True)}
        for key in ('seconds', 'exposed')
    )  # fmt: skip
    exposed[True] += exchanges.waiting(program, peaks)
    bounds = {
        'compute': program.flops / peaks.flops,
        'memory': program.traffic / peaks.bandwidth,
        'interconnect': taken[False],
        'network': taken[True],
    }
    bound = max(bounds, key=bounds.get)
    busy, total = max(bounds['compute'], bounds['memory']), sum(exposed.values())
    seconds = bounds | {
        'roofline': bounds[bound], 'exposed': total, 'exposed_network': exposed[True],
        'efficiency': efficiency, 'step': max(busy / efficiency + total, bounds[bound]),
    }  # fmt: skip
    if program.cycles and peaks.clock:
        seconds['compiler'] = program.cycles / peaks.clock + total
    return {'seconds': seconds, 'bound': bound}


def size(count: float) -> str:
    """Formats bytes in a suitable unit."""
    for unit, factor in (('GiB', 2**30), ('MiB', 2**20), ('KiB', 2**10)):
        if abs(count) >= factor:
            return f'{count / factor:,.2f} {unit}'
    return f'{count:,.0f} B'


def verdict(memory: dict[str, Any]) -> str:
    """Whether a run fits, with the bytes that a device needs and has, from the plan's `memory`."""
    word = 'fits' if memory['fits'] else 'does not fit'
    return f'{word}, {size(memory["needed"])} of {size(memory["available"])}'
