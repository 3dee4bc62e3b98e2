"""Collectives of a compiled program: kinds, bytes, and the devices that take part."""

import math
import re
from typing import NamedTuple

import numpy as np

from vit_jax.plan.hlo_text import Instruction

COLLECTIVES = (
    'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
    'collective-permute', 'collective-broadcast',
)  # fmt: skip


class Collective(NamedTuple):
    """A collective operation of a step."""

    kind: str
    bytes: int  # each time, of the whole array: an all-gather's result, a reduce-scatter's input
    shapes: tuple[tuple[int, ...], ...]  # of the result
    group: int  # number of participating devices
    members: tuple[int, ...]  # of the first group, as positions in the mesh; (): unknown
    times: int  # executions per step
    loops: int  # number of loops around it
    hidden: bool  # asynchronous, with other work between start and end
    name: str  # the part of the model, as the names of traced functions
    network: bool = False  # from host to host between TPU slices; `group` is their number
    span: tuple[int, int] | None = None  # cycles of the step before its start and before its end

    @property
    def wire(self) -> float:
        """Bytes that a device sends each time, if all links carry an equal share."""
        share = (self.group - 1) / self.group
        factor = {'all-reduce': 2 * share, 'collective-permute': 1, 'collective-broadcast': 1}
        return self.bytes * factor.get(self.kind, share)


def groups(attributes: str, partitions: int) -> tuple[int, tuple[int, ...]]:
    """(number of devices in a group, members of the first group) of a collective."""
    if match := re.search(r'replica_groups=\{\{([\d,]*)\}', attributes):
        members = tuple(int(x) for x in match[1].split(',') if x)
    elif match := re.search(
        r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes
    ):
        shape, dims, order = (
            [int(x) for x in part.split(',')] if part else None for part in match.groups()
        )
        ids = np.arange(math.prod(dims)).reshape(dims)
        members = tuple(ids.transpose(order).reshape(shape)[0].tolist())
    elif match := re.search(r'replica_groups=mesh\[([^]]*)\][^{]*\{([^}]*)\}', attributes):
        return mesh_groups(*match.groups())
    elif match := re.search(r'source_target_pairs=\{\{(\d+),(\d+)\}', attributes):
        return 2, (int(match[1]), int(match[2]))
    else:
        members = ()
    members = members or tuple(range(partitions))
    return len(members), members


def mesh_groups(axes: str, along: str) -> tuple[int, tuple[int, ...]]:
    """`groups` along axes of a mesh: "'x'=2,'y'=4" and "'y'", or "'y':(1)2" for a part of y."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    split, keep = [], []
    chosen = {n: (p, s) for n, p, s in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along)}
    for name, size in sizes.items():
        if name not in chosen:
            split.append(size)
            continue
        before, part = chosen[name]
        before, part = (int(before), int(part)) if part else (1, size)
        keep.append(len(split) + 1)
        split += [before, part, size // before // part]
    ids = ids.reshape(split)
    ids = np.moveaxis(ids, keep, range(len(keep)))
    members = ids.reshape(math.prod(ids.shape[: len(keep)]), -1)[:, 0]
    return len(members), tuple(members.tolist())


def transfer(i: Instruction, times: int, loops: int, cycles: int) -> tuple[str, Collective] | None:
    """(name of the transfer, a collective between TPU slices) that a `send` begins; else None.

    The TPU compiler divides a collective across slices: into collectives within each, and a send to
    the host and a receive of the result, of each device's share. The hosts exchange it, by
    libtpu's Megascale.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
    if i.opcode != 'send' or not kind:
        return None
    slices = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', i.attributes)[1]
    ends = [part.partition(':') for part in slices.split(',')]
    size = sum(int(last or first) - int(first) + 1 for first, _, last in ends)
    share, title = i.shapes[0], re.search(r'op_name="([^"]*)"', i.attributes)
    return rendezvous(i), Collective(
        kind[1].lower().replace('_', '-'), share.bytes, (share.dims,), size, (), times, loops,
        False, title[1] if title else '', True, (cycles, cycles),
    )  # fmt: skip


def rendezvous(i: Instruction) -> str:
    """The name that a send to another TPU slice and its receive have in common."""
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', i.attributes)
    return found[1] if found else ''
