"""ViTMAEForPreTraining of transformers: what a file has beside the encoder, read and written."""

import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from vit_jax.convert.documents import check_agreement, option
from vit_jax.convert.files import Array
from vit_jax.convert.hf import blocks, vit_saving
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import (
    Piece,
    count_numbered,
    file_arrays,
    linear_pieces,
    norm_pieces,
    rename_arrays,
)
from vit_jax.convert.stages import Around, Beside
from vit_jax.errors import UserError
from vit_jax.models import block, embedding
from vit_jax.models.mae import FIELDS, Mae, around_encoder
from vit_jax.models.vit import Vit

EMBED = 'decoder.decoder_embed.weight'
LAYER = 'decoder.decoder_layers'
SPELLING = re.compile(r'decoder\.decoder_encoder\.layer\.')  # of LAYER in files of transformers 5


def matches(names: Collection[str]) -> bool:
    """Whether a file has the decoder of a masked autoencoder."""
    return EMBED in names


def current_names(arrays: dict[str, Array]) -> dict[str, Array]:
    """Arrays under the names of the decoder that all versions of transformers read."""
    if not matches(arrays):
        return arrays
    return rename_arrays(arrays, {n: SPELLING.sub(f'{LAYER}.', n) for n in arrays})


def around(arrays: Mapping[str, Array], config: dict[str, Any]) -> Around:
    """The autoencoder around the encoder of a file."""
    width = shape_of(arrays, EMBED, 2)[0]
    depth = count_numbered(arrays, re.escape(LAYER) + r'\.(\d+)\.')
    mlp_dim = shape_of(arrays, f'{LAYER}.0.intermediate.dense.weight', 2)[0] if depth else width
    keys = ('decoder_hidden_size', 'decoder_num_hidden_layers', 'decoder_intermediate_size')
    stated = {key: option(config, key, 'a whole number above 0') for key in keys}
    check_agreement(stated, dict(zip(keys, (width, depth, mlp_dim), strict=True)))
    fields = dict(
        decoder_width=width, decoder_depth=depth, decoder_mlp_dim=mlp_dim, decoder_posemb='learn',
        decoder_heads=option(config, 'decoder_num_attention_heads', 'a whole number above 0', 16),
        hide=float(option(config, 'mask_ratio', 'a number', 0.75)),
        normalised=option(config, 'norm_pix_loss', 'true or false', False),
    )
    biases = f'{LAYER}.0.attention.attention.query.bias' in arrays
    build = functools.partial(around_encoder, **fields)
    return Around('a masked autoencoder', build, FIELDS, pieces(depth, biases))


def pieces(depth: int, biases: bool) -> list[Piece]:
    """Pieces of all arrays beside the encoder; `biases`: whether projections of attention have any.

    Names of the decoder's blocks are those of the encoder's.
    """
    unbiased = () if biases else ('query', 'key', 'value')
    like = Vit(style=block.Style(unbiased=unbiased))
    rows = linear_pieces('decoder.decoder_embed', 'decoder_embedding')
    rows += [Piece('decoder.mask_token', 'mask_token')]
    rows += [Piece('decoder.decoder_pos_embed', 'decoder_posemb')]
    for i in range(depth):
        of_block = blocks.block_pieces(like, blocks.VIT, f'{LAYER}.{i}', (i,))
        rows += [p._replace(ours=p.ours.replace('encoder/', 'decoder/', 1)) for p in of_block]
    rows += norm_pieces('decoder.decoder_norm.', 'decoder_norm', model=like)
    return rows + linear_pieces('decoder.decoder_pred', 'decoder_head')


def beside(
    model: Mae, encoder: Vit, params: dict[str, np.ndarray], size: tuple[int, int]
) -> tuple[Vit, dict[str, np.ndarray], Beside]:
    """(encoder, its parameters, what a folder has beside them) of an autoencoder.

    `params` are {name: array} of the whole model, for images of `size`, (height, width). Raises
    UserError for a model that transformers' class can't be.
    """
    if vit_saving.model_type(encoder) != 'vit' or encoder.glu:
        raise UserError(
            'format hf has masked autoencoders of a ViT with a class token alone: no registers, '
            'distillation token, scales of residuals or gated MLPs'
        )
    if encoder.patch_size[0] != encoder.patch_size[1]:
        y, x = encoder.patch_size
        raise UserError(f'format hf has masked autoencoders of square patches alone, not {y} x {x}')
    if model.mask_tokens == 'encoder':
        raise UserError("format hf has no mask tokens in the encoder (mask_tokens='encoder')")
    if model.decoder_posemb != 'learn':
        table = embedding.fixed(model.decoder_posemb, *model.grid(size), model.decoder_width)
        table = np.pad(table, ((0, 0), (sum(encoder.prefix.values()), 0), (0, 0)))
        params = params | {'decoder_posemb': table}
    biases = 'query' not in encoder.style.unbiased
    config = dict(
        architectures=['ViTMAEForPreTraining'], model_type='vit_mae', mask_ratio=model.hide,
        norm_pix_loss=model.normalised, decoder_hidden_size=model.decoder_width,
        decoder_num_hidden_layers=model.decoder_depth,
        decoder_num_attention_heads=model.decoder_heads, decoder_intermediate_size=model.mlp_dim,
    )  # fmt: skip
    own = file_arrays(pieces(model.decoder_depth, biases), params)
    inside = {n.removeprefix('vit/'): x for n, x in params.items() if n.startswith('vit/')}

    def finish(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {f'vit.{name}': array for name, array in arrays.items()} | own

    return encoder, inside, Beside(finish, config)
