"""Reads config.json of timm: arguments of its VisionTransformer, preprocessing of images.

architectures.json has the arguments in which each architecture of timm 1.0.31's
vision_transformer.py, deit.py and vision_transformer_hybrid.py differs from the class's defaults,
and former names of architectures.
"""

import functools
import importlib.resources
import json
import math
from typing import Any

from vit_jax.convert.documents import KINDS, channel_values, check_class_names, option
from vit_jax.errors import UserError
from vit_jax.io.text import brief

POOLS = {'token': 'cls', 'avg': 'gap', 'map': 'map', '': 'none'}
GELUS = {'gelu': 'exact', 'gelu_tanh': 'tanh', 'quick_gelu': 'quick'}
MOST_PIXELS = 16_384  # a side of the image before the crop
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
# Defaults of the class VisionTransformer; `epsilon` and `distilled` are not arguments.
DEFAULTS = dict(
    img_size=224, patch_size=16, in_chans=3, num_classes=1000, global_pool='token', embed_dim=768,
    depth=12, num_heads=12, mlp_ratio=4, qkv_bias=True, qk_norm=False, scale_attn_norm=False,
    scale_mlp_norm=False, proj_bias=True, init_values=None, class_token=True, pos_embed='learn',
    no_embed_class=False, reg_tokens=0, pre_norm=False, final_norm=True, fc_norm=None,
    pool_include_prefix=False, embed_layer=None, embed_norm_layer=None, norm_layer=None,
    act_layer=None, block_fn=None, mlp_layer=None, attn_layer=None, epsilon=1e-6, distilled=False,
)  # fmt: skip
KIND = {  # of arguments in JSON, as in documents.KINDS
    **dict.fromkeys(('global_pool', 'pos_embed', 'norm_layer', 'act_layer'), 'a text'),
    **dict.fromkeys(
        ('in_chans', 'embed_dim', 'depth', 'num_heads'), 'a whole number above 0'
    ),
    **dict.fromkeys(('num_classes', 'reg_tokens'), 'a whole number'),
    **dict.fromkeys(
        ('qkv_bias', 'qk_norm', 'scale_attn_norm', 'scale_mlp_norm', 'proj_bias', 'class_token',
         'no_embed_class', 'pre_norm', 'final_norm', 'fc_norm', 'pool_include_prefix'),
        'true or false',
    ),
    'mlp_ratio': 'a number above 0', 'init_values': 'a number',
}  # fmt: skip
# Outputs of a trained model do not depend on these: rates and initialisation in training, and
# whether the weights take images of other sizes.
IRRELEVANT_ARGS = {
    'drop_rate', 'pos_drop_rate', 'patch_drop_rate', 'proj_drop_rate', 'attn_drop_rate',
    'drop_path_rate', 'weight_init', 'fix_init', 'dynamic_img_size', 'dynamic_img_pad',
    'strict_img_size',
}  # fmt: skip
# The only supported values, by argument.
ONLY = {
    'scale_attn_norm': (False,), 'scale_mlp_norm': (False,), 'final_norm': (True,),
    'embed_norm_layer': (None,), 'norm_layer': (None,), 'block_fn': (None,),
    'mlp_layer': (None, 'SwiGLUPacked'), 'attn_layer': (None,), 'embed_layer': (None,),
}  # fmt: skip
# Keys of the top level and of pretrained_cfg without effect here: the origin of the weights, other
# evaluations of timm, and names of layers to replace for another head.
IRRELEVANT = {
    'url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'tag', 'custom_load',
    'test_input_size', 'min_input_size', 'fixed_input_size', 'test_crop_pct', 'label_offset',
    'label_descriptions', 'pool_size', 'test_pool_size', 'first_conv', 'classifier', 'license',
    'description', 'origin_url', 'paper_name', 'paper_ids', 'notes', 'library_name',
}  # fmt: skip
READ = {
    'architecture', 'num_classes', 'num_features', 'global_pool', 'model_args', 'pretrained_cfg',
    'label_names', 'labels', 'problem_type', 'input_size', 'interpolation', 'crop_pct',
    'crop_mode', 'mean', 'std',
}  # fmt: skip


@functools.cache
def tables() -> dict[str, dict[str, Any]]:
    """{'architectures': {name: arguments}, 'renamed': {former name: name}}."""
    file = importlib.resources.files('vit_jax.convert.timm') / 'architectures.json'
    return json.loads(file.read_text(encoding='utf-8'))


def pretrained_setting(
    config: dict[str, Any], key: str, kind: str | None = None, default: Any = None
) -> Any:
    """A value of pretrained_cfg, else of the top level, as in older files, else `default`."""
    inner = option(config, 'pretrained_cfg', 'an object', {})
    section = inner if inner.get(key) is not None else config
    return section.get(key, default) if kind is None else option(section, key, kind, default)


def architecture(config: dict[str, Any]) -> str | None:
    """The name of a known architecture; None if the config names none; else raises UserError.

    'vit' is the class itself, whose defaults apply to arguments that model_args leave out.
    """
    name = pretrained_setting(config, 'architecture', 'a text')
    if name is None:
        return None
    known = tables()
    short = name.partition('.')[0]  # without the tag of the weights
    short = known['renamed'].get(short, short)
    if short != 'vit' and short not in known['architectures']:
        raise UserError(
            f'config.json: architecture {brief(repr(name))} is none of timm\'s VisionTransformer '
            "that is known here; if it is one of them under another name, put timm's name there"
        )
    return short


def arguments(config: dict[str, Any]) -> dict[str, Any]:
    """{argument: value} of the class: all of them if the config names an architecture.

    Otherwise only those in model_args. Raises UserError for an argument that is unknown or has an
    unsupported value.
    """
    name = architecture(config)
    given = option(config, 'model_args', 'an object', {})
    for key in given:
        if key not in DEFAULTS.keys() - {'epsilon', 'distilled'} | IRRELEVANT_ARGS:
            raise UserError(
                f'config.json: model_args has {brief(repr(key))}, which is not a known argument '
                "of timm's VisionTransformer; remove it if no output depends on it"
            )
    given = {k: v for k, v in given.items() if k not in IRRELEVANT_ARGS}
    for key, value in given.items():
        if value is None and DEFAULTS[key] is not None and key != 'pos_embed':
            raise UserError(f'config.json: {key} of model_args is null')
        option(given, key, KIND.get(key, 'anything'))
    given = normalise_arguments(given)
    args = {}
    if name is not None:
        args = DEFAULTS | pretrained_arguments(config) | tables()['architectures'].get(name, {})
    if 'norm_layer' in given and name is not None:
        args['epsilon'] = DEFAULTS['epsilon']
    args |= given
    for key, values in ONLY.items():
        if args.get(key, values[0]) not in values:
            raise UserError(refusal(key, args[key], name))
    return args


def normalise_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Replaces names of default norms and attention by None, and lower-cases act_layer."""
    given = dict(given)
    if str(given.get('norm_layer', '')).replace('_', '').lower() == 'layernorm':
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


def stated_classes(config: dict[str, Any]) -> int | None:
    """num_classes outside of model_args; as in timm, the top level precedes pretrained_cfg."""
    section = config if config.get('num_classes') is not None else option(
        config, 'pretrained_cfg', 'an object', {}
    )  # fmt: skip
    return option(section, 'num_classes', 'a whole number')


def refusal(key: str, value: Any, name: str | None) -> str:
    """The error message for an unsupported argument."""
    if value == 'HybridEmbed':
        return (
            f'config.json: {name} is a hybrid of timm: its patches are of a ResNet\'s features, '
            'which only an .npz file of google-research/vision_transformer has here'
        )
    of = f' of architecture {name}' if name else ''
    return f'config.json: {key}{of} is {brief(repr(value))}, which is not supported'


def input_size(config: dict[str, Any]) -> tuple[int, int, int] | None:
    """(channels, height, width) of pretrained_cfg, None where it has none."""
    size = pretrained_setting(config, 'input_size', 'a list')
    if size is None:
        return None
    if len(size) != 3 or not all(map(KINDS['a whole number above 0'], size)):
        raise UserError(f'config.json: input_size is {brief(size)}, not [channels, height, width]')
    return tuple(size)


def unknown_keys(config: dict[str, Any]) -> tuple[str, ...]:
    """Keys of the config, and of its pretrained_cfg, that are neither read nor irrelevant."""
    inner = option(config, 'pretrained_cfg', 'an object', {})
    keys = [*config, *(key for key in inner if key not in config)]
    return tuple(f'config.json: {brief(key)}' for key in keys if key not in READ | IRRELEVANT)


def has_settings(config: dict[str, Any]) -> bool:
    """Whether timm would take preprocessing from the config, if only by timm's defaults."""
    keys = ('pretrained_cfg', 'input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std')
    stated = any(config.get(key) is not None for key in keys)
    return bool(config) and (stated or 'model_args' not in config)


def stated_normalisation(config: dict[str, Any], channels: int) -> dict[str, tuple[float, ...]]:
    """{mean, std}, as far as the config states them."""
    stated = {}
    for key, kind in (('mean', 'a number'), ('std', 'a number above 0')):
        values = pretrained_setting(config, key)
        if values is not None:
            stated[key] = channel_values({key: values}, key, kind, channels)
    return stated


def evaluation_view(
    config: dict[str, Any], size: tuple[int, int]
) -> tuple[dict[str, Any], tuple[tuple[str, str], ...]]:
    """(view of timm's evaluation at (height, width), ((key, why), ...) that it leaves out)."""
    crop = pretrained_setting(config, 'crop_pct', 'a number above 0') or 0.875
    mode = pretrained_setting(config, 'crop_mode', 'a text', 'center')
    method = pretrained_setting(config, 'interpolation', 'a text', 'bicubic')
    ignored = []
    method = {'box': 'area'}.get(method, method)
    if method not in ('bilinear', 'bicubic', 'area'):
        ignored.append(('interpolation', f'no view here has {brief(repr(method))}, but bicubic'))
        method = 'bicubic'
    resampling = dict(method=method, antialias=True)
    resized = [min(math.floor(n / crop), MOST_PIXELS + 1) for n in size]
    supported = crop <= 1 and max(resized) <= MOST_PIXELS
    if not supported or mode not in ('center', 'squash'):
        what, value = ('crop_mode', mode) if supported else ('crop_pct', crop)
        ignored.append((what, f'no view here has {brief(repr(value))}, but the whole image'))
        return dict(name='resize', **resampling), tuple(ignored)
    if mode == 'squash':
        crop_argument = dict(crop=size[0] / resized[0], rounding='torchvision') if crop < 1 else {}
        return dict(name='resize', **crop_argument, **resampling), tuple(ignored)
    if size[0] != size[1]:
        return dict(name='central', crop=crop, **resampling), tuple(ignored)
    resampling['rounding'] = 'torchvision'
    return dict(name='small_central', smaller=resized[0], **resampling), tuple(ignored)


def label_names(config: dict[str, Any], count: int | None) -> tuple[str, ...] | None:
    """Class names by label; None if the config has none. Older files call them `labels`."""
    for key in ('label_names', 'labels'):
        for section in (config, option(config, 'pretrained_cfg', 'an object', {})):
            if section.get(key) is not None:
                return check_class_names(section[key], count, key)
    return None
