"""Runs of DINO: its teacher, its last layer, on any devices, killed, loaded and evaluated."""

import contextlib
import io
import json
import pathlib
import random
import re

import jax
import launched
import numpy as np
import pytest
import tiny
import tiny_dino
from learners import assert_trees_close

import vit_jax
from vit_jax import assembly, config, sharding, step, train
from vit_jax.assembly import initial
from vit_jax.convert import load
from vit_jax.data import pipeline
from vit_jax.distributed.stop import Stop
from vit_jax.models.parameters import named_leaves
from vit_jax.objectives import dino
from vit_jax.plan import hlo
from vit_jax.run import checkpoint

FILE = pathlib.Path(tiny_dino.__file__)
# Without draws, which are of a micro-batch, and without Adam, which makes much of small gradients.
PLAIN = {'model.drop_path': 0.0, 'optim.name': 'sgd', 'optim.lr': 0.3, 'optim.warmup': 0,
         'optim.hold_steps': 1}  # fmt: skip

# The processes of a run complete its config before they meet, and meet before JAX starts.
UNSTARTED = """
import json, sys
from jax._src import xla_bridge  # nothing public tells
from vit_jax import config
config.complete(json.loads(sys.argv[1]))
assert not xla_bridge.backends_are_initialized()
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return launched.write_images(tmp_path_factory.mktemp('images'), {'train': 8, 'val': 4})


def parts_of(folder, devices=1, **changes):
    full = config.override(
        config.experiment.read(f'{FILE}:{folder}'), [(k, str(v)) for k, v in changes.items()]
    )
    return full, assembly.make(full, devices=jax.devices()[:devices])


def trained(folder, steps=3, masked=2, **how):
    """(states after each step, metrics of each step), with some examples masked out."""
    full, parts = parts_of(folder, **how)
    advance = step.compiled(
        parts.objective, parts.tx, parts.abstract, parts.mesh, seed=full.seed,
        accumulate=full.accumulate,
    )  # fmt: skip
    state = step.init(parts.objective, parts.tx, full.seed, parts.abstract)
    feed = pipeline.batches(parts.source, parts.task, full.seed, batch_size=8)
    states, found = [jax.device_get(state)], []
    for _ in range(steps):
        batch = next(feed)
        batch['mask'][:masked] = 0
        state, metrics = advance(state, sharding.put(batch, parts.mesh), {})
        states.append(jax.device_get(state))
        found.append(jax.device_get(metrics))
    return states, found


@pytest.fixture(scope='module')
def states(folder):
    """The states of a whole run after each step."""
    return trained(folder, steps=24, masked=0)[0]


@pytest.fixture(scope='module')
def one(folder):
    """What three steps on one device give."""
    return trained(folder, **PLAIN)


def test_the_teacher_is_a_moving_average_by_the_published_schedule(states):
    steps = 24
    teacher = jax.tree.map(lambda x: x.astype(float), states[0].params)
    for t in range(steps):
        momentum = 1 + (0.9 - 1) * 0.5 * (1 + np.cos(np.pi * t / steps))
        teacher = jax.tree.map(
            lambda old, new: momentum * old + (1 - momentum) * new, teacher, states[t + 1].params  # noqa: B023
        )
        assert_trees_close(states[t + 1].extra['average'], teacher, rtol=1e-5, atol=1e-6)
    moved = named_leaves(jax.tree.map(
        lambda a, b: np.abs(a - b).max(), states[0].params, states[-1].params
    ))  # fmt: skip
    assert min(moved.values()) > 1e-4, moved


def test_the_last_layer_stays_as_it_is_at_first(states):
    for n, state in enumerate(states[:9]):
        moved = {
            name: np.abs(x - y).max() for (name, x), y in zip(
                named_leaves(state.params).items(), jax.tree.leaves(states[0].params), strict=True
            )
        }  # fmt: skip
        last = [x for name, x in moved.items() if 'prototypes/' in name]
        assert len(last) == 2 and (max(last) == 0 if n <= 6 else min(last) > 1e-4)
        assert n < 2 or moved['head/fc3/kernel'] > 1e-4  # the first learning rate is 0


def test_eight_devices_are_one_on_any_mesh(folder, one):
    kept = one[0][-1].extra
    assert np.abs(kept['center']).max() > 0.01
    teacher, student = kept['average'], one[0][-1].params
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), teacher, student)
    assert max(jax.tree.leaves(gaps)) > 1e-3
    eight = trained(folder, devices=8, **PLAIN, **{'mesh.fsdp': 2, 'mesh.tensor': 2})
    assert_trees_close(eight[0][-1], one[0][-1], rtol=1e-4, atol=1e-5)
    assert_trees_close(eight[1], one[1], rtol=1e-4, atol=1e-5)
    _, parts = parts_of(folder, devices=8, **{'mesh.fsdp': 8})
    for tree in (parts.abstract.params, parts.abstract.extra['average']):
        whole = [n for n, x in named_leaves(tree).items() if x.sharding.is_fully_replicated]
        assert all(x.endswith(('bias', 'scale', 'cls', 'posemb')) for x in whole)
        assert not any('prototypes' in x for x in whole)


@pytest.mark.slow
def test_local_crops_gather_no_weights_again(folder):
    def gathered(local_count):
        how = {'mesh.fsdp': 8, 'data.local_count': local_count, 'data.batch_size': 8}
        full, parts = parts_of(folder, devices=8, **how)
        advance = step.compiled(parts.objective, parts.tx, parts.abstract, parts.mesh)
        batch = next(pipeline.batches(parts.source, parts.task, full.seed, batch_size=8))
        state = step.init(parts.objective, parts.tx, full.seed, parts.abstract)
        program = advance.lower(state, sharding.put(batch, parts.mesh), {}).compile()
        found = hlo.read(program.as_text()).collectives
        weights = sum(x.nbytes for x in jax.tree.leaves(state.params['vit']['encoder']))
        return sum(x.bytes * x.times for x in found if x.kind == 'all-gather') / weights

    assert 2 <= gathered(3) == gathered(0) < 3  # the student's and the teacher's, and the head


def test_micro_batches_add_up(folder, one):
    parts = trained(folder, accumulate=4, **PLAIN)[0][-1]
    assert_trees_close(parts, one[0][-1], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope='module')
def whole(folder, tmp_path_factory):
    """The workdir of a run that nothing disturbed, in which features count as collapsed."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(dino, 'COLLAPSED', 9.0)
        train.train(parts_of(folder)[0], workdir, Stop())
    assert said.getvalue().count('step 1  warning: features have collapsed') == 1
    return workdir


def test_a_run_is_its_teacher(folder, whole, tmp_path):
    """It is what loads, what is evaluated, and what other runs and libraries begin from."""
    _, parts = parts_of(folder)
    state = checkpoint.restore_newest(whole, parts.abstract)
    teacher = jax.device_get(state.extra['average'])
    model, params = vit_jax.load(str(whole))
    assert_trees_close(params, teacher['vit'], rtol=0, atol=0)
    assert model.num_classes is None and model.gelu == 'exact'
    unused = [name for kind, name, _ in load.read(str(whole)).account if kind == 'unused']
    assert unused and all(name.startswith('head/') for name in unused)
    last = [line for line in launched.metrics(whole) if 'knn/3_nn_cosine' in line][-1]
    again = parts.evals['knn'](teacher)
    assert again['3_nn_cosine'] == last['knn/3_nn_cosine'] and 'loss' not in again

    begun, account = initial.first_state(*parts_of(folder, init_from=whole, seed=8))
    assert_trees_close(begun.params['vit'], params, rtol=0, atol=0)
    assert re.search(r're-initialised +head/', account)
    labelled = tiny.get_config(str(folder)).to_dict() | dict(init_from=str(whole), model={})
    full = config.complete(labelled)
    launched.passes(UNSTARTED, json.dumps(labelled))
    tuned, _ = initial.first_state(full, assembly.make(full, devices=jax.devices()[:1]))
    assert_trees_close(tuned.params['encoder'], params['encoder'], rtol=0, atol=0)
    assert tuned.params['head']['kernel'].shape == (16, 3)
    larger, resized = vit_jax.load(str(whole), image_size=24, num_classes=5)
    assert resized['posemb'].shape == (1, 37, 16) and larger.num_classes == 5

    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    vit_jax.save(tmp_path / 'hf', model, params, 'hf', image_size=16)
    module = transformers.AutoModel.from_pretrained(tmp_path / 'hf').eval()
    images = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype('f')
    with torch.no_grad():
        theirs = module(torch.from_numpy(images.transpose(0, 3, 1, 2))).last_hidden_state[:, 0]
    with jax.default_matmul_precision('highest'):
        ours = jax.jit(model.apply)({'params': params}, images)[1]['cls']
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


def start(folder, workdir, *flags, **options):
    return launched.start(folder, workdir, *flags, config=FILE, **options)


def finish(folder, workdir, *flags, **options):
    status, output = launched.finish(folder, workdir, *flags, config=FILE, **options)
    assert status == 0, output


@pytest.mark.slow
def test_killed_anywhere_it_resumes_to_the_bit(folder, tmp_path):
    undisturbed, draw = tmp_path / 'undisturbed', random.Random(1)
    finish(folder, undisturbed)
    workdir = tmp_path / 'run'
    for at in sorted(draw.sample(range(1, 22), 2)):
        process = start(folder, workdir, '--config.data.workers=2')
        launched.wait_for(lambda at=at: launched.last_step(workdir) >= at, process, workdir)
        launched.kill(process)
    finish(folder, workdir)
    assert launched.checkpoints(workdir) == launched.checkpoints(undisturbed)
    for saved in launched.checkpoints(workdir):
        a, b = (launched.state(w, saved) for w in (workdir, undisturbed))
        assert 'extra/center' in a and any(k.startswith('extra/average/head/') for k in a)
        launched.assert_same_bits(a, b)
    assert launched.timeless(workdir) == launched.timeless(undisturbed)


@pytest.mark.slow
def test_a_run_moves_from_eight_devices_to_two(folder, whole, tmp_path):
    workdir = tmp_path / 'run'
    process = start(folder, workdir, '--config.mesh.fsdp=4', devices=8)
    launched.wait_for(lambda: launched.last_step(workdir) >= 9, process, workdir)
    launched.kill(process)
    finish(folder, workdir, '--config.mesh.fsdp=2', devices=2)
    assert 'resumed at step' in launched.log_of(workdir).read_text()
    pairs = list(zip(launched.timeless(workdir), launched.timeless(whole), strict=True))
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys() and ours['step'] == theirs['step']
        if 'loss' in ours:  # Adam makes much of small gradients
            np.testing.assert_allclose(ours['loss'], theirs['loss'], rtol=2e-2)
