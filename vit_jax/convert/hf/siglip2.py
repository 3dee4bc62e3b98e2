"""SigLIP 2's image tower for any aspect ratio in transformers (arXiv:2502.14786), on one grid here.

It differs from SigLIP's in its patches, which are flattened by row, column and channel, and in its
positions, which antialiased linear interpolation resizes. Files of a fixed size are SigLIP's.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn

from vit_jax.convert.documents import check_agreement, option, size_option
from vit_jax.convert.files import Array
from vit_jax.convert.hf import config as hf_config
from vit_jax.convert.hf import siglip, towers
from vit_jax.convert.hf.siglip import (  # noqa: F401
    complete,
    guess_normalisation,
    select,
    table_rows,
)
from vit_jax.convert.hf.towers import TABLE
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import Piece
from vit_jax.errors import UserError

PATCHES = towers.KERNEL
READ, UNUSED = towers.READ, towers.UNUSED
PROCESSOR = 'Siglip2ImageProcessor'
INTERPOLATION = 'bilinear_antialias'


def matches(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether the arrays are those of this family."""
    return siglip.is_tower(names) and not siglip.matches(names, config)


def expresses(model: nn.Module) -> bool:
    """Whether a model is saved as one of this family."""
    return siglip.expresses(model) and model.interpolation == INTERPOLATION


def count_channels(arrays: Mapping[str, Array], config: dict[str, Any]) -> int:
    """Channels of the images; raises UserError if the kernel has no whole number of them."""
    patch = size_option(config, 'patch_size') or (16, 16)
    inputs = shape_of(arrays, PATCHES, 2)[1]
    if inputs % math.prod(patch) or not inputs:
        raise UserError(
            f'config.json: patch_size is {patch[0]} x {patch[1]}, but array {PATCHES} has {inputs} '
            'inputs, which is no whole number of channels'
        )
    return inputs // math.prod(patch)


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """(kind, {field: value}, {field: why it is a guess}) of the model, without mean and std."""
    kind = hf_config.stated_type(config, 'siglip2')
    patch = size_option(config, 'patch_size') or (16, 16)
    channels, (rows, width) = count_channels(arrays, config), shape_of(arrays, TABLE, 2)
    kernel = (width, channels, *patch)
    fields = hf_config.encoder_fields(arrays, config, kernel, 'encoder.layers.')
    fields |= siglip.tower_fields(arrays, config) | dict(interpolation=INTERPOLATION)
    if config:
        towers.check_config(config, fields, channels, 16)
        stated = {'num_patches': option(config, 'num_patches', 'a whole number above 0', 256)}
        check_agreement(stated, {'num_patches': rows})
    return kind, fields, hf_config.guessed(config, 'num_heads', 'epsilon', 'gelu')


def pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays of a model's file, without the prefix of a tower beside others."""
    return [Piece(PATCHES, 'embedding/kernel', layout=3), *siglip.tower_pieces(model)]


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    return siglip.limits(model)


def model_config(
    model: nn.Module, size: tuple[int, int], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Content of config.json."""
    count = math.prod(model.grid((towers.square(size, 'images'),) * 2))
    config = towers.vision_config(model, None) | dict(num_patches=count)
    return siglip.typed_config(model, config, classes, 'siglip2', 'Siglip2')
