"""Counts FLOPs, memory traffic and collectives of a compiled program, from its text.

XLA's own cost analysis counts the body of a loop once, and the encoder may be a loop. Here
everything counts as often as it runs. All numbers are per device.
"""

import json
import math
import re
from typing import NamedTuple

import numpy as np

from vit_jax.plan.hlo_text import bits, constant, parsed, root

COLLECTIVES = (
    'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
    'collective-permute', 'collective-broadcast',
)  # fmt: skip
# Instructions that move no data, or whose parts are counted elsewhere.
FREE = (
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'while',
    'conditional', 'call', 'partition-id', 'replica-id', 'opt-barrier', 'copy-done', 'slice-done',
    'async-done', 'async-update', 'domain', 'add-dependency',
)  # fmt: skip
# Custom calls of the compiler itself, without arithmetic.
PLUMBING = (
    'AllocateBuffer', 'ConcatBitcast', 'AsyncCollectiveStart', 'AsyncCollectiveDone', 'Sharding',
    'GatherScatterIndicesBitpacked', 'SPMDFullToShardShape', 'SPMDShardToFullShape',
    'AssumeGatherIndicesInBound', 'MoveToHost', 'MoveToDevice', 'annotate_device_placement',
    'LayoutConstraint', 'BarrierStart', 'SliceStart', 'SliceDone',
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
    def wire(self):
        """Bytes that a device sends each time, if all links carry an equal share."""
        share = (self.group - 1) / self.group
        factor = {'all-reduce': 2 * share, 'collective-permute': 1, 'collective-broadcast': 1}
        return self.bytes * factor.get(self.kind, share)


class Program(NamedTuple):
    """Work of one device in one execution of a program."""

    flops: int  # of dots and convolutions, 2 per multiply-add
    traffic: int  # bytes read from and written to main memory
    collectives: tuple[Collective, ...]
    cycles: int | None  # the TPU compiler's estimate for its fusions, run in sequence
    loops: dict[str, int | None]  # iterations by the loop's name; None is counted as 1
    uncounted: dict[str, int]  # executions of custom calls whose arithmetic is unknown


def trips(loop, computation, computations):
    """Number of iterations of a while loop; None if its text does not tell."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = computations[loop.attribute('condition')]
    test = root(condition)
    direction = test.attribute('direction')
    if test.opcode == 'fusion':
        direction = root(computations[test.attribute('calls')]).attribute('direction')
    init = computation[loop.operands[0]]
    if direction != 'LT' or len(test.operands) != 2 or init.opcode != 'tuple':
        return None
    index, limits = None, []
    for name in test.operands:
        operand = condition.get(name)
        place = None
        if operand and operand.opcode == 'get-tuple-element':
            place = int(operand.attribute('index'))
        value = constant(condition, name)
        if value is None and place is not None and index is not None:
            value = constant(computation, init.operands[place])
        if value is not None:
            limits.append(value)
        elif place is not None:
            index = place
    if index is None or len(limits) != 1:
        return None
    first = constant(computation, init.operands[index])
    body = computations[loop.attribute('body')]
    after = body.get(root(body).operands[index]) if root(body).opcode == 'tuple' else None
    step = 1
    if after and after.opcode == 'add':
        step = next((c for c in (constant(body, o) for o in after.operands) if c), 1)
    return max(0, -(-(limits[0] - (first or 0)) // step))


class Reader:
    """Walks a program from its entry computation and sums up its work."""

    def __init__(self, text):
        self.computations, entry = parsed(text)
        self.partitions = re.search(r'num_partitions=(\d+)', text[:100_000])
        self.partitions = int(self.partitions[1]) if self.partitions else 1
        self.flops = self.traffic = 0
        self.cycles = None
        self.loops, self.uncounted, self.collectives, self.begun = {}, {}, [], {}
        self.walk(entry, 1, 0)
        self.collectives += [c for c, _ in self.begun.values()]

    def walk(self, name, times, depth, fused=False, hidden=False):
        computation = self.computations[name]
        for i in computation.values():
            if i.opcode == 'while':
                count = trips(i, computation, self.computations)
                self.loops[i.name] = count
                count = 1 if count is None else count
                self.walk(i.attribute('body'), times * count, depth + 1)
                continue
            self.count(i, computation, times, depth, fused, name, hidden)
            called = i.attribute('calls') or (i.opcode == 'call' and i.attribute('to_apply'))
            if called and i.opcode in ('fusion', 'call', 'async-start', 'custom-call'):
                apart = hidden or i.opcode == 'async-start'
                self.walk(called, times, depth, fused or i.opcode == 'fusion', apart)
            branches = i.attribute('branch_computations') or ''
            for branch in re.findall(r'%([\w.-]+)', branches):
                self.walk(branch, times, depth)

    def count(self, i, computation, times, depth, fused, name, hidden):
        """Adds the work of one instruction, which runs `times` per step."""
        cycles = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
        if cycles:
            self.cycles = (self.cycles or 0) + int(cycles[1]) * times
        if i.opcode == 'dot':
            self.flops += times * dot_flops(i, computation)
        elif i.opcode == 'convolution':
            self.flops += times * convolution_flops(i, computation)
        elif i.opcode == 'custom-call':
            self.flops += times * self.custom(i, computation, times)
        kind = i.opcode.removesuffix('-start')
        if kind in COLLECTIVES:
            self.collective(i, kind, computation, times, depth, name, hidden)
        if not fused and i.opcode not in FREE and not i.opcode.endswith('-done'):
            self.traffic += times * moved(i, computation, self.computations)

    def custom(self, i, computation, times):
        """FLOPs of a custom call if its text tells; else 0, and the call is noted."""
        target = i.attribute('custom_call_target').strip('"')
        if target in PLUMBING:
            return 0
        if target.startswith('__cudnn$conv') and i.attribute('dim_labels'):
            return convolution_flops(i, computation)
        config = re.search(r'backend_config=(\{.*\})', i.attributes)
        try:
            config = json.loads(config[1]) if config else {}
        except json.JSONDecodeError:
            config = {}
        numbers = config.get('gemm_backend_config', {}).get('dot_dimension_numbers')
        if numbers:
            left = computation[i.operands[0]].shapes[0].dims
            inner = math.prod(left[int(k)] for k in numbers['lhs_contracting_dimensions'])
            return 2 * math.prod(i.shapes[0].dims) * inner
        stated = config.get('custom_call_config', {}).get('cost_estimate') or {}
        if 'flops' in stated:  # by the author of a Pallas kernel
            return int(stated['flops'])
        self.uncounted[target] = self.uncounted.get(target, 0) + times
        return 0

    def collective(self, i, kind, computation, times, depth, name, hidden):
        shapes = i.shapes
        if i.opcode.endswith('-start') and kind in ('all-gather', 'collective-permute'):
            shapes = shapes[len(i.operands) : 2 * len(i.operands)]  # (inputs, results, ...)
        size, members = groups(i.attributes, self.partitions)
        if kind == 'all-reduce' and name.startswith('all-reduce-scatter'):  # named so on TPUs
            kind = 'reduce-scatter'
        elif kind == 'reduce-scatter':
            shapes = [s for o in i.operands for s in computation[o].shapes[:1]]
        title = re.search(r'op_name="([^"]*)"', i.attributes)
        found = Collective(
            kind, sum(s.bytes for s in shapes), tuple(s.dims for s in i.shapes), size, members,
            times, depth, hidden or i.opcode.endswith('-start'), title[1] if title else '',
        )  # fmt: skip
        # Fusions that continue a collective that another one has started contain it again.
        parts = [x for x in self.computations[name].values() if 'AsyncCollective' in x.attributes]
        channel = i.attribute('channel_id')
        if 'async_collective' in name or parts:
            begins = any('AsyncCollectiveStart' in x.attributes for x in parts)
            if begins or channel not in self.begun:
                begun_before = self.begun.get(channel, (None, False))[1]
                if not begun_before:
                    self.begun[channel] = found._replace(hidden=True), begins
        else:
            self.collectives.append(found)


def read(text):
    """Reads the Program from the text of a compiled program, `compiled.as_text()`."""
    reader = Reader(text)
    return Program(
        reader.flops, reader.traffic, tuple(reader.collectives), reader.cycles, reader.loops,
        reader.uncounted,
    )  # fmt: skip


def kernel_bytes(text):
    """Bytes of all operands and results of a program's Pallas kernels, in any memory. Each counts
    once, as in XLA's cost analysis, which counts nothing for kernels."""
    kernels = [
        (i, arrays) for i, arrays in operands(text)
        if (i.attribute('custom_call_target') or '').strip('"') == 'tpu_custom_call'
    ]  # fmt: skip
    return sum(s.footprint for i, arrays in kernels for s in (*arrays, *whole(i)))


def prefetch_bytes(text):
    """Bytes that XLA's cost analysis counts for asynchronous copies between main and on-chip
    memory; for a slice it counts the whole array, though only the slice moves."""
    total = 0
    for i, arrays in operands(text):
        if i.opcode in ('copy-start', 'slice-start'):
            result = whole(i)[1 if i.opcode == 'slice-start' else 0]
            total += sum(s.footprint for s in (arrays[0], result))
    return total


def whole(i):
    """The Shapes of a result, as if all were in main memory."""
    return [s._replace(space=0) for s in i.shapes]


def operands(text):
    """Yields each instruction of a program once, with the Shapes that it reads."""
    computations, _ = parsed(text)
    for computation in computations.values():
        for i in computation.values():
            yield i, [s for o in i.operands if o in computation for s in whole(computation[o])]


def groups(attributes, partitions):
    """(number of devices in a group, members of the first group) of a collective."""
    if found := re.search(r'replica_groups=\{\{([\d,]*)\}', attributes):
        members = tuple(int(x) for x in found[1].split(',') if x)
    elif found := re.search(
        r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes
    ):
        shape, dims, order = (
            [int(x) for x in part.split(',')] if part else None for part in found.groups()
        )
        ids = np.arange(math.prod(dims)).reshape(dims)
        members = tuple(ids.transpose(order).reshape(shape)[0].tolist())
    elif found := re.search(r'replica_groups=mesh\[([^]]*)\][^{]*\{([^}]*)\}', attributes):
        return mesh_groups(*found.groups())
    elif found := re.search(r'source_target_pairs=\{\{(\d+),(\d+)\}', attributes):
        return 2, (int(found[1]), int(found[2]))
    else:
        members = ()
    members = members or tuple(range(partitions))
    return len(members), members


def mesh_groups(axes, along):
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


def dims_of(name, computation):
    return computation[name].shapes[0].dims


def dot_flops(i, computation):
    left = dims_of(i.operands[0], computation)
    inner = [left[int(k)] for k in (i.attribute('lhs_contracting_dims') or '').split(',') if k]
    return 2 * math.prod(i.shapes[0].dims) * math.prod(inner)


def convolution_flops(i, computation):
    """FLOPs of a convolution, without products with padding or dilation holes, as XLA counts."""
    left, right = (dims_of(name, computation) for name in i.operands[:2])
    lhs, _, rest = i.attribute('dim_labels').partition('_')
    rhs, _, out = rest.partition('->')
    result = i.shapes[0].dims
    window = dict(
        part.split('=') for part in (i.attribute('window') or '').split() if '=' in part
    )
    each = {key: value.split('x') for key, value in window.items()}
    pairs = 1
    for label in filter(str.isdigit, lhs):
        k = int(label)
        low = int(each['pad'][k].split('_')[0]) if 'pad' in each else 0
        stride, base, hole = (
            int(each[key][k]) if key in each else 1
            for key in ('stride', 'lhs_dilate', 'rhs_dilate')
        )
        size = left[lhs.index(label)]
        outputs = np.arange(result[out.index(label)])[:, None] * stride
        inputs = outputs + np.arange(right[rhs.index(label)])[None] * hole - low
        valid = (inputs >= 0) & (inputs < (size - 1) * base + 1) & (inputs % base == 0)
        pairs *= int(valid.sum())
    batch_groups = int(i.attribute('batch_group_count') or 1)
    batch = left[lhs.index('b')] // batch_groups
    return 2 * pairs * batch * right[rhs.index('i')] * right[rhs.index('o')]


def moved(i, computation, computations):
    """Bytes that an instruction outside of fusions reads from and writes to main memory."""
    written = [s.footprint for s in i.shapes]
    sources = [computation[o] for o in i.operands if o in computation]
    read = [sum(s.footprint for s in o.shapes) for o in sources]
    if i.opcode == 'copy-start':  # (destination, source, ...)
        return sum(written[:2])
    if i.opcode in ('slice-start', 'slice', 'dynamic-slice', 'gather'):
        piece = i.shapes[1 if i.opcode == 'slice-start' else 0]
        there = bool(sources and read[0])
        return piece.footprint + there * math.prod(piece.padded) * bits(piece.dtype) // 8
    if i.opcode == 'dynamic-update-slice':
        return read[1] + bool(written[0]) * sum(s.bytes for s in sources[1].shapes)
    if i.opcode == 'custom-call' and i.attribute('custom_call_target').strip('"') in PLUMBING:
        return 0
    if i.opcode.endswith('-start'):  # a collective: its result contains the operands
        return sum(written)
    if i.opcode == 'fusion':
        inner = computations[i.attribute('calls')]
        parameters = {int(p.inside): p for p in inner.values() if p.opcode == 'parameter'}
        taken = [
            consumed(inner, parameters[k].name, size, computations) for k, size in enumerate(read)
        ]
        last = root(inner)
        ends = [inner[o] for o in last.operands] if last.opcode == 'tuple' else [last]
        if len(ends) == len(i.shapes):
            ends = zip(ends, i.shapes, strict=True)
            written = [produced(inner, end, shape, computations) for end, shape in ends]
        return sum(taken) + sum(written)
    return sum(read) + sum(written)


def consumed(computation, name, whole, computations):
    """Bytes that a fusion reads of a value of `whole` bytes; of slices, only the slices."""
    total = 0
    for user in computation.values() if whole else ():
        for k in (k for k, operand in enumerate(user.operands) if operand == name):
            if user.opcode == 'bitcast':
                total += consumed(computation, user.name, whole, computations)
            elif user.opcode == 'fusion':
                inner = computations[user.attribute('calls')]
                parameter = next(
                    p.name for p in inner.values() if p.opcode == 'parameter' and p.inside == str(k)
                )
                total += consumed(inner, parameter, whole, computations)
                if origin(inner, root(inner)).name == parameter:  # it is returned unchanged
                    total += consumed(computation, user.name, whole, computations)
            elif user.opcode in ('dynamic-slice', 'slice', 'gather') and k == 0:
                total += sum(s.bytes for s in user.shapes)
            elif user.opcode != 'dynamic-update-slice' or k:  # it overwrites in place
                return whole
    return min(total, whole)


def origin(computation, i):
    """The instruction that produces a value, seen through bitcasts."""
    while i.opcode == 'bitcast':
        i = computation[i.operands[0]]
    return i


def produced(computation, end, shape, computations):
    """Bytes that a fusion writes for a result; for an in-place update, only the update."""
    end = origin(computation, end)
    while end.opcode == 'fusion':
        computation = computations[end.attribute('calls')]
        end = origin(computation, root(computation))
    if end.opcode == 'dynamic-update-slice' and shape.footprint:
        return min(shape.footprint, sum(s.bytes for s in computation[end.operands[1]].shapes))
    return shape.footprint
