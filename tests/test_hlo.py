"""Reading a compiled program: FLOPs, loops and collectives against what the model must do."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learners import classifier

from vit_jax import models, optim, sharding, step
from vit_jax.distributed import topologies
from vit_jax.models import parameters
from vit_jax.plan import hlo, hlo_collectives, hlo_text, hlo_traffic

IMAGE = (32, 32, 3)
FIELDS = dict(patch_size=8, width=32, depth=6, num_heads=4, mlp_dim=64, unroll=1)
BATCH = 16


def compiled(model, chips=1, mesh=None, batch=BATCH, accumulate=1, topology='cpu:8'):
    """The train step of a model on some chips, compiled, and its abstract state."""
    mesh = sharding.make_mesh(topologies.get_devices(topology)[0][:chips], **(mesh or {}))
    tx = optim.make(step.abstract_params(classifier(model, IMAGE)), steps=10)
    abstract = step.abstract_state(classifier(model, IMAGE), tx, mesh)
    advance = step.compiled(
        classifier(model, IMAGE), tx, abstract, mesh, accumulate=accumulate
    )
    arrays = {
        'image': jax.ShapeDtypeStruct((batch, *IMAGE), jnp.uint8),
        'label': jax.ShapeDtypeStruct((batch,), jnp.int32),
        'mask': jax.ShapeDtypeStruct((batch,), jnp.float32),
    }
    return advance.lower(abstract, arrays, {}).compile(), abstract


def program(*args, **kwargs):
    """The Program of `compiled`, and its abstract state."""
    advance, abstract = compiled(*args, **kwargs)
    return hlo.read(advance.as_text()), abstract


def unread_flops(model):
    """Forward FLOPs of the last MLP of the patches, which a class token alone does not read."""
    h, w = model.grid(IMAGE)
    return 4 * h * w * model.width * model.mlp_dim


def training_flops(model):
    """Forward and twice that backward, without the gradient of the images, which nothing needs."""
    h, w = model.grid(IMAGE)
    embedding = 2 * h * w * np.prod(model.patch_size) * 3 * model.width
    unread = unread_flops(model) if model.pool == 'cls' and model.unroll == model.depth else 0
    return 3 * (model.flops(IMAGE) - unread) - embedding


@pytest.mark.parametrize('fields', [
    dict(), dict(unroll=6), dict(unroll=6, pool='cls_gap'),
    pytest.param(dict(unroll=3), marks=pytest.mark.slow),
    pytest.param(dict(pool='map', glu=True), marks=pytest.mark.slow),
])
def test_flops_are_those_of_the_model_scanned_or_unrolled_but_for_unread_tokens(fields):
    model = models.build('vit-ti/16', num_classes=8, **FIELDS | fields)
    found, _ = program(model)
    assert found.flops == pytest.approx(BATCH * training_flops(model), rel=0.02)
    assert not found.uncounted


@pytest.mark.slow
def test_flops_of_other_models():
    mixer = models.build(
        'mixer-s/16', num_classes=8, patch_size=8, width=32, depth=4, tokens_mlp_dim=16, mlp_dim=64
    )
    found, _ = program(mixer)
    assert found.flops == pytest.approx(BATCH * training_flops(mixer), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize('topology, unroll', [('cpu:8', 1), ('v5e:2x2', 1), ('v5e:2x2', 6)])
def test_remat_costs_another_forward_pass_of_the_blocks(topology, unroll):
    if topology != 'cpu:8':
        pytest.importorskip('libtpu')
    model = models.build('vit-ti/16', num_classes=8, **FIELDS | dict(unroll=unroll))
    plain, again = (
        program(model.clone(remat=r), topology=topology)[0].flops for r in ('none', 'full')
    )
    one = BATCH * (model.flops(IMAGE) - model.clone(depth=0).flops(IMAGE))
    if unroll == 6:
        plain += 3 * BATCH * unread_flops(model)  # recomputed blocks compute it
    assert again - plain == pytest.approx(one, rel=0.25)  # the last product needs not be made again
    assert again > plain


@pytest.mark.slow
def test_each_tpu_draws_once_for_the_dropout_of_its_examples():
    pytest.importorskip('libtpu')
    chips, size = 4, (BATCH, 2**6, 2**10)
    # All tokens are read: else the last MLP is computed for some alone, but with dropout for all.
    base = models.build('vit-ti/16', num_classes=8, **FIELDS | dict(unroll=6, pool='gap'))
    operations = {
        rate: compiled(base.clone(dropout=rate), chips, topology='v5e:2x2')[0].cost_analysis()
        for rate in (0.0, 0.1)
    }
    place = jax.sharding.SingleDeviceSharding(topologies.get_devices('v5e:2x2')[0][0])
    key = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=place)
    draw = jax.jit(lambda k: jax.random.bits(jax.random.wrap_key_data(k), size, jnp.uint32))
    word = draw.lower(key).compile().cost_analysis()['flops'] / np.prod(size)

    h, w = base.grid(IMAGE)
    tokens = -(-(h * w) // 2)  # that words are drawn for, each of which decides for two
    words = tokens * (base.width + base.depth * (2 * base.width + base.mlp_dim)) * BATCH / chips
    assert 0.5 < (operations[0.1]['flops'] - operations[0.0]['flops']) / (word * words) < 1.5


def test_loops_run_as_often_as_the_encoder_is_deep():
    model = models.build('vit-ti/16', num_classes=8, **FIELDS)
    found, _ = program(model, accumulate=2)
    assert sorted(found.loops.values()) == [2, 6, 6]
    whole, _ = program(model)
    assert found.flops == pytest.approx(whole.flops, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize('topology, remat, mesh, loops', [
    ('v5e:2x2', 'none', dict(data=4), []), ('v5e:2x2', 'full', dict(data=4), [6, 6]),
    ('v5e:2x2', 'none', dict(fsdp=4), [6, 6]), ('cpu:8', 'none', dict(data=4), [6, 6]),
])
def test_accelerators_unroll_blocks_by_default_unless_scanned_ones_save_memory(
    topology, remat, mesh, loops
):
    if topology != 'cpu:8':
        pytest.importorskip('libtpu')
    model = models.build('vit-ti/16', num_classes=8, **FIELDS | dict(unroll=None, remat=remat))
    found, _ = program(model, chips=4, mesh=mesh, topology=topology)
    assert sorted(found.loops.values()) == loops


def forward(model, image, batch):
    """The text of a forward pass on one chip of v5e, compiled."""
    pytest.importorskip('libtpu')
    mesh = sharding.make_mesh(topologies.get_devices('v5e:2x2')[0][:1])
    tx = optim.make(step.abstract_params(classifier(model, image)), steps=10)
    params = step.abstract_state(classifier(model, image), tx, mesh).params
    split = jax.NamedSharding(mesh, sharding.BATCH)
    images = jax.ShapeDtypeStruct((batch, *image), jnp.uint8, sharding=split)

    def logits(params, images):
        return model.apply({'params': params}, model.normalise(images))[0]

    run = sharding.with_mesh(mesh, logits)
    return jax.jit(run).lower(params, images).compile().as_text()


@pytest.mark.slow
def test_a_forward_pass_on_an_accelerator_has_no_loop_whatever_training_recomputes():
    model = models.build('vit-ti/16', num_classes=8, **FIELDS | dict(unroll=None, remat='full'))
    assert not hlo.read(forward(model, IMAGE, BATCH)).loops
    assert [*hlo.read(forward(model.clone(unroll=1), IMAGE, BATCH)).loops.values()] == [6]


@pytest.mark.slow
@pytest.mark.parametrize('width, together', [(384, True), (768, False)])
def test_tpus_fuse_the_products_of_an_mlp_where_it_is_narrow(width, together):
    fields = dict(width=width, mlp_dim=4 * width, depth=1, dtype='bfloat16')
    model = models.build('vit-ti/16', num_classes=8, **FIELDS | fields)
    text = forward(model, (112, 112, 3), 64)
    bodies = {body.split(' ')[0]: body for body in re.split(r'\n(?=%|ENTRY)', text)}
    multiply = {name for name, body in bodies.items() if ' convolution(' in body}
    assert len(multiply) >= 4
    calls = [re.findall(r' fusion\(.* calls=(%[\w.-]+)', bodies[name]) for name in multiply]
    assert together == any(multiply & set(called) for called in calls)


@pytest.mark.slow
def test_tpus_cast_the_weights_of_an_mlp_before_their_products():
    width = 768
    fields = dict(width=width, mlp_dim=4 * width, depth=2, dtype='bfloat16', unroll=2)
    model = models.build('vit-b/16', num_classes=8, **fields)
    computations, entry = hlo_text.parsed(forward(model, (224, 224, 3), 64))

    def multiplies(name):
        return any(
            i.opcode == 'convolution' or i.opcode == 'fusion' and multiplies(i.attribute('calls'))
            for i in computations[name].values()
        )

    entry = computations[entry]
    products = [
        i for i in entry.values() if i.opcode == 'fusion' and multiplies(i.attribute('calls'))
    ]  # fmt: skip
    operands = [shape for i in products for name in i.operands for shape in entry[name].shapes]
    weights = [s for s in operands if sorted(s.dims[-2:]) == [width, 4 * width]]
    assert len(weights) == 4
    assert all(s.dtype == 'bf16' and len(s.dims) == 2 for s in weights)  # no stack of blocks


def test_data_parallel_sums_each_gradient_once():
    model = models.build('vit-ti/16', num_classes=8, **FIELDS)
    found, abstract = program(model, chips=8)
    size = sum(x.size * 4 for x in jax.tree.leaves(abstract.params))
    assert {c.kind for c in found.collectives} == {'all-reduce'}
    assert sum(c.bytes * c.times for c in found.collectives) == pytest.approx(size, rel=0.02)
    assert {c.group for c in found.collectives} == {8}
    assert all(c.wire == pytest.approx(c.bytes * 2 * 7 / 8) for c in found.collectives)


@pytest.mark.slow
def test_weights_are_gathered_by_layer_with_fsdp():
    model = models.build('vit-ti/16', num_classes=8, **FIELDS)
    found, abstract = program(model, chips=8, mesh=dict(fsdp=8))
    kernels = {
        name: x.size * 4
        for name, x in parameters.named_leaves(abstract.params).items()
        if 'encoder' in name and 'kernel' in name
    }
    gathers = [c for c in found.collectives if c.kind == 'all-gather' and c.loops]
    assert gathers and {c.times for c in gathers} == {FIELDS['depth']}
    gathered = sum(c.bytes * c.times for c in gathers)
    assert gathered >= sum(kernels.values()) * 0.99  # in each of the passes that read them
    assert max(c.bytes for c in gathers) <= max(kernels.values()) / FIELDS['depth']


def test_traffic_of_a_loop_is_of_the_slices_that_it_reads():
    stack, x = jnp.ones((64, 128, 128)), jnp.ones((8, 128))

    def body(x, w):
        return jnp.tanh(x @ w), None

    scanned = jax.jit(lambda x, stack: jax.lax.scan(body, x, stack)[0])
    found = hlo.read(scanned.lower(x, stack).compile().as_text())
    assert found.flops == 64 * 2 * 8 * 128 * 128
    assert stack.nbytes <= found.traffic < 4 * stack.nbytes  # the whole in each turn were 64 times


def reference_convolution(x, w, stride, padding, lhs, rhs):
    """FLOPs of the products that a convolution really makes, by counting them one by one."""
    ones = partial(np.ones, dtype=np.float32)
    out = jax.lax.conv_general_dilated(
        ones(x), ones(w), stride, padding, lhs, rhs, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    return 2 * int(np.asarray(out, np.float64).sum())


@pytest.mark.parametrize('x, w, stride, padding, lhs, rhs', [
    ((2, 8, 8, 3), (3, 3, 3, 4), (1, 1), [(1, 1), (1, 1)], (1, 1), (1, 1)),
    ((2, 9, 6, 3), (3, 2, 3, 4), (2, 1), [(0, 2), (1, 0)], (1, 1), (1, 1)),
    ((1, 4, 5, 2), (3, 3, 2, 3), (1, 1), [(2, 2), (2, 2)], (2, 3), (1, 1)),
    ((1, 7, 7, 2), (2, 2, 2, 3), (1, 2), [(1, 0), (0, 1)], (1, 1), (3, 2)),
])
def test_convolutions_count_no_product_with_padding(x, w, stride, padding, lhs, rhs):
    def convolve(a, b):
        return jax.lax.conv_general_dilated(
            a, b, stride, padding, lhs, rhs, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )

    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (x, w))
    found = hlo.read(jax.jit(convolve).lower(*shapes).compile().as_text())
    assert found.flops == reference_convolution(x, w, stride, padding, lhs, rhs)


@pytest.mark.parametrize('text, expected', [
    ('replica_groups={{0,2},{1,3}}', (0, 2)),
    ('replica_groups=[2,4]<=[8]', (0, 1, 2, 3)),
    ('replica_groups=[4,2]<=[2,4]T(1,0)', (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", (0, 1)),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", (0, 1, 2, 3, 4, 5, 6, 7)),
    ('replica_groups={}', (0, 1, 2, 3, 4, 5, 6, 7)),
    ('source_target_pairs={{0,3},{3,0}}', (0, 3)),
])
def test_groups_of_devices_in_each_notation(text, expected):
    assert hlo_collectives.groups(f', channel_id=1, {text}, use_global_device_ids=true', 8) == (
        len(expected), expected
    )


def test_shapes_in_tiles_and_in_memory_on_the_chip():
    far, near = hlo_text.shapes_of(
        '(bf16[32,257,1280]{2,1,0:T(8,128)(2,1)}, f32[4,17]{0,1:T(8,128)S(1)})'
    )
    assert (far.bytes, far.footprint) == (32 * 257 * 1280 * 2, 32 * 264 * 1280 * 2)
    assert (near.bytes, near.footprint, near.padded) == (4 * 17 * 4, 0, (128, 24))


def test_an_unknown_custom_call_is_named():
    text = '\n'.join([
        'HloModule m, num_partitions=1', '', 'ENTRY %main (a: f32[8]) -> f32[8] {',
        '  %a = f32[8]{0} parameter(0)',
        '  ROOT %c = f32[8]{0} custom-call(%a), custom_call_target="mine", backend_config=""', '}',
    ])  # fmt: skip
    found = hlo.read(text)
    assert found.uncounted == {'mine': 1} and found.traffic == 64
    stated = text.replace(
        'backend_config=""',
        'backend_config={"custom_call_config": {"cost_estimate": {"flops": 77}}}',
    )
    assert hlo.read(stated).flops == 77 and not hlo.read(stated).uncounted


def test_a_transfer_between_slices_is_counted_with_the_work_that_it_overlaps():
    megascale = (
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_host_transfer_rendezvous="all-reduce.60_0",_xla_megascale_reduce_operation="SUM",'
        '_xla_megascale_target="{1:4}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    work = 'backend_config={"window_config":{"estimated_cycles":"700"}}'
    text = f'''
ENTRY %main (p: bf16[64,128]) -> bf16[64,128] {{
  %p = bf16[64,128]{{1,0}} parameter(0)
  %first = bf16[64,128]{{1,0}} copy(%p), {work}
  %t = token[] after-all()
  %send = (bf16[64,128]{{1,0}}, u32[]{{:S(2)}}, token[]) send(%first, %t), channel_id=6, {megascale}
  %second = bf16[64,128]{{1,0}} copy(%p), {work}
  %recv = (bf16[64,128]{{1,0}}, u32[]{{:S(2)}}, token[]) recv(%t), channel_id=5, {megascale}
  %sent = token[] send-done(%send), channel_id=6, is_host_transfer=true
  %done = (bf16[64,128]{{1,0}}, token[]) recv-done(%recv), channel_id=5, is_host_transfer=true
  ROOT %result = bf16[64,128]{{1,0}} get-tuple-element(%done), index=0
}}
'''
    program = hlo.read(text)
    (found,) = program.collectives
    assert (found.kind, found.group, found.network, found.hidden) == ('all-reduce', 4, True, True)
    assert (found.bytes, found.span, program.cycles) == (2 * 64 * 128, (700, 1400), 1400)


def test_a_slice_that_is_prefetched_moves_less_than_xla_counts():
    text = """
ENTRY %main (p: f32[4,8,128]) -> f32[1,8,128] {
  %p = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)
  %q = f32[8,128]{1,0:T(8,128)} parameter(1)
  %a = (f32[4,8,128]{2,1,0:T(8,128)}, f32[1,8,128]{2,1,0:T(8,128)S(1)}, s32[]) slice-start(%p)
  %b = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]) copy-start(%q)
  ROOT %c = f32[1,8,128]{2,1,0:T(8,128)S(1)} slice-done(%a)
}
"""
    piece = 4 * 8 * 128
    assert hlo_traffic.prefetch_bytes(text) == ((4 + 1 + 2) * piece, (2 + 2) * piece)
