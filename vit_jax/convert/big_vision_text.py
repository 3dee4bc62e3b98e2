"""The text tower of big_vision's two towers (.npz, `txt/`), and the scalars `t` and `b`.

Files of LiT (arXiv:2111.07991) have no `b`. Those with a text tower of BERT are refused. No file
states how tokens are pooled: attention pooling has arrays of its own, else it is the last token, as
in models/proj/image_text/text_transformer.py and in vision_transformer vit_jax/models_lit.py.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from vit_jax.convert import big_vision, official
from vit_jax.convert.documents import Notes, option
from vit_jax.convert.files import Array
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import ALL, Piece, count_numbered, dense_pieces, norm_pieces
from vit_jax.convert.stages import TWO_TOWERS, TextTower
from vit_jax.errors import UserError
from vit_jax.io import bounds
from vit_jax.models.text import Fields, Text

VOCABULARY, TABLE = 'txt/Embed_0/embedding', 'txt/pos_embedding'
BLOCKS, STACK = 'txt/Encoder_0/encoderblock', 'txt/Encoder_0/encoderblock/'
BERT = 'BertEncoder'  # of models/proj/flaxformer/bert.py: LiT-B16B, LiT-B16B_2 and LiT-L16L
TWICE = 'txt/Encoder_0/pos_embedding'  # of old files; its values are added to those of TABLE
SCALARS = {'temperature': 't', 'bias': 'b'}
LEFT_OPEN = ('pool', 'eos_id', 'pad_id')  # fields that `save` writes beside the arrays


def tower(arrays: Mapping[str, Array], record: dict[str, Any]) -> TextTower | None:
    """The text tower of a file with an image tower; None without one.

    `record` is the .json that `save` wrote beside it, or {}. Raises UserError for a text tower of
    another kind.
    """
    arrays = {n.removeprefix('params/'): a for n, a in arrays.items()}
    text = official.current_names({n: a for n, a in arrays.items() if n.startswith('txt/')})
    if not text or not any(n.startswith('img/') for n in arrays):
        return None
    if VOCABULARY not in text:
        bert = 'BERT, whose norms follow the blocks: ' if any(BERT in n for n in text) else ''
        raise UserError(
            f'array {min(text)} is of a text tower that is not supported ({bert}only the plain '
            f'transformer of models/proj/image_text/text_transformer.py is); {TWO_TOWERS}'
        )
    if TWICE in text:
        text[TABLE] = summed(text, TABLE, text.pop(TWICE))
    scalars = {ours: theirs for ours, theirs in SCALARS.items() if theirs in arrays}
    if 'temperature' not in scalars:
        raise UserError('the file has two towers, but no temperature `t`')
    text |= {theirs: arrays[theirs] for theirs in scalars.values()}
    stated = option(record, 'text', 'an object', {}, 'the .json beside it')
    fields = describe(text) | {k: stated[k] for k in LEFT_OPEN if k in stated}
    bounds.check('the .json beside it: text', fields, Fields)
    guessed = {} if stated or fields['pool'] == 'map' else {
        'pool': 'the last token in the code that writes such files, which do not state it'
    }  # fmt: skip
    rows = [
        Piece(theirs, ours, (...,), 'vector' if arrays[theirs].shape else 'same')
        for ours, theirs in scalars.items()
    ]
    stacked = any(n.startswith(STACK) for n in text)
    return TextTower(
        fields, text, lambda model: pieces(model, stacked), rows, {}, Notes(guessed)
    )


def summed(arrays: Mapping[str, Array], name: str, other: Array) -> Array:
    """The array of a name plus another one; raises UserError unless shapes are equal."""
    first = arrays[name] if name in arrays else other
    if first.shape != other.shape or name not in arrays:
        raise UserError(f'arrays {name} and {TWICE} are not of one shape')

    def fill(out: np.ndarray) -> None:
        values = first.read(name).astype(np.float32) + other.read(TWICE).astype(np.float32)
        out[...] = values.reshape(-1).view(np.uint8)

    return Array(first.shape, 'F32', fill, np.dtype('float32'))


def describe(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """{field: value} of the `Text`, from names and shapes of arrays."""
    vocabulary, width = shape_of(arrays, VOCABULARY, 2)
    stacked = is_stacked(arrays)
    block = STACK if stacked else f'{BLOCKS}_0/'
    query = f'{block}MultiHeadDotProductAttention_0/query/kernel'
    hidden = shape_of(arrays, f'{block}MlpBlock_0/Dense_0/kernel', 2 + stacked)
    return dict(
        vocab_size=vocabulary, width=width, length=shape_of(arrays, TABLE, 3)[1],
        num_heads=shape_of(arrays, query, 3 + stacked)[-2], mlp_dim=hidden[-1],
        depth=hidden[0] if stacked else count_numbered(arrays, rf'{BLOCKS}_(\d+)/'),
        num_classes=official.count_classes(arrays, 'txt/head/kernel'),
        pool='map' if 'txt/MAPHead_0/probe' in arrays else 'last',
    )  # fmt: skip


def is_stacked(arrays: Collection[str]) -> bool:
    """Whether the blocks are stacked along a leading axis (nn.scan)."""
    return any(name.startswith(STACK) for name in arrays)


def pieces(model: Text, stacked: bool = False) -> list[Piece]:
    """Pieces of all arrays of a text tower."""
    rows = [Piece(VOCABULARY, 'vocabulary'), Piece(TABLE, 'posemb')]
    if stacked:
        rows += official.block_pieces(BLOCKS, 'encoder', (ALL,))
    else:
        for i in range(model.depth):
            rows += official.block_pieces(f'{BLOCKS}_{i}', 'encoder', (i,))
    rows += norm_pieces('txt/Encoder_0/encoder_norm/', 'norm')
    if model.pool == 'map':
        rows += big_vision.map_head_pieces('txt/MAPHead_0', 'map_head')
    return rows + (dense_pieces('txt/head', 'head') if model.num_classes is not None else [])


def scalar_pieces(bias: bool) -> list[Piece]:
    """Pieces of `temperature` and `bias`, as big_vision writes them: of shape [1]."""
    names = SCALARS if bias else {'temperature': SCALARS['temperature']}
    return [Piece(theirs, ours, (...,), 'vector') for ours, theirs in names.items()]


def limits() -> dict[str, tuple]:
    """{field of the `Text`: values that the format can express} for `save`."""
    return dict(
        causal=(False,), pool=('last', 'first', 'mean', 'map'), mask_padding=(False,),
        posemb=('learn',), layer_scale=(None,), glu=(False,), gelu=('tanh',), epsilon=(1e-6,),
    )  # fmt: skip
