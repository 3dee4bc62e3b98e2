"""Random arguments of transformers' configs, for compare_transformers.py --random.

A function for each family draws (class, arguments of its config, how its result is read, `part` of
load). Arguments go beyond what public models have; those that no class accepts are left to
transformers to refuse.
"""

import math

import numpy as np
import read_transformers as read

GELUS = 'gelu', 'gelu_new', 'gelu_pytorch_tanh', 'quick_gelu', 'gelu_fast', 'gelu_python'
TEXT = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    vocab_size=9, max_position_embeddings=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CLASSES = dict(num_labels=5)


def pick(rng, *values):
    return values[rng.integers(len(values))]


def flag(rng, chance=0.5):
    return bool(rng.random() < chance)


def sizes(rng, square=0.0, ratio=False):
    """Arguments that most configs have.

    `square` is the chance of square images and patches; otherwise they may be, too. With `ratio`
    the MLP's size is stated as one.
    """
    square = flag(rng, square)
    heads = pick(rng, 1, 2, 3)
    patch = pick(rng, 4, 6, 8)
    patch = (patch, pick(rng, 4, 8)) if not square and flag(rng, 0.2) else patch
    sides = patch if isinstance(patch, tuple) else (patch, patch)
    if square or flag(rng, 0.6):
        image = math.lcm(*sides) * pick(rng, 2, 3, 4)
    else:
        image = tuple(side * pick(rng, 1, 2, 3, 4, 8) for side in sides)
    width = heads * pick(rng, 8, 12, 16)
    mlp = dict(mlp_ratio=pick(rng, 1, 2, 3, 4)) if ratio else dict(
        intermediate_size=8 * int(rng.integers(2, 10))
    )
    return mlp | dict(
        hidden_size=width, num_attention_heads=heads, num_hidden_layers=pick(rng, 1, 2, 3),
        patch_size=patch, image_size=image, num_channels=pick(rng, 3, 3, 1, 4),
        hidden_act=pick(rng, *3 * GELUS, 'relu'),
        layer_norm_eps=pick(rng, 1e-12, 1e-6, 1e-5, 1e-3),
    )  # fmt: skip


def pooled(rng):
    """Arguments of the layer after pooling."""
    return dict(pooler_output_size=pick(rng, None, 20), pooler_act=pick(rng, *['tanh'] * 9, 'gelu'))


def classifier(rng, stem, fields, *suffixes):
    """(class, arguments) of a model or a classifier."""
    suffix = pick(rng, 'Model', 'ForImageClassification', *suffixes)
    return f'{stem}{suffix}', fields | (CLASSES if suffix.startswith('For') else {})


def vit(rng):
    fields = sizes(rng) | pooled(rng) | dict(qkv_bias=flag(rng))
    return *classifier(rng, 'ViT', fields), read.by_model, None


def deit(rng):
    fields = sizes(rng) | pooled(rng) | dict(qkv_bias=flag(rng))
    kind = classifier(rng, 'DeiT', fields, 'ForImageClassificationWithTeacher')
    return *kind, read.by_model, None


def mae(rng):
    return 'ViTMAEModel', sizes(rng, 1.0) | dict(
        mask_ratio=0.0, qkv_bias=flag(rng)
    ), read.class_token, None  # fmt: skip


def dinov2(rng):
    registers = flag(rng)
    fields = sizes(rng, 0.5, ratio=True) | dict(
        qkv_bias=flag(rng), use_swiglu_ffn=flag(rng), layerscale_value=pick(rng, 1.0, 1e-5, 0.0),
    )  # fmt: skip
    if registers:
        fields['num_register_tokens'] = pick(rng, 0, 1, 2, 5)
    else:
        fields['use_mask_token'] = flag(rng)
    stem = 'Dinov2WithRegisters' if registers else 'Dinov2'
    name, fields = classifier(rng, stem, fields, 'Backbone')
    return name, fields, read.by_features if 'Backbone' in name else read.by_model, None


def dinov3_fields(rng):
    gated = flag(rng)
    fields = dict(
        use_gated_mlp=gated, num_register_tokens=pick(rng, 0, 1, 4),
        layerscale_value=pick(rng, 1.0, 1e-5),
        **{f'{name}_bias': flag(rng) for name in ('query', 'key', 'value', 'proj', 'mlp')},
    )  # fmt: skip
    return fields | (dict(hidden_act=pick(rng, 'silu', 'silu', 'gelu')) if gated else {})


def dinov3(rng):
    fields = sizes(rng) | dinov3_fields(rng) | dict(rope_theta=pick(rng, 100.0, 10.0, 1e4))
    if flag(rng, 0.3):
        return 'DINOv3ViTBackbone', fields, read.by_features, None
    return 'DINOv3ViTModel', fields, read.by_model, None


def beit(rng):
    fields = sizes(rng) | dict(
        use_mean_pooling=flag(rng), layer_scale_init_value=pick(rng, 0.1, 1e-5, 0.0),
        **{f'use_{n}': flag(rng, 0.4) for n in (
            'absolute_position_embeddings', 'relative_position_bias',
            'shared_relative_position_bias', 'mask_token',
        )},
    )  # fmt: skip
    return *classifier(rng, pick(rng, 'Beit', 'Data2VecVision'), fields), read.by_model, None


def clip(rng):
    fields = sizes(rng, 0.9)
    kind = pick(rng, 'CLIPVisionModel', 'CLIPVisionModelWithProjection', 'CLIPModel',
                'CLIPForImageClassification')  # fmt: skip
    if kind.endswith('Projection'):
        fields['projection_dim'] = 12
    if kind in ('CLIPModel', 'CLIPForImageClassification'):
        fields = CLASSES | dict(vision_config=fields, text_config=TEXT, projection_dim=12)
    return kind, fields, read.by_tower, 'image' if kind == 'CLIPModel' else None


def siglip(rng):
    second = flag(rng)
    fields = sizes(rng, 1.0) | dict(vision_use_head=flag(rng))
    if second:
        fields['num_patches'] = (fields.pop('image_size') // fields['patch_size']) ** 2
    stem = 'Siglip2' if second else 'Siglip'
    if flag(rng, 0.7):
        return f'{stem}VisionModel', fields, read.by_tower, None
    fields = CLASSES | dict(vision_config=fields, text_config=TEXT)
    return f'{stem}ForImageClassification', fields, read.by_tower, None


def ijepa(rng):
    fields = sizes(rng) | dict(qkv_bias=flag(rng))
    return *classifier(rng, 'IJepa', fields), read.by_model, None


def aimv2(rng):
    fields = sizes(rng, 1.0) | dict(
        qkv_bias=flag(rng), mlp_bias=flag(rng), use_head=flag(rng), is_native=flag(rng, 0.2),
        rms_norm_eps=pick(rng, 1e-5, 1e-3), hidden_act=pick(rng, *['silu'] * 9, 'gelu'),
    )  # fmt: skip
    del fields['layer_norm_eps']
    reads = read.tokens if fields['use_head'] else read.by_model
    return 'Aimv2VisionModel', fields, reads, 'encoder' if fields['use_head'] else None


def pixio(rng):
    fields = sizes(rng, 0.5, ratio=True) | dict(qkv_bias=flag(rng), n_cls_tokens=pick(rng, 1, 2, 4))
    return 'PixioModel', fields, read.tokens, None


def yolos(rng):
    fields = sizes(rng) | dict(
        qkv_bias=flag(rng), num_detection_tokens=pick(rng, 1, 5),
        use_mid_position_embeddings=flag(rng, 0.2),
    )  # fmt: skip
    if not isinstance(fields['image_size'], tuple):
        fields['image_size'] = (fields['image_size'],) * 2
    kind = pick(rng, 'YolosModel', 'YolosForObjectDetection')
    return kind, fields, read.without_detection, 'encoder'


def eomt(rng):
    fields = dict(num_blocks=1, num_queries=3, num_upscale_blocks=1, layerscale_value=1.0)
    if flag(rng):
        fields |= sizes(rng, 0.8) | dinov3_fields(rng)
        fields['rope_parameters'] = dict(rope_type='default', rope_theta=pick(rng, 100.0, 10.0))
        kind = 'EomtDinov3ForUniversalSegmentation'
    else:
        fields |= sizes(rng, 0.8, ratio=True)
        fields |= dict(use_swiglu_ffn=flag(rng), num_register_tokens=pick(rng, 0, 1, 4))
        kind = 'EomtForUniversalSegmentation'
    return kind, fields, read.without_queries, 'encoder'


def dpt(rng):
    fields = sizes(rng) | pooled(rng) | dict(qkv_bias=flag(rng), is_hybrid=flag(rng, 0.1))
    return 'DPTModel', fields | dict(backbone_out_indices=[0] * 4), read.by_model, None


FAMILIES = (
    vit, deit, mae, dinov2, dinov3, beit, clip, siglip, ijepa, aimv2, pixio, yolos, eomt, dpt,
)  # fmt: skip


def row(seed, number):
    """Row `number` of those of a seed, as in compare_transformers.KINDS; families take turns."""
    rng = np.random.default_rng((seed, number))
    name, fields, reads, part = FAMILIES[number % len(FAMILIES)](rng)
    return name, fields, reads, part, resizes(name, fields)


def resizes(name, fields):
    """Whether transformers resizes positions of the model as those of a grid that is square."""
    if 'Dinov3' in name or 'DINOv3' in name:
        return True
    fields = fields.get('vision_config', fields)
    if 'Aimv2' in name or 'Eomt' in name or isinstance(fields['patch_size'], tuple):
        return False
    return 'Yolos' in name or not isinstance(fields.get('image_size'), tuple)
