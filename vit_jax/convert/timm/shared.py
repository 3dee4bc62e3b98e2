"""Arguments and fields that timm's classes of ViTs share: those of patches, tokens and head."""

from collections.abc import Mapping
from typing import Any

from vit_jax.convert.documents import check_agreement, check_mlp_ratio, size_option
from vit_jax.convert.files import Array
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import count_numbered
from vit_jax.convert.timm.config import POOLS, stated_classes

BLOCK = 'blocks.0.'
SCALED, UNSCALED = 'a layer scale', 'no layer scale'  # as init_values


def inferred_arguments(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """{argument: value}, as far as names and shapes of arrays determine it."""
    width, channels, *patch = shape_of(arrays, 'patch_embed.proj.weight', 4)
    return dict(
        embed_dim=width, depth=count_numbered(arrays, r'blocks\.(\d+)\.'), in_chans=channels,
        patch_size=tuple(patch), class_token='cls_token' in arrays,
        num_classes=shape_of(arrays, 'head.weight', 2)[0] if 'head.weight' in arrays else 0,
    )  # fmt: skip


def check_arguments(
    config: dict[str, Any], args: Mapping[str, Any], inferred: dict[str, Any], hidden: int
) -> None:
    """Raises UserError if an argument contradicts `inferred`, those that the arrays imply.

    `hidden` is the number of rows of an MLP's first layer.
    """
    stated = dict(args)
    if inferred['num_classes'] == 0 and stated_classes(config) is None:
        stated.pop('num_classes', None)  # the file leaves out the head
    if 'init_values' in args:
        stated['init_values'] = SCALED if args['init_values'] else UNSCALED
    if 'patch_size' in args:
        stated['patch_size'] = size_option(dict(args), 'patch_size')
    check_agreement(stated, inferred)
    ratio, width = args.get('mlp_ratio'), inferred['embed_dim']
    if ratio is not None:
        check_mlp_ratio(ratio, int(width * ratio), hidden)
    check_agreement({'num_features': config.get('num_features')}, {'num_features': width})


def fields_of(
    arrays: Mapping[str, Array], args: Mapping[str, Any], inferred: dict[str, Any], pool: str
) -> dict[str, Any]:
    """{field: value} of the model, as far as it depends on these arguments."""
    normed = [name for name in ('norm', 'fc_norm') if f'{name}.weight' in arrays]
    return dict(
        num_classes=inferred['num_classes'] or None, patch_size=inferred['patch_size'],
        width=inferred['embed_dim'], depth=inferred['depth'], pool=POOLS[pool],
        cls_token=inferred['class_token'],
        last_norm={'norm': 'tokens', 'fc_norm': 'pooled'}[normed[-1]] if normed else 'none',
        layer_scale=float(args.get('init_values') or 1e-5)
        if inferred['init_values'] == SCALED else None,
    )  # fmt: skip
