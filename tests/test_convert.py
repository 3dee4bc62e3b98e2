"""Checkpoints of other libraries, both ways: against those libraries, and bit by bit."""

import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import launched
import ml_dtypes
import numpy as np
import pytest
from compared import assert_close, done, outputs, random_images, randomised
from flax.traverse_util import flatten_dict
from recorded import DATA, FIXTURES, location
from safetensors.numpy import load_file, save_file

import vit_jax
from vit_jax import models
from vit_jax.convert import folding, load
from vit_jax.errors import UserError
from vit_jax.models import block

NONE = 'has no (MLP-Mixer|BiT ResNet)'
FORMATS = ('official', 'big_vision', 'timm', 'hf')
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@functools.cache
def fixture(name):
    return load.read(location(name))


def noise_like(shapes, seed=0):
    """Parameters of these shapes that are no zeros anywhere."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)


def assert_same_bits(a, b):
    """Of two trees of parameters."""
    a, b = flatten_dict(a, sep='/'), flatten_dict(b, sep='/')
    assert a.keys() == b.keys() and len(a) > 10
    for name in a:
        x, y = np.asarray(a[name]), np.asarray(b[name])
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes(), name


def different(model, other):
    """Names of the fields in which two models differ, of those that their equality depends on.

    How positions and tables of offsets are resized is each library's own rule: 'interpolation'.
    """
    fields = [
        f.name for f in dataclasses.fields(model) if f.compare and f.name not in ('parent', 'name')
    ]
    found = {f for f in fields if getattr(model, f) != getattr(other, f)}
    biases = [getattr(getattr(m, 'style', None), 'bias', None) for m in (model, other)]
    if None not in biases and biases[0].interpolation != biases[1].interpolation:
        bias = dataclasses.replace(biases[0], interpolation=biases[1].interpolation)
        if dataclasses.replace(model.style, bias=bias) == other.style:
            found = found - {'style'} | {'interpolation'}
    return found


# 1. Recorded results of other libraries.


@pytest.mark.parametrize('name', FIXTURES)
def test_recorded_results(name):
    expected = dict(np.load(DATA / f'{name}.expected.npz'))
    atol = 2e-4 if name == 'official_hybrid_resnet' else 1e-4
    for suffix in ('', '_resized') if 'images_resized' in expected else ('',):
        images = expected.pop(f'images{suffix}')
        size = images.shape[1:3]
        model, params = vit_jax.load(location(name), **({'image_size': size} if suffix else {}))
        logits, out = outputs(model, params, images)
        assert_close(logits, expected.pop(f'logits{suffix}'), atol)
        if f'pre_logits{suffix}' in expected:
            assert_close(out['pre_logits'], expected.pop(f'pre_logits{suffix}'), atol)
        if not suffix and 'features' in expected:  # of prefix tokens and patches
            features = expected.pop('features')
            count = out['encoded'].shape[1]
            assert features.shape[1] == sum(model.prefix.values()) + count
            assert_close(out['encoded'], features[:, -count:], atol)
            if 'cls' in out:
                assert_close(out['cls'], features[:, 0], atol)
    assert not expected  # nothing that was recorded is left uncompared


@pytest.mark.skipif(
    not {'VIT_JAX_DINOV2', 'VIT_JAX_DINOV2_EXPECTED'} <= os.environ.keys(),
    reason='VIT_JAX_DINOV2 names no folder, or VIT_JAX_DINOV2_EXPECTED no results',
)
def test_real_weights_of_dinov2():
    expected = np.load(os.environ['VIT_JAX_DINOV2_EXPECTED'])
    model, params = vit_jax.load(os.environ['VIT_JAX_DINOV2'], image_size=224)
    _, out = outputs(model, params, np.asarray(model.normalise(expected['images'])))
    assert_close(out['cls'], expected['cls'], 1e-3)
    assert_close(out['encoded'][0], expected['last_hidden_state_image0'][1:], 1e-3)


# 2. transformers, both ways.

VIT = dict(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
    image_size=32, patch_size=8,
)  # fmt: skip
DINOV2 = dict(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=4, image_size=42,
    patch_size=14,
)  # fmt: skip
DINOV3 = dict(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
    image_size=32, patch_size=8, num_register_tokens=3, layerscale_value=0.7,
)  # fmt: skip
BEIT = VIT | dict(layer_scale_init_value=0.7)
PIXIO = DINOV2 | dict(n_cls_tokens=3)
CLASSES = ('ant', 'bee', 'cat', 'dog', 'eel')
NAMED = dict(id2label=dict(enumerate(CLASSES)), label2id={n: i for i, n in enumerate(CLASSES)})
HF = {
    'vit': ('ViTForImageClassification', VIT | NAMED),
    'vit_tanh': ('ViTForImageClassification', VIT | NAMED | dict(hidden_act='gelu_pytorch_tanh')),
    'vit_no_qkv_bias': ('ViTForImageClassification', VIT | NAMED | dict(qkv_bias=False)),
    'vit_rectangle': ('ViTForImageClassification', VIT | NAMED | dict(image_size=(24, 40))),
    'vit_one_channel': ('ViTForImageClassification', VIT | NAMED | dict(num_channels=1)),
    'vit_pooler': ('ViTModel', VIT),
    'deit': ('DeiTForImageClassification', VIT | NAMED),
    'deit_teacher': ('DeiTForImageClassificationWithTeacher', VIT | NAMED),
    'deit_pooler': ('DeiTModel', VIT),
    'dinov2': ('Dinov2Model', DINOV2),
    'dinov2_classes': ('Dinov2ForImageClassification', DINOV2 | NAMED),
    'dinov2_swiglu': ('Dinov2ForImageClassification', DINOV2 | NAMED | dict(use_swiglu_ffn=True)),
    'dinov2_narrow': (
        'Dinov2Model', DINOV2 | dict(hidden_size=30, mlp_ratio=1, use_swiglu_ffn=True),
    ),
    'dinov3': ('DINOv3ViTModel', DINOV3),
    'dinov3_gated': ('DINOv3ViTModel', DINOV3 | dict(use_gated_mlp=True, hidden_act='silu')),
    'dinov3_key_bias': (
        'DINOv3ViTModel', DINOV3 | dict(key_bias=True, query_bias=False, num_register_tokens=0),
    ),
    'dinov3_rectangle': ('DINOv3ViTModel', DINOV3 | dict(image_size=(24, 40), rope_theta=30.0)),
    'beit': ('BeitModel', BEIT | dict(use_relative_position_bias=True)),
    'beit_shared': ('BeitForImageClassification', BEIT | NAMED | dict(
        use_shared_relative_position_bias=True, use_absolute_position_embeddings=True,
        use_mean_pooling=False,
    )),
    'beit_unscaled': ('BeitModel', VIT | dict(
        use_absolute_position_embeddings=True, layer_scale_init_value=0.0,
    )),
    'ijepa': ('IJepaModel', VIT),
    'ijepa_no_qkv_bias': (
        'IJepaForImageClassification', VIT | NAMED | dict(qkv_bias=False, hidden_act='gelu_new'),
    ),
    'ijepa_classes': ('IJepaForImageClassification', VIT | NAMED),
    'pixio': ('PixioModel', PIXIO),
    'aimv2': ('Aimv2VisionModel', VIT | dict(use_head=False)),
    'registers': ('Dinov2WithRegistersModel', DINOV2),
    'registers_classes': (
        'Dinov2WithRegistersForImageClassification', DINOV2 | NAMED | dict(num_register_tokens=3),
    ),
}  # fmt: skip


def by_torch(module, images, **options):
    """What a torch module returns for images [B, H, W, C]."""
    import torch

    with torch.no_grad():
        return module(torch.from_numpy(images.transpose(0, 3, 1, 2)), **options)


@pytest.fixture(scope='module', params=HF)
def hf(request, tmp_path_factory):
    """A tiny model of transformers, its folder and what is read from there."""
    pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    name, fields = HF[request.param]
    kind = getattr(transformers, name)
    module = randomised(kind(kind.config_class(**fields)))
    folder = tmp_path_factory.mktemp(request.param)
    module.save_pretrained(folder)
    size = fields['image_size']
    size = size if isinstance(size, tuple) else (size, size)
    images = random_images(2, *size, fields.get('num_channels', 3))
    return types.SimpleNamespace(
        name=request.param, kind=kind, module=module, folder=folder, size=size, images=images,
        fields=fields, read=load.read(folder),
    )  # fmt: skip


def assert_as_transformers(model, params, images, theirs):
    logits, out = outputs(model, params, images)
    if hasattr(theirs, 'logits'):
        assert_close(logits, theirs.logits.numpy())
        return
    tokens, pooled = theirs.last_hidden_state.numpy(), theirs.get('pooler_output')
    assert_close(out['encoded'], tokens[:, sum(model.prefix.values()) :])
    if 'cls' in model.prefix:
        assert_close(out['cls'], tokens[:, 0])
    if model.pool == 'none':  # Pixio has the mean of its class tokens
        pooled, logits = None, assert_close(logits, tokens)
    if pooled is not None:
        assert_close(logits, pooled.numpy())


def test_transformers_loads(hf):
    assert hf.read.source == 'hf' and hf.read.image_size == hf.size
    assert hf.read.classes == (CLASSES if 'id2label' in hf.fields else None)
    theirs = by_torch(hf.module, hf.images)
    assert_as_transformers(hf.read.model, hf.read.params, hf.images, theirs)
    zeros = done(hf.read.account).get('re-initialised', set())
    assert not zeros
    qkv = ('query', 'key', 'value')
    absent = {'vit_no_qkv_bias': qkv, 'ijepa_no_qkv_bias': qkv, 'dinov3_key_bias': ('query',),
              'aimv2': (*qkv, 'out', 'mlp')}  # fmt: skip
    absent = absent.get(hf.name, ('key',) if hf.name.startswith(('dinov3', 'beit')) else ())
    assert hf.read.model.style.unbiased == absent
    unused = done(hf.read.account).get('unused', set())
    assert unused <= {'embeddings.mask_token'}


@pytest.mark.parametrize('hf', [
    'vit', 'deit_pooler', 'deit_teacher', 'dinov2', 'registers_classes', 'dinov3', 'beit',
    'beit_shared', 'ijepa', 'pixio',
], indirect=True)  # fmt: skip
def test_transformers_resizes(hf):
    patch = hf.fields['patch_size']
    size = hf.size[0] + 2 * patch, hf.size[1] + patch
    images = random_images(2, *size, hf.images.shape[-1])
    has_option = 'mlp_ratio' not in hf.fields and 'dinov3' not in hf.name  # others always do it
    options = {} if not has_option else dict(interpolate_pos_encoding=True)
    model, params = vit_jax.load(hf.folder, image_size=size)
    assert_as_transformers(model, params, images, by_torch(hf.module, images, **options))


def test_transformers_loads_what_is_saved(hf, tmp_path):
    import transformers

    mean, std = ((0.1, 0.2, 0.3)[: hf.images.shape[-1]], (0.4, 0.5, 0.6)[: hf.images.shape[-1]])
    model = hf.read.model.clone(mean=mean, std=std)
    vit_jax.save(
        tmp_path / 'out', model, hf.read.params, 'hf', image_size=hf.size, classes=hf.read.classes,
        view='resize',
    )  # fmt: skip
    module, info = hf.kind.from_pretrained(tmp_path / 'out', output_loading_info=True)
    assert not any(info.values()), info
    assert_as_transformers(
        hf.read.model, hf.read.params, hf.images, by_torch(module.eval(), hf.images)
    )
    assert module.config.architectures == hf.module.config.architectures
    if hf.read.classes:
        assert module.config.id2label == dict(enumerate(CLASSES))
        assert module.config.label2id == {n: i for i, n in enumerate(CLASSES)}
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / 'out')
    assert tuple(processor.image_mean) == mean and tuple(processor.image_std) == std
    assert (processor.size['height'], processor.size['width']) == hf.size
    processor.image_mean = [0.7] * len(mean)  # and what transformers has written is read
    processor.save_pretrained(tmp_path / 'out')
    back = load.read(tmp_path / 'out')
    assert back.model == model.clone(mean=(0.7,) * len(mean)) and back.classes == hf.read.classes


@pytest.mark.parametrize('fields', [
    dict(layer_scale=0.5), dict(layer_scale=0.5, registers=2),
    dict(cls_token=False, pool='none', registers=2, registers_posemb=True),
])  # fmt: skip
def test_tables_of_a_square_are_no_others_in_transformers(fields, tmp_path):
    model, params = made(dict(num_classes=None, interpolation='bicubic') | fields)
    with pytest.raises(UserError, match='positions of square images in each .*, not of 16 x 64'):
        vit_jax.save(tmp_path / 'a', model, params, 'hf', image_size=(16, 64))
    vit_jax.save(tmp_path / 'b', model, params, 'hf', image_size=32)
    config = json.loads((tmp_path / 'b/config.json').read_text())
    (tmp_path / 'b/config.json').write_text(json.dumps(config | dict(image_size=[16, 64])))
    with pytest.raises(UserError, match='image_size is 16 x 64, but .* for that of a square'):
        load.read(tmp_path / 'b')


@pytest.mark.parametrize('kind, config', [
    ('ViTMSNForImageClassification', dict(num_labels=5)), ('ViTMSNModel', {}),
    ('ViTMAEForPreTraining', dict(decoder_hidden_size=24, decoder_num_hidden_layers=1,
                                  decoder_num_attention_heads=2, decoder_intermediate_size=24)),
])
def test_other_pre_training_of_a_vit(kind, config, tmp_path):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    mae = dict(mask_ratio=0.0) if 'MAE' in kind else {}  # no patch left out, the order by chance
    fields = dict(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        image_size=32, patch_size=8, **mae, **config,
    )  # fmt: skip
    config = getattr(transformers, kind.partition('For')[0].removesuffix('Model') + 'Config')
    module = randomised(getattr(transformers, kind)(config(**fields))).eval()
    module.save_pretrained(tmp_path)
    read = load.read(tmp_path)
    images = random_images(2, 32, 32, 3)
    with torch.no_grad():
        out = getattr(module, 'vit', module)(torch.from_numpy(images.transpose(0, 3, 1, 2)))
        theirs = out.last_hidden_state[:, 0]
        if 'Classification' in kind:
            theirs = module.classifier(theirs)
    logits, ours = outputs(read.model, read.params, images)
    ours = logits if 'Classification' in kind else ours['cls']
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)
    unused = done(read.account).get('unused', set())
    assert all(name.startswith('decoder.') for name in unused) and bool(unused) == bool(mae)


def encoder_of_detector(module, x):
    """Tokens of a YOLOS whose detection tokens leave before the first block."""
    x = module.vit.embeddings(x)[:, : -module.config.num_detection_tokens]
    for layer in module.vit.encoder.layer:
        x = layer(x)
    return module.vit.layernorm(x)


def encoder_of_eomt(module, x):
    """Tokens of an EoMT that no queries join."""
    rope = getattr(module, 'rope_embeddings', None)
    extra = {} if rope is None else dict(position_embeddings=rope(x))
    x = module.embeddings(x)
    for layer in module.layers:
        x = layer(x, **extra)
    return module.layernorm(x)


HEADS = dict(neck_hidden_sizes=[8] * 4, fusion_hidden_size=8)
QUERIES = dict(num_queries=5, num_blocks=1, num_upscale_blocks=1)
INSIDE = {  # class, fields, fields of its backbone, how the encoder's tokens are got, another size
    'data2vec': ('Data2VecVisionForSemanticSegmentation', VIT | dict(
        use_relative_position_bias=True, num_hidden_layers=4, out_indices=[0, 1, 2, 3]), None,
        lambda m, x: m.data2vec_vision(x).last_hidden_state, True),
    'dpt': ('DPTForDepthEstimation', VIT | HEADS, None,
            lambda m, x: m.dpt(x).last_hidden_state, True),
    'depth_anything': ('DepthAnythingForDepthEstimation', HEADS | dict(reassemble_hidden_size=48),
                       DINOV2 | dict(out_features=['stage2']),
                       lambda m, x: m.backbone(x).feature_maps[0].flatten(2).swapaxes(1, 2), True),
    'yolos': ('YolosForObjectDetection', VIT | dict(
        image_size=[24, 40], num_detection_tokens=5, use_mid_position_embeddings=False), None,
        encoder_of_detector, True),
    'eomt': ('EomtForUniversalSegmentation', DINOV2 | QUERIES, None, encoder_of_eomt, False),
    'eomt_gated': ('EomtForUniversalSegmentation', DINOV2 | QUERIES | dict(use_swiglu_ffn=True),
                   None, encoder_of_eomt, False),
    'eomt_dinov3': ('EomtDinov3ForUniversalSegmentation', DINOV3 | QUERIES, None, encoder_of_eomt,
                    True),
}  # fmt: skip


@pytest.mark.parametrize('name', INSIDE)
def test_encoders_inside_of_other_models_of_transformers(name, tmp_path):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    kind, fields, inner, tokens, resizes = INSIDE[name]
    if inner is not None:
        fields = fields | dict(backbone_config=transformers.Dinov2Config(**inner))
    kind = getattr(transformers, kind)
    module = randomised(kind(kind.config_class(**fields)))
    module.save_pretrained(tmp_path / 'in')
    if name not in ('yolos', 'eomt', 'eomt_gated'):  # which are read whole
        with pytest.raises(UserError, match=r"give part='encoder' \(.*\) for the encoder alone"):
            load.read(tmp_path / 'in')
    read = load.read(tmp_path / 'in', part='encoder')
    patch = read.model.stride[0]
    for extra in (0, 1) if resizes else (0,):
        size = read.image_size[0] + 2 * extra * patch, read.image_size[1] + extra * patch
        images = random_images(2, *size, 3)
        with torch.no_grad():
            theirs = tokens(module, torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
        model, params = vit_jax.load(tmp_path / 'in', part='encoder', image_size=size)
        ours = outputs(model, params, images)[1]['encoded']
        assert_close(ours, theirs[:, -ours.shape[1] :])
    assert model.num_classes is None and not np.isnan(ours).any()
    if read.model.last_norm != 'none':
        vit_jax.save(tmp_path / 'out', read.model, read.params, 'hf', image_size=read.image_size)
        assert_same_bits(load.read(tmp_path / 'out').params, read.params)


def test_shards_of_transformers(tmp_path):
    pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    module = randomised(transformers.ViTModel(transformers.ViTConfig(**VIT)))
    module.save_pretrained(tmp_path / 'whole')
    module.save_pretrained(tmp_path / 'shards', max_shard_size='60KB')
    assert len(list((tmp_path / 'shards').glob('*.safetensors'))) > 2
    whole, shards = (load.read(tmp_path / name) for name in ('whole', 'shards'))
    assert whole.model == shards.model
    assert_same_bits(whole.params, shards.params)
    next((tmp_path / 'shards').glob('*.safetensors')).unlink()
    with pytest.raises(UserError, match=r'index.json names model-\S+, which is not there'):
        load.read(tmp_path / 'shards')


# 3. timm, both ways.

TIMM_BASE = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7)
TIMM = {
    'token': {},
    'registers': dict(reg_tokens=4),
    'registers_no_embed': dict(reg_tokens=3, no_embed_class=True),
    'avg': dict(global_pool='avg'),
    'avg_no_fc_norm': dict(global_pool='avg', fc_norm=False),
    'map': dict(global_pool='map'),
    'qk_norm': dict(qk_norm=True),
    'no_qkv_bias': dict(qkv_bias=False),
    'layer_scale': dict(init_values=1e-3),
    'gelu_tanh': dict(act_layer='gelu_tanh'),
    'quick_gelu': dict(act_layer='quick_gelu'),
    'pre_norm': dict(pre_norm=True),
    'rectangle': dict(img_size=(24, 40)),
    'rectangular_patch': dict(patch_size=(4, 8)),
    'no_positions': dict(pos_embed='none'),
    'token_fc_norm': dict(fc_norm=True),
    'registers_alone': dict(class_token=False, global_pool='avg', reg_tokens=2),
    'registers_alone_no_embed': dict(
        class_token=False, global_pool='avg', reg_tokens=2, no_embed_class=True
    ),
    'no_head': dict(num_classes=0),
    'one_channel': dict(in_chans=1),
    'mlp_ratio': dict(mlp_ratio=3.3),
    'unpooled': dict(global_pool=''),
    'clip': {},
    'swiglu': {},
    'distilled': {},
}
TIMM_RESIZED = set(TIMM) - {
    'no_positions', 'one_channel', 'swiglu', 'unpooled', 'rectangle', 'rectangular_patch', 'clip',
    'distilled',
}  # fmt: skip


def timm_model(name, args):
    """(module, architecture, the arguments that JSON has)."""
    import timm
    from timm.models import deit, vision_transformer

    if name == 'clip':  # norms with epsilon 1e-5
        architecture = 'vit_base_patch16_clip_224'
        return timm.create_model(architecture, **args), architecture, args
    if name == 'distilled':
        architecture = 'deit_tiny_distilled_patch16_224'
        return deit.VisionTransformerDistilled(**args), architecture, args
    layers = {}
    if name == 'swiglu':
        import torch

        layers = dict(mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU)
        said = args | dict(init_values=None, mlp_ratio=4)  # beside what this architecture sets
        module = vision_transformer.VisionTransformer(**args, **layers)
        return module, 'vit_giant_patch14_dinov2', said
    return vision_transformer.VisionTransformer(**args, **layers), 'vit', args


@pytest.mark.parametrize('name', TIMM)
def test_timm(name, tmp_path):
    timm = pytest.importorskip('timm')
    from timm.models import vision_transformer

    args = TIMM_BASE | TIMM[name]
    module, architecture, args = timm_model(name, args)
    arrays = {k: v.numpy() for k, v in randomised(module).state_dict().items()}
    folder = tmp_path / 'in'
    folder.mkdir()
    save_file(arrays, folder / 'model.safetensors')
    config = dict(architecture=architecture, num_classes=args['num_classes'], model_args=args)
    (folder / 'config.json').write_text(json.dumps(config))
    size = args['img_size']
    size = size if isinstance(size, tuple) else (size, size)
    images = random_images(2, *size, args.get('in_chans', 3))

    def theirs(module, images):
        return by_torch(module, images).numpy()

    read = load.read(folder)
    logits = outputs(read.model, read.params, images)[0]
    assert_close(logits, theirs(module, images))
    vit_jax.save(tmp_path / 'out', read.model, read.params, 'timm', image_size=size)
    back = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert_close(logits, theirs(back, images))
    if name in TIMM_RESIZED:
        larger = size[0] + 16, size[1] + 8
        images = random_images(2, *larger, 3)
        other = vision_transformer.VisionTransformer(**(args | dict(img_size=larger))).eval()
        other.load_state_dict(vision_transformer.checkpoint_filter_fn(module.state_dict(), other))
        logits = outputs(*vit_jax.load(folder, image_size=larger), images)[0]
        assert_close(logits, theirs(other, images))


# The architecture that a file is saved as.
ARCHITECTURES = {
    **dict.fromkeys(
        ('timm_vit_token', 'timm_vit_avg_fcnorm', 'timm_deit3', 'timm_vit_registers',
         'timm_siglip_map'), 'vit_base_patch16_224',
    ),
    'timm_aimv2': 'aimv2_large_patch14_224', 'timm_beit': 'beit_base_patch16_224',
    'timm_beit3': 'vit_base_patch16_clip_224', 'timm_beit_shared': 'beit_base_patch16_224',
    'timm_parallel': 'vit_base_patch16_xp_224', 'timm_radio': 'vit_base_patch16_radio_v3',
    'timm_relpos': 'vit_relpos_base_patch16_224',
    'timm_relpos_cls': 'vit_relpos_base_patch16_rpn_224',
    'timm_rpn': 'vit_base_patch16_rpn_224', 'timm_srelpos': 'vit_relpos_base_patch16_224',
}  # fmt: skip


@pytest.mark.parametrize('name', [name for name in FIXTURES if name.startswith('timm')])
def test_a_timm_file_is_written_as_timm_wrote_it(name, tmp_path):
    read = fixture(name)
    classes = [f'c{i}' for i in range(read.model.num_classes)]
    size = read.image_size or (8, 8)
    options = dict(image_size=size, classes=classes)
    vit_jax.save(tmp_path / 'out', read.model, read.params, 'timm', **options)
    theirs = load_file(location(name) / 'model.safetensors')
    ours = load_file(tmp_path / 'out' / 'model.safetensors')
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key].dtype == np.float32 and ours[key].shape == theirs[key].shape, key
        assert ours[key].tobytes() == theirs[key].astype(np.float32).tobytes(), key
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    if name in ARCHITECTURES:
        assert config['architecture'] == ARCHITECTURES[name]
    assert config['num_classes'] == len(classes) and config['label_names'] == classes
    assert config['pretrained_cfg']['input_size'] == [3, *size]
    assert config['pretrained_cfg']['mean'] == list(read.model.mean)
    assert config['pretrained_cfg']['std'] == list(read.model.std)


@pytest.mark.parametrize('fields, architecture, args', [
    (dict(gelu='tanh'), 'vit_base_patch16_224', dict(act_layer='gelu_tanh')),
    (dict(gelu='quick'), 'vit_base_patch16_224', dict(act_layer='quick_gelu')),
    (dict(epsilon=1e-5), 'vit_base_patch16_clip_224', dict(act_layer='gelu')),
    (dict(glu=True), 'vit_giant_patch14_dinov2', dict(act_layer='silu', mlp_ratio=4)),
    (dict(posemb='none', cls_posemb=True), 'vit_base_patch16_224', dict(pos_embed='none')),
    (dict(pool='none'), 'vit_base_patch16_224', dict(global_pool='')),
    (dict(pool='gap', cls_token=True), 'vit_base_patch16_224',
     dict(global_pool='avg', fc_norm=False)),
    (dict(style=dict(norm='rms'), patch_norm=True), 'vit_base_patch16_224',
     dict(norm_layer='rmsnorm', embed_norm_layer='rmsnorm')),
    (dict(style=dict(norm='rms'), glu=True, epsilon=1e-5), 'aimv2_large_patch14_224',
     dict(embed_norm_layer='', mlp_ratio=2, class_token=True)),
    (dict(style=dict(order='parallel')), 'vit_base_patch16_xp_224',
     dict(norm_layer='layernorm', pre_norm=False, qkv_bias=True, qk_norm=False)),
    (dict(interpolation='bilinear'), 'flexivit_base', dict(no_embed_class=False)),
    (dict(last_norm='none', style=dict(norms=['attention'])), 'vit_base_patch16_radio_v3',
     dict(init_values=None, reg_tokens=0, scale_attn_norm=True)),
    (dict(dist_token=True, dist_head=True), 'deit_base_distilled_patch16_224', {}),
])  # fmt: skip
def test_what_the_config_of_a_timm_folder_says(fields, architecture, args, tmp_path):
    model, params = made({'gelu': 'exact', **fields}, (24, 40))
    vit_jax.save(tmp_path / 'out', model, params, 'timm', image_size=(24, 40))
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['architecture'] == architecture
    args = dict(img_size=[24, 40], embed_dim=48, depth=2, num_heads=3, num_classes=5) | args
    assert config['model_args'].items() >= args.items()


def test_transformers_wrapper_of_timm(tmp_path):
    arrays = load_file(location('timm_vit_token') / 'model.safetensors')
    config = json.loads((location('timm_vit_token') / 'config.json').read_text())
    config |= dict(model_type='timm_wrapper', do_pooling=True, initializer_range=0.02,
                   architectures=['TimmWrapperForImageClassification'], dtype='float32')
    save_file({f'timm_model.{n}': a for n, a in arrays.items()}, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(config))
    back = assert_is(tmp_path, 'timm_vit_token')
    assert back.source == 'timm' and 'ignored' not in done(back.account)


# 4. Round trips.


def made(fields, size=(32, 32)):
    """(model, parameters of noise, with zeros for biases that the model does not read)."""
    base = dict(width=48, depth=2, num_heads=3, mlp_dim=96, patch_size=8, num_classes=5)
    model = models.build('vit/8', **(base | fields))
    images = jax.ShapeDtypeStruct((1, *size, len(model.mean)), jnp.float32)
    params = noise_like(jax.eval_shape(model.init, jax.random.key(0), images)['params'])
    for i, name in enumerate(block.PROJECTIONS):
        if name in model.style.unbiased and 'bias' in params['encoder']['attn']['qkv']:
            params['encoder']['attn']['qkv']['bias'][:, i] = 0
    return model, params


EXACT = dict(gelu='exact', interpolation='bicubic')
LAYER_SCALE = EXACT | dict(layer_scale=1.0)
MADE = {
    'official_vit_gap': (dict(pool='gap'), (32, 32)),
    'official_rectangle': (dict(), (24, 40)),
    'big_vision_cls_sincos': (dict(posemb='sincos2d'), (32, 32)),
    'hf_vit': (EXACT | dict(epsilon=1e-12), (32, 32)),
    'hf_vit_pooler': (EXACT | dict(num_classes=None, representation_size=48), (32, 32)),
    'hf_deit_teacher': (
        EXACT | IMAGENET | dict(epsilon=1e-12, dist_token=True, dist_head=True), (32, 32),
    ),
    'hf_dinov2_swiglu': (
        LAYER_SCALE | IMAGENET | dict(pool='cls_gap', glu=True, mlp_dim=128), (32, 32),
    ),
    'hf_registers': (
        dict(LAYER_SCALE, interpolation='bicubic_antialias', registers=3, num_classes=None),
        (32, 32),
    ),
    'hf_dinov3': (
        LAYER_SCALE | IMAGENET
        | dict(epsilon=1e-5, num_classes=None, posemb='none', registers=3, pool='cls',
               style=dict(rope={}, unbiased=['key'])), (24, 40),
    ),
    'timm_rope_of_gated_post_norm': (
        dict(gelu='exact', glu=True, mlp_dim=90, pool='map', registers=2, posemb='none',
             pool_style=dict(prefix=True, num_heads=6, mlp_dim=50),
             style=dict(order='post', norms=['attention'], unbiased=['query', 'key', 'value'],
                        rope=dict(coordinates='index', offset=2.0, reference=(3, 4)))), (24, 40),
    ),
    'timm_qk_norm': (dict(gelu='exact', style=dict(norms=['query_key'])), (24, 40)),
    'timm_quick_no_positions': (
        dict(gelu='quick', posemb='none', registers=2, mean=(0.5,), std=(0.5,)), (32, 32),
    ),
    'timm_swiglu_unpooled': (dict(gelu='exact', glu=True, pool='none', num_classes=None), (32, 32)),
    'timm_distilled': (dict(IMAGENET, gelu='exact', dist_token=True, dist_head=True), (32, 32)),
    'timm_parallel_layer': (
        dict(gelu='exact', layer_scale=0.1, style=dict(order='parallel')), (32, 32),
    ),
    'timm_rms_swiglu': (
        dict(gelu='exact', glu=True, patch_norm=True,
             style=dict(norm='rms', norms=['mlp'], unbiased=['out', 'mlp'])), (24, 40),
    ),
    'timm_relpos_mlp': (
        dict(gelu='exact', pool='gap', layer_scale=0.1, posemb='none',
             style=dict(bias=dict(kind='mlp'), norms=['query_key'])), (24, 40),
    ),
}  # fmt: skip
# {model: (formats that express it, those that express it with fold=True as well)}
WAYS = {
    'big_vision_gap_sincos': ('big_vision', 'official'),
    'big_vision_map_learn': ('big_vision timm', ''),
    'big_vision_scan_gap': ('official big_vision timm hf', ''),
    'big_vision_tok_learn': ('big_vision timm', 'official hf'),
    'hf_clip': ('timm hf', ''),
    'hf_siglip': ('big_vision timm hf', ''),
    'hf_siglip2': ('big_vision timm hf', ''),
    'official_hybrid_resnet': ('official', ''),
    'official_hybrid_stem': ('official', ''),
    'official_mixer': ('official', ''),
    'official_vit_prelogits': ('official', 'big_vision'),
    'timm_aimv2': ('timm', ''),
    'timm_beit': ('timm hf', ''),
    'timm_beit3': ('timm', ''),
    'timm_beit_shared': ('timm', ''),
    'timm_parallel': ('timm', ''),
    'timm_prefix_pool': ('timm', ''),
    'timm_radio': ('timm', ''),
    'timm_relpos': ('timm', ''),
    'timm_relpos_cls': ('timm', ''),
    'timm_rpn': ('timm', ''),
    'timm_srelpos': ('timm', ''),
    'timm_deit3': ('timm', 'hf'),
    'timm_siglip_map': ('timm', ''),
    'timm_vit_avg_fcnorm': ('timm', ''),
    'timm_vit_registers': ('timm', 'hf'),
    'timm_vit_token': ('timm hf', ''),
    'bit_small': ('timm', ''),
    'hybrid_staged': ('timm', ''),
    'hybrid_stem': ('timm', ''),
    'mixer_exact': ('timm', ''),
    'naflex_factorised': ('timm', ''),
    'naflex_gap': ('timm', ''),
    'naflex_map': ('big_vision timm', ''),
    'naflex_radio': ('timm', ''),
    **dict.fromkeys((
        'timm_dinov3', 'timm_dinov3_gated', 'timm_eva02', 'timm_eva02_clip', 'timm_eva02_enormous',
        'timm_eva02_tiny', 'timm_pe_core', 'timm_pe_spatial', 'timm_rope', 'timm_rope_mixed_ape',
    ), ('timm', '')),
    'timm_eva_giant': ('timm hf', ''),  # a BEiT without biases by offset
    'official_vit_gap': ('official big_vision timm hf', ''),
    'official_rectangle': ('official timm hf', 'big_vision'),
    'big_vision_cls_sincos': ('big_vision', 'official timm hf'),
    'hf_vit': ('hf', ''),
    'hf_vit_pooler': ('hf', ''),
    'hf_deit_teacher': ('hf', ''),
    'hf_dinov2_swiglu': ('hf', ''),
    'hf_registers': ('hf', 'timm'),
    'hf_dinov3': ('timm hf', ''),
    'timm_rope_of_gated_post_norm': ('timm', ''),
    'timm_qk_norm': ('timm', ''),
    'timm_quick_no_positions': ('timm', ''),
    'timm_swiglu_unpooled': ('timm', ''),
    'timm_distilled': ('timm hf', ''),
    'timm_parallel_layer': ('timm', ''),
    'timm_rms_swiglu': ('timm', ''),
    'timm_relpos_mlp': ('timm', ''),
}


@functools.cache
def subject(name):
    """(model, parameters, image size)."""
    if name in FIXTURES:
        read = fixture(name)
        return read.model, read.params, read.image_size or (32, 32)
    fields, size = MADE[name]
    return (*made(fields, size), size)


def file_of(folder, format):
    return folder / ('out.npz' if format in ('official', 'big_vision') else 'out')


def assert_all_loaded(read):
    """Apart from a token that transformers' DINOv2 with registers cannot do without, and biases.

    timm and CLIP have no bias of patches before a norm, CLIP none of its projection.
    """
    zeros = done(read.account).get('re-initialised', set())
    clip = getattr(read.model, 'pre_norm', False)
    assert zeros <= ({'embedding/bias', 'head/bias'} if clip else set())
    assert done(read.account).keys() <= {'loaded', 'unused', 're-initialised'}
    unused = done(read.account).get('unused', set())
    assert unused <= ({'embeddings.mask_token'} if getattr(read.model, 'registers', 0) else set())


@pytest.mark.parametrize('format', FORMATS)
@pytest.mark.parametrize('name', [*FIXTURES, *MADE])
def test_round_trip(name, format, tmp_path):
    model, params, size = subject(name)
    path = file_of(tmp_path, format)
    options = dict(image_size=size, config={'seed': 3})
    if model.num_classes:
        options['classes'] = [f'class {i}' for i in range(model.num_classes)]
    plain, folded = (ways.split() for ways in WAYS[name])
    if format in plain:
        vit_jax.save(path, model, params, format, **options)
        back = load.read(path)
        assert_same_bits(back.params, params)
        own = name in FIXTURES and format == 'timm' and name.startswith('timm')
        assert different(back.model, model) <= (
            set() if own else {'interpolation', 'square_posemb'}
        )
        assert_all_loaded(back)
        if model.posemb == 'learn':
            assert back.image_size == tuple(size)
        assert back.classes == (tuple(options['classes']) if model.num_classes else None)
        assert back.config == {'seed': 3}
        folded = folding.fold_positions(model, flatten_dict(params, sep='/'), format, size)
        assert folded[0] == model  # there is nothing to fold
        assert_same_bits(folded[1], flatten_dict(params, sep='/'))
    else:
        with pytest.raises(UserError) as e:
            vit_jax.save(path, model, params, format, **options)
        field = re.search(r'cannot express (\w+)[.=]', str(e.value))
        assert (field and hasattr(model, field[1])) or re.search(NONE, str(e.value))
        assert not any(tmp_path.iterdir())
    if format in folded:
        vit_jax.save(path, model, params, format, fold=True, **options)
        back = load.read(path)
        assert_all_loaded(back)
        images = random_images(2, *size, len(model.mean))
        a, b = (outputs(m, p, images)[0] for m, p in ((model, params), back[:2]))
        assert np.abs(a).max() > 0.1 and a.tobytes() == b.tobytes()
    elif format not in plain:
        with pytest.raises(UserError, match=f'cannot express|{NONE}'):
            vit_jax.save(path, model, params, format, fold=True, **options)


def test_every_format_is_expressed_by_some_model_both_ways():
    for format in FORMATS:
        for i in (0, 1):  # plain, and by folding alone
            assert any(format in ways[i].split() for ways in WAYS.values())
    assert WAYS.keys() == {*FIXTURES, *MADE}


@pytest.mark.parametrize('fields, format, words', [
    (dict(gelu='exact'), 'official', "cannot express gelu='exact' of this model, only 'tanh'"),
    (dict(epsilon=1e-5), 'big_vision', 'epsilon=1e-05 of this model, only 1e-06'),
    (IMAGENET, 'official', 'mean=(0.485, 0.456, 0.406)'),
    (dict(mean=(0.5,), std=(0.5,)), 'official', 'mean=(0.5,)'),
    (dict(mean=(0.5,), std=(0.5,)), 'big_vision', 'mean=(0.5,)'),
    (dict(registers=2), 'hf', 'registers=2'),
    (dict(pool='map'), 'official', "pool='map'"),
    (dict(pool='cls_gap'), 'timm', "pool='cls_gap'"),
    (dict(glu=True, pool='map'), 'timm', "pool='map'"),  # its pooling would be SiLU too
    (dict(dist_token=True, dist_head=True, last_norm='pooled'), 'timm', "last_norm='pooled'"),
    (dict(dist_token=True, dist_head=True, pre_norm=True), 'timm', 'pre_norm=True'),
    (dict(dist_token=True, dist_head=True, posemb='none'), 'timm', "posemb='none'"),
    (dict(pre_norm=True), 'timm', 'a patch embedding with bias before pre_norm'),
    (dict(posemb='none'), 'timm', 'states an image size; give image_size'),
])  # fmt: skip
def test_what_a_format_can_not_express(fields, format, words, tmp_path):
    model, params = made(fields)
    with pytest.raises(UserError, match=re.escape(words)):
        vit_jax.save(file_of(tmp_path, format), model, params, format)
    assert not any(tmp_path.iterdir())


def test_what_save_refuses(tmp_path):
    model, params = made({})
    bad = dict(params, cls=np.zeros((1, 2, 48), np.float32))
    half = dict(params, cls=params['cls'].astype(ml_dtypes.bfloat16))
    extra = dict(params, more=np.zeros(3, np.float32))
    for path, changed, options, words in (
        ('a', {}, {}, 'format official is one file, name it with .npz'),
        ('a.npz', {}, dict(format='timm'), 'format timm is a folder, name it without .npz'),
        ('a.npz', {}, dict(format='npz'), "format 'npz' is none of official, big_vision, timm"),
        ('a.npz', {}, dict(classes=['ant']), '1 class names for a head of 5 classes'),
        ('a.npz', bad, {}, 'parameter cls is [1, 2, 48] in params, but [1, 1, 48] in the model'),
        ('a.npz', half, {}, 'parameter cls has dtype bfloat16, not float32'),
        ('a.npz', extra, {}, 'parameter more is [3] in params, but absent in the model'),
        ('a.npz', {}, dict(image_size=64), 'parameter posemb is [1, 17, 48] in params, but '
                                           '[1, 65, 48] in the model'),
    ):  # fmt: skip
        with pytest.raises(UserError, match=re.escape(words)):
            vit_jax.save(tmp_path / path, model, changed or params, **options)
    with pytest.raises(UserError, match='save writes local files'):
        vit_jax.save('gs://bucket/a.npz', model, params)
    assert not any(tmp_path.iterdir())


# 5. Names and layouts of older and larger files.


def written(path, arrays):
    np.savez(path, **arrays)
    return path


def arrays_of(name):
    return dict(np.load(location(name)))


def renamed(arrays, *rules):
    """The arrays under names in which each pattern is replaced."""
    names = list(arrays)
    for pattern, new in rules:
        names = [re.sub(pattern, new, name) for name in names]
    assert len(set(names)) == len(names) and names != list(arrays)
    return dict(zip(names, arrays.values(), strict=True))


def assert_is(path, name, **options):
    """A file holds the model and the parameters of a fixture."""
    back = load.read(path, **options)
    assert back.model == fixture(name).model
    assert_same_bits(back.params, fixture(name).params)
    return back


def test_numbers_from_before_linen(tmp_path):
    block = r'(encoderblock_\d+)/'
    arrays = renamed(
        arrays_of('official_vit_prelogits'),
        (block + 'LayerNorm_1', r'\1/LayerNorm_2'), (block + 'MlpBlock_0', r'\1/MlpBlock_3'),
        (block + 'MultiHeadDotProductAttention_0', r'\1/MultiHeadDotProductAttention_1'),
    )  # fmt: skip
    assert 'Transformer/encoderblock_1/MlpBlock_3/Dense_1/bias' in arrays
    assert_is(written(tmp_path / 'old.npz', arrays), 'official_vit_prelogits')
    both = arrays | {'Transformer/encoderblock_1/LayerNorm_1/bias': np.ones(48, np.float32)}
    with pytest.raises(UserError, match='encoderblock_1/LayerNorm_'):
        load.read(written(tmp_path / 'both.npz', both))


def test_group_norms_with_axes_of_one(tmp_path):
    arrays = arrays_of('official_hybrid_resnet')
    groups = [n for n in arrays if re.search(r'(^|/)gn\w+/', n)]
    assert len(groups) == 18
    old = arrays | {n: arrays[n].reshape(1, 1, 1, -1) for n in groups}
    assert_is(written(tmp_path / 'old.npz', old), 'official_hybrid_resnet')


def test_big_vision_with_the_state_of_an_optimizer(tmp_path):
    arrays = arrays_of('big_vision_tok_learn')
    state = {'opt/0/mu/cls': np.ones((1, 1, 48), np.float32), 'opt/count': np.array(3)}
    back = assert_is(written(tmp_path / 'a.npz', arrays | state), 'big_vision_tok_learn')
    assert done(back.account)['unused'] == set(state)


def test_big_vision_with_and_without_prefix(tmp_path):
    for name in ('big_vision_tok_learn', 'big_vision_map_learn'):
        bare = {n.removeprefix('params/'): a for n, a in arrays_of(name).items()}
        assert_is(written(tmp_path / 'a.npz', bare), name)
        assert_is(
            written(tmp_path / 'b.npz', {f'params/{n}': a for n, a in bare.items()}), name
        )


@pytest.mark.parametrize('prefix', ['', 'params/'])
def test_big_vision_with_two_towers(prefix, tmp_path):
    image, other = (
        {n.removeprefix('params/'): a for n, a in arrays_of(f'big_vision_{name}').items()}
        for name in ('map_learn', 'tok_learn')
    )
    text = {'Embed_0/embedding': np.ones((9, 48), np.float32)}
    towers = {f'{prefix}img/{n}': a for n, a in image.items()}
    towers |= {f'{prefix}txt/{n}': a for n, a in text.items()}
    towers |= {f'{prefix}video/{n}': a for n, a in other.items()}
    towers[f'{prefix}t'] = np.ones(1, np.float32)
    path = written(tmp_path / 'two.npz', towers)
    by_name = assert_is(f'{path}:img', 'big_vision_map_learn')
    for part in ('image', 'encoder'):
        by_part = load.read(path, part=part)
        assert by_part.account == by_name.account
        assert_same_bits(by_part.params, by_name.params)
    with pytest.raises(UserError, match="a text tower; give part='image'"):
        load.read(path)
    with pytest.raises(UserError, match="no part 'words'; there are encoder, image, text"):
        load.read(path, part='words')
    unused = {'t', 'txt/Embed_0/embedding', *(f'video/{n}' for n in other)}
    assert done(by_name.account)['unused'] == unused
    assert_is(f'{path}:video', 'big_vision_tok_learn')
    with pytest.raises(UserError, match="no part 'image', but img, txt, video"):
        load.read(f'{path}:image')
    for address, part in ((f'{path}:txt', None), (path, 'text')):
        with pytest.raises(UserError, match='the file has no array txt/Encoder_0/encoderblock_0/'):
            load.read(address, part=part)


def test_big_vision_stacked_is_unstacked(tmp_path):
    stacked = arrays_of('big_vision_scan_gap')
    single = {}
    for name, array in stacked.items():
        if 'encoderblock/' in name:
            for i, layer in enumerate(array):
                single[name.replace('encoderblock/', f'encoderblock_{i}/')] = layer
        else:
            single[name] = array
    assert len(single) == len(stacked) + 2 * 16
    assert_is(written(tmp_path / 'single.npz', single), 'big_vision_scan_gap')


def test_big_vision_in_bfloat16(tmp_path):
    arrays = arrays_of('big_vision_gap_sincos')
    half = {n: a.astype(ml_dtypes.bfloat16) for n, a in arrays.items()}
    back = load.read(written(tmp_path / 'half.npz', half))
    rounded = {n: a.astype(np.float32) for n, a in half.items()}
    whole = load.read(written(tmp_path / 'whole.npz', rounded))
    assert_same_bits(back.params, whole.params)
    kernel = np.asarray(back.params['embedding']['kernel'])
    assert kernel.dtype == np.float32
    assert 0 < np.abs(kernel - arrays['params/embedding/kernel']).max() < 0.01


def test_old_names_of_big_vision(tmp_path):
    arrays = renamed(arrays_of('big_vision_map_learn'), ('^pos_emb', 'Transformer/pos_emb'))
    assert_is(written(tmp_path / 'a.npz', arrays), 'big_vision_map_learn')
    arrays = renamed(arrays, ('^MAPHead_0/', ''))
    assert {'probe', 'MlpBlock_0/Dense_0/kernel', 'LayerNorm_0/scale'} < arrays.keys()
    assert_is(written(tmp_path / 'b.npz', arrays), 'big_vision_map_learn')


@pytest.mark.parametrize('name', ['pos_embedding', 'Transformer/pos_embedding'])
def test_big_vision_with_the_class_token_in_the_table(name, tmp_path):
    arrays = arrays_of('big_vision_tok_learn')
    half = arrays['params/cls'] / 2  # exactly: token and position add up to what it was
    table = np.concatenate([half, arrays.pop('params/pos_embedding')], axis=1)
    arrays |= {'params/cls': half, f'params/{name}': table}
    model, params = vit_jax.load(written(tmp_path / 'a.npz', arrays))
    wanted = vit_jax.load(location('big_vision_tok_learn'))[0]
    assert different(model, wanted) == {'cls_posemb'}
    expected = np.load(DATA / 'big_vision_tok_learn.expected.npz')
    assert_close(outputs(model, params, expected['images'])[0], expected['logits'])


# 6. Saving is atomic.

SAVES = """
import sys
from vit_jax.convert import folding, load, save
path, format, *sources = sys.argv[1:]
versions = [load.read(source) for source in sources]
while True:
    for number, read in enumerate(versions):
        names = [f'{number}-{i}' for i in range(5)]
        save.save(path, read.model, read.params, format, classes=names)
        print(number, flush=True)
"""


def contents(path):
    """{name: bytes} of a file or of a folder."""
    if path.is_dir():
        return {p.name: p.read_bytes() for p in path.iterdir()}
    return {path.name: path.read_bytes()}


@pytest.mark.slow
@pytest.mark.parametrize('format', ['official', 'timm'])
def test_a_save_that_is_killed_leaves_one_of_the_two_versions(format, tmp_path):
    # A stopped process leaves its files as a killed one does, and can go on to the next moment.
    rng = random.Random(0)
    model, _ = made(dict(width=96, mlp_dim=4000))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)['params']
    path, whole, sources, versions = file_of(tmp_path / 'saved', format), [], [], []
    for number in range(2):
        params = noise_like(shapes, seed=number)
        sources.append(tmp_path / f'{number}.npz')
        vit_jax.save(sources[-1], model, params)
        classes = [f'{number}-{i}' for i in range(5)]
        vit_jax.save(path, model, params, format, classes=classes)
        whole.append(contents(path))
        versions.append((params, tuple(classes)))
    assert whole[0] != whole[1]
    found, between = set(), 0

    def writing():
        return any(p.name.endswith('.part') for p in path.parent.iterdir())

    def check(moment):
        nonlocal between
        between += writing()
        number = whole.index(contents(path))  # or this fails
        found.add(number)
        if moment % 10 == 0:
            back = load.read(path)
            params, classes = versions[number]
            assert_same_bits(back.params, params)
            # beside an .npz of one version can lie the names of the other, which are not taken
            assert back.classes == classes or (back.classes is None and format == 'official')

    with launched.log_of(path).open('w') as log:
        child = subprocess.Popen(
            [sys.executable, '-c', SAVES, path, format, *sources], stdout=subprocess.PIPE,
            stderr=log, env=launched.ENVIRONMENT,
        )  # fmt: skip
    with child, child.stdout as output:
        try:
            assert output.readline()
            for moment in range(400):
                if moment % 2:
                    launched.wait_for(writing, child, path)
                time.sleep(rng.uniform(0, 0.02 if moment % 2 else 0.06))
                os.kill(child.pid, signal.SIGSTOP)
                assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
                check(moment)
                enough = moment >= 24 and between > 5 and found == {0, 1}
                if enough and writing():  # killed while it is stopped in the midst of a save
                    break
                os.kill(child.pid, signal.SIGCONT)
        finally:
            child.kill()
    check(0)
    assert writing()
    vit_jax.save(path, model, versions[0][0], format, classes=versions[0][1])
    assert contents(path) == whole[0] and not writing()
    assert found == {0, 1} and between > 5  # moments in the midst of it


def test_what_lies_beside_another_file_is_not_taken(tmp_path):
    model, params = made({}, (24, 40))
    names = [f'c{i}' for i in range(5)]
    vit_jax.save(tmp_path / 'a.npz', model, params, image_size=(24, 40), classes=names)
    read = load.read(tmp_path / 'a.npz')
    assert (read.classes, read.image_size) == (tuple(names), (24, 40))
    vit_jax.save(tmp_path / 'b.npz', model, noise_like(params, seed=3), image_size=(24, 40))
    (tmp_path / 'b.npz').rename(tmp_path / 'a.npz')
    read = load.read(tmp_path / 'a.npz')
    assert (read.classes, read.image_size) == (None, None)


@contextlib.contextmanager
def full_after(size):
    """No file may become larger than so many bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize('format', FORMATS)
def test_a_full_disk_leaves_what_was_there(format, tmp_path):
    fields = dict(cls_posemb=False) if format == 'big_vision' else {}
    model, params = made(fields)
    path = file_of(tmp_path, format)
    vit_jax.save(path, model, params, format)
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    for size in (100_000, 0):
        with full_after(size), pytest.raises(UserError, match=f'cannot write {path}: '):
            vit_jax.save(path, model, noise_like(params, seed=9), format)
        assert before == {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
        assert not list(tmp_path.glob('.*'))


@pytest.mark.parametrize('format', ['timm', 'hf'])
def test_a_folder_with_other_files_is_refused(format, tmp_path):
    model, params = made(dict(gelu='exact'))
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.tex').write_text('years')
    (tmp_path / 'file').write_text('more')
    for name, held in (('mine', 'thesis.tex'), ('file', 'file')):
        with pytest.raises(UserError, match=f"{name} holds '{held}', which no export wrote"):
            vit_jax.save(tmp_path / name, model, params, format)
    assert (tmp_path / 'mine' / 'thesis.tex').read_text() == 'years'
    assert (tmp_path / 'file').read_text() == 'more'
    assert {p.name for p in tmp_path.iterdir()} == {'mine', 'file'}
    (tmp_path / 'mine' / 'thesis.tex').unlink()
    vit_jax.save(tmp_path / 'mine', model, params, format)  # an empty one is taken
    vit_jax.save(tmp_path / 'mine', model, params, format)  # and so is an export
    assert_same_bits(load.read(tmp_path / 'mine').params, params)
