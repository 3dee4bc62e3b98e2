"""timm's class ResNetV2, as far as its models are those of BiT.

Kernels are scaled by (variance + 1e-8)^-0.5, group norms have epsilon 1e-5.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn

from vit_jax.convert.assumed import half_normalisation
from vit_jax.convert.documents import Notes, check_agreement
from vit_jax.convert.files import Array
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import Piece, affine_pieces, count_numbered
from vit_jax.convert.timm import arguments
from vit_jax.convert.timm import config as timm_config
from vit_jax.convert.timm.arguments import Signature
from vit_jax.errors import UserError
from vit_jax.models import resnet

EPSILON = 1e-8
NORM = 'GroupNormAct'
SIGNATURE = Signature(
    'ResNetV2', 'bit.json',
    dict(
        layers=None, channels=[256, 512, 1024, 2048], num_classes=1000, in_chans=3,
        global_pool='avg', output_stride=32, width_factor=1, stem_chs=64, stem_type='',
        avg_down=False, preact=True, basic=False, bottle_ratio=0.25, norm_layer=NORM,
    ),
    only=dict(
        norm_layer=(NORM,), avg_down=(False,), stem_type=('fixed',), basic=(False,), preact=(True,),
        bottle_ratio=(0.25,), output_stride=(32,), global_pool=('avg',),
    ),
    features=dict(
        norm_layer='a ResNet without group norm', avg_down='shortcuts with mean pooling',
        stem_type='a root block other than that of BiT', basic='units of two convolutions',
        preact='norms after the convolutions', bottle_ratio='bottlenecks of another width',
        output_stride='dilated convolutions', global_pool='another pooling than the mean',
    ),
    derived=('norm_layer',),
)  # fmt: skip


def matches(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether the arrays are those of this class."""
    units, root = ('conv2.weight', 'norm1.weight'), {'stem.conv.weight', 'norm.weight'}
    named = arguments.known_name(config, SIGNATURE) is not None
    return {f'stages.0.blocks.0.{n}' for n in units} <= set(names) and (named or root <= set(names))


def expresses(model: nn.Module) -> bool:
    """Whether a model is saved as one of this class."""
    return isinstance(model, resnet.Bit)


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, dict[str, Any], Notes]:
    """(kind, {field: value}, Notes) of the model, from arrays (names, shapes) and config.json."""
    args = arguments.arguments(config, SIGNATURE)
    if any(name.endswith('.running_mean') for name in arrays):
        raise UserError('the arrays are those of a ResNet with batch norm, which no model here has')
    features, channels, *_ = shape_of(arrays, 'stem.conv.weight', 4)
    stages = count_numbered(arrays, r'stages\.(\d+)\.')
    units = [count_numbered(arrays, rf'stages\.{i}\.blocks\.(\d+)\.') for i in range(stages)]
    classes = shape_of(arrays, 'head.fc.weight', 4)[0] if 'head.fc.weight' in arrays else 0
    if classes == 0 and timm_config.stated_classes(config) is None:
        args.pop('num_classes', None)  # the file leaves out the head
    inferred = dict(num_classes=classes, in_chans=channels, features=features, layers=units)
    if args.get('layers') is not None:  # timm makes as many stages as there are channels
        args['layers'] = args['layers'][: len(args.get('channels') or units)]
    if 'stem_chs' in args:
        args['features'] = int(args['stem_chs'] * args.get('width_factor', 1))
    check_agreement(args, inferred)
    fields = dict(
        num_classes=classes or None, units=tuple(units), width=features / 64,
        kernel_epsilon=EPSILON,
    )  # fmt: skip
    default = half_normalisation(channels)
    return 'bit', *timm_config.with_normalisation(fields, config, channels, default, {}, {})


def table_rows(arrays: Mapping[str, Array]) -> tuple[str, int] | None:
    """None: there are no positions."""
    return None


def pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays of a model's file."""
    rows = [Piece('stem.conv.weight', 'conv_root/kernel', layout='conv')]
    for i, count in enumerate(model.units):
        for j in range(count):
            rows += unit_pieces(f'stages.{i}.blocks.{j}', f'block{i + 1}_unit{j + 1}', j == 0)
    rows += affine_pieces('norm', 'norm')
    if model.num_classes is not None:
        rows += [
            Piece('head.fc.weight', 'head/kernel', layout='pixel'),
            Piece('head.fc.bias', 'head/bias'),
        ]
    return rows


def unit_pieces(theirs: str, ours: str, projects: bool) -> list[Piece]:
    """Pieces of a bottleneck unit, which `projects` its input where it is the first of a stage."""
    rows = []
    for n in (1, 2, 3):
        rows.append(Piece(f'{theirs}.conv{n}.weight', f'{ours}/conv{n}/kernel', layout='conv'))
        rows += affine_pieces(f'{theirs}.norm{n}', f'{ours}/gn{n}')
    if projects:
        name = f'{theirs}.downsample.conv.weight'
        rows.append(Piece(name, f'{ours}/conv_proj/kernel', layout='conv'))
    return rows


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    units = [tuple(row['layers'])[: len(model.units)] for row in architectures().values()]
    return dict(units=tuple(sorted(set(units))), kernel_epsilon=(EPSILON,))


def architectures() -> dict[str, dict[str, Any]]:
    """{architecture of BiT: its arguments}."""
    known = arguments.tables(SIGNATURE)['architectures']
    return {name: row for name, row in known.items() if name.endswith('_bit')}


def model_config(
    model: nn.Module, size: tuple[int, int], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Content of config.json for timm.create_model('local-dir:...').

    Architectures fix the number of units and a factor of the width, the arguments the rest.
    """
    fitting = [
        (row['width_factor'] != model.width, row['width_factor'], sum(row['layers']), name)
        for name, row in architectures().items()
        if tuple(row['layers'])[: len(model.units)] == tuple(model.units)
    ]
    *_, name = min(fitting)
    factor = architectures()[name]['width_factor']
    root = resnet.root_features(model.width)
    args = dict(in_chans=len(model.mean), num_classes=model.num_classes or 0)
    if (factor, len(model.units)) != (model.width, 4):
        stages = resnet.stages(model.units, model.width)
        channels = [4 * inner // factor for _, inner, _ in stages]
        args |= dict(stem_chs=root // factor, channels=channels)
    return arguments.document(
        name, args, model, size, classes, first_conv='stem.conv', classifier='head.fc'
    )
