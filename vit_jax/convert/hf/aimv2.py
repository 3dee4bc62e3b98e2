"""AIMv2's image model of transformers (arXiv:2411.14402): RMS norms, SwiGLU, no class token.

A key that config.json leaves out has the default of Aimv2VisionConfig in transformers 5.24.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn

from vit_jax.convert.assumed import CLIP, half_normalisation
from vit_jax.convert.biases import whole_groups
from vit_jax.convert.documents import option
from vit_jax.convert.files import Array
from vit_jax.convert.hf import blocks
from vit_jax.convert.hf import config as hf_config
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import Piece, norm_pieces
from vit_jax.convert.stages import ENCODER
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
DEFAULTS = dict(
    hidden_size=1024, num_hidden_layers=24, num_channels=3, intermediate_size=2816, patch_size=14,
)
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
    """Biases in `style.unbiased` that the file lacks as well: qkv_bias and mlp_bias are flags."""
    return whole_groups(model, (*block.PROJECTIONS, 'out'), ('mlp',))


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
    kernel = shape_of(arrays, PATCHES, 4)
    absent = tuple(n for n, layer in BIASES.items() if f'{LAYER}{layer}.bias' not in arrays)
    fields = hf_config.encoder_fields(arrays, config, kernel, 'encoder.layers.', 8) | dict(
        num_classes=None, mlp_dim=shape_of(arrays, f'{LAYER}ffn.up_proj.weight', 2)[0], glu=True,
        gelu=hf_config.gelu_of(option(config, 'hidden_act', 'a text', 'silu'), True),
        epsilon=option(config, 'rms_norm_eps', 'a number above 0', 1e-5), patch_norm=True,
        pool='gap', cls_token=False, interpolation='bicubic',
        style=block.Style(norm='rms', unbiased=absent),
    )  # fmt: skip
    table = table_rows(arrays)
    if config:
        hf_config.check_sizes(config, fields, kernel[1], DEFAULTS)
        flags = dict(qkv_bias='query' not in absent, mlp_bias='mlp' not in absent, is_native=False)
        hf_config.check_flags(config, flags)
        option(config, 'use_head', 'true or false')
        hf_config.check_table(config, fields['patch_size'], table[1], 0)
    guessed = {'pool': 'no pooling of the tokens is read from the file'}
    return kind, fields, guessed | hf_config.guessed(config, 'num_heads', 'epsilon')


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
