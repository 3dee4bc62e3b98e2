"""Devices to compile for: TPU slices that need not exist here, and simulated CPU devices."""

import math
import os
import re
from typing import Any

from vit_jax.distributed.devices import CHIPS, Chip
from vit_jax.errors import UserError

ALIASES = {'7x': 'tpu7x', 'ironwood': 'tpu7x', 'v5litepod': 'v5e', 'v7x': 'tpu7x'}


def get_devices(name: str, chips: int | None = None, slices: int = 1) -> tuple[list[Any], str]:
    """(JAX devices, their name) for 'v4:4x4x8', 'v4' with a number of chips, or 'cpu:8'.

    TPU devices can only be compiled for; the compiler is part of libtpu. Raises UserError if no
    such topology exists.
    """
    kind, _, shape = name.partition(':')
    kind = ALIASES.get(kind, kind)
    if kind == 'cpu':
        return cpu_devices(shape or chips or 1)
    if kind not in CHIPS:
        raise UserError(
            f'no topology {name!r}; there are {", ".join(CHIPS)}, as in v4:4x4x8 or v4 with '
            '--chips=128, and cpu:N'
        )
    chip = CHIPS[kind]
    shape = slice_shape(kind, shape, chips)
    count = '' if slices == 1 else f'{slices} slices of '
    return tpu_devices(kind, chip, shape, slices), f'{count}{kind}:{shape}'


def slice_shape(kind: str, shape: str, chips: int | None) -> str:
    """The shape of a slice from its name or its number of chips; raises UserError if none fits."""
    chip = CHIPS[kind]
    counts = {math.prod(map(int, s.split('x'))): s for s in chip.shapes}
    if not shape:
        if chips not in counts:
            raise UserError(
                f'a slice of {kind} has no {chips} chips, but ' + ', '.join(map(str, counts))
                if chips else f'topology {kind} needs a shape, as {kind}:{chip.shapes[-1]}, or '
                '--chips'
            )  # fmt: skip
        return counts[chips]
    sides = shape.split('x')
    if not re.fullmatch(r'\d+(x\d+)*', shape) or len(sides) > len(chip.shapes[0].split('x')):
        raise UserError(f'{kind}:{shape} is not a shape of {kind}; one is {chip.shapes[-1]}')
    count = math.prod(map(int, sides))
    if chips not in (None, count):
        raise UserError(f'{kind}:{shape} has {count} chips, not --chips={chips}')
    if count > chip.pod:
        raise UserError(f'{kind}:{shape} has {count} chips; a pod of {kind} has {chip.pod}')
    return shape


def cpu_devices(count: str | int) -> tuple[list[Any], str]:
    """(simulated devices of this machine's CPU, their name).

    JAX must not have been initialized, or with as many devices. Raises UserError.
    """
    import jax

    if not re.fullmatch('0*[1-9][0-9]{,8}', str(count)):
        raise UserError(f'cpu:{count} has no number of devices, as cpu:8 has')
    count = int(count)
    try:
        jax.config.update('jax_num_cpu_devices', count)
    except RuntimeError:  # JAX is initialized already, with some number
        pass
    found = jax.devices('cpu')
    if len(found) < count:
        raise UserError(f'JAX was initialized with {len(found)} CPU devices, not {count}')
    return found[:count], f'cpu:{count}'


def tpu_devices(kind: str, chip: Chip, shape: str, slices: int) -> list[Any]:
    """Devices of a TPU slice to compile for; raises UserError if no such slice exists."""
    from jax.experimental import topologies

    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # ask no metadata server
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # plans may run side by side
    for key, value in (('TPU_WORKER_HOSTNAMES', 'localhost'), ('TPU_ACCELERATOR_TYPE', 'v4-8'),
                       ('TPU_WORKER_ID', '0')):  # fmt: skip
        os.environ.setdefault(key, value)  # else libtpu warns that they are missing
    options = {'num_slices': slices} if slices > 1 else {}
    sides = [int(s) for s in shape.split('x')]
    if math.prod(sides) < 4:  # part of a host
        options['chips_per_host_bounds'] = (sides + [1, 1])[:3]
    if kind == 'v4':  # both cores as one device, as in JAX on a v4
        options['chip_config_name'] = 'megacore'
    try:
        return topologies.get_topology_desc(
            platform='tpu', topology_name=f'{kind}:{shape}', **options
        ).devices
    except Exception as e:  # from libtpu, or from JAX if libtpu is not installed
        text = str(e)
        if 'libtpu' in text.lower() and 'topology' not in text.lower():
            raise UserError(
                'the TPU compiler is not installed; pip install "vit_jax[plan]"'
            ) from e
        shapes = ', '.join(chip.shapes)
        raise UserError(f'no slice {kind}:{shape}; there are {shapes} ({text[:120]})') from e
