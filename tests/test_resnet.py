"""BiT: against PyTorch's convolutions and norms, and through everything that takes a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vit_jax
from vit_jax import config, models
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.io import experiment
from vit_jax.models import resnet
from vit_jax.train import train


def torch_bit(p, images, units):
    """The pre-activation ResNet of arXiv:1912.11370 from PyTorch's own operations, in float64."""
    p = jax.tree.map(lambda x: torch.tensor(np.asarray(x, np.float64)), p)

    def conv(x, q, by=1):
        kernel = q['kernel'].permute(3, 2, 0, 1)  # [h, w, C, F] -> [F, C, h, w]
        variance, mean = torch.var_mean(kernel, dim=(1, 2, 3), correction=0, keepdim=True)
        kernel = (kernel - mean) / torch.sqrt(variance)
        return F.conv2d(x, kernel, stride=by, padding=kernel.shape[-1] // 2)

    def norm(x, q):
        return F.relu(F.group_norm(x, 32, q['scale'], q['bias'], eps=1e-5))

    x = torch.tensor(np.asarray(images, np.float64)).permute(0, 3, 1, 2)
    x = F.max_pool2d(F.pad(conv(x, p['conv_root'], 2), (1, 1, 1, 1)), 3, 2)
    for stage, count in enumerate(units):
        for unit in range(count):
            q, by = p[f'block{stage + 1}_unit{unit + 1}'], 2 if stage and not unit else 1
            y = norm(x, q['gn1'])
            shortcut = conv(y, q['conv_proj'], by) if 'conv_proj' in q else x
            y = norm(conv(y, q['conv1']), q['gn2'])
            y = norm(conv(y, q['conv2'], by), q['gn3'])
            x = shortcut + conv(y, q['conv3'])
    x = norm(x, p['norm']).mean(dim=(2, 3))
    return (x @ p['head']['kernel'] + p['head']['bias']).numpy()


@pytest.mark.parametrize('size', [(64, 64), (37, 50)])
def test_logits_equal_those_of_torch(size):
    model = models.build('bit', num_classes=5, units=(2, 1, 1), width=0.5)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, *size, 3)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)['params']
    params = jax.tree.map(lambda x: x + np.float32(0.2 * rng.normal(size=x.shape)), params)
    logits, out = jax.jit(model.apply)({'params': params}, images)
    expected = torch_bit(params, images, model.units)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=2e-3, atol=2e-3)
    h, w = model.grid(size)
    assert out['encoded'].shape == (2, h * w, 512) and out['pre_logits'].shape == (2, 512)
    np.testing.assert_allclose(out['encoded'].mean(1), out['pre_logits'], rtol=1e-5)


def test_small_kernels_are_standardised_as_in_the_code_of_bit():
    """By (variance + 1e-10)^0.5 in BiT, by deviation + 1e-5 in hybrids."""
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 16)).astype(np.float32)
    for centred in (True, False):
        conv = resnet.StdConv(4, 3, centred=centred, epsilon=1e-10 if centred else None)
        kernel = conv.init(jax.random.key(0), x)['params']['kernel']
        kernel -= kernel.mean((0, 1, 2))
        kernel *= 1e-4 / kernel.std((0, 1, 2))
        scaled, unit = (conv.apply({'params': {'kernel': k}}, x) for k in (kernel, 1e4 * kernel))
        share = float(jnp.vdot(scaled, unit) / jnp.vdot(unit, unit))
        assert share == pytest.approx(1.01**-0.5 if centred else 1 / 1.1, rel=1e-3)


@pytest.mark.parametrize('centred', [True, False])
@pytest.mark.parametrize('length, size, by', [(7, 3, 1), (8, 3, 2), (9, 3, 2), (20, 7, 2)])
def test_products_with_padding_are_not_counted(length, size, by, centred):
    """As many as a convolution of ones with ones adds up."""
    padding = [(size // 2,) * 2] if centred else 'SAME'
    ones = jax.lax.conv_general_dilated(
        jnp.ones((1, 1, length)), jnp.ones((1, 1, size)), (by,), padding
    )
    assert resnet.taps(length, size, by, centred) == ones.sum()


def test_flops_are_what_the_compiler_counts():
    model = models.build('bit', num_classes=1000, units=(2, 2, 2, 1), width=1.0)
    images = jax.ShapeDtypeStruct((1, 96, 64, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    counted = jax.jit(lambda p, x: model.apply(p, x)[0]).lower(params, images).cost_analysis()
    kernels = sum(x.size for x in jax.tree.leaves(params) if x.ndim == 4)  # standardised: 6 a value
    features = counted['flops'] - 6 * kernels
    assert 0.93 < model.flops((96, 64, 3)) / features < 1.02


@pytest.mark.parametrize('values, words', [
    (dict(width=0.3), 'width 0.3 gives 19 features'), (dict(units=()), 'units is'),
    (dict(units=(3, 0)), 'units is'), (dict(dtype='int8'), 'dtype is'),
])
def test_what_can_not_be_built_is_one_line(values, words):
    with pytest.raises(UserError, match=words):
        models.build('bit-r50x1', **values)


@pytest.mark.parametrize('name', ['bit-r51x1', 'bit-r50x0', 'bit-r50', 'bit/16', 'r50x1'])
def test_no_such_name(name):
    with pytest.raises(UserError, match=f'no model {name!r}.*bit-rDEPTHxWIDTH.*50, 101, 152, 200'):
        models.build(name)


def test_names_and_fields_make_the_same_model():
    for name in ('bit-r50x1', 'bit-r152x4', 'bit-r200x3'):
        model = models.build(name)
        assert models.describe(model)['name'] == name
        fields = models.describe(model)
        assert models.build(**fields) == model
    small = models.build('bit', units=(1, 2), width=0.5)
    assert models.build(**models.describe(small)) == small


@pytest.mark.slow
def test_trains_and_loads_and_says_what_no_format_has(tmp_path):
    given = experiment.read('experiments/digits.py')
    given.pop('epochs')
    given['model'] = dict(name='bit', units=[1, 1], width=0.5)
    given['steps'], given['expected'] = 100, ()
    given['evals']['test'] |= dict(every=0, batch_size=64)
    given['optim'] = dict(lr=5e-3, warmup=5)
    result = train(config.complete(given), tmp_path / 'run', Stop())
    assert result['metrics']['test/accuracy'] > 0.5
    model, params = vit_jax.load(tmp_path / 'run')
    assert isinstance(model, resnet.Bit) and model.units == (1, 1) and model.num_classes == 10
    other, new = vit_jax.load(tmp_path / 'run', image_size=24, num_classes=3)
    logits, _ = other.apply({'params': new}, jnp.ones((1, 24, 24, 3)))
    assert logits.shape == (1, 3) and not logits.any()
    with pytest.raises(UserError, match=r'format timm cannot express units=\(1, 1\) of this model'):
        vit_jax.save(tmp_path / 'x', model, params, format='timm')
    given['optim']['layer_decay'] = 0.5
    with pytest.raises(UserError, match='layer_decay is 0.5, but the model has no encoder blocks'):
        train(config.complete(given), tmp_path / 'other', Stop())
