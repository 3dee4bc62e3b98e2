"""Checkpoints of google-research/vision_transformer: ViT, hybrids, MLP-Mixer (.npz).

GELU is the tanh approximation, norms have epsilon 1e-6, images are in [-1, 1]. Position tables have
a row for the class token and are resized linearly with aligned corners.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn

from vit_jax.convert.files import Array
from vit_jax.convert.pieces import ALL, Piece, count_numbered, dense_pieces, norm_pieces
from vit_jax.errors import UserError

TABLE = 'Transformer/posembed_input/pos_embedding'
MOST_STAGES, MOST_UNITS = 4, 100  # of a ResNet; ResNet-152 has 36 units in a stage
NUMBERED = r'(LayerNorm|MultiHeadDotProductAttention|MlpBlock|Dense)_(\d+)'


def linen_names(names: Collection[str]) -> dict[str, str]:
    """{name: name in Flax linen}, which numbers each kind of module in a block from 0 on.

    Older files number all kinds together: LayerNorm_0, MultiHeadDotProductAttention_1, LayerNorm_2,
    MlpBlock_3.
    """
    children = {}
    for name in names:
        parts = name.split('/')
        for i, part in enumerate(parts):
            match = re.fullmatch(NUMBERED, part)
            if match:
                children.setdefault(('/'.join(parts[:i]), match[1]), set()).add(int(match[2]))

    places = {
        parent: {number: i for i, number in enumerate(sorted(numbers))}
        for parent, numbers in children.items()
    }

    def new(name: str) -> str:
        parts = name.split('/')
        for i, part in enumerate(parts):
            match = re.fullmatch(NUMBERED, part)
            if match:
                place = places['/'.join(name.split('/')[:i]), match[1]][int(match[2])]
                parts[i] = f'{match[1]}_{place}'
        return '/'.join(parts)

    return {name: new(name) for name in names}


def current_names(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Renames arrays to current names, and squeezes parameters of group norms to one axis."""
    names = linen_names(arrays)
    tidied = {}
    for name, array in arrays.items():
        if re.search(r'(^|/)gn(\d+|_root|_proj)/(bias|scale)$', name):
            array = array._replace(shape=tuple(n for n in array.shape if n != 1) or (1,))
        if names[name] in tidied:
            raise UserError(f'arrays {name} and {names[name]} have the same current name')
        tidied[names[name]] = array
    return tidied


def matches(names: Collection[str]) -> bool:
    """Whether the arrays are those of this family."""
    return TABLE in names or is_mixer(names)


def is_mixer(names: Collection[str]) -> bool:
    """Whether the arrays are those of an MLP-Mixer."""
    return 'MixerBlock_0/LayerNorm_0/scale' in names


def count_classes(arrays: Mapping[str, Array], kernel: str = 'head/kernel') -> int | None:
    """Number of outputs of the head; None without a head."""
    return shape_of(arrays, kernel, 2)[1] if kernel in arrays else None


def shape_of(arrays: Mapping[str, Array], name: str, ndim: int) -> tuple[int, ...]:
    """Shape of a required array; raises UserError unless it has `ndim` axes, none of them empty."""
    if name not in arrays:
        raise UserError(f'the file has no array {name}')
    shape = arrays[name].shape
    if len(shape) != ndim or 0 in shape:
        raise UserError(f'array {name} has shape {list(shape)}, not {ndim} axes that are not empty')
    return shape


def describe(arrays: Mapping[str, Array]) -> tuple[str, dict[str, Any]]:
    """(kind, {field: value}) of the model, from names and shapes of arrays."""
    if is_mixer(arrays):
        return 'mixer', describe_mixer(arrays)
    block = 'Transformer/encoderblock_0'
    *patch, _, width = shape_of(arrays, 'embedding/kernel', 4)
    _, heads, _ = shape_of(arrays, f'{block}/MultiHeadDotProductAttention_0/query/kernel', 3)
    cls = 'cls' in arrays
    fields = dict(
        num_classes=count_classes(arrays), patch_size=tuple(patch), width=width, num_heads=heads,
        depth=count_numbered(arrays, r'Transformer/encoderblock_(\d+)/'),
        mlp_dim=shape_of(arrays, f'{block}/MlpBlock_0/Dense_0/kernel', 2)[1],
        pool='cls' if cls else 'gap', posemb='learn' if TABLE in arrays else 'none',
    )  # fmt: skip
    if 'pre_logits/kernel' in arrays:
        fields['representation_size'] = shape_of(arrays, 'pre_logits/kernel', 2)[1]
    if 'conv_root/kernel' in arrays:
        units = []
        for i in range(count_numbered(arrays, r'block(\d+)/', 1)):
            units.append(len({n.split('/')[1] for n in arrays if n.startswith(f'block{i + 1}/')}))
            if len(units) > MOST_STAGES or units[-1] > MOST_UNITS:
                raise UserError(f'the file has more arrays block{i + 1}/... than any ResNet has')
        fields |= {
            'resnet': tuple(units), 'resnet_width': shape_of(arrays, 'conv_root/kernel', 4)[-1] / 64
        }  # fmt: skip
    return 'vit', fields


def describe_mixer(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """{field: value} of an MLP-Mixer."""
    *patch, _, width = shape_of(arrays, 'stem/kernel', 4)
    return dict(
        num_classes=count_classes(arrays), patch_size=tuple(patch), width=width,
        depth=count_numbered(arrays, r'MixerBlock_(\d+)/'),
        tokens_mlp_dim=shape_of(arrays, 'MixerBlock_0/token_mixing/Dense_0/kernel', 2)[1],
        mlp_dim=shape_of(arrays, 'MixerBlock_0/channel_mixing/Dense_0/kernel', 2)[1],
    )  # fmt: skip


def table_rows(arrays: Mapping[str, Array]) -> tuple[str, int] | None:
    """(name, rows) of the position table; None without one."""
    return (TABLE, shape_of(arrays, TABLE, 3)[1]) if TABLE in arrays else None


def mixer_tokens(arrays: Mapping[str, Array]) -> int:
    """Number of patches that a Mixer is for."""
    return shape_of(arrays, 'MixerBlock_0/token_mixing/Dense_0/kernel', 2)[0]


def block_pieces(theirs: str, ours: str, index: tuple) -> list[Piece]:
    """Pieces of an encoder block; `index` is (layer,), or (ALL,) if the file stacks the blocks."""
    attention, mlp = f'{theirs}/MultiHeadDotProductAttention_0', f'{theirs}/MlpBlock_0'
    rows = norm_pieces(f'{theirs}/LayerNorm_0/', f'{ours}/norm1', index)
    for i, name in enumerate(('query', 'key', 'value')):
        rows += [
            Piece(f'{attention}/{name}/kernel', f'{ours}/attn/qkv/kernel', (*index, ALL, i)),
            Piece(f'{attention}/{name}/bias', f'{ours}/attn/qkv/bias', (*index, i)),
        ]
    return [
        *rows,
        *dense_pieces(f'{attention}/out', f'{ours}/attn/out', index),
        *norm_pieces(f'{theirs}/LayerNorm_1/', f'{ours}/norm2', index),
        *dense_pieces(f'{mlp}/Dense_0', f'{ours}/mlp/fc1', index),
        *dense_pieces(f'{mlp}/Dense_1', f'{ours}/mlp/fc2', index),
    ]


def pieces(model: nn.Module, table: str = TABLE) -> list[Piece]:
    """Pieces of all arrays of a model's file."""
    if not hasattr(model, 'prefix'):
        return mixer_pieces(model)
    rows = []
    if model.resnet is not None:
        rows += resnet_pieces(model.resnet)
    rows += dense_pieces('embedding', 'embedding')
    rows += [Piece(name, name) for name in model.prefix]
    if model.posemb == 'learn':
        rows.append(Piece(table, 'posemb'))
    for i in range(model.depth):
        rows += block_pieces(f'Transformer/encoderblock_{i}', 'encoder', (i,))
    rows += norm_pieces('Transformer/encoder_norm/', 'norm')
    return rows + head_pieces(model)


def head_pieces(model: nn.Module) -> list[Piece]:
    """Pieces of the representation layer and the head, as far as the model has them."""
    rows = dense_pieces('pre_logits', 'pre_logits') if model.representation_size is not None else []
    return rows + (dense_pieces('head', 'head') if model.num_classes is not None else [])


def resnet_pieces(stages: Sequence[int]) -> list[Piece]:
    """Pieces of the ResNet of a hybrid."""
    rows = [
        Piece('conv_root/kernel', 'resnet/conv_root/kernel'),
        *norm_pieces('gn_root/', 'resnet/gn_root'),
    ]
    for i, units in enumerate(stages):
        for j in range(units):
            theirs, ours = f'block{i + 1}/unit{j + 1}', f'resnet/block{i + 1}_unit{j + 1}'
            for name in ('1', '2', '3', '_proj'):
                if name == '_proj' and j > 0:
                    continue
                rows.append(Piece(f'{theirs}/conv{name}/kernel', f'{ours}/conv{name}/kernel'))
                rows += norm_pieces(f'{theirs}/gn{name}/', f'{ours}/gn{name}')
    return rows


def mixer_pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays of an MLP-Mixer's file."""
    rows = dense_pieces('stem', 'embedding')
    for i in range(model.depth):
        theirs = f'MixerBlock_{i}'
        rows += norm_pieces(f'{theirs}/LayerNorm_0/', 'encoder/norm1', (i,))
        rows += norm_pieces(f'{theirs}/LayerNorm_1/', 'encoder/norm2', (i,))
        for part in ('token_mixing', 'channel_mixing'):
            rows += dense_pieces(f'{theirs}/{part}/Dense_0', f'encoder/{part}/fc1', (i,))
            rows += dense_pieces(f'{theirs}/{part}/Dense_1', f'encoder/{part}/fc2', (i,))
    rows += norm_pieces('pre_head_layer_norm/', 'norm')
    return rows + (dense_pieces('head', 'head') if model.num_classes is not None else [])


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    common = dict(gelu=('tanh',), epsilon=(1e-6,), mean=((0.5,) * 3,), std=((0.5,) * 3,))
    if not hasattr(model, 'prefix'):
        return common
    cls = model.pool == 'cls'
    return common | dict(
        pool=('cls', 'gap'), posemb=('learn',), cls_token=(None, cls),
        dist_token=(False,), dist_head=(False,), registers=(0,),
        cls_posemb=(True,) if cls else (True, False), pre_norm=(False,),
        layer_scale=(None,), glu=(False,), resnet_epsilon=('official',),
    )  # fmt: skip
