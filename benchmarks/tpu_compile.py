"""Compiles the train step for TPUs and counts its work: python -m benchmarks.tpu_compile.

    python -m benchmarks.tpu_compile --model vit-b/16 --topology v4:2x2x1 --batch_per_chip 64

Compiles the step ahead of time, with AdamW (first moment in bfloat16), clipping and weight decay,
data parallel, in bfloat16, with unrolled blocks, which XLA counts in full. Prints a JSON line of
figures per chip:

    gflop        FLOPs as `vit_jax.plan` counts them, those that kernels state included
    gb           bytes accessed: XLA's count, and all operands and results of kernels, for which XLA
                 counts nothing. `kernels_gb` is the part of kernels, `prefetch_gb` that of copies
                 to and from on-chip memory, where XLA counts the whole array for each slice
    moved_gb     the same, with each slice counted as what moves
    traffic_gb   bytes to and from main memory, as `vit_jax.plan` counts them
    temp_gb      temporaries
    compute_ms, memory_ms   at the peaks of the chip
    compiler_ms  the compiler's own estimate, in which kernels count nothing
    compile_seconds, compile_cpu_seconds   of tracing and compiling, by the clock and of all threads

Needs libtpu (extra `plan`) but no TPU. --set FIELD=VALUE changes a field of the model. --peer also
compiles a plain linen encoder (peers.py) with the same optimizer; `of_peer` is the ratio of the
bytes that the two access. --inference compiles the forward pass alone. --option NAME=VALUE sets an
option of the compiler, --keep FILE writes the program's text.
"""

import json
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import peers
from vit_jax import models, optim, sharding, step
from vit_jax.distributed import devices, topologies
from vit_jax.plan import hlo, hlo_traffic

MODEL = flags.DEFINE_list('model', 'vit-b/16', 'Models by name.')
TOPOLOGY = flags.DEFINE_list('topology', 'v4:2x2x1', 'v4:2x2x1, v5e:2x2, v6e:2x2, ...')
BATCH = flags.DEFINE_integer('batch_per_chip', 64, 'Images per chip.')
IMAGE = flags.DEFINE_integer('image_size', 224, 'Pixels of a side.')
CLASSES = flags.DEFINE_integer('classes', 1000, 'Classes.')
PEER = flags.DEFINE_bool('peer', False, 'Compile a plain linen encoder, too.')
SET = flags.DEFINE_multi_string('set', [], 'FIELD=VALUE of the model, JSON or a word.')
INFERENCE = flags.DEFINE_bool('inference', False, 'Compile the forward pass instead of the step.')
OPTION = flags.DEFINE_multi_string('option', [], 'NAME=VALUE for the compiler.')
KEEP = flags.DEFINE_string('keep', None, "Write the compiled program's text to this file.")


def value(text):
    """The text as JSON, or unchanged if it is not."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def pairs(texts):
    """{name: value} of texts NAME=VALUE."""
    return {k: value(v) for k, _, v in (text.partition('=') for text in texts)}


def lowered(model, peer, mesh):
    """Lowers the step, or the forward pass, of the images of all chips."""
    shape, size = (IMAGE.value, IMAGE.value, 3), BATCH.value * mesh.size
    objective = peers.classifier(model, shape)
    tx = optim.make(
        step.abstract_params(objective), 10_000, lr=1e-3, warmup=1000, weight_decay=0.1,
        clip=1.0, momentum_dtype='bfloat16',
    )  # fmt: skip
    state_of = peers.replicated if peer else step.abstract_state
    abstract = state_of(objective, tx, mesh)
    batch = {
        'image': jax.ShapeDtypeStruct((size, *shape), jnp.uint8),
        'label': jax.ShapeDtypeStruct((size,), jnp.int32),
        'mask': jax.ShapeDtypeStruct((size,), jnp.float32),
    }
    if not INFERENCE.value:
        advance = step.compiled(objective, tx, abstract, mesh)
        return advance.lower(abstract, batch, {})
    placed = jax.NamedSharding(mesh, sharding.BATCH)
    images = jax.ShapeDtypeStruct((size, *shape), jnp.uint8, sharding=placed)
    forward = sharding.with_mesh(
        mesh, lambda params, images: model.apply({'params': params}, model.normalise(images))[0]
    )
    return jax.jit(forward, out_shardings=placed).lower(abstract.params, images)


def measure(name, topology, fields, peer=False):
    """The figures of one model, or of its peer, on one topology."""
    target_devices, _ = topologies.get_devices(topology)
    model = models.build(name, **{'num_classes': CLASSES.value, 'dtype': 'bfloat16', **fields})
    model = model.clone(unroll=fields.get('unroll', model.depth))
    if peer:
        model = peers.PlainVit(model)
    began, cpu_began = time.perf_counter(), time.process_time()
    program = lowered(model, peer, sharding.make_mesh(target_devices))
    executable = program.compile(compiler_options=pairs(OPTION.value))
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    text = executable.as_text()
    if KEEP.value:
        with open(KEEP.value, 'w') as file:
            file.write(text)
    cost, memory, peaks = (
        executable.cost_analysis(), executable.memory_analysis(), devices.peaks(target_devices)
    )  # fmt: skip
    program = hlo.read(text)
    kernels = hlo_traffic.kernel_bytes(text)
    prefetched, moved = hlo_traffic.prefetch_bytes(text)
    accessed = cost['bytes accessed'] + kernels
    return dict(
        model=f'{name} by flax_mha' if peer else name, topology=topology,
        batch_per_chip=BATCH.value, image_size=IMAGE.value,
        what='forward' if INFERENCE.value else 'train', **({} if peer else fields),
        **pairs(OPTION.value),
        gflop=round(program.flops / 1e9), gb=round(accessed / 1e9, 2),
        kernels_gb=round(kernels / 1e9, 2),
        prefetch_gb=round(prefetched / 1e9, 2),
        moved_gb=round((accessed - prefetched + moved) / 1e9, 2),
        traffic_gb=round(program.traffic / 1e9, 2),
        temp_gb=round(memory.temp_size_in_bytes / 1e9, 3),
        compute_ms=round(1e3 * program.flops / peaks.flops, 1),
        memory_ms=round(1e3 * accessed / peaks.bandwidth, 1),
        compiler_ms=program.cycles and peaks.clock and round(1e3 * program.cycles / peaks.clock, 1),
        xla_gflop=round(cost['flops'] / 1e9), uncounted=program.uncounted,
        compile_seconds=round(seconds), compile_cpu_seconds=round(cpu_seconds),
    )  # fmt: skip


def main(argv):
    if argv[1:]:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    jax.config.update('jax_platforms', 'cpu')
    fields = pairs(SET.value)
    for topology in TOPOLOGY.value:
        for name in MODEL.value:
            figures = measure(name, topology, fields)
            if PEER.value:
                plain = measure(name, topology, fields, peer=True)
                print(json.dumps(plain))
                figures['of_peer'] = round(figures['gb'] / plain['gb'], 2)
            print(json.dumps(figures), flush=True)


if __name__ == '__main__':
    app.run(main)
