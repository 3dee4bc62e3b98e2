"""Distillation: DeiT's losses, what trains which head, and a teacher that is frozen."""

import functools
import pathlib
import shutil

import in_process
import jax
import jax.numpy as jnp
import launched
import numpy as np
import pytest
from learners import IMAGE, MODEL, assert_trees_close, batch

import vit_jax
from vit_jax import config, evaluate, models, optim, sharding, step
from vit_jax.errors import UserError
from vit_jax.objectives import Examples, Trained, distill, losses, mixing, supervised
from vit_jax.plan import rehearsal

FIXTURE = pathlib.Path(__file__).with_name('data') / 'losses_deit.npz'
SPEC = {'image': jax.ShapeDtypeStruct(IMAGE, np.uint8)}
STUDENT = MODEL.clone(dist_token=True, dist_head=True)
BIT = models.build('bit-r50x1', num_classes=4, units=(1,), width=0.5)


def randomised(model, seed, size=IMAGE):
    """Parameters whose heads are not zero."""
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, *size)))['params']
    keys = iter(jax.random.split(jax.random.key(seed + 1), 1000))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), params)


def trained(model, seed=5, size=IMAGE, **fields):
    params = jax.tree.map(np.asarray, randomised(model, seed, size))
    return Trained(model, params, address='teacher', **fields)


def objective_of(student=STUDENT, teacher=None, **settings):
    teacher = teacher or trained(MODEL)
    return distill.distill(student, Examples(SPEC), teacher=teacher, **settings)


@functools.cache
def compiled(loss):
    """The loss and its gradient as one program."""
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def gradients(objective, params, one, frozen=None):
    frozen = objective.frozen if frozen is None else frozen
    (_, (metrics, _)), grads = compiled(objective.loss)(
        params, {}, frozen, one, jax.random.key(3), 0
    )
    return metrics, grads


def test_losses_are_those_of_deit():
    made = np.load(FIXTURE)
    cls, dist, teacher, targets = (
        made[f'deit_{name}'] for name in ('cls_logits', 'dist_logits', 'teacher_logits', 'targets')
    )
    for key in (k for k in made if '_alpha' in k):
        _, kind, alpha, tau = key.split('_')
        alpha, tau = float(alpha.removeprefix('alpha')), float(tau.removeprefix('tau'))
        of_teacher = distill.from_teacher(dist, teacher, kind=kind, tau=tau, divisor='elements')
        value = (1 - alpha) * losses.softmax_xent(cls, targets) + alpha * of_teacher
        np.testing.assert_allclose(value.mean(), made[key], rtol=1e-5)
        whole = distill.from_teacher(dist, teacher, kind=kind, tau=tau)  # of examples
        np.testing.assert_allclose(whole, of_teacher * (7 if kind == 'soft' else 1), rtol=1e-5)


def test_each_head_learns_from_its_own_term_and_predictions_are_the_mean():
    params, one = randomised(STUDENT, 1), batch()
    other_labels = one | {'label': (one['label'] + 1) % 4}
    teachers = trained(MODEL, 5), trained(MODEL, 50)
    for kind in ('hard', 'soft'):
        objective, other = (
            objective_of(teacher=teacher, kind=kind, alpha=0.25) for teacher in teachers
        )
        runs = [gradients(objective, params, given, frozen)[1] for given, frozen in (
            (one, None), (other_labels, None), (one, other.frozen)
        )]  # fmt: skip
        for head, same, other in (('dist_head', 1, 2), ('head', 2, 1)):
            first, equal, differs = (jax.device_get(runs[i][head]) for i in (0, same, other))
            assert_trees_close(first, equal, rtol=1e-6)
            assert np.abs(first['kernel'] - differs['kernel']).max() > 1e-3
    # The gradient of each bias, by hand: alpha * (softmax - target), mean over examples.
    objective = objective_of(teacher=teachers[0], alpha=0.25)
    images, mask = STUDENT.normalise(one['image']), one['mask']
    logits, out = STUDENT.apply({'params': params}, images)
    expected = teachers[0].model.apply({'params': teachers[0].params}, images)[0]
    for head, name, weight, classes in (
        ('head', 'logits_cls', 0.75, one['label']),
        ('dist_head', 'logits_dist', 0.25, expected.argmax(-1)),
    ):
        off = jax.nn.softmax(out[name]) - jax.nn.one_hot(classes, 4)
        by_hand = weight * (off * mask[:, None]).sum(0) / mask.sum()
        found = gradients(objective, params, one)[1][head]['bias']
        np.testing.assert_allclose(found, by_hand, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        objective.predict(params, one)['logits'], (out['logits_cls'] + out['logits_dist']) / 2,
        rtol=1e-5, atol=1e-6,
    )


def test_without_a_teacher_each_head_learns_from_the_labels_by_itself():
    params, one = randomised(STUDENT, 1), batch()
    objective = supervised.supervised(STUDENT, Examples(SPEC), label_smoothing=0.1)
    metrics, found = gradients(objective, params, one)
    out = STUDENT.apply({'params': params}, STUDENT.normalise(one['image']))[1]
    share = one['mask'] / one['mask'].sum()
    targets = 0.9 * jax.nn.one_hot(one['label'], 4) + 0.1 / 4
    total = 0
    for head, name in (('head', 'logits_cls'), ('dist_head', 'logits_dist')):
        total -= (share[:, None] * targets * jax.nn.log_softmax(out[name])).sum() / 2
        by_hand = (share[:, None] * (jax.nn.softmax(out[name]) - targets)).sum(0) / 2
        np.testing.assert_allclose(found[head]['bias'], by_hand, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics['loss'], total, rtol=1e-5)


def test_a_plain_model_matches_the_function_of_its_teacher():
    """arXiv:2106.05237: no labels, the same mixed images; a student that is its teacher is done."""
    teacher = trained(MODEL)
    settings = dict(kind='soft', alpha=1.0, mixup=1.0, cutmix=1.0, tau=2.0)
    objective = objective_of(MODEL, teacher, **settings)
    metrics, grads = gradients(objective, teacher.params, batch())
    assert metrics['loss'] < 1e-6 and metrics['agreement'] == 1
    assert max(np.abs(g).max() for g in jax.tree.leaves(grads)) < 1e-6
    student = randomised(MODEL, 9)
    metrics, grads = gradients(objective, student, batch())
    assert metrics['loss'] > 0.01 and metrics['loss'] == metrics['teacher_loss']
    relabelled = batch() | {'label': np.zeros(16, int)}
    assert_trees_close(gradients(objective, student, relabelled)[1], grads, rtol=1e-6)


def test_a_student_of_several_patches_learns_from_the_same_teacher():
    """FlexiViT (arXiv:2212.08013): at its teacher's own patches it is done, at others it is not."""
    teacher = trained(MODEL)
    flexible = dict(patch_sides=(2, 4), patch_grid=2, kind='soft', alpha=1.0)
    objective = objective_of(MODEL, teacher, **flexible)
    tail = (teacher.params, {}, objective.frozen, batch(), jax.random.key(0), 0)
    found = {side: float(jax.jit(loss)(*tail)[0]) for side, loss in objective.variants.items()}
    assert found[4] < 1e-6 and found[2] > 0.01


def test_a_teacher_sees_the_same_mixed_images_at_its_own_size_and_normalisation():
    """A CNN of another resolution, mean and deviation; by hand from the mixed images."""
    teacher = trained(BIT.clone(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)), size=(16, 12, 3))
    settings = dict(mixup=0.8, cutmix=1.0, kind='soft', tau=1.5)
    objective = objective_of(MODEL, teacher, teacher_size=(16, 12), **settings)
    params, one, key = randomised(MODEL, 1), batch(), jax.random.key(3)
    pixels, _ = mixing.mix(
        one['image'] / 255, losses.targets(one['label'], 4),
        jax.random.fold_in(key, supervised.MIX), mask=one['mask'], mixup=0.8, cutmix=1.0,
    )  # fmt: skip
    student = MODEL.apply({'params': params}, (pixels - 0.5) / 0.5)[0]
    seen = (pixels - np.array([0.4, 0.5, 0.6])) / np.array([0.2, 0.3, 0.25])
    seen = jax.image.resize(seen, (16, 16, 12, 3), 'cubic')
    expected = teacher.model.apply({'params': teacher.params}, seen)[0] / 1.5
    p = jax.nn.softmax(expected)
    divergence = 1.5**2 * (p * (jnp.log(p) - jax.nn.log_softmax(student / 1.5))).sum(-1)
    by_hand = (divergence * one['mask']).sum() / one['mask'].sum()
    value = gradients(objective, params, one)[0]['teacher_loss']
    np.testing.assert_allclose(value, by_hand, rtol=1e-4)
    assert by_hand > 0.01


def run(devices=1, accumulate=1, steps=4, **mesh):
    """(metrics of each step, state, frozen) of a student with both heads."""
    larger = trained(MODEL, size=(16, 16, 3), image_size=(16, 16))  # images are resized
    objective = objective_of(teacher=larger, kind='soft', label_smoothing=0.1)
    mesh = sharding.make_mesh(jax.devices()[:devices], **mesh)
    tx = optim.make(step.abstract_params(objective), steps, name='sgd', lr=0.1)
    abstract = step.abstract_state(objective, tx, mesh)
    state, frozen = step.init(objective, tx, 0, abstract), step.frozen(objective, mesh)
    advance = step.compiled(objective, tx, abstract, mesh, accumulate=accumulate)
    found = []
    for i in range(steps):
        state, metrics = advance(state, sharding.put(batch(seed=i), mesh), frozen)
        found.append(jax.device_get(metrics))
    return found, jax.device_get(state), frozen


@pytest.mark.slow
def test_eight_devices_and_micro_batches_are_one_with_a_sharded_teacher_that_stays():
    one, state, _ = run()
    assert np.abs(state.params['dist_head']['kernel']).max() > 1e-3 and not state.extra
    for how in (dict(devices=8, fsdp=2, tensor=2), dict(accumulate=4)):
        found, other, frozen = run(**how)
        assert_trees_close(found, one, rtol=1e-4, atol=1e-5)
        assert_trees_close(other.params, state.params, rtol=1e-3, atol=1e-5)
        same = trained(MODEL, size=(16, 16, 3)).params
        assert_trees_close(jax.device_get(frozen['teacher']), same, rtol=0)
        kernel = frozen['teacher']['encoder']['mlp']['fc1']['kernel']
        assert kernel.sharding.is_fully_replicated == ('devices' not in how)


@pytest.mark.parametrize('fields, settings, words', [
    (dict(model=MODEL.clone(num_classes=5)), {}, 'teacher has 5 classes, and the student 4'),
    (dict(classes=('b', 'a')), {}, 'another order: number 0 is b, and a in the data'),
    (dict(image_size=(8, 8)), dict(teacher_size=16), r'is \[16, 16\], and .* images of \[8, 8\]'),
])  # fmt: skip
def test_teachers_that_do_not_suit_are_refused(fields, settings, words):
    teacher = trained(MODEL)._replace(**fields)
    examples = Examples(SPEC, {'classes': ('a', 'b')})
    with pytest.raises(UserError, match=words):
        distill.distill(STUDENT, examples, teacher=teacher, **settings)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return launched.write_images(tmp_path_factory.mktemp('images'), {'train': 8, 'val': 4})


def teacher_at(path, seed):
    """Writes a CNN of the folder's three classes, which takes images of any size."""
    shutil.rmtree(path, ignore_errors=True)
    model = BIT.clone(num_classes=3, units=(3,), kernel_epsilon=1e-8)
    vit_jax.save(path, model, randomised(model, seed), format='timm', image_size=12)
    return str(path)


def flags(teacher):
    objective = dict(name='distill', teacher=teacher, kind='soft', mixup=0.5)
    model = dict(dist_token=True, dist_head=True)
    return [f'{k}.{n}={v}' for k, x in dict(objective=objective, model=model).items()
            for n, v in x.items()]  # fmt: skip


@pytest.mark.slow
def test_a_run_resumes_to_the_bit_names_its_teacher_and_outlives_it(folder, tmp_path):
    teacher, run = teacher_at(tmp_path / 'teacher', 5), tmp_path / 'run'
    whole = in_process.run(folder, tmp_path / 'whole', *flags(teacher))
    stop = in_process.StopAfter(run, 6)
    assert in_process.run(folder, run, *flags(teacher), stop=stop) is None
    with pytest.raises(UserError, match='frozen'):  # another teacher at the same address
        teacher_at(tmp_path / 'teacher', 6)
        in_process.run(folder, run, *flags(teacher))
    teacher_at(tmp_path / 'teacher', 5)
    again = in_process.run(folder, run, *flags(teacher))
    assert launched.timeless(run)[-1] == launched.timeless(tmp_path / 'whole')[-1]
    assert 0 < again['metrics']['agreement'] <= 1
    kept = launched.state(run, 12)
    launched.assert_same_bits(kept, launched.state(tmp_path / 'whole', 12))
    assert not any('teacher' in name or 'frozen' in name for name in kept)
    # A finished run needs no teacher; its evaluation is of the mean of both heads.
    shutil.rmtree(teacher)
    full = config.load(str(run / 'config.json'))
    found = {n: metrics for n, metrics, _ in evaluate.evaluate(str(run), full)}
    assert found['val']['accuracy'] == whole['metrics']['val/accuracy']
    model, params = vit_jax.load(str(run))
    assert model.dist_head and 'dist_head' in params
    with pytest.raises(UserError, match=r'objective.teacher: no such file .*teacher'):
        in_process.run(folder, tmp_path / 'new', *flags(teacher))


def test_a_dry_run_reads_no_values(folder, tmp_path, monkeypatch):
    teacher = teacher_at(tmp_path / 'teacher', 5)
    given = [f.split('=', 1) for f in flags(teacher)]
    full = config.load(f'{launched.TINY}:{folder}', given)
    monkeypatch.setattr('vit_jax.convert.files.Array.read', None)  # of values
    monkeypatch.setattr('vit_jax.convert.pieces.fill_params', None)
    with_teacher = rehearsal.describe(full, 'runs/x')
    assert f'reads    objective.teacher {teacher}' in with_teacher.splitlines()
    full.objective.teacher = 'hf://nobody/nothing'
    text = rehearsal.describe(full, 'runs/x')
    assert 'hf://nobody/nothing (not read here' in text
    full.objective.teacher = str(tmp_path / 'absent.npz')
    assert 'absent.npz (not read here' in rehearsal.describe(full, 'runs/x')
