"""The encoder block: multi-head self-attention and an MLP, with norms and residuals.

Shapes: B batch, N patches, T tokens, D width, H heads, C head width (D = H * C), L depth.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vit_jax.models import attention, attention_chunked, embedding, memory, relative, rotary
from vit_jax.models.layers import Dropout, Dtype, Mlp, Projection, dropped, norm
from vit_jax.models.memory import rounded, shard_batch
from vit_jax.models.style import PLAIN, PROJECTIONS, Style


def qkv_init(
    key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32
) -> jax.Array:
    """Xavier uniform for each of the three stacked D x D projections, not for D x 3D."""
    fan_in, fan_out = shape[0], shape[1] // 3
    limit = (6 / (fan_in + fan_out)) ** 0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def reordered(x: jax.Array) -> jax.Array:
    """Reorders the channels of queries and keys in parameters [..., 3, H, C]; values stay."""
    return jnp.concatenate([rotary.by_halves(x[..., :2, :, :]), x[..., 2:, :, :]], axis=-3)


def by_offset(x: jax.Array) -> jax.Array:
    """Turns logits [..., T, 2 T - 1], by offset k - q from 1 - T, to [..., T, T] by q and k.

    Row q starts at its element T - 1 - q. With one element of padding per row, cutting the
    flattened rows anew into 2 T - 1 elements shifts each start by one more.
    """
    t = x.shape[-2]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
    x = x.reshape(*x.shape[:-2], 2 * t * t)[..., t - 1 : -1]
    return x.reshape(*x.shape[:-1], t, 2 * t - 1)[..., :t]


class Attention(nn.Module):
    """Multi-head self-attention (arXiv:1706.03762 section 3.2): [B, T, D] -> [B, T, D].

    `rotation` is that of rotary.rotation, for queries and keys. `bias`, of the shape [H, T, T],
    [B, 1, T, T] or [B, H, T, T], is added to the logits. `grid` (h, w) are the patches, which come
    last among the tokens, for positions of this block's own. `places`, bool [B, Q, T], are where
    the last Q tokens before them attend to. Returns (output, probabilities [B, H, T, T], or None
    where `capture` is off).
    """

    num_heads: int
    kind: str = 'auto'
    style: Style = PLAIN
    grid: tuple[int, int] = (0, 0)
    relative: bool = False  # a key per offset in the sequence, arXiv:2010.11929 app. D.4
    relative_std: float | None = None  # initial deviation of these keys; None: C^-0.5
    epsilon: float = 1e-6
    dropout: float = 0.0
    deterministic: bool = True
    capture: bool = False
    dtype: Dtype = jnp.float32
    quantize: str = 'none'

    @nn.compact
    def __call__(
        self, x: jax.Array, rotation: tuple[jax.Array, jax.Array] | None = None,
        bias: jax.Array | None = None, places: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
        b, t, width = x.shape
        style = self.style
        heads = (self.num_heads, width // self.num_heads)
        dense = dict(dtype=self.dtype, quantize=self.quantize)
        absent = [name in style.unbiased for name in PROJECTIONS]
        qkv, vector = Projection(
            (width,), (3, *heads), qkv_init, True, **dense, use_bias=not all(absent),
            reorder=reordered if style.reorders else None, name='qkv',
        )(x)
        if vector is not None and any(absent):
            vector = jnp.where(jnp.asarray(absent)[:, None, None], 0, vector)
        if 'query_key' in style.norms:
            qkv, vector = self.normed(qkv, vector), None
        if style.bias is not None and not style.bias.shared:
            before = t - self.grid[0] * self.grid[1]
            own = relative.logits(self, style.bias, self.grid, before, self.num_heads)
            bias = own if bias is None else bias + own
        if vector is None:
            vector = jnp.zeros((3, *heads))
        rotation = self.rotation(t, width, rotation)
        x, captured = self.attend(qkv, vector, bias, rotation)
        if places is not None:
            first = t - self.grid[0] * self.grid[1] - places.shape[1]
            y = self.attend_places(qkv + vector.astype(self.dtype), rotation, first, places)
            x = jax.lax.dynamic_update_slice_in_dim(x, y, first, axis=1)
        if 'attention' in style.norms:
            normed = norm(style.norm, self.epsilon, self.dtype, 'norm')(x.reshape(b, t, width))
            x = normed.reshape(x.shape)
        out = Projection(heads, (width,), **dense, use_bias='out' not in style.unbiased, name='out')
        return checkpoint_name(shard_batch(out(x)), 'projected'), captured

    def normed(self, qkv: jax.Array, vector: jax.Array | None) -> jax.Array:
        """Adds the bias to qkv [B, T, 3, H, C] and normalises queries and keys."""
        if vector is not None:
            qkv = qkv + vector.astype(self.dtype)
        q, k, v = jnp.split(qkv, 3, axis=2)  # [B, T, 1, H, C]
        q, k = (norm(self.style.norm, self.epsilon, self.dtype, f'{name}_norm')(x)
                for name, x in (('q', q), ('k', k)))  # fmt: skip
        return jnp.concatenate([q, k, v], axis=2)

    def rotation(
        self, tokens: int, width: int, given: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, jax.Array] | None:
        """Cosines and sines by which queries and keys rotate: `given`, or this block's own."""
        rope = self.style.rotary
        if rope is None or not rope.learnt:
            return given
        shape = (2, self.num_heads, width // self.num_heads // 2)
        learnt = self.param('rope', rotary.init_frequencies, shape, rope)
        return rotary.learnt_rotation(rope, self.grid, tokens - self.grid[0] * self.grid[1], learnt)

    def attend(
        self, qkv: jax.Array, vector: jax.Array, bias: jax.Array | None,
        rotation: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
        """Attends: [B, T, 3, H, C] -> ([B, T, H, C], probabilities or None).

        `vector` [3, H, C] is added to qkv, `bias` to the logits [B, H, T, T].
        """
        _, tokens, _, heads, channels = qkv.shape
        kind = 'xla' if self.is_initializing() else attention.chosen(
            self.kind, *memory.target(), tokens=tokens, width=heads * channels, heads=heads,
            dtype=qkv.dtype, dropout=0.0 if self.deterministic else self.dropout,
            capture=self.capture, relative=self.relative, bias=() if bias is None else bias.shape,
        )  # fmt: skip
        rope = self.style.rotary
        in_kernel = kind in ('pallas', 'tiled')
        if in_kernel and rope is not None and (rope.learnt or rope.pairs != 'halves'):
            q, k, v = jnp.split(qkv + vector.astype(self.dtype), 3, axis=2)  # [B, T, 1, H, C]
            q, k = (rotary.rotate(rope, x, *rotation) for x in (q, k))
            qkv, vector = jnp.concatenate([q, k, v], axis=2), jnp.zeros_like(vector)
            rotation = None
        if kind == 'pallas':
            return attention.pallas(qkv, vector, rotation or (), bias), None
        if kind == 'tiled':
            return attention.tiled(qkv, vector, rotation or ()), None
        qkv = checkpoint_name(qkv + vector.astype(self.dtype), 'qkv')
        q, k, v = (qkv[:, :, i] for i in range(3))  # [B, T, H, C]
        if rope is not None:
            q, k = (rotary.rotate(rope, x, *rotation) for x in (q, k))
        if kind == 'cudnn':
            return attention.cudnn(q, k, v), None
        q, k, v = (memory.keep_layout(x.swapaxes(1, 2)) for x in (q, k, v))  # [B, H, T, C]
        if kind == 'chunked':
            rate = 0.0 if self.deterministic else self.dropout
            drawn = rate and self.make_rng('dropout')
            x = attention_chunked.attend(q, k, v, bias, rate, drawn)
            return checkpoint_name(x.swapaxes(1, 2), 'attended'), None
        q = q * q.shape[-1] ** -0.5
        logits = jnp.einsum('bhqc,bhkc->bhqk', q, k)
        if self.relative:
            std = channels**-0.5 if self.relative_std is None else self.relative_std
            init = nn.initializers.normal(std)
            keys = self.param('relative', init, (2 * tokens - 1, heads, channels))
            logits += by_offset(jnp.einsum('bhqc,rhc->bhqr', q, keys.astype(self.dtype)))
        if bias is not None:
            logits += bias.astype(self.dtype)
        logits = checkpoint_name(logits, 'logits')
        probs = rounded(attention.softmax(logits.astype(jnp.float32)).astype(self.dtype))
        captured = probs if self.capture else None  # before dropout: what the model attends to
        probs = Dropout(self.dropout, deterministic=self.deterministic)(probs)
        x = memory.keep_layout(jnp.einsum('bhqk,bhkc->bhqc', probs, v))
        return checkpoint_name(x.swapaxes(1, 2), 'attended'), captured

    def attend_places(
        self, qkv: jax.Array, rotation: tuple[jax.Array, jax.Array] | None, first: int,
        places: jax.Array,
    ) -> jax.Array:  # fmt: skip
        """Attention [B, Q, H, C] of Q tokens from `first` on to those in `places` [B, Q, T]."""
        q, k, v = (qkv[:, :, i] for i in range(3))  # [B, T, H, C]
        if self.style.rotary is not None:
            q, k = (rotary.rotate(self.style.rotary, x, *rotation) for x in (q, k))
        q = q[:, first : first + places.shape[1]] * q.shape[-1] ** -0.5
        logits = jnp.einsum('bqhc,bkhc->bhqk', q, k)
        logits = jnp.where(places[:, None], logits, jnp.finfo(self.dtype).min)
        probs = rounded(attention.softmax(logits.astype(jnp.float32)).astype(self.dtype))
        probs = Dropout(self.dropout, deterministic=self.deterministic)(probs)
        return jnp.einsum('bhqk,bkhc->bqhc', probs, v)


class Block(nn.Module):
    """Encoder block (arXiv:2010.11929 eq. 2 and 3), as the body of a scan over depth.

    `drop_path` is the rate of this block (arXiv:1603.09382), `layer_scale` the initial value of
    per-channel residual scales (arXiv:2103.17239 eq. 3; None: no scales). Positions, its own or
    `shared` ones, are added to its input. `grid`, `rotation`, `bias` and `places` are those of
    `Attention`. `branches` are the residual branches that are computed, all but with 'parallel'.
    """

    num_heads: int
    mlp_dim: int
    style: Style = PLAIN
    grid: tuple[int, int] = (0, 0)
    gelu: str = 'tanh'
    glu: bool = False
    epsilon: float = 1e-6
    relative: bool = False
    relative_std: float | None = None
    positions: tuple | None = None  # arguments of embedding.positions for a table of its own
    layer_scale: float | None = None
    dropout: float = 0.0
    attention: str = 'auto'
    attention_dropout: float = 0.0
    stochastic_depth: bool = False
    deterministic: bool = True
    capture: bool = False
    keep: bool = False
    branches: tuple[str, ...] = ('attention', 'mlp')
    dtype: Dtype = jnp.float32  # of norms and of the residual stream
    matmul_dtype: Dtype = jnp.float32  # of attention and MLP
    quantize: str = 'none'

    def residual(
        self, x: jax.Array, y: jax.Array, drop_path: jax.Array, name: str
    ) -> jax.Array:
        """x + y, with y scaled by channel and dropped by example; in the dtype of x."""
        y = y.astype(x.dtype)
        if self.layer_scale is not None:
            init = nn.initializers.constant(self.layer_scale)
            y = y * self.param(name, init, (y.shape[-1],)).astype(y.dtype)
        if self.stochastic_depth and not self.deterministic:
            y = dropped(y, drop_path, self.make_rng('dropout'))
        return x + y

    @nn.compact
    def __call__(
        self, x: jax.Array, drop_path: jax.Array, shared: jax.Array | None = None,
        rotation: tuple[jax.Array, jax.Array] | None = None, bias: jax.Array | None = None,
        places: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array | None]]:
        """(output, (attention probabilities, the output again)), the latter two if captured."""
        order = self.style.order
        norm1, norm2 = (
            norm(self.style.norm, self.epsilon, self.dtype, name) for name in ('norm1', 'norm2')
        )
        probabilities = None
        if 'attention' in self.branches:
            if self.positions is not None:
                shared = embedding.positions(self, *self.positions)  # [1, T, D]
            if shared is not None:
                x = x + shared.astype(x.dtype)
            x = shard_batch(x)
            normed = x if order == 'post' else norm1(x)
            y, probabilities = self.attend(normed, rotation, bias, places)
            if order == 'post':
                y = norm1(y)
            if order == 'parallel':
                y = y + self.feed_forward(normed)
            x = self.residual(x, y, drop_path, 'scale1')
        if 'mlp' in self.branches and order != 'parallel':
            x = checkpoint_name(x, 'middle')
            y = self.feed_forward(x if order == 'post' else norm2(x))
            if order == 'post':
                y = norm2(y)
            x = self.residual(x, y, drop_path, 'scale2')
        x = rounded(x)
        return x, (probabilities, x if self.keep else None)

    def attend(
        self, x: jax.Array, rotation: tuple[jax.Array, jax.Array] | None, bias: jax.Array | None,
        places: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
        """Attention with dropout: [B, T, D] -> ([B, T, D], probabilities or None)."""
        y, probabilities = Attention(
            self.num_heads,
            self.attention,
            self.style,
            self.grid,
            relative=self.relative,
            relative_std=self.relative_std,
            epsilon=self.epsilon,
            dropout=self.attention_dropout,
            deterministic=self.deterministic,
            capture=self.capture,
            dtype=self.matmul_dtype,
            quantize=self.quantize,
            name='attn',
        )(x, rotation, bias, places)
        return Dropout(self.dropout, deterministic=self.deterministic)(y), probabilities

    def feed_forward(self, x: jax.Array) -> jax.Array:
        """The MLP: [B, T, D] -> [B, T, D]."""
        style = self.style
        return Mlp(
            self.mlp_dim, self.gelu, self.glu, self.dropout, self.deterministic, self.matmul_dtype,
            self.quantize, use_bias='mlp' not in style.unbiased,
            hidden_norm=style.norm if 'mlp' in style.norms else None, epsilon=self.epsilon,
            name='mlp',
        )(x)  # fmt: skip
