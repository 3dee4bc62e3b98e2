"""ViT (MAE, MSN, I-JEPA too), DeiT, DINOv2 and Pixio of transformers, encoders of DPT and YOLOS.

GELU and epsilon are those of config.json, the input normalisation is that of
preprocessor_config.json. Position tables are resized by bicubic interpolation, antialiased only in
DINOv2 with registers, and by bilinear interpolation in DPT.
"""

from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn

from vit_jax.convert.assumed import IMAGENET, half_normalisation
from vit_jax.convert.documents import option
from vit_jax.convert.files import Array
from vit_jax.convert.hf import blocks, vit_saving, yolos
from vit_jax.convert.hf import config as hf_config
from vit_jax.convert.hf.config import TYPES
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import Piece, linear_pieces, norm_pieces, rename_arrays
from vit_jax.convert.stages import ENCODER
from vit_jax.errors import UserError
from vit_jax.io.text import brief
from vit_jax.models import block, vit

UNUSED = (
    (r'embeddings\.mask_token|decoder\..*', 'for masked pre-training'),
    (rf'{yolos.TOKENS}|{yolos.ROWS}\.\d+', 'of the detector'),
)
OTHERS = {  # first part of names, of arrays around an encoder: what they are for
    'neck': 'depth or segmentation', 'head': 'depth or segmentation',
    'auxiliary_head': 'depth or segmentation', 'class_labels_classifier': 'detection',
    'bbox_predictor': 'detection',
}  # fmt: skip
READ = hf_config.READ | hf_config.READ_AROUND
PATCHES = 'embeddings.patch_embeddings.projection.weight'
TABLE = 'embeddings.position_embeddings'
INTERPOLATION = {'dinov2_with_registers': 'bicubic_antialias', 'dpt': 'bilinear'}


def matches(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether the arrays are those of this family."""
    return any(name == PATCHES or name.endswith('.' + PATCHES) for name in names)


def expresses(model: nn.Module) -> bool:
    """Whether a model is saved as one of this family."""
    return isinstance(model, vit.Vit)


absent_biases = vit_saving.absent_biases
limits = vit_saving.limits
model_config = vit_saving.model_config
complete = vit_saving.complete


def without_prefix(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Removes the prefix that arrays of a model inside a classifier have."""
    prefix = next((n.removesuffix(PATCHES) for n in arrays if n.endswith('.' + PATCHES)), '')
    return rename_arrays(arrays, {name: name.removeprefix(prefix) for name in arrays})


def select(
    arrays: Mapping[str, Array], config: dict[str, Any], part: str | None
) -> tuple[dict[str, Array], dict[str, Any], dict[str, str]]:
    """(arrays of the encoder, config, {array around it: what it is for}).

    Raises UserError for a model around an encoder unless `part` names the encoder, or it is a whole
    detector. Rows of detection tokens in tables of positions are arrays of their own.
    """
    renamed = without_prefix(arrays)
    others = {n: f'for {OTHERS[first]}' for n in renamed if (first := n.split('.')[0]) in OTHERS}
    task = next(iter(others.values()), 'for detection' if yolos.TOKENS in renamed else None)
    if task is not None and part is None and not yolos.matches(renamed):
        raise UserError(f'the file has more than an encoder, {task}; {ENCODER}')
    if yolos.TOKENS in renamed:
        renamed = yolos.separated(renamed)
    return renamed, config, others


def infer_model_type(arrays: Mapping[str, Array], config: dict[str, Any]) -> str:
    """One of TYPES, from config.json or else the arrays; raises UserError if they disagree."""
    layer = 'encoder.layer.0.'
    inferred = 'deit' if 'embeddings.distillation_token' in arrays else 'vit'
    if f'{layer}layer_scale1.lambda1' in arrays:
        registers = 'embeddings.register_tokens' in arrays
        inferred = 'dinov2_with_registers' if registers else 'dinov2'
    elif f'{layer}norm1.weight' in arrays:
        inferred = 'pixio'
    elif yolos.TOKENS in arrays:
        inferred = 'yolos'
    elif 'embeddings.cls_token' not in arrays:
        inferred = 'ijepa'
    kind = option(config, 'model_type', 'a text', inferred)
    if kind not in TYPES:
        types = ', '.join(TYPES)
        raise UserError(f'config.json: model_type {brief(repr(kind))} is none of {types}')
    if inferred != (kind if kind not in ('vit_mae', 'vit_msn', 'dpt') else 'vit'):
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
    half = kind in ('vit', 'dpt') or channels != 3
    return half_normalisation(channels) if half else IMAGENET


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """(kind, {field: value}, {field: why it is a guess}) of the model, without mean and std."""
    kind = infer_model_type(arrays, config)
    kernel = shape_of(arrays, PATCHES, 4)
    width, channels, *_ = kernel
    encoder = hf_config.encoder_fields(
        arrays, config, kernel, 'encoder.layer.', hf_config.HEADS.get(kind, 12)
    )
    mlp_dim, glu = mlp_size(arrays, kind)
    gelu = hf_config.gelu_of(option(config, 'hidden_act', 'a text', 'gelu'))
    head = next((n for n in ('classifier', 'cls_classifier') if f'{n}.weight' in arrays), None)
    shape = shape_of(arrays, f'{head}.weight', 2) if head else (None, width)
    fields = encoder | dict(
        num_classes=shape[0], mlp_dim=mlp_dim, glu=glu, gelu=gelu,
        epsilon=option(config, 'layer_norm_eps', 'a number above 0', hf_config.EPSILON[kind]),
        **prefix_fields(arrays, kind, shape[1] == 2 * width),
        dist_token='embeddings.distillation_token' in arrays,
        dist_head='distillation_classifier.weight' in arrays,
        interpolation=INTERPOLATION.get(kind, 'bicubic'),
    )  # fmt: skip
    if f'{yolos.MIDDLE}.0' in arrays:
        fields['posemb_at'] = 'layers'
    if kind.startswith('dinov2'):
        fields['layer_scale'] = float(option(config, 'layerscale_value', 'a number', 1.0))
    if 'encoder.layer.0.attention.attention.query.bias' not in arrays:
        fields['style'] = block.Style(unbiased=block.PROJECTIONS)
    if 'pooler.dense.weight' in arrays:
        fields['representation_size'] = shape_of(arrays, 'pooler.dense.weight', 2)[0]
        pooler = option(config, 'pooler_act', 'a text', 'tanh')
        if pooler != 'tanh':
            raise UserError(f'config.json: pooler_act {brief(repr(pooler))} is not tanh')
    hf_config.check_config(config, arrays, kind, fields, channels)
    before = fields['cls_token'] + fields['dist_token']
    before += fields['registers'] if fields.get('registers_posemb') else 0
    rows = table_rows(arrays)[1]
    hf_config.check_table(config, fields['patch_size'], rows, before)
    hf_config.check_square(config, kind, rows - before)
    guessed = {}
    if kind == 'ijepa' and not fields['num_classes']:
        guessed['pool'] = 'the file has no head; it is that of a classifier'
    if fields['pool'] == 'none':
        guessed['pool'] = 'transformers gives the mean of the first registers, its class tokens'
    guessed |= hf_config.guessed(config, 'num_heads', 'epsilon', *(() if glu else ('gelu',)))
    return kind, fields, guessed


def prefix_fields(arrays: Mapping[str, Array], kind: str, both: bool) -> dict[str, Any]:
    """{field: value} of the tokens before the patches, and of what the head reads.

    The class tokens of a Pixio are registers with positions. `both` says that the head reads the
    class token and the mean of the patches.
    """
    if kind == 'ijepa':
        return dict(pool='gap', cls_token=False)
    fields = dict(pool='cls_gap' if both else 'cls', cls_token=True)
    if 'embeddings.register_tokens' in arrays:
        fields['registers'] = shape_of(arrays, 'embeddings.register_tokens', 3)[1]
    count = shape_of(arrays, 'embeddings.cls_token', 3)[1]
    if kind == 'pixio':
        return dict(pool='none', cls_token=False, registers=count, registers_posemb=True)
    return fields


def table_rows(arrays: Mapping[str, Array]) -> tuple[str, int]:
    """(name, rows) of the position table."""
    return TABLE, shape_of(arrays, TABLE, 3)[1]


def pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays of a model's file, without the prefix of one inside a classifier."""
    kind = vit_saving.model_type(model)
    names = {
        'cls': 'embeddings.cls_token', 'dist': 'embeddings.distillation_token',
        'registers': 'embeddings.cls_token' if kind == 'pixio' else 'embeddings.register_tokens',
    }  # fmt: skip
    projection = PATCHES.removesuffix('.weight')
    rows = [
        Piece(f'{projection}.weight', 'embedding/kernel', layout='conv'),
        Piece(f'{projection}.bias', 'embedding/bias', layout='vector'),
        *(Piece(names[name], name) for name in model.prefix),
    ]
    if model.posemb_at == 'layers':
        tables = yolos.mid_tables(model.depth)
        rows += [Piece(name, 'encoder/posemb', (i,)) for i, name in enumerate(tables)]
    else:
        rows.append(Piece(TABLE, 'posemb'))
    layers = blocks.DINOV2_GATED if model.glu else blocks.DINOV2
    layers = layers if kind.startswith('dinov2') else blocks.VIT
    layers = blocks.PIXIO if kind == 'pixio' else layers
    for i in range(model.depth):
        rows += blocks.block_pieces(model, layers, f'encoder.layer.{i}', (i,))
    rows += norm_pieces('layernorm.', 'norm', model=model)
    if model.representation_size is not None:
        rows += linear_pieces('pooler.dense', 'pre_logits')
    if model.num_classes is not None:
        rows += linear_pieces('cls_classifier' if model.dist_head else 'classifier', 'head')
    return rows + (linear_pieces('distillation_classifier', 'dist_head') if model.dist_head else [])
