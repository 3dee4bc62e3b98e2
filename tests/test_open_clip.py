"""Image towers of OpenCLIP's files against what OpenCLIP computes (tests/compare_open_clip.py)."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from compared import assert_close, done, outputs
from recorded import DATA
from safetensors.numpy import load_file, save_file

import vit_jax
from vit_jax.convert import load
from vit_jax.convert.timm import arguments
from vit_jax.errors import UserError

SMALL = dict(img_size=16, patch_size=4, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2.0)
ARRAYS, CONFIG = 'open_clip_model.safetensors', 'open_clip_config.json'


@pytest.fixture
def small_trunk(monkeypatch):
    """timm's SigLIP is as small as the recorded trunk of that name."""
    known = arguments.read_table('vit.json')['architectures']
    name = 'vit_base_patch16_siglip_224'
    monkeypatch.setitem(known, name, known[name] | SMALL)


@pytest.mark.parametrize('name', ['open_clip', 'open_clip_timm'])
def test_recorded_towers(name, small_trunk):
    expected = np.load(DATA / f'{name}.results.npz')
    with pytest.raises(UserError, match="a text tower; give part='image'"):
        load.read(DATA / name)
    read = load.read(DATA / name, part='image')
    logits, _ = outputs(read.model, read.params, expected['images'])
    assert_close(logits, expected['logits'])
    assert read.source == 'open_clip' and read.image_size == read.input_size == (16, 16)
    assert read.view == dict(name='resize', method='bicubic', antialias=True)
    assert read.model.mean == (0.5, 0.5, 0.5)
    account = done(read.account)
    assert account['unused'] == {'logit_scale', 'token_embedding.weight'}
    assert account['re-initialised'] <= {'embedding/bias', 'head/bias'}
    assert 'guessed' not in account and 'ignored' not in account
    fresh = vit_jax.load(DATA / name, part='image', num_classes=3)
    assert fresh[1]['head']['kernel'].shape == (8, 3)


def changed(folder, section, **values):
    """A copy of the recorded file with other values in a section of its config."""
    shutil.copytree(DATA / 'open_clip', folder)
    config = json.loads((folder / CONFIG).read_text())
    parts = dict(top=config, model=config['model_cfg'], vision=config['model_cfg']['vision_cfg'],
                 preprocess=config['preprocess_cfg'])  # fmt: skip
    parts[section].update(values)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize('section, values, field, expected', [
    ('model', dict(quick_gelu=False), 'gelu', 'exact'),
    ('model', dict(quick_gelu=None), 'gelu', 'exact'),
    ('vision', dict(norm_kwargs=dict(eps=1e-6)), 'epsilon', 1e-6),
    ('vision', dict(pool_type='avg'), 'pool', 'gap'),
    ('vision', dict(final_ln_after_pool=True), 'last_norm', 'pooled'),
    ('vision', dict(head_width=2), 'num_heads', 4),
    ('preprocess', dict(mean=None), 'mean', (0.48145466, 0.4578275, 0.40821073)),
])  # fmt: skip
def test_a_key_determines_a_field(section, values, field, expected, tmp_path):
    read = load.read(changed(tmp_path / 'a', section, **values), part='image', values=False)
    plain = load.read(DATA / 'open_clip', part='image', values=False)
    assert getattr(read.model, field) == expected != getattr(plain.model, field)


@pytest.mark.parametrize('section, values, words', [
    ('vision', dict(width=9), 'width is 9, but the arrays have 8'),
    ('vision', dict(mlp_ratio=3.0), 'mlp_ratio is 3.0, which makes an MLP of 24, but'),
    ('vision', dict(layers=3), 'layers is 3, but the arrays have 2'),
    ('vision', dict(no_ln_pre=True), 'no_ln_pre is True, but'),
    ('vision', dict(ls_init_value=0.1), 'ls_init_value is .a layer scale'),
    ('vision', dict(qk_norm=True), 'qk_norm is True, which is not supported'),
    ('vision', dict(attentional_pool=True), 'attentional_pool is True, which is not supported'),
    ('vision', dict(act_kwargs=dict(approximate='tanh')), 'act_kwargs .* are not supported'),
    ('vision', dict(image_size=24), 'is no grid of images of 24 x 24'),
    ('model', dict(embed_dim=9), 'embed_dim is 9, but the arrays have 7'),
])  # fmt: skip
def test_what_contradicts_the_arrays_is_refused(section, values, words, tmp_path):
    with pytest.raises(UserError, match=words):
        load.read(changed(tmp_path / 'a', section, **values), part='image')


@pytest.mark.parametrize('mode, view', [
    ('shortest', dict(name='small_central', smaller=16, rounding='torchvision')),
    ('squash', dict(name='resize')), ('longest', dict(name='resize')),
])  # fmt: skip
def test_views(mode, view, tmp_path):
    read = load.read(changed(tmp_path / 'a', 'preprocess', resize_mode=mode), part='image')
    assert read.view == view | dict(method='bicubic', antialias=True)
    assert ('ignored' in done(read.account)) == (mode == 'longest')


def test_a_trunk_with_a_projection_may_divide_its_arrays_otherwise(tmp_path, monkeypatch):
    """DINOv3's gates, which have arrays of their own where a model is saved, share one."""
    config = json.loads((DATA / 'timm_dinov3_gated' / 'config.json').read_text())
    arrays = load_file(DATA / 'timm_dinov3_gated' / 'model.safetensors')
    plain, name = load.read(DATA / 'timm_dinov3_gated').params, config['architecture']
    args = config['model_args'] | dict(swiglu_align_to=0, mlp_ratio=1)
    args.pop('num_classes')
    known = arguments.read_table('eva.json')['architectures']
    monkeypatch.setitem(known, name, known[name] | args)
    for i, kind in itertools.product(range(2), ('weight', 'bias')):
        parts = [arrays.pop(f'blocks.{i}.mlp.fc1_{part}.{kind}') for part in 'gx']
        arrays[f'blocks.{i}.mlp.fc1.{kind}'] = np.concatenate(parts)
    trunk = {f'visual.trunk.{n}': a for n, a in arrays.items() if not n.startswith('head.')}
    projection = np.ones((5, args['embed_dim']), np.float32)
    save_file(trunk | {'visual.head.proj.weight': projection}, tmp_path / ARRAYS)
    vision = dict(timm_model_name=name, timm_pool='avg', timm_proj='linear', image_size=16)
    model = dict(embed_dim=5, vision_cfg=vision)
    (tmp_path / CONFIG).write_text(json.dumps(dict(model_cfg=model, preprocess_cfg={})))
    read = load.read(tmp_path)
    assert read.model.num_classes == 5
    jax.tree.map(np.testing.assert_array_equal, read.params['encoder'], plain['encoder'])


def test_unknown_keys_are_named(tmp_path):
    read = load.read(changed(tmp_path / 'a', 'vision', novelty=1), part='image')
    assert done(read.account)['ignored'] == {'open_clip_config.json: vision_cfg.novelty'}


def test_a_file_without_config_is_guessed(tmp_path):
    shutil.copy(DATA / 'open_clip' / ARRAYS, tmp_path / 'a.safetensors')
    with pytest.raises(UserError, match='nothing states how many heads'):
        load.read(tmp_path / 'a.safetensors', part='image')
    read = load.read(tmp_path / 'a.safetensors', part='image', num_heads=2)
    guessed = {row.partition('=')[0] for row in done(read.account)['guessed']}
    assert {'gelu', 'epsilon', 'pool', 'mean'} < guessed


@pytest.mark.parametrize('array, words', [
    ('visual.layer1.0.conv1.weight', "of CLIP's ResNet"),
    ('visual.attn_pool.query', 'of attention pooling'),
    ('visual.head.mlp.fc1.weight', 'of a projection by an MLP'),
    ('visual.something', 'belongs to no parameter'),
])
def test_other_towers_are_refused(array, words, tmp_path):
    shutil.copytree(DATA / 'open_clip', tmp_path / 'a')
    arrays = load_file(tmp_path / 'a' / ARRAYS)
    save_file(arrays | {array: np.ones((2, 2), np.float32)}, tmp_path / 'a' / ARRAYS)
    with pytest.raises(UserError, match=words):
        load.read(tmp_path / 'a', part='image')
