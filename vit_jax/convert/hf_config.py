"""config.json of transformers: keys by model_type, defaults, and checks against the arrays.

A key that is left out has the default of its configuration class in transformers 5.24.
"""

from vit_jax.convert.documents import KINDS, agree, option, size_option
from vit_jax.errors import UserError
from vit_jax.io.text import brief

TYPES = ('vit', 'deit', 'dinov2', 'dinov2_with_registers', 'vit_mae', 'vit_msn')
EPSILON = {  # the default layer_norm_eps
    'vit': 1e-12, 'deit': 1e-12, 'vit_mae': 1e-12, 'vit_msn': 1e-6, 'dinov2': 1e-6,
    'dinov2_with_registers': 1e-6,
}  # fmt: skip
HEADS = 12  # the default num_attention_heads of each
READ = {
    'model_type', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'hidden_act',
    'layer_norm_eps', 'image_size', 'patch_size', 'num_channels', 'qkv_bias', 'id2label',
    'num_labels', 'problem_type', 'intermediate_size', 'pooler_output_size', 'pooler_act',
    'mlp_ratio', 'layerscale_value', 'use_swiglu_ffn', 'num_register_tokens',
}  # fmt: skip
# Outputs of a trained model in evaluation do not depend on these: dropout rates, initialisation,
# what is returned and how, decoders of pre-training, feature maps of a backbone, versions and
# names. label2id is the inverse of id2label.
IRRELEVANT = {
    'hidden_dropout_prob', 'attention_probs_dropout_prob', 'drop_path_rate', 'initializer_range',
    'initializer_factor', 'classifier_dropout', 'encoder_stride', 'mask_ratio', 'norm_pix_loss',
    'decoder_hidden_size', 'decoder_intermediate_size', 'decoder_num_attention_heads',
    'decoder_num_hidden_layers', 'use_mask_token', 'apply_layernorm', 'reshape_hidden_states',
    'out_features', 'out_indices', '_out_features', '_out_indices', 'stage_names', 'architectures',
    'transformers_version', 'dtype', 'torch_dtype', '_name_or_path', 'name_or_path', 'label2id',
    'output_attentions', 'output_hidden_states', 'return_dict', 'use_return_dict', 'torchscript',
    'use_bfloat16', 'tf_legacy_loss', 'chunk_size_feed_forward', 'gradient_checkpointing',
    'finetuning_task', 'task_specific_params', 'auto_map', 'is_encoder_decoder', 'is_decoder',
    'use_cache', '_commit_hash', '_attn_implementation', 'attn_implementation',
    'tie_word_embeddings', '_attn_implementation_autoset', 'license', 'add_cross_attention',
    'cross_attention_hidden_size',
    'tie_encoder_decoder', 'quantization_config',
}  # fmt: skip


def unknown_keys(config):
    """Keys that are neither read nor irrelevant."""
    known = READ | IRRELEVANT
    return tuple(f'config.json: {brief(key)}' for key in config if key not in known)


def check(config, arrays, kind, fields, channels):
    """Raises UserError if the arrays contradict the config."""
    stated = {
        key: option(config, key, what) for key, what in (
            ('hidden_size', 'a whole number above 0'),
            ('num_hidden_layers', 'a whole number above 0'),
            ('num_channels', 'a whole number above 0'), ('use_swiglu_ffn', 'true or false'),
            ('num_register_tokens', 'a whole number'), ('num_labels', 'a whole number'),
            ('qkv_bias', 'true or false'),
        )
    }  # fmt: skip
    told = dict(
        hidden_size=fields['width'], num_hidden_layers=fields['depth'], num_channels=channels,
        qkv_bias='encoder.layer.0.attention.attention.query.bias' in arrays,
    )  # fmt: skip
    stated['patch_size'] = size_option(config, 'patch_size')
    told['patch_size'] = fields['patch_size']
    if config and stated['qkv_bias'] is None:
        stated['qkv_bias'] = True
    if fields['num_classes'] is not None:
        told['num_labels'] = fields['num_classes']
    if kind.startswith('dinov2'):
        told |= dict(use_swiglu_ffn=fields['glu'], num_register_tokens=fields.get('registers', 0))
        check_ratio(config, fields)
    else:
        told['intermediate_size'] = fields['mlp_dim']
        stated['intermediate_size'] = option(config, 'intermediate_size', 'a whole number above 0')
    if 'representation_size' in fields:
        told['pooler_output_size'] = fields['representation_size']
        stated['pooler_output_size'] = option(
            config, 'pooler_output_size', 'a whole number above 0'
        )
    agree(stated, told)


def check_ratio(config, fields):
    """Raises UserError if mlp_ratio of a DINOv2 does not match the MLP in the arrays."""
    ratio = option(config, 'mlp_ratio', 'a number above 0')
    if ratio is None:
        return
    hidden = int(fields['width'] * ratio)
    if fields['glu']:  # two thirds, rounded up to a multiple of 8
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    if hidden != fields['mlp_dim']:
        raise UserError(
            f'config.json: mlp_ratio is {ratio}, which makes an MLP of {hidden}, but the arrays '
            f'have {fields["mlp_dim"]}'
        )


def check_table(config, fields, rows):
    """Raises UserError if the config's image_size and the position table differ in grid."""
    size = size_option(config, 'image_size')
    if size is None:
        return
    h, w = (n // p for n, p in zip(size, fields['patch_size'], strict=True))
    before = 2 if fields['dist_token'] else 1
    if h * w + before != rows:
        raise UserError(
            f'config.json: image_size is {config["image_size"]}, which has {h} x {w} patches, but '
            f'the position table has {rows - before} (and {before} before them)'
        )


def class_names(config, count):
    """Class names by label; None if the config has none or only transformers' placeholders."""
    labels = option(config, 'id2label', 'an object')
    if not labels or not count:
        return None
    names = [labels.get(str(i)) for i in range(count)]
    if len(labels) != count or not all(map(KINDS['a text'], names)):
        raise UserError(
            f'config.json: id2label has {len(labels)} entries, not a name for each of {count} '
            f'outputs, 0 to {count - 1}'
        )
    return None if all(n == f'LABEL_{i}' for i, n in enumerate(names)) else tuple(names)
