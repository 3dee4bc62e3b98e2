"""Encoders inside other models of transformers, as files of the encoder's own type.

Models of depth, segmentation or poses have the encoder's arrays as backbone.* and its config.json
as backbone_config. EoMT (arXiv:2503.19108) has the arrays of a DINOv2 or DINOv3 under other names.
"""

from typing import Any

import numpy as np

from vit_jax.convert.documents import option
from vit_jax.convert.files import Array
from vit_jax.convert.hf.config import IRRELEVANT
from vit_jax.convert.pieces import rename_arrays
from vit_jax.convert.stages import ENCODER
from vit_jax.errors import UserError
from vit_jax.io.text import brief

BACKBONE = 'backbone.'
TABLE = 'embeddings.position_embeddings'
EOMT = {  # {model_type: (that of the encoder, {part of a name: the encoder's name})}
    'eomt': ('dinov2_with_registers', {
        'layers.': 'encoder.layer.', 'attention.out_proj': 'attention.output.dense',
        **{f'attention.{name[0]}_proj': f'attention.attention.{name}'
           for name in ('query', 'key', 'value')},
        f'{TABLE}.weight': TABLE, 'mlp.down_proj': 'mlp.weights_out',
    }),
    'eomt_dinov3': ('dinov3_vit', {'layers.': 'layer.', 'layernorm.': 'norm.'}),
}  # fmt: skip
WHOLE = 'eomt'  # of which the queries and masks are read, too
EOMT_OTHERS = (
    'query.', 'class_predictor.', 'mask_head.', 'upscale_block.', 'criterion.', 'attn_mask_probs',
)  # fmt: skip
EOMT_DEFAULTS = dict(  # that differ from those of the encoder's type
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, num_register_tokens=4,
    layer_norm_eps=1e-6,
)  # fmt: skip
EOMT_IRRELEVANT = {  # of queries and losses
    'num_upscale_blocks', 'num_blocks', 'num_queries', 'no_object_weight', 'class_weight',
    'mask_weight', 'dice_weight', 'train_num_points', 'oversample_ratio',
    'importance_sample_ratio', 'rope_parameters', 'id2label', 'num_labels',
}  # fmt: skip


def encoder_of(
    arrays: dict[str, Array], config: dict[str, Any], part: str | None
) -> tuple[dict[str, Array], dict[str, Any], dict[str, str]]:
    """(arrays and config.json as of the encoder's own file, {other array: why it is unused}).

    Returns arrays and config themselves where no encoder is inside another model. Raises
    UserError unless `part` is given where one is, or the model is a whole EoMT of a DINOv2.
    """
    kind = option(config, 'model_type', 'a text')
    if kind in EOMT:
        if kind != WHOLE:
            check_part(kind, part)
        return of_eomt(arrays, config, kind)
    inner = config.get('backbone_config')
    if inner is None or not any(name.startswith(BACKBONE) for name in arrays):
        return arrays, config, {}
    if config.get('is_hybrid') or not isinstance(inner, dict) or 'model_type' not in inner:
        raise UserError(f'config.json: a backbone_config {brief(repr(inner))} is not supported')
    check_part(kind, part)
    why = f'of {brief(kind)} around the encoder'
    others = {name: why for name in arrays if not name.startswith(BACKBONE)}
    chosen = {n.removeprefix(BACKBONE): x for n, x in arrays.items() if n not in others}
    return chosen, inner, others


def without_wrapper(
    arrays: dict[str, Array], config: dict[str, Any]
) -> tuple[dict[str, Array], dict[str, Any]]:
    """(arrays, config.json) as timm writes them, of a file of transformers' wrapper of timm.

    Returns those of other files as they are.
    """
    if config.get('model_type') != 'timm_wrapper':
        return arrays, config
    names = {name: name.removeprefix('timm_model.') for name in arrays}
    more = IRRELEVANT | {'model_type', 'do_pooling', 'id2label', 'num_labels'}
    return rename_arrays(arrays, names), {k: v for k, v in config.items() if k not in more}


def check_part(kind: str, part: str | None) -> None:
    """Raises UserError unless `part` is given."""
    if part is None:
        kind = brief(repr(kind))
        raise UserError(f'config.json: model_type {kind} has an encoder inside; {ENCODER}')


def of_eomt(
    arrays: dict[str, Array], config: dict[str, Any], kind: str
) -> tuple[dict[str, Array], dict[str, Any], dict[str, str]]:
    """The encoder of an EoMT, without the queries that join the tokens of its last blocks."""
    inner, names = EOMT[kind]
    others = {n: 'of queries and masks' for n in arrays if n.startswith(EOMT_OTHERS)}
    renamed = {}
    for name in arrays.keys() - others.keys():
        renamed[name] = name
        for theirs, ours in names.items():
            renamed[name] = renamed[name].replace(theirs, ours)
    result = rename_arrays({n: x for n, x in arrays.items() if n not in others}, renamed)
    if TABLE in result and len(result[TABLE].shape) == 2:
        result[TABLE] = after_zeros(result[TABLE])
    if inner != 'dinov3_vit':
        result = with_joined_gates(result)
    changes = dict(model_type=inner)
    theta = option(config, 'rope_parameters', 'an object', {}).get('rope_theta')
    if inner == 'dinov3_vit':
        changes |= dict(rope_theta=theta, intermediate_size=config.get('intermediate_size', 4096))
    stated = {k: v for k, v in config.items() if k not in EOMT_IRRELEVANT}
    return result, EOMT_DEFAULTS | stated | changes, others


def as_eomt(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of an EoMT's encoder, of those of a DINOv2 with registers.

    The class token of an EoMT has no position, so it takes up its own.
    """
    arrays = {name: x for name, x in arrays.items() if not name.endswith('.mask_token')}
    table = arrays[TABLE][0]
    arrays['embeddings.cls_token'] = arrays['embeddings.cls_token'] + table[:1]
    result = {}
    for name, array in (arrays | {TABLE: np.ascontiguousarray(table[1:])}).items():
        for theirs, ours in EOMT[WHOLE][1].items():
            name = name.replace(ours, theirs)
        if '.mlp.weights_in.' in name:
            halves = zip(('gate_proj', 'up_proj'), np.split(array, 2), strict=True)
            result |= {name.replace('weights_in', half): x for half, x in halves}
        else:
            result[name] = array
    return result


def with_joined_gates(arrays: dict[str, Array]) -> dict[str, Array]:
    """The arrays with those of a gated MLP's first layer in one, gate first, as DINOv2 has them."""
    result = dict(arrays)
    for name, gate in arrays.items():
        other = name.replace('gate_proj', 'up_proj')
        if other != name and other in arrays and arrays[other]._replace(fill=gate.fill) == gate:
            del result[name], result[other]
            result[name.replace('gate_proj', 'weights_in')] = joined(gate, arrays[other])
    return result


def joined(first: Array, second: Array) -> Array:
    """Two arrays of equal shape and dtype in one, along their first axis."""

    def fill(out: np.ndarray) -> None:
        first.fill(out[: out.size // 2])
        second.fill(out[out.size // 2 :])

    return first._replace(shape=(2 * first.shape[0], *first.shape[1:]), fill=fill)


def after_zeros(array: Array) -> Array:
    """The array [R, D] as one [1, 1 + R, D], with a row of zeros first: for the class token."""

    def fill(out: np.ndarray) -> None:
        row = out.size // (array.shape[0] + 1)
        out[:row] = 0
        rest = np.empty(out.size - row, np.uint8)
        array.fill(rest)
        out[row:] = rest

    return array._replace(shape=(1, array.shape[0] + 1, array.shape[1]), fill=fill)
