"""OpenCLIP's checkpoints: the image tower of open_clip_model.safetensors, as part='image'.

open_clip_config.json describes it: OpenCLIP's own ViT (`visual.*`), or a model of timm
(`visual.trunk.*`) with a projection. A key that it leaves out has its default in open_clip 3.3.
Positions are resized by antialiased bicubic interpolation.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from vit_jax.convert.assumed import CLIP
from vit_jax.convert.documents import (
    channel_values,
    check_agreement,
    check_mlp_ratio,
    option,
    size_option,
)
from vit_jax.convert.files import Array
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import Piece, count_numbered, linear_pieces, norm_pieces
from vit_jax.convert.stages import TWO_TOWERS
from vit_jax.errors import UserError
from vit_jax.io.text import brief

FILE = 'open_clip_config.json'
PATCHES, TABLE = 'visual.conv1.weight', 'visual.positional_embedding'
BLOCKS, TRUNK = 'visual.transformer.resblocks.', 'visual.trunk.'
PROJECTION = 'visual.head.proj.weight'
POOLS = {'tok': 'cls', 'avg': 'gap', 'none': 'none'}
MODES = {'shortest': 'center', 'squash': 'squash', 'longest': 'border'}  # timm's crop_mode
ONLY = {  # the only supported values of vision_cfg
    'attentional_pool': (False,), 'block_type': (None, 'default'),
    **dict.fromkeys(
        ('qk_norm', 'scaled_cosine_attn', 'scale_heads', 'scale_attn_inner', 'scale_attn',
         'scale_fc', 'input_patchnorm', 'global_average_pool'), (False,),
    ),
}  # fmt: skip
OWN = {
    'layers', 'width', 'head_width', 'mlp_ratio', 'patch_size', 'ls_init_value', 'no_ln_pre',
    'pos_embed_type', 'final_ln_after_pool', 'pool_type', 'act_kwargs', 'norm_kwargs',
}  # fmt: skip
READ = {
    'vision_cfg': {
        *ONLY, *OWN, 'image_size', 'timm_model_name', 'timm_pool', 'timm_proj', 'timm_proj_bias',
    },
    'model_cfg': {'embed_dim', 'vision_cfg', 'quick_gelu'},
    'preprocess_cfg': {'mean', 'std', 'interpolation', 'resize_mode', 'size', 'mode'},
}  # fmt: skip
# Of the text tower, of training, or without effect on the pooled output.
IRRELEVANT = {
    'text_cfg', 'custom_text', 'init_logit_scale', 'init_logit_bias', 'nonscalar_logit_scale',
    'multimodal_cfg', 'patch_dropout', 'attn_pooler_queries', 'attn_pooler_heads', 'output_tokens',
    'timm_model_pretrained', 'timm_drop', 'timm_drop_path', 'fill_color',
}  # fmt: skip


def matches(names: Mapping[str, Array]) -> bool:
    """Whether the arrays are those of a file of OpenCLIP."""
    return PATCHES in names or any(name.startswith(TRUNK) for name in names)


def sections(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(model_cfg, its vision_cfg, preprocess_cfg) of the config."""
    model = option(config, 'model_cfg', 'an object', file=FILE) or {}
    vision = option(model, 'vision_cfg', 'an object', {}, FILE)
    return model, vision, option(config, 'preprocess_cfg', 'an object', {}, FILE)


def unknown_keys(config: dict[str, Any]) -> tuple[str, ...]:
    """Keys that are neither read nor irrelevant."""
    names = ('model_cfg', 'vision_cfg', 'preprocess_cfg')
    pairs = [(name, key) for name, part in zip(names, sections(config), strict=True)
             for key in part if key not in READ[name] | IRRELEVANT]  # fmt: skip
    outer = [key for key in config if key not in ('model_cfg', 'preprocess_cfg')]
    return tuple(
        f'{FILE}: {brief(key)}' for key in (*outer, *(f'{name}.{key}' for name, key in pairs))
    )


def select(
    arrays: Mapping[str, Array], part: str | None
) -> tuple[dict[str, Array], dict[str, str]]:
    """(arrays of the image tower, {other array: why it is unused}).

    Raises UserError for a file of two towers unless `part` is given, and for other towers.
    """
    tower = {n: a for n, a in arrays.items() if n.startswith('visual.')}
    others = {n: 'outside of the image tower' for n in arrays if n not in tower}
    for name, what in (
        ('visual.layer1.0.conv1.weight', "CLIP's ResNet"),
        ('visual.attn_pool.query', 'attention pooling (attentional_pool)'),
        ('visual.head.mlp.fc1.weight', "a projection by an MLP (timm_proj 'mlp')"),
    ):
        if name in tower:
            raise UserError(f'array {name} is of {what}, which is not supported')
    if others and part is None:
        raise UserError(TWO_TOWERS)
    return tower, others


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """({field: value}, {field: why it is a guess}) of OpenCLIP's own ViT."""
    stated, vision, preprocess = sections(config)
    for key, values in ONLY.items():
        if vision.get(key, values[0]) not in values:
            raise UserError(f'{FILE}: {key} is {brief(repr(vision[key]))}, which is not supported')
    width, _, *patch = shape_of(arrays, PATCHES, 4)
    hidden = shape_of(arrays, f'{BLOCKS}0.mlp.c_fc.weight', 2)[0]
    depth = count_numbered(arrays, r'visual\.transformer\.resblocks\.(\d+)\.')
    scaled = f'{BLOCKS}0.ls_1.gamma' in arrays
    head_width = option(vision, 'head_width', 'a whole number above 0', 64, FILE)
    pool = option(vision, 'pool_type', 'a text', 'tok', FILE)
    if pool not in POOLS:
        raise UserError(f'{FILE}: pool_type {brief(repr(pool))} is none of {", ".join(POOLS)}')
    fields = dict(
        num_classes=shape_of(arrays, 'visual.proj', 2)[1] if 'visual.proj' in arrays else None,
        patch_size=tuple(patch), width=width, depth=depth, mlp_dim=hidden,
        num_heads=width // head_width or None, pool=POOLS[pool], cls_token=True,
        pre_norm='visual.ln_pre.weight' in arrays, interpolation='bicubic_antialias',
        last_norm='pooled' if vision.get('final_ln_after_pool') else 'tokens',
        layer_scale=float(option(vision, 'ls_init_value', 'a number', 1e-5, FILE))
        if scaled else None,
        gelu=gelu_of(stated, vision), epsilon=epsilon_of(vision), cls_posemb=True,
        **normalisation(preprocess),
    )  # fmt: skip
    check_config(stated, vision, fields, scaled)
    why = f'there is no {FILE}'
    guessed = ('num_heads', 'gelu', 'epsilon', 'pool', 'last_norm', 'mean', 'std')
    return fields, {} if config else dict.fromkeys(guessed, why)


def normalisation(preprocess: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    """{mean, std} of images in [0, 1]."""
    mean = channel_values(preprocess, 'mean', 'a number', 3, FILE)
    std = channel_values(preprocess, 'std', 'a number above 0', 3, FILE)
    return dict(mean=mean or CLIP['mean'], std=std or CLIP['std'])


def gelu_of(stated: dict[str, Any], vision: dict[str, Any]) -> str:
    """The kind of GELU; raises UserError for arguments that no kind here has."""
    quick = option(stated, 'quick_gelu', 'true or false', False, FILE)
    given = option(vision, 'act_kwargs', 'an object', {}, FILE)
    kinds = {} if quick else {'none': 'exact', 'tanh': 'tanh'}
    kind = option(given, 'approximate', 'a text', 'none', FILE)
    if given and (given.keys() - {'approximate'} or kind not in kinds):
        raise UserError(f'{FILE}: act_kwargs {brief(repr(given))} are not supported')
    return 'quick' if quick else kinds[kind]


def epsilon_of(vision: dict[str, Any]) -> float:
    """The epsilon of the norms; raises UserError for other arguments of theirs."""
    given = option(vision, 'norm_kwargs', 'an object', {}, FILE)
    if given.keys() - {'eps'}:
        raise UserError(f'{FILE}: norm_kwargs {brief(repr(given))} are not supported')
    return option(given, 'eps', 'a number above 0', 1e-5, FILE)


def check_config(
    stated: dict[str, Any], vision: dict[str, Any], fields: dict[str, Any], scaled: bool
) -> None:
    """Raises UserError if the arrays contradict the config; `scaled`: they have layer scales."""
    if not stated:
        return
    count = 'a whole number above 0'
    given = {key: option(vision, key, count, default, FILE)
             for key, default in (('width', 768), ('layers', 12))}  # fmt: skip
    given |= dict(
        embed_dim=option(stated, 'embed_dim', count, file=FILE),
        patch_size=size_option(vision, 'patch_size', FILE) or (16, 16),
        no_ln_pre=option(vision, 'no_ln_pre', 'true or false', False, FILE),
        ls_init_value='a layer scale' if vision.get('ls_init_value') is not None else 'none',
    )
    check_agreement(given, dict(
        width=fields['width'], layers=fields['depth'], embed_dim=fields['num_classes'],
        patch_size=fields['patch_size'], no_ln_pre=not fields['pre_norm'],
        ls_init_value='a layer scale' if scaled else 'none',
    ), FILE)  # fmt: skip
    ratio = option(vision, 'mlp_ratio', 'a number above 0', 4.0, FILE)
    check_mlp_ratio(ratio, int(fields['width'] * ratio), fields['mlp_dim'], file=FILE)


def table_rows(arrays: Mapping[str, Array]) -> tuple[str, int]:
    """(name, rows) of the position table."""
    return TABLE, shape_of(arrays, TABLE, 2)[0]


def pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays of OpenCLIP's own ViT."""
    rows = [
        Piece(PATCHES, 'embedding/kernel', layout='conv'),
        Piece('visual.conv1.bias', 'embedding/bias', layout='vector', optional=True),
        Piece('visual.class_embedding', 'cls', (0, 0)),
        Piece(TABLE, 'posemb', (0,)),
    ]
    if model.pre_norm:
        rows += norm_pieces('visual.ln_pre.', 'pre_norm', model=model)
    for i in range(model.depth):
        theirs, index = f'{BLOCKS}{i}', (i,)
        for n in (1, 2):
            rows += norm_pieces(f'{theirs}.ln_{n}.', f'encoder/norm{n}', index, model=model)
            if model.layer_scale is not None:
                rows.append(Piece(f'{theirs}.ls_{n}.gamma', f'encoder/scale{n}', index))
        rows += [
            Piece(f'{theirs}.attn.in_proj_weight', 'encoder/attn/qkv/kernel', index, 1),
            Piece(f'{theirs}.attn.in_proj_bias', 'encoder/attn/qkv/bias', index, 'vector'),
            *linear_pieces(f'{theirs}.attn.out_proj', 'encoder/attn/out', index, inputs=2),
            *linear_pieces(f'{theirs}.mlp.c_fc', 'encoder/mlp/fc1', index),
            *linear_pieces(f'{theirs}.mlp.c_proj', 'encoder/mlp/fc2', index),
        ]
    rows += norm_pieces('visual.ln_post.', 'norm', model=model)
    if model.num_classes is None:
        return rows
    return [
        *rows,
        Piece('visual.proj', 'head/kernel'),
        Piece('visual.proj_bias', 'head/bias', layout='vector', optional=True),
    ]


def trunk_config(arrays: Mapping[str, Array], config: dict[str, Any]) -> dict[str, Any]:
    """config.json of timm for the trunk; raises UserError for a pooling of OpenCLIP's own."""
    stated, vision, preprocess = sections(config)
    name = option(vision, 'timm_model_name', 'a text', file=FILE)
    if name is None:
        raise UserError(f'arrays {TRUNK}* are of a model of timm, which no {FILE} names')
    pool = option(vision, 'timm_pool', 'a text', '' if 'timm_pool' in vision else 'avg', FILE)
    proj = option(vision, 'timm_proj', 'a text', '' if 'timm_proj' in vision else 'linear', FILE)
    if pool in ('abs_attn', 'rot_attn') or proj not in ('linear', 'none', ''):
        pair = f'timm_pool {brief(repr(pool))} with timm_proj {brief(repr(proj))}'
        raise UserError(f'{FILE}: {pair} is not supported')
    args = {} if proj == 'linear' and not pool else {'global_pool': pool}
    images = {key: list(values) for key, values in normalisation(preprocess).items()}
    return dict(
        architecture=name, model_args=args,
        num_classes=0 if proj else option(stated, 'embed_dim', 'a whole number', 0, FILE),
        pretrained_cfg=dict(
            input_size=[3, *image_size(config)], **images, **view_settings(config)
        ),
    )  # fmt: skip


def view_settings(config: dict[str, Any]) -> dict[str, Any]:
    """{key: value} of timm's pretrained_cfg for the view of preprocess_cfg."""
    preprocess = sections(config)[2]
    mode = option(preprocess, 'resize_mode', 'a text', 'shortest', FILE)
    method = option(preprocess, 'interpolation', 'a text', 'bicubic', FILE)
    method = 'bicubic' if method == 'random' else method  # of training
    return dict(crop_pct=1.0, crop_mode=MODES.get(mode, mode), interpolation=method)


def image_size(config: dict[str, Any]) -> tuple[int, int] | None:
    """Image size (height, width); None without a config."""
    size = size_option(sections(config)[1], 'image_size', FILE)
    return size or ((224, 224) if config else None)


def projected_pieces(
    of_trunk: Callable[[nn.Module], list[Piece]], model: nn.Module
) -> list[Piece]:
    """Pieces of a trunk, which `of_trunk` gives for a model without a head, and its projection."""
    rows = of_trunk(model.clone(num_classes=None))
    if model.num_classes is None:
        return rows
    return [
        *rows,
        Piece(PROJECTION, 'head/kernel', layout=1),
        Piece('visual.head.proj.bias', 'head/bias', layout='vector', optional=True),
    ]
