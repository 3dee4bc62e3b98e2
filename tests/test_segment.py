"""Segmentation by patches: against PyTorch, on any number of devices, and from pre-trained ViTs."""

import pathlib

import jax
import jax.numpy as jnp
import launched
import numpy as np
import pytest
from compared import assert_close
from learners import assert_trees_close, learnt_by_heart

import vit_jax
from vit_jax import assembly, config, models, optim, sharding, step, train
from vit_jax.data import pipeline
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.models import parameters
from vit_jax.objectives import Examples, segment
from vit_jax.optim import layerwise

FILE = pathlib.Path(__file__).with_name('tiny_segment.py')
IMAGE, LABELS, K = (16, 24, 3), (20, 30), 5
HEADS = ('linear', 'segmenter')


def learner(classes=K, kind=np.uint8, **settings):
    """The objective for a tiny ViT with 4 x 6 patches, and label maps of another size."""
    fields = dict(width=16, depth=2, num_heads=2, mlp_dim=24) | settings.pop('model', {})
    spec = {
        'image': jax.ShapeDtypeStruct(IMAGE, np.uint8),
        'label_map': jax.ShapeDtypeStruct(LABELS, kind),
    }
    return segment.segment(models.build('vit/4', classes, **fields), Examples(spec), **settings)


def a_batch(size=8):
    """Images and label maps; a fifth of the pixels is ignored, and one example does not count."""
    rng = np.random.default_rng(3)
    mask = np.ones(size, np.float32)
    mask[2] = 0
    labels = rng.integers(0, K, (size, *LABELS)).astype(np.uint8)
    ignored = rng.random(labels.shape)
    labels[ignored < 0.1], labels[ignored > 0.9] = 255, K
    image = rng.integers(0, 256, (size, *IMAGE), dtype=np.uint8)
    return dict(image=image, label_map=labels, mask=mask)


def noise(params, scale=0.2):
    """Parameters of a tree's shapes, in which nothing is zero."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    noisy = [x + scale * jax.random.normal(key, x.shape) for x, key in pairs]
    return jax.tree.unflatten(tree, noisy)


def torch_loss(logits, batch):
    """(loss, accuracy) of logits [B, K, h, w] by PyTorch."""
    import torch

    keep = batch['mask'] > 0
    labels = torch.from_numpy(batch['label_map'][keep].astype(np.int64))
    labels[labels >= K] = -100
    larger = torch.nn.functional.interpolate(logits, LABELS, mode='bilinear', align_corners=False)
    hits = (larger.argmax(1) == labels)[labels >= 0].float().mean()
    return torch.nn.functional.cross_entropy(larger, labels).item(), hits.item()


def encoded(params, batch, blocks=1):
    """Patches [B, F, h, w] of the ViT alone, as a torch tensor, of the examples that count."""
    import torch

    vit = models.build('vit/4', None, width=16, depth=2, num_heads=2, mlp_dim=24)
    images = vit.normalise(batch['image'][batch['mask'] > 0])
    tokens = vit.apply({'params': params['vit']}, images, capture=('normed_by_block',))[1]
    tokens = np.concatenate([x[:, 1:] for x in tokens['normed_by_block'][-blocks:]], axis=2)
    return torch.from_numpy(tokens.reshape(-1, 4, 6, 16 * blocks).transpose(0, 3, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize('blocks', [1, 2])
def test_the_linear_head_is_batch_norm_and_a_convolution_of_pytorch(blocks):
    torch = pytest.importorskip('torch')
    objective, batch = learner(norm_decay=0.7, blocks=blocks), a_batch()
    params, width = noise(objective.init(jax.random.key(0))), 16 * blocks
    norm, head = torch.nn.BatchNorm2d(width, momentum=0.3), torch.nn.Conv2d(width, K, 1)
    pairs = {norm.weight: params['batch_norm']['scale'], norm.bias: params['batch_norm']['bias'],
             head.weight: params['head']['kernel'].T[..., None, None],
             head.bias: params['head']['bias']}  # fmt: skip
    with torch.no_grad():
        for theirs, ours in pairs.items():
            theirs.copy_(torch.from_numpy(np.array(ours)))
        patches = encoded(params, batch, blocks)
        wanted = torch_loss(head(norm(patches)), batch)
        after = head(norm.eval()(patches)).numpy()
    extra = objective.extra(params)
    loss, (metrics, aux) = objective.loss(params, extra, {}, batch, jax.random.key(1), 0)
    np.testing.assert_allclose([loss, metrics['accuracy']], wanted, rtol=1e-5)
    extra = objective.update(extra, params, aux, 0)
    np.testing.assert_allclose(extra['mean'], norm.running_mean, atol=1e-5)
    np.testing.assert_allclose(extra['variance'], norm.running_var, atol=1e-5)
    found = objective.predict(extra['average'], batch)['semantic']
    assert_close(found[batch['mask'] > 0], after)


def test_the_linear_head_without_batch_norm_is_a_convolution_of_pytorch():
    torch = pytest.importorskip('torch')
    objective, batch = learner(batch_norm=False, blocks=2), a_batch()
    params = noise(objective.init(jax.random.key(0)))
    assert params.keys() == {'vit', 'head'}
    kernel, bias = (torch.from_numpy(np.array(params['head'][n])) for n in ('kernel', 'bias'))
    patches = encoded(params, batch, 2)
    wanted = torch.nn.functional.conv2d(patches, kernel.T[..., None, None], bias)
    loss, (metrics, _) = objective.loss(params, {}, {}, batch, jax.random.key(1), 0)
    np.testing.assert_allclose(
        [loss, metrics['accuracy']], torch_loss(wanted, batch), rtol=1e-5
    )
    found = objective.predict(params, batch)['semantic']
    assert_close(found[batch['mask'] > 0], wanted.numpy())


def test_the_mask_transformer_is_made_of_layers_of_pytorch():
    torch = pytest.importorskip('torch')
    objective, batch = learner(head='segmenter', decoder_dropout=0.0), a_batch()
    params = noise(objective.init(jax.random.key(0)), 0.5)  # deviations of logits are not small
    given = jax.tree.map(lambda x: torch.from_numpy(np.array(x, np.float64)), params)
    layer = torch.nn.TransformerEncoderLayer(16, 1, 64, 0.0, 'gelu', 1e-5, True, norm_first=True)
    layer = layer.double()

    def normed(x, p):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], p['scale'], p['bias'], 1e-5)

    with torch.no_grad():
        x = encoded(params, batch).double().flatten(2).transpose(1, 2)
        x = x @ given['decoder_embedding']['kernel'] + given['decoder_embedding']['bias']
        x = torch.cat([x, given['class_tokens'].expand(len(x), -1, -1)], dim=1)
        for i in range(2):
            block = jax.tree.map(lambda p, i=i: p[i], given['decoder'])
            attn, mlp = block['attn'], block['mlp']
            layer.load_state_dict({
                'self_attn.in_proj_weight': attn['qkv']['kernel'].reshape(16, 48).T,
                'self_attn.in_proj_bias': attn['qkv']['bias'].reshape(48),
                'self_attn.out_proj.weight': attn['out']['kernel'].reshape(16, 16).T,
                'self_attn.out_proj.bias': attn['out']['bias'],
                'linear1.weight': mlp['fc1']['kernel'].T, 'linear1.bias': mlp['fc1']['bias'],
                'linear2.weight': mlp['fc2']['kernel'].T, 'linear2.bias': mlp['fc2']['bias'],
                **{f'norm{n}.{theirs}': block[f'norm{n}'][ours] for n in (1, 2)
                   for theirs, ours in (('weight', 'scale'), ('bias', 'bias'))},
            })  # fmt: skip
            x = layer(x)
        x = normed(x, given['decoder_norm'])
        patches = x[:, :-K] @ given['patch_projection']['kernel']
        classes = x[:, -K:] @ given['class_projection']['kernel']
        patches, classes = (torch.nn.functional.normalize(y, dim=-1) for y in (patches, classes))
        logits = normed(patches @ classes.transpose(1, 2), given['mask_norm'])
        logits = logits.transpose(1, 2).reshape(-1, K, 4, 6)
        wanted = torch_loss(logits, batch)
    found = objective.predict(params, batch)['semantic'][batch['mask'] > 0]
    assert_close(found, logits.numpy())
    loss, (metrics, _) = objective.loss(params, {}, {}, batch, jax.random.key(1), 0)
    np.testing.assert_allclose([loss, metrics['accuracy']], wanted, rtol=1e-5)


@pytest.mark.parametrize('head', HEADS)
def test_ignored_pixels_and_examples_that_do_not_count(head):
    objective, batch = learner(head=head), a_batch()
    params = objective.init(jax.random.key(0))
    loss = jax.jit(jax.value_and_grad(
        lambda p, b: objective.loss(p, {}, {}, b, jax.random.key(1), 0)[0]
    ))  # fmt: skip
    whole = loss(params, batch)
    batch['label_map'][2], batch['image'][2] = 1, 0
    batch['label_map'][batch['label_map'] == 255] = K + 1
    assert_trees_close(loss(params, batch), whole, rtol=1e-4, atol=1e-7)
    for nothing in ({'label_map': np.full_like(batch['label_map'], 255)}, {'mask': np.zeros(8)}):
        value, slopes = loss(params, batch | nothing)
        assert value == 0 and not any(np.any(x) for x in jax.tree.leaves(slopes))


def test_mistakes_are_named():
    for words, settings in (
        ('num_classes is 256, and the label map has 255', dict(classes=256)),
        ("model.pool is 'map', which a segmenter does not", dict(model=dict(pool='map'))),
    ):
        with pytest.raises(UserError, match=words):
            learner(**settings)
    learner(classes=256, kind=np.uint16)
    spec = {'image': jax.ShapeDtypeStruct(IMAGE, np.uint8)}
    with pytest.raises(UserError, match='needs `label_map`'):
        segment.segment(models.build('vit/4', 3), Examples(spec))


@pytest.mark.parametrize('head', HEADS)
def test_layer_decay_is_that_of_the_encoder_alone(head):
    objective = learner(head=head)
    leaves = parameters.named_leaves(step.abstract_params(objective))
    rates = layerwise.rate_multipliers(leaves, objective.rules, 0.5)
    assert rates['vit/embedding/kernel'] == 0.125
    np.testing.assert_array_equal(rates['vit/encoder/norm1/scale'][:, 0], [0.25, 0.5])
    assert {rates[name] for name in leaves if not name.startswith('vit/')} == {1}


@pytest.mark.slow
@pytest.mark.parametrize('head', HEADS)
def test_eight_devices_are_one(head):
    objective = learner(head=head, model=dict(width=128))  # two heads in the decoder

    def steps_of(devices, **mesh):
        mesh = sharding.make_mesh(jax.devices()[:devices], **mesh)
        tx = optim.make(step.abstract_params(objective), 10, objective.rules, name='sgd', lr=0.1)
        abstract = step.abstract_state(objective, tx, mesh)
        state = step.init(objective, tx, 0, abstract)
        advance = step.compiled(objective, tx, abstract, mesh)
        for _ in range(2):
            state, metrics = advance(state, sharding.put(a_batch(), mesh), {})
        return jax.device_get((metrics, state.params, state.extra))

    one = steps_of(1)
    assert_trees_close(steps_of(8, fsdp=2, tensor=2), one, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_begins_from_a_classifier_and_keeps_it_frozen(tmp_path):
    folder = launched.write_images(tmp_path / 'images', {'train': 12})
    given = config.experiment.read(f'{FILE}:{folder}')
    begin = models.build('vit/4', 4, **{k: given['model'][k] for k in (
        'width', 'depth', 'num_heads', 'mlp_dim')})  # fmt: skip
    weights = begin.init(jax.random.key(5), jnp.zeros((1, 16, 8, 3)))['params']
    vit_jax.save(tmp_path / 'begin.npz', begin, weights, image_size=(16, 8))
    given['init_from'] = str(tmp_path / 'begin.npz')
    given['optim']['only'] = '^(head|batch_norm)/'
    full = config.complete(given)
    train.train(full, tmp_path / 'run', Stop())
    assert {'loss', 'accuracy'} <= launched.metrics(tmp_path / 'run')[0].keys()
    state = launched.state(tmp_path / 'run', 4)
    vit, kept = vit_jax.load(tmp_path / 'run', part='encoder', ema=False)
    assert isinstance(vit, models.vit.Vit) and vit.num_classes is None
    jax.tree.map(np.testing.assert_array_equal, kept, {n: weights[n] for n in kept})
    assert any('batch_norm/scale' in name for name in state)
    with pytest.raises(UserError, match='moving averages alone'):
        vit_jax.load(tmp_path / 'run', ema=False)


@pytest.mark.parametrize('head', HEADS)
def test_a_run_is_loaded_as_the_segmenter_that_it_trained(head, tmp_path):
    folder = launched.write_images(tmp_path / 'images', {'train': 4})
    given = config.experiment.read(f'{FILE}:{folder}')
    given['objective']['head'] = head
    full = config.complete(given)
    parts = assembly.make(full, devices=jax.devices()[:1])
    params = noise(parts.objective.init(jax.random.key(0)))
    launched.write_run(tmp_path / 'run', full, parts, params)
    batch = next(pipeline.batches(parts.source, parts.task, 0, batch_size=4))
    model, found = vit_jax.load(tmp_path / 'run')
    assert model.metadata.classes == ('dark', 'bright') == vit_jax.class_names(model)
    assert vit_jax.class_names(tmp_path / 'run') == model.metadata.classes
    logits, _ = model.apply({'params': found}, model.normalise(batch['image']))
    kept = parts.objective.extra(params).get('average', params)
    wanted = parts.objective.predict(kept, batch)['semantic']
    assert wanted.shape == (4, 2, 4, 2)
    np.testing.assert_array_equal(logits.transpose(0, 3, 1, 2), wanted)
    for form in ('hf', 'timm'):
        with pytest.raises(UserError, match=f"^format {form} has no .*part='encoder'"):
            vit_jax.save(tmp_path / 'x', model, found, form)


@pytest.mark.slow
@pytest.mark.parametrize('head', HEADS)
def test_a_few_images_are_learnt_by_heart(head):
    objective = learner(head=head, model=dict(width=64, mlp_dim=128, num_heads=4))
    batch = a_batch(4)
    batch['label_map'] = np.repeat(np.repeat(batch['label_map'][:, ::5, ::5], 5, 1), 5, 2)
    losses = learnt_by_heart(objective, batch, 3e-3, 200)
    assert losses[-1] < 0.5 * losses[0], losses
