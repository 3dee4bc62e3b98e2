"""Collectives of a compiled program: kinds, bytes, and the devices that take part."""

import math
import re
from typing import NamedTuple

import numpy as np

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
