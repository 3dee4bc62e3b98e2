"""Times of collectives on the links between devices of a TPU slice or GPU node, and beyond."""

from collections.abc import Sequence
from typing import Any

from vit_jax.distributed.devices import CHIPS, Device

GPUS_PER_NODE = 8  # on one NVLink switch


def slice_bandwidth(
    coords: Sequence[Sequence[int]], bounds: Sequence[int], device: Device
) -> float:
    """Bytes/s that each chip of a group sends to the others of its TPU slice.

    Sums over rings along all axes in which the group extends, used at the same time. A wrapped axis
    has two links per chip, another one a single link at its narrowest point. Interleaved groups
    share links.

    Args:
      coords: [x, y, z] of each chip of the group.
      bounds: number of chips of the slice along each axis.
      device: peaks of the chips.
    """
    total = 0.0
    for axis, bound in enumerate(bounds):
        places = sorted({c[axis] for c in coords})
        if len(places) == 1:
            continue
        span = places[-1] - places[0] + 1
        shared = -(-span // len(places))
        ring = is_wrapped(device, bounds, axis) and len(places) * shared >= bound
        total += (2 if ring else 1) * device.link / shared
    return total or device.bandwidth  # the two halves of a chip exchange through its memory


def is_wrapped(device: Device, bounds: Sequence[int], axis: int) -> bool:
    """Whether the ends of an axis of a slice are connected."""
    chip = next((c for c in CHIPS.values() if c.kind == device.kind), None)
    if chip is None or bounds[axis] < 3:
        return False
    if len(chip.shapes[0].split('x')) == 3:
        return all(b % chip.torus == 0 for b in bounds)
    return bounds[axis] >= chip.torus


def stages(collective: Any, devices: Sequence[Any]) -> tuple[Any | None, Any | None, list[Any]]:
    """What a device takes part in: (within its TPU slice or GPU node, between these, its members).

    Between slices or nodes each device exchanges its share of the sums or pieces over the network,
    with exchanges within the slice or node before and after. A stage is a collective of fewer
    devices and bytes, or None. The members are those of one slice or node.

    Args:
      collective: plan.hlo.Collective.
      devices: all JAX devices of the program.
    """
    if collective.network:
        return None, collective, []
    members = [devices[i] for i in collective.members] or list(devices)
    groups = {}  # {slice or node: members in it}
    for place, member in zip(collective.members or range(len(members)), members, strict=True):
        groups.setdefault(group_index(member, place), []).append(member)
    within = min(len(group) for group in groups.values())
    inside = between = None
    if within > 1 or len(groups) == 1:
        inside = collective._replace(group=max(within, 1))
    if len(groups) > 1:
        between = collective._replace(group=len(groups), bytes=collective.bytes / within)
    return inside, between, next(iter(groups.values()))


def exchange_seconds(
    collective: Any, devices: Sequence[Any], device: Device
) -> tuple[float, float]:
    """Seconds of one collective, without latency: (at the peak of its links, of the network).

    `device` has the peaks of one of the devices; other arguments are those of `stages`.
    """
    inside, between, members = stages(collective, devices)
    links = 0.0
    if inside is not None:
        links = inside.wire / inner_bandwidth(members, devices, device)
        if collective.kind == 'all-to-all' and members[0].platform == 'tpu':
            sides = [len({m.coords[k] for m in members}) for k in range(3)]
            links *= max(1, max(sides) / 4)  # mean number of hops: a quarter of a ring
    return links, 0.0 if between is None else between.wire / device.network


def group_index(device: Any, place: int) -> int:
    """Index of the TPU slice or GPU node with a JAX device, the `place`-th of the program."""
    if device.platform == 'tpu':
        return getattr(device, 'slice_index', None) or 0
    return place // GPUS_PER_NODE if device.platform in ('gpu', 'cuda', 'rocm') else 0


def inner_bandwidth(members: Sequence[Any], devices: Sequence[Any], device: Device) -> float:
    """Bytes/s that each of some devices in one slice or node sends to the others."""
    if members[0].platform != 'tpu':
        return device.link
    bounds = [1 + max(d.coords[k] for d in devices) for k in range(3)]
    return slice_bandwidth([m.coords for m in members], bounds, device)
