"""Devices: peaks of each kind, with sources, and topologies of TPUs to compile for without them.

A device is what JAX counts as one: a TPU chip, half of one on TPU v2, v3 and 7x, or a GPU.
"""

import math
import os
import re
import time
from typing import NamedTuple

from vit_jax.errors import UserError

GB, GIB = 1e9, 2**30


class Device(NamedTuple):
    """Peaks of one device, in bytes and bytes/s."""

    kind: str  # device_kind in JAX
    flops: float  # FLOP/s in bfloat16
    memory: float
    usable: float  # part of `memory` that a program can use
    bandwidth: float  # of the memory
    link: float  # of one link of the interconnect, one way
    network: float  # a device's share of the network between slices or nodes, one way
    cores: int = 1  # TensorCores
    clock: float | None = None  # of the TensorCore in Hz; None: unknown


class Chip(NamedTuple):
    """A TPU chip and the slices that exist of it."""

    kind: str
    devices: int  # number of JAX devices per chip
    cores: int
    tflops: float
    units: int | None  # number of 128 x 128 multipliers, from which the clock follows
    memory: float  # GiB
    usable: float  # GiB per device, from libtpu 0.0.52's message when a program does not fit
    bandwidth: float  # GB/s
    link: float  # GB/s per link, one way: the sources' all-reduce bandwidth of a chip
    network: float  # Gbit/s of the data centre network
    torus: int  # an axis of this many chips (of a multiple, with three axes) wraps into a ring
    pod: int  # chips
    shapes: tuple[str, ...]


CUBES = (
    '2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16',
    '16x16x16',
)  # fmt: skip
SQUARES = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
# Sources: cloud.google.com/tpu/docs/ v2, v3, v4, v5e, v5p, v6e and tpu7x: peak compute, multipliers
# (MXUs), memory, pods, shapes, torus, network; for links the interconnect per chip of v5p and 7x
# (1,200 GB/s in both directions over six links) and the all-reduce bandwidth per pod of v5e and
# v6e. Links of v2 and v3: Jouppi et al., "A domain-specific supercomputer for training deep neural
# networks", CACM 63 (7), 2020 (496 and 656 Gbit/s); of v4: arXiv:2304.01433 table 4. The network of
# v2, v3 and v4 is not documented; the value of v5p is used.
CHIPS = {
    'v2': Chip('TPU v2', 2, 2, 46, 2, 16, 7.48, 700, 62, 50, 16, 256,
               ('2x2', '4x4', '4x8', '8x8', '8x16', '16x16')),
    'v3': Chip('TPU v3', 2, 2, 123, 4, 32, 15.48, 900, 82, 50, 32, 1024,
               ('2x2', '4x4', '4x8', '8x8', '8x16', '16x16', '16x32', '32x32')),
    'v4': Chip('TPU v4', 1, 2, 275, 8, 32, 30.75, 1200, 50, 50, 4, 4096, CUBES),
    'v5e': Chip('TPU v5 lite', 1, 1, 197, 4, 16, 15.75, 819, 50, 25, 16, 256, SQUARES),
    'v5p': Chip('TPU v5', 1, 2, 459, 8, 95, 95.73, 2765, 100, 50, 4, 8960,
                (*CUBES, '16x16x24')),
    'v6e': Chip('TPU v6 lite', 1, 1, 918, None, 32, 31.24, 1638, 100, 100, 16, 256, SQUARES),
    'tpu7x': Chip('TPU7x', 2, 2, 2307, None, 192, 94.74, 7380, 100, 100, 4, 9216,
                  (*CUBES, '16x16x32')),
}  # fmt: skip
ALIASES = {'7x': 'tpu7x', 'ironwood': 'tpu7x', 'v5litepod': 'v5e', 'v7x': 'tpu7x'}
NODE = 8  # GPUs on one NVLink switch
# Sources: NVIDIA's data sheets of the A100, H100 and H200 (SXM; bfloat16 without sparsity; NVLink's
# total is for both directions) and user guides of DGX A100, H100 and H200 (200 and 400 Gbit/s per
# GPU). JAX allocates three quarters of the memory unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
GPUS = {
    kind: Device(
        kind, tflops * 1e12, memory * GB, 0.75 * memory * GB, bandwidth * GB, nvlink / 2 * GB,
        network / 8 * GB,
    )
    for kind, tflops, memory, bandwidth, nvlink, network in (
        ('NVIDIA A100-SXM4-40GB', 312, 40, 1555, 600, 200),
        ('NVIDIA A100-SXM4-80GB', 312, 80, 2039, 600, 200),
        ('NVIDIA H100 80GB HBM3', 989, 80, 3350, 900, 400),
        ('NVIDIA H200', 989, 141, 4800, 900, 400),
    )
}  # fmt: skip


def of_chip(chip):
    """The Device of a chip, or of each half that JAX counts as a device."""
    n = chip.devices
    clock = chip.units and chip.tflops * 1e12 / (chip.units * 2 * 128 * 128)
    return Device(
        chip.kind, chip.tflops * 1e12 / n, chip.memory / n * GIB, chip.usable * GIB,
        chip.bandwidth / n * GB, chip.link / n * GB, chip.network / n / 8 * GB, chip.cores // n,
        clock,
    )  # fmt: skip


DEVICES = {chip.kind: of_chip(chip) for chip in CHIPS.values()} | GPUS
DEVICES['TPU v5p'] = DEVICES['TPU v5']


def peaks(devices):
    """The Device for JAX devices; a CPU is measured. Raises UserError for an unknown kind."""
    kind = devices[0].device_kind
    if kind in DEVICES:
        return DEVICES[kind]
    if devices[0].platform == 'cpu':
        return measured(len(devices))
    raise UserError(f'no peaks are known of a {kind}, but of {", ".join(DEVICES)}')


def measured(count, seconds=0.3):
    """Measures this machine's CPU by float32 products and copies; its share as one of `count`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    cpu = jax.local_devices(backend='cpu')[0]
    a = jax.device_put(np.ones((1024, 1024), np.float32), cpu)
    b = np.ones(2**24, np.float32)
    out = np.empty_like(b)
    product = jax.jit(jnp.dot)

    def fastest(work):
        work()
        best, end = math.inf, time.perf_counter() + seconds
        while time.perf_counter() < end:
            begin = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - begin)
        return best

    flops = 2 * 1024**3 / fastest(lambda: product(a, a).block_until_ready())
    copied = 2 * b.nbytes / fastest(lambda: np.copyto(out, b))
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    share = copied / count
    return Device(cpu.device_kind, flops / count, memory / count, memory / count, share, share,
                  share)  # fmt: skip


def topology(name, chips=None, slices=1):
    """(JAX devices, their name) for 'v4:4x4x8', 'v4' with a number of chips, or 'cpu:8'.

    TPU devices can only be compiled for; the compiler is part of libtpu.
    """
    kind, _, shape = name.partition(':')
    kind = ALIASES.get(kind, kind)
    if kind == 'cpu':
        return simulated(shape or chips or 1)
    if kind not in CHIPS:
        raise UserError(
            f'no topology {name!r}; there are {", ".join(CHIPS)}, as in v4:4x4x8 or v4 with '
            '--chips=128, and cpu:N'
        )
    chip = CHIPS[kind]
    shape = shape_of(kind, shape, chips)
    names = '' if slices == 1 else f'{slices} slices of '
    return tpus(kind, chip, shape, slices), f'{names}{kind}:{shape}'


def shape_of(kind, shape, chips):
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
        raise UserError(f'{kind}:{shape} is no shape; one of {kind} is {chip.shapes[-1]}')
    count = math.prod(map(int, sides))
    if chips not in (None, count):
        raise UserError(f'{kind}:{shape} has {count} chips, not --chips={chips}')
    if count > chip.pod:
        raise UserError(f'{kind}:{shape} has {count} chips; a pod of {kind} has {chip.pod}')
    return shape


def simulated(count):
    """Simulated devices of this machine's CPU; JAX must not have been initialized before."""
    import jax

    try:
        count = int(count)
        assert count > 0
    except (ValueError, AssertionError):
        raise UserError(f'cpu:{count} has no number of devices, as cpu:8 has') from None
    try:
        jax.config.update('jax_num_cpu_devices', count)
    except RuntimeError:  # JAX is initialized already, with some number
        pass
    found = jax.devices('cpu')
    if len(found) < count:
        raise UserError(f'{count} simulated devices were asked for, {len(found)} are there')
    return found[:count], f'cpu:{count}'


def tpus(kind, chip, shape, slices):
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


def speed(coords, bounds, device):
    """Bytes/s that each chip of a group, at coordinates [x, y, z], sends to the others.

    Sums over rings along all axes of the slice in which the group extends, used at the same time. A
    wrapped axis has two links per chip, another one a single link at its narrowest point.
    Interleaved groups share links.
    """
    total = 0.0
    for axis, bound in enumerate(bounds):
        places = sorted({c[axis] for c in coords})
        if len(places) == 1:
            continue
        span = places[-1] - places[0] + 1
        shared = -(-span // len(places))
        ring = wrapped(device, bounds, axis) and len(places) * shared >= bound
        total += (2 if ring else 1) * device.link / shared
    return total or device.bandwidth  # the two halves of a chip exchange through its memory


def wrapped(device, bounds, axis):
    """Whether the ends of an axis of a slice are connected."""
    chip = next((c for c in CHIPS.values() if c.kind == device.kind), None)
    if chip is None or bounds[axis] < 3:
        return False
    if len(chip.shapes[0].split('x')) == 3:
        return all(b % chip.torus == 0 for b in bounds)
    return bounds[axis] >= chip.torus


def exchange_seconds(collective, devices, device):
    """Time of one collective at the peak of its links, without latency.

    Between TPU slices or GPU nodes, each device exchanges its share of the sums or pieces over the
    network, with exchanges within the slice or node before and after.
    """
    members = [devices[i] for i in collective.members] or list(devices)
    homes = {}
    for place, member in zip(collective.members or range(len(members)), members, strict=True):
        homes.setdefault(home(member, place), []).append(member)
    within = min(len(group) for group in homes.values())
    seconds = 0.0
    if within > 1 or len(homes) == 1:
        inside = collective._replace(group=max(within, 1))
        seconds += inside.wire / inner_speed(next(iter(homes.values())), devices, device)
        if collective.kind == 'all-to-all' and members[0].platform == 'tpu':
            sides = [len({m.coords[k] for m in members}) for k in range(3)]
            seconds *= max(1, max(sides) / 4)  # mean number of hops: a quarter of a ring
    if len(homes) > 1:
        between = collective._replace(group=len(homes), bytes=collective.bytes / within)
        seconds += between.wire / device.network
    return seconds


def home(device, place):
    """Index of the TPU slice or GPU node that a device is in."""
    if device.platform == 'tpu':
        return getattr(device, 'slice_index', None) or 0
    return place // NODE if device.platform in ('gpu', 'cuda', 'rocm') else 0


def inner_speed(members, devices, device):
    if members[0].platform != 'tpu':
        return device.link
    bounds = [1 + max(d.coords[k] for d in devices) for k in range(3)]
    return speed([m.coords for m in members], bounds, device)
