"""Contenders of the benchmarks: a plain linen encoder, timm and transformers by torch.compile.

Each of PEERS takes (name, size, batch, classes, train, dtype, fields) and gives (run, flops):
run(n) makes n steps, or n forward passes, and waits for the last one.
"""

import contextlib
import functools
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import models, optim, sharding, step
from vit_jax.objectives import Examples, supervised


def arrays(size, batch, classes):
    """A batch of noise."""
    rng = np.random.default_rng(0)
    return {
        'image': rng.integers(0, 256, (batch, size, size, 3), np.uint8),
        'label': rng.integers(0, classes, batch, np.int32),
        'mask': np.ones(batch, np.float32),
    }


class Block(nn.Module):
    """An encoder block of linen's own layers."""

    num_heads: int
    mlp_dim: int
    dtype: str

    @nn.compact
    def __call__(self, x):
        dense = dict(kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(self.num_heads, **dense)(y, y)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.gelu(nn.Dense(self.mlp_dim, **dense)(y))
        return x + nn.Dense(x.shape[-1], **dense)(y)


class PlainVit(nn.Module):
    """arXiv:2010.11929 in plain linen: nn.MultiHeadDotProductAttention, one module a block."""

    like: nn.Module  # a model of this package, for sizes and normalisation

    mean = property(lambda self: self.like.mean)
    std = property(lambda self: self.like.std)
    num_classes = property(lambda self: self.like.num_classes)

    def normalise(self, images):
        return self.like.normalise(images)

    def flops(self, image_shape):
        return self.like.flops(image_shape)

    @nn.compact
    def __call__(self, images, *, train=False):
        like = self.like
        x = nn.Conv(
            like.width, like.patch_size, strides=like.patch_size, padding='VALID',
            dtype=like.dtype, name='embedding',
        )(images.astype(like.dtype))  # fmt: skip
        x = x.reshape(x.shape[0], -1, like.width)
        cls = self.param('cls', nn.initializers.zeros, (1, 1, like.width)).astype(like.dtype)
        x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], axis=1)
        table = self.param('posemb', nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = x + table.astype(like.dtype)
        for _ in range(like.depth):
            x = Block(like.num_heads, like.mlp_dim, like.dtype)(x)
        x = nn.LayerNorm(dtype=like.dtype)(x)[:, 0]
        return nn.Dense(like.num_classes, dtype=like.dtype, name='head')(x), {}


def classifier(model, shape):
    """Supervised classification of images [H, W, C]."""
    spec = {'image': jax.ShapeDtypeStruct(shape, jnp.uint8)}
    return supervised.supervised(model, Examples(spec))


def replicated(objective, tx, mesh):
    """The state of any linen classifier, as shapes; each device has all of it."""
    fresh = functools.partial(step.fresh, objective=objective, tx=tx)
    everywhere = jax.sharding.NamedSharding(mesh, sharding.P())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        jax.eval_shape(fresh, jax.random.key(0)),
    )


def jax_steps(model, flops, size, batch, classes, train):
    """Steps of a linen classifier by this package's own train step, or forward passes."""
    shape = (size, size, 3)
    data = jax.device_put(arrays(size, batch, classes))
    if not train:
        params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape)))['params']
        params = jax.tree.map(lambda x: x.astype(model_dtype(model)), params)
        forward = jax.jit(lambda p, x: model.apply({'params': p}, model.normalise(x))[0])

        def run(n):
            for _ in range(n):
                logits = forward(params, data['image'])
            jax.block_until_ready(logits)

        return run, flops * batch
    objective = classifier(model, shape)
    tx = optim.make(
        step.abstract_params(objective), 10_000, warmup=1000, weight_decay=0.1, clip=1.0,
        momentum_dtype='bfloat16',
    )  # fmt: skip
    mesh = sharding.make_mesh(jax.devices()[:1])
    abstract = replicated(objective, tx, mesh)
    state = step.fresh(jax.random.key(0), objective=objective, tx=tx)
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, abstract))
    advance = step.compiled(objective, tx, abstract, mesh)
    data = sharding.put(arrays(size, batch, classes), mesh)

    def run(n):
        nonlocal state
        for _ in range(n):
            state, metrics = advance(state, data, {})
        jax.block_until_ready((state, metrics))

    return run, 3 * flops * batch


def model_dtype(model):
    return getattr(model, 'like', model).dtype


def ours(name, size, batch, classes, train, dtype, fields):
    model = models.build(name, num_classes=classes, dtype=dtype, **fields)
    return jax_steps(model, model.flops((size, size, 3)), size, batch, classes, train)


def flax_mha(name, size, batch, classes, train, dtype, fields):
    like = models.build(name, num_classes=classes, dtype=dtype)
    return jax_steps(PlainVit(like), like.flops((size, size, 3)), size, batch, classes, train)


def timm_model(name, size, classes):
    import timm

    kind, size_name, patch = name.replace('/', '-').split('-')
    names = dict(ti='tiny', s='small', b='base', l='large', h='huge', g='giant')
    return timm.create_model(
        f'{kind}_{names[size_name]}_patch{patch}_224', img_size=size, num_classes=classes
    )


def transformers_model(name, size, classes):
    import torch
    import transformers

    like = models.build(name, num_classes=classes)
    config = transformers.ViTConfig(
        hidden_size=like.width, num_hidden_layers=like.depth, num_attention_heads=like.num_heads,
        intermediate_size=like.mlp_dim, image_size=size, patch_size=like.patch_size[0],
        num_labels=classes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).logits

    return Logits()


def torch_steps(make, name, size, batch, classes, train, dtype, fields):
    """The peer's best: torch.compile, autocast, fused AdamW; the same batch, clipping and decay."""
    import torch

    del fields
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.backends.cuda.matmul.allow_tf32 = True
    low = torch.bfloat16 if dtype == 'bfloat16' else None
    model = make(name, size, classes).to(device)
    flops = models.build(name, num_classes=classes).flops((size, size, 3))
    data = arrays(size, batch, classes)
    images = torch.from_numpy(data['image']).to(device).permute(0, 3, 1, 2)
    labels = torch.from_numpy(data['label']).long().to(device)
    cast = torch.autocast(device, low) if low else contextlib.nullcontext()

    def wait():
        if device == 'cuda':
            torch.cuda.synchronize()

    if not train:
        model = model.eval().to(low) if low else model.eval()
        compiled = torch.compile(lambda x: model((x.to(low or torch.float32) / 255 - 0.5) / 0.5),
                                 mode='max-autotune' if device == 'cuda' else None)  # fmt: skip

        def run(n):
            with torch.inference_mode():
                for _ in range(n):
                    compiled(images)
                wait()

        return run, flops * batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    compiled = torch.compile(model)

    def loss_of(images, labels):
        with cast:
            logits = compiled((images.float() / 255 - 0.5) / 0.5)
            return torch.nn.functional.cross_entropy(logits.float(), labels)

    def run(n):
        for _ in range(n):
            optimizer.zero_grad(set_to_none=True)
            loss_of(images, labels).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
        wait()

    return run, 3 * flops * batch


def timm(*args):
    return torch_steps(timm_model, *args)


def torch(*args):
    return torch_steps(transformers_model, *args)


PEERS = {'ours': ours, 'flax_mha': flax_mha, 'timm': timm, 'torch': torch}


def product(dtype, seconds=1.0):
    """FLOP/s of the fastest of many products of two large matrices of noise."""
    n = 8192 if jax.default_backend() != 'cpu' else 2048
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    multiply = jax.jit(lambda a: a @ a)
    multiply(a).block_until_ready()
    best, end = float('inf'), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        multiply(a).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best
