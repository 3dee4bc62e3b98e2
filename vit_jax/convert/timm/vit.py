"""timm's classes VisionTransformer and VisionTransformerDistilled.

GELU is exact, norms have epsilon 1e-6 and images are in [-1, 1], unless the architecture differs.
Position tables are resized by antialiased bicubic interpolation.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from vit_jax.convert.documents import Notes
from vit_jax.convert.files import Array
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import Piece, linear_pieces, norm_pieces
from vit_jax.convert.timm import arguments
from vit_jax.convert.timm import model as model_of
from vit_jax.convert.timm.config import GELUS, POOLS
from vit_jax.errors import UserError
from vit_jax.models import block, vit


def matches(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether the arrays are those of this class."""
    return 'patch_embed.proj.weight' in names


def expresses(model: nn.Module) -> bool:
    """Whether a model is saved as one of this class."""
    return isinstance(model, vit.Vit)


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, dict[str, Any], Notes]:
    """(kind, {field: value}, Notes) of the model, from arrays (names, shapes) and config.json."""
    if arguments.arguments(config, model_of.SIGNATURE).get('embed_layer') is not None:
        raise UserError('config.json names a hybrid, but the arrays have no ResNet')
    return model_of.describe(arrays, config)


def table_rows(arrays: Mapping[str, Array]) -> tuple[str, int] | None:
    """(name, rows) of the position table; None without one."""
    return ('pos_embed', shape_of(arrays, 'pos_embed', 3)[1]) if 'pos_embed' in arrays else None


def absent_biases(model: nn.Module) -> tuple[str, ...]:
    """Those of `style.unbiased` that the file lacks, too: qkv_bias and proj_bias are flags."""
    return whole_groups(model.style.unbiased)


def whole_groups(unbiased: Collection[str]) -> tuple[str, ...]:
    """Those of query, key and value, and of out and mlp, that all lack their bias."""
    groups = block.PROJECTIONS, ('out', 'mlp')
    return tuple(n for group in groups if set(group) <= set(unbiased) for n in group)


def complete(model: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays without the bias of a patch embedding before a norm, which timm lacks.

    Raises UserError unless it is zero.
    """
    name = 'patch_embed.proj.bias'
    if model.pre_norm and arrays[name].any():
        raise UserError('format timm cannot express a patch embedding with bias before pre_norm')
    return {n: a for n, a in arrays.items() if n != name or not model.pre_norm}


def pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays of a model's file."""
    rows = stem_pieces(model)
    for i in range(model.depth):
        rows += block_pieces(f'blocks.{i}', (i,), model)
    return rows + head_pieces(model)


def stem_pieces(model: nn.Module) -> list[Piece]:
    """Pieces of what comes before the blocks."""
    rows = [
        Piece('patch_embed.proj.weight', 'embedding/kernel', layout='conv'),
        Piece('patch_embed.proj.bias', 'embedding/bias', layout='vector', optional=True),
    ]
    names = {'cls': 'cls_token', 'dist': 'dist_token', 'registers': 'reg_token'}
    rows += [Piece(names[name], name) for name in model.prefix]
    if model.posemb == 'learn':
        rows.append(Piece('pos_embed', 'posemb'))
    return rows + (norm_pieces('norm_pre.', 'pre_norm', model=model) if model.pre_norm else [])


def head_pieces(model: nn.Module) -> list[Piece]:
    """Pieces of what comes after the blocks."""
    rows = []
    if model.last_norm != 'none':
        name = 'norm.' if model.last_norm == 'tokens' else 'fc_norm.'
        rows += norm_pieces(name, 'norm', model=model)
    if model.pool == 'map':
        rows += map_head_pieces('attn_pool', 'map_head', model)
    if model.representation_size is not None:
        rows += linear_pieces('pre_logits.fc', 'pre_logits')
    if model.num_classes is not None:
        rows += linear_pieces('head', 'head')
    return rows + (linear_pieces('head_dist', 'dist_head') if model.dist_head else [])


def block_pieces(theirs: str, index: tuple, model: nn.Module) -> list[Piece]:
    """Pieces of an encoder block."""
    unbiased = model.style.unbiased
    qkv, out, mlp = ('query' not in unbiased, 'out' not in unbiased, 'mlp' not in unbiased)
    rows = [
        *norm_pieces(f'{theirs}.norm1.', 'encoder/norm1', index, model=model),
        *linear_pieces(f'{theirs}.attn.qkv', 'encoder/attn/qkv', index, bias=qkv),
        *linear_pieces(f'{theirs}.attn.proj', 'encoder/attn/out', index, inputs=2, bias=out),
        *norm_pieces(f'{theirs}.norm2.', 'encoder/norm2', index, model=model),
        *linear_pieces(f'{theirs}.mlp.fc2', 'encoder/mlp/fc2', index, bias=mlp),
    ]
    if model.glu:  # gate first
        rows += linear_pieces(f'{theirs}.mlp.fc1', 'encoder/mlp/gate', index, part=(0, 2),
                              bias=mlp)
        rows += linear_pieces(f'{theirs}.mlp.fc1', 'encoder/mlp/fc1', index, part=(1, 2),
                              bias=mlp)
    else:
        rows += linear_pieces(f'{theirs}.mlp.fc1', 'encoder/mlp/fc1', index, bias=mlp)
    if 'query_key' in model.style.norms:
        for name in ('attn.q_norm', 'attn.k_norm'):
            ours = f'encoder/{name.replace(".", "/")}'
            rows += norm_pieces(f'{theirs}.{name}.', ours, index, model=model)
    if model.layer_scale is not None:
        rows += [
            Piece(f'{theirs}.ls{n}.gamma', f'encoder/scale{n}', index) for n in (1, 2)
        ]
    return rows


def map_head_pieces(theirs: str, ours: str, model: nn.Module) -> list[Piece]:
    """Pieces of attention pooling; timm stores key and value in one array."""
    return [
        Piece(f'{theirs}.latent', f'{ours}/probe'),
        *linear_pieces(f'{theirs}.q', f'{ours}/query'),
        *(p for i, name in enumerate(('key', 'value'))
          for p in linear_pieces(f'{theirs}.kv', f'{ours}/{name}', part=(i, 2))),
        *linear_pieces(f'{theirs}.proj', f'{ours}/out', inputs=2),
        *norm_pieces(f'{theirs}.norm.', f'{ours}/norm', model=model),
        *linear_pieces(f'{theirs}.mlp.fc1', f'{ours}/mlp/fc1'),
        *linear_pieces(f'{theirs}.mlp.fc2', f'{ours}/mlp/fc2'),
    ]  # fmt: skip


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    return {'style.norms': ((), ('query_key',))} | dict(
        epsilon=(1e-6,) if model.glu or model.dist_token else (1e-6, 1e-5),
        resnet=(None,), pool=('cls',) if model.dist_token
        else ('cls', 'gap', 'none') if model.glu else ('cls', 'gap', 'map', 'none'),
        posemb=('learn',) if model.dist_token else ('learn', 'none'), representation_size=(None,),
        dist_head=(model.dist_token,),
        # dist_token: timm's distilled model has no registers, norms or other pooling of its own
        registers=(0,) if model.dist_token else (model.registers,),
        pre_norm=(False,) if model.dist_token else (True, False),
        last_norm=('tokens',) if model.dist_token else ('tokens', 'pooled'),
        registers_posemb=(model.cls_posemb,)
        if model.registers and 'cls' in model.prefix and model.posemb == 'learn'
        else (True, False),
        cls_posemb=(True,) if model.dist_token else (True, False),
    )  # fmt: skip


def model_config(
    model: nn.Module, size: tuple[int, int], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Content of config.json for timm.create_model('local-dir:...')."""
    image = list(size)
    args = dict(
        img_size=image, patch_size=list(model.patch_size), embed_dim=model.width,
        depth=model.depth, num_heads=model.num_heads,
        mlp_ratio=mlp_ratio(model.mlp_dim * (2 if model.glu else 1), model.width),
        num_classes=model.num_classes or 0,
        global_pool={v: k for k, v in POOLS.items()}[model.pool],
        class_token='cls' in model.prefix, reg_tokens=model.registers,
        no_embed_class=not model.prefix_posemb and bool(model.prefix),
        pre_norm=model.pre_norm, fc_norm=model.last_norm == 'pooled',
        qk_norm='query_key' in model.style.norms,
        init_values=model.layer_scale, pos_embed='learn' if model.posemb == 'learn' else 'none',
        act_layer={v: k for k, v in GELUS.items()}[model.gelu],
    )  # fmt: skip
    # JSON cannot set epsilon and SwiGLU: start from architectures that have them.
    architecture = 'vit_base_patch16_clip_224' if model.epsilon == 1e-5 else 'vit_base_patch16_224'
    if 'query' in model.style.unbiased:
        args['qkv_bias'] = False
    if 'out' in model.style.unbiased:
        args['proj_bias'] = False
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


def mlp_ratio(mlp_dim: int, width: int) -> int | float:
    """A number with int(width * number) == mlp_dim, an integer if possible; raises UserError."""
    for value in (mlp_dim / width, (mlp_dim + 0.5) / width):
        if int(width * value) == mlp_dim:
            return int(value) if value == int(value) else value
    raise UserError(f'no mlp_ratio makes {mlp_dim} of width {width}')
