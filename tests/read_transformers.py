"""What models of transformers return for images, by the name of the array in vit_jax.

Each function takes (module, pixels [B, C, H, W], {argument: value} of the module).
"""

import torch


def by_model(module, pixels, options):
    """{name: tensor} that a model or a classifier returns."""
    result = module(pixels, **options)
    found = {}
    if getattr(result, 'logits', None) is not None:
        found['logits'] = result.logits
    if getattr(result, 'last_hidden_state', None) is not None:
        found['tokens'] = result.last_hidden_state
    if getattr(result, 'pooler_output', None) is not None:
        found['pre_logits'] = result.pooler_output
    return found


def inside(name):
    """Like by_model, of the encoder that is an attribute of the module."""
    def of(module, pixels, options):
        return tokens(getattr(module, name), pixels, options)

    return of


def class_token(module, pixels, options):
    """The class token of an MAE, which has its patches in a random order."""
    return {'cls': getattr(module, 'vit', module)(pixels, **options).last_hidden_state[:, 0]}


def by_features(module, pixels, options):
    """The last map of a backbone [B, D, h, w], as tokens."""
    maps = getattr(module, 'backbone', module)(pixels).feature_maps[-1]
    return {'tokens': maps.flatten(2).transpose(1, 2)}


def without_queries(module, pixels, options):
    """The encoder of an EoMT, in which no queries join the tokens."""
    x = module.embeddings(pixels)
    extra = {}
    if hasattr(module, 'rope_embeddings'):
        extra = dict(position_embeddings=module.rope_embeddings(pixels))
    for layer in module.layers:
        x = layer(x, **extra)
    return {'tokens': module.layernorm(x)}


def without_detection(module, pixels, options):
    """The encoder of a YOLOS, whose detection tokens leave before the first block."""
    model = getattr(module, 'vit', module)
    count = model.config.num_detection_tokens
    x = model.embeddings(pixels)[:, :-count]
    between = model.encoder.interpolation
    middle = () if between is None else between(tuple(pixels.shape[-2:]))
    for i, layer in enumerate(model.encoder.layer):
        x = layer(x)
        x = x[0] if isinstance(x, tuple) else x
        x = x + middle[i][:, :-count] if i < len(middle) else x
    return {'tokens': model.layernorm(x)}


def by_tower(module, pixels, options):
    """Tokens and output of an image tower, by itself or beside a text tower."""
    inputs = dict(pixel_values=pixels, **options)
    if 'Siglip2' in type(module).__name__:
        b, c, h, w = pixels.shape
        side = getattr(module.config, 'vision_config', module.config).patch_size
        x = pixels.reshape(b, c, h // side, side, w // side, side).permute(0, 2, 4, 3, 5, 1)
        x = x.reshape(b, h * w // side**2, -1)
        shapes = torch.tensor([[h // side, w // side]] * b)
        inputs = dict(pixel_values=x, pixel_attention_mask=torch.ones(x.shape[:2]),
                      spatial_shapes=shapes)  # fmt: skip
    module = getattr(module, 'clip', getattr(module, 'owlvit', module))
    tower = getattr(module, 'vision_model', module)
    found = {'tokens': tower(**inputs).last_hidden_state}
    if 'Blip' in type(module).__name__:  # its pooled vector has the last norm twice
        return found
    if hasattr(module, 'get_image_features'):
        return found | {'output': module.get_image_features(**inputs).pooler_output}
    result = module(**inputs)
    names = 'logits', 'image_embeds', 'pooler_output'
    output = next((result[n] for n in names if result.get(n) is not None), None)
    if 'Classification' in type(module).__name__:
        found = {}  # the tower's own pooling is not read
    return found if output is None else found | {'output': output}


def refused(module, pixels, options):
    """Nothing, as files of such a model are refused."""
    return {}


def by_queries(module, pixels, options):
    """Classes and boxes or masks of a detector or an EoMT."""
    out = module(pixels)
    if 'Yolos' in type(module).__name__:
        return {'logits': out.logits, 'boxes': out.pred_boxes}
    return {'logits': out.class_queries_logits, 'masks': out.masks_queries_logits}


def tokens(module, pixels, options):
    """Tokens alone, where transformers pools in another way."""
    return {'tokens': module(pixels, **options).last_hidden_state}
