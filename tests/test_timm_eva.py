"""timm's class Eva: what config.json and the arrays say, and what is refused."""

import json
import pathlib

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from vit_jax.convert import load
from vit_jax.convert.timm import arguments, eva_model
from vit_jax.errors import UserError

DATA = pathlib.Path(__file__).with_name('data')
TABLES = arguments.tables(eva_model.SIGNATURE)
REFUSED = {
    'base': 'attn_only_layer_scale', '5b': 'num_kv_heads', 'giant': 'num_kv_heads',
    'huge': 'num_kv_heads', 'large': 'num_kv_heads',
}  # fmt: skip


def parts(name):
    """(arrays, config) of a fixture."""
    config = json.loads((DATA / name / 'config.json').read_text())
    return load_file(DATA / name / 'model.safetensors'), config


def written(folder, arrays, config=None):
    folder.mkdir(exist_ok=True)
    save_file(arrays, folder / 'model.safetensors')
    (folder / 'config.json').unlink(missing_ok=True)
    if config is not None:
        (folder / 'config.json').write_text(json.dumps(config))
    return folder


def assert_same(read, other):
    assert read.model == other.model
    ours, theirs = (flatten_dict(r.params, sep='/') for r in (read, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_each_architecture_is_expressed_or_refused_with_its_argument():
    refused = {}
    for name, sets in TABLES['architectures'].items():
        try:
            args = arguments.arguments({'architecture': f'{name}.tag'}, eva_model.SIGNATURE)
        except UserError as e:
            refused[name] = next(key for key in sets if f'{key} of architecture' in str(e))
        else:
            assert args == eva_model.SIGNATURE.defaults | sets
    assert len(TABLES['architectures']) == 65
    sapiens = {f'vit_{size}_patch16_sapiens2': key for size, key in REFUSED.items()}
    assert refused == sapiens


def test_refusals_name_the_feature(tmp_path):
    arrays, config = parts('timm_dinov3')
    heads = config['model_args']['num_heads']
    for key, value, words in (
        ('num_kv_heads', 1, 'attention with grouped queries'),
        ('num_kv_heads', [heads, 1], 'attention with grouped queries'),
        ('attn_only_layer_scale', True, 'a layer scale of attention alone'),
        ('rope_type', 'mrope', "rope_type of architecture .* is 'mrope', which is not supported"),
        ('norm_layer', 'rmsnorm', "norm_layer of architecture .* is 'RmsNorm'"),
        ('global_pool', 'avgmax', "global_pool 'avgmax' is none of"),
        ('gated_attn', True, "'gated_attn', which is not a known argument of timm's Eva"),
    ):
        given = config | dict(model_args=config['model_args'] | {key: value})
        with pytest.raises(UserError, match=words):
            load.read(written(tmp_path / 'a', arrays, given), values=False)


def test_keys_of_each_head_are_no_groups(tmp_path):
    arrays, config = parts('timm_dinov3')
    heads, depth = (config['model_args'][key] for key in ('num_heads', 'depth'))
    plain = load.read(written(tmp_path / 'plain', arrays, config), values=False).model
    for value in (heads, [heads] * depth):
        given = config | dict(model_args=config['model_args'] | dict(num_kv_heads=value))
        assert load.read(written(tmp_path / 'a', arrays, given), values=False).model == plain


@pytest.mark.parametrize('name, changes', [
    ('timm_dinov3', dict(
        embed_dim=32, depth=3, in_chans=1, patch_size=4, num_classes=3, mlp_ratio=2,
        num_reg_tokens=3, qkv_bias=True, qkv_fused=False, qk_norm=True, scale_mlp=True,
        scale_attn_inner=True, swiglu_mlp=True, init_values=None, class_token=False,
        use_abs_pos_emb=True, rope_type='mixed', use_post_norm=True, global_pool='map',
        use_pre_transformer_norm=True, use_fc_norm=True, use_post_transformer_norm=False,
    )),
    ('timm_rope', dict(attn_type='eva')),
    ('timm_rope_mixed_ape', dict(rope_type='cat', use_rot_pos_emb=False, no_embed_class=False)),
    ('timm_pe_core', dict(attn_pool_mlp_ratio=2, use_pre_transformer_norm=False)),
    ('timm_eva02', dict(swiglu_align_to=64, attn_type='rope')),
])
def test_an_argument_that_the_arrays_contradict_is_an_error(name, changes, tmp_path):
    arrays, config = parts(name)
    assert load.read(written(tmp_path / 'a', arrays, config), values=False)
    for key, value in changes.items():
        given = config | dict(model_args=config['model_args'] | {key: value})
        with pytest.raises(UserError, match='config.json|positions'):
            load.read(written(tmp_path / 'a', arrays, given), values=False)
            pytest.fail(key)


def test_arrays_without_a_config_are_those_of_one_architecture_or_refused(tmp_path, monkeypatch):
    arrays, config = parts('timm_dinov3')
    folder, bare = tmp_path / 'a', tmp_path / 'bare'
    whole = load.read(written(folder, arrays, config))
    with pytest.raises(UserError, match='no architecture that is known here.*config.json'):
        load.read(written(bare, arrays))
    sets = TABLES['architectures'][config['architecture']] | config['model_args']
    near = sets | dict(depth=3)
    known = {'architectures': {'near': near, 'tiny': sets}, 'renamed': {}}
    monkeypatch.setattr(arguments, 'read_table', lambda name: known)
    read = load.read(bare)
    assert_same(read, whole)
    guessed = {name.split('=')[0] for what, name, _ in read.account if what == 'guessed'}
    assert guessed == {'num_heads', 'style', 'epsilon', 'pool', 'mean', 'std'}
    known['architectures']['twin'] = sets | dict(global_pool='token')
    with pytest.raises(UserError, match="of timm's tiny and of twin; give pool=..., as 'gap'"):
        load.read(bare)
    assert load.read(bare, pool='cls').model == whole.model.clone(pool='cls', cls_token=None)


def test_projections_and_gates_of_one_array_or_of_several(tmp_path):
    arrays, config = parts('timm_eva02')
    whole = load.read(written(tmp_path / 'a', arrays, config))
    fused = dict(arrays)
    for i in range(2):
        block = f'blocks.{i}.attn'
        qkv = [fused.pop(f'{block}.{name}_proj.weight') for name in 'qkv']
        fused[f'{block}.qkv.weight'] = np.concatenate(qkv)
        for name in 'qv':
            fused[f'{block}.{name}_bias'] = fused.pop(f'{block}.{name}_proj.bias')
    args = config['model_args'] | dict(qkv_fused=True)
    read = load.read(written(tmp_path / 'b', fused, config | dict(model_args=args)))
    assert_same(read, whole)
    bias = np.asarray(read.params['encoder']['attn']['qkv']['bias'])
    assert not bias[:, 1].any() and bias[:, 0].all() and bias[:, 2].all()
    arrays, config = parts('timm_dinov3_gated')
    whole = load.read(written(tmp_path / 'a', arrays, config))
    packed = dict(arrays)
    for i in range(2):
        for kind in ('weight', 'bias'):
            halves = [packed.pop(f'blocks.{i}.mlp.fc1_{name}.{kind}') for name in 'gx']
            packed[f'blocks.{i}.mlp.fc1.{kind}'] = np.concatenate(halves)
    args = config['model_args'] | dict(swiglu_align_to=0, mlp_ratio=1)
    read = load.read(written(tmp_path / 'b', packed, config | dict(model_args=args)))
    assert_same(read, whole)
