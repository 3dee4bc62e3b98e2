"""timm's class NaFlexVit, for images of one size.

A model is saved as timm's VisionTransformer, which has the same outputs at that size.
"""

from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from vit_jax.convert.documents import Notes, check_agreement, check_mlp_ratio, size_option
from vit_jax.convert.files import Array
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import Piece
from vit_jax.convert.timm import arguments, vit, vit_model
from vit_jax.convert.timm.arguments import Signature
from vit_jax.convert.timm.config import POOLS, with_normalisation
from vit_jax.errors import UserError, shown
from vit_jax.models import pooling

NAMES = {f'embeds.{n}': n for n in ('cls_token', 'reg_token', 'pos_embed')} | {
    f'embeds.proj.{n}': f'patch_embed.proj.{n}' for n in ('weight', 'bias')
}
AXES = 'embeds.pos_embed_y', 'embeds.pos_embed_x'
MOST_SIDE = 256  # of a table summed from rows and columns, which has h * w positions for h + w
METHODS = {  # interpolation, by (pos_embed_interp_mode, antialias, align_corners)
    ('bicubic', True, False): 'bicubic_antialias', ('bicubic', False, False): 'bicubic',
    ('bilinear', True, False): 'bilinear_antialias', ('bilinear', False, False): 'bilinear',
    ('bilinear', False, True): 'linear',
}  # fmt: skip
SIGNATURE = Signature(
    'NaFlexVit', 'naflex.json',
    dict(
        img_size=None, in_chans=3, num_classes=1000, patch_size=16, embed_dim=768, depth=12,
        num_heads=12, mlp_ratio=4.0, scale_mlp_norm=False, num_kv_heads=None, qkv_bias=True,
        qk_norm=False, proj_bias=True, scale_attn_inner_norm=False, init_values=None,
        class_token=False, reg_tokens=0, pos_embed='learned', pos_embed_grid_size=[16, 16],
        pos_embed_interp_mode='bicubic', pos_embed_ar_preserving=False, pos_embed_antialias=True,
        pos_embed_align_corners=False, rope_type='', patchify_channels_last=True, pre_norm=False,
        final_norm=True, fc_norm=None, global_pool='map', pool_include_prefix=False,
        attn_pool_num_heads=None, attn_pool_mlp_ratio=None, embed_proj_type='linear',
        input_norm_layer=None, embed_norm_layer=None, norm_layer=None, act_layer=None,
        block_fn=None, mlp_layer=None, attn_layer=None, attn_type='standard', attn_gated=False,
        swiglu_mlp=False, qkv_fused=True, attn_only_layer_scale=False, epsilon=1e-6,
    ),
    only=dict(
        rope_type=('', 'none', None), num_kv_heads=(None,), scale_mlp_norm=(False,),
        scale_attn_inner_norm=(False,), patchify_channels_last=(True,),
        embed_proj_type=('linear',), input_norm_layer=(None,), embed_norm_layer=(None,),
        norm_layer=(None,), block_fn=(None,), mlp_layer=(None,), attn_layer=(None,),
        attn_type=('standard',), attn_gated=(False,), swiglu_mlp=(False,), qkv_fused=(True,),
        attn_only_layer_scale=(False,), global_pool=tuple(POOLS),
    ),
    features=dict(
        rope_type='rotary positions of NaFlexVit', num_kv_heads='grouped queries',
        scale_mlp_norm='a norm within the MLP of NaFlexVit',
        scale_attn_inner_norm='a norm within the attention of NaFlexVit',
        patchify_channels_last='patches with channels first',
        embed_proj_type='patches of NaFlexVit by a convolution',
        input_norm_layer='a norm of the pixels of a patch',
        embed_norm_layer='a norm of the embedded patches of NaFlexVit',
        norm_layer='another norm than layer norm', attn_gated='gated attention',
        swiglu_mlp="EVA's gated MLP in NaFlexVit", qkv_fused='separate projections of NaFlexVit',
        attn_only_layer_scale='layer scale of attention alone',
    ),
    derived=('epsilon',),
)  # fmt: skip


def matches(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether the arrays are those of this class."""
    return 'embeds.proj.weight' in names


def expresses(model: nn.Module) -> bool:
    """False: such a model is saved as one of VisionTransformer."""
    return False


def current_arrays(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays under names of VisionTransformer, with a position table [1, h * w, D]."""
    arrays = dict(arrays)
    if set(AXES) <= arrays.keys():
        y, x = (arrays.pop(name) for name in AXES)
        arrays['embeds.pos_embed'] = summed(y, x)
    table = arrays.get('embeds.pos_embed')
    if table is not None and len(table.shape) == 4:
        one, h, w, width = table.shape
        arrays['embeds.pos_embed'] = table._replace(shape=(one, h * w, width))
    return {NAMES.get(name, name): array for name, array in arrays.items()}


def summed(y: Array, x: Array) -> Array:
    """The table [1, h, w, D] of sums of positions of rows [1, h, D] and of columns [1, w, D].

    Raises UserError for more than MOST_SIDE rows or columns.
    """
    if len(y.shape) != 3 or len(x.shape) != 3 or y.shape[::2] != x.shape[::2]:
        raise UserError(f'arrays {" and ".join(AXES)} are {list(y.shape)} and {list(x.shape)}')
    if max(y.shape[1], x.shape[1]) > MOST_SIDE:
        raise UserError(
            f'arrays {" and ".join(AXES)} are of {y.shape[1]} x {x.shape[1]} patches, at most '
            f'{MOST_SIDE} x {MOST_SIDE} are supported'
        )

    def fill(out: np.ndarray) -> None:
        rows, columns = y.read(AXES[0]), x.read(AXES[1])
        table = rows[:, :, None].astype(np.float32) + columns[:, None].astype(np.float32)
        out[...] = table.reshape(-1).view(np.uint8)

    shape = (y.shape[0], y.shape[1], x.shape[1], y.shape[2])
    return Array(shape, 'F32', fill, np.dtype('float32'))


def table_size(arrays: Mapping[str, Array], config: dict[str, Any]) -> tuple[int, int] | None:
    """Image size (height, width) that the file's position table fits; None without a table."""
    if set(AXES) <= arrays.keys():
        grid = tuple(shape_of(arrays, name, 3)[1] for name in AXES)
    elif 'embeds.pos_embed' in arrays:
        grid = shape_of(arrays, 'embeds.pos_embed', 4)[1:3]
    else:
        return None
    args = stated_arguments(config)
    stated = size_option(args, 'pos_embed_grid_size')
    check_agreement({'pos_embed_grid_size': stated}, {'pos_embed_grid_size': grid})
    patch = size_option(args, 'patch_size')
    return grid[0] * patch[0], grid[1] * patch[1]


def stated_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """{argument: value} of the class; raises UserError without an architecture."""
    if arguments.architecture(config, SIGNATURE) is None:
        raise UserError(
            'the arrays are those of timm\'s NaFlexVit, and do not show the size of its patches: '
            'put a config.json beside them, with timm\'s name as '
            '{"architecture": "naflexvit_base_patch16_gap"}'
        )
    return arguments.arguments(config, SIGNATURE)


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, dict[str, Any], Notes]:
    """(kind, {field: value}, Notes) of the model, from arrays (names, shapes) and config.json.

    `arrays` are `current_arrays`.
    """
    args = stated_arguments(config)
    width, inputs = shape_of(arrays, 'patch_embed.proj.weight', 2)
    patch, channels = size_option(args, 'patch_size'), args['in_chans']
    check_agreement(
        {'patch_size and in_chans': patch[0] * patch[1] * channels},
        {'patch_size and in_chans': inputs},
    )
    mlp_dim = shape_of(arrays, 'blocks.0.mlp.fc1.weight', 2)[0]
    proj = arrays['patch_embed.proj.weight']._replace(shape=(width, channels, *patch))
    inferred = vit_model.inferred_arguments({**arrays, 'patch_embed.proj.weight': proj})
    learnt = 'none' if args['pos_embed'] in ('', 'none') else 'learn'
    vit_model.check_arguments(config, args | dict(pos_embed=learnt), inferred)
    check_agreement(
        {'final_norm and fc_norm': last_norm(args)}, {'final_norm and fc_norm': norm_of(arrays)}
    )
    maps, pool = 'attn_pool.latent' in arrays, args['global_pool']
    if maps != (pool == 'map'):
        what = 'attention pooling' if maps else 'no attention pooling'
        raise UserError(f'config.json: global_pool is {pool!r}, but the arrays have {what}')
    interpolation, square = resizing(args)
    fields = dict(
        num_classes=inferred['num_classes'] or None, patch_size=patch, width=width,
        depth=inferred['depth'], mlp_dim=mlp_dim, num_heads=args['num_heads'],
        pool=POOLS[args['global_pool']], pool_style=pool_style(args, arrays, mlp_dim),
        cls_token=inferred['class_token'],
        registers=inferred['reg_tokens'], posemb=learnt, cls_posemb=False, registers_posemb=False,
        interpolation=interpolation, square_posemb=square, pre_norm=inferred['pre_norm'],
        last_norm=last_norm(args), style=vit_model.style_of(args, inferred),
        layer_scale=float(args['init_values'] or 1e-5) if args['init_values'] is not None else None,
        gelu=vit_model.gelu_of(args, False), epsilon=1e-6,
    )  # fmt: skip
    default = vit_model.guess_normalisation(arrays, channels)
    return 'vit', *with_normalisation(fields, config, channels, default, {}, {})


def last_norm(args: Mapping[str, Any]) -> str:
    """`Vit.last_norm` by the arguments."""
    pooled = args['global_pool'] == 'avg' if args['fc_norm'] is None else args['fc_norm']
    return ('pooled' if pooled else 'tokens') if args['final_norm'] else 'none'


def norm_of(arrays: Collection[str]) -> str:
    """`Vit.last_norm` by the arrays."""
    names = {'norm.weight': 'tokens', 'fc_norm.weight': 'pooled'}
    return next((kind for name, kind in names.items() if name in arrays), 'none')


def resizing(args: Mapping[str, Any]) -> tuple[str, bool]:
    """(interpolation of the position table, whether to a square of which a part is taken)."""
    mode, antialias, aligned = (
        args[f'pos_embed_{key}'] for key in ('interp_mode', 'antialias', 'align_corners')
    )
    if args['pos_embed'] == 'factorized':  # timm resizes rows and columns linearly
        mode, antialias, aligned = 'bilinear', False, False
    if (mode, antialias, aligned) not in METHODS:
        raise UserError(
            f'config.json: pos_embed_interp_mode is {shown(mode)} with antialias {antialias} and '
            f'align_corners {aligned}, which is not supported'
        )
    return METHODS[mode, antialias, aligned], args['pos_embed_ar_preserving']


def pool_style(
    args: Mapping[str, Any], arrays: Mapping[str, Array], mlp_dim: int
) -> pooling.Pool:
    """Details of pooling."""
    heads = hidden = None
    if args['global_pool'] == 'map':
        heads = args['attn_pool_num_heads']
        hidden = shape_of(arrays, 'attn_pool.mlp.fc1.weight', 2)[0]
        ratio = args['attn_pool_mlp_ratio'] or args['mlp_ratio']
        width = arrays['attn_pool.mlp.fc1.weight'].shape[1]
        check_mlp_ratio(ratio, int(width * ratio), hidden, 'attn_pool_mlp_ratio')
    reads_all = args['pool_include_prefix'] and args['global_pool'] in ('avg', 'map')
    return pooling.Pool(
        reads_all, None if heads == args['num_heads'] else heads,
        None if hidden == mlp_dim else hidden,
    )  # fmt: skip


table_rows = vit.table_rows


def pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays of a model's file, under the names of `current_arrays`."""
    return [
        p._replace(layout=3) if p.theirs == 'patch_embed.proj.weight' else p
        for p in vit.pieces(model)
    ]
