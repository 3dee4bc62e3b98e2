"""Peaks of each kind of device, with sources.

A device is what JAX counts as one: a TPU chip, half of one on TPU v2, v3 and 7x, or a GPU.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


def device_of(chip: Chip) -> Device:
    """The Device of a chip, or of each half that JAX counts as a device."""
    n = chip.devices
    clock = chip.units and chip.tflops * 1e12 / (chip.units * 2 * 128 * 128)
    return Device(
        chip.kind, chip.tflops * 1e12 / n, chip.memory / n * GIB, chip.usable * GIB,
        chip.bandwidth / n * GB, chip.link / n * GB, chip.network / n / 8 * GB, chip.cores // n,
        clock,
    )  # fmt: skip


DEVICES = {chip.kind: device_of(chip) for chip in CHIPS.values()} | GPUS
DEVICES['TPU v5p'] = DEVICES['TPU v5']


def peaks(devices: Sequence[Any]) -> Device:
    """Peaks of one of several equal JAX devices; a CPU is measured.

    Raises UserError for an unknown kind.
    """
    kind = devices[0].device_kind
    if kind in DEVICES:
        return DEVICES[kind]
    if devices[0].platform == 'cpu':
        return measure_cpu(len(devices))
    raise UserError(f'peaks of a {kind} are unknown; those of {", ".join(DEVICES)} are known')


def measure_cpu(count: int, seconds: float = 0.3) -> Device:
    """Measures this machine's CPU by float32 products and copies, and divides it into `count`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    cpu = jax.local_devices(backend='cpu')[0]
    a = jax.device_put(np.ones((1024, 1024), np.float32), cpu)
    b = np.ones(2**24, np.float32)
    out = np.empty_like(b)
    product = jax.jit(jnp.dot)

    def fastest(work: Callable[[], Any]) -> float:
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
