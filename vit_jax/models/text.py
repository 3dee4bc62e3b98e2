"""The transformer of a ViT on words: token ids in place of patches.

Shapes: B batch, L tokens of a text, T the length that positions are for, D width, V vocabulary, K
outputs of the head.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.io import bounds
from vit_jax.io.bounds import Finite, Float, NonNegative, Positive, Rate
from vit_jax.models import block, encoder, interface, layers, memory, pooling, quantized
from vit_jax.models.flops import text_flops


class Text(nn.Module):
    """Token ids, int [B, L], to (output, named intermediates).

    The output is logits [B, K], an embedding where the head projects to a space shared with images,
    or pre_logits [B, D] where `num_classes` is None; with `pool='none'` both keep all tokens. The
    intermediates are those of `vit.Vit`:

    tokens      [B, L, D]  embedded tokens with their positions
    encoded     [B, L, D]  tokens after the last norm
    pre_logits  [B, D]     input of the head
    logits      [B, K]     if the model has a head

    as are those of `capture`, and their names. A text may be shorter than `length`, and then has
    the first positions. A token outside of the vocabulary has an embedding of NaN, as no value can
    be checked in a compiled function; all outputs of that text are NaN then, and so is the loss.
    Raises UserError for tokens of another kind or more than `length`, and for an unknown capture.

    The defaults are the text tower of big_vision (models/proj/image_text/text_transformer.py) in
    the size of ViT-B.
    """

    num_classes: Positive[int] | None = None  # outputs of the head; None: no head
    vocab_size: Positive[int] = 32_000  # number of tokens in the vocabulary
    length: Positive[int] = 64  # most tokens of a text
    width: Positive[int] = 768  # size of a token
    depth: Positive[int] = 12  # number of blocks
    num_heads: Positive[int] = 12  # attention heads of a block
    mlp_dim: Positive[int] = 3072  # hidden size of the MLPs
    causal: bool = False  # tokens attend to themselves and those before them alone, as in CLIP
    # what the head reads: the last or first token, the mean, attention pooling, the token at the
    # end of the text (CLIP, see `eos_id`), or all tokens
    pool: Literal['last', 'first', 'mean', 'map', 'eos', 'none'] = 'last'
    pool_style: pooling.Pool = pooling.Pool()  # heads and MLP of pool 'map'
    # token that ends a text, whose first place pool 'eos' reads (the first token without one);
    # None: the place of the highest id
    eos_id: NonNegative[int] | None = None
    pad_id: NonNegative[int] | None = None  # token that fills up short texts; None: unknown
    # attention, and pools 'last', 'mean' and 'map', leave out `pad_id`; else it is as other tokens
    mask_padding: bool = False
    # position embedding: learnt, fixed sine-cosine (arXiv:1706.03762 section 3.5), or none
    posemb: Literal['learn', 'sincos', 'none'] = 'learn'
    # initial deviation of learnt positions: 0.01 for CLIP (openai/CLIP clip/model.py); None:
    # width^-0.5, as big_vision
    posemb_std: NonNegative[float] | None = None
    # that of the vocabulary: 0.02 for CLIP; None: width^-0.5, as big_vision (flax's nn.Embed)
    vocab_std: NonNegative[float] | None = None
    layer_scale: NonNegative[float] | None = None  # initial scale of residual branches; None: none
    # order and kind of norms, absent biases, positions in attention: see models/block.py
    style: block.Style = block.Style()
    gelu: layers.Gelu = 'tanh'  # exact GELU, its tanh approximation, or CLIP's quick one
    glu: bool = False  # SwiGLU instead of GELU, arXiv:2002.05202
    epsilon: Positive[float] = 1e-6  # term added to the variance in norms
    head_bias: Finite[float] | None = 0.0  # initial bias of the head; None: it has no bias
    # initial deviation of the head's kernel; None: width^-0.5, for a projection (openai/CLIP
    # clip/model.py, big_vision)
    head_std: NonNegative[float] | None = 0.0
    dropout: Rate = 0.0  # dropout rate of embeddings, attention outputs and MLPs
    attention_dropout: Rate = 0.0  # dropout rate of the attention probabilities
    # implementation of attention; auto: the fastest that applies, see models/attention.py
    attention: Literal['auto', 'xla', 'cudnn', 'pallas', 'tiled', 'chunked'] = 'auto'
    drop_path: Rate = 0.0  # stochastic depth rate of the last block
    # that rate rises linearly from 0 in the first block; else it is the same in all
    drop_path_rises: bool = True
    # activations recomputed for the gradient: all (full), or all but products of matrices
    remat: Literal['none', 'full', 'dots_with_no_batch_dims_saveable'] = 'none'
    # blocks per iteration of the scan over depth; None: 1 on CPUs, with FSDP or remat, else all
    unroll: Positive[int] | None = None
    dtype: Float = 'float32'  # dtype of the computation; parameters are float32
    # dtype of operands and results of the products in the blocks alone; None: `dtype`
    matmul_dtype: Float | None = None
    # precision of products of float32 values; None: float32 in evaluations, in training what the
    # device has: bfloat16 on TPUs, tensorfloat32 on NVIDIA's GPUs from Ampere on
    precision: interface.Precision | None = None
    # 8-bit matrix products in the blocks, see models/quantized.py
    quantize: Literal['none', 'int8', 'fp8'] = 'none'
    metadata: interface.Metadata | None = interface.metadata()  # set by vit_jax.load

    captures = ('attention', 'tokens_by_block', 'normed_by_block')
    posemb_at, prefix = 'stem', {}  # as a `vit.Vit` has them
    reads = 'text'  # the array of an example; `vit.Vit` and others read `image`

    def __post_init__(self) -> None:
        self.dtype = interface.dtype_name(self.dtype)
        self.matmul_dtype = interface.dtype_name(self.matmul_dtype)
        super().__post_init__()

    @property
    def product_dtype(self) -> str:
        """Dtype of the products in blocks."""
        return self.matmul_dtype or self.dtype

    def normalise(self, tokens: jax.Array) -> jax.Array:
        """Returns the tokens, as models of images normalise theirs."""
        return tokens

    def check(self) -> None:
        """Raises UserError for an invalid field, and names it."""
        bounds.check_fields('text', self)
        interface.check_precision(self)
        quantized.dot_general(self.quantize)
        if self.width % self.num_heads:
            raise UserError(
                f'text.width {self.width} is not divisible by text.num_heads {self.num_heads}'
            )
        if self.posemb == 'sincos' and self.width % 2:
            raise UserError(f'text.posemb sincos needs an even width, not {self.width}')
        for name in ('rope', 'bias'):
            if getattr(self.style, name) is not None:
                raise UserError(f'text.style.{name} is of patches in rows and columns, not words')
        if self.style.order == 'post' and self.layer_scale is not None:
            raise UserError("text.layer_scale has no place in blocks of text.style.order 'post'")
        if self.mask_padding and self.pad_id is None:
            raise UserError('text.mask_padding needs text.pad_id, the token that it leaves out')
        for name in ('eos_id', 'pad_id'):
            value = getattr(self, name)
            if value is not None and value >= self.vocab_size:
                raise UserError(
                    f'text.{name} is {value}, but text.vocab_size {self.vocab_size}; ids start at 0'
                )

    def flops(self, length: int | None = None) -> int:
        """FLOPs of a forward pass over one text of `length` tokens, counted as `Vit.flops` does."""
        return text_flops(self, self.length if length is None else length)

    @nn.compact
    @interface.at_precision
    def __call__(
        self,
        tokens: jax.Array,
        *,
        train: bool = False,
        capture: str | tuple[str, ...] = (),
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes (output, named intermediates) of tokens, int [B, L]; see the class.

        `train` says whether dropout and stochastic depth are on; `capture` names intermediates.
        """
        self.check()
        interface.check_tokens(tokens, self.length)
        capture = interface.captures(capture, self.captures)
        x = memory.shard_batch(self.embedded(tokens))
        out = {'tokens': x}
        x = layers.Dropout(self.dropout, deterministic=not train)(x)
        real = tokens != self.pad_id if self.mask_padding else None
        attend = attended(tokens.shape[1], self.causal, real)
        length = tokens.shape[1]
        _, x, by_block = encoder.encode(self, x, length, (1, length), attend, train, capture)
        out |= by_block
        norm = layers.norm(self.style.norm, self.epsilon, self.dtype, 'norm')
        if 'normed_by_block' in out:
            out['normed_by_block'] = norm(out['normed_by_block'])
        out['encoded'] = norm(x)
        x = memory.shard_batch(self.pooled(out['encoded'], tokens, real))
        out['pre_logits'] = x
        if self.num_classes is None:
            return x, out
        std = self.width**-0.5 if self.head_std is None else self.head_std
        head = layers.head(self.num_classes, self.head_bias, self.dtype, std)
        out['logits'] = memory.shard_batch(head(x))
        return out['logits'], out

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """Embeds tokens with their positions, within the module: int [B, L] -> [B, L, D]."""
        width, count = self.width, tokens.shape[1]
        std = width**-0.5 if self.vocab_std is None else self.vocab_std
        table = self.param('vocabulary', nn.initializers.normal(std), (self.vocab_size, width))
        # jnp.take would wrap negative ids, and others clamp ids that are too high
        x = table.at[tokens].get(mode='fill', fill_value=jnp.nan, wrap_negative_indices=False)
        x = x.astype(self.dtype)
        if self.posemb == 'learn':
            std = width**-0.5 if self.posemb_std is None else self.posemb_std
            shape = (1, self.length, width)
            positions = self.param('posemb', nn.initializers.normal(std), shape)
            x = x + positions[:, :count].astype(self.dtype)
        elif self.posemb == 'sincos':
            x = x + sincos(count, width).astype(self.dtype)
        return x

    def pooled(self, x: jax.Array, tokens: jax.Array, real: jax.Array | None) -> jax.Array:
        """Pools tokens [B, L, D], within the module, as `pool` says; `real` is no padding."""
        if self.pool == 'none':
            return x
        if self.pool == 'map':
            return pooling.map_head(self, 'map_head')(x, real)
        if self.pool == 'mean':
            if real is None:
                return x.mean(axis=1)
            count = jnp.maximum(real.sum(axis=1, keepdims=True), 1).astype(x.dtype)
            return jnp.where(real[..., None], x, 0).sum(axis=1) / count
        last = tokens.shape[1] - 1
        if self.pool == 'first':
            return x[:, 0]
        if self.pool == 'last' and real is None:
            return x[:, last]
        if self.pool == 'last':
            places = jnp.max(jnp.where(real, jnp.arange(last + 1), 0), axis=1)
        else:
            places = jnp.argmax(tokens if self.eos_id is None else tokens == self.eos_id, axis=1)
        return jnp.take_along_axis(x, places[:, None, None], axis=1)[:, 0]

    def logits_of_tokens(self, encoded: jax.Array) -> jax.Array:
        """Products of vectors [B, L, D] with the embedding of each token, [B, L, V].

        The vocabulary is tied: model.apply({'params': params}, x, method='logits_of_tokens').
        """
        table = self.variables['params']['vocabulary'].astype(self.dtype)
        logits = jnp.einsum('bld,vd->blv', encoded.astype(self.dtype), table)
        return memory.shard_batch(logits, whole=False)


# The fields of `Text` as a section of a config has them.
Fields = dataclasses.make_dataclass(
    'Fields',
    [(f.name, f.type, f.default) for f in dataclasses.fields(Text)
     if f.name not in ('parent', 'name', 'metadata')],
    namespace={'documented_by': Text}, frozen=True,
)  # fmt: skip


def attended(length: int, causal: bool, real: jax.Array | None) -> jax.Array | None:
    """Which token (row) attends to which (column): bool [1 or B, L, L]; None: each to all.

    `real`, bool [B, L], is false for padding. A token always attends to itself, so that padding at
    the start of a causal text has something to attend to, and nothing after it.
    """
    if not causal and real is None:
        return None
    attend = jnp.tri(length, dtype=bool)[None] if causal else jnp.ones((1, 1, length), bool)
    if real is not None:
        attend = attend & real[:, None, :] | jnp.eye(length, dtype=bool)
    return attend


def sincos(length: int, width: int, *, temperature: float = 10_000.0) -> jax.Array:
    """Fixed sine-cosine positions [1, L, D] (arXiv:1706.03762 section 3.5), sines first."""
    omega = temperature ** -(jnp.arange(width // 2) / (width // 2))
    angles = jnp.arange(length)[:, None] * omega
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)[None]


def of_fields(fields: Any, name: str = 'text') -> Text:
    """The model of a section {field: value}, of `Fields` or of a `Text`, which is returned itself.

    Raises UserError for an unknown field or a wrong value, as of the setting `name`.
    """
    if isinstance(fields, Text):
        return fields
    values = bounds.section(fields)
    bounds.check(name, values, Fields)
    fields = bounds.grouped(Fields, values)
    return Text(**{f.name: getattr(fields, f.name) for f in dataclasses.fields(fields)})
