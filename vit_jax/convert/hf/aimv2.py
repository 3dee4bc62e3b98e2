"""AIMv2's image model of transformers (arXiv:2411.14402): RMS norms, SwiGLU, no class token.

A key that config.json leaves out has the default of Aimv2VisionConfig in transformers 5.24.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from vit_jax.convert.documents import check_agreement, option, size_option
from vit_jax.convert.files import Array
from vit_jax.convert.hf import blocks
from vit_jax.convert.hf import config as hf_config
from vit_jax.convert.official import half_normalisation, shape_of
from vit_jax.convert.pieces import Piece, count_numbered, norm_pieces
from vit_jax.convert.stages import ENCODER
from vit_jax.convert.timm.model import CLIP, guess_heads
from vit_jax.errors import UserError
from vit_jax.models import block, vit

TYPE = 'aimv2_vision_model'
PATCHES = 'embeddings.patch_embed.weight'
TABLE = 'embeddings.position_embedding.weight'
HEAD = 'head.'
UNUSED = ((r'head\..*', 'pooling of another kind'),)
LAYER = 'encoder.layers.0.'
BIASES = {  # of a layer, by name in block.Style
    'query': 'attention.q_proj', 'key': 'attention.k_proj', 'value': 'attention.v_proj',
    'out': 'attention.out_proj', 'mlp': 'ffn.up_proj',
}  # fmt: skip
READ = {
    'model_type', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
    'num_channels', 'image_size', 'patch_size', 'hidden_act', 'rms_norm_eps', 'qkv_bias',
    'mlp_bias', 'use_head', 'is_native',
}  # fmt: skip


def matches(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether the arrays are those of this family."""
    return PATCHES in names and f'{LAYER}rms_norm1.weight' in names


def expresses(model: nn.Module) -> bool:
    """Whether a model is saved as one of this family."""
    return isinstance(model, vit.Vit) and model.style.norm == 'rms' and model.patch_norm


def absent_biases(model: nn.Module) -> tuple[str, ...]:
    """Those of `style.unbiased` that the file lacks, too: qkv_bias and mlp_bias are flags."""
    groups = (*block.PROJECTIONS, 'out'), ('mlp',)
    absent = set(model.style.unbiased)
    return tuple(n for group in groups if set(group) <= absent for n in group)


def select(
    arrays: Mapping[str, Array], config: dict[str, Any], part: str | None
) -> tuple[dict[str, Array], dict[str, Any], dict[str, str]]:
    """(arrays, config, {}); raises UserError for a head unless `part` names the encoder."""
    if part is None and any(name.startswith(HEAD) for name in arrays):
        raise UserError(
            'the file has attention pooling whose query is no projection (head.cls_token); '
            + ENCODER
        )
    return dict(arrays), config, {}


def table_rows(arrays: Mapping[str, Array]) -> tuple[str, int]:
    """(name, rows) of the position table."""
    if TABLE not in arrays:
        raise UserError(
            'is_native: computed positions with the frequencies of this model are not supported'
        )
    return TABLE, shape_of(arrays, TABLE, 2)[0]


def guess_normalisation(kind: str, channels: int) -> dict[str, tuple[float, ...]]:
    """{mean, std} to assume without a preprocessor_config.json."""
    return CLIP if channels == 3 else half_normalisation(channels)


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """(kind, {field: value}, {field: why it is a guess}) of the model, without mean and std."""
    kind = hf_config.stated_type(config, TYPE)
    width, channels, *patch = shape_of(arrays, PATCHES, 4)
    depth = count_numbered(arrays, r'encoder\.layers\.(\d+)\.')
    gelu = hf_config.gelu_of(option(config, 'hidden_act', 'a text', 'silu'), True)
    absent = tuple(n for n, layer in BIASES.items() if f'{LAYER}{layer}.bias' not in arrays)
    fields = dict(
        num_classes=None, patch_size=tuple(patch), width=width, depth=depth,
        num_heads=option(config, 'num_attention_heads', 'a whole number above 0',
                         8 if config else guess_heads(width, depth)),
        mlp_dim=shape_of(arrays, f'{LAYER}ffn.up_proj.weight', 2)[0], glu=True, gelu=gelu,
        epsilon=option(config, 'rms_norm_eps', 'a number above 0', 1e-5), patch_norm=True,
        pool='gap', cls_token=False, interpolation='bicubic',
        style=block.Style(norm='rms', unbiased=absent),
    )  # fmt: skip
    check_config(config, fields, channels, table_rows(arrays)[1])
    guessed = {'pool': 'no pooling of the tokens is read from the file'}
    if config:
        return kind, fields, guessed
    return kind, fields, guessed | dict.fromkeys(
        ('num_heads', 'epsilon'), 'there is no config.json'
    )


def check_config(
    config: dict[str, Any], fields: dict[str, Any], channels: int, rows: int
) -> None:
    """Raises UserError if the arrays contradict the config."""
    if not config:
        return
    count, flag = 'a whole number above 0', 'true or false'
    unbiased = fields['style'].unbiased
    inferred = dict(
        hidden_size=fields['width'], num_hidden_layers=fields['depth'], num_channels=channels,
        intermediate_size=fields['mlp_dim'], patch_size=fields['patch_size'], is_native=False,
        qkv_bias='query' not in unbiased, mlp_bias='mlp' not in unbiased,
    )  # fmt: skip
    stated = dict(
        hidden_size=option(config, 'hidden_size', count, 1024),
        num_hidden_layers=option(config, 'num_hidden_layers', count, 24),
        num_channels=option(config, 'num_channels', count, 3),
        intermediate_size=option(config, 'intermediate_size', count, 2816),
        patch_size=size_option(config, 'patch_size') or (14, 14),
        is_native=option(config, 'is_native', flag, False),
        qkv_bias=option(config, 'qkv_bias', flag, False),
        mlp_bias=option(config, 'mlp_bias', flag, False),
    )  # fmt: skip
    check_agreement(stated, inferred)
    option(config, 'use_head', flag)
    hf_config.check_table(config, fields | dict(dist_token=False), rows)


def pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays of a model's file."""
    rows = [
        Piece(PATCHES, 'embedding/kernel', layout='conv'),
        Piece(PATCHES.replace('weight', 'bias'), 'embedding/bias', layout='vector'),
        *norm_pieces('embeddings.rms_norm.', 'patch_norm', model=model),
        Piece(TABLE, 'posemb', (0,)),
    ]
    for i in range(model.depth):
        rows += blocks.block_pieces(model, blocks.AIMV2, f'encoder.layers.{i}', (i,))
    return rows + norm_pieces('rms_norm.', 'norm', model=model)


def complete(model: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of the file, from those of the pieces."""
    return arrays


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    return dict(
        num_classes=(None,), resnet=(None,), pool=('gap', 'none'), posemb=('learn',),
        cls_token=(None, False), dist_token=(False,), registers=(0,), pre_norm=(False,),
        representation_size=(None,), layer_scale=(None,), glu=(True,), patch_norm=(True,),
    ) | {'style.norm': ('rms',)}  # fmt: skip


def model_config(
    model: nn.Module, size: tuple[int, int], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Content of config.json."""
    shared = hf_config.shared_config(model, size, 'Aimv2VisionModel', TYPE)
    del shared['layer_norm_eps']
    return shared | dict(
        intermediate_size=model.mlp_dim, hidden_act='silu', rms_norm_eps=model.epsilon,
        qkv_bias='query' not in model.style.unbiased, mlp_bias='mlp' not in model.style.unbiased,
        use_head=False, is_native=False, attention_dropout=0.0,
    )  # fmt: skip
