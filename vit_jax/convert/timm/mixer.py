"""timm's class MlpMixer, as far as its blocks are those of MLP-Mixer.

GELU is exact, norms have epsilon 1e-6.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn

from vit_jax.convert.assumed import half_normalisation
from vit_jax.convert.documents import Notes, check_agreement, mlp_ratio, size_option
from vit_jax.convert.files import Array
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import Piece, affine_pieces, count_numbered, linear_pieces
from vit_jax.convert.timm import arguments
from vit_jax.convert.timm import config as timm_config
from vit_jax.convert.timm.arguments import Signature
from vit_jax.errors import UserError
from vit_jax.io.text import brief
from vit_jax.models import mixer

GATED = "gMixer's gated MLPs"
SIGNATURE = Signature(
    'MlpMixer', 'mixer.json',
    dict(
        num_classes=1000, img_size=224, in_chans=3, patch_size=16, num_blocks=8, embed_dim=512,
        mlp_ratio=[0.5, 4.0], block_layer='MixerBlock', mlp_layer='Mlp', stem_norm=False,
        global_pool='avg',
    ),
    only=dict(
        block_layer=('MixerBlock',), mlp_layer=('Mlp',), stem_norm=(False,), global_pool=('avg',)
    ),
    features=dict(
        block_layer='blocks of ResMLP or gMLP', mlp_layer=GATED,
        stem_norm='a norm of the embedded patches', global_pool='another pooling than the mean',
    ),
    kinds={'mlp_ratio': 'anything'}, derived=('block_layer', 'mlp_layer'),
)  # fmt: skip


def matches(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether the arrays are those of this class."""
    return 'blocks.0.mlp_channels.fc1.weight' in names


def expresses(model: nn.Module) -> bool:
    """Whether a model is saved as one of this class."""
    return isinstance(model, mixer.Mixer)


def check_blocks(arrays: Mapping[str, Array]) -> None:
    """Raises UserError for blocks of timm's class that are not those of MLP-Mixer."""
    why = None
    if 'blocks.0.linear_tokens.weight' in arrays:
        why = "ResMLP's products over patches and affine layers"
    elif 'blocks.0.mlp_channels.gate.proj.weight' in arrays:
        why = "gMLP's spatial gates"
    elif shape_of(arrays, 'blocks.0.mlp_channels.fc1.weight', 2)[0] != shape_of(
        arrays, 'blocks.0.mlp_channels.fc2.weight', 2
    )[1]:
        why = GATED
    if why:
        raise UserError(f"the arrays are those of {why}, which no model here has")


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, dict[str, Any], Notes]:
    """(kind, {field: value}, Notes) of the model, from arrays (names, shapes) and config.json."""
    check_blocks(arrays)
    args = arguments.arguments(config, SIGNATURE)
    width, channels, *patch = shape_of(arrays, 'stem.proj.weight', 4)
    classes = shape_of(arrays, 'head.weight', 2)[0] if 'head.weight' in arrays else 0
    if classes == 0 and timm_config.stated_classes(config) is None:
        args.pop('num_classes', None)  # the file leaves out the head
    fields = dict(
        num_classes=classes or None, patch_size=tuple(patch), width=width,
        depth=count_numbered(arrays, r'blocks\.(\d+)\.'),
        tokens_mlp_dim=shape_of(arrays, 'blocks.0.mlp_tokens.fc1.weight', 2)[0],
        mlp_dim=shape_of(arrays, 'blocks.0.mlp_channels.fc1.weight', 2)[0],
        gelu='exact', epsilon=1e-6,
    )  # fmt: skip
    inferred = dict(
        num_classes=classes, in_chans=channels, patch_size=tuple(patch), embed_dim=width,
        num_blocks=fields['depth'], mlp_dims=(fields['tokens_mlp_dim'], fields['mlp_dim']),
    )  # fmt: skip
    if 'patch_size' in args:
        args['patch_size'] = size_option(args, 'patch_size')
    if 'mlp_ratio' in args:
        args['mlp_dims'] = hidden_sizes(args['mlp_ratio'], width)
    check_agreement(args, inferred)
    check_agreement({'num_features': config.get('num_features')}, {'num_features': width})
    guessed = {}
    if arguments.architecture(config, SIGNATURE) is None:
        why = "timm's default; arrays do not show it"
        guessed = dict(gelu=why, epsilon=why)
    default = half_normalisation(channels)
    return 'mixer', *timm_config.with_normalisation(fields, config, channels, default, guessed, {})


def hidden_sizes(ratio: Any, width: int) -> tuple[int, int]:
    """Hidden sizes of the MLPs over patches and over channels; `ratio` is a number or a pair."""
    pair = ratio if isinstance(ratio, list) else [ratio] * 2
    if len(pair) != 2 or not all(type(n) in (int, float) and 0 < n < 1e6 for n in pair):
        value = brief(repr(ratio))
        raise UserError(f'config.json: mlp_ratio is {value}, not a number or a pair of them')
    return int(pair[0] * width), int(pair[1] * width)


def table_rows(arrays: Mapping[str, Array]) -> tuple[str, int] | None:
    """None: there are no positions."""
    return None


def pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays of a model's file."""
    rows = [
        Piece('stem.proj.weight', 'embedding/kernel', layout='conv'),
        Piece('stem.proj.bias', 'embedding/bias'),
    ]
    parts = {'mlp_tokens': 'token_mixing', 'mlp_channels': 'channel_mixing'}
    for i in range(model.depth):
        for n in (1, 2):
            rows += affine_pieces(f'blocks.{i}.norm{n}', f'encoder/norm{n}', (i,))
        for theirs, ours in parts.items():
            for name in ('fc1', 'fc2'):
                rows += linear_pieces(f'blocks.{i}.{theirs}.{name}', f'encoder/{ours}/{name}', (i,))
    rows += affine_pieces('norm', 'norm')
    return rows + (linear_pieces('head', 'head') if model.num_classes is not None else [])


def architectures() -> dict[str, dict[str, Any]]:
    """{architecture of MLP-Mixer: fields that it fixes, as its arguments are no options}."""
    return {
        name: dict(
            width=row['embed_dim'], depth=row['num_blocks'], patch_size=(row['patch_size'],) * 2
        )
        for name, row in (
            (name, SIGNATURE.defaults | args)
            for name, args in arguments.tables(SIGNATURE)['architectures'].items()
            if name.startswith('mixer_')
        )
    }


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    rows, allowed = list(architectures().values()), dict(gelu=('exact',), epsilon=(1e-6,))
    for field in ('width', 'depth', 'patch_size'):
        allowed[field] = tuple(sorted({row[field] for row in rows}))
        rows = [row for row in rows if row[field] == getattr(model, field)] or rows
    return allowed


def model_config(
    model: nn.Module, size: tuple[int, int], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Content of config.json for timm.create_model('local-dir:...')."""
    name = next(
        name for name, row in architectures().items()
        if all(getattr(model, field) == value for field, value in row.items())
    )  # fmt: skip
    args = dict(
        img_size=list(size), in_chans=len(model.mean), num_classes=model.num_classes or 0,
        mlp_ratio=[mlp_ratio(n, model.width) for n in (model.tokens_mlp_dim, model.mlp_dim)],
    )  # fmt: skip
    return arguments.document(
        name, args, model, size, classes, first_conv='stem.proj', classifier='head'
    )
