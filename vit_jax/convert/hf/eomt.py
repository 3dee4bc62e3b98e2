"""EomtForUniversalSegmentation of transformers: what a file has beside the encoder."""

import functools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from vit_jax.convert.documents import check_agreement, option
from vit_jax.convert.files import Array
from vit_jax.convert.hf import config as hf_config
from vit_jax.convert.hf import inside, vit_saving
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import (
    Piece,
    affine_pieces,
    count_numbered,
    file_arrays,
    linear_pieces,
)
from vit_jax.convert.stages import Around, Beside
from vit_jax.errors import UserError
from vit_jax.models.masks import MaskClassifier, around_encoder
from vit_jax.models.vit import Vit

QUERY = 'query.weight'
MASKED = 'attn_mask_probs'
WEIGHTS = 'criterion.empty_weight'  # of classes in the loss
NO_OBJECT = 0.1
BLOCKS = 4  # the default num_blocks


def around(arrays: Mapping[str, Array], config: dict[str, Any]) -> Around:
    """The mask classifier around the encoder of a file, whose arrays have their names there."""
    count = shape_of(arrays, 'class_predictor.weight', 2)[0] - 1
    queries = shape_of(arrays, QUERY, 2)[0]
    upscales = count_numbered(arrays, r'upscale_block\.block\.(\d+)\.')
    blocks = option(config, 'num_blocks', 'a whole number above 0', BLOCKS)
    stated = {key: option(config, key, 'a whole number above 0')
              for key in ('num_queries', 'num_upscale_blocks')}  # fmt: skip
    check_agreement(stated, dict(num_queries=queries, num_upscale_blocks=upscales))
    masked = (0.0,)
    if MASKED in arrays:
        check_agreement({'num_blocks': blocks}, {'num_blocks': shape_of(arrays, MASKED, 1)[0]})
        masked = tuple(map(float, arrays[MASKED].read(MASKED)))
    build = functools.partial(
        around_encoder, num_classes=count, queries=queries, query_blocks=blocks, upscales=upscales,
        masked=masked if any(masked) else (),
    )  # fmt: skip
    classes = hf_config.class_names(config, count)
    return Around('a mask classifier', build, ('masked',), pieces(upscales), classes)


def pieces(upscales: int) -> list[Piece]:
    """Pieces of all arrays beside the encoder that are parameters."""
    rows = [Piece(QUERY, 'query'), *linear_pieces('class_predictor', 'class_head')]
    for i in (1, 2, 3):
        rows += linear_pieces(f'mask_head.fc{i}', f'mask_head/fc{i}')
    for i in range(upscales):
        theirs, ours = f'upscale_block.block.{i}', f'upscale_{i}'
        rows += [
            Piece(f'{theirs}.conv1.weight', f'{ours}/larger/kernel', layout='transposed'),
            Piece(f'{theirs}.conv1.bias', f'{ours}/larger/bias'),
            Piece(f'{theirs}.conv2.weight', f'{ours}/spatial/kernel', layout='conv'),
            *affine_pieces(f'{theirs}.layernorm2d', f'{ours}/norm'),
        ]
    return rows


def beside(
    model: MaskClassifier, encoder: Vit, params: dict[str, np.ndarray], size: tuple[int, int],
    classes: Collection[str] | None,
) -> tuple[Vit, dict[str, np.ndarray], Beside]:  # fmt: skip
    """(encoder, its parameters, what a folder has beside them) of a mask classifier.

    `params` are {name: array} of the whole model, for images of `size`, (height, width). Raises
    UserError for a model that transformers' class can't be.
    """
    kind, biased = vit_saving.model_type(encoder), 'query' not in encoder.style.unbiased
    if kind != 'dinov2_with_registers' or 'cls' not in encoder.prefix or not biased:
        raise UserError(
            'format hf has mask classifiers of a DINOv2 with registers alone: a class token, '
            'registers, scales of residuals and biases of projections'
        )
    if encoder.patch_size[0] != encoder.patch_size[1]:
        y, x = encoder.patch_size
        raise UserError(f'format hf has mask classifiers of square patches alone, not {y} x {x}')
    inside_params = {n.removeprefix('vit/'): x for n, x in params.items() if n.startswith('vit/')}
    weights = np.ones(model.num_classes + 1, np.float32)
    weights[-1] = NO_OBJECT
    own = file_arrays(pieces(model.upscales), params) | {
        MASKED: np.array(model.masked or (0,) * model.query_blocks, np.float32), WEIGHTS: weights,
    }
    config = dict(
        architectures=['EomtForUniversalSegmentation'], model_type='eomt', image_size=size[0],
        num_blocks=model.query_blocks, num_queries=model.queries,
        num_upscale_blocks=model.upscales, no_object_weight=NO_OBJECT,
        **hf_config.labels(model, classes),
    )  # fmt: skip
    return encoder, inside_params, Beside(lambda arrays: inside.as_eomt(arrays) | own, config)
