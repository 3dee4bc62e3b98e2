"""Checkpoints of google-research/big_vision (.npz), with or without `params/`, two towers too.

GELU is the tanh approximation, norms have epsilon 1e-6, images are in [-1, 1]. The class token has
no position. Position tables are resized linearly with aligned corners.
"""

import re

from vit_jax.convert import official
from vit_jax.convert.official import need
from vit_jax.convert.pieces import ALL, Piece, count, dense, norm, renamed
from vit_jax.errors import UserError

TABLE = 'pos_embedding'
STACK = 'Transformer/encoderblock/'


def tidy(arrays, tower=None):
    """(arrays of the model under current names, {other array: why it is unused}).

    `tower` names one tower of a file with several, such as 'img'. None: 'img' if the file has no
    model outside its towers.
    """
    unused, inner = {}, arrays
    if any(name.startswith('params/') for name in arrays):
        unused = {n: 'no parameter' for n in arrays if not n.startswith('params/')}
        inner = {n.removeprefix('params/'): a for n, a in arrays.items() if n not in unused}
    stems = ('embedding/kernel', 'stem/kernel')  # of a ViT, of an MLP-Mixer
    whole, image = (any(prefix + n in inner for n in stems) for prefix in ('', 'img/'))
    if tower is None and image and not whole:
        tower = 'img'
    if tower is not None:
        chosen = {n: a for n, a in inner.items() if n.startswith(f'{tower}/')}
        if not chosen:
            towers = sorted({n.split('/')[0] for n in inner if '/' in n})
            raise UserError(f'the file has no part {tower!r}, but {", ".join(towers[:10])}')
        unused |= {n: 'of another tower' for n in inner if n not in chosen}
        inner = {n.removeprefix(f'{tower}/'): a for n, a in chosen.items()}
    return modern(official.tidy(inner)), unused


def modern(arrays):
    """Gives the position table and the MAP head the names that later versions use."""
    names = {'Transformer/pos_embedding': TABLE}
    if 'probe' in arrays:
        inlined = r'(probe|(MlpBlock|MultiHeadDotProductAttention|LayerNorm)_0/.*)'
        names |= {n: f'MAPHead_0/{n}' for n in arrays if re.fullmatch(inlined, n)}
    return renamed(arrays, names)


def matches(names):
    """Whether the arrays are those of this family."""
    return 'embedding/kernel' in names and any(n.startswith('Transformer/encoder') for n in names)


def describe(arrays):
    """(kind, {field: value}) of the model, from names and shapes of arrays."""
    *patch, _, width = need(arrays, 'embedding/kernel', 4)
    stacked = is_stacked(arrays)
    block = STACK if stacked else 'Transformer/encoderblock_0/'
    *_, heads, _ = need(arrays, f'{block}MultiHeadDotProductAttention_0/query/kernel', 3 + stacked)
    hidden = need(arrays, f'{block}MlpBlock_0/Dense_0/kernel', 2 + stacked)
    pool = 'cls' if 'cls' in arrays else 'map' if 'MAPHead_0/probe' in arrays else 'gap'
    fields = dict(
        num_classes=official.classes(arrays), patch_size=tuple(patch), width=width,
        num_heads=heads, mlp_dim=hidden[-1], pool=pool,
        depth=hidden[0] if stacked else count(arrays, r'Transformer/encoderblock_(\d+)/'),
        posemb='learn' if TABLE in arrays else 'sincos2d',
    )  # fmt: skip
    if 'pre_logits/kernel' in arrays:
        fields['representation_size'] = need(arrays, 'pre_logits/kernel', 2)[1]
    return 'vit', fields


def is_stacked(arrays):
    """Whether the blocks are stacked along a leading axis (nn.scan)."""
    return any(name.startswith(STACK) for name in arrays)


def table_rows(arrays):
    """(name, rows) of the position table; None without one."""
    return (TABLE, need(arrays, TABLE, 3)[1]) if TABLE in arrays else None


def pieces(model, stacked=False):
    """Pieces of all arrays of a model's file."""
    rows = dense('embedding', 'embedding')
    rows += [Piece(name, name) for name in model.prefix]
    if model.posemb == 'learn':
        rows.append(Piece(TABLE, 'posemb'))
    if stacked:
        rows += official.block('Transformer/encoderblock', 'encoder', (ALL,))
    else:
        for i in range(model.depth):
            rows += official.block(f'Transformer/encoderblock_{i}', 'encoder', (i,))
    rows += norm('Transformer/encoder_norm/', 'norm')
    if model.pool == 'map':
        rows += map_head('MAPHead_0', 'map_head')
    return rows + official.top(model)


def map_head(theirs, ours):
    """Pieces of attention pooling."""
    attention = f'{theirs}/MultiHeadDotProductAttention_0'
    rows = [Piece(f'{theirs}/probe', f'{ours}/probe')]
    for name in ('query', 'key', 'value', 'out'):
        rows += dense(f'{attention}/{name}', f'{ours}/{name}')
    rows += norm(f'{theirs}/LayerNorm_0/', f'{ours}/norm')
    rows += dense(f'{theirs}/MlpBlock_0/Dense_0', f'{ours}/mlp/fc1')
    return rows + dense(f'{theirs}/MlpBlock_0/Dense_1', f'{ours}/mlp/fc2')


def limits(model):
    """{field: values that the format can express} for `save`."""
    cls = model.pool == 'cls'
    return official.limits(model) | dict(
        pool=('cls', 'gap', 'map'), posemb=('learn', 'sincos2d'), resnet=(None,),
        cls_posemb=(False,) if cls and model.posemb == 'learn' else (True, False),
    )  # fmt: skip
