"""What JSON files beside weights state: read, compared with the arrays, or named."""

import dataclasses
import json
import math
import pathlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import vit_jax
from vit_jax.convert import families, files, load
from vit_jax.convert.hf import processor as hf_processor
from vit_jax.convert.timm import arguments as timm_arguments
from vit_jax.convert.timm import vit_model
from vit_jax.data import tasks
from vit_jax.errors import UserError

DATA = pathlib.Path(__file__).with_name('data')
TIMM = sorted(p.name for p in DATA.glob('timm_*') if p.is_dir())
NAMED = [  # whose config.json names an architecture
    name for name in TIMM
    if json.loads((DATA / name / 'config.json').read_text())['architecture'] != 'vit'
]  # fmt: skip
HALF = dict(mean=[0.5] * 3, std=[0.5] * 3)


def written(folder, arrays, **documents):
    """A folder with weights and JSON files."""
    folder.mkdir(exist_ok=True)
    if arrays is not None:
        save_file(arrays, folder / 'model.safetensors')
    for name, value in documents.items():
        (folder / f'{name}.json').write_text(json.dumps(value))
    return folder


def timm_parts(name='timm_vit_token'):
    """(arrays, config) of a fixture, its config with what timm writes beside the arguments."""
    config = json.loads((DATA / name / 'config.json').read_text())
    config |= dict(num_features=48, pretrained_cfg=dict(HALF, input_size=[3, 32, 32]))
    return load_file(DATA / name / 'model.safetensors'), config


def vit_arguments(config):
    """Arguments of timm's VisionTransformer."""
    return timm_arguments.arguments(config, vit_model.SIGNATURE)


def hf_arrays(kind='vit', width=48, depth=2, hidden=96, rows=17, classes=5, head=True):
    """Arrays of a tiny ViT under transformers' names."""
    rng = np.random.default_rng(0)

    def noise(*shape):
        return rng.normal(0, 0.2, shape).astype(np.float32)

    arrays = {
        'embeddings.cls_token': noise(1, 1, width),
        'embeddings.position_embeddings': noise(1, rows, width),
        'embeddings.patch_embeddings.projection.weight': noise(width, 3, 8, 8),
        'embeddings.patch_embeddings.projection.bias': noise(width),
        'layernorm.weight': noise(width) + 1, 'layernorm.bias': noise(width),
    }  # fmt: skip
    for i in range(depth):
        block = f'encoder.layer.{i}'
        for name, shape in (
            ('attention.attention.query', (width, width)),
            ('attention.attention.key', (width, width)),
            ('attention.attention.value', (width, width)),
            ('attention.output.dense', (width, width)),
            ('intermediate.dense', (hidden, width)), ('output.dense', (width, hidden)),
        ):
            arrays[f'{block}.{name}.weight'] = noise(*shape)
            arrays[f'{block}.{name}.bias'] = noise(shape[0])
        for name in ('layernorm_before', 'layernorm_after'):
            arrays[f'{block}.{name}.weight'] = noise(width) + 1
            arrays[f'{block}.{name}.bias'] = noise(width)
    arrays = {f'{kind}.{n}': a for n, a in arrays.items()}
    return arrays | {'classifier.weight': noise(classes, width), 'classifier.bias': noise(classes)}


HF = dict(
    model_type='vit', architectures=['ViTForImageClassification'], hidden_size=48,
    num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8,
    num_channels=3, hidden_act='gelu', layer_norm_eps=1e-12, qkv_bias=True,
    id2label={str(i): name for i, name in enumerate('abcde')},
)  # fmt: skip


def rows(account, what):
    """{name: detail} of an account's rows of a kind."""
    return {name: detail for kind, name, detail in account if kind == what}


# 1. What contradicts the arrays, and what nobody knows.

WRONG = dict(
    embed_dim=64, depth=3, in_chans=1, num_classes=11, patch_size=16, mlp_ratio=3, reg_tokens=1,
    qkv_bias=False, proj_bias=False, qk_norm=True, pre_norm=True, class_token=False,
    init_values=1e-5, pos_embed='none', fc_norm=True, global_pool='map', img_size=64,
)  # fmt: skip


@pytest.mark.parametrize('key', WRONG)
def test_an_argument_of_timm_that_the_arrays_contradict_is_an_error(key, tmp_path):
    arrays, config = timm_parts()
    assert load.read(written(tmp_path / 'a', arrays, config=config), values=False)
    config['model_args'][key] = WRONG[key]
    with pytest.raises(UserError, match=f'{key}|pos_embed has 17 positions'):
        load.read(written(tmp_path / 'a', None, config=config), values=False)


@pytest.mark.parametrize('key, value', [
    ('hidden_size', 64), ('num_hidden_layers', 4), ('intermediate_size', 97), ('patch_size', 16),
    ('num_channels', 1), ('image_size', 64), ('qkv_bias', False), ('num_labels', 6),
    ('id2label', {'0': 'a'}), ('id2label', {str(i + 1): 'a' for i in range(5)}),
    ('model_type', 'deit'), ('model_type', 'dinov2'),
])  # fmt: skip
def test_a_key_of_transformers_that_the_arrays_contradict_is_an_error(key, value, tmp_path):
    arrays = hf_arrays()
    assert load.read(written(tmp_path / 'a', arrays, config=HF), values=False).classes
    with pytest.raises(UserError, match=f'config.json: {key}'):
        load.read(written(tmp_path / 'a', None, config=HF | {key: value}), values=False)


def test_an_architecture_that_is_not_known_is_refused(tmp_path):
    arrays, config = timm_parts()
    for name in ('swin_tiny', 'resnet50', 'vit_base_patch16_224x', 'constructor', '', ' '):
        written(tmp_path / 'a', arrays, config=config | dict(architecture=name))
        with pytest.raises(UserError, match=f"architecture '{name}' is none of timm"):
            load.read(tmp_path / 'a')


def test_an_argument_that_is_not_known_is_refused(tmp_path):
    arrays, config = timm_parts()
    folder = written(tmp_path / 'a', arrays)
    for key, value in [
        ('rope', True), ('epsilon', 1e-3), ('distilled', True), ('norm_eps', 1e-3), ('', 1),
        ('interpolation', 'linear'), ('norm_layer', 'simplenorm'), ('norm_layer', 'rmsnorm'),
        ('embed_norm_layer', 'batchnorm'), ('embed_norm_layer', 'layernorm'),
        ('block_fn', 'ParallelThingsBlock'), ('block_fn', 'ParallelScalingBlock'),
        ('mlp_layer', 'GluMlp'), ('mlp_layer', 'SwiGLU'), ('attn_layer', 'diff'),
        ('embed_layer', 'Other'), ('act_layer', 'relu'), ('global_pool', 'avgmax'),
        ('scale_attn_norm', True), ('scale_mlp_norm', True), ('final_norm', False),
    ]:  # fmt: skip
        args = config['model_args'] | {key: value}
        written(folder, None, config=config | dict(model_args=args))
        with pytest.raises(UserError, match=f'config.json.*{key}'):
            load.read(folder)
    args = config['model_args'] | dict(pool_include_prefix=True)  # of no effect on a class token
    written(folder, None, config=config | dict(model_args=args))
    assert not load.read(folder).model.pool_style.prefix
    args = args | dict(global_pool='avg', fc_norm=False)
    written(folder, None, config=config | dict(model_args=args))
    assert load.read(folder).model.pool_style.prefix


def test_each_known_architecture_is_expressed_or_refused_with_its_argument():
    refused = {}
    for name, sets in timm_arguments.tables(vit_model.SIGNATURE)['architectures'].items():
        try:
            args = vit_arguments({'architecture': f'{name}.tag'})
        except UserError as e:
            named = [key for key in sets if f'{key} of architecture' in str(e)]
            assert named, e
            refused[name] = str(e)
        else:
            assert args == vit_model.SIGNATURE.defaults | sets
    for name, words in (
        ('vit_base_patch16_18x2_224', 'several attentions and MLPs side by side'),
        ('vit_dwee_patch16_reg1_gap_256', 'differential attention'),
        ('vit_dpwee_patch16_reg1_gap_256', 'differential attention'),
    ):
        assert words in refused[name] and 'not supported' in refused[name]
    assert len(refused) < 20 and 'vit_base_patch16_224' not in refused
    args = vit_arguments({'architecture': 'vit_large_patch14_224_clip_laion2b'})
    assert (args['num_heads'], args['epsilon']) == (16, 1e-5)  # by its name today


@pytest.mark.parametrize('name, key, value, words', [
    ('timm_beit', 'use_abs_pos_emb', True, 'use_abs_pos_emb'),
    ('timm_beit', 'use_shared_rel_pos_bias', True, 'use_shared_rel_pos_bias'),
    ('timm_beit', 'swiglu_mlp', True, 'swiglu_mlp'), ('timm_beit', 'scale_mlp', True, 'scale_mlp'),
    ('timm_beit', 'qkv_bias', False, 'qkv_bias'), ('timm_beit', 'qk_norm', False, 'not a known'),
    ('timm_beit', 'img_size', 24, 'relative_position_bias_table has 52 rows'),
    ('timm_beit', 'global_pool', 'map', 'global_pool'),
    ('timm_relpos', 'rel_pos_type', 'mlp', 'rel_pos_type'),
    ('timm_srelpos', 'rel_pos_type', 'mlp_swin', 'log-spaced offsets as in Swin'),
    ('timm_srelpos', 'rel_pos_dim', 16, 'rel_pos_dim'),
    ('timm_srelpos', 'shared_rel_pos', False, 'shared_rel_pos'),
    ('timm_relpos', 'norm_layer', 'rmsnorm', 'norm_layer'),
    ('timm_aimv2', 'norm_layer', 'rmsnorm', 'with epsilon 1e-05, the other norms'),
    ('timm_aimv2', 'embed_norm_layer', 'layernorm', 'embed_norm_layer'),
    ('timm_parallel', 'proj_bias', False, 'proj_bias'), ('timm_rpn', 'proj_bias', False, 'proj_b'),
])  # fmt: skip
def test_an_argument_of_other_classes_that_the_arrays_contradict(name, key, value, words, tmp_path):
    config = json.loads((DATA / name / 'config.json').read_text())
    arrays = load_file(DATA / name / 'model.safetensors')
    assert load.read(written(tmp_path / 'a', arrays, config=config), values=False)
    config['model_args'][key] = value
    with pytest.raises(UserError, match=re.escape(words)):
        load.read(written(tmp_path / 'a', None, config=config))


@pytest.mark.parametrize('name', ['timm_vit_token', 'timm_dinov3', 'timm_beit', 'timm_relpos'])
def test_the_number_of_features_is_the_width(name, tmp_path):
    config = json.loads((DATA / name / 'config.json').read_text())
    arrays = load_file(DATA / name / 'model.safetensors')
    with pytest.raises(UserError, match='num_features is 9, but the arrays have'):
        load.read(written(tmp_path / 'a', arrays, config=config | dict(num_features=9)))


def test_arrays_of_features_that_no_model_here_has(tmp_path):
    arrays, config = timm_parts()
    for name, words in (
        ('blocks.0.attn.lambda_q1', 'differential attention'),
        ('blocks.0.attns.0.norm.weight', 'several attentions and MLPs'),
        ('blocks.0.attn.gate.weight', 'a gate on the output of attention'),
    ):
        folder = written(tmp_path / 'a', arrays | {name: np.ones(4, np.float32)}, config=config)
        with pytest.raises(UserError, match=words):
            load.read(folder)


def test_keys_that_nobody_knows_are_named(tmp_path):
    arrays, config = timm_parts()
    config = config | dict(novelty=1, pretrained_cfg=config['pretrained_cfg'] | dict(other=2))
    read = load.read(written(tmp_path / 'timm', arrays, config=config))
    assert set(rows(read.account, 'ignored')) == {'config.json: novelty', 'config.json: other'}
    folder = written(tmp_path / 'hf', hf_arrays(), config=HF | dict(strange=[1]))
    written(folder, None, preprocessor_config=dict(image_mean=[0.1] * 3, odd=True))
    names = {'config.json: strange', 'preprocessor_config.json: odd'}
    assert set(rows(load.read(folder).account, 'ignored')) == names


# 2. What is left out, and what nothing states.


def test_what_a_config_of_transformers_leaves_out_has_the_default_of_its_class(tmp_path):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    for kind, name in (('vit', 'ViT'), ('vit_msn', 'ViTMSN')):
        few = {k: v for k, v in HF.items() if k not in (
            'num_attention_heads', 'layer_norm_eps', 'hidden_act', 'qkv_bias', 'num_channels',
        )} | dict(model_type=kind)  # fmt: skip
        folder = written(tmp_path / kind, hf_arrays(), config=few)
        read = load.read(folder)
        assert read.model.num_heads == 12
        module = getattr(transformers, f'{name}ForImageClassification').from_pretrained(folder)
        images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
        with torch.no_grad():
            theirs = module.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2))).logits.numpy()
        ours, _ = read.model.apply({'params': read.params}, images)
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_what_a_config_of_timm_leaves_out_is_what_its_architecture_sets():
    arguments = vit_arguments
    assert arguments({'architecture': 'vit_base_patch16_gap_224'})['num_heads'] == 16
    assert arguments({'architecture': 'vit_base_patch16_clip_quickgelu_224'})['act_layer'] == (
        'quick_gelu'
    )
    config = {'architecture': 'vit_base_patch16_clip_224', 'num_classes': 7}
    assert (arguments(config)['epsilon'], arguments(config)['num_classes']) == (1e-5, 7)
    assert arguments(config | {'model_args': {'norm_layer': 'layernorm'}})['epsilon'] == 1e-6


@pytest.mark.parametrize('family', ['timm', 'hf'])
def test_guesses_at_a_bare_file_stand_in_the_account_until_they_are_settled(family, tmp_path):
    arrays = timm_parts()[0] if family == 'timm' else hf_arrays()
    path = written(tmp_path / 'a', arrays) / 'model.safetensors'
    with pytest.raises(UserError, match='num_heads=...'):  # none can be guessed of width 48
        load.read(path)
    settled, guessed = {'num_heads': 3}, {'epsilon', 'gelu', 'mean', 'std'}
    guessed |= {'pool'} if family == 'timm' else set()
    while guessed:
        read = load.read(path, values=False, **settled)
        found = rows(read.account, 'guessed')
        assert {name.split('=')[0] for name in found} == guessed
        field = sorted(guessed)[0]
        assert all(f'{name.split("=")[0]}=... settles it' in why for name, why in found.items())
        settled[field] = getattr(read.model, field)
        guessed.remove(field)
    assert not rows(load.read(path, values=False, **settled).account, 'guessed')
    shutil.copy(path, tmp_path / 'bare.safetensors')
    assert rows(load.read(tmp_path / 'bare.safetensors', num_heads=3).account, 'guessed')


def test_the_guess_at_heads_is_one(tmp_path):
    arrays = hf_arrays(width=64)
    read = load.read(written(tmp_path / 'a', arrays), values=False)
    assert 'num_heads=1' in rows(read.account, 'guessed')


def test_guesses_at_an_npz(tmp_path):
    read = load.read(DATA / 'official_vit_prelogits.npz', values=False)
    names = {name.split('=')[0] for name in rows(read.account, 'guessed')}
    assert names == {'mean', 'std', 'gelu', 'epsilon'}


@pytest.mark.parametrize('change, other', [
    (lambda a: {**a, 'norm_pre.weight': a['norm.weight'], 'norm_pre.bias': a['norm.bias']},
     'vit_pe_core'),
    (lambda a: {**a, 'reg_token': np.ones((1, 2, 48), np.float32)}, 'test_vit3'),
    (lambda a: {n: v for n, v in a.items() if not n.endswith('qkv.bias')}, 'rpn'),
])
def test_bare_arrays_that_other_models_of_timm_have_too_are_refused(change, other, tmp_path):
    arrays = change(timm_parts('timm_siglip_map')[0])
    with pytest.raises(UserError, match=f'{other}.*config.json'):
        load.read(written(tmp_path / 'a', arrays), num_heads=3)


@pytest.mark.parametrize('name', NAMED)
def test_a_bare_file_of_timm_is_as_with_its_config_refused_or_a_named_guess(name, tmp_path):
    whole = load.read(DATA / name)
    shutil.copy(DATA / name / 'model.safetensors', tmp_path)
    try:
        bare = load.read(tmp_path / 'model.safetensors', num_heads=whole.model.num_heads)
    except UserError as e:
        assert 'put a config.json beside them' in str(e)
        of_eva = name.startswith(('timm_eva', 'timm_rope', 'timm_dinov3', 'timm_pe'))  # too small
        assert of_eva or name in ('timm_rpn', 'timm_prefix_pool', 'timm_relpos_cls')
        return
    guessed = {row.split('=')[0] for row in rows(bare.account, 'guessed')}
    guessed |= {'interpolation', 'layer_scale'}  # of positions at other sizes; initial values
    for field in dataclasses.fields(bare.model):
        a, b = getattr(bare.model, field.name), getattr(whole.model, field.name)
        assert field.name in guessed or not field.compare or a == b, field.name


def test_pooling_that_files_disagree_on_is_settled_by_a_keyword(tmp_path):
    arrays, config = timm_parts()
    config['model_args']['fc_norm'] = False
    written(tmp_path / 'a', arrays, config=config | dict(global_pool='avg'))
    with pytest.raises(UserError, match="global_pool is 'avg'.*'token'.*give pool=..., as 'gap'"):
        load.read(tmp_path / 'a')
    assert load.read(tmp_path / 'a', pool='gap').model.pool == 'gap'
    assert load.read(tmp_path / 'a', pool='cls').model.pool == 'cls'


# 3. How images come to a model.

PROCESSORS = {
    'plain': dict(image_processor_type='ViTImageProcessor', size=dict(height=32, width=32)),
    'not_normalised': dict(do_normalize=False, size=32),
    'not_rescaled': dict(do_rescale=False, size=32, image_mean=[127.5] * 3, image_std=[64.0] * 3),
    'neither': dict(do_rescale=False, do_normalize=False, size=32),
    'other_factor': dict(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3),
    'one_number': dict(image_mean=0.4, image_std=0.3, size=32),
    'class_defaults': dict(image_processor_type='BitImageProcessor'),
    'deit': dict(
        feature_extractor_type='DeiTFeatureExtractor', size=40, crop_size=32, do_center_crop=True,
        resample=3,
    ),
    'bit': dict(
        image_processor_type='BitImageProcessor', size=dict(shortest_edge=40), crop_size=32,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ),
    'shortest': dict(
        image_processor_type='CLIPImageProcessor', size=32, crop_size=32, do_center_crop=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize('nested', [False, True])
@pytest.mark.parametrize('name', PROCESSORS)
def test_images_come_to_a_model_as_the_processor_of_transformers_makes_them(name, nested, tmp_path):
    transformers = pytest.importorskip('transformers')
    settings = PROCESSORS[name]
    folder = written(tmp_path / 'a', hf_arrays(), config=HF)
    if nested:
        inner = dict(image_processor_type='ViTImageProcessor') | settings
        written(folder, None, processor_config=dict(image_processor=inner))
        written(folder, None, preprocessor_config=dict(image_mean=[0.9] * 3))  # comes second
    else:
        written(folder, None, preprocessor_config=settings)
    size = load.read(folder, values=False).input_size
    read = load.read(folder, image_size=size, values=False)
    pixels = np.random.default_rng(2).integers(60, 200, (23, 31, 3), np.uint8)
    smooth = Image.fromarray(pixels).resize((620, 460), Image.Resampling.BICUBIC)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    theirs = processor(smooth, return_tensors='np')['pixel_values'][0].transpose(1, 2, 0)
    view = tasks.make_view(read.view, size)(np.asarray(smooth), None)
    ours = np.asarray(read.model.normalise(view[None]))[0]
    assert ours.shape == theirs.shape
    levels = np.abs(ours - theirs) * np.asarray(read.model.std) * 255
    assert levels.mean() < 0.3 and levels.max() < 2.5
    assert not rows(read.account, 'ignored')


@pytest.mark.parametrize('settings, key', [
    (dict(do_resize=False), 'do_resize'), (dict(resample=0), 'resample'),
    (dict(size=dict(longest_edge=32)), 'size'), (dict(size=dict(shortest_edge=32)), 'size'),
    (dict(size=32, do_center_crop=True, crop_size=40), 'crop_size'),
])  # fmt: skip
def test_what_no_view_expresses_is_named(settings, key, tmp_path):
    folder = written(tmp_path / 'a', hf_arrays(), config=HF, preprocessor_config=settings)
    read = load.read(folder)
    assert set(rows(read.account, 'ignored')) == {key}
    assert tasks.make_view(read.view, (32, 32))(np.zeros((50, 60, 3), np.uint8), None).any() == 0


@pytest.mark.parametrize('kind, settings, size, ignored', [
    ('DPT', dict(size=dict(height=518, width=518), keep_aspect_ratio=True,
                 ensure_multiple_of=14, do_pad=False), (518, 518), {'keep_aspect_ratio'}),
    ('Yolos', dict(size=dict(shortest_edge=512, longest_edge=1333), do_pad=True,
                   format='coco_detection'), None, {'size', 'do_pad'}),
    ('Eomt', dict(size=640, do_split_image=True), (640, 640), {'size', 'do_split_image'}),
])  # fmt: skip
def test_processors_of_models_around_an_encoder(kind, settings, size, ignored):
    settings = settings | dict(image_processor_type=f'{kind}ImageProcessor', image_mean=[0.1] * 3)
    found = hf_processor.read(settings, 'preprocessor_config.json', 'vit', 3)
    assert (found.size, {key for key, _ in found.ignored}, found.unknown) == (size, ignored, ())
    assert found.normalisation['mean'] == (0.1,) * 3
    assert set(found.normalisation['std']) == ({0.5} if kind == 'DPT' else {0.229, 0.224, 0.225})


def test_a_view_grows_with_the_image_size(tmp_path):
    settings = dict(PROCESSORS['bit'])
    folder = written(tmp_path / 'a', hf_arrays(), config=HF, preprocessor_config=settings)
    assert load.read(folder).view['smaller'] == 40
    assert load.read(folder, image_size=64).view['smaller'] == 80
    assert load.read(folder, image_size=(32, 64)).view['smaller'] == 80


@pytest.mark.parametrize('settings', [
    dict(do_flip_channel_order=True), dict(do_grayscale=True), dict(rescale_offset=True),
    dict(image_processor_type='ConvNextImageProcessor'), dict(size='large'),
    dict(image_std=[0, 1, 1]), dict(do_normalize='yes'),
    dict(rescale_factor=math.nan), dict(rescale_factor=-1),
])  # fmt: skip
def test_what_a_processor_does_that_is_none_here_is_refused(settings, tmp_path):
    folder = written(tmp_path / 'a', hf_arrays(), config=HF, preprocessor_config=settings)
    with pytest.raises(UserError, match=f'preprocessor_config.json: {next(iter(settings))}'):
        load.read(folder)


@pytest.mark.parametrize('inside', [True, False])
def test_older_configs_of_timm(inside, tmp_path):
    arrays, config = timm_parts()
    stated = dict(
        mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], interpolation='bilinear', crop_pct=0.8,
        input_size=[3, 32, 32], label_names=[f'class {i}' for i in range(10)], crop_mode='center',
    )  # fmt: skip
    config.pop('pretrained_cfg')
    config |= dict(pretrained_cfg=stated) if inside else stated
    read = load.read(written(tmp_path / 'a', arrays, config=config))
    assert (read.model.mean, read.model.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert read.classes == tuple(stated['label_names']) and read.input_size == (32, 32)
    view = dict(
        name='small_central', smaller=40, method='bilinear', antialias=True,
        rounding='torchvision',
    )  # fmt: skip
    assert read.view == view and not rows(read.account, 'guessed')
    for key in ('mean', 'std', 'crop_pct', 'interpolation', 'label_names'):
        stated.pop(key), config.pop(key, None)
    read = load.read(written(tmp_path / 'a', None, config=config))
    assert read.model.mean == (0.485, 0.456, 0.406) and read.classes is None  # as timm has it
    assert read.view['smaller'] == 36 and read.view['method'] == 'bicubic'
    assert {name.split('=')[0] for name in rows(read.account, 'guessed')} == {'mean', 'std'}
    with pytest.raises(UserError, match='label_names has 9 values'):
        load.read(written(tmp_path / 'a', None, config=config | dict(label_names=['a'] * 9)))


# 4. Which files are meant.


def halves(folder, arrays):
    """Two shards with their index; returns it."""
    names = sorted(arrays)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    mapping = {}
    for i, part in enumerate(parts):
        file = f'model-0000{i + 1}-of-00002.safetensors'
        save_file({n: arrays[n] for n in part}, folder / file)
        mapping |= dict.fromkeys(part, file)
    return mapping


def test_the_index_tells_which_shards_are_meant(tmp_path):
    arrays = hf_arrays()
    folder = written(tmp_path / 'a', None, config=HF)
    mapping = halves(folder, arrays)
    index, stale = folder / 'model.safetensors.index.json', {'stale': np.ones(3, np.float32)}

    def read(mapping):
        index.write_text(json.dumps(dict(metadata={}, weight_map=mapping)))
        return load.read(folder)

    assert not rows(read(mapping).account, 'ignored')
    save_file(stale, folder / 'model-00003-of-00003.safetensors')
    assert set(rows(read(mapping).account, 'ignored')) == {'model-00003-of-00003.safetensors'}
    for change, words in (
        ({'extra': 'model-00001-of-00002.safetensors'}, 'lacks array extra, which .* lists'),
        ({'vit.layernorm.bias': 'model-00001-of-00002.safetensors'}, 'vit.layernorm.bias'),
        ({'vit.layernorm.bias': '../model-00001-of-00002.safetensors'}, 'not the name of'),
        ({'vit.layernorm.bias': 3}, 'not the name of'),
        ({'more': 'model-00004-of-00004.safetensors'}, 'model-00004-of-00004.safetensors, which'),
    ):
        with pytest.raises(UserError, match=words):
            read(mapping | change)
    with pytest.raises(UserError, match='vit.layernorm.bias, which .*index.json lists nowhere'):
        read({n: f for n, f in mapping.items() if n != 'vit.layernorm.bias'})
    index.unlink()
    with pytest.raises(UserError, match='shards that are not 1 to n of n'):
        load.read(folder)
    save_file(arrays, folder / 'model.safetensors')  # as in transformers, the whole comes first
    left = rows(load.read(folder).account, 'ignored')
    assert len(left) == 3 and set(left.values()) == {'model.safetensors is the whole model'}


def test_a_mixer_of_big_vision(tmp_path):
    arrays = dict(np.load(DATA / 'official_mixer.npz'))
    plain = load.read(DATA / 'official_mixer.npz')
    for prefix in ('params/', 'params/img/'):
        np.savez(tmp_path / 'a.npz', **{prefix + n: a for n, a in arrays.items()},
                 **{'opt/count': np.ones(())})  # fmt: skip
        read = load.read(tmp_path / 'a.npz')
        assert read.source == 'big_vision' and read.model == plain.model
        np.testing.assert_array_equal(
            read.params['head']['kernel'], plain.params['head']['kernel']
        )
        assert set(rows(read.account, 'unused')) == {'opt/count'}


# 5. Whatever stands in a document: a UserError, or a model.

STRANGE = (
    None, True, False, 0, -1, 1, 7, 2**31, 10**400, 1e-300, 1e308, math.nan, math.inf, -math.inf,
    '', 'x', '\x1b[2J\n', 'nan', [], [None], [1] * 3, [[1, 2]], ['a'] * 10, {}, {'a': {}},
    {'height': 3}, {'height': -1, 'width': math.nan}, {'shortest_edge': '8'}, {'0': None},
)  # fmt: skip


def variants(value):
    """A document with each of its values, nested ones too, replaced by each of STRANGE."""
    keys = value if isinstance(value, dict) else range(min(len(value), 1))
    for key in keys:
        for other in STRANGE:
            copy = value.copy()
            copy[key] = other
            yield copy
        if isinstance(value[key], (dict, list)):
            for inner in variants(value[key]):
                copy = value.copy()
                copy[key] = inner
                yield copy


def test_documents_with_strange_values_are_refused_or_read(tmp_path, monkeypatch):
    arrays, config = timm_parts()
    config['pretrained_cfg'] |= dict(crop_pct=0.9, crop_mode='squash', interpolation='bicubic')
    config |= dict(label_names=['a'] * 10, global_pool='token')
    processor = PROCESSORS['bit'] | dict(do_rescale=True, rescale_factor=1 / 255, do_resize=True)
    cases = [
        (written(tmp_path / 'timm', arrays), 'config.json', config),
        (written(tmp_path / 'hf', hf_arrays(), config=HF), 'config.json', HF),
        (tmp_path / 'hf', 'preprocessor_config.json', processor),
        (tmp_path / 'hf', 'processor_config.json', dict(image_processor=processor)),
    ]
    seen, real = 0, families.read_json
    for folder, name, document in cases:
        with files.open_arrays(folder / 'model.safetensors') as arrays:
            for changed in variants(document):
                monkeypatch.setattr(
                    families, 'read_json',
                    lambda path, c=changed, n=name: c if path.name == n else real(path),
                )  # fmt: skip
                seen += 1
                try:
                    found = families.parse_folder(arrays, folder)
                    assert all(map(math.isfinite, found.fields['mean'] + found.fields['std']))
                    tasks.make_view(found.view or 'central', (32, 32))
                except UserError as e:
                    assert str(e).isprintable() and len(str(e)) < 700
                monkeypatch.undo()
    assert seen > 1000


def test_a_norm_that_timm_does_not_use_is_refused(tmp_path):
    arrays, _ = timm_parts('timm_vit_avg_fcnorm')
    arrays['dist_token'] = arrays['cls_token']
    with pytest.raises(UserError, match='fc_norm'):
        load.read(written(tmp_path / 'a', arrays))


def test_the_defaults_of_a_processor_are_those_of_its_class(tmp_path):
    """BeitImageProcessor cuts 224 of what it resizes, where it is told to cut."""
    settings = dict(
        image_processor_type='BeitImageProcessor', do_center_crop=True,
        size=dict(height=256, width=256),
    )  # fmt: skip
    folder = written(tmp_path / 'a', hf_arrays(), config=HF, preprocessor_config=settings)
    read = load.read(folder, values=False)
    assert read.input_size == (224, 224) and read.view['crop'] == pytest.approx(224 / 256)


def test_what_has_no_effect_and_what_is_resized_unasked_is_said(tmp_path, caplog):
    settings = dict(size=48, resample=1)
    folder = written(tmp_path / 'a', hf_arrays(), config=HF, preprocessor_config=settings)
    model, _ = vit_jax.load(folder)
    assert model.metadata.image_size == (48, 48)
    said = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
    assert any('resample: views here have bilinear and bicubic filters' in line for line in said)
    kept = [line for line in said if 'resized, 4 x 4 -> 6 x 6' in line]
    assert len(kept) == 1 and 'image_size=(32, 32) keeps the table' in kept[0]
    caplog.clear()
    vit_jax.load(folder, image_size=48)
    assert not [r for r in caplog.records if r.levelname == 'WARNING' and '4 x 4' in r.getMessage()]


def test_tokens_of_a_distilled_model_of_timm_without_a_head_are_named(tmp_path):
    arrays, config = timm_parts()
    arrays |= {'dist_token': arrays['cls_token'] + 1}
    table = arrays['pos_embed']
    arrays['pos_embed'] = np.concatenate([table[:, :1], table], axis=1)
    arrays = {n: v for n, v in arrays.items() if not n.startswith('head')}
    config['architecture'] = 'deit_tiny_distilled_patch16_224'
    config['model_args'] |= dict(num_classes=0)
    config['num_classes'] = 0
    for key in ('class_token', 'no_embed_class', 'reg_tokens', 'pos_embed', 'pre_norm', 'fc_norm'):
        config['model_args'].pop(key, None)
    read = load.read(written(tmp_path / 'a', arrays, config=config), values=False)
    assert 'dist_token' in rows(read.account, 'ignored')
