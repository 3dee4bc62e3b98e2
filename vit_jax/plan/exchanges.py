"""Bytes and times of the collectives of a step, within TPU slices or GPU nodes and between them."""

from collections.abc import Sequence
from typing import Any

from vit_jax.distributed import interconnect
from vit_jax.distributed.devices import Device
from vit_jax.plan import hlo


def by_kind(
    program: hlo.Program, mesh_devices: Sequence[Any], peaks: Device
) -> dict[str, dict[str, Any]]:
    """{kind of collective: its sums over a step}, per device and without latency.

    Those between TPU slices or GPU nodes are kinds of their own, 'all-reduce between slices'.

    times    executions
    bytes    of whole arrays; of a device's share between slices
    sent     bytes that a device sends
    hidden   those of `sent` in asynchronous collectives
    seconds  at the peak of the links, or of the network
    exposed  seconds that no other work overlaps, but for those of `waiting`
    network  whether they are between slices or nodes

    `mesh_devices` are in the order of the mesh.
    """
    places = 'slices' if mesh_devices[0].platform == 'tpu' else 'nodes'
    kinds = {}
    for c in program.collectives:
        inside, between, _ = interconnect.stages(c, mesh_devices)
        seconds = interconnect.exchange_seconds(c, mesh_devices, peaks)
        for part, took, network in zip((inside, between), seconds, (False, True), strict=True):
            if part is None:
                continue
            name = f'{c.kind} between {places}' if network else c.kind
            row = kinds.setdefault(name, {
                'times': 0, 'bytes': 0, 'sent': 0.0, 'hidden': 0.0, 'seconds': 0.0, 'exposed': 0.0,
                'network': network,
            })  # fmt: skip
            row['times'] += c.times
            row['bytes'] += c.times * part.bytes
            row['sent'] += c.times * part.wire
            row['hidden'] += c.times * part.wire if c.hidden else 0
            row['seconds'] += c.times * took
            row['exposed'] += 0 if c.hidden or c.span else c.times * took
    return kinds


def waiting(program: hlo.Program, peaks: Device) -> float:
    """Seconds that a step waits for transfers between TPU slices, which share the network.

    A transfer begins and ends where the compiled program does, by the compiler's cycles of the work
    before; it takes its time at the peak of the network, and begins after those before it.
    """
    free = waited = 0.0
    for c in sorted((c for c in program.collectives if c.span), key=lambda c: c.span):
        begin, end = (cycles / peaks.clock if peaks.clock else 0.0 for cycles in c.span)
        free = max(free, begin) + c.times * c.wire / peaks.network
        waited = max(waited, free - end)
    return waited
