"""Parses the text of a compiled program (HLO) into computations of instructions."""

import math
import re
from typing import NamedTuple

WIDTHS = {'pred': 8, 'token': 0, 'opaque': 0, 'bf16': 16}  # bits; others have it in their name


class Shape(NamedTuple):
    """Shape of an array; `space` is 0 in the device's main memory, positive in on-chip memory."""

    dtype: str
    dims: tuple[int, ...]
    padded: tuple[int, ...]  # to whole tiles, as in memory
    space: int

    @property
    def bytes(self) -> int:
        """Bytes without padding."""
        return math.prod(self.dims) * bits(self.dtype) // 8

    @property
    def footprint(self) -> int:
        """Bytes in main memory, padding included."""
        return 0 if self.space else math.prod(self.padded) * bits(self.dtype) // 8


class Instruction(NamedTuple):
    name: str
    shapes: tuple[Shape, ...]  # of the result; of all its elements if it is a tuple
    opcode: str
    operands: tuple[str, ...]
    inside: str  # text between the parentheses
    attributes: str
    root: bool

    def attribute(self, key: str) -> str | None:
        """The value of `key=...`: a name, or the text in braces; None if absent."""
        match = re.search(rf'[ ,]{key}=(?:%([\w.-]+)|\{{([^}}]*)\}}|([^ ,]+))', self.attributes)
        return match and next(group for group in match.groups() if group is not None)


Computation = dict[str, Instruction]  # by name, in order


def bits(dtype: str) -> int:
    """Bits of an element."""
    if dtype in WIDTHS:
        return WIDTHS[dtype]
    return int(re.search(r'\d+', dtype)[0])


def shapes_of(text: str) -> tuple[Shape, ...]:
    """The Shapes of a type, 'bf16[8,128]{1,0:T(8,128)(2,1)S(1)}' or a tuple of such."""
    shapes = []
    for dtype, dims, layout in re.findall(r'([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?', text):
        dims = tuple(int(d.lstrip('<=')) for d in dims.split(',') if d)
        space = re.search(r'S\((\d+)\)', layout)
        order = [int(i) for i in layout.partition(':')[0].split(',') if i]
        tile = re.search(r'T\(([\d,]+)\)', layout)
        padded = list(dims)
        if tile and order:
            sizes = [int(s) for s in tile[1].split(',')]
            for axis, size in zip(order, reversed(sizes), strict=False):
                padded[axis] = -(-dims[axis] // size) * size
        shapes.append(Shape(dtype, dims, tuple(padded), int(space[1]) if space else 0))
    return tuple(shapes)


def closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r'[()]').finditer(text, start):
        depth += 1 if match[0] == '(' else -1
        if not depth:
            return match.start()
    raise ValueError(f'unbalanced parentheses: {text[:80]}')


def instruction(line: str) -> Instruction | None:
    """Parses a line of a computation; None if it is not an instruction."""
    match = re.match(r'\s+(ROOT )?%?([\w.-]+) = ', line)
    if not match:
        return None
    begin = match.end()
    end = closing(line, begin) + 1 if line[begin] == '(' else line.index(' ', begin)
    opens = line.index('(', end)
    closes = closing(line, opens)
    inside = line[opens + 1 : closes]
    return Instruction(
        match[2], shapes_of(line[begin:end]), line[end:opens].strip(),
        tuple(re.findall(r'%([\w.-]+)', inside)), inside, line[closes + 1 :], bool(match[1]),
    )  # fmt: skip


def parsed(text: str) -> tuple[dict[str, Computation], str]:
    """Parses a program to ({computation: {name: Instruction}}, name of the entry computation)."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        head = re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line)
        if head:
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif current is not None:
            parsed_line = instruction(line)
            if parsed_line:
                current[parsed_line.name] = parsed_line
    if entry is None:
        raise ValueError('no program with an entry computation in this text')
    return computations, entry


def root(computation: Computation) -> Instruction:
    """The instruction whose result is the computation's."""
    return next(i for i in computation.values() if i.root)


def constant(computation: Computation, name: str) -> int | None:
    """The constant integer value of an instruction, seen through copies; None if unknown."""
    source = computation.get(name)
    while source and source.opcode in ('copy', 'bitcast', 'convert', 'copy-start', 'copy-done'):
        source = computation.get(source.operands[0])
    if source and source.opcode == 'constant' and re.fullmatch(r'-?\d+', source.inside):
        return int(source.inside)
    return None
