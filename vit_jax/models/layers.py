"""Layers of the transformers: projections, MLP, dropout, stochastic depth, head.

Shapes: B batch, N patches, T tokens, D width, H heads, C head width (D = H * C), L depth.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.ad_checkpoint import checkpoint_name

from vit_jax.models import memory, quantized
from vit_jax.models.memory import shard_batch

Dtype = Any
Gelu = Literal['tanh', 'exact', 'quick']
# Width from which the TPU compiler is kept from fusing an MLP's two products in a forward pass: it
# recomputes the first for each tile of the second, which pays off for narrow ones (RESULTS.md).
WIDE = 512
# Coefficients of p in `gaussian`, highest first, a minimax fit up to x^2 = GELU_LIMIT.
GELU_FIT = (1.119083e-6, -3.058103e-5, -1.248615e-4, 0.03646879, 0.7978281)
GELU_LIMIT = 27.04


def dropped(
    y: jax.Array, rate: jax.Array, key: jax.Array, *, scaled: bool = True
) -> jax.Array:
    """Stochastic depth (arXiv:1603.09382): y [B, T, D], zero for a random share of examples.

    With `scaled`, the others are divided by 1 - rate, which keeps the expectation.
    """
    keep = jax.random.bernoulli(key, 1 - rate, (y.shape[0], 1, 1))
    return jnp.where(keep, y / (1 - rate).astype(y.dtype) if scaled else y, 0)


def gelu_of(kind: Gelu) -> Callable[[jax.Array], jax.Array]:
    """GELU: 'exact', 'tanh' (arXiv:1606.08415 section 2) or CLIP's 'quick' x * sigmoid(1.702 x)."""
    if kind == 'quick':
        return lambda x: x * nn.sigmoid(1.702 * x)
    return exact_gelu if kind == 'exact' else functools.partial(nn.gelu, approximate=True)


def exact_gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), Phi the distribution function of a Gaussian (arXiv:1606.08415 section 2).

    In 16 bits Phi is `gaussian`, as erf takes a TPU about as long as the product before it.
    """
    return short_gelu(x) if jnp.finfo(x.dtype).bits == 16 else nn.gelu(x, approximate=False)


def gaussian(x: jax.Array) -> jax.Array:
    """Phi(x) in float32, 0.5 + 0.5 tanh(x p(x^2)).

    The polynomial p has the least maximal error of x Phi(x), 3.0e-6.
    """
    z = jnp.minimum(x * x, GELU_LIMIT)
    return 0.5 + 0.5 * jnp.tanh(x * functools.reduce(lambda p, c: p * z + c, GELU_FIT))


@jax.custom_vjp
def short_gelu(x: jax.Array) -> jax.Array:
    """`exact_gelu` in 16 bits, computed in float32; its gradient keeps x alone."""
    y = x.astype(jnp.float32)
    return (y * gaussian(y)).astype(x.dtype)


def short_gelu_gradient(x: jax.Array, d: jax.Array) -> tuple[jax.Array]:
    """d (Phi(x) + x phi(x)), phi the density of a Gaussian."""
    y = x.astype(jnp.float32)
    slope = gaussian(y) + y * jnp.exp(-0.5 * y * y) * (2 * math.pi) ** -0.5
    return ((d * slope).astype(x.dtype),)


short_gelu.defvjp(lambda x: (short_gelu(x), x), short_gelu_gradient)


def norm(kind: str, epsilon: float, dtype: Dtype, name: str | None, **how: Any) -> nn.Module:
    """Norm over channels, within a module: 'layer' (arXiv:1607.06450), 'rms' (arXiv:1910.07467).

    `how` are other fields; with parent=None it is outside of any module.
    """
    module = {'layer': nn.LayerNorm, 'rms': nn.RMSNorm}[kind]
    return module(epsilon=epsilon, dtype=dtype, name=name, **how)


def head(
    num_classes: int, bias: float | None, dtype: Dtype, std: float = 0.0, name: str = 'head'
) -> nn.Module:
    """Dense layer to logits, within a module; starts with a kernel of this deviation and `bias`.

    None is no bias.
    """
    kernel = nn.initializers.normal(std) if std else nn.initializers.zeros
    return nn.Dense(
        num_classes, use_bias=bias is not None, kernel_init=kernel,
        bias_init=nn.initializers.constant(bias or 0.0), dtype=dtype, name=name,
    )  # fmt: skip


def product(quantize: str) -> Callable[..., jax.Array]:
    """`quantized.dot_general`, on CPUs with activations [B, T, K] as a matrix [B T, K].

    With two dimensions to contract in a kernel's gradient, XLA on CPUs copies an operand first. If
    the mesh shards heads and hidden layers, activations keep their dimensions.
    """
    dot = quantized.dot_general(quantize)
    sharded = jax.sharding.get_abstract_mesh().shape.get('tensor', 1) > 1
    if quantize != 'none' or sharded or memory.target()[0] != 'cpu':
        return dot

    def by_rows(x, kernel, dims, **how):
        y = dot(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), dims[1]), **how)
        return y.reshape(*x.shape[:-1], kernel.shape[1])

    return by_rows


class Projection(nn.Module):
    """nn.DenseGeneral from dimensions `inputs` to `features`, as one product of two matrices.

    [B, T, *inputs] -> [B, T, *features]; the kernel is [*inputs, *features]. The compiler lays out
    a product by its dimensions: with more than two it would copy between that layout and the matrix
    that a kernel takes. If the mesh shards heads, they stay a dimension. With `apart`, returns
    (product, bias) for the caller to add; the bias is None without `use_bias`. `reorder` is applied
    to kernel and bias before use. `quantize` is one of quantized.KINDS.
    """

    inputs: tuple[int, ...]
    features: tuple[int, ...]
    kernel_init: Any = nn.initializers.xavier_uniform()
    apart: bool = False
    dtype: Dtype = jnp.float32
    quantize: str = 'none'
    use_bias: bool = True
    reorder: Callable[[jax.Array], jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array | tuple[jax.Array, jax.Array | None]:
        matrix = math.prod(self.inputs), math.prod(self.features)
        shape = (*self.inputs, *self.features)

        def init(key, shape, dtype):
            return self.kernel_init(key, matrix, dtype).reshape(shape)

        kernel = self.param('kernel', init, shape, jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param('bias', nn.initializers.zeros, self.features, jnp.float32)
        if self.reorder is not None:
            kernel, bias = (None if p is None else self.reorder(p) for p in (kernel, bias))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        dot = product(self.quantize)
        if jax.sharding.get_abstract_mesh().shape.get('tensor', 1) > 1:
            n = len(self.inputs)
            axes = tuple(range(2, 2 + n)), tuple(range(n))
            y = shard_batch(dot(shard_batch(x, whole=False), kernel, (axes, ((), ()))), whole=False)
        else:
            x = shard_batch(x.reshape(*x.shape[:2], matrix[0]))
            y = shard_batch(dot(x, kernel.reshape(matrix), (((2,), (0,)), ((), ()))))
            y = y.reshape(*y.shape[:2], *self.features)
        if self.apart:
            return y, bias
        return y if bias is None else y + bias.astype(self.dtype)


def kept(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Dropout of [..., T, D] at the rate, a multiple of 2^-16; see `Dropout`."""
    *batch, tokens, width = x.shape
    share = min(round(rate * 2**16), 2**16 - 1)
    shape = (*batch, -(-tokens // 2), width)
    words = jax.random.bits(key, shape, 'uint32')
    halves = [(words & 0xFFFF) >= share, (words >> 16) >= share]
    keep = jnp.concatenate(halves, axis=-2)[..., :tokens, :]
    return jnp.where(keep, x / (1 - share / 2**16), 0)


class Dropout(nn.Module):
    """Dropout (Srivastava et al., 2014, section 4) of [..., T, D], the rate a multiple of 2^-16.

    Each random word decides for two tokens, one of either half. The TPU compiler stores this joined
    mask for all its readers; that of nn.Dropout it recomputes for each, the gradient included,
    which takes as long as all products of B/16 (benchmarks/RESULTS.md).
    """

    rate: float
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.deterministic or not self.rate:
            return x
        return kept(x, self.rate, self.make_rng('dropout'))


def cast_before(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, **how: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """nn.Dense's promotion to a common dtype, the kernel cast before the product, not within it.

    The TPU compiler repeats a cast within a product for each of its tiles (RESULTS.md).
    """
    x, kernel, bias = promote_dtype(x, kernel, bias, **how)
    return x, jax.lax.optimization_barrier(kernel), bias


class Mlp(nn.Module):
    """Two dense layers with GELU between: D -> mlp_dim -> D; with `glu`, SwiGLU
    (arXiv:2002.05202 eq. 6).

    `hidden_norm` is the kind of a norm before the second layer (arXiv:2303.11331); None: none.
    """

    mlp_dim: int
    gelu: str = 'tanh'
    glu: bool = False
    dropout: float = 0.0
    deterministic: bool = True
    dtype: Dtype = jnp.float32
    quantize: str = 'none'
    kernel_init: Any = nn.initializers.xavier_uniform()
    bias_init: Any = nn.initializers.normal(1e-6)
    use_bias: bool = True
    hidden_norm: str | None = None
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        dense = dict(
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            use_bias=self.use_bias,
            dtype=self.dtype,
            dot_general=product(self.quantize),
        )
        forward_on_tpu = self.deterministic and memory.target()[0] == 'tpu'
        if forward_on_tpu:
            dense['promote_dtype'] = cast_before
        y = shard_batch(nn.Dense(self.mlp_dim, **dense, name='fc1')(x), whole=False)
        y = checkpoint_name(y, 'hidden')
        if self.glu:
            gate = nn.Dense(self.mlp_dim, **dense, name='gate')(x)
            x = nn.silu(checkpoint_name(gate, 'hidden')) * y
        else:
            gelu = gelu_of(self.gelu)
            if memory.target()[0] == 'cpu':  # saves y alone; elsewhere it would prevent fusion
                gelu = jax.checkpoint(gelu)
            x = gelu(y)
        if forward_on_tpu and width >= WIDE:
            x = jax.lax.optimization_barrier(x)
        x = Dropout(self.dropout, deterministic=self.deterministic)(x)
        if self.hidden_norm is not None:
            x = norm(self.hidden_norm, self.epsilon, self.dtype, 'norm')(x)
        x = checkpoint_name(shard_batch(nn.Dense(width, **dense, name='fc2')(x)), 'projected')
        return Dropout(self.dropout, deterministic=self.deterministic)(x)
