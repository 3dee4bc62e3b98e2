"""Maps arrays of a file to parameters of a model: a `Piece` for each array, or part of one.

A family of checkpoints makes a list of pieces from the fields of a model. Loading and saving both
use this list, so they cannot disagree.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import numpy as np

from vit_jax.convert.files import Array
from vit_jax.errors import UserError

ALL = slice(None)


class Piece(NamedTuple):
    """Maps an array of a file, or rows of it, to a slice of a parameter.

    `part` is one of so many equal parts of the array's first axis, `around` counts its rows before
    and after the meant ones, where parts are unequal. `layout` is how the file stores the slice:
    'same'; 'vector': flattened to one axis; 'conv': [h, w, C, F] as PyTorch's [F, C, h, w];
    'transposed': [h, w, C, F] as its [C, F, h, w];
    'pixel': [C, F] as its [F, C, 1, 1]; 'swapped': its first two axes the other way round; a number
    n: PyTorch's [outputs, inputs] for a kernel whose first n axes are inputs. An `optional` array
    that the file lacks (a bias) is loaded as zeros.
    """

    theirs: str
    ours: str
    index: tuple = ()  # of the slice in the parameter: (layer, ...)
    layout: str | int = 'same'
    part: tuple[int, int] | None = None  # (which, of how many)
    optional: bool = False
    around: tuple[int, int] = (0, 0)  # (rows before, rows after)

    def shape(self, ours: Sequence[int]) -> tuple[int, ...]:
        """The shape of the file's array for a slice of the parameter of shape `ours`."""
        if self.layout == 'vector':
            shape = (math.prod(ours),)
        elif self.layout == 'conv':
            shape = tuple(ours[i] for i in (3, 2, 0, 1))
        elif self.layout == 'transposed':
            shape = tuple(ours[i] for i in (2, 3, 0, 1))
        elif self.layout == 'pixel':
            shape = (ours[1], ours[0], 1, 1)
        elif self.layout == 'swapped':
            shape = (ours[1], ours[0], *ours[2:])
        elif self.layout == 'same':
            shape = tuple(ours)
        else:
            shape = (math.prod(ours[self.layout :]), math.prod(ours[: self.layout]))
        if self.part is None and not any(self.around):
            return shape
        count = 1 if self.part is None else self.part[1]
        return (shape[0] * count + sum(self.around), *shape[1:])

    def load(self, array: np.ndarray, out: np.ndarray) -> None:
        """Writes the file's array to its slice `out` of the parameter."""
        if self.part is not None:
            rows = array.shape[0] // self.part[1]
            array = array[self.part[0] * rows : (self.part[0] + 1) * rows]
        if any(self.around):
            array = array[self.around[0] : len(array) - self.around[1]]
        if self.layout == 'conv':
            array = array.transpose(2, 3, 1, 0)
        elif self.layout == 'transposed':
            array = array.transpose(2, 3, 0, 1)
        elif self.layout == 'pixel':
            array = array[..., 0, 0].T
        elif self.layout == 'swapped':
            array = array.swapaxes(0, 1)
        elif isinstance(self.layout, int):
            array = array.T
        out[...] = array.reshape(out.shape)

    def save(self, ours: np.ndarray) -> np.ndarray:
        """Converts a slice of the parameter to the file's array, or its part."""
        if self.layout == 'vector':
            return ours.reshape(-1)
        if self.layout == 'conv':
            return ours.transpose(3, 2, 0, 1)
        if self.layout == 'transposed':
            return ours.transpose(2, 3, 0, 1)
        if self.layout == 'pixel':
            return ours.T[..., None, None]
        if self.layout == 'swapped':
            return ours.swapaxes(0, 1)
        if isinstance(self.layout, int):
            return ours.reshape(math.prod(ours.shape[: self.layout]), -1).T
        return ours


def check_shapes(
    pieces: Sequence[Piece], arrays: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises UserError for an array that is missing or has another shape than the model needs.

    `arrays` is {name: files.Array}, `shapes` {parameter: shape}. Shapes are enough, so that a wrong
    file is refused before memory is allocated.
    """
    for piece in pieces:
        if piece.ours not in shapes:
            raise UserError(f'array {piece.theirs} is for {piece.ours}, which the model lacks')
        shape, index = shapes[piece.ours], piece.index
        sliced = [n for n, i in zip(shape, index, strict=False) if isinstance(i, slice)]
        ours = (*sliced, *shape[len(index) :])
        expected = piece.shape(ours)
        if piece.theirs not in arrays:
            if piece.optional:
                continue
            raise UserError(
                f'the file has no array {piece.theirs} {list(expected)}, which the model '
                f'that its other arrays describe needs for {piece.ours} {list(ours)}'
            )
        if arrays[piece.theirs].shape != expected:
            raise UserError(
                f'array {piece.theirs} is {list(arrays[piece.theirs].shape)} in the file, but the '
                f'model needs {list(expected)} for {piece.ours} {list(shape)}'
            )


def fill_params(
    pieces: Sequence[Piece], arrays: Mapping[str, Array], params: Mapping[str, np.ndarray]
) -> list[str]:
    """Reads every piece into `params` {name: float32 array}; returns the names filled with zeros.

    `arrays` is {name: files.Array} and has passed `check`.
    """
    zeros, last = [], (None, None)
    for piece in pieces:
        out = params[piece.ours][piece.index]
        if piece.theirs not in arrays:
            out[...] = 0
            zeros.append(piece.ours)
            continue
        array = arrays[piece.theirs]
        if last[0] != piece.theirs:  # parts of one array are adjacent: read it once
            whole = piece.part is None and not any(piece.around)
            direct = out if piece.layout == 'same' and whole else None
            last = piece.theirs, array.read(piece.theirs, direct)
        if not np.shares_memory(last[1], out):
            piece.load(last[1], out)
    return sorted(set(zeros))


def file_arrays(pieces: Sequence[Piece], params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts `params` {name: array} to the arrays {name: array} of a file."""
    parts = {}
    for piece in pieces:
        parts.setdefault(piece.theirs, []).append(piece.save(params[piece.ours][piece.index]))
    return {
        name: np.asarray(values[0] if len(values) == 1 else np.concatenate(values), order='C')
        for name, values in parts.items()
    }


def norm_pieces(
    theirs: str, ours: str, index: tuple = (), *, model: nn.Module | None = None
) -> list[Piece]:
    """Pieces of a norm: scale and bias, in Flax's names.

    With the `model`, in PyTorch's names, and without a bias for one of RMS norms.
    """
    scale = Piece(f'{theirs}{"scale" if model is None else "weight"}', f'{ours}/scale', index)
    if model is not None and model.style.norm == 'rms':
        return [scale]
    return [scale, Piece(f'{theirs}bias', f'{ours}/bias', index)]


def affine_pieces(theirs: str, ours: str, index: tuple = ()) -> list[Piece]:
    """Pieces of the scale and bias of a norm in PyTorch's names."""
    names = {'weight': 'scale', 'bias': 'bias'}
    return [Piece(f'{theirs}.{their}', f'{ours}/{our}', index) for their, our in names.items()]


def dense_pieces(theirs: str, ours: str, index: tuple = ()) -> list[Piece]:
    """Pieces of a dense layer in Flax's layout."""
    return [
        Piece(f'{theirs}/kernel', f'{ours}/kernel', index),
        Piece(f'{theirs}/bias', f'{ours}/bias', index),
    ]


def linear_pieces(
    theirs: str,
    ours: str,
    index: tuple = (),
    *,
    inputs: int = 1,
    part: tuple[int, int] | None = None,
    at: tuple = (),
    bias: bool = True,
    around: tuple[int, int] = (0, 0),
) -> list[Piece]:
    """Pieces of a dense layer in PyTorch's layout; `inputs` counts the kernel's input axes.

    `at` indexes output axes: it follows `index` in the bias, and the input axes in the kernel.
    Without `bias` there is the kernel alone.
    """
    kernel = (*index, *(ALL,) * (inputs if at else 0), *at)
    rows = [Piece(f'{theirs}.weight', f'{ours}/kernel', kernel, inputs, part, around=around)]
    if bias:
        where = (*index, *at)
        rows.append(
            Piece(f'{theirs}.bias', f'{ours}/bias', where, 'vector', part, around=around)
        )
    return rows


def count_numbered(names: Iterable[str], pattern: str, first: int = 0) -> int:
    """Counts the numbers from `first` on in the pattern's group; raises UserError for a gap."""
    numbers = {int(m[1]) for m in map(re.compile(pattern).match, names) if m}
    if numbers != set(range(first, first + len(numbers))):
        gap = next(i for i in itertools.count(first) if i not in numbers)
        start = pattern.partition('(')[0].replace('\\', '')
        raise UserError(f'the file has arrays {start}{max(numbers)}, but none {start}{gap}')
    return len(numbers)


def rename_arrays(arrays: Mapping[str, Array], names: Mapping[str, str]) -> dict[str, Array]:
    """Renames arrays by {name: new}; raises UserError if two get the same name."""
    result = {}
    for name, array in arrays.items():
        new = names.get(name, name)
        if new in result:
            raise UserError(f'array {name} and another array are both {new}')
        result[new] = array
    return result
