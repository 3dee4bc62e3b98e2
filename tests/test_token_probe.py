"""Probes of frozen tokens: against PyTorch, against shallower models, on any number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learners import IMAGE, MODEL, assert_trees_close, batch

import vit_jax
from vit_jax import config, models, optim, sharding, step, train
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.models.parameters import named_leaves
from vit_jax.objectives import Examples, token_probe

SPEC = {'image': jax.ShapeDtypeStruct(IMAGE, np.uint8)}
AIM = dict(pool='attention', blocks=2, norm=False, batch_norm=True)
VIT = MODEL.clone(num_classes=None)


def learner(model=MODEL, **settings):
    return token_probe.token_probe(model, Examples(SPEC), **settings)


def trained(devices=1, count=3, settings=AIM, **mesh):
    """(losses, parameters, what is kept, first parameters) of a few steps of SGD."""
    objective = learner(**settings)
    mesh = sharding.make_mesh(jax.devices()[:devices], **mesh)
    tx = optim.make(
        step.abstract_params(objective), 10, objective.rules, name='sgd', lr=0.5,
        schedule='constant', only='^probe/',
    )  # fmt: skip
    abstract = step.abstract_state(objective, tx, mesh)
    first = jax.jit(objective.init)(jax.random.key(0))
    state = step.begin(first, objective, tx, abstract)
    advance, found = step.compiled(objective, tx, abstract, mesh), []
    for i in range(count):
        state, metrics = advance(state, sharding.put(batch(seed=i), mesh), {})
        found.append(float(metrics['loss']))
    return found, jax.device_get(state.params), jax.device_get(state.extra), first


@functools.partial(jax.jit, static_argnums=(2, 3))
def shallower(params, images, depth, norm):
    """(class token, patches) after the first blocks of the model."""
    model = VIT.clone(depth=depth, last_norm='tokens' if norm else 'none')
    params = params | {'encoder': jax.tree.map(lambda x: x[:depth], params['encoder'])}
    if not norm:
        del params['norm']
    out = model.apply({'params': params}, VIT.normalise(images))[1]
    return out['cls'], out['encoded']


def test_attention_pooling_trains_as_torch():
    torch = pytest.importorskip('torch')
    losses, params, extra, first = trained()
    width, heads = MODEL.width, MODEL.num_heads
    normalise = torch.nn.BatchNorm1d(width, affine=False, eps=1e-6)
    key, value, head = (
        torch.nn.Linear(width, n, bias=False) for n in (width, width, MODEL.num_classes)
    )
    query = torch.nn.Parameter(torch.tensor(np.array(first['probe']['query'])))
    with torch.no_grad():
        for name, layer in (('key', key), ('value', value), ('head', head)):
            layer.weight.copy_(torch.tensor(np.asarray(first['probe'][name]['kernel']).T))
    rule = torch.optim.SGD([query, key.weight, value.weight, head.weight], lr=0.5, momentum=0.9)

    def split(x):  # [B, N, D] -> [B, H, N, C]
        return x.reshape(*x.shape[:2], heads, width // heads).transpose(1, 2)

    def logits(images, rows=slice(None)):
        parts = [shallower(first['vit'], images, depth, False)[1] for depth in (1, 2)]
        x = torch.tensor(np.mean(np.stack(parts), axis=0)[rows])
        x = normalise(x.transpose(1, 2)).transpose(1, 2)
        own = split(query.expand(len(x), 1, width))
        pooled = torch.nn.functional.scaled_dot_product_attention(
            own, split(key(x)), split(value(x))
        )
        return head(pooled.transpose(1, 2).reshape(len(x), width))

    for i, ours in enumerate(losses):
        given = batch(seed=i)
        rows = given['mask'] > 0  # examples with mask 0 have no part in the statistics
        labels = torch.tensor(given['label'][rows])
        loss = torch.nn.functional.cross_entropy(logits(given['image'], rows), labels)
        np.testing.assert_allclose(ours, float(loss), rtol=1e-4)
        rule.zero_grad()
        loss.backward()
        rule.step()
    np.testing.assert_allclose(params['probe']['query'], query.detach().numpy(), atol=1e-4)
    average = extra['average']
    variance = normalise.running_var.numpy()
    np.testing.assert_allclose(average['statistics']['variance'], variance, rtol=1e-3)
    normalise.eval()
    predicted = jax.jit(learner(**AIM).predict)(average, batch(seed=9))['logits']
    theirs = logits(batch(seed=9)['image']).detach().numpy()
    np.testing.assert_allclose(predicted, theirs, atol=2e-3)
    jax.tree.map(np.testing.assert_array_equal, params['vit'], first['vit'])
    assert not np.array_equal(params['probe']['query'], first['probe']['query'])


@pytest.mark.parametrize('pool', ['cls', 'cls_gap'])
def test_features_are_those_of_the_last_blocks(pool):
    objective = learner(pool=pool, blocks=2)
    params = jax.jit(objective.init)(jax.random.key(1))
    images = batch()['image']
    each = [shallower(params['vit'], images, depth, True) for depth in (1, 2)]
    parts = [cls for cls, _ in each]
    if pool == 'cls_gap':
        parts.append(each[-1][1].mean(axis=1))
    head = params['probe']['head']
    expected = jnp.concatenate(parts, axis=1) @ head['kernel'] + head['bias']
    predicted = jax.jit(objective.predict)(params, batch())['logits']
    np.testing.assert_allclose(predicted, expected, atol=1e-5)
    assert np.abs(expected).max() > 1e-3


def test_eight_devices_are_one():
    one = trained()
    assert_trees_close(trained(8, fsdp=4), one, rtol=1e-3, atol=1e-4)


def test_what_the_model_lacks_is_refused():
    with pytest.raises(UserError, match='objective.blocks is 3; the model has 2'):
        learner(blocks=3)
    with pytest.raises(UserError, match="'cls' needs model.cls_token"):
        learner(MODEL.clone(pool='gap'))
    with pytest.raises(UserError, match='has 9 classes, model.num_classes is 4'):
        token_probe.token_probe(MODEL, Examples(SPEC, {'classes': tuple('abcdefghi')}))


def test_a_run_begins_with_the_encoder_of_another(tmp_path):
    import launched

    folder = launched.write_images(tmp_path / 'images', {'train': 12, 'val': 5})
    pairs = {
        'steps': '6', 'evals.val.every': '6', 'evals.val.batch_size': '8', 'checkpoint.every': '6',
        'optim.ema': 'None', 'objective.name': 'token_probe', 'objective.pool': 'attention',
        'objective.batch_norm': 'True', 'optim.only': '^probe/',
        'init_from': str(tmp_path / 'first.npz'),
    }  # fmt: skip
    full = config.load(f'{launched.TINY}:{folder}', list(pairs.items()))
    first = models.build('vit-ti/4', width=16, depth=2, num_heads=2, mlp_dim=32)
    params = jax.jit(first.init)(jax.random.key(7), jnp.zeros((1, *IMAGE)))['params']
    vit_jax.save(tmp_path / 'first.npz', first, params)
    result = train.train(full, tmp_path / 'run', Stop())
    assert {'val/accuracy', 'val/loss'} <= set(result['metrics'])
    after = launched.state(tmp_path / 'run', 6)
    encoder = {name: x for name, x in params.items() if name != 'head'}
    for name, array in named_leaves(encoder).items():
        np.testing.assert_array_equal(after[f'params/vit/{name}'], array)
