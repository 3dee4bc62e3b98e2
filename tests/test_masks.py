"""Mask classifiers: against transformers, on any number of devices, and as files."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import launched
import numpy as np
import pytest
from compared import assert_close, outputs, random_images, randomised
from learners import assert_trees_close, learnt_by_heart
from safetensors.numpy import load_file

import vit_jax
from vit_jax import assembly, config, models, optim, sharding, step, train
from vit_jax.assembly import initial
from vit_jax.data import pipeline
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.models import detector, segmenter
from vit_jax.models.masks import MaskClassifier, around_encoder
from vit_jax.objectives import Examples, mask_losses, masks

FILE = pathlib.Path(__file__).with_name('tiny_segment.py')
IMAGE, LABELS, K, MOST = (16, 24, 3), (20, 30), 5, 3
EOMT = dict(
    hidden_size=24, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, patch_size=4,
    image_size=16, num_queries=5, num_blocks=2, num_register_tokens=2, num_labels=3,
)  # fmt: skip
WIDTHS = dict(width=16, depth=3, num_heads=2, mlp_dim=24)


def learner(semantic=True, **settings):
    """The objective for a tiny ViT with 4 x 6 patches: masks of classes, or up to three others."""
    fields = WIDTHS | settings.pop('model', {})
    spec = {'image': jax.ShapeDtypeStruct(IMAGE, np.uint8)}
    if semantic:
        spec['label_map'] = jax.ShapeDtypeStruct(LABELS, np.uint8)
    else:
        spec['masks'] = jax.ShapeDtypeStruct((MOST, *LABELS), np.uint8)
        spec['labels'] = jax.ShapeDtypeStruct((MOST,), np.int32)
    model = models.build('vit/4', K, **fields)
    settings = dict(queries=6, query_blocks=2, points=40) | settings
    return masks.masks(model, Examples(spec, steps=100), **settings)


def a_batch(size=8, semantic=True):
    """Images with one to four classes or none to three masks; one example does not count."""
    rng = np.random.default_rng(3)
    mask = np.ones(size, np.float32)
    mask[2] = 0
    batch = dict(image=rng.integers(0, 256, (size, *IMAGE), dtype=np.uint8), mask=mask)
    if semantic:
        labels = rng.integers(0, 1 + np.arange(size) % 4, (*LABELS, size)).transpose(2, 0, 1)
        labels[rng.random(labels.shape) < 0.1] = 255
        return batch | dict(label_map=labels.astype(np.uint8))
    labels = rng.integers(0, K, (size, MOST))
    labels[np.arange(MOST) >= (np.arange(size) % (MOST + 1))[:, None]] = -1
    inside = rng.integers(0, 2, (size, MOST, *LABELS), dtype=np.uint8)
    return batch | dict(labels=labels, masks=inside)


def by_torch(module, images):
    import torch

    with torch.no_grad():
        return module(torch.from_numpy(images.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize('fields, shares', [
    (dict(num_upscale_blocks=1), (1.0, 1.0)),
    (dict(num_upscale_blocks=2, use_swiglu_ffn=True, hidden_act='gelu_pytorch_tanh'), (0.0, 0.0)),
    (dict(num_upscale_blocks=1, num_blocks=1), (0.5,)),
])
def test_transformers_gives_the_same_and_reads_what_is_saved(tmp_path, fields, shares):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    kind = transformers.EomtForUniversalSegmentation
    module = randomised(kind(transformers.EomtConfig(**EOMT | fields)))
    module.attn_mask_probs.copy_(torch.tensor(shares))
    module.save_pretrained(tmp_path / 'in')
    model, params = vit_jax.load(tmp_path / 'in')
    assert isinstance(model, MaskClassifier) and (model.queries, model.num_classes) == (5, 3)
    assert model.masked == (shares if any(shares) else ())
    vit_jax.save(tmp_path / 'out', model, params, 'hf')
    again, info = kind.from_pretrained(tmp_path / 'out', output_loading_info=True)
    assert not any(info.values()), info
    files = (load_file(tmp_path / name / 'model.safetensors') for name in ('in', 'out'))
    a, b = ({name: (x.shape, x.tobytes()) for name, x in file.items()} for file in files)
    assert a == b
    back, weights = vit_jax.load(tmp_path / 'out')
    assert back == model
    jax.tree.map(np.testing.assert_array_equal, weights, params)
    images = random_images(2, 16, 16, 3)
    if shares == (0.5,):
        with pytest.raises(UserError, match='a training that is not over'):
            model.apply({'params': params}, images)
        model = vit_jax.load(tmp_path / 'in', masked=(1.0,))[0]
        module.attn_mask_probs.copy_(torch.ones(1))
        again.attn_mask_probs.copy_(torch.ones(1))
    for one in (module, again.eval()):
        wanted = by_torch(one, images)
        logits, out = outputs(model, params, images)
        assert_close(logits, wanted.class_queries_logits.numpy())
        assert_close(out['masks'], wanted.masks_queries_logits.numpy())
    with pytest.raises(UserError, match='is of a mask classifier, which takes no other head'):
        vit_jax.load(tmp_path / 'in', num_classes=7)
    with pytest.raises(UserError, match='format timm has no mask classifier; hf has'):
        vit_jax.save(tmp_path / 'timm', model, params, 'timm')


@pytest.mark.parametrize('semantic', [True, False])
def test_losses_are_those_of_transformers_at_the_same_points(semantic, monkeypatch):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    batch, rng, count = a_batch(semantic=semantic), np.random.default_rng(1), 200
    if semantic:
        targets = mask_losses.of_label_map(jnp.asarray(batch['label_map']), K, 4)
    else:
        targets = mask_losses.Targets(*map(jnp.asarray, (
            batch['labels'], batch['masks'], np.ones_like(batch['labels']))))  # fmt: skip
    counts = batch['mask'] > 0
    targets = targets._replace(labels=jnp.where(counts[:, None], targets.labels, -1))
    logits = rng.normal(size=(8, 6, K + 1)).astype(np.float32)
    predicted = 3 * rng.normal(size=(8, 6, 8, 12)).astype(np.float32)
    places = rng.random((count, 2)).astype(np.float32)
    key = jax.random.key(4)
    uniform = jax.random.uniform(jax.random.split(key)[0], (8, 1, count, 2))
    monkeypatch.setattr(mask_losses, 'uncertain_points', lambda key, maps, *_: jnp.broadcast_to(
        places, (*maps.shape[:2], *places.shape)))  # fmt: skip
    weights = dict(class_loss=2.0, mask_loss=5.0, dice_loss=5.0)
    found = masks.set_losses(
        key, logits, predicted, targets, batch['mask'], points=count, oversample=3.0,
        importance=0.75, weights=weights, no_object=0.1,
    )  # fmt: skip
    config = transformers.EomtConfig(**EOMT | dict(num_labels=K, train_num_points=count))
    criterion = transformers.EomtForUniversalSegmentation(config).criterion
    criterion.sample_points_using_uncertainty = lambda maps, *_: torch.from_numpy(
        np.tile(places, (len(maps), 1, 1)))  # fmt: skip
    drawn = iter(torch.from_numpy(np.array(uniform))[counts])
    monkeypatch.setattr(torch, 'rand', lambda *_, **how: next(drawn))
    labels, wanted_masks = [], []
    for i in np.flatnonzero(counts):
        present = np.flatnonzero(targets.labels[i] >= 0)
        labels.append(torch.from_numpy(np.array(targets.labels[i])[present].astype(np.int64)))
        if semantic:
            inside = [batch['label_map'][i] == k for k in labels[-1].numpy()]
        else:
            inside = list(batch['masks'][i][present] == 1)
        inside = np.stack(inside) if inside else np.zeros((0, *LABELS))
        wanted_masks.append(torch.from_numpy(inside.astype(np.float32)))
    wanted = criterion(
        torch.from_numpy(predicted[counts]), torch.from_numpy(logits[counts]), wanted_masks, labels
    )
    names = dict(class_loss='cross_entropy', mask_loss='mask', dice_loss='dice')
    for ours, theirs in names.items():
        np.testing.assert_allclose(found[ours], wanted[f'loss_{theirs}'], rtol=2e-5)


def test_points_at_the_border_and_those_that_are_uncertain():
    torch = pytest.importorskip('torch')
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(2, 3, 5, 7)).astype(np.float32)
    places = rng.random((2, 1, 50, 2)).astype(np.float32)
    places[:, :, :4, 0], places[:, :, 4:8, 1] = 0, 1
    wanted = torch.nn.functional.grid_sample(
        torch.from_numpy(maps), torch.from_numpy(2 * places - 1), align_corners=False
    )[:, :, 0]
    np.testing.assert_allclose(mask_losses.at_points(maps, places), wanted, atol=1e-5)
    slope = np.linspace(-4, 4, 64, dtype=np.float32)
    maps = np.broadcast_to(slope, (1, 2, 64, 64))  # uncertain in the middle column
    found = mask_losses.uncertain_points(jax.random.key(0), maps, 400, 3.0, 0.75)
    assert found.shape == (1, 2, 400, 2) and 0 <= found.min() and found.max() < 1
    distance = np.abs(found[..., 0] - 0.5)
    assert distance[:, :, :300].max() < 0.2  # the quarter of those drawn nearest to it is used
    assert distance[:, :, 300:].max() > 0.4
    areas = np.zeros((1, 4, 8), np.uint8)
    areas[0, 0, :3], areas[0, 1:, :], areas[0, 0, 4] = 2, 255, 4
    targets = mask_losses.of_label_map(jnp.asarray(areas), K, 4)
    assert targets.labels.tolist() == [[0, 2, 4, -1]]
    assert mask_losses.of_label_map(jnp.asarray(areas), K, 2).labels.tolist() == [[0, 2]]


@pytest.mark.slow
@pytest.mark.parametrize('semantic', [True, False])
def test_examples_without_masks_and_those_that_do_not_count(semantic):
    objective, batch = learner(semantic), a_batch(4, semantic)
    params = objective.init(jax.random.key(0))
    loss = jax.jit(jax.value_and_grad(
        lambda p, b: objective.loss(p, {}, {}, b, jax.random.key(1), 30)[:2], has_aux=True
    ))  # fmt: skip
    whole = loss(params, batch)
    name = 'label_map' if semantic else 'labels'
    batch[name][2], batch['image'][2] = 1, 0
    assert_trees_close(loss(params, batch), whole, rtol=1e-3, atol=1e-6)
    none = batch | {name: np.full_like(batch[name], 255 if semantic else -1)}
    (value, (metrics, _)), slopes = loss(params, none)
    assert metrics['class_loss'] > 0 == metrics['mask_loss'] == metrics['dice_loss']
    np.testing.assert_allclose(value, 2 * metrics['class_loss'], rtol=1e-6)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))
    assert loss(params, batch | {'mask': np.zeros(4, np.float32)})[0][0] == 0


@pytest.mark.slow
def test_masked_attention_ends_block_by_block_and_is_gone():
    ends = [jnp.array(masks.masked_shares(4, n / 60)) for n in (0, 10, 15, 20, 40, 45, 50, 60)]
    by_hand = 0.5**0.9
    np.testing.assert_allclose(ends, [
        [1, 1, 1, 1], [1, 1, 1, 1], [by_hand, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1],
        [0, 0, 0, by_hand], [0, 0, 0, 0], [0, 0, 0, 0],
    ], atol=1e-5)  # fmt: skip
    # tue-mps/eomt configs/dinov2/coco/panoptic/eomt_giant_640.yaml: of 88,692 steps
    starts, lasts = [14782, 25869, 36955, 48042, 59128], [29564, 40651, 51737, 62824, 73910]
    for steps, share in (starts, 1), (lasts, 0):
        found = [masks.masked_shares(5, n / 88_692)[i] for i, n in enumerate(steps)]
        np.testing.assert_allclose(found, share, atol=2e-4)
    net = around_encoder(models.build('vit/4', None, **WIDTHS), num_classes=K, query_blocks=2)
    images = random_images(2, *IMAGE)
    params = net.init(jax.random.key(0), images)['params']
    rngs = {'mask': jax.random.key(1)}
    plain, _ = net.apply({'params': params}, images)
    for share, same in ((0.0, True), (1.0, False)):
        given, out = net.apply({'params': params}, images, masked=jnp.full(2, share), rngs=rngs)
        assert out['masks_by_block'].shape == (3, 2, 100, 16, 24)
        assert (np.abs(given - plain).max() < 1e-5) == same
    encoder = models.build('vit/4', None, **WIDTHS).apply({'params': params['vit']}, images)[1]
    assert encoder['encoded'].shape == (2, 24, 16)


def test_mistakes_are_named():
    for words, settings in (
        ('queries is 4, fewer than the 5 masks', dict(queries=4, most_masks=5)),
        ('queries is 2, fewer than the 3 masks', dict(queries=2, semantic=False)),
        ('queries pass the last 3 blocks, and the encoder has 3', dict(query_blocks=3)),
        ("model.pool is 'map', which a mask classifier does not", dict(model=dict(pool='map'))),
        ("model.posemb_at 'layers' places", dict(model=dict(posemb_at='layers'))),
    ):
        with pytest.raises(UserError, match=words):
            learner(**settings)
    spec = {'image': jax.ShapeDtypeStruct(IMAGE, np.uint8)}
    with pytest.raises(UserError, match='needs `label_map`'):
        masks.masks(models.build('vit/4', 3), Examples(spec))


@pytest.mark.slow
def test_eight_devices_are_one():
    objective = learner(model=dict(drop_path=0.2))

    def steps_of(devices, **mesh):
        mesh = sharding.make_mesh(jax.devices()[:devices], **mesh)
        tx = optim.make(step.abstract_params(objective), 10, objective.rules, name='sgd', lr=0.01)
        abstract = step.abstract_state(objective, tx, mesh)
        state = step.init(objective, tx, 0, abstract)
        advance = step.compiled(objective, tx, abstract, mesh)
        state, metrics = advance(state, sharding.put(a_batch(), mesh), {})
        return jax.device_get((metrics, state.params))

    one = steps_of(1)  # one step, as the next one chooses points by rounded logits
    assert_trees_close(steps_of(8, fsdp=2, tensor=2), one, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_begins_from_a_classifier_and_is_a_mask_classifier(tmp_path):
    folder = launched.write_images(tmp_path / 'images', {'train': 12})
    given = config.experiment.read(f'{FILE}:{folder}')
    given['objective'] = dict(name='masks', queries=5, query_blocks=1, points=20)
    given['model'] |= dict(registers=2, layer_scale=0.5, interpolation='bicubic_antialias')
    given['data']['image_size'] = 16
    begin = models.build('vit/4', 4, **{k: x for k, x in given['model'].items() if k != 'name'})
    weights = begin.init(jax.random.key(5), jnp.zeros((1, 16, 16, 3)))['params']
    vit_jax.save(tmp_path / 'begin', begin, weights, 'hf')
    given['init_from'] = str(tmp_path / 'begin')
    full = config.complete(given)
    parts = assembly.make(full, devices=jax.devices()[:1])
    state, account = initial.first_state(full, parts)
    for name in ('embedding', 'encoder', 'norm', 'cls', 'registers'):
        jax.tree.map(np.testing.assert_array_equal, state.params['vit'][name], weights[name])
    assert 'class_head/bias' in account and 'at random: beside the model' in account
    train.train(full, tmp_path / 'run', Stop())
    model, params = vit_jax.load(tmp_path / 'run')
    assert model.metadata.classes == ('dark', 'bright') and model.masked == ()
    batch = next(pipeline.batches(parts.source, parts.task, 0, batch_size=4))
    found = model.apply({'params': params}, model.normalise(batch['image']))[1]
    wanted = parts.objective.predict(params, batch)
    assert wanted['masks'].shape == (4, 5, 8, 8) and wanted['logits'].shape == (4, 5, 3)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    pytest.importorskip('transformers')
    import transformers

    vit_jax.save(tmp_path / 'out', model, params, 'hf')
    kind = transformers.EomtForUniversalSegmentation
    module = kind.from_pretrained(tmp_path / 'out').eval()
    images = random_images(2, 16, 16, 3)
    theirs = by_torch(module, images)
    logits, out = model.apply({'params': params}, images)
    np.testing.assert_allclose(logits, theirs.class_queries_logits, atol=1e-4)
    np.testing.assert_allclose(out['masks'], theirs.masks_queries_logits, atol=1e-4)


def test_with_remat_upscaled_features_are_computed_again_for_the_gradient():
    """Values and gradients are those without it, and no array of their size is kept."""
    images, fine, made = random_images(3, *IMAGE), (3, 8, 12, 16), []
    for remat in ('full', 'none'):
        vit = models.build('vit/4', None, **WIDTHS | dict(depth=2, pool='none', remat=remat))
        net = around_encoder(
            vit, num_classes=K, queries=5, query_blocks=1, upscales=1, masked=(1,)
        )
        params = jax.jit(net.init)(jax.random.key(0), images)['params']

        def loss(params, net=net):
            out = net.apply({'params': params}, images)[1]
            return jnp.mean(out['masks_by_block'] ** 2) + jnp.mean(out['logits_by_block'] ** 2)

        saved = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], params)
        count = [x.shape for x in jax.tree.leaves(saved)].count(fine)
        made.append((jax.jit(jax.value_and_grad(loss))(params), count))
    (again, few), (plain, many) = made
    assert_trees_close(again, plain, rtol=1e-4, atol=1e-5)
    assert few == 0 < many and again[0] > 0


@pytest.mark.slow
def test_a_few_images_are_learnt_by_heart():
    objective = learner(model=dict(width=64, mlp_dim=128, num_heads=4), points=200)
    batch = a_batch(4)
    batch['label_map'] = np.repeat(np.repeat(batch['label_map'][:, ::5, ::5], 5, 1), 5, 2)
    losses = learnt_by_heart(objective, batch, 1e-3, 200)
    assert losses[-1] < 0.5 * losses[0], losses


@pytest.mark.slow
@pytest.mark.parametrize('make', [
    functools.partial(detector.around_encoder, num_classes=20, queries=50),
    functools.partial(segmenter.Segmenter, num_classes=30),
    functools.partial(around_encoder, num_classes=20, queries=50, query_blocks=2),
])
def test_flops_of_models_around_a_vit_are_those_that_the_compiler_counts(make):
    vit = models.build('vit/8', None, width=256, depth=3, num_heads=4, mlp_dim=512, unroll=3)
    net = make(vit.clone(pool='none', cls_token=True))
    images = jax.ShapeDtypeStruct((1, 64, 96, 3), np.float32)
    params = jax.eval_shape(net.init, jax.random.key(0), images)['params']
    apply = jax.jit(lambda p, images: net.apply({'params': p}, images))
    counted = apply.lower(params, images).compile().cost_analysis()['flops']
    assert 1 < counted / net.flops((64, 96, 3)) < 1.06  # norms, softmax and GELU, too
