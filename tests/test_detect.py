"""Detectors: against transformers, SciPy and NumPy, on any number of devices, and as files."""

import pathlib

import jax
import jax.numpy as jnp
import launched
import numpy as np
import pytest
from compared import assert_close, outputs, random_images, randomised
from learners import assert_trees_close, learnt_by_heart
from safetensors.numpy import load_file
from scipy.optimize import linear_sum_assignment

import vit_jax
from vit_jax import assembly, config, models, optim, sharding, step, train
from vit_jax.assembly import initial
from vit_jax.data import pipeline
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.models.detector import Detector
from vit_jax.objectives import Examples, boxes, detect, matching

FILE = pathlib.Path(__file__).with_name('tiny_detect.py')
IMAGE, MOST = (16, 24, 3), 4
YOLOS = dict(
    hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40, patch_size=4,
    image_size=[16, 24], num_detection_tokens=5, num_labels=3,
)  # fmt: skip


def learner(**settings):
    """The objective for a tiny ViT with 4 x 6 patches and up to four boxes of three classes."""
    fields = dict(width=16, depth=2, num_heads=2, mlp_dim=24) | settings.pop('model', {})
    spec = {
        'image': jax.ShapeDtypeStruct(IMAGE, np.uint8),
        'boxes': jax.ShapeDtypeStruct((MOST, 4), np.float32),
        'labels': jax.ShapeDtypeStruct((MOST,), np.int32),
    }
    model = models.build('vit/4', 3, **fields)
    return detect.detect(model, Examples(spec), **dict(queries=6) | settings)


def true_boxes(rng, *shape):
    corners = rng.random((*shape, 2, 2))
    return np.concatenate([corners.min(-2), corners.max(-2)], -1).astype(np.float32)


def a_batch(size=8):
    """Images with none to four boxes; one example does not count."""
    rng = np.random.default_rng(3)
    mask = np.ones(size, np.float32)
    mask[2] = 0
    labels = rng.integers(0, 3, (size, MOST))
    labels[np.arange(MOST) >= (np.arange(size) % (MOST + 1))[:, None]] = -1
    image = rng.integers(0, 256, (size, *IMAGE), dtype=np.uint8)
    return dict(image=image, boxes=true_boxes(rng, size, MOST), labels=labels, mask=mask)


def by_torch(module, images, targets=None):
    import torch

    with torch.no_grad():
        return module(torch.from_numpy(images.transpose(0, 3, 1, 2)), labels=targets)


@pytest.mark.parametrize('fields, resized', [
    (dict(use_mid_position_embeddings=True), (24, 16)),
    (dict(use_mid_position_embeddings=False, qkv_bias=False, image_size=[16, 16]), (8, 24)),
])
def test_transformers_gives_the_same_and_reads_what_is_saved(tmp_path, fields, resized):
    transformers = pytest.importorskip('transformers')
    made = transformers.YolosForObjectDetection(transformers.YolosConfig(**YOLOS | fields))
    module = randomised(made)
    module.save_pretrained(tmp_path / 'in')
    model, params = vit_jax.load(tmp_path / 'in')
    assert isinstance(model, Detector) and (model.queries, model.num_classes) == (5, 3)
    images = random_images(2, *model.metadata.image_size, 3)
    vit_jax.save(tmp_path / 'out', model, params, 'hf')
    again, info = type(made).from_pretrained(tmp_path / 'out', output_loading_info=True)
    assert not any(info.values()), info
    for one in (module, again.eval()):
        wanted = by_torch(one, images)
        logits, out = outputs(model, params, images)
        assert_close(logits, wanted.logits.numpy())
        assert_close(out['boxes'], wanted.pred_boxes.numpy())
    files = (load_file(tmp_path / name / 'model.safetensors') for name in ('in', 'out'))
    a, b = ({name: (x.shape, x.tobytes()) for name, x in file.items()} for file in files)
    assert a == b
    assert vit_jax.load(tmp_path / 'out')[0] == model
    larger, weights = vit_jax.load(tmp_path / 'in', image_size=resized)
    images = random_images(2, *resized, 3)
    wanted = by_torch(module, images)
    logits, out = outputs(larger, weights, images)
    assert_close(logits, wanted.logits.numpy())
    assert_close(out['boxes'], wanted.pred_boxes.numpy())
    with pytest.raises(UserError, match="is of a detector, which takes no other head; part='enc"):
        vit_jax.load(tmp_path / 'in', num_classes=7)
    with pytest.raises(UserError, match='format timm has no detector; hf has'):
        vit_jax.save(tmp_path / 'timm', model, params, 'timm')


def test_the_encoder_alone_has_the_positions_between_its_blocks(tmp_path):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    module = randomised(transformers.YolosForObjectDetection(transformers.YolosConfig(**YOLOS)))
    module.save_pretrained(tmp_path)
    vit, params = vit_jax.load(tmp_path, part='encoder')
    images = random_images(2, 16, 24, 3)
    with torch.no_grad():
        inside, middle = module.vit, module.vit.encoder.interpolation.mid_position_embeddings
        x = inside.embeddings(torch.from_numpy(images.transpose(0, 3, 1, 2)))[:, :-5]
        for i, layer in enumerate(inside.encoder.layer):
            x = layer(x)
            if i < 2:
                x = x + middle[i, :, :-5]
        wanted = inside.layernorm(x).numpy()
    assert_close(outputs(vit, params, images)[1]['encoded'], wanted[:, 1:])


def test_loss_and_its_parts_are_those_of_transformers():
    torch = pytest.importorskip('torch')
    loss_of = pytest.importorskip('transformers.loss.loss_for_object_detection')
    batch, rng = a_batch(), np.random.default_rng(1)
    keep = batch['mask'] > 0
    logits = rng.normal(size=(8, 6, 4)).astype(np.float32)
    predicted = np.asarray(boxes.to_centres(true_boxes(rng, 8, 6)))
    targets = [
        dict(class_labels=torch.tensor(labels[labels >= 0]),
             boxes=torch.from_numpy(np.array(boxes.to_centres(corners[labels >= 0]))))
        for labels, corners in zip(batch['labels'][keep], batch['boxes'][keep], strict=True)
    ]  # fmt: skip
    matcher = loss_of.HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
    criterion = loss_of.ImageLoss(matcher, 3, 0.1, ['labels', 'boxes'])
    predictions = dict(logits=logits[keep], pred_boxes=predicted[keep])
    given = {name: torch.from_numpy(x) for name, x in predictions.items()}
    wanted = {name.removeprefix('loss_'): float(x) for name, x in criterion(given, targets).items()}
    labels = jnp.where(batch['mask'][:, None] > 0, batch['labels'], -1)
    matched = detect.match(
        logits, predicted, labels, batch['boxes'], class_cost=1, box_cost=5, giou_cost=2
    )
    found = detect.box_losses(predicted, batch['boxes'], labels >= 0, matched)
    ce = matching.class_loss(logits, labels, matched, batch['mask'], 0.1)
    np.testing.assert_allclose(
        [ce, found['box_loss'], found['giou_loss']],
        [wanted[name] for name in ('ce', 'bbox', 'giou')], rtol=1e-5,
    )  # fmt: skip


def test_generalised_iou_by_hand_and_of_boxes_without_area():
    rng = np.random.default_rng(0)
    a, b = true_boxes(rng, 64), true_boxes(rng, 64)
    a[:8], a[8:12, 2:], b[12:16, 2] = b[:8], a[8:12, :2], b[12:16, 0]  # equal; points; lines
    for one, other, found in zip(a, b, boxes.generalised_iou(a, b), strict=True):
        x0, y0, x1, y1 = np.float64(one)
        u0, v0, u1, v1 = np.float64(other)
        inside = max(min(x1, u1) - max(x0, u0), 0) * max(min(y1, v1) - max(y0, v0), 0)
        union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - inside
        hull = (max(x1, u1) - min(x0, u0)) * (max(y1, v1) - min(y0, v0))
        np.testing.assert_allclose(found, inside / union - (hull - union) / hull, atol=1e-5)
    point = np.full(4, 0.3, np.float32)
    value, slope = jax.value_and_grad(boxes.generalised_iou)(point, point)
    assert value == 0 and np.isfinite(slope).all()
    back = boxes.to_corners(boxes.to_centres(a))
    np.testing.assert_allclose(back, a, atol=1e-6)


@pytest.mark.parametrize('targets, predictions', [(1, 1), (3, 9), (7, 7)])
def test_assignments_cost_the_least_with_ties_and_padding(targets, predictions):
    rng, assign = np.random.default_rng(0), jax.jit(matching.assign)
    for kind in ('noise', 'ties', 'equal', 'huge', 'not finite'):
        cost = rng.normal(size=(32, targets, predictions)).astype(np.float32)
        cost = {'ties': np.round(cost), 'equal': 0 * cost, 'huge': 1e6 * cost}.get(kind, cost)
        if kind == 'not finite':
            cost[:, :, 0] = np.nan
            cost[::2, 0] = np.inf
        valid = rng.random((32, targets)) < 0.7
        found = np.asarray(assign(cost, valid))
        for one, ours, counts in zip(cost, found, valid, strict=True):
            one, ours = np.nan_to_num(one[counts], nan=1e9, posinf=1e9), ours[counts]
            assert len(set(ours)) == len(ours)
            rows, columns = linear_sum_assignment(one)
            wanted = one[rows, columns].sum(dtype=np.float64)
            total = one[np.arange(len(ours)), ours].sum(dtype=np.float64)
            np.testing.assert_allclose(total, wanted, rtol=1e-5, atol=1e-5)


def test_examples_without_boxes_and_those_that_do_not_count():
    objective, batch = learner(), a_batch()
    params = objective.init(jax.random.key(0))
    loss = jax.jit(jax.value_and_grad(
        lambda p, b: objective.loss(p, {}, {}, b, jax.random.key(1), 0)[:2], has_aux=True
    ))  # fmt: skip
    whole = loss(params, batch)
    batch['labels'][2], batch['image'][2] = 1, 0
    assert_trees_close(loss(params, batch), whole, rtol=1e-6)
    none = batch | {'labels': np.full_like(batch['labels'], -1)}
    (value, (metrics, _)), slopes = loss(params, none)
    assert value == metrics['class_loss'] > 0 == metrics['box_loss'] == metrics['giou_loss']
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))
    nothing, _ = loss(params, batch | {'mask': np.zeros(8, np.float32)})
    assert nothing[0] == 0
    degenerate = batch | {'boxes': np.full_like(batch['boxes'], 0.5)}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(loss(params, degenerate)))


def test_mistakes_are_named():
    for words, settings in (
        ('queries is 3, fewer than the 4 boxes', dict(queries=3)),
        ("model.pool is 'map', which a detector does not", dict(model=dict(pool='map'))),
        ("model.posemb 'relative' places tokens", dict(model=dict(posemb='relative'))),
    ):
        with pytest.raises(UserError, match=words):
            learner(**settings)
    spec = {'image': jax.ShapeDtypeStruct(IMAGE, np.uint8)}
    with pytest.raises(UserError, match='needs `boxes` and `labels`'):
        detect.detect(models.build('vit/4', 3), Examples(spec))
    with pytest.raises(UserError, match='names no classes; set model.num_classes'):
        detect.detect(models.build('vit/4', None), Examples(spec))


@pytest.mark.parametrize('fields', [
    dict(registers=2, registers_posemb=True, pool='gap'), dict(posemb_at='shared', registers=1),
    dict(posemb='sincos2d', cls_posemb=False),
])
def test_positions_of_detection_tokens_wherever_the_encoder_has_its_own(fields):
    """Each detection token differs by its position alone."""
    objective, batch = learner(model=fields), a_batch(4)
    params = objective.init(jax.random.key(0))
    table = jnp.ones_like(params['detection'])
    params |= dict(detection=table, detection_posemb=0 * params['detection_posemb'])
    same = objective.predict(params, batch)['logits']
    np.testing.assert_allclose(same, same[:, :1].repeat(6, 1), atol=1e-5)
    params['detection_posemb'] = params['detection_posemb'].at[..., 1, :].add(jnp.arange(16.0))
    moved = objective.predict(params, batch)['logits']
    assert np.abs(moved[:, 1] - moved[:, 0]).max() > 1e-3
    np.testing.assert_allclose(moved[:, 2:], moved[:, :1].repeat(4, 1), atol=1e-5)


@pytest.mark.slow
def test_eight_devices_are_one():
    objective = learner(model=dict(posemb_at='layers'))

    def steps_of(devices, **mesh):
        mesh = sharding.make_mesh(jax.devices()[:devices], **mesh)
        tx = optim.make(step.abstract_params(objective), 10, objective.rules, name='sgd', lr=0.1)
        abstract = step.abstract_state(objective, tx, mesh)
        state = step.init(objective, tx, 0, abstract)
        advance = step.compiled(objective, tx, abstract, mesh)
        for _ in range(2):
            state, metrics = advance(state, sharding.put(a_batch(), mesh), {})
        return jax.device_get((metrics, state.params))

    one = steps_of(1)
    assert_trees_close(steps_of(8, fsdp=2, tensor=2), one, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_begins_from_a_classifier_and_is_a_detector(tmp_path):
    folder = launched.write_images(tmp_path / 'images', {'train': 12})
    given = config.experiment.read(f'{FILE}:{folder}')
    begin = models.build('vit/4', 4, **{k: given['model'][k] for k in (
        'width', 'depth', 'num_heads', 'mlp_dim', 'gelu', 'interpolation')})  # fmt: skip
    weights = begin.init(jax.random.key(5), jnp.zeros((1, 16, 16, 3)))['params']
    vit_jax.save(tmp_path / 'begin', begin, weights, 'timm')
    plain = config.complete(given | dict(
        init_from=str(tmp_path / 'begin'), model=given['model'] | dict(posemb_at='stem')
    ))  # fmt: skip
    state, account = initial.first_state(plain, assembly.make(plain, devices=jax.devices()[:1]))
    for name in ('embedding', 'encoder', 'norm', 'cls'):
        jax.tree.map(np.testing.assert_array_equal, state.params['vit'][name], weights[name])
    assert state.params['vit']['posemb'].shape == (1, 1 + 8, 16)
    assert 'box_head/fc1/bias' in account and 'at random: beside the model' in account
    train.train(config.complete(given), tmp_path / 'run', Stop())
    assert {'class_loss', 'box_loss', 'giou_loss'} <= launched.metrics(tmp_path / 'run')[0].keys()
    model, params = vit_jax.load(tmp_path / 'run')
    assert model.metadata.classes == ('small', 'large') and model.vit.posemb_at == 'layers'
    full = config.complete(given)
    parts = assembly.make(full, devices=jax.devices()[:1])
    batch = next(pipeline.batches(parts.source, parts.task, 0, batch_size=4))
    found = model.apply({'params': params}, model.normalise(batch['image']))[1]
    wanted = parts.objective.predict(params, batch)
    assert wanted['boxes'].shape == (4, 5, 4) and wanted['logits'].shape == (4, 5, 3)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    vit, _ = vit_jax.load(tmp_path / 'run', part='encoder')
    assert isinstance(vit, models.vit.Vit) and vit.posemb_at == 'layers'
    pytest.importorskip('transformers')
    vit_jax.save(tmp_path / 'out', model, params, 'hf')
    back, again = vit_jax.load(tmp_path / 'out')
    assert back.metadata.classes == model.metadata.classes
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.slow
def test_a_few_images_are_learnt_by_heart():
    objective, batch = learner(model=dict(width=64, mlp_dim=128, num_heads=4)), a_batch()
    losses = learnt_by_heart(objective, batch, 1e-3, 400)
    assert losses[-1] < 0.1 * losses[0]
