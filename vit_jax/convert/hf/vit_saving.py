"""What transformers' ViT, DeiT, DINOv2, I-JEPA and Pixio can express, and how they are written."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from vit_jax.convert.biases import whole_groups
from vit_jax.convert.documents import mlp_ratio
from vit_jax.convert.hf import config as hf_config
from vit_jax.errors import UserError
from vit_jax.models import block, vit

STEMS = {  # of the names of classes
    'vit': 'ViT', 'deit': 'DeiT', 'dinov2': 'Dinov2', 'ijepa': 'IJepa', 'pixio': 'Pixio',
    'dinov2_with_registers': 'Dinov2WithRegisters',
}  # fmt: skip


def model_type(model: nn.Module) -> str:
    """The model_type that a model is saved as."""
    if model.layer_scale is not None:
        return 'dinov2_with_registers' if model.registers else 'dinov2'
    if model.dist_token:
        return 'deit'
    if 'cls' in model.prefix:
        return 'vit'
    return 'pixio' if model.registers else 'ijepa'


def absent_biases(model: nn.Module) -> tuple[str, ...]:
    """Biases in `style.unbiased` that the file lacks as well: qkv_bias is a flag."""
    return whole_groups(model, block.PROJECTIONS)


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    kind = model_type(model)
    dinov2 = kind.startswith('dinov2')
    pools = {'ijepa': ('gap',), 'pixio': ('none',)}.get(kind, ('cls',))
    if dinov2:
        pools = ('cls', 'gap', 'cls_gap') if model.num_classes else ('cls', 'cls_gap')
    bare = dinov2 or kind in ('ijepa', 'pixio') or model.num_classes
    return dict(
        resnet=(None,), pool=pools, posemb=('learn',), cls_posemb=(True,),
        num_classes=(None,) if kind == 'pixio' else (model.num_classes,),
        registers=(model.registers if dinov2 or kind == 'pixio' else 0,),
        registers_posemb=(kind == 'pixio',) if model.registers else (False, True),
        dist_token=(False,) if dinov2 else (True, False), pre_norm=(False,),
        last_norm=('tokens', 'pooled') if dinov2 and model.pool == 'cls' else ('tokens',),
        glu=(True, False) if dinov2 else (False,),
        representation_size=(None,) if bare else (None, model.representation_size),
    )  # fmt: skip


def with_both_pools(
    model: nn.Module, params: dict[str, np.ndarray]
) -> tuple[nn.Module, dict[str, np.ndarray]]:
    """Makes the head of a DINOv2 read the class token and the mean of the patches.

    transformers has no other head for it (arXiv:2304.07193 section 7.1): rows of the kernel for the
    part that the head did not read are zeros. `params` is {name: array}; returns (model, params).
    Raises UserError for a model without a class token, since transformers would add one, which the
    patches would attend to.
    """
    if model.layer_scale is None or model.num_classes is None or not isinstance(model, vit.Vit):
        return model, params
    if 'cls' not in model.prefix:
        raise UserError('format hf has a class token in each DINOv2, this model none; timm can')
    if model.pool == 'cls_gap':
        return model, params
    kernel = params['head/kernel']  # [D, K]
    rows = [kernel, np.zeros_like(kernel)]
    kernel = np.concatenate(rows if model.pool == 'cls' else rows[::-1])
    # For a single token, a norm before the pooling equals one after it.
    model = model.clone(pool='cls_gap', cls_token=None, last_norm='tokens')
    return model, params | {'head/kernel': kernel}


def complete(model: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays, named as in `pieces`, under their names in the file, with all that is in it.

    Arrays of a model inside a classifier have a prefix. A DINOv2 with registers has a mask token,
    which is zeros here.
    """
    heads = ('classifier.', 'cls_classifier.', 'distillation_classifier.')
    kind = model_type(model)
    prefix = f'{kind}.' if model.num_classes is not None else ''
    arrays = {n if n.startswith(heads) else prefix + n: a for n, a in arrays.items()}
    if kind == 'dinov2_with_registers':
        arrays[f'{prefix}embeddings.mask_token'] = np.zeros((1, model.width), np.float32)
    return arrays


def model_config(
    model: nn.Module, size: tuple[int, int], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Content of config.json of a type of TYPES; raises UserError for images it cannot have."""
    kind = model_type(model)
    stem = STEMS[kind]
    if kind in hf_config.SQUARE and size[0] != size[1]:
        raise UserError(
            f'format hf has the positions of square images in each {stem}, not of {size[0]} x '
            f'{size[1]}; resize them first, by image_size of load'
        )
    suffix = 'Model' if model.num_classes is None else 'ForImageClassification'
    if model.dist_head:
        suffix += 'WithTeacher'
    config = hf_config.shared_config(model, size, stem + suffix, kind) | dict(
        qkv_bias='query' not in model.style.unbiased, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    if kind.startswith('dinov2'):
        config |= dict(layerscale_value=float(model.layer_scale), use_swiglu_ffn=model.glu)
        config['mlp_ratio'] = dinov2_mlp_ratio(model)
        if model.registers:
            config['num_register_tokens'] = model.registers
        else:
            config['use_mask_token'] = False
    elif kind == 'pixio':
        config |= dict(
            n_cls_tokens=model.registers, mlp_ratio=mlp_ratio(model.mlp_dim, model.width)
        )
    else:
        config['intermediate_size'] = model.mlp_dim
        if model.representation_size is not None:
            config |= dict(pooler_output_size=model.representation_size, pooler_act='tanh')
    return config | hf_config.labels(model, classes)


def dinov2_mlp_ratio(model: nn.Module) -> int | float:
    """The mlp_ratio that gives the MLP its hidden size; raises UserError if none does."""
    if not model.glu:
        return mlp_ratio(model.mlp_dim, model.width)
    fraction = model.mlp_dim * 1.5 / model.width
    for value in (*range(int(fraction), 0, -1), fraction):  # transformers wants a whole number
        if (int(int(model.width * value) * 2 / 3) + 7) // 8 * 8 == model.mlp_dim:
            return value
    raise UserError(f'no mlp_ratio makes a gated MLP of {model.mlp_dim}')
