"""timm's hybrids, MLP-Mixers, ResNets and NaFlexVits: what is written, and what is refused."""

import json
import pathlib
import shutil
import tempfile

import jax
import noise
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vit_jax
from vit_jax import models
from vit_jax.convert import load
from vit_jax.convert.timm import bit, mixer
from vit_jax.errors import UserError

DATA = pathlib.Path(__file__).with_name('data')
WRITTEN = ('bit_small', 'hybrid_stem', 'mixer_exact')
NAFLEX = ('naflex_factorised', 'naflex_gap', 'naflex_map')


@pytest.fixture(scope='module')
def folder():
    """A function that returns the folder of a recorded checkpoint."""
    with tempfile.TemporaryDirectory() as parent:
        made = {}

        def get(name):
            if name not in made:
                made[name] = noise.write(DATA / name, pathlib.Path(parent) / name)
            return made[name]

        yield get


def changed(source, target, args=None, arrays=None, **config):
    """A copy of a checkpoint with other arguments, other arrays or another config.json."""
    shutil.copytree(source, target)
    document = json.loads((source / 'config.json').read_text())
    document['model_args'] |= args or {}
    for key in [k for k, v in config.items() if v is None]:
        document.pop(key)
        config.pop(key)
    (target / 'config.json').write_text(json.dumps(document | config))
    if arrays is not None:
        save_file(load_file(source / 'model.safetensors') | arrays, target / 'model.safetensors')
    return target


@pytest.mark.parametrize('name', WRITTEN)
def test_a_file_is_written_as_timm_wrote_it(name, folder, tmp_path):
    read = load.read(folder(name))
    vit_jax.save(tmp_path / 'out', read.model, read.params, 'timm', image_size=64)
    theirs, ours = (load_file(p / 'model.safetensors') for p in (folder(name), tmp_path / 'out'))
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key].shape == theirs[key].shape, key
        assert ours[key].tobytes() == theirs[key].tobytes(), key
    theirs, ours = (
        json.loads((p / 'config.json').read_text()) for p in (folder(name), tmp_path / 'out')
    )
    assert ours['architecture'] == theirs['architecture']
    pairs = {'img_size': [64, 64], 'patch_size': [8, 8]}  # numbers in timm's
    args = {k: pairs.get(k, v) for k, v in theirs['model_args'].items()}
    args.pop('global_pool', None)  # 'avg', the class's default
    ratio = args.pop('mlp_ratio', 0)
    if isinstance(ratio, list):  # of the same hidden sizes
        same = [int(n * 512) for n in ratio]
        assert [int(n * 512) for n in ours['model_args']['mlp_ratio']] == same
    left = args.keys() - ours['model_args'].keys()
    assert left <= {'in_chans'}  # which is that of input_size
    assert {k: ours['model_args'][k] for k in args.keys() - left} == {
        k: v for k, v in args.items() if k not in left
    }
    assert ours['pretrained_cfg']['input_size'] == [1, 64, 64]


@pytest.mark.parametrize('name', NAFLEX)
def test_a_naflexvit_is_written_as_a_vision_transformer_with_its_outputs(name, folder, tmp_path):
    size = (8, 20)
    read = load.read(folder(name), image_size=size)
    vit_jax.save(tmp_path / 'out', read.model, read.params, 'timm', image_size=size)
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['architecture'].startswith(('vit_', 'flexivit_'))
    back = load.read(tmp_path / 'out')
    images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    a, b = (m.apply({'params': p}, images)[0] for m, p in (read[:2], back[:2]))
    assert np.abs(a).max() > 0.1 and a.tobytes() == b.tobytes()


def test_a_naflexvit_is_for_the_images_of_its_documents(folder, tmp_path):
    config = json.loads((folder('naflex_gap') / 'config.json').read_text())
    settings = config['pretrained_cfg'] | dict(input_size=[3, 24, 24])
    path = changed(folder('naflex_gap'), tmp_path / 'in', pretrained_cfg=settings)
    model, params = vit_jax.load(path)
    assert model.metadata.image_size == (24, 24) and params['posemb'].shape[1] == 36
    _, stated = vit_jax.load(folder('naflex_gap'), image_size=24)
    np.testing.assert_array_equal(params['posemb'], stated['posemb'])
    assert load.read(path).image_size == (16, 16)  # as the file has it


@pytest.mark.parametrize('units, width, name, args', [
    ((3, 4, 6, 3), 1.0, 'resnetv2_50x1_bit', {}),
    ((3, 4, 6, 3), 3.0, 'resnetv2_50x3_bit', {}),
    ((3, 8, 36, 3), 4.0, 'resnetv2_152x4_bit', {}),
    ((3, 4), 1.5, 'resnetv2_50x1_bit', dict(stem_chs=96, channels=[384, 768])),
    ((3, 8, 36, 3), 1.0, 'resnetv2_152x2_bit',
     dict(stem_chs=32, channels=[128, 256, 512, 1024])),
])  # fmt: skip
def test_architectures_of_bit(units, width, name, args):
    model = models.build('bit', units=units, width=width, num_classes=None)
    config = bit.model_config(model, (64, 64), None)
    assert config['architecture'] == name
    assert config['model_args'] == dict(in_chans=3, num_classes=0) | args


def test_a_bit_without_its_architecture_is_as_wide_as_its_arrays(folder, tmp_path):
    path = changed(folder('bit_small'), tmp_path / 'in', architecture=None)
    assert load.read(path).model == load.read(folder('bit_small')).model


def test_what_bit_and_mixer_cannot_express():
    limits = bit.limits(models.build('bit', units=(2, 1)))
    assert (2, 1) not in limits['units'] and (3, 4) in limits['units']
    assert limits['kernel_epsilon'] == (1e-8,)
    for name, size in (('mixer-b/16', 768), ('mixer-s/32', 512), ('mixer-l/16', 1024)):
        model = models.build(name, gelu='exact')
        assert all(getattr(model, field) in v for field, v in mixer.limits(model).items())
        assert model.width == size
        other = model.clone(depth=model.depth + 1)
        assert other.depth not in mixer.limits(other)['depth']


def array(*shape):
    return np.ones(shape, np.float32)


REFUSED = {
    'gated mixer': (
        'mixer_exact', dict(arrays={'blocks.0.mlp_channels.fc1.weight': array(102, 512)}),
        "gMixer's gated MLPs",
    ),
    'gmlp': (
        'mixer_exact', dict(arrays={'blocks.0.mlp_channels.gate.proj.weight': array(4, 4)}),
        "gMLP's spatial gates",
    ),
    'resmlp': (
        'mixer_exact', dict(arrays={'blocks.0.linear_tokens.weight': array(4, 4)}), 'ResMLP',
    ),
    'resmlp by name': ('mixer_exact', dict(architecture='resmlp_12_224'), 'ResMLP or gMLP'),
    'gmixer by name': ('mixer_exact', dict(architecture='gmixer_24_224'), "gMixer's gated MLPs"),
    'another depth': ('mixer_exact', dict(architecture='mixer_b32_224'), 'num_blocks|embed_dim'),
    'unpooled mixer': ('mixer_exact', dict(args={'global_pool': ''}), 'another pooling'),
    'ratio': ('mixer_exact', dict(args={'mlp_ratio': [0.05, 0.2]}), 'mlp_dims'),
    'no ratio': ('mixer_exact', dict(args={'mlp_ratio': ['a', 1]}), 'not a number or a pair'),
    'batch norm': (
        'bit_small', dict(arrays={'stages.0.blocks.0.norm1.running_mean': array(32)}), 'batch norm',
    ),
    'batch norm by name': ('bit_small', dict(architecture='resnetv2_50'), 'without group norm'),
    'mean pooling': ('bit_small', dict(architecture='resnetv2_50d_gn'), 'mean pooling'),
    'dilated': ('bit_small', dict(args={'output_stride': 8}), 'dilated'),
    'layers': ('bit_small', dict(architecture='resnetv2_50x3_bit'), 'features is 96'),
    'resnet-d': (
        'hybrid_stem', dict(arrays={'patch_embed.backbone.conv1.0.weight': array(1)}), 'ResNet-D',
    ),
    'mobileclip': (
        'hybrid_stem', dict(arrays={'patch_embed.backbone.0.conv.weight': array(1)}), 'MobileCLIP',
    ),
    'stages': ('hybrid_stem', dict(architecture='vit_base_r26_s32_224'), 'resnet is'),
    'no hybrid': ('hybrid_stem', dict(architecture='vit_tiny_patch16_224'), "resnet is 'none'"),
    'rotary': ('naflex_gap', dict(args={'rope_type': 'axial'}), 'rotary positions of NaFlexVit'),
    'grouped': ('naflex_gap', dict(args={'num_kv_heads': 2}), 'grouped queries'),
    'patches': ('naflex_gap', dict(args={'patch_size': 8}), 'patch_size and in_chans'),
    'grid': ('naflex_gap', dict(args={'pos_embed_grid_size': [5, 5]}), 'pos_embed_grid_size'),
    'norm': ('naflex_gap', dict(args={'fc_norm': False}), 'final_norm and fc_norm'),
    'pool': ('naflex_map', dict(args={'global_pool': 'avg', 'fc_norm': False}),
             "global_pool is 'avg', but the arrays have attention pooling"),
    'nearest': ('naflex_gap', dict(args={'pos_embed_interp_mode': 'nearest'}), 'nearest'),
    'no name': ('naflex_gap', dict(architecture=None), 'do not show the size of its patches'),
    'another class': (
        'naflex_gap', dict(architecture='vit_base_patch16_224'), "none of timm's NaFlexVit",
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_refused(name, folder, tmp_path):
    source, changes, words = REFUSED[name]
    path = changed(folder(source), tmp_path / 'in', **changes)
    with pytest.raises(UserError, match=words):
        load.read(path, values=False)


GATED = {'mlp_layer': 'SwiGLUPacked'}


@pytest.mark.parametrize('source, args, without, words', [
    ('timm_parallel', {'proj_bias': False}, 'out_proj.bias', 'proj_bias: a parallel block'),
    ('timm_rpn', GATED, None, 'mlp_layer: a gated MLP before its norm'),
    ('timm_siglip_map', GATED, None, 'attention pooling with an MLP of SiLU'),
])  # fmt: skip
def test_features_that_no_model_here_has_together_are_refused(
    source, args, without, words, tmp_path
):
    path = changed(DATA / source, tmp_path / 'in', args=args)
    arrays = load_file(path / 'model.safetensors')
    for key in list(arrays):
        if without and key.endswith(without):
            arrays.pop(key)
        if args == GATED and key.endswith('mlp.fc2.weight') and key.startswith('blocks'):
            arrays[key] = arrays[key][:, ::2].copy()
    save_file(arrays, path / 'model.safetensors')
    with pytest.raises(UserError, match=words):
        load.read(path, values=False)


def test_a_hybrid_without_its_resnet_is_refused(folder, tmp_path):
    path = changed(folder('hybrid_stem'), tmp_path / 'in')
    arrays = load_file(path / 'model.safetensors')
    save_file({k: v for k, v in arrays.items() if 'backbone' not in k}, path / 'model.safetensors')
    with pytest.raises(UserError, match='names a hybrid, but the arrays have no ResNet'):
        load.read(path)


def test_what_the_official_code_computes_otherwise_is_not_written(folder, tmp_path):
    read = load.read(DATA / 'official_mixer.npz')
    with pytest.raises(UserError, match="cannot express gelu='tanh'"):
        vit_jax.save(tmp_path / 'out', read.model, read.params, 'timm', image_size=64)
    read = load.read(folder('hybrid_stem'))
    model = read.model.clone(resnet_epsilon='official')
    with pytest.raises(UserError, match="cannot express resnet_epsilon='official'"):
        vit_jax.save(tmp_path / 'out', model, read.params, 'timm', image_size=64)
    with pytest.raises(UserError, match='cannot express'):
        vit_jax.save(tmp_path / 'out.npz', read.model, read.params, 'official', image_size=64)


def test_both_epsilons_of_hybrids_differ():
    """Where kernels are small, as after training with weight decay."""
    images = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    outputs = {}
    for epsilon in ('official', 'timm'):
        model = models.build(
            'vit/8', width=8, depth=1, num_heads=2, mlp_dim=8, resnet=(), resnet_epsilon=epsilon
        )
        params = jax.jit(model.init)(jax.random.key(0), images)['params']
        kernel = params['resnet']['conv_root']['kernel']
        params['resnet']['conv_root']['kernel'] = kernel * 1e-4 / kernel.std()
        outputs[epsilon] = jax.jit(model.apply)({'params': params}, images)[1]['tokens']
    assert np.abs(outputs['official'] - outputs['timm']).max() > 1e-3
