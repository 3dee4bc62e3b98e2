"""timm's class VisionTransformer with the ResNet of arXiv:2010.11929 before its patches.

Kernels of the ResNet are scaled by (variance + 1e-8)^-0.5, its group norms have epsilon 1e-5.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn

from vit_jax.convert.documents import Notes, check_agreement
from vit_jax.convert.files import Array
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import Piece, affine_pieces, count_numbered
from vit_jax.convert.timm import arguments, bit, vit, vit_model
from vit_jax.errors import UserError

BACKBONE = 'patch_embed.backbone.'
# {units of the ResNet by stage: the architecture that a model with them is saved as}
ARCHITECTURES = {
    (): 'vit_tiny_r_s16_p8_224', (2, 2, 2, 2): 'vit_base_r26_s32_224',
    (3, 4, 9): 'vit_base_r50_s16_224', (3, 4, 6, 3): 'vit_large_r50_s32_224',
}  # fmt: skip


def matches(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether the arrays are those of this class."""
    return any(name.startswith(BACKBONE) for name in names)


def expresses(model: nn.Module) -> bool:
    """Whether a model is saved as one of this class."""
    return vit.expresses(model) and model.resnet is not None


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, dict[str, Any], Notes]:
    """(kind, {field: value}, Notes) of the model, from arrays (names, shapes) and config.json."""
    if BACKBONE + 'conv1.0.weight' in arrays:
        raise UserError(
            "the patches are those of timm's ResNet-D with batch norms, which no model here has"
        )
    if BACKBONE + '0.conv.weight' in arrays:
        raise UserError(
            "the patches are those of MobileCLIP's convolutions with batch norms, which no model "
            'here has'
        )
    staged = BACKBONE + 'stem.conv.weight' in arrays
    root = f'{BACKBONE}{"stem." if staged else ""}conv.weight'
    features, channels, *_ = shape_of(arrays, root, 4)
    units = ()
    if staged:
        stages = BACKBONE.replace('.', r'\.') + r'stages\.'
        units = tuple(
            count_numbered(arrays, rf'{stages}{i}\.blocks\.(\d+)\.')
            for i in range(count_numbered(arrays, rf'{stages}(\d+)\.'))
        )
    name = arguments.architecture(config, vit_model.SIGNATURE)
    if name is not None:
        check_agreement({'resnet': units_of(name)}, {'resnet': units})
    width, _, *patch = shape_of(arrays, 'patch_embed.proj.weight', 4)
    rest = {n: a for n, a in arrays.items() if not n.startswith(BACKBONE)}
    proj = rest['patch_embed.proj.weight']
    rest['patch_embed.proj.weight'] = proj._replace(shape=(width, channels, *patch))
    kind, fields, notes = vit_model.describe(rest, config)
    fields |= dict(resnet=units, resnet_width=features / 64, resnet_epsilon='timm')
    return kind, fields, notes


def units_of(name: str) -> tuple[int, ...] | str:
    """Units of the ResNet of a known architecture by stage; 'none' if it is no such hybrid."""
    for units, other in ARCHITECTURES.items():
        if name.split('_')[2:4] == other.split('_')[2:4]:
            return units
    return 'none'


table_rows = vit.table_rows
absent_biases = vit.absent_biases
complete = vit.complete


def pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays of a model's file."""
    root = BACKBONE + ('stem.' if model.resnet else '')
    rows = [
        Piece(f'{root}conv.weight', 'resnet/conv_root/kernel', layout='conv'),
        *affine_pieces(f'{root}norm', 'resnet/gn_root'),
    ]
    for i, count in enumerate(model.resnet):
        for j in range(count):
            theirs = f'{BACKBONE}stages.{i}.blocks.{j}'
            ours = f'resnet/block{i + 1}_unit{j + 1}'
            rows += bit.unit_pieces(theirs, ours, j == 0)
            if j == 0:
                rows += affine_pieces(f'{theirs}.downsample.norm', f'{ours}/gn_proj')
    return rows + vit.pieces(model)


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    return vit.limits(model) | dict(
        resnet=tuple(ARCHITECTURES), resnet_width=(1.0,), resnet_epsilon=('timm',), glu=(False,),
        epsilon=(1e-6,), dist_token=(False,),
    )  # fmt: skip


def model_config(
    model: nn.Module, size: tuple[int, int], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Content of config.json for timm.create_model('local-dir:...')."""
    config = vit.model_config(model, size, classes)
    config['pretrained_cfg']['first_conv'] = BACKBONE + ('stem.' if model.resnet else '') + 'conv'
    return config | dict(architecture=ARCHITECTURES[model.resnet])
