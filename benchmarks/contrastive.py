"""Memory of losses of all pairs, by the TPU's compiler: python -m benchmarks.contrastive.

    python -m benchmarks.contrastive --topology v4:8x8x16 --batch 32768 --width 768

Compiles loss and gradients of embeddings [B, D], split over all chips, ahead of time: `chunked`, by
objectives/pairs.py, and `plain`, of logits [B, B] that XLA shards as it likes. Prints a JSON line
for each topology, batch, loss and way, per chip:

    temp_mb    temporaries
    logits_mb  float32 [B / n, B / n], n chips, which a device must have of `chunked`
    sent_mb    bytes that a chip sends to others; `hidden_mb` of them beside other work
    gflop      FLOPs

Needs libtpu (extra `plan`) but no TPU.
"""

import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import NamedSharding

from vit_jax import sharding
from vit_jax.distributed import topologies
from vit_jax.objectives import pairs
from vit_jax.plan import hlo

TOPOLOGY = flags.DEFINE_list('topology', 'v4:8x8x16', 'v4:2x2x1, v5e:2x2, ..., or cpu:8.')
BATCH = flags.DEFINE_list('batch', '32768', 'Pairs of all chips.')
WIDTH = flags.DEFINE_integer('width', 768, 'Size of an embedding.')
KINDS = flags.DEFINE_list('kind', list(pairs.KINDS), 'Losses.')
WAYS = flags.DEFINE_list('way', ['chunked', 'plain'], 'Ways to compute them.')


def plain(p, kind):
    """(loss, accuracy) from all logits at once."""
    logits = jnp.matmul(p.image, p.text.T, precision='highest') * p.scale + p.bias
    true = jnp.eye(len(logits), dtype=bool)
    if kind == 'sigmoid':
        value = jnp.sum(jax.nn.softplus(jnp.where(true, -logits, logits)))
    else:
        both = (jax.nn.logsumexp(logits, axis=i) for i in (0, 1))
        value = jnp.sum(sum(both) / 2) - jnp.sum(jnp.where(true, logits, 0))
    right = jnp.mean(jnp.argmax(logits, axis=1) == jnp.arange(len(logits)))
    return value / len(logits), right


def measure(mesh, batch, kind, way):
    """{name: figure} of one program."""
    rows, whole = (NamedSharding(mesh, spec) for spec in (sharding.BATCH, sharding.P()))
    shapes = [(batch, WIDTH.value)] * 2 + [()] * 2 + [(batch,)]
    places = [rows, rows, whole, whole, rows]
    p = pairs.Pairs(*(
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
        for shape, place in zip(shapes, places, strict=True)
    ))  # fmt: skip
    function = partial({'chunked': pairs.loss, 'plain': plain}[way], kind=kind)
    grad = sharding.with_mesh(mesh, jax.value_and_grad(function, has_aux=True))
    results = (whole, whole), pairs.Pairs(*places)
    compiled = jax.jit(grad, out_shardings=results).lower(p).compile()
    program = hlo.read(compiled.as_text())
    return dict(
        temp_mb=compiled.memory_analysis().temp_size_in_bytes / 1e6,
        logits_mb=4 * (batch / mesh.size) ** 2 / 1e6,
        sent_mb=sum(c.wire * c.times for c in program.collectives) / 1e6,
        hidden_mb=sum(c.wire * c.times for c in program.collectives if c.hidden) / 1e6,
        gflop=program.flops / 1e9,
    )


def main(_):
    for topology in TOPOLOGY.value:
        found, name = topologies.get_devices(topology)
        mesh = sharding.make_mesh(found)
        for batch, kind, way in itertools.product(BATCH.value, KINDS.value, WAYS.value):
            row = dict(topology=name, batch=int(batch), loss=kind, way=way)
            figures = measure(mesh, int(batch), kind, way)
            print(json.dumps(row | {k: float(f'{x:.3g}') for k, x in figures.items()}), flush=True)


if __name__ == '__main__':
    app.run(main)
