"""Bytes that a compiled program reads from and writes to main memory."""

import math
from collections.abc import Iterator

from vit_jax.plan.hlo_text import Computation, Instruction, Shape, bits, parsed, root

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


def moved(
    i: Instruction, computation: Computation, computations: dict[str, Computation]
) -> int:
    """Bytes that an instruction outside of fusions reads from and writes to main memory."""
    written = [s.footprint for s in i.shapes]
    sources = [computation[o] for o in arguments(i) if o in computation]
    read = [sum(s.footprint for s in o.shapes) for o in sources]
    if i.opcode == 'copy-start':  # (destination, source, ...)
        return sum(written[:2])
    if i.opcode in ('send', 'recv'):
        return written[0]
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


def consumed(
    computation: Computation, name: str, size: int, computations: dict[str, Computation]
) -> int:
    """Bytes that a fusion reads of a value of `size` bytes; of slices, only the slices."""
    total = 0
    for user in computation.values() if size else ():
        for k in (k for k, operand in enumerate(user.operands) if operand == name):
            if user.opcode == 'bitcast':
                total += consumed(computation, user.name, size, computations)
            elif user.opcode == 'fusion':
                inner = computations[user.attribute('calls')]
                parameter = next(
                    p.name for p in inner.values() if p.opcode == 'parameter' and p.inside == str(k)
                )
                total += consumed(inner, parameter, size, computations)
                if origin(inner, root(inner)).name == parameter:  # it is returned unchanged
                    total += consumed(computation, user.name, size, computations)
            elif user.opcode in ('dynamic-slice', 'slice', 'gather') and k == 0:
                total += sum(s.bytes for s in user.shapes)
            elif user.opcode != 'dynamic-update-slice' or k:  # it overwrites in place
                return size
    return min(total, size)


def origin(computation: Computation, i: Instruction) -> Instruction:
    """The instruction that produces a value, seen through bitcasts."""
    while i.opcode == 'bitcast':
        i = computation[i.operands[0]]
    return i


def produced(
    computation: Computation, end: Instruction, shape: Shape,
    computations: dict[str, Computation],
) -> int:
    """Bytes that a fusion writes for a result; for an in-place update, only the update."""
    end = origin(computation, end)
    while end.opcode == 'fusion':
        computation = computations[end.attribute('calls')]
        end = origin(computation, root(computation))
    if end.opcode == 'dynamic-update-slice' and shape.footprint:
        return min(shape.footprint, sum(s.bytes for s in computation[end.operands[1]].shapes))
    return shape.footprint


def kernel_bytes(text: str) -> int:
    """Bytes of all operands and results of a program's Pallas kernels, in any memory. Each counts
    once, as in XLA's cost analysis, which counts nothing for kernels."""
    kernels = [
        (i, arrays) for i, arrays in operands(text)
        if (i.attribute('custom_call_target') or '').strip('"') == 'tpu_custom_call'
    ]  # fmt: skip
    return sum(s.footprint for i, arrays in kernels for s in (*arrays, *whole(i)))


def prefetch_bytes(text: str) -> tuple[int, int]:
    """Bytes of asynchronous copies between main and on-chip memory: (by XLA's count, moved).

    XLA's cost analysis counts the whole array for each slice that is copied. What is read and what
    is written both count.
    """
    counted = moved = 0
    for i, arrays in operands(text):
        if i.opcode in ('copy-start', 'slice-start'):
            result = whole(i)[1 if i.opcode == 'slice-start' else 0].footprint
            source = arrays[0].footprint
            counted += source + result
            moved += min(source, result) + result
    return counted, moved


def whole(i: Instruction) -> list[Shape]:
    """The Shapes of a result, as if all were in main memory."""
    return [s._replace(space=0) for s in i.shapes]


def arguments(i: Instruction) -> list[str]:
    """Operands by name, one of a custom call once: of what a kernel takes twice it reads parts."""
    return list(dict.fromkeys(i.operands)) if i.opcode == 'custom-call' else list(i.operands)


def operands(text: str) -> Iterator[tuple[Instruction, list[Shape]]]:
    """Yields each instruction of a program once, with the Shapes that it reads."""
    computations, _ = parsed(text)
    for computation in computations.values():
        for i in computation.values():
            arrays = (computation[o] for o in arguments(i) if o in computation)
            yield i, [s for o in arrays for s in whole(o)]
