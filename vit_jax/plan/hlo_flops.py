"""FLOPs of the instructions of a compiled program, 2 per multiply-add."""

import math

import numpy as np

from vit_jax.plan.hlo_text import Computation, Instruction


def dims_of(name: str, computation: Computation) -> tuple[int, ...]:
    """Dimensions of an instruction's result."""
    return computation[name].shapes[0].dims


def dot_flops(i: Instruction, computation: Computation) -> int:
    """FLOPs of a product of two arrays."""
    left = dims_of(i.operands[0], computation)
    inner = [left[int(k)] for k in (i.attribute('lhs_contracting_dims') or '').split(',') if k]
    return 2 * math.prod(i.shapes[0].dims) * math.prod(inner)


def convolution_flops(i: Instruction, computation: Computation) -> int:
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
