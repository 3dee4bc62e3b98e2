"""Folders of Hugging Face transformers: ViT (MAE and MSN too), DeiT, DINOv2; with heads or not.

GELU and epsilon are those of config.json, the input normalisation is that of
preprocessor_config.json. Position tables are resized by bicubic interpolation, antialiased only in
DINOv2 with registers.
"""

import numpy as np

from vit_jax.convert import hf_config
from vit_jax.convert.documents import option, size_option
from vit_jax.convert.hf_config import TYPES
from vit_jax.convert.official import half, need
from vit_jax.convert.pieces import Piece, count, linear, norm, renamed
from vit_jax.convert.timm import ratio
from vit_jax.convert.timm_config import IMAGENET
from vit_jax.convert.timm_model import heads_of
from vit_jax.errors import UserError
from vit_jax.io.text import brief

UNUSED = ((r'embeddings\.mask_token|decoder\..*', 'for masked pre-training'),)
GELUS = {
    'gelu': 'exact', 'gelu_python': 'exact', 'gelu_pytorch_tanh': 'tanh', 'gelu_new': 'tanh',
    'gelu_fast': 'tanh', 'quick_gelu': 'quick',
}  # fmt: skip
ACTS = {'exact': 'gelu', 'tanh': 'gelu_pytorch_tanh', 'quick': 'quick_gelu'}
PATCHES = 'embeddings.patch_embeddings.projection.weight'
TABLE = 'embeddings.position_embeddings'
INTERPOLATION = {'dinov2_with_registers': 'bicubic_antialias'}


def matches(names):
    """Whether the arrays are those of this family."""
    return any(name == PATCHES or name.endswith('.' + PATCHES) for name in names)


def tidy(arrays):
    """Removes the prefix that arrays of a model inside a classifier have."""
    prefix = next((n.removesuffix(PATCHES) for n in arrays if n.endswith('.' + PATCHES)), '')
    return renamed(arrays, {name: name.removeprefix(prefix) for name in arrays})


def model_type(arrays, config):
    """One of TYPES, from config.json or else the arrays; raises UserError if they disagree."""
    told = 'deit' if 'embeddings.distillation_token' in arrays else 'vit'
    if 'encoder.layer.0.mlp.fc2.weight' in arrays or 'encoder.layer.0.norm1.weight' in arrays:
        registers = 'embeddings.register_tokens' in arrays
        told = 'dinov2_with_registers' if registers else 'dinov2'
    kind = option(config, 'model_type', 'a text', told)
    if kind not in TYPES:
        some = ', '.join(TYPES)
        raise UserError(f'config.json: model_type {brief(repr(kind))} is none of {some}')
    if told != (kind if kind not in ('vit_mae', 'vit_msn') else 'vit'):
        raise UserError(f'config.json: model_type is {kind!r}, but the arrays are those of {told}')
    return kind


def hidden(arrays, kind):
    """(hidden size of the MLP, whether it is gated)."""
    if not kind.startswith('dinov2'):
        return need(arrays, 'encoder.layer.0.intermediate.dense.weight', 2)[0], False
    if 'encoder.layer.0.mlp.weights_out.weight' in arrays:
        return need(arrays, 'encoder.layer.0.mlp.weights_out.weight', 2)[1], True
    return need(arrays, 'encoder.layer.0.mlp.fc1.weight', 2)[0], False


def channels(arrays):
    """Number of channels of the images."""
    return need(arrays, PATCHES, 4)[1]


def guess(kind, channels):
    """{mean, std} to assume without a preprocessor_config.json."""
    return IMAGENET if kind != 'vit' and channels == 3 else half(channels)


def describe(arrays, config):
    """(kind, {field: value}, {field: why it is a guess}) of the model, without mean and std."""
    kind = model_type(arrays, config)
    width, channels, *patch = need(arrays, PATCHES, 4)
    depth = count(arrays, r'encoder\.layer\.(\d+)\.')
    mlp_dim, glu = hidden(arrays, kind)
    act = option(config, 'hidden_act', 'a text', 'gelu')
    if act not in GELUS:
        raise UserError(f'config.json: hidden_act {brief(repr(act))} is none of {", ".join(GELUS)}')
    head = next((n for n in ('classifier', 'cls_classifier') if f'{n}.weight' in arrays), None)
    shape = need(arrays, f'{head}.weight', 2) if head else (None, width)
    heads = hf_config.HEADS if config else heads_of(width, depth)
    fields = dict(
        num_classes=shape[0], patch_size=tuple(patch), width=width, depth=depth,
        num_heads=option(config, 'num_attention_heads', 'a whole number above 0', heads),
        mlp_dim=mlp_dim, glu=glu, gelu=GELUS[act],
        epsilon=option(config, 'layer_norm_eps', 'a number above 0', hf_config.EPSILON[kind]),
        pool='cls_gap' if shape[1] == 2 * width else 'cls', cls_token=True,
        dist_token='embeddings.distillation_token' in arrays,
        dist_head='distillation_classifier.weight' in arrays,
        interpolation=INTERPOLATION.get(kind, 'bicubic'),
    )  # fmt: skip
    if kind.startswith('dinov2'):
        fields['layer_scale'] = float(option(config, 'layerscale_value', 'a number', 1.0))
    if 'embeddings.register_tokens' in arrays:
        fields['registers'] = need(arrays, 'embeddings.register_tokens', 3)[1]
    if 'pooler.dense.weight' in arrays:
        fields['representation_size'] = need(arrays, 'pooler.dense.weight', 2)[0]
        pooler = option(config, 'pooler_act', 'a text', 'tanh')
        if pooler != 'tanh':
            raise UserError(f'config.json: pooler_act {brief(repr(pooler))} is not tanh')
    hf_config.check(config, arrays, kind, fields, channels)
    hf_config.check_table(config, fields, table_rows(arrays)[1])
    guessed = {}
    if not config:
        guessed = dict(
            num_heads='there is no config.json', epsilon='of the norms; there is no config.json',
        ) | ({} if glu else {'gelu': 'there is no config.json'})  # fmt: skip
    return kind, fields, guessed


def table_rows(arrays):
    """(name, rows) of the position table."""
    return TABLE, need(arrays, TABLE, 3)[1]


def image_size(config):
    """Image size (height, width) of the checkpoint; None if the config does not state it."""
    return size_option(config, 'image_size')


def save_type(model):
    """The model_type that a model is saved as."""
    if model.layer_scale is not None:
        return 'dinov2_with_registers' if model.registers else 'dinov2'
    return 'deit' if model.dist_token else 'vit'


def pieces(model):
    """Pieces of all arrays of a model's file, without the prefix of one inside a classifier."""
    dinov2 = model.layer_scale is not None
    names = {
        'cls': 'embeddings.cls_token', 'dist': 'embeddings.distillation_token',
        'registers': 'embeddings.register_tokens',
    }  # fmt: skip
    projection = PATCHES.removesuffix('.weight')
    rows = [
        Piece(f'{projection}.weight', 'embedding/kernel', layout='conv'),
        Piece(f'{projection}.bias', 'embedding/bias', layout='vector'),
        *(Piece(names[name], name) for name in model.prefix),
        Piece(TABLE, 'posemb'),
    ]
    for i in range(model.depth):
        rows += block(f'encoder.layer.{i}', (i,), model, dinov2)
    rows += norm('layernorm.', 'norm', scale='weight')
    if model.representation_size is not None:
        rows += linear('pooler.dense', 'pre_logits')
    if model.num_classes is not None:
        rows += linear('cls_classifier' if model.dist_head else 'classifier', 'head')
    return rows + (linear('distillation_classifier', 'dist_head') if model.dist_head else [])


def block(theirs, index, model, dinov2):
    """Pieces of an encoder block."""
    norms = ('norm1', 'norm2') if dinov2 else ('layernorm_before', 'layernorm_after')
    mlp = ('mlp.fc1', 'mlp.fc2') if dinov2 else ('intermediate.dense', 'output.dense')
    rows = []
    for i, name in enumerate(norms):
        rows += norm(f'{theirs}.{name}.', f'encoder/norm{i + 1}', index, scale='weight')
    for i, name in enumerate(('query', 'key', 'value')):
        rows += linear(
            f'{theirs}.attention.attention.{name}', 'encoder/attn/qkv', index, at=(i,),
            optional=True,
        )  # fmt: skip
    rows += linear(f'{theirs}.attention.output.dense', 'encoder/attn/out', index, inputs=2)
    if model.glu:
        rows += linear(f'{theirs}.mlp.weights_in', 'encoder/mlp/gate', index, part=(0, 2))
        rows += linear(f'{theirs}.mlp.weights_in', 'encoder/mlp/fc1', index, part=(1, 2))
        rows += linear(f'{theirs}.mlp.weights_out', 'encoder/mlp/fc2', index)
    else:
        rows += linear(f'{theirs}.{mlp[0]}', 'encoder/mlp/fc1', index)
        rows += linear(f'{theirs}.{mlp[1]}', 'encoder/mlp/fc2', index)
    if dinov2:
        rows += [
            Piece(f'{theirs}.layer_scale{n}.lambda1', f'encoder/scale{n}', index) for n in (1, 2)
        ]
    return rows


def limits(model):
    """{field: values that the format can express} for `save`."""
    dinov2 = model.layer_scale is not None
    pools = ('cls',)
    if dinov2:
        pools = ('cls', 'gap', 'cls_gap') if model.num_classes else ('cls', 'cls_gap')
    return dict(
        resnet=(None,), pool=pools, posemb=('learn',), cls_posemb=(True,),
        registers=(model.registers if dinov2 else 0,),
        registers_posemb=(False,) if model.registers else (False, True),
        dist_token=(False,) if dinov2 else (True, False), pre_norm=(False,),
        fc_norm=(False, True) if dinov2 and model.pool == 'cls' else (False,),
        qk_norm=(False,), glu=(True, False) if dinov2 else (False,),
        representation_size=(None,) if dinov2 or model.num_classes
        else (None, model.representation_size),
    )  # fmt: skip


def with_both_pools(model, params):
    """Makes the head of a DINOv2 read the class token and the mean of the patches.

    transformers has no other head for it (arXiv:2304.07193 section 7.1): rows of the kernel for the
    part that the head did not read are zeros. `params` is {name: array}; returns (model, params).
    Raises UserError for a model without a class token, since transformers would add one, which the
    patches would attend to.
    """
    if model.layer_scale is None or model.num_classes is None:
        return model, params
    if 'cls' not in model.prefix:
        raise UserError('format hf has a class token in each DINOv2, this model none; timm can')
    if model.pool == 'cls_gap':
        return model, params
    kernel = params['head/kernel']  # [D, K]
    rows = [kernel, np.zeros_like(kernel)]
    kernel = np.concatenate(rows if model.pool == 'cls' else rows[::-1])
    # For a single token, a norm before the pooling equals one after it.
    model = model.clone(pool='cls_gap', cls_token=None, fc_norm=False)
    return model, params | {'head/kernel': kernel}


def prefix_of(model):
    """transformers' prefix of the arrays of a model inside a classifier; '' without a head."""
    return f'{save_type(model)}.' if model.num_classes is not None else ''


def file_names(model):
    """{name in `pieces`: name in the file}."""
    heads = ('classifier.', 'cls_classifier.', 'distillation_classifier.')
    prefix = prefix_of(model)
    names = [piece.theirs for piece in pieces(model)]
    return {n: n if n.startswith(heads) else prefix + n for n in names}


def config_of(model, size, classes):
    """Content of config.json."""
    kind = save_type(model)
    stem = {'vit': 'ViT', 'deit': 'DeiT', 'dinov2': 'Dinov2'}.get(kind, 'Dinov2WithRegisters')
    suffix = 'Model' if model.num_classes is None else 'ForImageClassification'
    if model.dist_head:
        suffix += 'WithTeacher'
    image = size[0] if size[0] == size[1] else list(size)
    patch = model.patch_size
    config = dict(
        architectures=[stem + suffix], model_type=kind, dtype='float32',
        hidden_size=model.width, num_hidden_layers=model.depth,
        num_attention_heads=model.num_heads, image_size=image,
        patch_size=patch[0] if patch[0] == patch[1] else list(patch),
        num_channels=len(model.mean), layer_norm_eps=model.epsilon, qkv_bias=True,
        hidden_act=ACTS[model.gelu],
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.02,
    )  # fmt: skip
    if kind.startswith('dinov2'):
        config |= dict(layerscale_value=model.layer_scale, use_swiglu_ffn=model.glu)
        config['mlp_ratio'] = dinov2_ratio(model)
        if model.registers:
            config['num_register_tokens'] = model.registers
        else:
            config['use_mask_token'] = False
    else:
        config['intermediate_size'] = model.mlp_dim
        if model.representation_size is not None:
            config |= dict(pooler_output_size=model.representation_size, pooler_act='tanh')
    if model.num_classes is not None:
        names = classes or [f'LABEL_{i}' for i in range(model.num_classes)]
        config |= dict(
            id2label={str(i): name for i, name in enumerate(names)},
            label2id={name: i for i, name in enumerate(names)},
        )  # fmt: skip
    return config


def dinov2_ratio(model):
    """The mlp_ratio that gives the MLP its hidden size; raises UserError if none does."""
    if not model.glu:
        return ratio(model.mlp_dim, model.width)
    for value in (model.mlp_dim * 1.5 / model.width, round(model.mlp_dim * 1.5 / model.width)):
        if (int(int(model.width * value) * 2 / 3) + 7) // 8 * 8 == model.mlp_dim:
            return int(value) if value == int(value) else value
    raise UserError(f'no mlp_ratio makes a gated MLP of {model.mlp_dim}')


def processor_of(model, settings):
    """Content of preprocessor_config.json; `settings` are those of `views.processor`."""
    kind = 'DeiTImageProcessor' if model.dist_token else 'ViTImageProcessor'
    if model.layer_scale is not None or settings['do_center_crop']:
        kind = 'BitImageProcessor'  # the others of transformers 4 do not crop
    return dict(
        image_processor_type=kind, **settings, do_rescale=True, rescale_factor=1 / 255,
        do_normalize=True, image_mean=list(model.mean), image_std=list(model.std),
        do_convert_rgb=len(model.mean) == 3,
    )  # fmt: skip
