"""Encoder blocks of transformers: a table of names tells which array is which layer."""

from collections.abc import Mapping

import flax.linen as nn

from vit_jax.convert.pieces import Piece, linear_pieces, norm_pieces
from vit_jax.models import block

PROJECTIONS = {name: f'attention.{name[0]}_proj' for name in block.PROJECTIONS}
LAYER_SCALE = {f'scale{n}': f'layer_scale{n}.lambda1' for n in (1, 2)}
VIT = dict(
    norm1='layernorm_before', norm2='layernorm_after',
    **{name: f'attention.attention.{name}' for name in block.PROJECTIONS},
    out='attention.output.dense', fc1='intermediate.dense', fc2='output.dense',
)  # fmt: skip
DINOV2 = VIT | LAYER_SCALE | dict(norm1='norm1', norm2='norm2', fc1='mlp.fc1', fc2='mlp.fc2')
DINOV2_GATED = DINOV2 | dict(gate_and_fc1='mlp.weights_in', fc2='mlp.weights_out')
PIXIO = VIT | dict(norm1='norm1', norm2='norm2')
BEIT = VIT | dict(scale1='lambda_1', scale2='lambda_2')
DINOV3 = PROJECTIONS | LAYER_SCALE | dict(
    norm1='norm1', norm2='norm2', out='attention.o_proj', fc1='mlp.up_proj', fc2='mlp.down_proj',
    gate='mlp.gate_proj',
)  # fmt: skip
AIMV2 = PROJECTIONS | dict(
    norm1='rms_norm1', norm2='rms_norm2', out='attention.out_proj', fc1='ffn.up_proj',
    fc2='ffn.down_proj', gate='ffn.gate_proj',
)  # fmt: skip


def block_pieces(
    model: nn.Module, names: Mapping[str, str], theirs: str, index: tuple
) -> list[Piece]:
    """Pieces of the block `theirs`, whose layers have these `names` there."""
    unbiased, rows = model.style.unbiased, []
    for n in ('norm1', 'norm2'):
        rows += norm_pieces(f'{theirs}.{names[n]}.', f'encoder/{n}', index, model=model)
    for i, name in enumerate(block.PROJECTIONS):
        rows += linear_pieces(
            f'{theirs}.{names[name]}', 'encoder/attn/qkv', index, at=(i,),
            bias=name not in unbiased,
        )  # fmt: skip
    rows += linear_pieces(
        f'{theirs}.{names["out"]}', 'encoder/attn/out', index, inputs=2, bias='out' not in unbiased
    )
    parts = {name: (names[name], None) for name in ('fc1', 'fc2')}
    if model.glu and 'gate' in names:
        parts['gate'] = names['gate'], None
    elif model.glu:  # one array, of which the gate is the first half
        parts |= {n: (names['gate_and_fc1'], (i, 2)) for i, n in enumerate(('gate', 'fc1'))}
    for ours, (name, part) in sorted(parts.items(), key=lambda row: row[0] != 'gate'):
        rows += linear_pieces(
            f'{theirs}.{name}', f'encoder/mlp/{ours}', index, part=part,
            bias='mlp' not in unbiased,
        )  # fmt: skip
    if model.layer_scale is not None:
        rows += [Piece(f'{theirs}.{names[n]}', f'encoder/{n}', index) for n in LAYER_SCALE]
    return rows
