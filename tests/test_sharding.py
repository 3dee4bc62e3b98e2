"""Meshes: what crosses between devices in a step, read from the compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learners import classifier

from vit_jax import models, optim, sharding, step
from vit_jax.errors import UserError
from vit_jax.models import parameters
from vit_jax.plan import hlo

IMAGE, BATCH, DEPTH, WIDTH, TOKENS = (32, 32, 3), 16, 3, 64, 17
FIELDS = dict(num_classes=16, depth=DEPTH, width=WIDTH, num_heads=4, mlp_dim=256)


def program(devices=8, accumulate=1, name='vit-ti/8', mesh=None, **fields):
    """(what a step does on each device, the state's shapes) of a small model on a mesh."""
    mesh = sharding.make_mesh(jax.devices()[:devices], **(mesh or {}))
    model = models.build(name, **{k: v for k, v in (FIELDS | fields).items() if v is not None})
    tx = optim.make(step.abstract_params(classifier(model, IMAGE)), 100, clip=1.0, ema=0.9)
    abstract = step.abstract_state(classifier(model, IMAGE), tx, mesh)
    advance = step.compiled(
        classifier(model, IMAGE), tx, abstract, mesh, accumulate=accumulate
    )
    kinds = dict(image=jnp.uint8, label=jnp.int32, mask=jnp.float32, id=jnp.int32)
    batch = {
        k: jax.ShapeDtypeStruct((BATCH, *(IMAGE if k == 'image' else ())), kind)
        for k, kind in kinds.items()
    }
    return hlo.read(advance.lower(abstract, batch, {}).compile().as_text()), abstract


def sizes(abstract):
    """{name: bytes} of the parameters."""
    return {name: leaf.size * 4 for name, leaf in parameters.named_leaves(abstract.params).items()}


def large(program, loops=None):
    """Collectives of more than a few numbers; those within that many loops."""
    found = [c for c in program.collectives if c.bytes > 256]
    return [c for c in found if loops is None or c.loops == loops]


def total(collectives):
    return sum(c.bytes * c.times for c in collectives)


@pytest.mark.parametrize('unroll', [1, DEPTH])
def test_data_parallel_sums_each_gradient_once_and_fused(unroll):
    found, abstract = program(unroll=unroll)
    assert {c.kind for c in found.collectives} == {'all-reduce'}
    assert all(c.group == 8 for c in found.collectives)
    assert total(large(found)) == pytest.approx(sum(sizes(abstract).values()), abs=256)
    # A loop sums a layer's gradients as soon as they are known; without one it is one exchange.
    assert len(large(found, loops=1)) == (unroll == 1) and len(large(found, loops=0)) == 1
    assert all(c.times == DEPTH for c in large(found, loops=1))
    assert len(found.collectives) - len(large(found)) <= 2  # scalars: examples and skipped ones


def test_fsdp_gathers_the_kernels_of_one_layer_at_a_time():
    found, abstract = program(mesh=dict(fsdp=8))
    assert {c.kind for c in found.collectives} <= {'all-gather', 'all-reduce', 'reduce-scatter'}
    gathers = [c for c in found.collectives if c.kind == 'all-gather']
    kernels = {k: n for k, n in sizes(abstract).items() if k.endswith('kernel')}
    stacked = {k: n for k, n in kernels.items() if k.startswith('encoder')}
    looped = [c for c in gathers if c.loops]
    assert sorted(c.bytes for c in looped) == sorted([n // DEPTH for n in stacked.values()] * 2)
    assert all(c.times == DEPTH for c in looped)  # once forward, once backward
    rest = [c for c in gathers if not c.loops]
    assert sorted(c.bytes for c in rest) == sorted(kernels[k] for k in kernels.keys() - stacked)
    sums = [c for c in large(found) if c.kind != 'all-gather']
    assert total(sums) == pytest.approx(sum(sizes(abstract).values()), abs=256)


@pytest.mark.slow
def test_fsdp_gathers_kernels_in_int8_as_bytes():
    found, abstract = program(mesh=dict(fsdp=8), quantize='int8')
    kernels = [n for k, n in sizes(abstract).items() if 'encoder' in k and k.endswith('kernel')]
    gathers = [c for c in large(found, loops=1) if c.kind == 'all-gather']
    assert sorted(c.bytes for c in gathers) == sorted([n // DEPTH // 4 for n in kernels] * 2)
    # Beside gradients, maxima by output cross: of qkv and fc1, whose inputs are split.
    exact, _ = program(mesh=dict(fsdp=8))
    sums, wanted = (
        total(c for c in p.collectives if c.loops and c.kind != 'all-gather')
        for p in (found, exact)
    )  # fmt: skip
    assert sums - wanted == DEPTH * 4 * (3 * WIDTH + FIELDS['mlp_dim'])


@pytest.mark.slow
@pytest.mark.parametrize('devices', [2, 4])
def test_tensor_parallel_sums_activations_twice_a_layer_each_way(devices):
    found, _ = program(devices, mesh=dict(tensor=devices))
    assert {c.kind for c in found.collectives} == {'all-reduce'}
    assert len(large(found)) == 4
    for c in large(found):
        assert c.shapes == ((BATCH, TOKENS, WIDTH),) and c.times == DEPTH and c.group == devices


@pytest.mark.parametrize('mesh', [
    pytest.param(dict(data=2, fsdp=4), marks=pytest.mark.slow),
    pytest.param(dict(fsdp=4, tensor=2), marks=pytest.mark.slow),
    pytest.param(dict(data=4, tensor=2), marks=pytest.mark.slow),
    dict(data=2, fsdp=2, tensor=2),
])  # fmt: skip
def test_mixtures_exchange_what_their_parts_do(mesh):
    full = dict(data=1, fsdp=1, tensor=1) | mesh
    if 'data' not in mesh:
        full['data'] = 8 // np.prod(list(mesh.values()))
    found, abstract = program(mesh=mesh)
    examples = BATCH // (full['data'] * full['fsdp'])
    looped = large(found, loops=1)
    activations = [c for c in looped if c.shapes == ((examples, TOKENS, WIDTH),)]
    assert len(activations) == (4 if full['tensor'] > 1 else 0)
    assert all(c.kind == 'all-reduce' and c.group == full['tensor'] for c in activations)
    gathers = [c for c in looped if c.kind == 'all-gather']
    assert all(c.group == full['fsdp'] for c in gathers)
    kernels = sum(n for k, n in sizes(abstract).items() if k.startswith('encoder/')
                  and k.endswith('kernel'))  # fmt: skip
    assert total(gathers) == (2 * kernels // full['tensor'] if full['fsdp'] > 1 else 0)
    gradients = [c for c in looped if c not in gathers + activations]
    assert {c.kind for c in gradients} <= {'all-reduce', 'reduce-scatter'}
    # With three axes the partitioner moves two kernels that no layer has before it gathers them.
    moved = [c for c in found.collectives if c.kind == 'collective-permute']
    assert all(not c.loops and ('embedding' in c.name or 'head' in c.name) for c in moved)
    assert len(moved) <= 4 * (min(full.values()) > 1)
    assert 'all-to-all' not in {c.kind for c in found.collectives}


@pytest.mark.slow
@pytest.mark.parametrize('fields', [
    dict(pool='map'), dict(pool='gap', registers=4, glu=True), dict(remat='full'),
    dict(name='mixer-s/8', tokens_mlp_dim=32, num_heads=None), dict(resnet=(1,), patch_size=2),
], ids=lambda fields: str(next(iter(fields.items()))))  # fmt: skip
def test_no_kind_of_model_sends_activations_under_fsdp(fields):
    found, abstract = program(mesh=dict(fsdp=8), **fields)
    parameters = {tuple(x.shape) for x in jax.tree.leaves(abstract.params)}
    parameters |= {shape[1:] for shape in parameters}
    # As matrices: qkv's [D, 3 H C] and out's [H C, D].
    parameters |= {(n, np.prod(s) // n) for s in parameters if s for n in (s[0], np.prod(s[:-1]))}
    for c in large(found):
        assert c.kind in ('all-gather', 'all-reduce', 'reduce-scatter'), c
        assert c.kind != 'all-gather' or c.shapes[0] in parameters, c


@pytest.mark.parametrize('accumulate', [2])
def test_micro_batches_stay_on_their_devices(accumulate):
    found, _ = program(accumulate=accumulate)
    assert {c.kind for c in found.collectives} == {'all-reduce'}


def test_state_of_fsdp_is_divided_by_its_degree():
    held = {}
    for fsdp in (1, 2, 8):
        model = models.build('vit-ti/8', **FIELDS)
        tx = optim.make(step.abstract_params(classifier(model, IMAGE)), 100)
        mesh = sharding.make_mesh(fsdp=fsdp)
        state = step.abstract_state(classifier(model, IMAGE), tx, mesh)
        held[fsdp] = sum(
            np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(state)
        )
    small = sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if 'fsdp' not in x.sharding.spec
    )
    for fsdp in (2, 8):  # all but biases, norms and positions
        assert held[fsdp] - small == pytest.approx((held[1] - small) / fsdp, rel=1e-6)
    assert small < held[1] / 20


@pytest.mark.parametrize('mesh, words', [
    (dict(tensor=8), r'dimension 4 is not divisible by mesh axis tensor=8, but by 1, 2, 4'),
    (dict(fsdp=3), 'mesh data=-1 fsdp=3 tensor=1 does not cover 8 devices; the product must be'),
])
def test_what_does_not_divide_says_what_would(mesh, words):
    with pytest.raises(UserError, match=words):
        program(mesh=mesh)


def test_a_dimension_may_be_split_over_two_axes():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    rules = (parameters.Rule('queue', sharding.P(('fsdp', 'tensor'), None)),)
    assert sharding.spec('queue', (16, 3), mesh, rules) == rules[0].spec
    with pytest.raises(UserError, match='12 is not divisible by mesh axis fsdp x tensor=8'):
        sharding.spec('queue', (12, 3), mesh, rules)
