"""Reads arguments of timm's classes from config.json: from model_args and from the architecture.

Each class has a `Signature`. A JSON file beside this module has the arguments in which each
architecture of timm 1.0.31 differs from the class's defaults, and former names of architectures.
"""

import functools
import importlib.resources
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn

from vit_jax.convert.documents import option
from vit_jax.convert.timm.config import input_size, pretrained_setting, stated_classes
from vit_jax.errors import UserError
from vit_jax.io.text import brief

KIND = {  # of arguments in JSON, as in documents.KINDS
    **dict.fromkeys(
        ('global_pool', 'pos_embed', 'norm_layer', 'embed_norm_layer', 'act_layer', 'rel_pos_type',
         'pos_embed_interp_mode', 'attn_type', 'rope_type', 'rope_grid_indexing'),
        'a text',
    ),
    **dict.fromkeys(
        ('in_chans', 'embed_dim', 'depth', 'num_heads', 'attn_pool_num_heads', 'num_blocks',
         'stem_chs'),
        'a whole number above 0',
    ),
    **dict.fromkeys(
        ('num_classes', 'reg_tokens', 'rel_pos_dim', 'num_reg_tokens', 'swiglu_align_to'),
        'a whole number',
    ),
    **dict.fromkeys(
        ('qkv_bias', 'qk_norm', 'scale_attn_norm', 'scale_mlp_norm', 'proj_bias', 'class_token',
         'no_embed_class', 'pre_norm', 'final_norm', 'fc_norm', 'pool_include_prefix',
         'swiglu_mlp', 'scale_mlp', 'use_abs_pos_emb', 'use_rel_pos_bias',
         'use_shared_rel_pos_bias', 'use_fc_norm', 'shared_rel_pos',
         'pos_embed_ar_preserving', 'pos_embed_antialias', 'pos_embed_align_corners', 'stem_norm',
         'preact', 'basic', 'avg_down', 'qkv_fused', 'scale_attn_inner', 'attn_only_layer_scale',
         'use_rot_pos_emb', 'rope_rotate_half', 'use_post_norm', 'use_pre_transformer_norm',
         'use_post_transformer_norm'),
        'true or false',
    ),
    **dict.fromkeys(
        ('mlp_ratio', 'attn_pool_mlp_ratio', 'width_factor', 'bottle_ratio', 'rope_temperature'),
        'a number above 0',
    ),
    **dict.fromkeys(('layers', 'channels'), 'a list'),
    **dict.fromkeys(('init_values', 'rope_grid_offset'), 'a number'),
}  # fmt: skip
# Outputs of a trained model do not depend on these: rates, initialisation and changes of positions
# in training, sections of positions in text, and whether the weights take images of other sizes.
IRRELEVANT_ARGS = {
    'drop_rate', 'pos_drop_rate', 'patch_drop_rate', 'proj_drop_rate', 'attn_drop_rate',
    'drop_path_rate', 'weight_init', 'fix_init', 'head_init_scale', 'dynamic_img_size',
    'dynamic_img_pad', 'strict_img_size', 'nlhb', 'zero_init_last', 'enable_patch_interpolator',
    'pos_embed_use_grid_sample', 'use_key_only_attn_mask', 'rope_shift_coords',
    'rope_jitter_coords', 'rope_rescale_coords', 'rope_mrope_section',
}  # fmt: skip
# Kinds of norms by timm's name, without underscores.
NORMS = {
    'layernorm': 'LayerNorm', 'layernormfp32': 'LayerNorm', 'rmsnorm': 'RmsNorm',
    'rmsnormfp32': 'RmsNorm',
}  # fmt: skip
DIFFERENTIAL = 'differential attention (arXiv:2410.05258)'
FEATURES = {  # what unsupported values of arguments stand for, by the value or the argument
    'diff': DIFFERENTIAL, 'DiffParallelScalingBlock': DIFFERENTIAL,
    'ParallelThingsBlock': 'several attentions and MLPs side by side (arXiv:2203.09795)',
    'num_kv_heads': 'attention with grouped queries (arXiv:2305.13245)',
    'attn_only_layer_scale': 'a layer scale of attention alone',
}  # fmt: skip


class Signature(NamedTuple):
    """The arguments of a class of timm's models."""

    name: str  # of the class
    table: str  # file of its architectures
    defaults: dict[str, Any]  # {argument: value}
    only: dict[str, tuple] = {}  # {argument: supported values}, where not all are
    features: dict[str, str] = {}  # {argument: what its unsupported values stand for}
    kinds: dict[str, str] = {}  # as KIND, where arguments of the same name differ
    derived: tuple[str, ...] = ()  # keys of `defaults` and of the table that are no arguments
    like: dict[str, str] = {}  # {argument: one whose value, if it has that, stands for None}

    def of(self, architecture: str) -> dict[str, Any]:
        """{argument: value} of an architecture in the table."""
        return self.defaults | tables(self)['architectures'][architecture]


def tables(signature: Signature) -> dict[str, dict[str, Any]]:
    """{'architectures': {name: arguments}, 'renamed': {former name: name}} of a class."""
    return read_table(signature.table)


@functools.cache
def read_table(name: str) -> dict[str, dict[str, Any]]:
    """Content of a JSON file of this package."""
    file = importlib.resources.files('vit_jax.convert.timm') / name
    return json.loads(file.read_text(encoding='utf-8'))


def known_name(config: dict[str, Any], signature: Signature) -> str | None:
    """The architecture of this class that the config names; None if it names none of them."""
    name = pretrained_setting(config, 'architecture', 'a text')
    if name is None:
        return None
    known = tables(signature)
    short = name.partition('.')[0]  # without the tag of the weights
    short = known['renamed'].get(short, short)
    return short if short in known['architectures'] else None


def architecture(config: dict[str, Any], signature: Signature) -> str | None:
    """The name of an architecture of this class; None if the config names none.

    Raises UserError for any other name. 'vit' is VisionTransformer with its defaults.
    """
    name = pretrained_setting(config, 'architecture', 'a text')
    short = known_name(config, signature)
    if name is not None and short is None:
        raise UserError(
            f"config.json: architecture {brief(repr(name))} is none of timm's {signature.name} "
            "that is known here; if it is one of them under another name, put timm's name there"
        )
    return short


def arguments(config: dict[str, Any], signature: Signature) -> dict[str, Any]:
    """{argument: value} of the class: all of them if the config names an architecture.

    Otherwise only those in model_args. Raises UserError for an argument that is unknown or has an
    unsupported value.
    """
    name = architecture(config, signature)
    given = given_arguments(config, signature)
    args = {}
    if name is not None:
        sets = tables(signature)['architectures'][name]
        args = signature.defaults | pretrained_arguments(config) | sets
    if 'norm_layer' in given and 'epsilon' in args:
        args['epsilon'] = signature.defaults['epsilon']
    args |= given
    for key, other in signature.like.items():
        values = args.get(key)  # one, or one for each block
        values = values if isinstance(values, list) else [values]
        if key in args and all(value == args.get(other) for value in values):
            args[key] = None
    for key, values in signature.only.items():
        if args.get(key, values[0]) not in values:
            raise UserError(refusal(key, args[key], name, signature.features.get(key)))
    return args


def given_arguments(config: dict[str, Any], signature: Signature) -> dict[str, Any]:
    """{argument: value} of model_args that outputs depend on; names of layers as in the tables."""
    given = option(config, 'model_args', 'an object', {})
    for key in given:
        if key not in signature.defaults.keys() - set(signature.derived) | IRRELEVANT_ARGS:
            raise UserError(
                f'config.json: model_args has {brief(repr(key))}, which is not a known argument '
                f"of timm's {signature.name}; remove it if no output depends on it"
            )
    given = {k: v for k, v in given.items() if k not in IRRELEVANT_ARGS}
    for key, value in given.items():
        nullable = signature.defaults[key] is None or key in ('pos_embed', 'init_values')
        if value is None and not nullable:
            raise UserError(f'config.json: {key} of model_args is null')
        option(given, key, (KIND | signature.kinds).get(key, 'anything'))
    for key in ('norm_layer', 'embed_norm_layer') & given.keys():
        norm = given[key] or None
        given[key] = norm and NORMS.get(norm.replace('_', '').lower(), norm)
    if given.get('norm_layer') == 'LayerNorm':
        given['norm_layer'] = None
    if given.get('attn_layer') in ('', 'attn'):
        given['attn_layer'] = None
    if given.get('act_layer') is not None:
        given['act_layer'] = given['act_layer'].lower() or None
    return given


def pretrained_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """{argument: value} that timm takes from pretrained_cfg."""
    size = input_size(config)
    args = {} if size is None else {'in_chans': size[0], 'img_size': list(size[1:])}
    count = stated_classes(config)
    return args if count is None else args | {'num_classes': count}


def refusal(key: str, value: Any, name: str | None, feature: str | None) -> str:
    """The error message for an unsupported argument, which stands for a `feature`."""
    of = f' of architecture {name}' if name else ''
    feature = feature or FEATURES.get(key) or FEATURES.get(str(value))
    what = f': {feature} is' if feature else ', which is'
    return f'config.json: {key}{of} is {brief(repr(value))}{what} not supported'


def document(
    architecture: str,
    args: dict[str, Any],
    model: nn.Module,
    size: tuple[int, int],
    classes: Sequence[str] | None,
    *,
    first_conv: str,
    classifier: str | list[str],
) -> dict[str, Any]:
    """Content of config.json of an architecture with these arguments."""
    outputs = model.num_classes or 0
    config = dict(
        architecture=architecture, num_classes=outputs, model_args=args,
        pretrained_cfg=dict(
            input_size=[len(model.mean), *size], mean=list(model.mean), std=list(model.std),
            num_classes=outputs, first_conv=first_conv, classifier=classifier,
        ),
    )  # fmt: skip
    return config | (dict(label_names=list(classes)) if classes else {})
