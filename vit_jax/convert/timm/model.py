"""Infers the model from the arrays of timm's VisionTransformer and its config.json.

What neither determines is guessed, and listed as a guess in the account.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vit_jax.convert.documents import Notes, check_agreement, size_option
from vit_jax.convert.files import Array
from vit_jax.convert.official import half_normalisation, shape_of
from vit_jax.convert.pieces import count_numbered
from vit_jax.convert.timm import arguments
from vit_jax.convert.timm import config as timm_config
from vit_jax.convert.timm.config import GELUS, IMAGENET, POOLS
from vit_jax.errors import UserError
from vit_jax.io.text import brief
from vit_jax.models import block, vit

# `epsilon` (of the norms) and `distilled` are not arguments.
SIGNATURE = arguments.Signature(
    'VisionTransformer', 'architectures.json', dict(
        img_size=224, patch_size=16, in_chans=3, num_classes=1000, global_pool='token',
        embed_dim=768, depth=12, num_heads=12, mlp_ratio=4, qkv_bias=True, qk_norm=False,
        scale_attn_norm=False, scale_mlp_norm=False, proj_bias=True, init_values=None,
        class_token=True, pos_embed='learn', no_embed_class=False, reg_tokens=0, pre_norm=False,
        final_norm=True, fc_norm=None, pool_include_prefix=False, embed_layer=None,
        embed_norm_layer=None, norm_layer=None, act_layer=None, block_fn=None, mlp_layer=None,
        attn_layer=None, epsilon=1e-6, distilled=False,
    ),
    only={
        'scale_attn_norm': (False,), 'scale_mlp_norm': (False,), 'final_norm': (True,),
        'embed_norm_layer': (None,), 'norm_layer': (None,), 'block_fn': (None,),
        'mlp_layer': (None, 'SwiGLUPacked'), 'attn_layer': (None,),
        'embed_layer': (None, 'HybridEmbed'),
    },
    derived=('epsilon', 'distilled'),
)  # fmt: skip
CLIP = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))


def guess_heads(width: int, depth: int) -> int | None:
    """Guesses the number of heads, which fused weights do not show; None without a guess."""
    for size in vit.SIZES.values():
        if (size['width'], size['depth']) == (width, depth):
            return size['num_heads']
    return width // 64 if width % 64 == 0 else None


def gelu_of(args: dict[str, Any], glu: bool) -> str:
    """The kind of GELU in the arguments; 'exact' for a gated MLP, which has SiLU instead."""
    kinds = {'silu': 'exact'} if glu else GELUS
    kind = args.get('act_layer', 'silu' if glu else None) or 'gelu'
    if kind not in kinds:
        names = ', '.join(kinds)
        raise UserError(f'config.json: act_layer {brief(repr(kind))} is none of {names}')
    return kinds[kind]


def guess_normalisation(arrays: Collection[str], channels: int) -> dict[str, tuple[float, ...]]:
    """{mean, std} that the arrays suggest where no config.json states them."""
    if channels != 3:
        return half_normalisation(channels)
    if 'norm_pre.weight' in arrays:
        return CLIP
    deit3 = 'blocks.0.ls1.gamma' in arrays and 'reg_token' not in arrays
    return IMAGENET if 'dist_token' in arrays or deit3 else half_normalisation(3)


def inferred_arguments(
    arrays: Mapping[str, Array], width: int, depth: int, channels: int, patch: Sequence[int]
) -> dict[str, Any]:
    """{argument: value} of timm's class, as far as names and shapes of arrays determine it."""
    block = 'blocks.0.'
    return dict(
        embed_dim=width, depth=depth, in_chans=channels, patch_size=tuple(patch),
        qkv_bias=block + 'attn.qkv.bias' in arrays, proj_bias=block + 'attn.proj.bias' in arrays,
        qk_norm=block + 'attn.q_norm.weight' in arrays, pre_norm='norm_pre.weight' in arrays,
        class_token='cls_token' in arrays, distilled='dist_token' in arrays,
        reg_tokens=shape_of(arrays, 'reg_token', 3)[1] if 'reg_token' in arrays else 0,
        pos_embed='learn' if 'pos_embed' in arrays else 'none',
        num_classes=shape_of(arrays, 'head.weight', 2)[0] if 'head.weight' in arrays else 0,
        init_values='a layer scale' if block + 'ls1.gamma' in arrays else 'no layer scale',
    )  # fmt: skip


def check_arguments(args: dict[str, Any], inferred: dict[str, Any], hidden: int, glu: bool) -> None:
    """Raises UserError if an argument contradicts `inferred`, those that the arrays imply."""
    stated = dict(args)
    if 'init_values' in args:
        stated['init_values'] = 'a layer scale' if args['init_values'] else 'no layer scale'
    if 'patch_size' in args:
        stated['patch_size'] = size_option(args, 'patch_size')
    if 'pos_embed' in args:
        stated['pos_embed'] = args['pos_embed'] or 'none'
    check_agreement(stated, inferred)
    ratio = args.get('mlp_ratio')
    if ratio is not None and int(inferred['embed_dim'] * ratio) != hidden:
        raise UserError(
            f'config.json: mlp_ratio is {ratio}, which makes an MLP of '
            f'{int(inferred["embed_dim"] * ratio)}, but the arrays have {hidden}'
        )
    if 'mlp_layer' in args and glu != (args['mlp_layer'] is not None):
        kinds = {True: 'a gated MLP', False: 'a plain MLP'}
        raise UserError(
            f'config.json is of a model with {kinds[not glu]}, but the arrays have {kinds[glu]}'
        )


def check_unambiguous(arrays: Collection[str], inferred: dict[str, Any]) -> None:
    """Raises UserError if arrays without an architecture also fit another model of timm."""
    maps, other = 'attn_pool.latent' in arrays, None
    if maps and inferred['pre_norm']:
        other = 'vit_pe_core_*, whose rotary positions leave no array'
    elif maps and inferred['reg_tokens']:
        other = 'test_vit3, which pools its registers with the patches'
    elif inferred['init_values'] == 'no layer scale' and not (
        inferred['qkv_bias'] or inferred['class_token']
    ):
        other = 'vit_base_patch16_rpn_224, which has its norms behind attention and MLP'
    if other:
        raise UserError(
            f'a plain ViT has these arrays, and so has {other}: put a config.json beside them, '
            'with timm\'s name as {"architecture": "vit_base_patch16_224"}'
        )


def fits_pooling(pool: str, args: dict[str, Any], arrays: Collection[str]) -> bool:
    """Whether a model with timm's pooling `pool` has these arrays."""
    fc_norm = args.get('fc_norm')
    fc_norm = pool in ('avg', 'avgmax', 'max') if fc_norm is None else fc_norm
    return (
        (pool == 'map') == ('attn_pool.latent' in arrays)
        and fc_norm == ('fc_norm.weight' in arrays)
        and (pool != 'token' or 'cls_token' in arrays)
    )


def pooling(
    args: dict[str, Any], config: dict[str, Any], arrays: Collection[str]
) -> tuple[str, dict[str, str], dict[str, str]]:
    """(timm's pooling, {'pool': why it is a guess}, {'pool': why it must be given})."""
    given = (config.get('model_args') or {}).get('global_pool')
    stated = timm_config.pretrained_setting(config, 'global_pool', 'a text')
    pool = args.get('global_pool', stated)
    for value in (pool, stated):
        if value is not None and value not in POOLS:
            names = ', '.join(map(repr, POOLS))
            raise UserError(f'config.json: global_pool {brief(repr(value))} is none of {names}')
    if pool is None:
        maps, cls = 'attn_pool.latent' in arrays, 'cls_token' in arrays
        pool = 'map' if maps else 'token' if cls and 'fc_norm.weight' not in arrays else 'avg'
        why = 'the arrays of a model with a class token are the same with another pooling'
        return pool, {} if maps or not cls else {'pool': why}, {}
    if given is None and stated not in (None, pool) and fits_pooling(stated, args, arrays):
        if fits_pooling(pool, args, arrays):
            why = (
                f'config.json: global_pool is {brief(repr(stated))}, but timm builds the '
                f'architecture with {pool!r}, and the arrays fit both'
            )
            return stated, {}, {'pool': why}
        pool = stated
    if not fits_pooling(pool, args, arrays):
        raise UserError(
            f'config.json: global_pool is {pool!r} with fc_norm {args.get("fc_norm")}, which '
            'the arrays (norm, fc_norm, attn_pool, cls_token) do not fit'
        )
    return pool, {}, {}


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, dict[str, Any], Notes]:
    """(kind, {field: value}, Notes) of the model, from arrays (names, shapes) and config.json."""
    args = arguments.arguments(config, SIGNATURE)
    width, channels, *patch = shape_of(arrays, 'patch_embed.proj.weight', 4)
    depth = count_numbered(arrays, r'blocks\.(\d+)\.')
    hidden = shape_of(arrays, 'blocks.0.mlp.fc1.weight', 2)[0]
    mlp_dim = shape_of(arrays, 'blocks.0.mlp.fc2.weight', 2)[1]
    glu = hidden == 2 * mlp_dim
    inferred = inferred_arguments(arrays, width, depth, channels, patch)
    if inferred['num_classes'] == 0 and timm_config.stated_classes(config) is None:
        args.pop('num_classes', None)  # the file leaves out the head
    check_arguments(args, inferred, hidden, glu)
    if inferred['distilled'] and 'fc_norm.weight' in arrays:
        raise UserError('fc_norm: the distilled model of timm has that norm and does not use it')
    if arguments.architecture(config, SIGNATURE) is None:
        check_unambiguous(arrays, inferred)
    check_agreement({'num_features': config.get('num_features')}, {'num_features': width})
    pool, guessed, unsettled = pooling(args, config, arrays)
    prefix = inferred['class_token'] + inferred['distilled'] + inferred['reg_tokens']
    if args.get('pool_include_prefix') and pool in ('avg', 'map') and prefix:
        raise UserError('config.json: pool_include_prefix: pooling here is that of patches alone')
    fields = dict(
        num_classes=inferred['num_classes'] or None, patch_size=tuple(patch), width=width,
        depth=depth, mlp_dim=mlp_dim, num_heads=args.get('num_heads'), pool=POOLS[pool],
        cls_token=inferred['class_token'], dist_token=inferred['distilled'],
        dist_head='head_dist.weight' in arrays, registers=inferred['reg_tokens'],
        posemb=inferred['pos_embed'], interpolation='bicubic_antialias',
        pre_norm=inferred['pre_norm'],
        last_norm='pooled' if 'fc_norm.weight' in arrays else 'tokens',
        layer_scale=float(args.get('init_values') or 1e-5)
        if inferred['init_values'] == 'a layer scale' else None,
        style=style_of(inferred), gelu=gelu_of(args, glu), glu=glu,
        epsilon=args.get('epsilon', 1e-5 if inferred['pre_norm'] else 1e-6),
    )  # fmt: skip
    if 'pre_logits.fc.weight' in arrays:
        fields['representation_size'] = shape_of(arrays, 'pre_logits.fc.weight', 2)[0]
    if 'no_embed_class' in args:
        fields |= dict.fromkeys(('cls_posemb', 'registers_posemb'), not args['no_embed_class'])
    if fields['num_heads'] is None:
        fields['num_heads'] = guess_heads(width, depth)
        guessed = guessed | {'num_heads': 'fused weights do not show it'}
    if 'epsilon' not in args:
        guessed = guessed | {'epsilon': 'of the norms; arrays do not show it'}
    if 'act_layer' not in args and not glu:
        guessed = guessed | {'gelu': 'arrays do not show its kind'}
    fields, notes = with_normalisation(fields, config, channels, arrays, guessed, unsettled)
    if inferred['distilled'] and not inferred['num_classes']:
        why = "without a head timm gives the mean of both tokens, here it is the class token's"
        notes = notes._replace(ignored=(('dist_token', why),))
    return 'vit', fields, notes


def style_of(inferred: Mapping[str, Any]) -> block.Style:
    """The style of the blocks that arguments of timm's class stand for."""
    unbiased = () if inferred['qkv_bias'] else block.PROJECTIONS
    return block.Style(
        norms=('query_key',) if inferred['qk_norm'] else (),
        unbiased=unbiased if inferred['proj_bias'] else (*unbiased, 'out', 'mlp'),
    )


def with_normalisation(
    fields: dict[str, Any],
    config: dict[str, Any],
    channels: int,
    arrays: Collection[str],
    guessed: dict[str, str],
    unsettled: dict[str, str],
    default: dict[str, tuple[float, ...]] | None = None,
) -> tuple[dict[str, Any], Notes]:
    """(fields with mean and std of the images, Notes).

    Images of three channels that nothing is stated of have the `default`, if one is given.
    """
    if default is None or channels != 3:
        default = guess_normalisation(arrays, channels)
    why = 'of the images; nothing states it'
    if timm_config.has_settings(config) and channels == 3:
        default, why = IMAGENET, "of the images; config.json leaves it out: timm's default"
    stated = timm_config.stated_normalisation(config, channels)
    guessed = guessed | {key: why for key in default if key not in stated}
    notes = Notes(guessed, unsettled, (), timm_config.unknown_keys(config))
    return fields | default | stated, notes


def image_size(config: dict[str, Any]) -> tuple[int, int] | None:
    """Image size (height, width) of the checkpoint; None if the config does not state it."""
    size = size_option(config.get('model_args') or {}, 'img_size')
    if size is None:
        stated = timm_config.input_size(config)
        size = stated and stated[1:]
    return size
