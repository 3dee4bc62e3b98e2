"""Image towers of transformers' models of images and texts: CLIP, SigLIP, BLIP and their like.

A file is of the tower alone or of both towers; a classifier has the tower of CLIP's or SigLIP's
config. config.json of both towers has that of the tower as `vision_config`.
"""

from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from vit_jax.convert.documents import check_agreement, option
from vit_jax.convert.files import Array
from vit_jax.convert.hf import config as hf_config
from vit_jax.convert.pieces import Piece, linear_pieces, norm_pieces, rename_arrays
from vit_jax.convert.stages import TWO_TOWERS
from vit_jax.errors import UserError
from vit_jax.models.block import PROJECTIONS

KERNEL = 'embeddings.patch_embedding.weight'
TABLE = 'embeddings.position_embedding.weight'
LAYER = 'encoder.layers.0.'
PROJECTION = 'visual_projection.weight'
CLASSIFIER = ('classifier.weight', 'classifier.bias')
UNUSED = ((r'embeddings\.position_ids', 'indices of positions'),)
SPELLINGS = {'pre_layernorm.': 'pre_layrnorm.', 'encoder.layer.': 'encoder.layers.'}
READ = {
    *hf_config.DEFAULTS, 'model_type', 'image_size', 'num_attention_heads', 'hidden_act',
    'layer_norm_eps',
    'projection_dim', 'id2label', 'num_labels', 'problem_type', 'num_patches', 'vision_use_head',
}  # fmt: skip
# Keys of both towers' config that the image tower does not depend on.
OF_BOTH = {
    'text_config', 'text_config_dict', 'vision_config', 'vision_config_dict',
    'logit_scale_init_value', 'image_text_hidden_size', 'label_smoothing', 'conditional_layer',
    'decoder_attention_dropout', 'decoder_hidden_act', 'extract_layers', 'reduce_dim',
    'use_complex_transposed_convolution',
}  # fmt: skip
# Settings of text generation, which transformers 4 wrote to every config.
GENERATION = {
    'bad_words_ids', 'begin_suppress_tokens', 'bos_token_id', 'decoder_start_token_id',
    'diversity_penalty', 'do_sample', 'early_stopping', 'encoder_no_repeat_ngram_size',
    'eos_token_id', 'exponential_decay_length_penalty', 'forced_bos_token_id',
    'forced_eos_token_id', 'length_penalty', 'max_length', 'min_length', 'no_repeat_ngram_size',
    'num_beam_groups', 'num_beams', 'num_return_sequences', 'output_scores', 'pad_token_id',
    'prefix', 'pruned_heads', 'remove_invalid_values', 'repetition_penalty',
    'return_dict_in_generate', 'sep_token_id', 'suppress_tokens', 'temperature',
    'tokenizer_class', 'top_k', 'top_p', 'typical_p', 'dropout',
}  # fmt: skip


def prefix_of(names: Collection[str]) -> str | None:
    """What precedes the names of the image tower's arrays; None if there is no such tower."""
    found = [n.removesuffix(KERNEL) for n in names if n == KERNEL or n.endswith('.' + KERNEL)]
    return found[0] if len(found) == 1 else None


def select(
    arrays: Mapping[str, Array], config: dict[str, Any], part: str | None
) -> tuple[dict[str, Array], dict[str, Any], dict[str, str]]:
    """(arrays of the image tower and its head, its config, {other array: why it is unused}).

    Raises UserError for a file of two towers unless `part` is given.
    """
    prefix = prefix_of(arrays)
    outer = prefix.removesuffix('vision_model.')
    names = {}
    for name in arrays:
        if name.startswith(prefix):
            names[name] = name.removeprefix(prefix)
            for theirs, ours in SPELLINGS.items():
                if names[name].startswith(theirs):
                    names[name] = ours + names[name].removeprefix(theirs)
        elif name == outer + PROJECTION:
            names[name] = PROJECTION
        elif name in CLASSIFIER:
            names[name] = name
    others = {n: 'outside of the image tower' for n in arrays if n not in names}
    if others and part is None:
        raise UserError(TWO_TOWERS)
    chosen = rename_arrays({n: a for n, a in arrays.items() if n in names}, names)
    return chosen, tower_config(config, chosen), others


def tower_config(config: dict[str, Any], arrays: Mapping[str, Array]) -> dict[str, Any]:
    """The config of the image tower, with labels and other keys around it."""
    config = {k: v for k, v in config.items() if k not in GENERATION}
    if 'vision_config' in config or 'vision_config_dict' in config:
        inner = {}
        for key in ('vision_config', 'vision_config_dict'):
            inner |= option(config, key, 'an object', {})
        around = {k: v for k, v in config.items() if k not in OF_BOTH and v is not None}
        config = {k: v for k, v in inner.items() if k not in GENERATION} | around
    if not set(CLASSIFIER) & set(arrays):  # transformers 4 wrote labels to every config
        outputs = arrays[PROJECTION].shape[0] if PROJECTION in arrays else 0
        named = isinstance(config.get('id2label'), dict) and len(config['id2label']) == outputs
        drop = ('num_labels',) if named else ('num_labels', 'id2label')
        config = {k: v for k, v in config.items() if k not in drop}
    return config


def is_classifier(arrays: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether a file is of a classifier, which reads the mean of the patches."""
    kinds = config.get('architectures')
    stated = isinstance(kinds, list) and any('ForImageClass' in str(kind) for kind in kinds)
    return stated or bool(set(CLASSIFIER) & set(arrays))


def check_config(
    config: dict[str, Any], fields: dict[str, Any], channels: int, patch: int
) -> None:
    """Raises UserError if the arrays contradict the config; `patch` is its default patch_size."""
    hf_config.check_sizes(config, fields, channels, hf_config.DEFAULTS | dict(patch_size=patch))
    if fields['num_classes'] is not None:
        key = 'projection_dim' if fields['pool'] == 'cls' else 'num_labels'
        outputs = {key: option(config, key, 'a whole number')}
        check_agreement(outputs, {key: fields['num_classes']})


def block_pieces(theirs: str, index: tuple, model: nn.Module) -> list[Piece]:
    """Pieces of an encoder block."""
    rows = []
    for n in (1, 2):
        rows += norm_pieces(f'{theirs}.layer_norm{n}.', f'encoder/norm{n}', index, model=model)
        rows += linear_pieces(f'{theirs}.mlp.fc{n}', f'encoder/mlp/fc{n}', index)
    for k, name in enumerate(PROJECTIONS):
        rows += linear_pieces(
            f'{theirs}.self_attn.{name[0]}_proj', 'encoder/attn/qkv', index, at=(k,)
        )
    return rows + linear_pieces(f'{theirs}.self_attn.out_proj', 'encoder/attn/out', index, inputs=2)


def without_zeros(arrays: dict[str, np.ndarray], names: Collection[str]) -> dict[str, np.ndarray]:
    """The arrays but those biases that the format lacks; raises UserError unless they are zero."""
    for name in names:
        if name in arrays and arrays[name].any():
            raise UserError(
                f'format hf cannot express {name} of this model, which is not zero: its files have '
                'no such bias'
            )
    return {n: a for n, a in arrays.items() if n not in names}


def square(pair: tuple[int, int], what: str) -> int:
    """The side of a square; raises UserError for another rectangle, which transformers lacks."""
    if pair[0] != pair[1]:
        raise UserError(f'format hf has square {what} in this model, not {pair[0]} x {pair[1]}')
    return pair[0]


def vision_config(model: nn.Module, size: tuple[int, int] | None) -> dict[str, Any]:
    """Keys of the image tower's config.json but for its types; no image_size without `size`."""
    image = {} if size is None else {'image_size': square(size, 'images')}
    return dict(
        dtype='float32', hidden_size=model.width, intermediate_size=model.mlp_dim,
        num_hidden_layers=model.depth, num_attention_heads=model.num_heads,
        num_channels=len(model.mean), **image, patch_size=square(model.patch_size, 'patches'),
        hidden_act=hf_config.ACTS[model.gelu], layer_norm_eps=model.epsilon,
        attention_dropout=0.0,
    )  # fmt: skip
