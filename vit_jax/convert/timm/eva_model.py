"""Infers the model from the arrays of timm's Eva and its config.json.

Rotary positions that are not learnt leave no array: without config.json, the arrays must be those
of a known architecture.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

from vit_jax.convert.assumed import CLIP, IMAGENET, half_normalisation
from vit_jax.convert.documents import Notes, check_agreement, check_mlp_ratio, size_option
from vit_jax.convert.files import Array
from vit_jax.convert.official import shape_of
from vit_jax.convert.timm import arguments, shared
from vit_jax.convert.timm import config as timm_config
from vit_jax.convert.timm.config import POOLS
from vit_jax.convert.timm.pooling import pooling
from vit_jax.convert.timm.shared import BLOCK
from vit_jax.errors import UserError
from vit_jax.models import block, rotary
from vit_jax.models.pooling import Pool

# `epsilon` (of the norms) is not an argument.
SIGNATURE = arguments.Signature(
    'Eva', 'eva.json', dict(
        img_size=224, patch_size=16, in_chans=3, num_classes=1000, global_pool='avg',
        embed_dim=768, depth=12, num_heads=12, num_kv_heads=None, qkv_bias=True, qkv_fused=True,
        qk_norm=False, mlp_ratio=4, swiglu_mlp=False, swiglu_align_to=0, scale_mlp=False,
        scale_attn_inner=False, attn_type='eva', norm_layer=None, init_values=None,
        attn_only_layer_scale=False, class_token=True, num_reg_tokens=0, no_embed_class=False,
        use_abs_pos_emb=True, use_rot_pos_emb=False, rope_type='cat', rope_grid_offset=0,
        rope_grid_indexing='ij', rope_temperature=10_000, rope_rotate_half=False,
        use_post_norm=False, use_pre_transformer_norm=False, use_post_transformer_norm=None,
        use_fc_norm=None, attn_pool_num_heads=None, attn_pool_mlp_ratio=None, ref_feat_shape=None,
        epsilon=1e-6,
    ),
    only={
        'num_kv_heads': (None,), 'attn_only_layer_scale': (False,), 'norm_layer': (None,),
        'attn_type': ('eva', 'rope'), 'rope_type': ('cat', 'mixed', 'dinov3'),
        'rope_grid_indexing': ('ij', 'xy'),
    },
    derived=('epsilon',),
    like={'num_kv_heads': 'num_heads'},
)  # fmt: skip


def inferred_arguments(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """{argument: value} of the class, as far as names and shapes of arrays determine it."""
    gated = f'{BLOCK}mlp.fc1_g.weight' in arrays
    hidden = shape_of(arrays, f'{BLOCK}mlp.fc2.weight', 2)[1]
    first = shape_of(arrays, f'{BLOCK}mlp.{"fc1_g" if gated else "fc1"}.weight', 2)[0]
    kinds = {'eva': ('q_bias', 'q_proj.bias'), 'rope': ('qkv.bias', 'k_proj.bias')}
    found = [k for k, names in kinds.items() if any(f'{BLOCK}attn.{n}' in arrays for n in names)]
    return shared.inferred_arguments(arrays) | dict(
        qkv_bias=bool(found), attn_type=found[-1] if found else None,
        qkv_fused=f'{BLOCK}attn.qkv.weight' in arrays,
        qk_norm=f'{BLOCK}attn.q_norm.weight' in arrays,
        scale_attn_inner=f'{BLOCK}attn.norm.weight' in arrays,
        scale_mlp=f'{BLOCK}mlp.norm.weight' in arrays, swiglu_mlp=gated or first == 2 * hidden,
        use_abs_pos_emb='pos_embed' in arrays,
        num_reg_tokens=shape_of(arrays, 'reg_token', 3)[1] if 'reg_token' in arrays else 0,
        use_pre_transformer_norm='norm_pre.weight' in arrays,
        init_values=shared.SCALED if f'{BLOCK}gamma_1' in arrays else shared.UNSCALED,
        rope_type='mixed' if 'rope.freqs' in arrays else 'not mixed',
    )  # fmt: skip


def check_arguments(args: dict[str, Any], inferred: dict[str, Any], hidden: int) -> None:
    """Raises UserError if an argument contradicts `inferred`, those that the arrays imply."""
    scaled = args['init_values'] is not None and not args['use_post_norm']
    mixed = args['use_rot_pos_emb'] and args['rope_type'] == 'mixed'
    stated = args | dict(
        init_values=shared.SCALED if scaled else shared.UNSCALED,
        rope_type='mixed' if mixed else 'not mixed', patch_size=size_option(args, 'patch_size'),
    )  # fmt: skip
    if inferred['attn_type'] is None:  # without biases both kinds are the same
        stated.pop('attn_type')
    check_agreement(stated, inferred)
    size, align = int(args['embed_dim'] * args['mlp_ratio']), args['swiglu_align_to']
    if args['swiglu_mlp'] and align and not args['use_post_norm']:
        size += -size % align
    check_mlp_ratio(args['mlp_ratio'], size, hidden)


def last_norm(args: dict[str, Any], pool: str, arrays: Mapping[str, Array]) -> str:
    """`Vit.last_norm` for timm's pooling `pool`; raises UserError if the arrays contradict it."""
    pooled, tokens = args['use_fc_norm'], args['use_post_transformer_norm']
    pooled = pool == 'avg' if pooled is None else pooled
    tokens = not pooled if tokens is None else tokens
    stated = dict(use_fc_norm=pooled, use_post_transformer_norm=tokens)
    check_agreement(stated, dict(
        use_fc_norm='fc_norm.weight' in arrays, use_post_transformer_norm='norm.weight' in arrays,
    ))  # fmt: skip
    if pooled and tokens:
        raise UserError('config.json: use_fc_norm: two last norms are not supported')
    return 'pooled' if pooled else 'tokens' if tokens else 'none'


def rope_of(args: dict[str, Any]) -> rotary.Rope | None:
    """The rotary positions that arguments stand for."""
    if not args['use_rot_pos_emb']:
        return None
    kind = args['rope_type']
    return rotary.Rope(
        base=float(args['rope_temperature']),
        coordinates='centre' if kind == 'dinov3' else 'index',
        offset=0.0 if kind == 'mixed' else float(args['rope_grid_offset']),
        reference=size_option(args, 'ref_feat_shape') if kind == 'cat' else None,
        order='yx' if args['rope_grid_indexing'] == 'ij' else 'xy',
        pairs='halves' if args['rope_rotate_half'] else 'neighbours', learnt=kind == 'mixed',
    )  # fmt: skip


def style_of(args: dict[str, Any]) -> block.Style:
    """The style of the blocks that arguments stand for."""
    norms = dict(query_key='qk_norm', attention='scale_attn_inner', mlp='scale_mlp')
    unbiased = () if args['attn_type'] == 'rope' else ('key',)
    return block.Style(
        order='post' if args['use_post_norm'] else 'pre',
        norms=tuple(name for name, key in norms.items() if args[key]),
        unbiased=unbiased if args['qkv_bias'] else block.PROJECTIONS, rope=rope_of(args),
    )


def pool_style(
    args: dict[str, Any], pool: str, arrays: Mapping[str, Array], mlp_dim: int
) -> Pool:
    """Details of attention pooling, which reads all tokens; the default for other pooling."""
    if pool != 'map':
        return Pool()
    heads, hidden = args['attn_pool_num_heads'], shape_of(arrays, 'attn_pool.mlp.fc1.weight', 2)[0]
    ratio = args['attn_pool_mlp_ratio'] or args['mlp_ratio']
    check_mlp_ratio(ratio, int(args['embed_dim'] * ratio), hidden, 'attn_pool_mlp_ratio')
    return Pool(
        prefix=args['class_token'] or args['num_reg_tokens'] > 0,
        num_heads=None if heads == args['num_heads'] else heads,
        mlp_dim=None if hidden == mlp_dim else hidden,
    )


def fields_of(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """({field: value}, {field: why} guessed, {field: why} unsettled) if config.json is complete.

    Raises UserError if the arrays contradict it.
    """
    args, inferred = arguments.arguments(config, SIGNATURE), inferred_arguments(arrays)
    hidden = shape_of(arrays, f'{BLOCK}mlp.fc2.weight', 2)[1]
    if inferred['num_classes'] == 0 and timm_config.stated_classes(config) is None:
        args['num_classes'] = 0  # the file leaves out the head
    check_arguments(args, inferred, hidden)
    width, depth = args['embed_dim'], args['depth']
    check_agreement({'num_features': config.get('num_features')}, {'num_features': width})
    choice = dict(global_pool=args['global_pool'], fc_norm=args['use_fc_norm'])
    pool, guessed, unsettled = pooling(choice, config, arrays)
    scaled = inferred['init_values'] == shared.SCALED
    fields = dict(
        num_classes=args['num_classes'] or None, patch_size=inferred['patch_size'], width=width,
        depth=depth, num_heads=args['num_heads'], mlp_dim=hidden, pool=POOLS[pool],
        pool_style=pool_style(args, pool, arrays, hidden), cls_token=args['class_token'],
        registers=args['num_reg_tokens'], posemb='learn' if args['use_abs_pos_emb'] else 'none',
        **dict.fromkeys(('cls_posemb', 'registers_posemb'), not args['no_embed_class']),
        interpolation='bicubic_antialias', pre_norm=args['use_pre_transformer_norm'],
        last_norm=last_norm(args, pool, arrays),
        layer_scale=float(args['init_values']) if scaled else None, style=style_of(args),
        gelu='exact', glu=args['swiglu_mlp'], epsilon=args['epsilon'],
    )  # fmt: skip
    return fields, guessed, unsettled


def candidate(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, tuple[dict[str, Any], dict[str, str], dict[str, str]]]:
    """(name, what `fields_of` returns) of the architecture that has these arrays.

    Raises UserError for one that is not known.
    """
    stated = arguments.architecture(config, SIGNATURE)
    if stated is not None:
        return stated, fields_of(arrays, config)
    found = {}
    for name in arguments.tables(SIGNATURE)['architectures']:
        with contextlib.suppress(UserError):
            found[name] = fields_of(arrays, config | dict(architecture=name))
    if not found:
        raise UserError(
            "the arrays are those of timm's class Eva, but of no architecture that is known here: "
            'put a config.json beside them, with timm\'s name as {"architecture": '
            '"vit_base_patch16_dinov3"} and its model_args'
        )
    name, (fields, guessed, unsettled) = next(iter(found.items()))
    others = [other for other, _, _ in found.values()]
    why = f'the arrays are those of timm\'s {" and of ".join(found)}'
    unsettled = unsettled | {
        field: why for field in fields if any(other[field] != fields[field] for other in others)
    }
    why = f'of timm\'s {name}, which has such arrays'
    guessed = guessed | dict.fromkeys(('num_heads', 'style', 'epsilon', 'pool'), why)
    guessed = {field: why for field, why in guessed.items() if field not in unsettled}
    return name, (fields, guessed, unsettled)


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, dict[str, Any], Notes]:
    """(kind, {field: value}, Notes) of the model, from arrays (names, shapes) and config.json."""
    name, (fields, guessed, unsettled) = candidate(arrays, config)
    channels = arrays['patch_embed.proj.weight'].shape[1]
    default = normalisation_of(name, channels)
    fields, notes = timm_config.with_normalisation(
        fields, config, channels, default, guessed, unsettled
    )
    return 'vit', fields, notes


def normalisation_of(name: str, channels: int) -> dict[str, tuple[float, ...]]:
    """{mean, std} of timm's default_cfg of an architecture."""
    if channels != 3 or '_pe_' in name or 'reg1_gap' in name:
        return half_normalisation(channels)
    return CLIP if name.startswith('eva') or '_betwixt_' in name else IMAGENET
