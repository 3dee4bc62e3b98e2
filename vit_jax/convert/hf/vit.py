"""ViT (MAE and MSN too), DeiT and DINOv2 of transformers; with heads or not.

GELU and epsilon are those of config.json, the input normalisation is that of
preprocessor_config.json. Position tables are resized by bicubic interpolation, antialiased only in
DINOv2 with registers.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from vit_jax.convert.documents import option
from vit_jax.convert.files import Array
from vit_jax.convert.hf import config as hf_config
from vit_jax.convert.hf.config import TYPES
from vit_jax.convert.official import half_normalisation, shape_of
from vit_jax.convert.pieces import Piece, count_numbered, linear_pieces, norm_pieces, rename_arrays
from vit_jax.convert.timm.config import IMAGENET
from vit_jax.convert.timm.model import guess_heads
from vit_jax.convert.timm.vit import whole_groups
from vit_jax.errors import UserError
from vit_jax.io.text import brief
from vit_jax.models import block, vit

UNUSED = ((r'embeddings\.mask_token|decoder\..*', 'for masked pre-training'),)
READ = hf_config.READ
PATCHES = 'embeddings.patch_embeddings.projection.weight'
TABLE = 'embeddings.position_embeddings'
INTERPOLATION = {'dinov2_with_registers': 'bicubic_antialias'}


def matches(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether the arrays are those of this family."""
    return any(name == PATCHES or name.endswith('.' + PATCHES) for name in names)


def expresses(model: nn.Module) -> bool:
    """Whether a model is saved as one of this family."""
    return isinstance(model, vit.Vit)


def absent_biases(model: nn.Module) -> tuple[str, ...]:
    """Those of `style.unbiased` that the file lacks, too: qkv_bias is a flag."""
    return tuple(n for n in whole_groups(model.style.unbiased) if n in block.PROJECTIONS)


def without_prefix(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Removes the prefix that arrays of a model inside a classifier have."""
    prefix = next((n.removesuffix(PATCHES) for n in arrays if n.endswith('.' + PATCHES)), '')
    return rename_arrays(arrays, {name: name.removeprefix(prefix) for name in arrays})


def infer_model_type(arrays: Collection[str], config: dict[str, Any]) -> str:
    """One of TYPES, from config.json or else the arrays; raises UserError if they disagree."""
    inferred = 'deit' if 'embeddings.distillation_token' in arrays else 'vit'
    if 'encoder.layer.0.mlp.fc2.weight' in arrays or 'encoder.layer.0.norm1.weight' in arrays:
        registers = 'embeddings.register_tokens' in arrays
        inferred = 'dinov2_with_registers' if registers else 'dinov2'
    kind = option(config, 'model_type', 'a text', inferred)
    if kind not in TYPES:
        types = ', '.join(TYPES)
        raise UserError(f'config.json: model_type {brief(repr(kind))} is none of {types}')
    if inferred != (kind if kind not in ('vit_mae', 'vit_msn') else 'vit'):
        raise UserError(
            f'config.json: model_type is {kind!r}, but the arrays are those of {inferred}'
        )
    return kind


def mlp_size(arrays: Mapping[str, Array], kind: str) -> tuple[int, bool]:
    """(hidden size of the MLP, whether it is gated)."""
    if not kind.startswith('dinov2'):
        return shape_of(arrays, 'encoder.layer.0.intermediate.dense.weight', 2)[0], False
    if 'encoder.layer.0.mlp.weights_out.weight' in arrays:
        return shape_of(arrays, 'encoder.layer.0.mlp.weights_out.weight', 2)[1], True
    return shape_of(arrays, 'encoder.layer.0.mlp.fc1.weight', 2)[0], False


def guess_normalisation(kind: str, channels: int) -> dict[str, tuple[float, ...]]:
    """{mean, std} to assume without a preprocessor_config.json."""
    return IMAGENET if kind != 'vit' and channels == 3 else half_normalisation(channels)


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """(kind, {field: value}, {field: why it is a guess}) of the model, without mean and std."""
    kind = infer_model_type(arrays, config)
    width, channels, *patch = shape_of(arrays, PATCHES, 4)
    depth = count_numbered(arrays, r'encoder\.layer\.(\d+)\.')
    mlp_dim, glu = mlp_size(arrays, kind)
    gelu = hf_config.gelu_of(option(config, 'hidden_act', 'a text', 'gelu'))
    head = next((n for n in ('classifier', 'cls_classifier') if f'{n}.weight' in arrays), None)
    shape = shape_of(arrays, f'{head}.weight', 2) if head else (None, width)
    heads = hf_config.HEADS if config else guess_heads(width, depth)
    fields = dict(
        num_classes=shape[0], patch_size=tuple(patch), width=width, depth=depth,
        num_heads=option(config, 'num_attention_heads', 'a whole number above 0', heads),
        mlp_dim=mlp_dim, glu=glu, gelu=gelu,
        epsilon=option(config, 'layer_norm_eps', 'a number above 0', hf_config.EPSILON[kind]),
        pool='cls_gap' if shape[1] == 2 * width else 'cls', cls_token=True,
        dist_token='embeddings.distillation_token' in arrays,
        dist_head='distillation_classifier.weight' in arrays,
        interpolation=INTERPOLATION.get(kind, 'bicubic'),
    )  # fmt: skip
    if kind.startswith('dinov2'):
        fields['layer_scale'] = float(option(config, 'layerscale_value', 'a number', 1.0))
    if 'encoder.layer.0.attention.attention.query.bias' not in arrays:
        fields['style'] = block.Style(unbiased=block.PROJECTIONS)
    if 'embeddings.register_tokens' in arrays:
        fields['registers'] = shape_of(arrays, 'embeddings.register_tokens', 3)[1]
    if 'pooler.dense.weight' in arrays:
        fields['representation_size'] = shape_of(arrays, 'pooler.dense.weight', 2)[0]
        pooler = option(config, 'pooler_act', 'a text', 'tanh')
        if pooler != 'tanh':
            raise UserError(f'config.json: pooler_act {brief(repr(pooler))} is not tanh')
    hf_config.check_config(config, arrays, kind, fields, channels)
    hf_config.check_table(config, fields, table_rows(arrays)[1])
    guessed = {}
    if not config:
        guessed = dict(
            num_heads='there is no config.json', epsilon='of the norms; there is no config.json',
        ) | ({} if glu else {'gelu': 'there is no config.json'})  # fmt: skip
    return kind, fields, guessed


def table_rows(arrays: Mapping[str, Array]) -> tuple[str, int]:
    """(name, rows) of the position table."""
    return TABLE, shape_of(arrays, TABLE, 3)[1]


def pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays of a model's file, without the prefix of one inside a classifier."""
    dinov2 = model.layer_scale is not None
    names = {
        'cls': 'embeddings.cls_token', 'dist': 'embeddings.distillation_token',
        'registers': 'embeddings.register_tokens',
    }  # fmt: skip
    projection = PATCHES.removesuffix('.weight')
    rows = [
        Piece(f'{projection}.weight', 'embedding/kernel', layout='conv'),
        Piece(f'{projection}.bias', 'embedding/bias', layout='vector'),
        *(Piece(names[name], name) for name in model.prefix),
        Piece(TABLE, 'posemb'),
    ]
    for i in range(model.depth):
        rows += block_pieces(f'encoder.layer.{i}', (i,), model, dinov2)
    rows += norm_pieces('layernorm.', 'norm', model=model)
    if model.representation_size is not None:
        rows += linear_pieces('pooler.dense', 'pre_logits')
    if model.num_classes is not None:
        rows += linear_pieces('cls_classifier' if model.dist_head else 'classifier', 'head')
    return rows + (linear_pieces('distillation_classifier', 'dist_head') if model.dist_head else [])


def block_pieces(theirs: str, index: tuple, model: nn.Module, dinov2: bool) -> list[Piece]:
    """Pieces of an encoder block."""
    norms = ('norm1', 'norm2') if dinov2 else ('layernorm_before', 'layernorm_after')
    mlp = ('mlp.fc1', 'mlp.fc2') if dinov2 else ('intermediate.dense', 'output.dense')
    rows = []
    for i, name in enumerate(norms):
        rows += norm_pieces(f'{theirs}.{name}.', f'encoder/norm{i + 1}', index, model=model)
    for i, name in enumerate(('query', 'key', 'value')):
        rows += linear_pieces(
            f'{theirs}.attention.attention.{name}', 'encoder/attn/qkv', index, at=(i,),
            bias='query' not in model.style.unbiased,
        )  # fmt: skip
    rows += linear_pieces(f'{theirs}.attention.output.dense', 'encoder/attn/out', index, inputs=2)
    if model.glu:
        rows += linear_pieces(f'{theirs}.mlp.weights_in', 'encoder/mlp/gate', index, part=(0, 2))
        rows += linear_pieces(f'{theirs}.mlp.weights_in', 'encoder/mlp/fc1', index, part=(1, 2))
        rows += linear_pieces(f'{theirs}.mlp.weights_out', 'encoder/mlp/fc2', index)
    else:
        rows += linear_pieces(f'{theirs}.{mlp[0]}', 'encoder/mlp/fc1', index)
        rows += linear_pieces(f'{theirs}.{mlp[1]}', 'encoder/mlp/fc2', index)
    if dinov2:
        rows += [
            Piece(f'{theirs}.layer_scale{n}.lambda1', f'encoder/scale{n}', index) for n in (1, 2)
        ]
    return rows


def model_config(
    model: nn.Module, size: tuple[int, int], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Content of config.json."""
    return hf_config.model_config(model, size, classes)


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    dinov2 = model.layer_scale is not None
    pools = ('cls',)
    if dinov2:
        pools = ('cls', 'gap', 'cls_gap') if model.num_classes else ('cls', 'cls_gap')
    return dict(
        resnet=(None,), pool=pools, posemb=('learn',), cls_posemb=(True,),
        registers=(model.registers if dinov2 else 0,),
        registers_posemb=(False,) if model.registers else (False, True),
        dist_token=(False,) if dinov2 else (True, False), pre_norm=(False,),
        last_norm=('tokens', 'pooled') if dinov2 and model.pool == 'cls' else ('tokens',),
        glu=(True, False) if dinov2 else (False,),
        representation_size=(None,) if dinov2 or model.num_classes
        else (None, model.representation_size),
    )  # fmt: skip


def with_both_pools(
    model: nn.Module, params: dict[str, np.ndarray]
) -> tuple[nn.Module, dict[str, np.ndarray]]:
    """Makes the head of a DINOv2 read the class token and the mean of the patches.

    transformers has no other head for it (arXiv:2304.07193 section 7.1): rows of the kernel for the
    part that the head did not read are zeros. `params` is {name: array}; returns (model, params).
    Raises UserError for a model without a class token, since transformers would add one, which the
    patches would attend to.
    """
    if model.layer_scale is None or model.num_classes is None or not expresses(model):
        return model, params
    if 'cls' not in model.prefix:
        raise UserError('format hf has a class token in each DINOv2, this model none; timm can')
    if model.pool == 'cls_gap':
        return model, params
    kernel = params['head/kernel']  # [D, K]
    rows = [kernel, np.zeros_like(kernel)]
    kernel = np.concatenate(rows if model.pool == 'cls' else rows[::-1])
    # For a single token, a norm before the pooling equals one after it.
    model = model.clone(pool='cls_gap', cls_token=None, last_norm='tokens')
    return model, params | {'head/kernel': kernel}


def complete(model: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays, named as in `pieces`, under their names in the file, with all that is in it.

    Arrays of a model inside a classifier have a prefix. A DINOv2 with registers has a mask token,
    which is zeros here.
    """
    heads = ('classifier.', 'cls_classifier.', 'distillation_classifier.')
    kind = hf_config.model_type(model)
    prefix = f'{kind}.' if model.num_classes is not None else ''
    arrays = {n if n.startswith(heads) else prefix + n: a for n, a in arrays.items()}
    if kind == 'dinov2_with_registers':
        arrays[f'{prefix}embeddings.mask_token'] = np.zeros((1, model.width), np.float32)
    return arrays
