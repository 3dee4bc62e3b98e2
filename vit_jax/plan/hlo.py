"""Counts FLOPs, memory traffic and collectives of a compiled program, from its text.

XLA's own cost analysis counts the body of a loop once, and the blocks may be scanned. Here
everything counts as often as it runs. All numbers are per device.
"""

import json
import math
import re
from typing import NamedTuple

from vit_jax.plan.hlo_collectives import COLLECTIVES, Collective, groups, rendezvous, transfer
from vit_jax.plan.hlo_flops import convolution_flops, dot_flops
from vit_jax.plan.hlo_text import Computation, Instruction, constant, parsed, root
from vit_jax.plan.hlo_traffic import FREE, PLUMBING, moved


class Program(NamedTuple):
    """Work of one device in one execution of a program."""

    flops: int  # of dots and convolutions, 2 per multiply-add
    traffic: int  # bytes read from and written to main memory
    collectives: tuple[Collective, ...]
    # the TPU compiler's estimate for its fusions, run in sequence; nothing for kernels
    cycles: int | None
    loops: dict[str, int | None]  # iterations by the loop's name; None is counted as 1
    uncounted: dict[str, int]  # executions of custom calls whose arithmetic is unknown


def trips(
    loop: Instruction, computation: Computation, computations: dict[str, Computation]
) -> int | None:
    """Number of iterations of a while loop; None if its text does not tell."""
    count = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if count:
        return int(count[1])
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

    def __init__(self, text: str) -> None:
        self.computations, entry = parsed(text)
        self.partitions = re.search(r'num_partitions=(\d+)', text[:100_000])
        self.partitions = int(self.partitions[1]) if self.partitions else 1
        self.flops = self.traffic = 0
        self.cycles = None
        self.loops, self.uncounted, self.collectives, self.begun = {}, {}, [], {}
        self.transfers = {}
        self.walk(entry, 1, 0)
        self.collectives += [c for c, _ in self.begun.values()]
        self.collectives += self.transfers.values()

    def walk(
        self, name: str, times: int, depth: int, fused: bool = False, hidden: bool = False
    ) -> None:
        """Adds the work of a computation, which runs `times` per step within `depth` loops."""
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

    def count(
        self, i: Instruction, computation: Computation, times: int, depth: int, fused: bool,
        name: str, hidden: bool,
    ) -> None:
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
        if i.opcode == 'send':
            begun = transfer(i, times, depth, self.cycles or 0)
            self.transfers |= [begun] if begun else []
        if i.opcode == 'recv-done':
            self.received(rendezvous(computation[i.operands[0]]))
        if not fused and i.opcode not in FREE and not i.opcode.endswith('-done'):
            self.traffic += times * moved(i, computation, self.computations)

    def received(self, name: str) -> None:
        """Notes the end of a transfer between TPU slices, by its name."""
        begun = self.transfers.get(name)
        if begun:
            span = begun.span[0], self.cycles or 0
            self.transfers[name] = begun._replace(span=span, hidden=span[1] > span[0])

    def custom(self, i: Instruction, computation: Computation, times: int) -> int:
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

    def collective(
        self, i: Instruction, kind: str, computation: Computation, times: int, depth: int,
        name: str, hidden: bool,
    ) -> None:
        """Adds a collective; the parts of an asynchronous one count once."""
        shapes = i.shapes
        if i.opcode.endswith('-start') and kind in ('all-gather', 'collective-permute'):
            shapes = shapes[len(i.operands) : 2 * len(i.operands)]  # (inputs, results, ...)
        size, members = groups(i.attributes, self.partitions)
        if kind == 'all-reduce' and name.startswith('all-reduce-scatter'):  # named so on TPUs
            kind = 'reduce-scatter'
        elif kind == 'reduce-scatter':
            shapes = [s for o in i.operands for s in computation[o].shapes[:1]]
        title = re.search(r'op_name="([^"]*)"', i.attributes)
        collective = Collective(
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
                    self.begun[channel] = collective._replace(hidden=True), begins
        else:
            self.collectives.append(collective)


def read(text: str) -> Program:
    """Reads the Program from the text of a compiled program, `compiled.as_text()`."""
    reader = Reader(text)
    return Program(
        reader.flops, reader.traffic, tuple(reader.collectives), reader.cycles, reader.loops,
        reader.uncounted,
    )  # fmt: skip
