"""BEiT (arXiv:2106.08254) and data2vec's image model (arXiv:2202.03555) of transformers.

Attention has biases by the offset of two patches, keys have no bias. A key that config.json leaves
out has the default of its configuration class in transformers 5.24.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from vit_jax.convert.assumed import half_normalisation
from vit_jax.convert.documents import check_agreement, option, size_option
from vit_jax.convert.files import Array
from vit_jax.convert.hf import blocks, vit
from vit_jax.convert.hf import config as hf_config
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import Piece, linear_pieces, norm_pieces, rename_arrays
from vit_jax.convert.stages import ENCODER
from vit_jax.errors import UserError
from vit_jax.models import block, relative

TYPES = ('beit', 'data2vec-vision')
PATCHES, TABLE = vit.PATCHES, vit.TABLE
OFFSETS = 'relative_position_bias.relative_position_bias_table'
SHARED = f'encoder.{OFFSETS}'
LAYER = 'encoder.layer.0.'
OWN = f'{LAYER}attention.attention.{OFFSETS}'
PREFIXES = ('beit.', 'data2vec_vision.')
UNUSED = (
    (r'embeddings\.mask_token|lm_head\..*', 'for masked pre-training'),
    (r'.*\.relative_position_index', 'computed'),
    (r'decode_head\..*|auxiliary_head\..*|fpn\d?\..*', 'for segmentation'),
)
READ = {
    'model_type', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size',
    'hidden_act', 'layer_norm_eps', 'image_size', 'patch_size', 'num_channels', 'id2label',
    'num_labels', 'problem_type', 'use_absolute_position_embeddings', 'use_relative_position_bias',
    'use_shared_relative_position_bias', 'layer_scale_init_value', 'use_mean_pooling',
    # of heads for pre-training and segmentation
    'vocab_size', 'pool_scales', 'use_auxiliary_head', 'auxiliary_loss_weight',
    'auxiliary_channels', 'auxiliary_num_convs', 'auxiliary_concat_input',
    'semantic_loss_ignore_index', 'add_fpn', 'segmentation_indices',
}  # fmt: skip


def matches(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether the arrays are those of this family."""
    if not vit.matches(names, config):
        return False
    kind, key = config.get('model_type'), f'{LAYER}attention.attention.key.bias'
    marks = 'lambda_1', 'relative_position_bias_table'
    return kind in TYPES or any(n.endswith(marks) for n in names) or (
        kind is None and any(n.endswith(key.replace('key', 'query')) for n in names)
        and not any(n.endswith(key) for n in names)
    )  # fmt: skip


def expresses(model: nn.Module) -> bool:
    """Whether a model is saved as one of this family."""
    if not vit.expresses(model) or model.style.bias is not None:
        return vit.expresses(model)
    return model.style.unbiased == ('key',) and model.prefix == {'cls': 1}


def absent_biases(model: nn.Module) -> tuple[str, ...]:
    """Biases in `style.unbiased` that the file lacks as well."""
    return ('key',)


def select(
    arrays: Mapping[str, Array], config: dict[str, Any], part: str | None
) -> tuple[dict[str, Array], dict[str, Any], dict[str, str]]:
    """(arrays without a prefix, config, {array around the encoder: what it is for}).

    Raises UserError for a segmentation model unless `part` names the encoder.
    """
    renamed = {name: name for name in arrays}
    prefix = next((p for p in PREFIXES if p + PATCHES in arrays), '')
    if prefix:  # a norm beside the encoder is that of masked pre-training
        renamed = {n: n.removeprefix(prefix) if n.startswith(prefix) else f'lm_head.{n}'
                   if n.startswith('layernorm.') else n for n in arrays}  # fmt: skip
    renamed = rename_arrays(arrays, renamed)
    if part is None and any(name.startswith('decode_head.') for name in renamed):
        raise UserError(f'the file has more than an encoder, for segmentation; {ENCODER}')
    return renamed, config, {}


def guess_normalisation(kind: str, channels: int) -> dict[str, tuple[float, ...]]:
    """{mean, std} to assume without a preprocessor_config.json."""
    return half_normalisation(channels)


def table_rows(arrays: Mapping[str, Array]) -> tuple[str, int] | None:
    """(name, rows) of the position table; None without one."""
    return vit.table_rows(arrays) if TABLE in arrays else None


def offset_rows(arrays: Mapping[str, Array]) -> tuple[str, int] | None:
    """(name, rows) of the first table of biases; None without one."""
    name = next((n for n in (SHARED, OWN) if n in arrays), None)
    return name and (name, shape_of(arrays, name, 2)[0])


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """(kind, {field: value}, {field: why it is a guess}) of the model, without mean and std."""
    kind = hf_config.stated_type(config, *TYPES)
    kernel = shape_of(arrays, PATCHES, 4)
    if SHARED in arrays and OWN in arrays:
        raise UserError(f'arrays {SHARED} and {OWN}: a sum of both biases is not supported')
    scale = float(option(config, 'layer_scale_init_value', 'a number', 0.1))
    offsets = offset_rows(arrays)
    bias = offsets and relative.Bias(shared=offsets[0] == SHARED, interpolation='linear')
    fields = hf_config.encoder_fields(arrays, config, kernel, 'encoder.layer.') | dict(
        num_classes=shape_of(arrays, 'classifier.weight', 2)[0]
        if 'classifier.weight' in arrays else None,
        mlp_dim=shape_of(arrays, f'{LAYER}intermediate.dense.weight', 2)[0],
        gelu=hf_config.gelu_of(option(config, 'hidden_act', 'a text', 'gelu')),
        epsilon=option(config, 'layer_norm_eps', 'a number above 0', 1e-12),
        cls_token=True, posemb='learn' if TABLE in arrays else 'none',
        interpolation='bicubic', layer_scale=scale if f'{LAYER}lambda_1' in arrays else None,
        style=block.Style(unbiased=('key',), bias=bias), **last_fields(arrays, config),
    )  # fmt: skip
    if config:
        check_config(config, arrays, fields, kernel[1])
    return kind, fields, hf_config.guessed(config, 'num_heads', 'epsilon', 'gelu')


def last_fields(arrays: Collection[str], config: dict[str, Any]) -> dict[str, str]:
    """{field: value} of the last norm and the pooling, by use_mean_pooling.

    Raises UserError if the arrays contradict it. A model for masked pre-training or segmentation
    may lack a norm.
    """
    first, pooled = 'layernorm.weight' in arrays, 'pooler.layernorm.weight' in arrays
    mean = option(config, 'use_mean_pooling', 'true or false', True if config else not first)
    if mean == first or (pooled and not mean):
        has = 'a last norm of all tokens' if first else 'no last norm of all tokens'
        raise UserError(f'config.json: use_mean_pooling is {mean}, but the arrays have {has}')
    norm = 'tokens' if first else 'pooled' if pooled else 'none'
    return dict(pool='gap' if mean else 'cls', last_norm=norm)


def check_config(
    config: dict[str, Any], arrays: Mapping[str, Array], fields: dict[str, Any], channels: int
) -> None:
    """Raises UserError if the arrays contradict the config."""
    hf_config.check_sizes(config, fields, channels, hf_config.DEFAULTS)
    hf_config.check_flags(config, dict(
        use_absolute_position_embeddings=TABLE in arrays, use_relative_position_bias=OWN in arrays,
        use_shared_relative_position_bias=SHARED in arrays,
    ))  # fmt: skip
    labels = {'num_labels': option(config, 'num_labels', 'a whole number')}
    if fields['num_classes'] is not None:
        check_agreement(labels, {'num_labels': fields['num_classes']})
    scaled = option(config, 'layer_scale_init_value', 'a number', 0.1) > 0
    if scaled != (fields['layer_scale'] is not None):
        has = 'no layer scales' if scaled else 'layer scales'
        value = config.get('layer_scale_init_value')
        raise UserError(
            f'config.json: layer_scale_init_value is {value}, but the arrays have {has}'
        )
    size = size_option(config, 'image_size') or (224, 224)
    if size[0] != size[1]:  # transformers reads its tables by swapped sides, or as of a square
        raise UserError(f'config.json: image_size {list(size)} is not square, which BEiT needs')
    if TABLE in arrays:
        hf_config.check_table(config, fields['patch_size'], table_rows(arrays)[1], 1)


def pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays of a model's file, without the prefix of one inside a classifier."""
    projection = PATCHES.removesuffix('.weight')
    rows = [
        Piece(f'{projection}.weight', 'embedding/kernel', layout='conv'),
        Piece(f'{projection}.bias', 'embedding/bias', layout='vector'),
        Piece('embeddings.cls_token', 'cls'),
    ]
    if model.posemb == 'learn':
        rows.append(Piece(TABLE, 'posemb'))
    bias = model.style.bias
    if bias is not None and bias.shared:
        rows.append(Piece(SHARED, 'bias_table'))
    for i in range(model.depth):
        theirs = f'encoder.layer.{i}'
        rows += blocks.block_pieces(model, blocks.BEIT, theirs, (i,))
        if bias is not None and not bias.shared:
            name = f'{theirs}.attention.attention.{OFFSETS}'
            rows.append(Piece(name, 'encoder/attn/bias_table', (i,)))
    if model.last_norm != 'none':
        name = 'layernorm.' if model.last_norm == 'tokens' else 'pooler.layernorm.'
        rows += norm_pieces(name, 'norm', model=model)
    return rows if model.num_classes is None else rows + linear_pieces('classifier', 'head')


def complete(model: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays under their names in the file: inside a classifier they have a prefix."""
    prefix = PREFIXES[0] if model.num_classes is not None else ''
    return {n if n.startswith('classifier.') else prefix + n: a for n, a in arrays.items()}


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    mean = model.pool == 'gap'
    bias = None if model.style.bias is None else relative.Bias(
        shared=model.style.bias.shared, hidden=model.style.bias.hidden,
        interpolation=model.style.bias.interpolation,
    )  # fmt: skip
    return {'style.bias': (bias,)} | dict(
        resnet=(None,), pool=('cls', 'gap'), posemb=('learn', 'none'), cls_posemb=(True,),
        cls_token=(True,) if mean else (None, True), dist_token=(False,), registers=(0,),
        pre_norm=(False,), last_norm=('pooled',) if mean else ('tokens',), glu=(False,),
        representation_size=(None,),
        layer_scale=(None,) if model.layer_scale is None else (model.layer_scale or 0.1,),
    )  # fmt: skip


def model_config(
    model: nn.Module, size: tuple[int, int], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Content of config.json; raises UserError for images that are not square."""
    if size[0] != size[1]:
        raise UserError(f'format hf has square images in each BEiT, not {size[0]} x {size[1]}')
    suffix = 'Model' if model.num_classes is None else 'ForImageClassification'
    bias = model.style.bias
    return hf_config.shared_config(model, size, f'Beit{suffix}', TYPES[0]) | dict(
        intermediate_size=model.mlp_dim, layer_scale_init_value=float(model.layer_scale or 0),
        use_mean_pooling=model.pool == 'gap',
        use_absolute_position_embeddings=model.posemb == 'learn',
        use_relative_position_bias=bias is not None and not bias.shared,
        use_shared_relative_position_bias=bias is not None and bias.shared,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, drop_path_rate=0.0,
    ) | hf_config.labels(model, classes)  # fmt: skip
