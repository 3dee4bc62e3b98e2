"""config.json of transformers: its keys and defaults, checks against the arrays, and writing it.

A key that is left out has the default of its configuration class in transformers 5.24.
"""

import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import flax.linen as nn

from vit_jax.convert.assumed import guess_heads
from vit_jax.convert.documents import (
    KINDS,
    check_agreement,
    check_mlp_ratio,
    option,
    size_option,
)
from vit_jax.convert.pieces import count_numbered
from vit_jax.errors import UserError
from vit_jax.io.text import brief

EPSILON = {  # the default layer_norm_eps
    'vit': 1e-12, 'deit': 1e-12, 'vit_mae': 1e-12, 'vit_msn': 1e-6, 'dinov2': 1e-6,
    'dinov2_with_registers': 1e-6, 'ijepa': 1e-12, 'pixio': 1e-6, 'dpt': 1e-12, 'yolos': 1e-12,
}  # fmt: skip
TYPES = tuple(EPSILON)
DEFAULTS = dict(  # of most types
    hidden_size=768, num_hidden_layers=12, num_channels=3, intermediate_size=3072, patch_size=16,
)
HEADS = {'pixio': 16}  # the default num_attention_heads; others: 12
RATIO = ('dinov2', 'dinov2_with_registers', 'pixio')  # with an mlp_ratio
# Of images that are not square, these resize the position table as that of a square grid.
SQUARE = (*RATIO, 'dpt')
GELUS = {
    'gelu': 'exact', 'gelu_python': 'exact', 'gelu_pytorch_tanh': 'tanh', 'gelu_new': 'tanh',
    'gelu_fast': 'tanh', 'quick_gelu': 'quick',
}  # fmt: skip
ACTS = {'exact': 'gelu', 'tanh': 'gelu_pytorch_tanh', 'quick': 'quick_gelu'}  # by kind of GELU
READ = {
    'model_type', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'hidden_act',
    'layer_norm_eps', 'image_size', 'patch_size', 'num_channels', 'qkv_bias', 'id2label',
    'num_labels', 'problem_type', 'intermediate_size', 'pooler_output_size', 'pooler_act',
    'mlp_ratio', 'layerscale_value', 'use_swiglu_ffn', 'num_register_tokens', 'n_cls_tokens',
}  # fmt: skip
READ_AROUND = {  # keys of DPT and YOLOS that the encoder does not depend on, but for its arrays
    'num_detection_tokens', 'use_mid_position_embeddings', 'auxiliary_loss', 'class_cost',
    'bbox_cost', 'giou_cost', 'bbox_loss_coefficient', 'giou_loss_coefficient', 'eos_coefficient',
    'is_hybrid', 'backbone_out_indices', 'readout_type', 'reassemble_factors',
    'neck_hidden_sizes', 'fusion_hidden_size', 'head_in_index',
    'use_batch_norm_in_fusion_residual', 'use_bias_in_fusion_residual', 'add_projection',
    'use_auxiliary_head', 'auxiliary_loss_weight', 'semantic_loss_ignore_index',
    'semantic_classifier_dropout', 'backbone_featmap_shape', 'neck_ignore_stages',
    'backbone_config',
}  # fmt: skip
# Outputs of a trained model in evaluation do not depend on these: dropout rates, initialisation,
# what is returned and how, decoders of pre-training, feature maps of a backbone, versions and
# names. label2id is the inverse of id2label.
IRRELEVANT = {
    'hidden_dropout_prob', 'attention_probs_dropout_prob', 'attention_dropout', 'drop_path_rate',
    'initializer_range', 'initializer_factor', 'classifier_dropout', 'encoder_stride',
    'mask_ratio', 'norm_pix_loss', 'decoder_hidden_size', 'decoder_intermediate_size',
    'decoder_num_attention_heads', 'decoder_num_hidden_layers', 'use_mask_token',
    'apply_layernorm', 'reshape_hidden_states', 'out_features', 'out_indices', '_out_features',
    '_out_indices', 'stage_names', 'architectures',
    'transformers_version', 'dtype', 'torch_dtype', '_name_or_path', 'name_or_path', 'label2id',
    'output_attentions', 'output_hidden_states', 'return_dict', 'use_return_dict', 'torchscript',
    'use_bfloat16', 'tf_legacy_loss', 'chunk_size_feed_forward', 'gradient_checkpointing',
    'finetuning_task', 'task_specific_params', 'auto_map', 'is_encoder_decoder', 'is_decoder',
    'use_cache', '_commit_hash', '_attn_implementation', 'attn_implementation',
    'tie_word_embeddings', '_attn_implementation_autoset', 'license', 'add_cross_attention',
    'cross_attention_hidden_size',
    'tie_encoder_decoder', 'quantization_config',
}  # fmt: skip


def unknown_keys(config: dict[str, Any], read: Collection[str]) -> tuple[str, ...]:
    """Keys that are neither in `read` nor irrelevant."""
    known = IRRELEVANT.union(read)
    return tuple(f'config.json: {brief(key)}' for key in config if key not in known)


def stated_type(config: dict[str, Any], *types: str) -> str:
    """The model_type, one of those whose arrays a file has; the first if the config states none.

    An image tower alone has a suffix after its type, which is removed. Raises UserError for a
    model_type that is none of them.
    """
    stated = option(config, 'model_type', 'a text', types[0])
    kind = stated if stated in types else stated.removesuffix('_vision_model')
    if kind not in types:
        raise UserError(
            f'config.json: model_type is {brief(repr(stated))}, but the arrays are those of '
            f'{" or ".join(types)}'
        )
    return kind


def encoder_fields(
    names: Collection[str],
    config: dict[str, Any],
    kernel: tuple[int, ...],
    blocks: str,
    heads: int = 12,
) -> dict[str, Any]:
    """{field: value} of patches, width, depth and heads.

    `kernel` is the shape of the patch embedding's kernel [D, C, h, w], `blocks` what precedes the
    number of a block in `names` of arrays, `heads` the number of a config.json that states none.
    """
    width, _, *patch = kernel
    depth = count_numbered(names, rf'{re.escape(blocks)}(\d+)\.')
    heads = heads if config else guess_heads(width, depth)
    return dict(
        patch_size=tuple(patch), width=width, depth=depth,
        num_heads=option(config, 'num_attention_heads', 'a whole number above 0', heads),
    )


def guessed(config: dict[str, Any], *fields: str) -> dict[str, str]:
    """{field: why it is a guess}: without a config.json."""
    return {} if config else dict.fromkeys(fields, 'there is no config.json')


def gelu_of(act: str, gated: bool = False) -> str:
    """The kind of GELU of `hidden_act`; 'exact' for a gated MLP, whose SiLU is the only one."""
    kinds = {'silu': 'exact', 'swish': 'exact'} if gated else GELUS
    if act not in kinds:
        raise UserError(
            f'config.json: hidden_act {brief(repr(act))} is none of {", ".join(kinds)}'
            + (' of a gated MLP' if gated else '')
        )
    return kinds[act]


def check_config(
    config: dict[str, Any],
    arrays: Collection[str],
    kind: str,
    fields: dict[str, Any],
    channels: int,
) -> None:
    """Raises UserError if the arrays contradict the config."""
    stated = {
        key: option(config, key, what) for key, what in (
            ('hidden_size', 'a whole number above 0'),
            ('num_hidden_layers', 'a whole number above 0'),
            ('num_channels', 'a whole number above 0'), ('use_swiglu_ffn', 'true or false'),
            ('num_register_tokens', 'a whole number'), ('num_labels', 'a whole number'),
            ('qkv_bias', 'true or false'), ('n_cls_tokens', 'a whole number above 0'),
        )
    }  # fmt: skip
    inferred = dict(
        hidden_size=fields['width'], num_hidden_layers=fields['depth'], num_channels=channels,
        qkv_bias='encoder.layer.0.attention.attention.query.bias' in arrays,
    )  # fmt: skip
    stated['patch_size'] = size_option(config, 'patch_size')
    inferred['patch_size'] = fields['patch_size']
    if config and stated['qkv_bias'] is None:
        stated['qkv_bias'] = True
    if fields['num_classes'] is not None:
        inferred['num_labels'] = fields['num_classes']
    if kind in RATIO:
        inferred['use_swiglu_ffn'] = fields['glu']
        registers = fields.get('registers', 0)
        inferred |= dict(num_register_tokens=registers, n_cls_tokens=registers)
        check_ratio(config, fields)
    else:
        inferred['intermediate_size'] = fields['mlp_dim']
        stated['intermediate_size'] = option(config, 'intermediate_size', 'a whole number above 0')
    if 'representation_size' in fields:
        inferred['pooler_output_size'] = fields['representation_size']
        stated['pooler_output_size'] = option(
            config, 'pooler_output_size', 'a whole number above 0'
        )
    check_agreement(stated, inferred)


def check_ratio(config: dict[str, Any], fields: dict[str, Any]) -> None:
    """Raises UserError if mlp_ratio does not match the MLP in the arrays."""
    ratio = option(config, 'mlp_ratio', 'a number above 0')
    if ratio is None:
        return
    hidden = int(fields['width'] * ratio)
    if fields['glu']:  # two thirds, rounded up to a multiple of 8
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    check_mlp_ratio(ratio, hidden, fields['mlp_dim'])


def check_sizes(
    config: dict[str, Any], fields: dict[str, Any], channels: int, defaults: dict[str, int]
) -> None:
    """Raises UserError if a size in the config, or its default, is not that of the arrays."""
    inferred = dict(
        hidden_size=fields['width'], num_hidden_layers=fields['depth'], num_channels=channels,
        intermediate_size=fields['mlp_dim'],
    )  # fmt: skip
    stated = {k: option(config, k, 'a whole number above 0', defaults[k]) for k in inferred}
    patch = size_option(config, 'patch_size') or (defaults['patch_size'],) * 2
    check_agreement(
        stated | {'patch_size': patch}, inferred | {'patch_size': fields['patch_size']}
    )


def check_flags(
    config: dict[str, Any], inferred: dict[str, bool], true: Collection[str] = ()
) -> None:
    """Raises UserError if a flag in the config is not what the arrays imply.

    Those in `true` are true by default, the others false.
    """
    stated = {key: option(config, key, 'true or false', key in true) for key in inferred}
    check_agreement(stated, inferred)


def check_table(
    config: dict[str, Any], patch: tuple[int, int], rows: int, before: int,
    default: int | None = None,
) -> None:  # fmt: skip
    """Raises UserError if image_size and a position table of `rows` differ in grid.

    `before` of the rows are those of tokens before the patches. Without a `default` a config that
    leaves out the size passes.
    """
    size = size_option(config, 'image_size') or (default and (default, default))
    if size is None:
        return
    h, w = (n // p for n, p in zip(size, patch, strict=True))
    if h * w + before != rows:
        raise UserError(
            f'config.json: image_size is {size[0]} x {size[1]}, which has {h} x {w} patches, but '
            f'the position table has {rows - before} (and {before} before them)'
        )


def check_square(config: dict[str, Any], kind: str, rows: int) -> None:
    """Raises UserError if transformers takes a table of `rows` patches for that of another grid."""
    size = size_option(config, 'image_size')
    if kind in SQUARE and size and size[0] != size[1] and math.isqrt(rows) ** 2 == rows:
        raise UserError(
            f'config.json: image_size is {size[0]} x {size[1]}, but transformers takes the '
            f'position table of a {kind} for that of a square'
        )


def class_names(config: dict[str, Any], count: int | None) -> tuple[str, ...] | None:
    """Class names by label; None if the config has none or only transformers' placeholders."""
    labels = option(config, 'id2label', 'an object')
    if not labels or not count:
        return None
    names = [labels.get(str(i)) for i in range(count)]
    if len(labels) != count or not all(map(KINDS['a text'], names)):
        raise UserError(
            f'config.json: id2label has {len(labels)} entries, not a name for each of {count} '
            f'outputs, 0 to {count - 1}'
        )
    return None if all(n == f'LABEL_{i}' for i, n in enumerate(names)) else tuple(names)


def shared_config(model: nn.Module, size: tuple[int, int], name: str, kind: str) -> dict[str, Any]:
    """Keys of config.json that most types have; `name` is that of the class, `kind` model_type."""
    image, patch = (
        pair[0] if pair[0] == pair[1] else list(pair) for pair in (size, model.patch_size)
    )
    return dict(
        architectures=[name], model_type=kind, dtype='float32',
        hidden_size=model.width, num_hidden_layers=model.depth,
        num_attention_heads=model.num_heads, image_size=image, patch_size=patch,
        num_channels=len(model.mean), layer_norm_eps=model.epsilon, hidden_act=ACTS[model.gelu],
        initializer_range=0.02,
    )  # fmt: skip


def labels(model: nn.Module, classes: Sequence[str] | None) -> dict[str, Any]:
    """Keys of config.json that name the classes of a model with a head."""
    if model.num_classes is None:
        return {}
    names = classes or [f'LABEL_{i}' for i in range(model.num_classes)]
    return dict(
        id2label={str(i): name for i, name in enumerate(names)},
        label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
