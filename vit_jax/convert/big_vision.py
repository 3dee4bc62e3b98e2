"""Checkpoints of google-research/big_vision (.npz), with or without `params/`, two towers too.

GELU is the tanh approximation, norms have epsilon 1e-6, images are in [-1, 1]. The class token has
no position. Position tables are resized linearly with aligned corners.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn

from vit_jax.convert import official
from vit_jax.convert.files import Array
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import (
    ALL,
    Piece,
    count_numbered,
    dense_pieces,
    norm_pieces,
    rename_arrays,
)
from vit_jax.convert.stages import TWO_TOWERS
from vit_jax.errors import UserError

TABLE = 'pos_embedding'
STACK = 'Transformer/encoderblock/'


def select_arrays(
    arrays: Mapping[str, Array], tower: str | None = None, part: str | None = None
) -> tuple[dict[str, Array], dict[str, str]]:
    """(arrays of the model under current names, {other array: why it is unused}).

    `tower` names one tower of a file with several, such as 'img', which any `part` stands for.
    None: 'img' if it is the only tower. Raises UserError if there is also a text tower.
    """
    unused, selected = {}, arrays
    if any(name.startswith('params/') for name in arrays):
        unused = {n: 'no parameter' for n in arrays if not n.startswith('params/')}
        selected = {n.removeprefix('params/'): a for n, a in arrays.items() if n not in unused}
    stems = ('embedding/kernel', 'stem/kernel')  # of a ViT, of an MLP-Mixer
    in_model, in_tower = (any(prefix + n in selected for n in stems) for prefix in ('', 'img/'))
    if tower is None and in_tower and not in_model:
        if part is None and any(name.startswith('txt/') for name in selected):
            raise UserError(TWO_TOWERS)
        tower = 'img'
    if tower is not None:
        chosen = {n: a for n, a in selected.items() if n.startswith(f'{tower}/')}
        if not chosen:
            towers = sorted({n.split('/')[0] for n in selected if '/' in n})
            raise UserError(f'the file has no part {tower!r}, but {", ".join(towers[:10])}')
        unused |= {n: 'of another tower' for n in selected if n not in chosen}
        selected = {n.removeprefix(f'{tower}/'): a for n, a in chosen.items()}
    return current_names(official.current_names(selected)), unused


def current_names(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Gives the position table and the MAP head the names that later versions use."""
    names = {'Transformer/pos_embedding': TABLE}
    if 'probe' in arrays:
        inlined = r'(probe|(MlpBlock|MultiHeadDotProductAttention|LayerNorm)_0/.*)'
        names |= {n: f'MAPHead_0/{n}' for n in arrays if re.fullmatch(inlined, n)}
    return rename_arrays(arrays, names)


def matches(names: Collection[str]) -> bool:
    """Whether the arrays are those of this family."""
    return 'embedding/kernel' in names and any(n.startswith('Transformer/encoder') for n in names)


def describe(arrays: Mapping[str, Array]) -> tuple[str, dict[str, Any]]:
    """(kind, {field: value}) of the model, from names and shapes of arrays."""
    *patch, _, width = shape_of(arrays, 'embedding/kernel', 4)
    stacked = is_stacked(arrays)
    block = STACK if stacked else 'Transformer/encoderblock_0/'
    query = f'{block}MultiHeadDotProductAttention_0/query/kernel'
    *_, heads, _ = shape_of(arrays, query, 3 + stacked)
    hidden = shape_of(arrays, f'{block}MlpBlock_0/Dense_0/kernel', 2 + stacked)
    pool = 'cls' if 'cls' in arrays else 'map' if 'MAPHead_0/probe' in arrays else 'gap'
    fields = dict(
        num_classes=official.count_classes(arrays), patch_size=tuple(patch), width=width,
        num_heads=heads, mlp_dim=hidden[-1], pool=pool,
        depth=hidden[0] if stacked else count_numbered(arrays, r'Transformer/encoderblock_(\d+)/'),
        posemb='learn' if TABLE in arrays else 'sincos2d',
    )  # fmt: skip
    if 'pre_logits/kernel' in arrays:
        fields['representation_size'] = shape_of(arrays, 'pre_logits/kernel', 2)[1]
    return 'vit', fields


def is_stacked(arrays: Collection[str]) -> bool:
    """Whether the blocks are stacked along a leading axis (nn.scan)."""
    return any(name.startswith(STACK) for name in arrays)


def table_rows(arrays: Mapping[str, Array]) -> tuple[str, int] | None:
    """(name, rows) of the position table; None without one."""
    return (TABLE, shape_of(arrays, TABLE, 3)[1]) if TABLE in arrays else None


def pieces(model: nn.Module, stacked: bool = False) -> list[Piece]:
    """Pieces of all arrays of a model's file."""
    rows = dense_pieces('embedding', 'embedding')
    rows += [Piece(name, name) for name in model.prefix]
    if model.posemb == 'learn':
        rows.append(Piece(TABLE, 'posemb'))
    if stacked:
        rows += official.block_pieces('Transformer/encoderblock', 'encoder', (ALL,))
    else:
        for i in range(model.depth):
            rows += official.block_pieces(f'Transformer/encoderblock_{i}', 'encoder', (i,))
    rows += norm_pieces('Transformer/encoder_norm/', 'norm')
    if model.pool == 'map':
        rows += map_head_pieces('MAPHead_0', 'map_head')
    return rows + official.head_pieces(model)


def map_head_pieces(theirs: str, ours: str) -> list[Piece]:
    """Pieces of attention pooling."""
    attention = f'{theirs}/MultiHeadDotProductAttention_0'
    rows = [Piece(f'{theirs}/probe', f'{ours}/probe')]
    for name in ('query', 'key', 'value', 'out'):
        rows += dense_pieces(f'{attention}/{name}', f'{ours}/{name}')
    rows += norm_pieces(f'{theirs}/LayerNorm_0/', f'{ours}/norm')
    rows += dense_pieces(f'{theirs}/MlpBlock_0/Dense_0', f'{ours}/mlp/fc1')
    return rows + dense_pieces(f'{theirs}/MlpBlock_0/Dense_1', f'{ours}/mlp/fc2')


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    cls = model.pool == 'cls'
    return official.limits(model) | dict(
        pool=('cls', 'gap', 'map'), posemb=('learn', 'sincos2d'), resnet=(None,),
        cls_posemb=(False,) if cls and model.posemb == 'learn' else (True, False),
    )  # fmt: skip
