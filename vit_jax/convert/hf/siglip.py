"""SigLIP's image tower in transformers (arXiv:2303.15343), with attention pooling or without.

There is no class token. A classifier reads the mean of the patches, a tower without a head gives
all tokens. A key that config.json leaves out has the default of its class in transformers 5.24.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from vit_jax.convert.assumed import half_normalisation
from vit_jax.convert.documents import option
from vit_jax.convert.files import Array
from vit_jax.convert.hf import config as hf_config
from vit_jax.convert.hf import towers
from vit_jax.convert.hf.towers import LAYER, TABLE
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import Piece, linear_pieces, norm_pieces
from vit_jax.models import vit

PATCHES = towers.KERNEL
READ, UNUSED = towers.READ, towers.UNUSED
PROCESSOR = 'SiglipImageProcessor'
PROBE = 'head.probe'


def matches(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether the arrays are those of this family."""
    return is_tower(names) and not str(config.get('model_type')).startswith('siglip2')


def is_tower(names: Collection[str]) -> bool:
    """Whether the arrays are those of a tower without a class token."""
    prefix = towers.prefix_of(names)
    if prefix is None or f'{prefix}embeddings.class_embedding' in names:
        return False
    return f'{prefix}{TABLE}' in names and f'{prefix}{LAYER}self_attn.q_proj.weight' in names


def expresses(model: nn.Module) -> bool:
    """Whether a model is saved as one of this family.

    That of a mean is an I-JEPA if its GELU is exact or its projections lack biases.
    """
    if not isinstance(model, vit.Vit) or model.prefix or model.pre_norm:
        return False
    classifier = model.pool == 'gap' and model.num_classes is not None
    tanh = model.gelu != 'exact' and not model.style.unbiased
    return model.pool in ('map', 'none') or (classifier and tanh)


def select(
    arrays: dict[str, Array], config: dict[str, Any], part: str | None
) -> tuple[dict[str, Array], dict[str, Any], dict[str, str]]:
    """(arrays of the image tower and its head, its config, {other array: why it is unused}).

    Raises UserError for a file of two towers unless `part` is given.
    """
    arrays, config, unused = towers.select(arrays, config, part)
    if towers.is_classifier(arrays, config):
        pooling = (n for n in arrays if n.startswith('head.'))
        unused |= dict.fromkeys(pooling, 'the classifier reads the mean of the patches')
    return arrays, config, unused


def table_rows(arrays: Mapping[str, Array]) -> tuple[str, int]:
    """(name, rows) of the position table."""
    return TABLE, shape_of(arrays, TABLE, 2)[0]


def guess_normalisation(kind: str, channels: int) -> dict[str, tuple[float, ...]]:
    """{mean, std} to assume without a preprocessor_config.json."""
    return half_normalisation(channels)


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """(kind, {field: value}, {field: why it is a guess}) of the model, without mean and std."""
    kind = hf_config.stated_type(config, 'siglip')
    kernel = shape_of(arrays, PATCHES, 4)
    fields = hf_config.encoder_fields(arrays, config, kernel, 'encoder.layers.')
    fields |= tower_fields(arrays, config) | dict(interpolation='bicubic')
    if config:
        towers.check_config(config, fields, kernel[1], 16)
        hf_config.check_table(config, fields['patch_size'], table_rows(arrays)[1], 0, 224)
    return kind, fields, hf_config.guessed(config, 'num_heads', 'epsilon', 'gelu')


def tower_fields(arrays: Mapping[str, Array], config: dict[str, Any]) -> dict[str, Any]:
    """{field: value} that do not depend on the embedding of patches."""
    classifier = towers.is_classifier(arrays, config)
    head, pooled = 'classifier.weight', 'map' if PROBE in arrays else 'none'
    if config:
        hf_config.check_flags(config, {'vision_use_head': PROBE in arrays}, ['vision_use_head'])
    return dict(
        num_classes=shape_of(arrays, head, 2)[0] if head in arrays else None,
        mlp_dim=shape_of(arrays, f'{LAYER}mlp.fc1.weight', 2)[0],
        gelu=hf_config.gelu_of(option(config, 'hidden_act', 'a text', 'gelu_pytorch_tanh')),
        epsilon=option(config, 'layer_norm_eps', 'a number above 0', 1e-6),
        pool='gap' if classifier else pooled,
    )  # fmt: skip


def pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays of a model's file, without the prefix of a tower beside others."""
    return [Piece(PATCHES, 'embedding/kernel', layout='conv'), *tower_pieces(model)]


def tower_pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays but the kernel of the patch embedding."""
    rows = [
        Piece('embeddings.patch_embedding.bias', 'embedding/bias', layout='vector'),
        Piece(TABLE, 'posemb', (0,)),
    ]
    for i in range(model.depth):
        rows += towers.block_pieces(f'encoder.layers.{i}', (i,), model)
    rows += norm_pieces('post_layernorm.', 'norm', model=model)
    if model.pool == 'map':
        rows += map_head_pieces('head', 'map_head', model)
    return rows + (linear_pieces('classifier', 'head') if model.num_classes is not None else [])


def map_head_pieces(theirs: str, ours: str, model: nn.Module) -> list[Piece]:
    """Pieces of attention pooling; query, key and value are one array."""
    attention = f'{theirs}.attention'
    rows = [Piece(f'{theirs}.probe', f'{ours}/probe')]
    for kind, leaf, layout in (('weight', 'kernel', 1), ('bias', 'bias', 'vector')):
        rows += [
            Piece(f'{attention}.in_proj_{kind}', f'{ours}/{name}/{leaf}', (), layout, (i, 3))
            for i, name in enumerate(('query', 'key', 'value'))
        ]
    return [
        *rows,
        *linear_pieces(f'{attention}.out_proj', f'{ours}/out', inputs=2),
        *norm_pieces(f'{theirs}.layernorm.', f'{ours}/norm', model=model),
        *linear_pieces(f'{theirs}.mlp.fc1', f'{ours}/mlp/fc1'),
        *linear_pieces(f'{theirs}.mlp.fc2', f'{ours}/mlp/fc2'),
    ]


def complete(model: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of the file: those of a tower in a classifier have a prefix."""
    if model.num_classes is None:
        return arrays
    heads = towers.CLASSIFIER
    return {n if n in heads else f'vision_model.{n}': a for n, a in arrays.items()}


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    return dict(
        resnet=(None,), pool=('gap',) if model.num_classes else ('map', 'none'),
        posemb=('learn',), pre_norm=(False,), representation_size=(None,), glu=(False,),
        layer_scale=(None,),
    )  # fmt: skip


def model_config(
    model: nn.Module, size: tuple[int, int], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Content of config.json."""
    return typed_config(model, towers.vision_config(model, size), classes, 'siglip', 'Siglip')


def typed_config(
    model: nn.Module, config: dict[str, Any], classes: Sequence[str] | None, kind: str, stem: str
) -> dict[str, Any]:
    """Content of config.json of the type `kind`, whose classes begin with `stem`."""
    config |= dict(model_type=f'{kind}_vision_model', vision_use_head=model.pool == 'map')
    if model.num_classes is None:
        return dict(architectures=[f'{stem}VisionModel']) | config
    return dict(
        architectures=[f'{stem}ForImageClassification'], model_type=kind, dtype='float32',
        vision_config=config, **hf_config.labels(model, classes),
    )  # fmt: skip
