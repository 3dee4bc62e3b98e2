"""YolosForObjectDetection of transformers: what a file has beside the encoder, read and written.

A table of positions in a file has rows for the class token, the patches and the detection tokens,
in this order. Those of the encoder and those of the detector become arrays of their own here. Of
mid-position embeddings each layer does, too.
"""

import functools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from vit_jax.convert.files import Array
from vit_jax.convert.hf import config as hf_config
from vit_jax.convert.hf import vit_saving
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import Piece, file_arrays, linear_pieces
from vit_jax.convert.stages import Around, Beside
from vit_jax.errors import UserError
from vit_jax.models.detector import Detector, around_encoder
from vit_jax.models.vit import Vit

TOKENS = 'embeddings.detection_tokens'
TABLE = 'embeddings.position_embeddings'
MIDDLE = 'encoder.mid_position_embeddings'
ROWS = 'embeddings.detection_positions'  # of a layer's table; no name in a file
HEADS = {'class_head': 'class_labels_classifier', 'box_head': 'bbox_predictor'}


def matches(names: Collection[str]) -> bool:
    """Whether a file has a whole detector."""
    return TOKENS in names and f'{HEADS["class_head"]}.layers.0.weight' in names


def separated(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Arrays of the encoder's file, with each table of positions cut in two."""
    result, count = dict(arrays), shape_of(arrays, TOKENS, 3)[1]
    tables = {TABLE: whole_read(arrays[TABLE])}
    if MIDDLE in arrays:
        depth = shape_of(arrays, MIDDLE, 4)[0]
        middle = whole_read(result.pop(MIDDLE))
        tables |= {f'{MIDDLE}.{i}': part_of(middle, (i,)) for i in range(depth)}
    for i, (name, array) in enumerate(tables.items()):
        rows = max(shape_of({name: array}, name, 3)[1] - count, 0)
        result[name] = part_of(array, (slice(None), slice(rows)))
        result[f'{ROWS}.{i}'] = part_of(array, (slice(None), slice(rows, None)))
    return result


def whole_read(array: Array) -> Array:
    """The array, whose bytes are read from the file once for all of its parts."""

    @functools.cache
    def stored() -> np.ndarray:
        out = np.empty(int(np.prod(array.shape)) * array.stored.itemsize, np.uint8)
        array.fill(out)
        return out

    def fill(out: np.ndarray) -> None:
        out[...] = stored()

    return array._replace(fill=fill)


def part_of(array: Array, index: tuple) -> Array:
    """What an index selects of an array."""

    def fill(out: np.ndarray) -> None:
        whole = np.empty((*array.shape, array.stored.itemsize), np.uint8)
        array.fill(whole.reshape(-1))
        out[...] = whole[index].reshape(-1)

    shape = np.broadcast_to(np.uint8(0), array.shape)[index].shape
    return array._replace(shape=shape, fill=fill)


def mid_tables(depth: int) -> list[str]:
    """Names of the tables of layers, of a detector with one for each: that of the stem first."""
    return [TABLE, *(f'{MIDDLE}.{i}' for i in range(depth - 1))]


def around(arrays: Mapping[str, Array], config: dict[str, Any]) -> Around:
    """The detector around the encoder of a file, whose arrays are those of `separated`."""
    count = shape_of(arrays, f'{HEADS["class_head"]}.layers.2.weight', 2)[0] - 1
    queries, layers = shape_of(arrays, TOKENS, 3)[1], sum(n.startswith(ROWS) for n in arrays)
    build = functools.partial(around_encoder, num_classes=count, queries=queries)
    classes = hf_config.class_names(config, count)
    return Around('a detector', build, (), pieces(layers), classes)


def pieces(tables: int) -> list[Piece]:
    """Pieces of all arrays beside the encoder, which has so many tables of positions."""
    rows = [Piece(TOKENS, 'detection')]
    for i in range(tables):
        rows.append(Piece(f'{ROWS}.{i}', 'detection_posemb', (i,) if tables > 1 else ()))
    for ours, theirs in HEADS.items():
        for i in range(3):
            rows += linear_pieces(f'{theirs}.layers.{i}', f'{ours}/fc{i + 1}')
    return rows


def beside(
    model: Detector, encoder: Vit, params: dict[str, np.ndarray], size: tuple[int, int],
    classes: Collection[str] | None,
) -> tuple[Vit, dict[str, np.ndarray], Beside]:  # fmt: skip
    """(encoder, its parameters, what a folder has beside them) of a detector.

    The encoder has its first layer's table as that of its stem. `params` are {name: array} of the
    whole model, for images of `size`, (height, width). Raises UserError for a model that
    transformers' class can't be.
    """
    inside = {n.removeprefix('vit/'): x for n, x in params.items() if n.startswith('vit/')}
    middle = {}
    if model.in_tables and encoder.posemb_at == 'layers':
        tables = inside.pop('encoder/posemb')
        encoder, inside['posemb'] = encoder.clone(posemb_at='stem'), tables[0]
        middle = dict(zip(mid_tables(encoder.depth)[1:], tables[1:], strict=True))
    if vit_saving.model_type(encoder) != 'vit' or encoder.glu or encoder.registers:
        raise UserError(
            'format hf has detectors of a ViT with a class token alone: no registers, distillation '
            'token, scales of residuals or gated MLPs'
        )
    if encoder.patch_size[0] != encoder.patch_size[1]:
        y, x = encoder.patch_size
        raise UserError(f'format hf has detectors of square patches alone, not {y} x {x}')
    config = dict(
        architectures=['YolosForObjectDetection'], model_type='yolos', image_size=list(size),
        num_detection_tokens=model.queries, use_mid_position_embeddings=bool(middle),
        **hf_config.labels(model, classes),
    )  # fmt: skip
    own = file_arrays(pieces(len(middle) + 1), params)

    def finish(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        arrays = arrays | middle
        for i, name in enumerate([TABLE, *middle]):
            arrays[name] = np.concatenate([arrays[name], own.pop(f'{ROWS}.{i}')], axis=1)
        if middle:
            arrays[MIDDLE] = np.stack([arrays.pop(name) for name in middle])
        heads = tuple(HEADS.values())
        return {n if n.startswith(heads) else f'vit.{n}': x for n, x in (arrays | own).items()}

    return encoder, inside, Beside(finish, config)
