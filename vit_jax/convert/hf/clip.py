"""CLIP's image tower in transformers (arXiv:2103.00020), and models that have the same tower.

A norm precedes the blocks, patches have no bias, nor has the projection to the space of images and
texts, which is a head here. A classifier reads the mean of the patches before the last norm. A key
that config.json leaves out has the default of its class in transformers 5.24.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from vit_jax.convert.assumed import CLIP, half_normalisation
from vit_jax.convert.documents import option
from vit_jax.convert.files import Array
from vit_jax.convert.hf import config as hf_config
from vit_jax.convert.hf import towers
from vit_jax.convert.hf.towers import LAYER, PROJECTION, TABLE
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import Piece, linear_pieces, norm_pieces
from vit_jax.errors import UserError
from vit_jax.models import vit

PATCHES = towers.KERNEL
READ, UNUSED = towers.READ, towers.UNUSED
PROCESSOR = 'CLIPImageProcessor'
SIZES = {  # {model type: default (patch_size, image_size)}
    'clip': (32, 224), 'metaclip_2': (32, 224), 'altclip': (32, 224), 'chinese_clip': (32, 224),
    'clipseg': (32, 224), 'owlvit': (32, 768), 'owlv2': (16, 768),
}  # fmt: skip
REFUSED = {
    'xclip': 'attention between the frames of a video', 'groupvit': 'tokens that group patches',
}  # fmt: skip
ABSENT = ('embeddings.patch_embedding.bias', 'visual_projection.bias')


def refused_type(config: Mapping[str, Any]) -> str | None:
    """The type of a refused model that a config.json is of."""
    kind = str(config.get('model_type')).removesuffix('_vision_model')
    return kind if kind in REFUSED else None


def matches(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether the arrays are those of this family."""
    prefix = towers.prefix_of(names)
    if prefix is None:
        return refused_type(config) is not None
    norms = (f'{prefix}pre_layrnorm.weight', f'{prefix}pre_layernorm.weight')
    return f'{prefix}embeddings.class_embedding' in names and any(n in names for n in norms)


def expresses(model: nn.Module) -> bool:
    """Whether a model is saved as one of this family."""
    return isinstance(model, vit.Vit) and model.pre_norm


def select(
    arrays: dict[str, Array], config: dict[str, Any], part: str | None
) -> tuple[dict[str, Array], dict[str, Any], dict[str, str]]:
    """(arrays of the image tower and its head, its config, {other array: why it is unused}).

    Raises UserError for a file of two towers unless `part` is given, and for a refused type.
    """
    kind = refused_type(config)
    if kind is not None:
        raise UserError(f'config.json: model_type {kind!r} has {REFUSED[kind]}, not supported')
    arrays, config, unused = towers.select(arrays, config, part)
    if towers.is_classifier(arrays, config):
        last = (n for n in arrays if n.startswith('post_layernorm.'))
        unused |= dict.fromkeys(last, 'the classifier reads patches before that norm')
    return arrays, config, unused


def table_rows(arrays: Mapping[str, Array]) -> tuple[str, int]:
    """(name, rows) of the position table."""
    return TABLE, shape_of(arrays, TABLE, 2)[0]


def guess_normalisation(kind: str, channels: int) -> dict[str, tuple[float, ...]]:
    """{mean, std} to assume without a preprocessor_config.json."""
    return CLIP if channels == 3 else half_normalisation(channels)


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """(kind, {field: value}, {field: why it is a guess}) of the model, without mean and std."""
    kind = hf_config.stated_type(config, *SIZES)
    kernel = shape_of(arrays, PATCHES, 4)
    classifier = towers.is_classifier(arrays, config)
    head = 'classifier.weight' if classifier else PROJECTION
    fields = hf_config.encoder_fields(arrays, config, kernel, 'encoder.layers.') | dict(
        num_classes=shape_of(arrays, head, 2)[0] if head in arrays else None,
        mlp_dim=shape_of(arrays, f'{LAYER}mlp.fc1.weight', 2)[0],
        gelu=hf_config.gelu_of(option(config, 'hidden_act', 'a text', 'quick_gelu')),
        epsilon=option(config, 'layer_norm_eps', 'a number above 0', 1e-5),
        cls_token=True, pre_norm=True, interpolation='bicubic',
        pool='gap' if classifier else 'cls', last_norm='none' if classifier else 'pooled',
    )  # fmt: skip
    if config:
        patch, image = SIZES[kind]
        towers.check_config(config, fields, kernel[1], patch)
        hf_config.check_table(config, fields['patch_size'], table_rows(arrays)[1], 1, image)
    return kind, fields, hf_config.guessed(config, 'num_heads', 'epsilon', 'gelu')


def pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays of a model's file, without the prefix of a tower beside others."""
    rows = [
        Piece(PATCHES, 'embedding/kernel', layout='conv'),
        Piece(ABSENT[0], 'embedding/bias', layout='vector', optional=True),
        Piece('embeddings.class_embedding', 'cls', (0, 0)),
        Piece(TABLE, 'posemb', (0,)),
        *norm_pieces('pre_layrnorm.', 'pre_norm', model=model),
    ]
    for i in range(model.depth):
        rows += towers.block_pieces(f'encoder.layers.{i}', (i,), model)
    if model.last_norm != 'none':
        rows += norm_pieces('post_layernorm.', 'norm', model=model)
    if model.num_classes is None:
        return rows
    if model.pool == 'gap':
        return rows + linear_pieces('classifier', 'head')
    return [
        *rows,
        Piece(PROJECTION, 'head/kernel', layout=1),
        Piece(ABSENT[1], 'head/bias', layout='vector', optional=True),
    ]


def complete(model: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of the file: without biases that it lacks, with a norm that a classifier ignores."""
    arrays = towers.without_zeros(arrays, ABSENT)
    if model.last_norm == 'none':
        arrays['post_layernorm.weight'] = np.ones(model.width, np.float32)
        arrays['post_layernorm.bias'] = np.zeros(model.width, np.float32)
    if model.num_classes is None:
        return arrays
    heads = (PROJECTION, *towers.CLASSIFIER)
    return {n if n in heads else f'vision_model.{n}': a for n, a in arrays.items()}


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    mean = model.pool == 'gap'
    return dict(
        resnet=(None,), pool=('cls', 'gap') if model.num_classes else ('cls',), posemb=('learn',),
        cls_posemb=(True,), cls_token=(True,) if mean else (True, None), registers=(0,),
        dist_token=(False,), pre_norm=(True,), representation_size=(None,), glu=(False,),
        layer_scale=(None,), last_norm=('none',) if mean else ('tokens', 'pooled'),
    )  # fmt: skip


def model_config(
    model: nn.Module, size: tuple[int, int], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Content of config.json."""
    config = towers.vision_config(model, size)
    if model.pool == 'gap':
        tower = config | dict(model_type='clip_vision_model')
        return dict(
            architectures=['CLIPForImageClassification'], model_type='clip', dtype='float32',
            vision_config=tower, **hf_config.labels(model, classes),
        )  # fmt: skip
    if model.num_classes is None:
        return dict(architectures=['CLIPVisionModel'], model_type='clip_vision_model') | config
    return dict(
        architectures=['CLIPVisionModelWithProjection'], model_type='clip_vision_model',
        projection_dim=model.num_classes, **(hf_config.labels(model, classes) if classes else {}),
        **config,
    )  # fmt: skip
