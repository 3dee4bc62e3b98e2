"""Infers the model from the arrays of timm's VisionTransformer and its config.json.

What neither determines is guessed, and listed as a guess in the account.
"""

from collections.abc import Collection, Mapping
from typing import Any

from vit_jax.convert.assumed import CLIP, IMAGENET, guess_heads, half_normalisation
from vit_jax.convert.documents import Notes
from vit_jax.convert.files import Array
from vit_jax.convert.official import shape_of
from vit_jax.convert.timm import arguments, shared
from vit_jax.convert.timm.config import GELUS, with_normalisation
from vit_jax.convert.timm.pooling import pooling
from vit_jax.convert.timm.shared import BLOCK
from vit_jax.errors import UserError
from vit_jax.io.text import brief
from vit_jax.models import block
from vit_jax.models.pooling import Pool

# `epsilon` (of the norms), `distilled` and `interpolation` (of positions) are not arguments.
SIGNATURE = arguments.Signature(
    'VisionTransformer', 'vit.json', dict(
        img_size=224, patch_size=16, in_chans=3, num_classes=1000, global_pool='token',
        embed_dim=768, depth=12, num_heads=12, mlp_ratio=4, qkv_bias=True, qk_norm=False,
        scale_attn_norm=False, scale_mlp_norm=False, proj_bias=True, init_values=None,
        class_token=True, pos_embed='learn', no_embed_class=False, reg_tokens=0, pre_norm=False,
        final_norm=True, fc_norm=None, pool_include_prefix=False, embed_layer=None,
        embed_norm_layer=None, norm_layer=None, act_layer=None, block_fn=None, mlp_layer=None,
        attn_layer=None, epsilon=1e-6, distilled=False, interpolation='bicubic_antialias',
    ),
    only=dict(
        embed_norm_layer=(None, 'LayerNorm', 'RmsNorm'), norm_layer=(None, 'RmsNorm'),
        block_fn=(None, 'ResPostBlock', 'ParallelScalingBlock'),
        mlp_layer=(None, 'SwiGLUPacked', 'SwiGLU'), attn_layer=(None,),
        embed_layer=(None, 'HybridEmbed'),
    ),
    derived=('epsilon', 'distilled', 'interpolation'),
)  # fmt: skip
SERIAL = dict(
    norm1='norm1', qkv='attn.qkv', q_norm='attn.q_norm', k_norm='attn.k_norm', out='attn.proj',
    fc1='mlp.fc1', fc2='mlp.fc2', scale1='ls1.gamma',
)  # fmt: skip
PARALLEL = dict(  # names of the layers of a ParallelScalingBlock, without the MLP's first
    norm1='in_norm', qkv='in_proj', q_norm='q_norm', k_norm='k_norm', out='attn_out_proj',
    fc2='mlp_out_proj', scale1='ls.gamma',
)  # fmt: skip
UNSUPPORTED = {  # what arrays of blocks stand for
    'attn.lambda_': arguments.DIFFERENTIAL, 'lambda_': arguments.DIFFERENTIAL,
    'attns.': arguments.FEATURES['ParallelThingsBlock'],
    'attn.gate.': 'a gate on the output of attention',
}  # fmt: skip


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
    if 'norm_pre.weight' in arrays or 'patch_embed.norm.weight' in arrays:
        return CLIP
    deit3 = f'{BLOCK}ls1.gamma' in arrays and 'reg_token' not in arrays
    return IMAGENET if 'dist_token' in arrays or deit3 else half_normalisation(3)


def check_supported(arrays: Collection[str]) -> None:
    """Raises UserError for arrays of blocks that no model here has."""
    for start, feature in UNSUPPORTED.items():
        name = next((name for name in arrays if name.startswith(BLOCK + start)), None)
        if name is not None:
            raise UserError(f'array {name} is of a model of timm with {feature}: not supported')


def norm_kind(arrays: Collection[str], name: str) -> str | None:
    """'LayerNorm' or, of a norm without a bias, 'RmsNorm'; None if the arrays lack the norm."""
    if f'{name}.weight' not in arrays:
        return None
    return 'LayerNorm' if f'{name}.bias' in arrays else 'RmsNorm'


def gated_layer(arrays: Mapping[str, Array], mlp_dim: int) -> str | None:
    """mlp_layer of a gated MLP: with its gate in an array of its own, or in one; None: plain."""
    if f'{BLOCK}mlp.fc1_g.weight' in arrays:
        return 'SwiGLU'
    packed = arrays.get(f'{BLOCK}mlp.fc1.weight')
    return 'SwiGLUPacked' if packed is not None and packed.shape[0] == 2 * mlp_dim else None


def inferred_arguments(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """{argument: value} of timm's class, as far as names and shapes of arrays determine it.

    And `mlp_dim`, the hidden size of the MLPs.
    """
    parallel = f'{BLOCK}in_proj.weight' in arrays
    names = PARALLEL if parallel else SERIAL
    layers = {key: BLOCK + name for key, name in names.items()}
    mlp_dim = shape_of(arrays, f'{layers["fc2"]}.weight', 2)[1]
    return shared.inferred_arguments(arrays) | dict(
        mlp_dim=mlp_dim,
        qkv_bias=f'{layers["qkv"]}.bias' in arrays, proj_bias=f'{layers["out"]}.bias' in arrays,
        qk_norm=f'{layers["q_norm"]}.weight' in arrays, pre_norm='norm_pre.weight' in arrays,
        scale_attn_norm=f'{BLOCK}attn.norm.weight' in arrays,
        scale_mlp_norm=f'{BLOCK}mlp.norm.weight' in arrays,
        norm_layer=norm_kind(arrays, layers['norm1']) or 'LayerNorm',
        embed_norm_layer=norm_kind(arrays, 'patch_embed.norm') or 'none',
        final_norm='norm.weight' in arrays or 'fc_norm.weight' in arrays,
        distilled='dist_token' in arrays,
        reg_tokens=shape_of(arrays, 'reg_token', 3)[1] if 'reg_token' in arrays else 0,
        pos_embed='learn' if 'pos_embed' in arrays else 'none',
        init_values=shared.SCALED if layers['scale1'] in arrays else shared.UNSCALED,
        block_fn='ParallelScalingBlock' if parallel else 'Block',
        mlp_layer=gated_layer(arrays, mlp_dim) or 'Mlp',
    )  # fmt: skip


def check_arguments(
    config: dict[str, Any], args: dict[str, Any], inferred: dict[str, Any]
) -> None:
    """Raises UserError if an argument contradicts `inferred`, those that the arrays imply."""
    stated = dict(args)
    for key, default in (('pos_embed', 'none'), ('norm_layer', 'LayerNorm'), ('block_fn', 'Block'),
                         ('embed_norm_layer', 'none'), ('mlp_layer', 'Mlp')):  # fmt: skip
        if key in args:
            stated[key] = args[key] or default
    if args.get('block_fn') == 'ResPostBlock':  # has no layer scale, but that initial value
        stated |= dict(block_fn='Block', init_values=None)
    packed = inferred['mlp_layer'] == 'SwiGLUPacked'
    shared.check_arguments(config, stated, inferred, inferred['mlp_dim'] * (2 if packed else 1))


def check_norms(config: dict[str, Any], args: dict[str, Any], inferred: dict[str, Any]) -> None:
    """Raises UserError unless the norm of the patches is of the kind of the others."""
    kind = inferred['embed_norm_layer']
    if kind == 'none':
        return
    name, given = arguments.architecture(config, SIGNATURE), config.get('model_args') or {}
    epsilon = SIGNATURE.defaults['epsilon']  # of a norm that model_args give
    if name is not None and 'embed_norm_layer' not in given:
        epsilon = SIGNATURE.of(name)['epsilon']
    if kind != inferred['norm_layer'] or args.get('epsilon', epsilon) != epsilon:
        raise UserError(
            f'config.json: embed_norm_layer is {kind} with epsilon {epsilon}, the other norms are '
            f'{inferred["norm_layer"]} with {args.get("epsilon", epsilon)}: not supported'
        )


def check_unambiguous(arrays: Collection[str], inferred: dict[str, Any]) -> None:
    """Raises UserError if arrays without an architecture also fit another model of timm."""
    maps, other = 'attn_pool.latent' in arrays, None
    if maps and inferred['pre_norm']:
        other = 'vit_pe_core_*, whose rotary positions leave no array'
    elif maps and inferred['reg_tokens']:
        other = 'test_vit3, which pools its registers with the patches'
    elif (
        (inferred['init_values'], inferred['norm_layer'], inferred['block_fn'])
        == (shared.UNSCALED, 'LayerNorm', 'Block')
        and not (inferred['qkv_bias'] or inferred['class_token'])
    ):  # fmt: skip
        other = 'vit_base_patch16_rpn_224, which has its norms after attention and MLP'
    if other:
        raise UserError(
            f'a plain ViT has these arrays, and so has {other}: put a config.json beside them, '
            'with timm\'s name as {"architecture": "vit_base_patch16_224"}'
        )


def check_combination(args: dict[str, Any], inferred: dict[str, Any], pool: str) -> None:
    """Raises UserError for features that no model here has together."""
    if inferred['block_fn'] == 'ParallelScalingBlock' and not inferred['proj_bias']:
        raise UserError('proj_bias: a parallel block without biases of its outputs: not supported')
    if args.get('block_fn') == 'ResPostBlock' and inferred['mlp_layer'] != 'Mlp':
        raise UserError('mlp_layer: a gated MLP before its norm: not supported')
    if pool == 'map' and inferred['mlp_layer'] != 'Mlp':
        raise UserError('global_pool: attention pooling with an MLP of SiLU: not supported')


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, dict[str, Any], Notes]:
    """(kind, {field: value}, Notes) of the model, from arrays (names, shapes) and config.json."""
    args = arguments.arguments(config, SIGNATURE)
    check_supported(arrays)
    inferred = inferred_arguments(arrays)
    check_arguments(config, args, inferred)
    check_norms(config, args, inferred)
    if inferred['distilled'] and 'fc_norm.weight' in arrays:
        raise UserError('fc_norm: the distilled model of timm has that norm and does not use it')
    if arguments.architecture(config, SIGNATURE) is None:
        check_unambiguous(arrays, inferred)
    pool, guessed, unsettled = pooling(args, config, arrays)
    check_combination(args, inferred, pool)
    fields = fields_of(arrays, args, inferred, pool)
    if fields['num_heads'] is None:
        fields['num_heads'] = heads_of(arrays, inferred)
        if not inferred['qk_norm']:
            guessed = guessed | {'num_heads': 'fused weights do not show it'}
    if 'epsilon' not in args:
        guessed = guessed | {'epsilon': 'of the norms; arrays do not show it'}
    if 'act_layer' not in args and not fields['glu']:
        guessed = guessed | {'gelu': 'arrays do not show its kind'}
    channels = inferred['in_chans']
    default = guess_normalisation(arrays, channels)
    fields, notes = with_normalisation(fields, config, channels, default, guessed, unsettled)
    if inferred['distilled'] and not inferred['num_classes']:
        why = "without a head timm gives the mean of both tokens, here it is the class token's"
        notes = notes._replace(ignored=(('dist_token', why),))
    return 'vit', fields, notes


def fields_of(
    arrays: Mapping[str, Array], args: dict[str, Any], inferred: dict[str, Any], pool: str
) -> dict[str, Any]:
    """{field: value} of the model; `num_heads` is None where no argument states it."""
    glu = inferred['mlp_layer'] != 'Mlp'
    prefix = inferred['class_token'] + inferred['distilled'] + inferred['reg_tokens']
    reads_prefix = bool(args.get('pool_include_prefix') and pool in ('avg', 'map') and prefix)
    small = inferred['pre_norm'] and inferred['norm_layer'] == 'LayerNorm'
    small |= inferred['mlp_layer'] == 'SwiGLU' or inferred['scale_attn_norm']
    fields = shared.fields_of(arrays, args, inferred, pool) | dict(
        mlp_dim=inferred['mlp_dim'], num_heads=args.get('num_heads'),
        pool_style=Pool(prefix=reads_prefix), dist_token=inferred['distilled'],
        dist_head='head_dist.weight' in arrays, registers=inferred['reg_tokens'],
        posemb=inferred['pos_embed'],
        interpolation=args.get('interpolation', SIGNATURE.defaults['interpolation']),
        pre_norm=inferred['pre_norm'], patch_norm=inferred['embed_norm_layer'] != 'none',
        style=style_of(args, inferred), gelu=gelu_of(args, glu), glu=glu,
        epsilon=args.get('epsilon', 1e-5 if small else 1e-6),
    )  # fmt: skip
    if 'pre_logits.fc.weight' in arrays:
        fields['representation_size'] = shape_of(arrays, 'pre_logits.fc.weight', 2)[0]
    if 'no_embed_class' in args:
        fields |= dict.fromkeys(('cls_posemb', 'registers_posemb'), not args['no_embed_class'])
    return fields


def heads_of(arrays: Mapping[str, Array], inferred: dict[str, Any]) -> int | None:
    """Number of heads by the norm of queries, else a guess; None without one."""
    names = PARALLEL if inferred['block_fn'] == 'ParallelScalingBlock' else SERIAL
    width = inferred['embed_dim']
    if inferred['qk_norm']:
        return width // shape_of(arrays, f'{BLOCK}{names["q_norm"]}.weight', 1)[0]
    if inferred['mlp_layer'] == 'SwiGLU' and width % 128 == 0:  # arXiv:2411.14402 table 1
        return width // 128
    return guess_heads(width, inferred['depth'])


def style_of(args: Mapping[str, Any], inferred: Mapping[str, Any]) -> block.Style:
    """The style of the blocks that arguments of timm's class stand for."""
    orders = {'ResPostBlock': 'post', 'ParallelScalingBlock': 'parallel'}
    kind = args.get('block_fn') or inferred['block_fn']
    norms = dict(query_key='qk_norm', attention='scale_attn_norm', mlp='scale_mlp_norm')
    unbiased = () if inferred['qkv_bias'] else block.PROJECTIONS
    return block.Style(
        order=orders.get(kind, 'pre'),
        norm='rms' if inferred['norm_layer'] == 'RmsNorm' else 'layer',
        norms=tuple(norm for norm, key in norms.items() if inferred[key]),
        unbiased=unbiased if inferred['proj_bias'] else (*unbiased, 'out', 'mlp'),
    )
