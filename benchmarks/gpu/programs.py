"""Steps and forward passes that the scripts for GPUs time, each compiled for one device."""

import gc
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from vit_jax import models, optim, sharding, step
from vit_jax.distributed import devices
from vit_jax.objectives import Examples, Objective, dino, mae


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      run: n -> None; runs it n times and waits for the last one.
      flops: of one run, of which a step counts as three forward passes.
      memory: bytes on the device; None: unknown.
      note: what else is to be said of it.
    """

    run: Callable[[int], None]
    flops: float
    memory: int | None = None
    note: str = ''


def memory_of(compiled: Any) -> int | None:
    """Bytes of arguments, results and temporaries of a compiled program; None: unknown."""
    m = compiled.memory_analysis()
    if m is None:
        return None
    shared = m.alias_size_in_bytes
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - shared


def one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh(jax.devices()[:1])


def begin(
    objective: Objective, *, ema: float = 0.0, accumulate: int = 1, seed: int = 0
) -> tuple[step.State, Callable, jax.sharding.Mesh]:
    """(state at step 0, train step, mesh) on one device, by AdamW as the ViT paper has it."""
    mesh = one_device()
    tx = optim.make(
        step.abstract_params(objective), 10_000, warmup=1000, weight_decay=0.1, clip=1.0,
        momentum_dtype='bfloat16', ema=ema,
    )  # fmt: skip
    abstract = peers.replicated(objective, tx, mesh)
    state = step.init(objective, tx, seed, abstract)
    advance = step.compiled(objective, tx, abstract, mesh, seed=seed, accumulate=accumulate)
    return state, advance, mesh


def with_head(params: Any) -> Any:
    """A head of small numbers in place of zeros, by which all gradients would be zero at first."""
    if 'head' not in params or 'kernel' not in params['head']:
        return params
    kernel = params['head']['kernel']
    drawn = 0.02 * jax.random.normal(jax.random.key(1), kernel.shape, kernel.dtype)
    return params | {'head': params['head'] | {'kernel': drawn}}


def training(objective: Objective, batch: dict[str, np.ndarray], flops: float) -> Program:
    """Steps on one batch, which stays on the device."""
    state, advance, mesh = begin(objective)
    state = state.replace(params=with_head(state.params))
    data = sharding.put(batch, mesh)
    compiled = advance.lower(state, data, {}).compile()

    def run(n):
        nonlocal state
        for _ in range(n):
            state, metrics = compiled(state, data, {})
        jax.block_until_ready((state, metrics))

    return Program(run, 3 * flops * len(batch['mask']), memory_of(compiled))


def inference(model: Any, flops: float, size: int, batch: int) -> Program:
    """Forward passes over one batch of uint8, with parameters in the dtype of the model."""
    dtype = peers.model_dtype(model)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))['params']
    params = jax.tree.map(lambda x: x.astype(dtype), with_head(params))
    images = jax.device_put(peers.arrays(size, batch, 2)['image'])
    forward = jax.jit(lambda p, x: model.apply({'params': p}, model.normalise(x))[0])
    compiled = forward.lower(params, images).compile()

    def run(n):
        for _ in range(n):
            logits = compiled(params, images)
        jax.block_until_ready(logits)

    return Program(run, flops * batch, memory_of(compiled))


def ours(model: str, size: int, batch: int, train: bool, plain: bool = False, **fields) -> Program:
    """A classifier of this package; `plain`: of linen's own layers."""
    made = models.build(model, num_classes=1000, dtype='bfloat16', **fields)
    flops = made.flops((size, size, 3))
    made = peers.PlainVit(made) if plain else made
    if not train:
        return inference(made, flops, size, batch)
    objective = peers.classifier(made, (size, size, 3))
    return training(objective, peers.arrays(size, batch, 1000), flops)


def masked_autoencoder(model: str, size: int, batch: int, small: bool, **fields) -> Program:
    """MAE's step (arXiv:2111.06377)."""
    made = models.build(model, posemb='sincos2d_moco', dtype='bfloat16', **fields)
    decoder = dict(decoder_width=32, decoder_depth=1, decoder_heads=2) if small else {}
    spec = {'image': jax.ShapeDtypeStruct((size, size, 3), np.uint8)}
    objective = mae.mae(made, Examples(spec), **decoder)
    data = peers.arrays(size, batch, 2)
    del data['label']
    return training(objective, data, objective.flops)


def self_distillation(model: str, size: int, batch: int, small: bool, **fields) -> Program:
    """DINO's step (arXiv:2104.14294): crops of `size` and of 3/7 of it, 65,536 prototypes."""
    made = models.build(
        model, gelu='exact', interpolation='bicubic', drop_path=0.1, dtype='bfloat16', **fields
    )
    local, count = size * 3 // 7, 2 if small else 8
    head = dict(prototypes=64, hidden=32, bottleneck=16) if small else {}
    rng, shapes = np.random.default_rng(0), {
        'global': (2, size, size, 3), 'local': (count, local, local, 3)
    }  # fmt: skip
    spec = {k: jax.ShapeDtypeStruct(shape, np.uint8) for k, shape in shapes.items()}
    objective = dino.dino(made, Examples(spec, steps=10_000), **head)
    data = {k: rng.integers(0, 256, (batch, *shape), np.uint8) for k, shape in shapes.items()}
    return training(objective, data | {'mask': np.ones(batch, np.float32)}, objective.flops)


def timm(model: str, size: int, batch: int, train: bool, channels_last: bool = False) -> Program:
    """timm's model under torch.compile, or transformers' where timm does not import."""
    import torch

    make, note = peers.timm_model, ''
    try:
        import timm as _  # noqa: F401
    except ImportError as e:
        make, note = peers.transformers_model, f"transformers' ViT, as timm does not import: {e}"

    def converted(*arguments):
        made = make(*arguments)
        return made.to(memory_format=torch.channels_last) if channels_last else made

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run, flops = peers.torch_steps(converted, model, size, batch, 1000, train, 'bfloat16', {})
    run(1)
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return Program(run, flops, memory, note)


def release() -> None:
    """Returns memory of programs that are no longer referenced, which torch would keep from JAX."""
    gc.collect()
    if 'torch' in sys.modules:
        sys.modules['torch'].cuda.empty_cache()


BUILDERS = {'ours': ours, 'mae': masked_autoencoder, 'dino': self_distillation, 'timm': timm}


def facts() -> dict[str, Any]:
    """The device, its peak and what a large product of matrices reaches of it, versions."""
    device = jax.devices()[0]
    known = devices.GPUS.get(device.device_kind)
    return {
        'device': device.device_kind, 'platform': device.platform, 'jax': jax.__version__,
        'peak': known and known.flops, 'product': peers.product('bfloat16', 0.5),
        'backend': ' '.join(device.client.platform_version.split()),
    }  # fmt: skip
