"""Compares transformers' models with what vit_jax makes of their folders.

    python tests/compare_transformers.py [PART ...]
    python tests/compare_transformers.py --random 200 --seed 0 [PART ...]

Each kind, a model class in one variant, is made small (two blocks), gets random weights, is saved
by transformers, loaded by vit_jax and compared at its own and, where transformers can resize its
positions, at another image size, in float32. Compared are logits, pooled vector, class token and
patches' features, as far as transformers returns them. Then it is written by vit_jax and loaded
again: its parameters are the same to the bit, and transformers makes the same of it. Prints a line
for each kind and a summary by model type. PART limits it to kinds whose line contains one of the
texts. --random draws that many models instead, of arguments in draw_transformers.py; 'impossible'
are those that transformers cannot make or run.

Not a test, as it takes minutes; a few kinds are in test_convert.py.
"""

import argparse
import functools
import io
import json
import pathlib
import tempfile
import warnings
from contextlib import redirect_stderr

import draw_transformers
import jax
import numpy as np
import torch
import transformers
import verdicts
from read_transformers import (
    by_features,
    by_model,
    by_queries,
    by_tower,
    class_token,
    inside,
    refused,
    tokens,
    without_detection,
    without_queries,
)

import vit_jax
from vit_jax.errors import UserError

SIZES = dict(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
    image_size=32, patch_size=8,
)  # fmt: skip
RATIO = {k: v for k, v in SIZES.items() if k != 'intermediate_size'} | dict(mlp_ratio=2)
HEADS = dict(neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8)
DPT = SIZES | HEADS | dict(num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3])
EOMT = RATIO | dict(num_blocks=1, num_queries=5, num_upscale_blocks=1)
EOMT_DINOV3 = SIZES | dict(num_blocks=1, num_queries=5, num_upscale_blocks=1)
DETECTOR = dict(image_size=[32, 48], num_detection_tokens=5, use_mid_position_embeddings=False)
DECODER = dict(
    decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
    decoder_intermediate_size=24, mask_ratio=0.0,
)  # fmt: skip
GATED_V3 = dict(use_gated_mlp=True, hidden_act='silu')
CLASSES = dict(num_labels=7)
OWN, SHARED = 'use_relative_position_bias', 'use_shared_relative_position_bias'
MAPS = SIZES | {'num_hidden_layers': 4, OWN: True}
ABSOLUTE, MEAN = 'use_absolute_position_embeddings', 'use_mean_pooling'


# (class, what differs from its type's base, how transformers' result is read, arguments of load)
def rows(name, base, *variants, by=by_model, part=None, resize=True):
    return [(name, base | variant, by, part, resize) for variant in variants or ({},)]


def backbone(name, base, **changes):
    """A config of a backbone that returns its last map."""
    kind = getattr(transformers, name)
    return kind(**(base | dict(out_features=['stage1', 'stage2'])), **changes)


TEXT = dict(
    hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=96, vocab_size=99,
    max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
PAIR = dict(vision_config=SIZES, text_config=TEXT)
PROJECTED = dict(projection_dim=24)
NAFLEX = {k: v for k, v in SIZES.items() if k != 'image_size'} | dict(num_patches=16)
NAFLEX_PAIR = dict(vision_config=NAFLEX, text_config=TEXT)
GELU = dict(hidden_act='gelu', layer_norm_eps=1e-6)
TOWERS = [
    *rows('CLIPVisionModel', SIZES, {}, GELU, by=by_tower),
    *rows('CLIPVisionModelWithProjection', SIZES | PROJECTED, {}, GELU, by=by_tower),
    *rows('CLIPForImageClassification', PAIR | CLASSES, by=by_tower),
    *rows('CLIPModel', PAIR | PROJECTED, by=by_tower, part='image'),
    *rows('MetaClip2VisionModel', SIZES, by=by_tower),
    *rows('MetaClip2VisionModelWithProjection', SIZES | PROJECTED, by=by_tower),
    *rows('MetaClip2ForImageClassification', PAIR | CLASSES, by=by_tower),
    *rows('MetaClip2Model', PAIR | PROJECTED, by=by_tower, part='image'),
    *rows('AltCLIPVisionModel', SIZES, by=by_tower),
    *rows('AltCLIPModel', dict(vision_config=SIZES, text_config=TEXT | dict(project_dim=24)),
          PROJECTED, by=by_tower, part='image'),
    *rows('ChineseCLIPVisionModel', SIZES, by=by_tower),
    *rows('ChineseCLIPModel', PAIR | PROJECTED, by=by_tower, part='image'),
    *rows('CLIPSegVisionModel', SIZES, by=by_tower),
    *rows('CLIPSegForImageSegmentation', PAIR | PROJECTED, dict(extract_layers=[0, 1]),
          by=by_tower, part='image'),
    *rows('OwlViTVisionModel', SIZES, by=by_tower),
    *rows('OwlViTForObjectDetection', PAIR, dict(projection_dim=48), by=by_tower, part='image'),
    *rows('Owlv2VisionModel', SIZES, by=by_tower),
    *rows('SiglipVisionModel', SIZES, {}, dict(vision_use_head=False), by=by_tower),
    *rows('SiglipForImageClassification', PAIR | CLASSES, by=by_tower),
    *rows('SiglipModel', PAIR, by=by_tower, part='image'),
    *rows('Siglip2VisionModel', NAFLEX, {}, dict(vision_use_head=False), by=by_tower),
    *rows('Siglip2ForImageClassification', NAFLEX_PAIR | CLASSES, by=by_tower),
    *rows('Siglip2Model', NAFLEX_PAIR, by=by_tower, part='image'),
    *rows('BlipVisionModel', SIZES, by=by_tower),
    *rows('BlipModel', PAIR | PROJECTED, by=by_tower, part='image'),
    *rows('XCLIPVisionModel', SIZES, by=refused, resize=False),
    *rows('GroupViTVisionModel', dict(
        hidden_size=48, intermediate_size=96, image_size=32, patch_size=8, depths=[1, 1],
        num_hidden_layers=2, num_group_tokens=[4, 0], num_output_groups=[4, 2],
        num_attention_heads=3, assign_mlp_ratio=[0.5, 4],
    ), by=refused, resize=False),
]  # fmt: skip
KINDS = [
    *TOWERS,
    *rows('ViTModel', SIZES, {}, dict(hidden_act='quick_gelu')),
    *rows('ViTModel', SIZES, dict(image_size=(24, 40)), resize=False),
    *rows('ViTForImageClassification', SIZES | CLASSES, {}, dict(qkv_bias=False),
          dict(hidden_act='gelu_new', num_channels=1)),
    *rows('ViTForMaskedImageModeling', SIZES | dict(encoder_stride=8), by=inside('vit')),
    *rows('DeiTModel', SIZES),
    *rows('DeiTModel', SIZES, dict(image_size=(24, 40)), resize=False),
    *rows('DeiTForImageClassification', SIZES | CLASSES, {}, dict(qkv_bias=False)),
    *rows('DeiTForImageClassificationWithTeacher', SIZES | CLASSES),
    *rows('ViTMAEModel', SIZES | dict(mask_ratio=0.0), by=class_token, resize=False),
    *rows('ViTMAEForPreTraining', SIZES | DECODER, by=class_token, part='encoder', resize=False),
    *rows('ViTMSNModel', SIZES),
    *rows('ViTMSNForImageClassification', SIZES | CLASSES),
    *rows('Dinov2Model', RATIO, {}, dict(use_swiglu_ffn=True), dict(hidden_act='quick_gelu')),
    *rows('Dinov2ForImageClassification', RATIO | CLASSES, {}, dict(use_swiglu_ffn=True)),
    *rows('Dinov2Backbone', RATIO, by=by_features),
    *rows('Dinov2WithRegistersModel', RATIO, {}, dict(num_register_tokens=2, use_swiglu_ffn=True)),
    *rows('Dinov2WithRegistersForImageClassification', RATIO | CLASSES),
    *rows('Dinov2WithRegistersBackbone', RATIO, by=by_features),
    *rows('DINOv3ViTModel', SIZES, {}, GATED_V3, dict(num_register_tokens=3, key_bias=True),
          dict(image_size=(24, 40), query_bias=False, mlp_bias=False)),
    *rows('DINOv3ViTBackbone', SIZES, by=by_features),
    *rows('BeitModel', SIZES, {}, {OWN: True}, {SHARED: True}, {OWN: True, MEAN: False},
          {SHARED: True, ABSOLUTE: True}, {ABSOLUTE: True, MEAN: False},
          {OWN: True, 'layer_scale_init_value': 0.0}),
    *rows('BeitForImageClassification', SIZES | CLASSES, {OWN: True}, {SHARED: True, MEAN: False},
          {ABSOLUTE: True}),
    *rows('BeitForMaskedImageModeling', SIZES | dict(use_mask_token=True), {SHARED: True},
          {SHARED: True, MEAN: False}, by=inside('beit')),
    *rows('BeitForSemanticSegmentation', MAPS | {'out_indices': [1, 2, 3, 4]},
          by=inside('beit'), part='encoder'),
    *rows('BeitBackbone', SIZES | {OWN: True}, by=by_features),
    *rows('Data2VecVisionModel', SIZES, {OWN: True}, {SHARED: True, MEAN: False}),
    *rows('Data2VecVisionForImageClassification', SIZES | CLASSES, {OWN: True},
          {ABSOLUTE: True, MEAN: False}),
    *rows('Data2VecVisionForSemanticSegmentation', MAPS | {'out_indices': [0, 1, 2, 3]},
          by=inside('data2vec_vision'), part='encoder'),
    *rows('IJepaModel', SIZES, {}, dict(qkv_bias=False)),
    *rows('IJepaForImageClassification', SIZES | CLASSES),
    *rows('PixioModel', RATIO, {}, dict(n_cls_tokens=1), by=tokens),
    *rows('Aimv2VisionModel', SIZES | dict(use_head=False), {}, dict(qkv_bias=True, mlp_bias=True),
          resize=False),
    *rows('Aimv2VisionModel', SIZES, by=tokens, part='encoder', resize=False),
    *rows('Aimv2VisionModel', SIZES, resize=False),
    *rows('Aimv2VisionModel', SIZES | dict(use_head=False, is_native=True), resize=False),
    *rows('DPTModel', SIZES),
    *rows('DPTForDepthEstimation', DPT, by=inside('dpt'), part='encoder'),
    *rows('DPTForSemanticSegmentation', DPT, by=inside('dpt'), part='encoder'),
    *rows('DPTForDepthEstimation', DPT),
    *rows('DPTForDepthEstimation', HEADS | dict(
        backbone_config=('Dinov2Config', RATIO), reassemble_factors=[1, 1]),
        by=by_features, part='encoder'),
    *rows('DepthAnythingForDepthEstimation', HEADS | dict(
        backbone_config=('Dinov2Config', RATIO), reassemble_hidden_size=48),
        by=by_features, part='encoder'),
    *rows('YolosModel', SIZES | DETECTOR, by=without_detection),
    *rows('YolosModel', SIZES | DETECTOR, by=without_detection, part='encoder'),
    *rows('YolosForObjectDetection', SIZES | DETECTOR, {}, dict(use_mid_position_embeddings=True),
          by=without_detection, part='encoder'),
    *rows('YolosForObjectDetection', SIZES | DETECTOR, {}, dict(use_mid_position_embeddings=True),
          by=by_queries),
    *rows('EomtForUniversalSegmentation', EOMT, {}, dict(use_swiglu_ffn=True),
          by=without_queries, part='encoder', resize=False),
    *rows('EomtForUniversalSegmentation', EOMT, {}, dict(num_upscale_blocks=2), by=by_queries,
          resize=False),
    *rows('EomtDinov3ForUniversalSegmentation', EOMT_DINOV3, {}, GATED_V3, by=without_queries,
          part='encoder'),
]  # fmt: skip


def randomised(module, seed):
    """The module with random weights, so that no array is without effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in module.named_parameters():
            one = 'norm' in key and key.endswith('weight') and p.ndim == 1
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + one)
    return module.eval()


def made(name, fields, seed):
    """A class of transformers with random weights."""
    fields = {k: backbone(*v) if isinstance(v, tuple) and isinstance(v[0], str) else v
              for k, v in fields.items()}  # fmt: skip
    kind = getattr(transformers, name)
    torch.manual_seed(seed)
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter('ignore')
        return randomised(kind(kind.config_class(**fields)), seed)


def apply_to(model, params, images):
    """{name: array} that a model of vit_jax makes of images, with `output` the first it returns."""
    apply = jax.jit(
        lambda p, x: model.apply({'params': p}, x),
        compiler_options={'xla_backend_optimization_level': 0},  # compiles in half the time
    )
    output, out = apply(params, images)
    return out | {'output': output}


def difference(model, params, images, theirs):
    """Largest difference of what a model of vit_jax makes of images from {name: tensor}."""
    out = apply_to(model, params, images)
    theirs = {k: v.numpy() for k, v in theirs.items()}
    tokens = theirs.pop('tokens', None)
    if tokens is not None:
        count = out['encoded'].shape[1]
        theirs['encoded'] = tokens[:, -count:]
        before = tokens.shape[1] - count
        assert before in (0, sum(model.prefix.values())), (before, model.prefix)
        if 'cls' in out and before:
            theirs['cls'] = tokens[:, 0]
    assert theirs
    return verdicts.largest(np.abs(np.asarray(out[k]) - v).max() for k, v in theirs.items())


def by_transformers(function, *args, **kwargs):
    """What a function of transformers returns, without warnings; Impossible if it fails."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()), torch.no_grad():
        warnings.simplefilter('ignore')
        try:
            return function(*args, **kwargs)
        except Exception as e:
            raise verdicts.Impossible(f'{type(e).__name__}: {e}') from e


def saved_back(folder, images, part):
    """Largest difference of transformers' outputs from ours, of what vit_jax writes of a folder.

    Raises AssertionError unless its arrays are, to the bit, those that were loaded.
    """
    model, params = vit_jax.load(folder, part=part)
    vit_jax.save(folder / 'again', model, params, 'hf')
    back, again = vit_jax.load(folder / 'again')
    jax.tree.map(np.testing.assert_array_equal, params, again)
    a, b = (getattr(one, 'vit', one) for one in (back, model))
    assert a.style == b.style and a.pool == b.pool, (back, model)
    kind = json.loads((folder / 'again' / 'config.json').read_text())['architectures'][0]
    module, info = getattr(transformers, kind).from_pretrained(
        folder / 'again', output_loading_info=True
    )
    made_up = {n for n in info['missing_keys'] if 'pooler' not in n and 'mask_token' not in n}
    assert not made_up and not info['unexpected_keys'], info
    by = by_tower if any(n in kind for n in ('CLIP', 'Siglip', 'Blip')) else by_model
    by = by_queries if any(n in kind for n in ('Yolos', 'Eomt')) else by
    theirs = (tokens if 'Pixio' in kind else by)(module.eval(), as_pixels(images), {})
    if any('pooler' in name for name in info['missing_keys']):
        del theirs['pre_logits']
    return difference(model, params, images, theirs)


def as_pixels(images):
    """Images [B, H, W, C] as a tensor [B, C, H, W]."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def image_sizes(module, resize):
    """((height, width), channels) of images that a model is for and, with `resize`, others."""
    names = 'backbone_config', 'vision_config'
    inner = (getattr(module.config, n, None) for n in names)
    config = next(filter(None, inner), module.config)
    patch = pair(getattr(config, 'patch_size', SIZES['patch_size']))
    side = round(getattr(config, 'num_patches', 16) ** 0.5) * patch[0]
    size = pair(getattr(config, 'image_size', None) or side)
    larger = size[0] + 2 * patch[0], size[1] + patch[1]
    return (size, larger) if resize else (size,), getattr(config, 'num_channels', 3)


def compare(name, fields, by, part, resize, folder, seed, notes):
    """Largest difference; appends to `notes` why the model was not saved back."""
    module = by_transformers(made, name, fields, seed)
    by_transformers(module.save_pretrained, folder)
    generator = np.random.default_rng(seed)
    found, own = [], None
    sizes, channels = image_sizes(module, resize)
    for other in sizes:
        images = generator.normal(size=(2, *other, channels)).astype(np.float32)
        has = 'position_embedding' in str(module.state_dict().keys()) and other != sizes[0]
        options = dict(interpolate_pos_encoding=True) if has and accepts(name) else {}
        theirs = by_transformers(by, module, as_pixels(images), options)
        model, params = vit_jax.load(folder, part=part, image_size=other)
        found.append(difference(model, params, images, theirs))
        own = images if own is None else own
    try:
        with torch.no_grad():
            found.append(saved_back(folder, own, part))
    except UserError as e:
        notes.append(f'not saved: {e}')
    return verdicts.largest(found)


def accepts(name):
    """Whether the class has an argument to interpolate positions; others always do it."""
    never = 'Siglip2', 'Dinov2', 'Pixio', 'Yolos', 'DPT', 'Depth', 'Backbone', 'DINOv3', 'Eomt'
    return not any(part in name for part in never)


def line_of(name, fields, part):
    """The class, the part and what differs from its type's base."""
    base = next((b for b in (SIZES, RATIO) if b.items() <= fields.items()), {})
    base = base | CLASSES | HEADS | DECODER
    fields = {k: v for k, v in fields.items() if k != 'text_config' and base.get(k) != v}
    return f'{name} {part or ""} {fields or ""}'


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('parts', nargs='*')
    parser.add_argument('--random', type=int, help='draw this many models')
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    summary = verdicts.Summary()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    drawn = (draw_transformers.row(options.seed, i) for i in range(options.random or 0))
    for i, row in enumerate(KINDS if options.random is None else drawn):
        line = line_of(*row[:2], row[3])
        if options.parts and not any(p in line for p in options.parts):
            continue
        notes = []
        with tempfile.TemporaryDirectory() as folder, jax.default_matmul_precision('highest'):
            folder = pathlib.Path(folder) / 'saved'
            verdict, value, text = verdicts.judge(
                functools.partial(compare, *row, folder, i, notes), folder
            )
        summary.add(getattr(transformers, row[0]).config_class.model_type, verdict, value)
        print(f'{verdict:10} {line}\n           {", ".join([text, *notes])}', flush=True)
    summary.show()


if __name__ == '__main__':
    main()
