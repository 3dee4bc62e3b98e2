"""What timm's VisionTransformer can express, and the config.json that says it.

JSON can't name layers of other classes or another epsilon: an architecture that has them stands in
the config, and model_args set the rest.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn

from vit_jax.convert.biases import whole_groups
from vit_jax.convert.documents import mlp_ratio
from vit_jax.convert.timm import arguments
from vit_jax.convert.timm.config import GELUS, POOL_NAMES
from vit_jax.convert.timm.vit_model import SIGNATURE
from vit_jax.models import block

ALWAYS = {  # arguments that are written even where the architecture has their value
    'img_size', 'patch_size', 'embed_dim', 'depth', 'num_heads', 'mlp_ratio', 'num_classes',
    'global_pool', 'act_layer',
}  # fmt: skip
DISTILLED = {  # {field: values} of the distilled class, which has fewer arguments
    'style.order': ('pre',), 'epsilon': (1e-6,), 'glu': (False,), 'pool': ('cls',),
    'posemb': ('learn',), 'cls_posemb': (True,), 'dist_head': (True,), 'registers': (0,),
    'pre_norm': (False,), 'patch_norm': (False,), 'last_norm': ('tokens',),
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


def has_separate_gate(model: nn.Module) -> bool:
    """Whether the file to save has an array of the gate apart, as AIMv2 has."""
    return base_architecture(model).startswith('aimv2')


def absent_biases(model: nn.Module) -> tuple[str, ...]:
    """Biases in `style.unbiased` that the file lacks as well: qkv_bias and proj_bias are flags."""
    groups = (block.PROJECTIONS, ('out', 'mlp'))
    return whole_groups(model, *groups[: 1 if model.style.order == 'parallel' else 2])


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    order, rms = model.style.order, model.style.norm == 'rms'
    norms = ('query_key',) if order == 'parallel' else ('query_key', 'attention', 'mlp')
    subsets = (itertools.combinations(norms, n) for n in range(len(norms) + 1))
    small = order == 'pre' and (rms if model.glu else not (rms or model.patch_norm))
    tied = model.registers and 'cls' in model.prefix and model.posemb == 'learn'
    allowed = {
        'style.order': ('pre', 'post', 'parallel'), 'style.norm': ('layer', 'rms'),
        'style.norms': tuple(itertools.chain(*subsets)), 'pool_style.prefix': (False, True),
    } | dict(
        epsilon=(1e-6, 1e-5) if small else (1e-6,), resnet=(None,), representation_size=(None,),
        glu=(True, False) if order == 'pre' else (False,), posemb=('learn', 'none'),
        pool=('cls', 'gap', 'none') if model.glu else ('cls', 'gap', 'map', 'none'),
        last_norm=('tokens', 'pooled', 'none'), patch_norm=(True, False), dist_head=(False,),
        registers_posemb=(model.cls_posemb,) if tied else (True, False),
    )  # fmt: skip
    return allowed | (DISTILLED if model.dist_token else {})


def model_config(
    model: nn.Module, size: tuple[int, int], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Content of config.json for timm.create_model('local-dir:...')."""
    unbiased, norms = model.style.unbiased, model.style.norms
    args = dict(
        mlp_ratio=mlp_ratio(
            model.mlp_dim * (2 if model.glu and not has_separate_gate(model) else 1), model.width
        ),
        global_pool=POOL_NAMES[model.pool],
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
    args |= norm_arguments(model, SIGNATURE.of(name))
    return document(name, args, SIGNATURE, model, size, classes)


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
    architecture: str, args: dict[str, Any], signature: arguments.Signature, model: nn.Module,
    size: tuple[int, int], classes: Sequence[str] | None,
) -> dict[str, Any]:  # fmt: skip
    """Content of config.json with the arguments that differ from those of the architecture."""
    args = dict(
        img_size=list(size), patch_size=list(model.patch_size), embed_dim=model.width,
        depth=model.depth, num_heads=model.num_heads, num_classes=model.num_classes or 0,
    ) | args  # fmt: skip
    sets = signature.of(architecture)
    args = {k: v for k, v in args.items() if k in ALWAYS or v != sets.get(k)}
    classifier = ['head', 'head_dist'] if model.dist_head else 'head'
    config = arguments.document(
        architecture, args, model, size, classes, first_conv='patch_embed.proj',
        classifier=classifier,
    )  # fmt: skip
    return config | dict(num_features=model.width)
