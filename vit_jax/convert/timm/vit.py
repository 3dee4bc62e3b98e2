"""timm's classes VisionTransformer and VisionTransformerDistilled.

GELU is exact, norms have epsilon 1e-6 and images are in [-1, 1], unless the architecture differs.
Position tables are resized by antialiased bicubic interpolation.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from vit_jax.convert.documents import Notes
from vit_jax.convert.files import Array
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import Piece, linear_pieces, norm_pieces
from vit_jax.convert.timm import arguments, vit_model, vit_saving
from vit_jax.errors import UserError
from vit_jax.models import vit


def matches(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether the arrays are those of this class."""
    return 'patch_embed.proj.weight' in names


def expresses(model: nn.Module) -> bool:
    """Whether a model is saved as one of this class."""
    return isinstance(model, vit.Vit)


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, dict[str, Any], Notes]:
    """(kind, {field: value}, Notes) of the model, from arrays (names, shapes) and config.json."""
    if arguments.arguments(config, vit_model.SIGNATURE).get('embed_layer') is not None:
        raise UserError('config.json names a hybrid, but the arrays have no ResNet')
    return vit_model.describe(arrays, config)


absent_biases = vit_saving.absent_biases
limits = vit_saving.limits
model_config = vit_saving.model_config


def table_rows(arrays: Mapping[str, Array]) -> tuple[str, int] | None:
    """(name, rows) of the position table; None without one."""
    return ('pos_embed', shape_of(arrays, 'pos_embed', 3)[1]) if 'pos_embed' in arrays else None


def complete(model: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays without the bias of a patch embedding before a norm, which timm lacks.

    Raises UserError unless it is zero.
    """
    name = 'patch_embed.proj.bias'
    if model.pre_norm and arrays[name].any():
        raise UserError('format timm cannot express a patch embedding with bias before pre_norm')
    return {n: a for n, a in arrays.items() if n != name or not model.pre_norm}


def pieces_of(arrays: Collection[str]) -> Callable[[nn.Module], list[Piece]]:
    """The function `pieces` for a file with these arrays."""
    gate = 'blocks.0.mlp.fc1_g.weight' in arrays
    return lambda model: pieces(model, gate)


def pieces(model: nn.Module, gate: bool | None = None) -> list[Piece]:
    """Pieces of all arrays of a model's file.

    `gate` says whether the gate of an MLP has arrays of its own; None: as in the file to save.
    """
    gate = vit_saving.has_separate_gate(model) if gate is None else gate
    rows = stem_pieces(model)
    for i in range(model.depth):
        if model.style.order == 'parallel':
            rows += parallel_pieces(f'blocks.{i}', (i,), model)
        else:
            rows += block_pieces(f'blocks.{i}', (i,), model, gate)
    return rows + head_pieces(model)


def stem_pieces(model: nn.Module) -> list[Piece]:
    """Pieces of what comes before the blocks."""
    rows = [
        Piece('patch_embed.proj.weight', 'embedding/kernel', layout='conv'),
        Piece('patch_embed.proj.bias', 'embedding/bias', layout='vector', optional=True),
    ]
    names = {'cls': 'cls_token', 'dist': 'dist_token', 'registers': 'reg_token'}
    rows += [Piece(names[name], name) for name in model.prefix]
    if model.posemb == 'learn':
        rows.append(Piece('pos_embed', 'posemb'))
    if model.patch_norm:
        rows += norm_pieces('patch_embed.norm.', 'patch_norm', model=model)
    return rows + (norm_pieces('norm_pre.', 'pre_norm', model=model) if model.pre_norm else [])


def head_pieces(model: nn.Module) -> list[Piece]:
    """Pieces of what comes after the blocks."""
    rows = []
    if model.last_norm != 'none':
        name = 'norm.' if model.last_norm == 'tokens' else 'fc_norm.'
        rows += norm_pieces(name, 'norm', model=model)
    if model.pool == 'map':
        rows += map_head_pieces('attn_pool', 'map_head', model)
    if model.representation_size is not None:
        rows += linear_pieces('pre_logits.fc', 'pre_logits')
    if model.num_classes is not None:
        rows += linear_pieces('head', 'head')
    return rows + (linear_pieces('head_dist', 'dist_head') if model.dist_head else [])


def block_pieces(theirs: str, index: tuple, model: nn.Module, gate: bool) -> list[Piece]:
    """Pieces of an encoder block; `gate` is that of `pieces`."""
    unbiased, norms = model.style.unbiased, model.style.norms
    qkv, out, mlp = ('query' not in unbiased, 'out' not in unbiased, 'mlp' not in unbiased)
    rows = [
        *norm_pieces(f'{theirs}.norm1.', 'encoder/norm1', index, model=model),
        *linear_pieces(f'{theirs}.attn.qkv', 'encoder/attn/qkv', index, bias=qkv),
        *linear_pieces(f'{theirs}.attn.proj', 'encoder/attn/out', index, inputs=2, bias=out),
        *norm_pieces(f'{theirs}.norm2.', 'encoder/norm2', index, model=model),
        *linear_pieces(f'{theirs}.mlp.fc2', 'encoder/mlp/fc2', index, bias=mlp),
    ]
    layers = {'fc1': ('fc1', None)}  # {ours: (theirs, part)}
    if model.glu:
        layers = {'gate': ('fc1_g', None), 'fc1': ('fc1_x', None)} if gate else {
            'gate': ('fc1', (0, 2)), 'fc1': ('fc1', (1, 2)),
        }  # fmt: skip
    for ours, (name, part) in layers.items():
        rows += linear_pieces(
            f'{theirs}.mlp.{name}', f'encoder/mlp/{ours}', index, part=part, bias=mlp
        )
    names = ['attn.q_norm', 'attn.k_norm'] if 'query_key' in norms else []
    names += [f'{name}.norm' for name, ours in (('attn', 'attention'), ('mlp', 'mlp'))
              if ours in norms]  # fmt: skip
    for name in names:
        ours = f'encoder/{name.replace(".", "/")}'
        rows += norm_pieces(f'{theirs}.{name}.', ours, index, model=model)
    if model.layer_scale is not None:
        rows += [
            Piece(f'{theirs}.ls{n}.gamma', f'encoder/scale{n}', index) for n in (1, 2)
        ]
    return rows


def parallel_pieces(theirs: str, index: tuple, model: nn.Module) -> list[Piece]:
    """Pieces of a block of attention and MLP in parallel: their first layers are one array."""
    width, hidden = model.width, model.mlp_dim
    biased = 'query' not in model.style.unbiased
    first = linear_pieces(
        f'{theirs}.in_proj', 'encoder/mlp/fc1', index, bias=biased, around=(0, 3 * width)
    )
    if not biased:
        first.append(Piece(f'{theirs}.mlp_bias', 'encoder/mlp/fc1/bias', index))
    rows = [
        *norm_pieces(f'{theirs}.in_norm.', 'encoder/norm1', index, model=model),
        *first,
        *linear_pieces(
            f'{theirs}.in_proj', 'encoder/attn/qkv', index, bias=biased, around=(hidden, 0)
        ),
        *linear_pieces(f'{theirs}.attn_out_proj', 'encoder/attn/out', index, inputs=2),
        *linear_pieces(f'{theirs}.mlp_out_proj', 'encoder/mlp/fc2', index),
    ]
    for name in ('q_norm', 'k_norm') if 'query_key' in model.style.norms else ():
        rows += norm_pieces(f'{theirs}.{name}.', f'encoder/attn/{name}', index, model=model)
    if model.layer_scale is not None:
        rows.append(Piece(f'{theirs}.ls.gamma', 'encoder/scale1', index))
    return rows


def map_head_pieces(theirs: str, ours: str, model: nn.Module) -> list[Piece]:
    """Pieces of attention pooling; timm stores key and value in one array."""
    return [
        Piece(f'{theirs}.latent', f'{ours}/probe'),
        *linear_pieces(f'{theirs}.q', f'{ours}/query'),
        *(p for i, name in enumerate(('key', 'value'))
          for p in linear_pieces(f'{theirs}.kv', f'{ours}/{name}', part=(i, 2))),
        *linear_pieces(f'{theirs}.proj', f'{ours}/out', inputs=2),
        *norm_pieces(f'{theirs}.norm.', f'{ours}/norm', model=model),
        *linear_pieces(f'{theirs}.mlp.fc1', f'{ours}/mlp/fc1'),
        *linear_pieces(f'{theirs}.mlp.fc2', f'{ours}/mlp/fc2'),
    ]  # fmt: skip
