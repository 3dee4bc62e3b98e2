"""Building blocks of the transformers.

Shapes: B batch, N patches, T tokens, D width, H heads, C head width (D = H * C), L depth.
"""

import functools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from vit_jax.errors import UserError
from vit_jax.models import attention, quantized

Dtype = Any
Gelu = Literal['tanh', 'exact', 'quick']
# Width from which the TPU compiler is kept from fusing an MLP's two products in a forward pass: it
# recomputes the first for each tile of the second, which pays off for narrow ones (RESULTS.md).
WIDE = 512
# Names in blocks, see `saved_names`.
KEPT = ('qkv', 'logits', 'attended', 'projected', 'middle', 'hidden')


def sincos2d(h, w, width, *, temperature=10_000.0):
    """Fixed 2-D sine-cosine positions, [1, h * w, D], rows first (arXiv:2205.01580 section 3)."""
    if width % 4:
        raise ValueError(f'sincos2d needs a width divisible by 4, not {width}')
    y, x = jnp.mgrid[:h, :w]
    omega = temperature ** -(jnp.arange(width // 4) / (width // 4 - 1))
    y = y.reshape(-1, 1) * omega  # [N, D / 4]
    x = x.reshape(-1, 1) * omega
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)[None]


def positions(scope, kind, grid, before, width):
    """Learned positions of `scope`, [1, before + h * w, D], for prefix tokens, then patches.

    'learn' has a vector per token; 'learn2d' one half of D per row and one per column of the grid,
    and zeros for the prefix (arXiv:2010.11929 appendix D.4).
    """
    h, w = grid
    init = nn.initializers.normal(width**-0.5)
    if kind == 'learn':
        return scope.param('posemb', init, (1, before + h * w, width))
    y = scope.param('posemb_y', init, (1, h, width // 2))
    x = scope.param('posemb_x', init, (1, w, width - width // 2))
    table = jnp.concatenate([jnp.repeat(y, w, axis=1), jnp.tile(x, (1, h, 1))], axis=-1)
    return jnp.pad(table, ((0, 0), (before, 0), (0, 0)))


def by_offset(x):
    """Turns logits [..., T, 2 T - 1], by offset k - q from 1 - T, to [..., T, T] by q and k.

    Row q starts at its element T - 1 - q. With one element of padding per row, cutting the
    flattened rows anew into 2 T - 1 elements shifts each start by one more.
    """
    t = x.shape[-2]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
    x = x.reshape(*x.shape[:-2], 2 * t * t)[..., t - 1 : -1]
    return x.reshape(*x.shape[:-1], t, 2 * t - 1)[..., :t]


def grid(image_shape, stride):
    """Rows and columns of patches of an image [H, W, ...]; raises UserError if not whole."""
    (h, w), (y, x) = image_shape[:2], stride
    if h % y or w % x or not h or not w:
        near = [f'{y * n} x {x * m}' for n, m in ((h // y, w // x), (-(-h // y), -(-w // x)))]
        raise UserError(
            f'image size {h} x {w} is not divisible by the patch size {y} x {x}; '
            f'{" and ".join(near if h >= y and w >= x else near[1:])} would be'
        )
    return h // y, w // x


def normalise(images, mean, std):
    """Normalises uint8 [B, H, W, C] to floats; mean and std are those of images in [0, 1]."""
    images = images.astype(jnp.float32) / 255
    return (images - jnp.asarray(mean)) / jnp.asarray(std)


def shard_batch(x, *, whole=True):
    """Shards x [B, ...] by example over the mesh axes data and fsdp, if a mesh is set.

    With `whole`, no other axis is sharded: left free, the partitioner would shard activations by
    width wherever FSDP shards weights, and sum over all devices instead of gathering one layer's
    weights. Heads and the hidden layer of an MLP are not `whole`, as the weights shard them. On
    TPUs [B, T, D] is laid out in that order: the compiler may otherwise put tokens outermost, copy
    for every kernel, and no longer fuse norms with the products after them.
    """
    if not {'data', 'fsdp'} <= set(jax.sharding.get_abstract_mesh().axis_names):
        return x
    if x.ndim == 3 and attention.target()[0] == 'tpu':  # elsewhere it makes partitioners gather
        x = with_layout_constraint(x, Layout((0, 1, 2)))
    rest = (None if whole else PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(('data', 'fsdp'), *rest))


def unroll_length(unroll, depth, loop):
    """Unroll length of the scan over depth: `unroll` or, if that is None, the fastest.

    A scan copies the weights of each block out of their stack, and saved activations into stacked
    arrays and back. So accelerators unroll all blocks, unless `loop` asks for a scan or FSDP
    gathers the weights of one block at a time. CPUs scan, which is as fast there and compiles
    sooner (benchmarks/RESULTS.md).
    """
    if unroll is not None:
        return unroll
    fsdp = jax.sharding.get_abstract_mesh().shape.get('fsdp', 1)
    return 1 if loop or fsdp > 1 or attention.target()[0] == 'cpu' else depth


def saved_names(primitive, *avals, **params):
    """Policy of `jax.checkpoint`: saves KEPT, sums of norms and softmax, outputs of cuDNN."""
    if primitive.name in ('reduce_sum', 'reduce_max', 'dot_product_attention_fwd_wrapper'):
        return True
    return jax.checkpoint_policies.save_only_these_names(*KEPT)(primitive, *avals, **params)


def recomputed(block, remat, loops):
    """A block [B, T, D] -> [B, T, D] that recomputes activations for the gradient as `remat` says.

    'full' saves only the input. With 'none' the compiler chooses for unrolled blocks. A scan writes
    all that is saved to memory, so it saves products of matrices, and recomputes what lies between
    them (norms, GELU, softmax) as part of the products that read it.
    """
    if remat == 'none' and not loops:
        return block
    policies = {'none': saved_names, 'full': None}
    policy = policies[remat] if remat in policies else getattr(jax.checkpoint_policies, remat)
    # Without a scan between the two passes, the compiler would merge what is computed twice.
    return nn.remat(block, policy=policy, prevent_cse=not loops)


def rounded(x):
    """Rounds x to its dtype on CPUs, whether x is captured or not.

    XLA on CPUs keeps float32 between fused bfloat16 operations, but not for a captured value:
    without rounding, capturing would change the output.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16) or attention.target()[0] != 'cpu':
        return x
    return jax.lax.reduce_precision(x, jnp.finfo(x.dtype).nexp, jnp.finfo(x.dtype).nmant)


def dropped(y, rate, key):
    """Stochastic depth (arXiv:1603.09382): y [B, T, D], zero for a random share of examples."""
    keep = jax.random.bernoulli(key, 1 - rate, (y.shape[0], 1, 1))
    return jnp.where(keep, y / (1 - rate).astype(y.dtype), 0)


def qkv_init(key, shape, dtype=jnp.float32):
    """Xavier uniform for each of the three stacked D x D projections, not for D x 3D."""
    fan_in, fan_out = shape[0], shape[1] // 3
    limit = (6 / (fan_in + fan_out)) ** 0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def gelu_of(kind):
    """GELU: 'exact', 'tanh' (arXiv:1606.08415 section 2) or CLIP's 'quick' x * sigmoid(1.702 x)."""
    if kind == 'quick':
        return lambda x: x * nn.sigmoid(1.702 * x)
    return lambda x: nn.gelu(x, approximate=kind == 'tanh')


def head(num_classes, bias, dtype, name='head'):
    """Dense layer to logits, within a module; starts with a kernel of zeros and this `bias`."""
    return nn.Dense(
        num_classes, kernel_init=nn.initializers.zeros,
        bias_init=nn.initializers.constant(bias), dtype=dtype, name=name,
    )  # fmt: skip


class Projection(nn.Module):
    """nn.DenseGeneral from dimensions `inputs` to `features`, as one product of two matrices.

    [B, T, *inputs] -> [B, T, *features]; the kernel is [*inputs, *features]. The compiler lays out
    a product by its dimensions: with more than two it would copy between that layout and the matrix
    that a kernel takes. If the mesh shards heads, they stay a dimension. With `apart`, returns
    (product, bias) for the caller to add. `quantize` is one of quantized.KINDS.
    """

    inputs: tuple[int, ...]
    features: tuple[int, ...]
    kernel_init: Any = nn.initializers.xavier_uniform()
    apart: bool = False
    dtype: Dtype = jnp.float32
    quantize: str = 'none'

    @nn.compact
    def __call__(self, x):
        matrix = math.prod(self.inputs), math.prod(self.features)
        shape = (*self.inputs, *self.features)

        def init(key, shape, dtype):
            return self.kernel_init(key, matrix, dtype).reshape(shape)

        kernel = self.param('kernel', init, shape, jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, self.features, jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        dot = quantized.dot_general(self.quantize)
        if jax.sharding.get_abstract_mesh().shape.get('tensor', 1) > 1:
            n = len(self.inputs)
            axes = tuple(range(2, 2 + n)), tuple(range(n))
            y = shard_batch(dot(shard_batch(x, whole=False), kernel, (axes, ((), ()))), whole=False)
        else:
            x = shard_batch(x.reshape(*x.shape[:2], matrix[0]))
            y = shard_batch(dot(x, kernel.reshape(matrix), (((2,), (0,)), ((), ()))))
            y = y.reshape(*y.shape[:2], *self.features)
        return (y, bias) if self.apart else y + bias.astype(self.dtype)


class Dropout(nn.Module):
    """Dropout (Srivastava et al., 2014, section 4) of [..., T, D], the rate a multiple of 2^-16.

    Each random word decides for two tokens, one of either half. The TPU compiler stores this joined
    mask for all its readers; that of nn.Dropout it recomputes for each, the gradient included,
    which takes as long as all products of B/16 (benchmarks/RESULTS.md).
    """

    rate: float
    deterministic: bool = True

    @nn.compact
    def __call__(self, x):
        if self.deterministic or not self.rate:
            return x
        *batch, tokens, width = x.shape
        share = min(round(self.rate * 2**16), 2**16 - 1)
        shape = (*batch, -(-tokens // 2), width)
        words = jax.random.bits(self.make_rng('dropout'), shape, 'uint32')
        halves = [(words & 0xFFFF) >= share, (words >> 16) >= share]
        keep = jnp.concatenate(halves, axis=-2)[..., :tokens, :]
        return jnp.where(keep, x / (1 - share / 2**16), 0)


class Mlp(nn.Module):
    """Two dense layers with GELU between: D -> mlp_dim -> D; with `glu`, SwiGLU
    (arXiv:2002.05202 eq. 6)."""

    mlp_dim: int
    gelu: str = 'tanh'
    glu: bool = False
    dropout: float = 0.0
    deterministic: bool = True
    dtype: Dtype = jnp.float32
    quantize: str = 'none'

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        dense = dict(
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(1e-6),
            dtype=self.dtype,
            dot_general=quantized.dot_general(self.quantize),
        )
        y = shard_batch(nn.Dense(self.mlp_dim, **dense, name='fc1')(x), whole=False)
        y = checkpoint_name(y, 'hidden')
        if self.glu:
            gate = nn.Dense(self.mlp_dim, **dense, name='gate')(x)
            x = nn.silu(checkpoint_name(gate, 'hidden')) * y
        else:
            gelu = gelu_of(self.gelu)
            if attention.target()[0] == 'cpu':  # saves y alone; elsewhere it would prevent fusion
                gelu = jax.checkpoint(gelu)
            x = gelu(y)
        if self.deterministic and width >= WIDE and attention.target()[0] == 'tpu':
            x = jax.lax.optimization_barrier(x)
        x = Dropout(self.dropout, deterministic=self.deterministic)(x)
        x = checkpoint_name(shard_batch(nn.Dense(width, **dense, name='fc2')(x)), 'projected')
        return Dropout(self.dropout, deterministic=self.deterministic)(x)


def cudnn(q, k, v):
    """Attention by cuDNN: q, k, v [B, T, H, C] -> [B, T, H, C].

    JAX (0.10 and 0.11) refuses gradients for an odd T, as it checks even an absent bias, which
    needs an even T. So an odd T is padded by one token, which the sequence lengths exclude.
    """
    attend = functools.partial(jax.nn.dot_product_attention, implementation='cudnn')
    b, t = q.shape[:2]
    if t % 2 == 0:
        return attend(q, k, v)
    q, k, v = (jnp.pad(x, [(0, 0), (0, 1), (0, 0), (0, 0)]) for x in (q, k, v))
    lengths = shard_batch(jnp.full(b, t, jnp.int32))
    return attend(q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths)[:, :t]


class Attention(nn.Module):
    """Multi-head self-attention (arXiv:1706.03762 section 3.2): [B, T, D] -> [B, T, D].

    Returns (output, probabilities [B, H, T, T], or None where `capture` is off).
    """

    num_heads: int
    kind: str = 'auto'
    qk_norm: bool = False
    relative: bool = False  # a key per offset in the sequence, arXiv:2010.11929 app. D.4
    epsilon: float = 1e-6
    dropout: float = 0.0
    deterministic: bool = True
    capture: bool = False
    dtype: Dtype = jnp.float32
    quantize: str = 'none'

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        heads = (self.num_heads, width // self.num_heads)
        dense = dict(dtype=self.dtype, quantize=self.quantize)
        qkv, bias = Projection((width,), (3, *heads), qkv_init, True, **dense, name='qkv')(x)
        if self.qk_norm:
            q, k, v = jnp.split(qkv + bias.astype(self.dtype), 3, axis=2)
            q = nn.LayerNorm(self.epsilon, dtype=self.dtype, name='q_norm')(q)
            k = nn.LayerNorm(self.epsilon, dtype=self.dtype, name='k_norm')(k)
            qkv, bias = jnp.concatenate([q, k, v], axis=2), jnp.zeros_like(bias)
        x, captured = self.attend(qkv, bias)
        out = Projection(heads, (width,), **dense, name='out')(x)
        return checkpoint_name(shard_batch(out), 'projected'), captured

    def attend(self, qkv, bias):
        """Attends: [B, T, 3, H, C], bias [3, H, C] -> ([B, T, H, C], probabilities or None)."""
        _, tokens, _, heads, channels = qkv.shape
        kind = 'xla' if self.is_initializing() else attention.chosen(
            self.kind, *attention.target(), tokens=tokens, width=heads * channels, heads=heads,
            dtype=qkv.dtype, dropout=0.0 if self.deterministic else self.dropout,
            capture=self.capture, relative=self.relative,
        )  # fmt: skip
        if kind == 'pallas':
            return attention.pallas(qkv, bias), None
        qkv = checkpoint_name(qkv + bias.astype(self.dtype), 'qkv')
        q, k, v = (qkv[:, :, i] for i in range(3))  # [B, T, H, C]
        if kind == 'cudnn':
            return cudnn(q, k, v), None
        q, k, v = (attention.keep_layout(x.swapaxes(1, 2)) for x in (q, k, v))  # [B, H, T, C]
        q = q * q.shape[-1] ** -0.5
        logits = jnp.einsum('bhqc,bhkc->bhqk', q, k)
        if self.relative:
            init = nn.initializers.normal(channels**-0.5)
            keys = self.param('relative', init, (2 * tokens - 1, heads, channels))
            logits += by_offset(jnp.einsum('bhqc,rhc->bhqr', q, keys.astype(self.dtype)))
        logits = checkpoint_name(logits, 'logits')
        probs = rounded(nn.softmax(logits.astype(jnp.float32)).astype(self.dtype))
        captured = probs if self.capture else None  # before dropout: what the model attends to
        probs = Dropout(self.dropout, deterministic=self.deterministic)(probs)
        x = attention.keep_layout(jnp.einsum('bhqk,bhkc->bhqc', probs, v))
        return checkpoint_name(x.swapaxes(1, 2), 'attended'), captured


class Block(nn.Module):
    """Pre-norm encoder block (arXiv:2010.11929 eq. 2 and 3), as the body of a scan over depth.

    `drop_path` is the rate of this block (arXiv:1603.09382), `layer_scale` the initial value of
    per-channel residual scales (arXiv:2103.17239 eq. 3; None: no scales). Positions, its own or
    `shared` ones, are added to its input.
    """

    num_heads: int
    mlp_dim: int
    gelu: str = 'tanh'
    glu: bool = False
    epsilon: float = 1e-6
    qk_norm: bool = False
    relative: bool = False
    positions: tuple | None = None  # kind, grid and prefix of a table of its own
    layer_scale: float | None = None
    dropout: float = 0.0
    attention: str = 'auto'
    attention_dropout: float = 0.0
    stochastic_depth: bool = False
    deterministic: bool = True
    capture: bool = False
    keep: bool = False
    dtype: Dtype = jnp.float32
    quantize: str = 'none'

    def residual(self, x, y, drop_path, name):
        """x + y, with y scaled by channel and dropped by example."""
        if self.layer_scale is not None:
            init = nn.initializers.constant(self.layer_scale)
            y = y * self.param(name, init, (y.shape[-1],)).astype(y.dtype)
        if self.stochastic_depth and not self.deterministic:
            y = dropped(y, drop_path, self.make_rng('dropout'))
        return x + y

    @nn.compact
    def __call__(self, x, drop_path, shared=None):
        norm = dict(epsilon=self.epsilon, dtype=self.dtype)
        if self.positions is not None:
            shared = positions(self, *self.positions, x.shape[-1])  # [1, T, D]
        if shared is not None:
            x = x + shared.astype(x.dtype)
        x = shard_batch(x)
        y = nn.LayerNorm(**norm, name='norm1')(x)
        y, probabilities = Attention(
            self.num_heads,
            self.attention,
            qk_norm=self.qk_norm,
            relative=self.relative,
            epsilon=self.epsilon,
            dropout=self.attention_dropout,
            deterministic=self.deterministic,
            capture=self.capture,
            dtype=self.dtype,
            quantize=self.quantize,
            name='attn',
        )(y)
        y = Dropout(self.dropout, deterministic=self.deterministic)(y)
        x = checkpoint_name(self.residual(x, y, drop_path, 'scale1'), 'middle')
        y = nn.LayerNorm(**norm, name='norm2')(x)
        y = Mlp(
            self.mlp_dim, self.gelu, self.glu, self.dropout, self.deterministic, self.dtype,
            self.quantize, name='mlp',
        )(y)  # fmt: skip
        x = rounded(self.residual(x, y, drop_path, 'scale2'))
        return x, (probabilities, x if self.keep else None)


class MapHead(nn.Module):
    """Multi-head attention pooling by one learned query (arXiv:2106.04560 section 3.4).

    [B, T, D] -> [B, D].
    """

    num_heads: int
    mlp_dim: int
    gelu: str = 'tanh'
    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        b, _, width = x.shape
        xavier = nn.initializers.xavier_uniform()
        heads = (self.num_heads, width // self.num_heads)
        dense = dict(kernel_init=xavier, dtype=self.dtype)
        probe = self.param('probe', xavier, (1, 1, width)).astype(self.dtype)
        q = nn.DenseGeneral(heads, **dense, name='query')(probe)
        q = shard_batch(jnp.tile(q, (b, 1, 1, 1)), whole=False)
        k = shard_batch(nn.DenseGeneral(heads, **dense, name='key')(x), whole=False)
        v = shard_batch(nn.DenseGeneral(heads, **dense, name='value')(x), whole=False)
        logits = jnp.einsum('bqhc,bkhc->bhqk', q * q.shape[-1] ** -0.5, k)
        probs = nn.softmax(logits.astype(jnp.float32)).astype(self.dtype)
        x = jnp.einsum('bhqk,bkhc->bqhc', probs, v)
        x = shard_batch(nn.DenseGeneral(width, axis=(-2, -1), **dense, name='out')(x))
        y = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name='norm')(x)
        x = x + Mlp(self.mlp_dim, self.gelu, dtype=self.dtype, name='mlp')(y)
        return x[:, 0]
