"""BLIP's image tower in transformers (arXiv:2201.12086).

Its pooled output has the last norm twice, which no model here has. So the model here gives all
tokens after that norm, as text decoders read them.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn

from vit_jax.convert.documents import option
from vit_jax.convert.files import Array
from vit_jax.convert.hf import clip, towers
from vit_jax.convert.hf import config as hf_config
from vit_jax.convert.hf.towers import LAYER, PROJECTION
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import Piece, linear_pieces, norm_pieces
from vit_jax.errors import UserError
from vit_jax.models import vit

PATCHES = towers.KERNEL
TABLE = 'embeddings.position_embedding'  # [1, T, D], not in an nn.Embedding
READ, UNUSED = towers.READ, towers.UNUSED
PROCESSOR = 'BlipImageProcessor'

guess_normalisation = clip.guess_normalisation


def matches(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether the arrays are those of this family."""
    prefix = towers.prefix_of(names)
    if prefix is None:
        return False
    return f'{prefix}{TABLE}' in names and f'{prefix}{LAYER}self_attn.qkv.weight' in names


def expresses(model: nn.Module) -> bool:
    """Whether a model is saved as one of this family."""
    return (
        isinstance(model, vit.Vit) and model.pool == 'none' and model.prefix == {'cls': 1}
        and not model.pre_norm
    )  # fmt: skip


def select(
    arrays: dict[str, Array], config: dict[str, Any], part: str | None
) -> tuple[dict[str, Array], dict[str, Any], dict[str, str]]:
    """(arrays of the image tower, its config, {other array: why it is unused}).

    Raises UserError for a file of more than the tower unless `part` is given.
    """
    arrays, config, unused = towers.select(arrays, config, part)
    if PROJECTION in arrays:
        unused[PROJECTION] = 'reads a token normalised twice'
    return arrays, config, unused


def table_rows(arrays: Mapping[str, Array]) -> tuple[str, int]:
    """(name, rows) of the position table."""
    return TABLE, shape_of(arrays, TABLE, 3)[1]


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """(kind, {field: value}, {field: why it is a guess}) of the model, without mean and std."""
    kind = hf_config.stated_type(config, 'blip')
    kernel = shape_of(arrays, PATCHES, 4)
    fields = hf_config.encoder_fields(arrays, config, kernel, 'encoder.layers.') | dict(
        num_classes=None, mlp_dim=shape_of(arrays, f'{LAYER}mlp.fc1.weight', 2)[0],
        gelu=hf_config.gelu_of(option(config, 'hidden_act', 'a text', 'gelu')),
        epsilon=option(config, 'layer_norm_eps', 'a number above 0', 1e-5),
        cls_token=True, pool='none', interpolation='bicubic',
    )  # fmt: skip
    if config:
        towers.check_config(config, fields, kernel[1], 16)
        hf_config.check_table(config, fields['patch_size'], table_rows(arrays)[1], 1, 384)
    return kind, fields, hf_config.guessed(config, 'num_heads', 'epsilon', 'gelu')


def pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays of a model's file, without the prefix of a tower beside others."""
    rows = [
        Piece(PATCHES, 'embedding/kernel', layout='conv'),
        Piece('embeddings.patch_embedding.bias', 'embedding/bias', layout='vector'),
        Piece('embeddings.class_embedding', 'cls'),
        Piece(TABLE, 'posemb'),
    ]
    for i in range(model.depth):
        theirs, index = f'encoder.layers.{i}', (i,)
        for n in (1, 2):
            rows += norm_pieces(f'{theirs}.layer_norm{n}.', f'encoder/norm{n}', index, model=model)
            rows += linear_pieces(f'{theirs}.mlp.fc{n}', f'encoder/mlp/fc{n}', index)
        attention = f'{theirs}.self_attn'
        rows += linear_pieces(f'{attention}.qkv', 'encoder/attn/qkv', index)
        rows += linear_pieces(f'{attention}.projection', 'encoder/attn/out', index, inputs=2)
    return rows + norm_pieces('post_layernorm.', 'norm', model=model)


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    return dict(
        num_classes=(None,), resnet=(None,), pool=('none',), posemb=('learn',),
        cls_posemb=(True,), pre_norm=(False,), representation_size=(None,), glu=(False,),
        layer_scale=(None,),
    )  # fmt: skip


def model_config(
    model: nn.Module, size: tuple[int, int], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Content of config.json."""
    config = towers.vision_config(model, size)
    if config.pop('num_channels') != 3:
        raise UserError(f'format hf has images of 3 channels in BLIP, not {len(model.mean)}')
    return dict(architectures=['BlipVisionModel'], model_type='blip_vision_model') | config
