"""Reads config.json of timm: arguments of its VisionTransformer, preprocessing of images.

timm_architectures.json has the arguments in which each architecture of timm 1.0.31's
vision_transformer.py, deit.py and vision_transformer_hybrid.py differs from the class's defaults,
and former names of architectures.
"""

import functools
import importlib.resources
import json
import math

from vit_jax.convert.documents import KINDS, by_channel, labels, option
from vit_jax.errors import UserError
from vit_jax.io.text import brief

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
def tables():
    """{'architectures': {name: arguments}, 'renamed': {former name: name}}."""
    file = importlib.resources.files('vit_jax.convert') / 'timm_architectures.json'
    return json.loads(file.read_text(encoding='utf-8'))


def setting(config, key, kind=None, default=None):
    """A value of pretrained_cfg, else of the top level, as in older files, else `default`."""
    inner = option(config, 'pretrained_cfg', 'an object', {})
    where = inner if inner.get(key) is not None else config
    return where.get(key, default) if kind is None else option(where, key, kind, default)


def architecture(config):
    """The name of a known architecture; None if the config names none; else raises UserError.

    'vit' is the class itself, whose defaults apply to arguments that model_args leave out.
    """
    name = setting(config, 'architecture', 'a text')
    if name is None:
        return None
    known = tables()
    short = name.partition('.')[0]  # without the tag of the weights
    short = known['renamed'].get(short, short)
    if short != 'vit' and short not in known['architectures']:
        raise UserError(
            f'config.json: architecture {brief(repr(name))} is none of timm\'s VisionTransformer '
            'that is known here, so nothing tells how its arrays are used; if it is one under '
            "another name, put timm's name there"
        )
    return short


def arguments(config):
    """{argument: value} of the class: all of them if the config names an architecture.

    Otherwise only those in model_args. Raises UserError for an argument that is unknown or has an
    unsupported value.
    """
    name = architecture(config)
    given = option(config, 'model_args', 'an object', {})
    for key in given:
        if key not in DEFAULTS.keys() - {'epsilon', 'distilled'} | IRRELEVANT_ARGS:
            raise UserError(
                f'config.json: model_args has {brief(repr(key))}, which is no argument of '
                "timm's VisionTransformer that is known here; if no output depends on it, "
                'remove it there'
            )
    given = {k: v for k, v in given.items() if k not in IRRELEVANT_ARGS}
    for key, value in given.items():
        if value is None and DEFAULTS[key] is not None and key != 'pos_embed':
            raise UserError(f'config.json: {key} of model_args is null')
        option(given, key, KIND.get(key, 'anything'))
    given = plain(given)
    args = {}
    if name is not None:
        args = DEFAULTS | from_settings(config) | tables()['architectures'].get(name, {})
    if 'norm_layer' in given and name is not None:
        args['epsilon'] = DEFAULTS['epsilon']
    args |= given
    for key, values in ONLY.items():
        if args.get(key, values[0]) not in values:
            raise UserError(refusal(key, args[key], name))
    return args


def plain(given):
    """Replaces names of default norms and attention by None, and lower-cases act_layer."""
    given = dict(given)
    if str(given.get('norm_layer', '')).replace('_', '').lower() == 'layernorm':
        given['norm_layer'] = None
    if given.get('attn_layer') in ('', 'attn'):
        given['attn_layer'] = None
    if given.get('act_layer') is not None:
        given['act_layer'] = given['act_layer'].lower() or None
    return given


def from_settings(config):
    """{argument: value} that timm takes from pretrained_cfg."""
    size = input_size(config)
    args = {} if size is None else {'in_chans': size[0], 'img_size': list(size[1:])}
    count = stated_classes(config)
    return args if count is None else args | {'num_classes': count}


def stated_classes(config):
    """num_classes outside of model_args; as in timm, the top level precedes pretrained_cfg."""
    where = config if config.get('num_classes') is not None else option(
        config, 'pretrained_cfg', 'an object', {}
    )  # fmt: skip
    return option(where, 'num_classes', 'a whole number')


def refusal(key, value, name):
    """The error message for an unsupported argument."""
    if value == 'HybridEmbed':
        return (
            f'config.json: {name} is a hybrid of timm: its patches are of a ResNet\'s features, '
            'which is read of the .npz files of google-research/vision_transformer alone'
        )
    of = f' of architecture {name}' if name else ''
    return f'config.json: {key}{of} is {brief(repr(value))}, which no model here has'


def input_size(config):
    """(channels, height, width) of pretrained_cfg, None where it has none."""
    size = setting(config, 'input_size', 'a list')
    if size is None:
        return None
    if len(size) != 3 or not all(map(KINDS['a whole number above 0'], size)):
        raise UserError(f'config.json: input_size is {brief(size)}, not [channels, height, width]')
    return tuple(size)


def unknown_keys(config):
    """Keys of the config, and of its pretrained_cfg, that are neither read nor irrelevant."""
    inner = option(config, 'pretrained_cfg', 'an object', {})
    keys = [*config, *(key for key in inner if key not in config)]
    return tuple(f'config.json: {brief(key)}' for key in keys if key not in READ | IRRELEVANT)


def has_settings(config):
    """Whether timm would take preprocessing from the config, if only by timm's defaults."""
    keys = ('pretrained_cfg', 'input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std')
    stated = any(config.get(key) is not None for key in keys)
    return bool(config) and (stated or 'model_args' not in config)


def normalisation(config, channels):
    """{mean, std}, as far as the config states them."""
    stated = {}
    for key, kind in (('mean', 'a number'), ('std', 'a number above 0')):
        values = setting(config, key)
        if values is not None:
            stated[key] = by_channel({key: values}, key, kind, channels)
    return stated


def view(config, size):
    """(view of timm's evaluation at (height, width), ((key, why), ...) that it leaves out)."""
    crop = setting(config, 'crop_pct', 'a number above 0') or 0.875
    mode = setting(config, 'crop_mode', 'a text', 'center')
    method = setting(config, 'interpolation', 'a text', 'bicubic')
    ignored = []
    method = {'box': 'area'}.get(method, method)
    if method not in ('bilinear', 'bicubic', 'area'):
        ignored.append(('interpolation', f'no view here has {brief(repr(method))}, but bicubic'))
        method = 'bicubic'
    how = dict(method=method, antialias=True)
    whole = [min(math.floor(n / crop), MOST_PIXELS + 1) for n in size]
    sound = crop <= 1 and max(whole) <= MOST_PIXELS
    if not sound or mode not in ('center', 'squash'):
        what, value = ('crop_mode', mode) if sound else ('crop_pct', crop)
        ignored.append((what, f'no view here has {brief(repr(value))}, but the whole image'))
        return dict(name='resize', **how), tuple(ignored)
    if mode == 'squash':
        part = dict(crop=size[0] / whole[0], rounding='torchvision') if crop < 1 else {}
        return dict(name='resize', **part, **how), tuple(ignored)
    if size[0] != size[1]:
        return dict(name='central', crop=crop, **how), tuple(ignored)
    how['rounding'] = 'torchvision'
    return dict(name='small_central', smaller=whole[0], **how), tuple(ignored)


def label_names(config, count):
    """Class names by label; None if the config has none. Older files call them `labels`."""
    for key in ('label_names', 'labels'):
        for where in (config, option(config, 'pretrained_cfg', 'an object', {})):
            if where.get(key) is not None:
                return labels(where[key], count, key)
    return None
