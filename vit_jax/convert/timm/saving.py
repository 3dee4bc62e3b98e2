"""What timm's VisionTransformer can express, and the config.json that says it.

JSON can't name layers of other classes or another epsilon: an architecture that has them stands in
the config, and model_args set the rest.
"""

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import flax.linen as nn

from vit_jax.convert.timm import arguments
from vit_jax.convert.timm.config import GELUS, POOLS
from vit_jax.convert.timm.model import SIGNATURE
from vit_jax.errors import UserError
from vit_jax.models import block

ALWAYS = {  # arguments that are written even where the architecture has their value
    'img_size', 'patch_size', 'embed_dim', 'depth', 'num_heads', 'mlp_ratio', 'num_classes',
    'global_pool', 'act_layer',
}  # fmt: skip
NORMS = {'layer': 'LayerNorm', 'rms': 'RmsNorm'}


def base_architecture(model: nn.Module) -> str:
    """The architecture that has what JSON can't say of a model: layers, epsilon, resizing."""
    order = model.style.order
    if model.dist_token:
        return 'deit_base_distilled_patch16_224'
    if order != 'pre':
        return {'post': 'vit_base_patch16_rpn_224', 'parallel': 'vit_base_patch16_xp_224'}[order]
    if model.glu:
        small = model.style.norm == 'rms' and model.epsilon == 1e-5
        return 'aimv2_large_patch14_224' if small else 'vit_giant_patch14_dinov2'
    if model.epsilon == 1e-5:
        return 'vit_base_patch16_clip_224'
    if model.interpolation == 'bilinear':
        return 'flexivit_base'
    if model.interpolation == 'linear' and model.last_norm == 'none':
        return 'vit_base_patch16_radio_v3'
    return 'vit_base_patch16_224'


def gate_apart(model: nn.Module) -> bool:
    """Whether gates of MLPs have arrays of their own in the file that the model is saved as."""
    return base_architecture(model).startswith('aimv2')


def absent_biases(model: nn.Module) -> tuple[str, ...]:
    """Those of `style.unbiased` that the file lacks, too: qkv_bias and proj_bias are flags."""
    lacking = whole_groups(model.style.unbiased)
    parallel = model.style.order == 'parallel'
    return tuple(n for n in lacking if n in block.PROJECTIONS) if parallel else lacking


def whole_groups(unbiased: Collection[str]) -> tuple[str, ...]:
    """Those of query, key and value, and of out and mlp, that all lack their bias."""
    groups = block.PROJECTIONS, ('out', 'mlp')
    return tuple(n for group in groups if set(group) <= set(unbiased) for n in group)


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    order, rms, dist = model.style.order, model.style.norm == 'rms', model.dist_token
    further = ('query_key',) if order == 'parallel' else ('query_key', 'attention', 'mlp')
    subsets = (itertools.combinations(further, n) for n in range(len(further) + 1))
    small = not dist and order == 'pre' and (rms if model.glu else not (rms or model.patch_norm))
    return {
        'style.order': ('pre',) if dist else ('pre', 'post', 'parallel'),
        'style.norm': ('layer', 'rms'), 'style.norms': tuple(itertools.chain(*subsets)),
        'pool_style.prefix': (False, True),
    } | dict(
        epsilon=(1e-6, 1e-5) if small else (1e-6,),
        glu=(True, False) if order == 'pre' and not dist else (False,),
        resnet=(None,), pool=('cls',) if dist
        else ('cls', 'gap', 'none') if model.glu else ('cls', 'gap', 'map', 'none'),
        posemb=('learn',) if dist else ('learn', 'none'), representation_size=(None,),
        dist_head=(dist,),
        # dist_token: timm's distilled model has no registers, norms or other pooling of its own
        registers=(0,) if dist else (model.registers,),
        pre_norm=(False,) if dist else (True, False), patch_norm=(False,) if dist
        else (True, False),
        last_norm=('tokens',) if dist else ('tokens', 'pooled', 'none'),
        registers_posemb=(model.cls_posemb,)
        if model.registers and 'cls' in model.prefix and model.posemb == 'learn'
        else (True, False),
        cls_posemb=(True,) if dist else (True, False),
    )  # fmt: skip


def model_config(
    model: nn.Module, size: tuple[int, int], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Content of config.json for timm.create_model('local-dir:...')."""
    unbiased, norms = model.style.unbiased, model.style.norms
    args = dict(
        mlp_ratio=mlp_ratio(
            model.mlp_dim * (2 if model.glu and not gate_apart(model) else 1), model.width
        ),
        global_pool={v: k for k, v in POOLS.items()}[model.pool],
        act_layer='silu' if model.glu else {v: k for k, v in GELUS.items()}[model.gelu],
        class_token='cls' in model.prefix, reg_tokens=model.registers,
        no_embed_class=not model.prefix_posemb and bool(model.prefix),
        pre_norm=model.pre_norm, final_norm=model.last_norm != 'none',
        fc_norm=model.last_norm == 'pooled', pool_include_prefix=model.pool_style.prefix,
        qkv_bias='query' not in unbiased, proj_bias='out' not in unbiased,
        qk_norm='query_key' in norms, scale_attn_norm='attention' in norms,
        scale_mlp_norm='mlp' in norms, init_values=model.layer_scale,
        pos_embed='learn' if model.posemb == 'learn' else 'none',
    )  # fmt: skip
    if model.dist_token:  # other arguments are not those of its class
        args = {key: args[key] for key in ('mlp_ratio', 'global_pool', 'act_layer', 'qkv_bias',
                                           'proj_bias', 'qk_norm', 'init_values',
                                           'scale_attn_norm', 'scale_mlp_norm')}  # fmt: skip
    name = base_architecture(model)
    sets = SIGNATURE.defaults | arguments.tables(SIGNATURE)['architectures'][name]
    args |= norm_arguments(model, sets)
    return document(name, args, sets, model, size, classes)


def norm_arguments(model: nn.Module, sets: dict[str, Any]) -> dict[str, str]:
    """Arguments for the model's kinds of norms where they are not what the architecture `sets`."""
    kind, epsilon = NORMS[model.style.norm], model.epsilon
    args = {}
    if (sets['norm_layer'] or 'LayerNorm', sets['epsilon']) != (kind, epsilon):
        args['norm_layer'] = kind.lower()
    of_patches = sets['embed_norm_layer'] and (sets['embed_norm_layer'], sets['epsilon'])
    if of_patches != ((kind, epsilon) if model.patch_norm else None):
        args['embed_norm_layer'] = kind.lower() if model.patch_norm else ''
    return args


def document(
    architecture: str, args: dict[str, Any], sets: dict[str, Any], model: nn.Module,
    size: tuple[int, int], classes: Sequence[str] | None,
) -> dict[str, Any]:  # fmt: skip
    """Content of config.json with those arguments that are not what the architecture `sets`."""
    image, count = list(size), model.num_classes or 0
    args = dict(
        img_size=image, patch_size=list(model.patch_size), embed_dim=model.width,
        depth=model.depth, num_heads=model.num_heads, num_classes=count,
    ) | args  # fmt: skip
    config = dict(
        architecture=architecture,
        num_classes=count,
        num_features=model.width,
        model_args={k: v for k, v in args.items() if k in ALWAYS or v != sets.get(k)},
        pretrained_cfg=dict(
            input_size=[len(model.mean), *image], mean=list(model.mean), std=list(model.std),
            num_classes=count,
            first_conv='patch_embed.proj',
            classifier=['head', 'head_dist'] if model.dist_head else 'head',
        ),
    )  # fmt: skip
    return config | (dict(label_names=list(classes)) if classes else {})


def mlp_ratio(mlp_dim: int, width: int) -> int | float:
    """A number with int(width * number) == mlp_dim, an integer if possible; raises UserError."""
    for value in (mlp_dim / width, (mlp_dim + 0.5) / width):
        if int(width * value) == mlp_dim:
            return int(value) if value == int(value) else value
    raise UserError(f'no mlp_ratio makes {mlp_dim} of width {width}')
