"""Checkpoints of timm's VisionTransformer: a folder with config.json, or one .safetensors file.

GELU exact, norms with epsilon 1e-6 and images in [-1, 1] unless the architecture says otherwise;
position tables are resized by the antialiased bicubic filter.
"""

import re

from vit_jax.convert.documents import KINDS, by_channel, option, size_option
from vit_jax.convert.files import brief
from vit_jax.convert.official import half, need
from vit_jax.convert.pieces import Piece, count, linear, norm
from vit_jax.errors import UserError
from vit_jax.models import vit

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CLIP = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
POOLS = {'token': 'cls', 'avg': 'gap', 'map': 'map', '': 'none'}
GELUS = {'gelu': 'exact', 'gelu_tanh': 'tanh', 'quick_gelu': 'quick'}

# What timm 1.0.31's vision_transformer.py sets for architectures apart from its defaults.
GELU_OF = (
    (r'_clip_quickgelu_', 'quick'),
    (r'patch32_siglip|large_patch16_siglip_(gap_)?512|(so400m|giantopt)_patch16_siglip', 'tanh'),
)
HEADS_OF = (
    (r'vit_base_patch16_gap_224', 16),
    (r'vit_giantopt_', 16),
    (r'test_vit2?$', 2),
    (r'test_vit[34]$', 3),
)


def matches(names):
    """Whether these are the arrays of such a file."""
    return 'patch_embed.proj.weight' in names


def heads_of(width, depth, architecture):
    """The number of heads, which fused weights do not tell; None where nothing else does."""
    for pattern, heads in HEADS_OF:
        if re.match(pattern, architecture):
            return heads
    for size in vit.SIZES.values():
        if (size['width'], size['depth']) == (width, depth):
            return size['num_heads']
    return width // 64 if width % 64 == 0 else None


def gelu_of(args, architecture, glu):
    """The kind of GELU by the arguments of a config, else by the architecture's name.

    A gated MLP has SiLU and no GELU: the default value.
    """
    known = {'silu': 'exact'} if glu else GELUS
    kind = option(args, 'act_layer', 'a text')
    if kind is not None:
        if kind not in known:
            some = ', '.join(known)
            raise UserError(f'config.json: act_layer {brief(repr(kind))} is none of {some}')
        return known[kind]
    return next((g for pattern, g in GELU_OF if re.search(pattern, architecture)), 'exact')


def family(architecture, arrays):
    """Normalisation of the inputs where the config has none: the family's."""
    if re.search(r'_clip_', architecture):
        return CLIP
    deit3 = 'blocks.0.ls1.gamma' in arrays and 'reg_token' not in arrays
    if re.match(r'(deit|.*dino)', architecture) or 'dist_token' in arrays or deit3:
        return IMAGENET
    return {}


def describe(arrays, config):
    """(kind, {field: value}) of the model, from names, shapes and what config.json has."""
    architecture = option(config, 'architecture', 'a text', '')
    args, pretrained = (
        option(config, key, 'an object', {}) for key in ('model_args', 'pretrained_cfg')
    )
    width, channels, *patch = need(arrays, 'patch_embed.proj.weight', 4)
    depth = count(arrays, r'blocks\.(\d+)\.')
    hidden = need(arrays, 'blocks.0.mlp.fc1.weight', 2)[0]
    mlp_dim = need(arrays, 'blocks.0.mlp.fc2.weight', 2)[1]
    glu = hidden == 2 * mlp_dim
    has = {name: name in arrays for name in ('cls_token', 'dist_token', 'fc_norm.weight')}
    pool = option(args, 'global_pool', 'a text')
    if pool is None:
        gap = not has['cls_token'] or (has['fc_norm.weight'] and not args.get('fc_norm'))
        pool = 'map' if 'attn_pool.latent' in arrays else 'avg' if gap else 'token'
    if pool not in POOLS:
        some = ', '.join(POOLS)
        raise UserError(f'config.json: global_pool {brief(repr(pool))} is none of {some}')
    fields = dict(
        num_classes=need(arrays, 'head.weight', 2)[0] if 'head.weight' in arrays else None,
        patch_size=tuple(patch), width=width, depth=depth, mlp_dim=mlp_dim,
        num_heads=option(args, 'num_heads', 'a whole number above 0')
        or heads_of(width, depth, architecture),
        pool=POOLS[pool], cls_token=has['cls_token'], dist_token=has['dist_token'],
        dist_head='head_dist.weight' in arrays,
        registers=need(arrays, 'reg_token', 3)[1] if 'reg_token' in arrays else 0,
        posemb='learn' if 'pos_embed' in arrays else 'none', interpolation='bicubic_antialias',
        pre_norm='norm_pre.weight' in arrays, fc_norm=has['fc_norm.weight'],
        layer_scale=option(args, 'init_values', 'a number', 1e-5)
        if 'blocks.0.ls1.gamma' in arrays else None,
        qk_norm='blocks.0.attn.q_norm.weight' in arrays,
        gelu=gelu_of(args, architecture, glu), glu=glu,
        epsilon=1e-5 if re.match(r'beit3_|.*_clip_', architecture) else 1e-6,
        **(family(architecture, arrays) if channels == 3 else half(channels)),
    )  # fmt: skip
    if 'pre_logits.fc.weight' in arrays:
        fields['representation_size'] = need(arrays, 'pre_logits.fc.weight', 2)[0]
    for key, kind in (('mean', 'a number'), ('std', 'a number above 0')):
        values = by_channel(pretrained, key, kind, channels)
        if values is not None:
            fields[key] = values
    return 'vit', fields


def table_rows(arrays):
    """(name, rows) of the position table; None without one."""
    return ('pos_embed', need(arrays, 'pos_embed', 3)[1]) if 'pos_embed' in arrays else None


def unbiased(model, arrays):
    """The arrays without the bias that a patch embedding before a norm has not in timm."""
    name = 'patch_embed.proj.bias'
    if model.pre_norm and arrays[name].any():
        raise UserError('format timm can not express a patch embedding with bias before pre_norm')
    return {n: a for n, a in arrays.items() if n != name or not model.pre_norm}


def image_size(config):
    """(height, width) that the checkpoint was made for, None where the config does not tell."""
    size = size_option(option(config, 'model_args', 'an object', {}), 'img_size')
    if size is not None:
        return size
    size = option(option(config, 'pretrained_cfg', 'an object', {}), 'input_size', 'a list')
    if size is None:
        return None
    if len(size) != 3 or not all(map(KINDS['a whole number above 0'], size)):
        raise UserError(f'config.json: input_size is {brief(size)}, not [channels, height, width]')
    return tuple(size[1:])


def pieces(model):
    """Every array of the file of a model."""
    rows = [
        Piece('patch_embed.proj.weight', 'embedding/kernel', layout='conv'),
        Piece('patch_embed.proj.bias', 'embedding/bias', layout='vector', optional=True),
    ]
    names = {'cls': 'cls_token', 'dist': 'dist_token', 'registers': 'reg_token'}
    rows += [Piece(names[name], name) for name in model.prefix]
    if model.posemb == 'learn':
        rows.append(Piece('pos_embed', 'posemb'))
    if model.pre_norm:
        rows += norm('norm_pre.', 'pre_norm', scale='weight')
    for i in range(model.depth):
        rows += block(f'blocks.{i}', (i,), model)
    rows += norm('fc_norm.' if model.fc_norm else 'norm.', 'norm', scale='weight')
    if model.pool == 'map':
        rows += map_head('attn_pool', 'map_head')
    if model.representation_size is not None:
        rows += linear('pre_logits.fc', 'pre_logits')
    if model.num_classes is not None:
        rows += linear('head', 'head')
    return rows + (linear('head_dist', 'dist_head') if model.dist_head else [])


def block(theirs, index, model):
    """An encoder block."""
    rows = [
        *norm(f'{theirs}.norm1.', 'encoder/norm1', index, scale='weight'),
        *linear(f'{theirs}.attn.qkv', 'encoder/attn/qkv', index, optional=True),
        *linear(f'{theirs}.attn.proj', 'encoder/attn/out', index, inputs=2),
        *norm(f'{theirs}.norm2.', 'encoder/norm2', index, scale='weight'),
        *linear(f'{theirs}.mlp.fc2', 'encoder/mlp/fc2', index),
    ]
    if model.glu:  # gate first
        rows += linear(f'{theirs}.mlp.fc1', 'encoder/mlp/gate', index, part=(0, 2))
        rows += linear(f'{theirs}.mlp.fc1', 'encoder/mlp/fc1', index, part=(1, 2))
    else:
        rows += linear(f'{theirs}.mlp.fc1', 'encoder/mlp/fc1', index)
    if model.qk_norm:
        for name in ('q_norm', 'k_norm'):
            rows += norm(f'{theirs}.attn.{name}.', f'encoder/attn/{name}', index, scale='weight')
    if model.layer_scale is not None:
        rows += [
            Piece(f'{theirs}.ls{n}.gamma', f'encoder/scale{n}', index) for n in (1, 2)
        ]
    return rows


def map_head(theirs, ours):
    """Attention pooling; key and value are one array there."""
    return [
        Piece(f'{theirs}.latent', f'{ours}/probe'),
        *linear(f'{theirs}.q', f'{ours}/query'),
        *(p for i, name in enumerate(('key', 'value'))
          for p in linear(f'{theirs}.kv', f'{ours}/{name}', part=(i, 2))),
        *linear(f'{theirs}.proj', f'{ours}/out', inputs=2),
        *norm(f'{theirs}.norm.', f'{ours}/norm', scale='weight'),
        *linear(f'{theirs}.mlp.fc1', f'{ours}/mlp/fc1'),
        *linear(f'{theirs}.mlp.fc2', f'{ours}/mlp/fc2'),
    ]  # fmt: skip


def limits(model):
    """{field: values that the format can express} for `save`."""
    return dict(
        epsilon=(1e-6,) if model.glu or model.dist_token else (1e-6, 1e-5),
        resnet=(None,), pool=('cls',) if model.dist_token
        else ('cls', 'gap', 'none') if model.glu else ('cls', 'gap', 'map', 'none'),
        posemb=('learn',) if model.dist_token else ('learn', 'none'), representation_size=(None,),
        dist_head=(model.dist_token,),
        # dist_token: timm's distilled model has no registers, norms or other pooling of its own
        registers=(0,) if model.dist_token else (model.registers,),
        pre_norm=(False,) if model.dist_token else (True, False),
        fc_norm=(False,) if model.dist_token else (True, False),
        registers_posemb=(model.cls_posemb,)
        if model.registers and 'cls' in model.prefix and model.posemb == 'learn'
        else (True, False),
        cls_posemb=(True,) if model.dist_token else (True, False),
    )  # fmt: skip


def config_of(model, size, classes):
    """config.json: {name: value} for timm.create_model('local-dir:...')."""
    image = list(size)
    args = dict(
        img_size=image, patch_size=list(model.patch_size), embed_dim=model.width,
        depth=model.depth, num_heads=model.num_heads,
        mlp_ratio=ratio(model.mlp_dim * (2 if model.glu else 1), model.width),
        num_classes=model.num_classes or 0,
        global_pool={v: k for k, v in POOLS.items()}[model.pool],
        class_token='cls' in model.prefix, reg_tokens=model.registers,
        no_embed_class=not model.prefix_posemb and bool(model.prefix),
        pre_norm=model.pre_norm, fc_norm=model.fc_norm, qk_norm=model.qk_norm,
        init_values=model.layer_scale, pos_embed='learn' if model.posemb == 'learn' else 'none',
        act_layer={v: k for k, v in GELUS.items()}[model.gelu],
    )  # fmt: skip
    # Epsilon and SwiGLU are no arguments in JSON: architectures that have them are the base.
    architecture = 'vit_base_patch16_clip_224' if model.epsilon == 1e-5 else 'vit_base_patch16_224'
    if model.glu:
        architecture = 'vit_giant_patch14_dinov2'
        args |= dict(act_layer='silu')
    if model.dist_token:
        architecture = 'deit_base_distilled_patch16_224'
        for key in ('class_token', 'reg_tokens', 'no_embed_class', 'pos_embed', 'pre_norm',
                    'fc_norm'):  # fmt: skip
            args.pop(key)
    config = dict(
        architecture=architecture,
        num_classes=model.num_classes or 0,
        num_features=model.width,
        model_args={k: v for k, v in args.items() if v is not None or model.glu},
        pretrained_cfg=dict(
            input_size=[len(model.mean), *image], mean=list(model.mean), std=list(model.std),
            num_classes=model.num_classes or 0,
            first_conv='patch_embed.proj',
            classifier=['head', 'head_dist'] if model.dist_head else 'head',
        ),
    )  # fmt: skip
    if classes:
        config |= dict(label_names=list(classes))
    return config


def ratio(mlp_dim, width):
    """A number that makes int(width * number) the MLP's width, as whole as can be."""
    for value in (mlp_dim / width, (mlp_dim + 0.5) / width):
        if int(width * value) == mlp_dim:
            return int(value) if value == int(value) else value
    raise UserError(f'no mlp_ratio makes {mlp_dim} of width {width}')
