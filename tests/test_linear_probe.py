"""A linear probe: against PyTorch's batch norm, on any number of devices, read as a plain model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learners import IMAGE, MODEL, assert_trees_close, batch

import vit_jax
from vit_jax import config, optim, sharding, step, train
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.objectives import Examples, linear_probe

SPEC = {'image': jax.ShapeDtypeStruct(IMAGE, np.uint8)}


def learner(model=MODEL, **settings):
    return linear_probe.linear_probe(model, Examples(SPEC), **settings)


def random_params(objective):
    """Parameters with a head that is not zero."""
    params = objective.init(jax.random.key(0))
    kernel = jax.random.normal(jax.random.key(1), params['head']['kernel'].shape)
    return params | {'head': {'kernel': kernel, 'bias': jnp.arange(4.0)}}


def steps(devices=1, count=4, **mesh):
    """(losses, parameters, what is kept, first parameters) of a few steps of SGD."""
    objective = learner()
    mesh = sharding.make_mesh(jax.devices()[:devices], **mesh)
    tx = optim.make(
        step.abstract_params(objective), 10, objective.rules, name='sgd', lr=0.1,
        schedule='constant', only='^head/', weight_decay=0.1,
    )  # fmt: skip
    abstract = step.abstract_state(objective, tx, mesh)
    first = random_params(objective)
    state = step.begin(first, objective, tx, abstract)
    advance, found = step.compiled(objective, tx, abstract, mesh), []
    for i in range(count):
        state, metrics = advance(state, sharding.put(batch(seed=i), mesh), {})
        found.append(float(metrics['loss']))
    return found, jax.device_get(state.params), jax.device_get(state.extra), first


def test_it_trains_as_torch_with_a_batch_norm_and_is_one_linear_layer():
    torch = pytest.importorskip('torch')
    losses, params, extra, first = steps()
    norm = torch.nn.BatchNorm1d(MODEL.width, affine=False, eps=1e-6)
    layer = torch.nn.Linear(MODEL.width, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(np.asarray(first['head']['kernel']).T))
        layer.bias.copy_(torch.tensor(np.asarray(first['head']['bias'])))
    groups = [dict(params=[layer.weight], weight_decay=0.0), dict(params=[layer.bias])]
    rule = torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    def features(seed, marked):
        given = batch(seed=seed)
        rows = given['mask'] > 0 if marked else slice(None)
        out = MODEL.apply({'params': first}, MODEL.normalise(given['image']))[1]
        labels = torch.tensor(given['label'][rows])
        return torch.tensor(np.array(out['pre_logits'])[rows]), labels

    for i, ours in enumerate(losses):
        x, labels = features(i, True)  # examples with mask 0 have no part in the statistics
        loss = torch.nn.functional.cross_entropy(layer(norm(x)), labels)
        np.testing.assert_allclose(ours, float(loss), rtol=1e-4)
        rule.zero_grad()
        loss.backward()
        with torch.no_grad():  # decoupled weight decay
            layer.weight.mul_(1 - 0.1 * 0.1)
        rule.step()
    kernel = layer.weight.detach().numpy().T
    np.testing.assert_allclose(params['head']['kernel'], kernel, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(extra['variance'], norm.running_var.numpy(), rtol=1e-4)
    theirs = layer(norm.eval()(features(9, False)[0])).detach().numpy()
    images = MODEL.normalise(batch(seed=9)['image'])
    logits, _ = MODEL.apply({'params': extra['average']}, images)
    np.testing.assert_allclose(logits, theirs, atol=2e-3)
    for name in params.keys() - {'head'}:
        jax.tree.map(np.testing.assert_array_equal, params[name], first[name])


def test_statistics_are_those_of_the_global_batch():
    one = steps()
    assert np.abs(one[2]['mean']).max() > 0.01
    for mesh in ({}, dict(fsdp=8)):
        assert_trees_close(steps(8, **mesh), one, rtol=1e-3, atol=1e-4)
    assert learner().indivisible
    with pytest.raises(UserError, match='head of a model with a single one'):
        both = MODEL.clone(dist_token=True, dist_head=True)
        objective = learner(both)
        objective.extra(objective.init(jax.random.key(0)))


def test_a_run_is_loaded_as_a_classifier(tmp_path):
    import launched

    folder = launched.write_images(tmp_path / 'images', {'train': 12, 'val': 5})
    pairs = {
        'objective.name': 'linear_probe', 'optim.only': '^head/', 'steps': '6', 'optim.ema': 'None',
        'evals.val.every': '6', 'evals.val.batch_size': '8', 'checkpoint.every': '6',
        'optim.lr': '0.1',
    }  # fmt: skip
    full = config.load(f'{launched.TINY}:{folder}', list(pairs.items()))
    result = train.train(full, tmp_path / 'run', Stop())
    assert result['metrics']['val/accuracy'] > 0.4
    model, params = vit_jax.load(tmp_path / 'run')
    saved = launched.state(tmp_path / 'run', 6)
    np.testing.assert_array_equal(params['head']['kernel'], saved['extra/average/head/kernel'])
    assert np.abs(saved['params/head/kernel'] - params['head']['kernel']).max() > 1e-3
    assert model.num_classes == 3
