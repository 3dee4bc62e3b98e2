"""DINOv3 of transformers (arXiv:2508.10104): rotary positions, registers, keys without a bias.

A key that config.json leaves out has the default of DINOv3ViTConfig in transformers 5.24.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from vit_jax.convert.assumed import IMAGENET, half_normalisation
from vit_jax.convert.documents import check_agreement, option
from vit_jax.convert.files import Array
from vit_jax.convert.hf import blocks
from vit_jax.convert.hf import config as hf_config
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import Piece, norm_pieces
from vit_jax.models import block, rotary, vit

TYPE = 'dinov3_vit'
PATCHES = 'embeddings.patch_embeddings.weight'
REGISTERS = 'embeddings.register_tokens'  # [1, 0, D] where there are none
UNUSED = ((r'embeddings\.mask_token', 'for masked pre-training'),)
DEFAULTS = hf_config.DEFAULTS | dict(hidden_size=384, intermediate_size=1536)
READ = {
    'model_type', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
    'hidden_act', 'layer_norm_eps', 'rope_theta', 'image_size', 'patch_size', 'num_channels',
    'query_bias', 'key_bias', 'value_bias', 'proj_bias', 'mlp_bias', 'layerscale_value',
    'use_gated_mlp', 'num_register_tokens',
    'pos_embed_shift', 'pos_embed_jitter', 'pos_embed_rescale',  # of training, without effect here
}  # fmt: skip
BIASES = {
    'query': 'attention.q_proj.bias', 'key': 'attention.k_proj.bias',
    'value': 'attention.v_proj.bias', 'out': 'attention.o_proj.bias', 'mlp': 'mlp.up_proj.bias',
}  # fmt: skip
FLAGS = {name: 'proj_bias' if name == 'out' else f'{name}_bias' for name in BIASES}
LAYER = 'layer.0.'


def matches(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether the arrays, without a prefix, are those of this family."""
    return PATCHES in names and f'{LAYER}attention.k_proj.weight' in names


def expresses(model: nn.Module) -> bool:
    """Whether a model is saved as one of this family."""
    return isinstance(model, vit.Vit) and model.style.rope is not None


def absent_biases(model: nn.Module) -> tuple[str, ...]:
    """Biases in `style.unbiased` that the file lacks as well: each has a flag."""
    return model.style.unbiased


def select(
    arrays: dict[str, Array], config: dict[str, Any], part: str | None
) -> tuple[dict[str, Array], dict[str, Any], dict[str, str]]:
    """(arrays but empty registers, config, {}): any part is the encoder, as there is no other."""
    return {n: x for n, x in arrays.items() if n != REGISTERS or x.shape[1:2] != (0,)}, config, {}


def table_rows(arrays: Mapping[str, Array]) -> None:
    """None, as positions are computed."""


def guess_normalisation(kind: str, channels: int) -> dict[str, tuple[float, ...]]:
    """{mean, std} to assume without a preprocessor_config.json."""
    return IMAGENET if channels == 3 else half_normalisation(channels)


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """(kind, {field: value}, {field: why it is a guess}) of the model, without mean and std."""
    kind = hf_config.stated_type(config, TYPE)
    kernel = shape_of(arrays, PATCHES, 4)
    glu = f'{LAYER}mlp.gate_proj.weight' in arrays
    fields = hf_config.encoder_fields(arrays, config, kernel, 'layer.', 6) | dict(
        num_classes=None, mlp_dim=shape_of(arrays, f'{LAYER}mlp.up_proj.weight', 2)[0], glu=glu,
        gelu=hf_config.gelu_of(option(config, 'hidden_act', 'a text', 'gelu'), glu),
        epsilon=option(config, 'layer_norm_eps', 'a number above 0', 1e-5),
        pool='cls', cls_token=True, posemb='none',
        style=block.Style(
            rope=rotary.Rope(float(option(config, 'rope_theta', 'a number above 0', 100.0))),
            unbiased=tuple(n for n, bias in BIASES.items() if f'{LAYER}{bias}' not in arrays),
        ),
        registers=arrays[REGISTERS].shape[1] if REGISTERS in arrays else 0,
        layer_scale=float(option(config, 'layerscale_value', 'a number', 1.0)),
    )  # fmt: skip
    if config:
        check_config(config, arrays, fields, kernel[1])
    return kind, fields, hf_config.guessed(config, 'num_heads', 'epsilon', 'style', 'gelu')


def check_config(
    config: dict[str, Any], arrays: Collection[str], fields: dict[str, Any], channels: int
) -> None:
    """Raises UserError if the arrays contradict the config."""
    hf_config.check_sizes(config, fields, channels, DEFAULTS)
    biased = {FLAGS[name]: f'{LAYER}{bias}' in arrays for name, bias in BIASES.items()}
    hf_config.check_flags(config, biased, biased.keys() - {'key_bias'})
    hf_config.check_flags(config, {'use_gated_mlp': fields['glu']})
    registers = {'num_register_tokens': option(config, 'num_register_tokens', 'a whole number', 0)}
    check_agreement(registers, {'num_register_tokens': fields['registers']})


def pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays of a model's file."""
    names = {'cls': 'embeddings.cls_token', 'registers': REGISTERS}
    projection = PATCHES.removesuffix('.weight')
    rows = [
        Piece(f'{projection}.weight', 'embedding/kernel', layout='conv'),
        Piece(f'{projection}.bias', 'embedding/bias', layout='vector'),
        *(Piece(names[name], name) for name in model.prefix),
    ]
    for i in range(model.depth):
        rows += blocks.block_pieces(model, blocks.DINOV3, f'layer.{i}', (i,))
    return rows + norm_pieces('norm.', 'norm', model=model)


def complete(model: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of the file: with those that outputs do not depend on."""
    arrays = arrays | {'embeddings.mask_token': np.zeros((1, 1, model.width), np.float32)}
    if not model.registers:
        arrays[REGISTERS] = np.zeros((1, 0, model.width), np.float32)
    return arrays


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    rope = rotary.Rope(model.style.rope.base)
    return {'style.rope': (rope,)} | dict(
        num_classes=(None,), resnet=(None,),
        pool=('cls',), posemb=('none',), dist_token=(False,), pre_norm=(False,),
        representation_size=(None,),
        layer_scale=(1.0 if model.layer_scale is None else model.layer_scale,),
    )  # fmt: skip


def model_config(
    model: nn.Module, size: tuple[int, int], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Content of config.json."""
    shared = hf_config.shared_config(model, size, 'DINOv3ViTModel', TYPE)
    return shared | dict(
        intermediate_size=model.mlp_dim, rope_theta=model.style.rope.base,
        hidden_act='silu' if model.glu else hf_config.ACTS[model.gelu],
        **{key: name not in model.style.unbiased for name, key in FLAGS.items()},
        layerscale_value=float(model.layer_scale), use_gated_mlp=model.glu,
        num_register_tokens=model.registers, attention_dropout=0.0, drop_path_rate=0.0,
    )  # fmt: skip
