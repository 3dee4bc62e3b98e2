"""What `capture` gives of the blocks, and what a model says of images that it can't take."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax
from vit_jax import config, models
from vit_jax.errors import UserError

CLASSES = 5
ALL = dict(
    vit=('attention', 'tokens_by_block', 'normed_by_block'),
    mixer=('tokens_by_block', 'normed_by_block'),
)
TINY = dict(
    vit=dict(width=24, depth=3, num_heads=3, mlp_dim=48, registers=2, layer_scale=0.3),
    mixer=dict(width=24, depth=3, tokens_mlp_dim=16, mlp_dim=48),
)


def small(kind, **fields):
    """(model, parameters that tell images apart, images [2, 16, 24, 3])."""
    model = models.build(f'{kind}/8', num_classes=CLASSES, **TINY[kind] | fields)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 16, 24, 3)).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)['params']
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    return model, params, images


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', TINY)
def test_asking_changes_no_bit(kind, dtype):
    for unroll in (1, 3):
        model, params, images = small(kind, unroll=unroll, dtype=dtype)

        def run(capture, model=model, params=params, images=images):
            apply = jax.jit(lambda x: model.apply({'params': params}, x, capture=capture))
            return jax.device_get(apply(images))

        logits, plain = run(())
        for capture in (ALL[kind][:1], ALL[kind]):
            asked, out = run(capture)
            assert asked.tobytes() == logits.tobytes()
            assert out.keys() == plain.keys() | set(capture)


@pytest.mark.parametrize('kind', TINY)
def test_the_last_block_normed_is_what_is_encoded(kind):
    model, params, images = small(kind)
    _, out = jax.jit(lambda x: model.apply({'params': params}, x, capture=ALL[kind]))(images)
    tokens = 6 + (3 if kind == 'vit' else 0)
    for name in ('tokens_by_block', 'normed_by_block'):
        assert out[name].shape == (4, 2, tokens, 24)
    np.testing.assert_allclose(out['normed_by_block'][-1][:, -6:], out['encoded'], atol=1e-6)
    first = out['tokens_by_block'][0][:, -6:]
    np.testing.assert_allclose(first, out['tokens'], atol=1e-6)
    assert np.abs(np.diff(out['tokens_by_block'], axis=0)).max((1, 2, 3)).min() > 1e-2


@pytest.mark.parametrize('name, fields', [
    ('ViT', dict(intermediate_size=96)), ('Dinov2', dict(mlp_ratio=2)),
    ('Dinov2WithRegisters', dict(mlp_ratio=2, num_register_tokens=3)),
])  # fmt: skip
def test_they_are_the_hidden_states_of_transformers(name, fields, tmp_path):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    config = getattr(transformers, f'{name}Config')(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=32, patch_size=8,
        **fields,
    )  # fmt: skip
    module = getattr(transformers, f'{name}Model')(config).eval()
    with torch.no_grad():
        for value in module.parameters():
            value += 0.1 * torch.randn(value.shape, generator=torch.manual_seed(0))
    module.save_pretrained(tmp_path)
    model, params = vit_jax.load(tmp_path)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2))
        theirs = module(pixels, output_hidden_states=True)
    for unroll in (1, 3):
        with jax.default_matmul_precision('highest'):
            apply = jax.jit(model.clone(unroll=unroll).apply, static_argnames='capture')
            _, out = apply({'params': params}, images, capture=ALL['vit'])
        assert len(theirs.hidden_states) == len(out['tokens_by_block']) == 4
        for ours, wanted in zip(out['tokens_by_block'], theirs.hidden_states, strict=True):
            np.testing.assert_allclose(ours, wanted.numpy(), atol=1e-4)
        wanted = theirs.last_hidden_state.numpy()
        np.testing.assert_allclose(out['normed_by_block'][-1], wanted, atol=1e-4)


def test_what_can_not_be_captured_is_refused():
    bit = models.build('bit', units=(1,), width=0.5, num_classes=CLASSES)
    cases = [
        (small('vit')[0], ('attentions',), "no capture 'attentions'; there are attention, tokens_"),
        (small('mixer')[0], ('attention',), "no capture 'attention'; there are tokens_by_block, "),
        (bit, 'tokens_by_block', "no capture 'tokens_by_block'; this model captures nothing"),
    ]
    for model, capture, words in cases:
        with pytest.raises(UserError, match=re.escape(words)):
            jax.eval_shape(
                lambda x, m=model, c=capture: m.init(jax.random.key(0), x, capture=c),
                jnp.zeros((1, 32, 32, 3)),
            )
    model, params, images = small('vit')
    name = 'attention'  # without a tuple
    _, out = jax.eval_shape(lambda x: model.apply({'params': params}, x, capture=name), images)
    assert name in out


def assert_refused(model, params, images, *words):
    with pytest.raises(UserError) as e:
        jax.eval_shape(model.apply, {'params': params}, images)
    assert '\n' not in str(e.value)
    for word in words:
        assert word in str(e.value), str(e.value)


@pytest.mark.parametrize('kind, fields', [
    ('vit', {}), ('mixer', {}), ('vit', dict(posemb='learn2d')), ('vit', dict(posemb='relative')),
    ('vit', dict(posemb_at='layers')), ('vit', dict(posemb='learn2d', posemb_at='shared')),
    ('vit', dict(registers_posemb=True)),
])  # fmt: skip
def test_images_of_another_size_name_the_way_out(kind, fields):
    model, params, images = small(kind, **fields)
    jax.eval_shape(model.apply, {'params': params}, images)
    for h, w in ((24, 16), (32, 32)):
        if (h, w) == (24, 16) and fields.get('posemb') != 'learn2d':
            continue  # as many patches
        way = f'vit_jax.load(path, image_size=({h}, {w}))'
        assert_refused(model, params, np.zeros((1, h, w, 3), 'f'), f'{h} x {w} pixels', way)


def test_images_that_are_no_normalised_floats_are_refused():
    model, params, images = small('vit')
    assert_refused(model, params, np.zeros((1, 16, 24, 3), 'uint8'), 'uint8', 'model.normalise')
    for wrong, kind in ((['a.jpg'], 'list'), (None, 'NoneType')):
        with pytest.raises(UserError, match=f'of type {kind}, .* vit_jax.preprocess'):
            model.apply({'params': params}, wrong)
    assert_refused(model, params, images[0], '[16, 24, 3]', '[B, H, W, 3]')
    assert_refused(model, params, images.transpose(0, 3, 1, 2), '[2, 3, 16, 24]', '[B, H, W, 3]')


def test_a_dtype_is_its_name():
    for dtype in (jnp.bfloat16, np.dtype('float32'), np.float32, 'bfloat16'):
        name = jnp.dtype(dtype).name
        assert models.build('vit-ti/16', dtype=dtype).dtype == name
        assert models.build('mixer-s/16').clone(dtype=dtype).dtype == name
        assert models.build('bit-r50x1', dtype=dtype) == models.build('bit-r50x1', dtype=name)
    with pytest.raises(UserError, match="model.dtype is 'int32', not one of"):
        models.build('vit-ti/16', dtype=jnp.int32)


def test_a_dtype_of_an_experiment_is_its_name(tmp_path):
    (tmp_path / 'experiment.py').write_text(
        """import jax.numpy as jnp
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        model=dict(name='vit-ti/16', dtype=jnp.bfloat16),
        data=dict(source=dict(name='/images', split='train'), batch_size=8, image_size=32,
                  view='resize'),
        optim=dict(lr=1.0, momentum_dtype=jnp.bfloat16), steps=1,
    ))
"""
    )
    full = config.load(str(tmp_path / 'experiment.py'))
    assert full.model.dtype == full.optim.momentum_dtype == 'bfloat16'
