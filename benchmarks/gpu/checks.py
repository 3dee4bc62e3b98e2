"""Checks on a GPU what the tests check on CPUs.

    python -m benchmarks.gpu.checks --out checks.json

Attention by cuDNN, XLA and chunks against NumPy in float64; models and their gradients, steps of
training methods and random numbers against the same on this machine's CPU; checkpoints of other
libraries against the logits that those computed (tests/data). float32 is computed with TF32 off;
`precision` has what it costs to leave it on. A case has `ok`, and what the error was relative to.
"""

import concurrent.futures
import functools
import itertools
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.gpu import programs
from benchmarks.gpu import report as reports
from vit_jax import models, optim, sharding, step
from vit_jax.models import attention, attention_chunked
from vit_jax.objectives import Examples, dino, mae, masked_patch, supervised

ROOT = pathlib.Path(__file__).parents[2]
TINY = dict(width=64, depth=3, num_heads=2, mlp_dim=96, patch_size=8)
IMAGE = (40, 32, 3)
HIGHEST = functools.partial(jax.default_matmul_precision, 'highest')


def error(found, wanted):
    """The largest difference of two trees relative to the largest number of the second."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
    found, wanted = ([np.asarray(x, np.float64) for x in side] for side in zip(*pairs, strict=True))
    scale = max(np.abs(x).max() for x in wanted)
    worst = max(np.abs(a - b).max() for a, b in zip(found, wanted, strict=True))
    return float(worst / scale) if np.isfinite(worst) else float('inf')


def on(device, function, *arguments):
    """Results of a jitted function on a device, as NumPy arrays."""
    with jax.default_device(device):
        return jax.device_get(jax.jit(function)(*jax.device_put(arguments, device)))


def both(function, *arguments):
    """(results on the first device, results on this machine's CPU)."""
    return tuple(on(device, function, *arguments) for device in (gpu(), cpu()))


def gpu():
    return jax.devices()[0]


def cpu():
    return jax.devices('cpu')[0]


# Attention.


def by_xla(q, k, v):
    logits = jnp.einsum('bqhc,bkhc->bhqk', q * q.shape[-1] ** -0.5, k)
    probabilities = jax.nn.softmax(logits.astype(jnp.float32)).astype(q.dtype)
    return jnp.einsum('bhqk,bkhc->bqhc', probabilities, v)


def by_chunks(q, k, v):
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return attention_chunked.attend(q, k, v, None, 0.0, None).swapaxes(1, 2)


WAYS = {'cudnn': attention.cudnn, 'chunked': by_chunks, 'xla': by_xla}


def attends(way, dtype, tokens, channels):
    """Output and gradients of attention against NumPy."""
    from attended import exact  # of tests

    rng = np.random.default_rng(0)
    qkv = jnp.asarray(2 * rng.standard_normal((2, tokens, 3, 4, channels)), dtype)
    weights = jnp.asarray(rng.standard_normal((2, tokens, 4, channels)), dtype)

    def both_passes(qkv, weights):
        out, backward = jax.vjp(lambda x: WAYS[way](*(x[:, :, i] for i in range(3))), qkv)
        return out, backward(weights)[0]

    with HIGHEST():
        out, d_qkv = on(gpu(), both_passes, qkv, weights)
    wanted, d_wanted, _ = exact(np.float64(qkv), np.float64(weights))
    worst = max(error(out, wanted), error(d_qkv, d_wanted))
    return worst, {'bfloat16': 2e-2, 'float16': 4e-3, 'float32': 1e-5}[dtype]


def attention_cases():
    shapes = (197, 64), (196, 64), (50, 80), (5, 8)
    for (tokens, channels), dtype in itertools.product(shapes, ('bfloat16', 'float16', 'float32')):
        for way in WAYS:
            if way != 'cudnn' or dtype != 'float32':
                name = f'attention {way} {dtype} {tokens} tokens, {channels} channels'
                yield name, functools.partial(attends, way, dtype, tokens, channels)


# Models.


def images(count=4):
    return jnp.asarray(np.random.default_rng(0).normal(size=(count, *IMAGE)), jnp.float32)


def randomised(model):
    """Parameters without zeros."""
    params = on(cpu(), model.init, jax.random.key(0), images(1))['params']
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), params)


def passes(model, **options):
    """(params, images, key) -> logits and the gradient of their squares by the parameters."""

    def function(params, images, key):
        def loss(params):
            logits, _ = model.apply({'params': params}, images, rngs={'dropout': key}, **options)
            return jnp.sum(logits.astype(jnp.float32) ** 2), logits

        slopes, logits = jax.grad(loss, has_aux=True)(params)
        return logits, slopes

    return function


def models_agree(tolerance, wanted, found, **options):
    """Models of these fields, the first on the CPU in float32, with the same parameters."""
    reference = models.build('vit-ti/16', num_classes=7, **TINY | wanted)
    other = models.build('vit-ti/16', num_classes=7, **TINY | wanted | found)
    arguments = randomised(reference), images(), jax.random.key(2)
    with HIGHEST():
        a = on(gpu(), passes(other, **options), *arguments)
        b = on(cpu(), passes(reference, **options), *arguments)
    return max(error(a[0], b[0]), error(a[1], b[1])), tolerance


def model_cases():
    """Float32 is compared to 1e-4, bfloat16 to what its rounding allows."""
    for unroll in (1, 3):
        yield f'model float32, unroll {unroll}', functools.partial(
            models_agree, 1e-4, {}, dict(attention='xla', unroll=unroll)
        )
        for way in ('cudnn', 'xla', 'auto'):
            yield f'model bfloat16 {way}, unroll {unroll}', functools.partial(
                models_agree, 6e-2, {}, dict(attention=way, unroll=unroll, dtype='bfloat16')
            )
    yield 'model with dropout and drop path, whose draws are those of a CPU', functools.partial(
        models_agree, 1e-4, dict(dropout=0.3, drop_path=0.2), {}, train=True
    )
    yield 'model of many tokens by chunks', functools.partial(
        models_agree, 1e-4, dict(patch_size=4, registers=2), dict(attention='chunked')
    )
    yield 'model with rotary positions and query norms', functools.partial(
        models_agree, 1e-4, dict(style=dict(norms=['query_key'], rope={})), {}
    )


# Steps.


def methods():
    """{name: (objective, batch)}."""
    model = models.build('vit-ti/16', num_classes=7, dropout=0.1, drop_path=0.1, **TINY)
    rng = np.random.default_rng(3)
    shown = rng.integers(0, 256, (8, *IMAGE), np.uint8)
    mask = np.float32([1] * 7 + [0])
    pictures = Examples({'image': jax.ShapeDtypeStruct(IMAGE, np.uint8)}, steps=100)
    crops = Examples({
        'global': jax.ShapeDtypeStruct((2, 32, 32, 3), np.uint8),
        'local': jax.ShapeDtypeStruct((2, 16, 16, 3), np.uint8),
    }, steps=100)  # fmt: skip
    labelled = dict(image=shown, label=np.arange(8, dtype=np.int32) % 7, mask=mask)
    return {
        'supervised': (supervised.supervised(model, pictures, mixup=0.8, cutmix=1.0), labelled),
        'mae': (
            mae.mae(model, pictures, decoder_width=32, decoder_depth=1, decoder_heads=2),
            dict(image=shown, mask=mask),
        ),
        'masked_patch': (masked_patch.masked_patch(model, pictures), dict(image=shown, mask=mask)),
        'dino': (
            dino.dino(model, crops, prototypes=64, hidden=32, bottleneck=16),
            {k: rng.integers(0, 256, (8, *x.shape), np.uint8) for k, x in crops.spec.items()}
            | {'mask': mask},
        ),
    }  # fmt: skip


def trained(method, device, *, steps=3, accumulate=1, **fields):
    """(metrics of each step, final state) of a method on one device, as NumPy arrays."""
    objective, batch = methods()[method]
    mesh = sharding.make_mesh([device])
    fields = {'lr': 1e-3, 'weight_decay': 0.1, 'clip': 1.0} | fields
    tx = optim.make(step.abstract_params(objective), 100, **fields)
    abstract = step.abstract_state(objective, tx, mesh)
    there = step.abstract_state(objective, tx, sharding.make_mesh([cpu()]))
    start = step.init(objective, tx, 0, there)
    state = step.on_devices(jax.device_get(start), sharding.shardings_of(abstract))
    advance = step.compiled(objective, tx, abstract, mesh, accumulate=accumulate)
    seen = []
    for _ in range(steps):
        state, metrics = advance(state, sharding.put(batch, mesh), {})
        seen.append(jax.device_get(metrics))
    return seen, jax.device_get(state)


def steps_agree(name):
    """Losses of three steps with the CPU's; SGD, as Adam would make steps of rounding errors."""
    with HIGHEST():
        (found, _), (wanted, _) = (
            trained(name, device, name='sgd', lr=0.01)
            for device in (gpu(), cpu())
        )
    losses = ([m['loss'] for m in side] for side in (found, wanted))
    return error(*losses), 1e-3


def steps_repeat(name):
    """Bits of parameters of two runs of one program. XLA may add in another order each time."""
    first, second = (trained(name, gpu())[1].params for _ in range(2))
    return error(first, second), 1e-4


def accumulates(name):
    """Losses with four micro-batches, by SGD and without random numbers of examples."""
    with HIGHEST():
        whole, parts = (
            trained(name, gpu(), name='sgd', accumulate=n)[0] for n in (1, 4)
        )
    return error([m['param_norm'] for m in parts], [m['param_norm'] for m in whole]), 1e-3


def random_bits_agree():
    key = jax.random.key(5)
    draw = lambda key: (jax.random.bits(key, (1000,)), jax.random.permutation(key, 1000))  # noqa: E731
    found, wanted = both(draw, key)
    return error(found, wanted), 0.0


def step_cases():
    yield 'random bits and permutations', random_bits_agree
    for name in ('supervised', 'mae', 'masked_patch', 'dino'):
        yield f'step {name}, as on a CPU', functools.partial(steps_agree, name)
    yield 'step supervised, twice', functools.partial(steps_repeat, 'supervised')
    yield 'step mae, in micro-batches', functools.partial(accumulates, 'mae')
    yield 'step plain linen and ours', plain_and_ours


def plain_and_ours():
    """FLOPs of both are those of the benchmark; parameters have the same size."""
    model = models.build('vit-ti/16', num_classes=7, dtype='bfloat16', **TINY)
    sizes = []
    for made in (model, peers.PlainVit(model)):
        state, advance, mesh = programs.begin(peers.classifier(made, (32, 32, 3)))
        data = sharding.put(peers.arrays(32, 4, 7), mesh)
        state, metrics = advance(state, data, {})
        assert np.isfinite(float(metrics['loss'])), metrics
        sizes.append(float(sum(x.size for x in jax.tree.leaves(state.params))))
    return error(*sizes), 0.0


# Precision, and files of other libraries.


def of_products():
    """Products in float32 as JAX has them by default: a TF32 of 10 bits makes 3e-4 of it."""
    a, b = (np.random.default_rng(i).normal(size=(512, 512)).astype(np.float32) for i in (0, 1))
    plain = on(gpu(), jnp.matmul, a, b)
    with HIGHEST():
        exact = on(gpu(), lambda a, b: a @ b, a, b)
    wanted = np.float64(a) @ np.float64(b)
    return error(exact, wanted), 1e-5, {'error_by_default': error(plain, wanted)}


def converted(name, plain):
    """Logits of a checkpoint as it is loaded; `plain`: as JAX computes float32 by default, too."""
    from recorded import DATA, location  # of tests

    import vit_jax

    expected = np.load(DATA / f'{name}.expected.npz')
    model, params = vit_jax.load(location(name))

    def error_of(model):
        forward = lambda p, x: model.apply({'params': p}, x)[0]  # noqa: E731
        return error(on(gpu(), forward, params, expected['images']), expected['logits'])

    by_default = {'error_by_default': error_of(model.clone(precision=None))} if plain else {}
    return error_of(model), 2e-4, by_default


def conversion_cases():
    from recorded import FIXTURES  # of tests

    yield 'precision of float32', of_products
    for name in FIXTURES:
        plain = name in ('official_vit_prelogits', 'timm_vit_token')
        yield f'conversion {name}', functools.partial(converted, name, plain)


def run(report, name, check):
    """One check, if there is time."""
    if 'cudnn' in name and 'NVIDIA' not in gpu().device_kind:
        report.skip(name, f'cuDNN is for NVIDIA GPUs, and this is {gpu().device_kind}')
    elif report.wants(name):
        with report.case(name):
            worst, tolerance, *more = check()
            more = more[0] if more else {}
            report.add(name, ok=worst <= tolerance, error=worst, tolerance=tolerance, **more)


def main():
    report = reports.Report(reports.arguments(__doc__))
    if 'cpu' not in (platforms := jax.config.jax_platforms or 'cpu'):
        jax.config.update('jax_platforms', f'{platforms},cpu')
    sys.path.insert(0, str(ROOT / 'tests'))
    report.results['device'] = gpu().device_kind
    groups = attention_cases(), model_cases(), step_cases(), conversion_cases()
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count(), 8)) as pool:  # XLA compiles
        for name, check in itertools.chain(*groups):
            pool.submit(run, report, name, check)
    return report.end()


if __name__ == '__main__':
    sys.exit(main())
