"""The Vision Transformer (arXiv:2010.11929), one module for every published variant.

Shapes: B batch, H W image, C channels, P patch, N patches, T tokens, D width, L depth, K classes.
"""

from typing import Literal

import flax.linen as nn
import jax

from vit_jax.errors import UserError
from vit_jax.io import bounds
from vit_jax.io.bounds import Finite, Float, NonNegative, Positive, Rate
from vit_jax.models import (
    block,
    embedding,
    encoder,
    interface,
    layers,
    memory,
    pooling,
    quantized,
    resnet,
    stem,
)
from vit_jax.models.flops import vit_flops
from vit_jax.models.prefix import prefix_counts, prefix_rows

# arXiv:2010.11929 table 1 (b, l, h); arXiv:2106.10270 table 2 (ti, s); arXiv:2106.04560 table 2
# (mu to G); arXiv:2305.13035 table 1 (so400m); arXiv:2209.06794 section 3.1 (e).
SIZES = {
    'mu': dict(width=32, depth=1, num_heads=2, mlp_dim=128),
    'ti': dict(width=192, depth=12, num_heads=3, mlp_dim=768),
    's': dict(width=384, depth=12, num_heads=6, mlp_dim=1536),
    'm': dict(width=512, depth=12, num_heads=8, mlp_dim=2048),
    'b': dict(width=768, depth=12, num_heads=12, mlp_dim=3072),
    'l': dict(width=1024, depth=24, num_heads=16, mlp_dim=4096),
    'so400m': dict(width=1152, depth=27, num_heads=16, mlp_dim=4304),
    'h': dict(width=1280, depth=32, num_heads=16, mlp_dim=5120),
    'g': dict(width=1408, depth=40, num_heads=16, mlp_dim=6144),
    'G': dict(width=1664, depth=48, num_heads=16, mlp_dim=8192),
    'e': dict(width=1792, depth=56, num_heads=16, mlp_dim=15360),
}


class Vit(nn.Module):
    """Images [B, H, W, C], normalised floats, to (output, named intermediates).

    The output is logits [B, K], or pre_logits [B, D] where `num_classes` is None; with
    `pool='none'` both keep all T tokens: [B, T, K] and [B, T, D]. The intermediates are:

    tokens      [B, N, D]  embedded patches with their positions
    encoded     [B, N, D]  patches after the last norm, if `last_norm` is 'tokens'
    cls         [B, D]     class token, likewise, if the model has one
    pre_logits  [B, D]     input of the head; [B, 2 D] with pool='cls_gap'
    logits      [B, K]     if the model has a head
    logits_cls, logits_dist  [B, K]  of both heads with `dist_head`; logits are their mean

    Their names in `capture` add the following; T counts the class token, the distillation token,
    the registers and the patches, in this order:

    attention        [L, B, heads, T, T]  probabilities
    tokens_by_block  [L + 1, B, T, D]     input of the first block, then the output of each block
    normed_by_block  [L + 1, B, T, D]     the same after the last norm, likewise

    Capturing changes no output. Raises UserError for images of another kind or size than the
    parameters are for, and for an unknown capture.
    """

    num_classes: Positive[int] | None = 1000  # outputs of the head; None: no head
    # size of a patch, (height, width) or one number: in pixels, or in features of `resnet`
    patch_size: tuple[Positive[int], Positive[int]] = (16, 16)
    width: Positive[int] = 768  # size of a token
    depth: Positive[int] = 12  # number of blocks
    num_heads: Positive[int] = 12  # attention heads of a block
    mlp_dim: Positive[int] = 3072  # hidden size of the MLPs
    # what the head reads: class token, mean of the patches, both, attention pooling or all tokens
    pool: Literal['cls', 'gap', 'cls_gap', 'map', 'none'] = 'cls'
    pool_style: pooling.Pool = pooling.Pool()  # details of `pool`: its tokens, heads and MLP
    # position embedding: learnt by patch, by row and column, or relative (arXiv:2010.11929 appendix
    # D.4); fixed sine-cosine of big_vision (arXiv:2205.01580 section 3), or with the frequencies of
    # MoCo v3 and MAE (arXiv:2104.02057, arXiv:2111.06377); none
    posemb: Literal['learn', 'learn2d', 'relative', 'sincos2d', 'sincos2d_moco', 'none'] = 'learn'
    # where positions are added: before all blocks, or before each from its own or a shared table
    posemb_at: Literal['stem', 'layers', 'shared'] = 'stem'
    # initial deviation of learnt positions: 0.02 for arXiv:2010.11929 (vision_transformer
    # models_vit.py:192); None: width^-0.5, as big_vision, and that of a head for relative ones
    posemb_std: NonNegative[float] | None = None
    # how the position table is resized to another image size; linear has aligned corners
    interpolation: Literal[
        'linear', 'bilinear', 'bilinear_antialias', 'bicubic', 'bicubic_antialias'
    ] = 'linear'
    # it is resized to a square, of which other images take the top left part
    square_posemb: bool = False
    cls_token: bool | None = None  # class token; None: if `pool` reads it
    dist_token: bool = False  # distillation token, arXiv:2012.12877 section 4
    dist_head: bool = False  # head on the distillation token; logits are the mean of both heads
    registers: NonNegative[int] = 0  # number of register tokens, arXiv:2309.16588
    cls_posemb: bool = True  # class and distillation token have positions
    registers_posemb: bool = False  # registers have positions
    representation_size: Positive[int] | None = None  # size of a tanh layer before the head
    # units in each stage of a ResNet before the patches (hybrid); (): its root block only
    resnet: tuple[Positive[int], ...] | None = None
    resnet_width: Positive[float] = 1.0  # factor of the features of `resnet`
    # terms that keep scales in `resnet` finite: those of vision_transformer, or of timm's hybrids
    resnet_epsilon: Literal['official', 'timm'] = 'official'
    pre_norm: bool = False  # norm before the first block, as in CLIP
    patch_norm: bool = False  # norm of the embedded patches before positions, arXiv:2411.14402
    # last norm: of all tokens, of the pooled vector, or none
    last_norm: Literal['tokens', 'pooled', 'none'] = 'tokens'
    layer_scale: NonNegative[float] | None = None  # initial scale of residual branches; None: none
    # order and kind of norms, absent biases, positions in attention: see models/block.py
    style: block.Style = block.Style()
    gelu: layers.Gelu = 'tanh'  # exact GELU, its tanh approximation, or CLIP's quick one
    glu: bool = False  # SwiGLU instead of GELU, arXiv:2002.05202
    epsilon: Positive[float] = 1e-6  # term added to the variance in norms
    head_bias: Finite[float] = 0.0  # initial bias of the head; -log K starts sigmoid losses near 0
    # initial deviation of the head's kernel; None: width^-0.5, for the projection of a tower
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
    # dtype of operands and results of the products in stem and blocks alone, while the residual
    # stream, norms, pooling and the head stay in `dtype`; None: `dtype`
    matmul_dtype: Float | None = None
    # precision of products of float32 values; None: float32 in evaluations, in training what the
    # device has: bfloat16 on TPUs, tensorfloat32 on NVIDIA's GPUs from Ampere on
    precision: interface.Precision | None = None
    # 8-bit matrix products in the blocks, see models/quantized.py
    quantize: Literal['none', 'int8', 'fp8'] = 'none'
    mean: tuple[Finite[float], ...] = (0.5, 0.5, 0.5)  # of each channel of images in [0, 1]
    std: tuple[Positive[float], ...] = (0.5, 0.5, 0.5)  # of each channel of images in [0, 1]
    metadata: interface.Metadata | None = interface.metadata()  # set by vit_jax.load

    captures = ('attention', 'tokens_by_block', 'normed_by_block')

    def __post_init__(self) -> None:
        self.dtype = interface.dtype_name(self.dtype)
        self.matmul_dtype = interface.dtype_name(self.matmul_dtype)
        super().__post_init__()

    @property
    def prefix(self) -> dict[str, int]:
        """Tokens before the patches, by name of their parameter: {'cls': 1, 'registers': 4}."""
        return prefix_counts(self.pool, self.cls_token, self.dist_token, self.registers)

    @property
    def prefix_posemb(self) -> dict[str, int]:
        """Those of `prefix` that have rows in the position table; they come first in it."""
        flags = self.cls_posemb, self.registers_posemb
        return prefix_rows(self.prefix, self.posemb, self.posemb_at, *flags)

    @property
    def product_dtype(self) -> str:
        """Dtype of the products in stem and blocks."""
        return self.matmul_dtype or self.dtype

    @property
    def stride(self) -> tuple[int, int]:
        """Pixels from one patch to the next: (vertical, horizontal)."""
        by = 1 if self.resnet is None else resnet.stride(self.resnet)
        return self.patch_size[0] * by, self.patch_size[1] * by

    def grid(self, image_shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of patches of an image [H, W, ...]; raises UserError if not whole."""
        return embedding.grid(image_shape, self.stride)

    def normalise(self, images: jax.Array) -> jax.Array:
        """Normalises images, uint8 [B, H, W, C], to the floats that this model takes."""
        return embedding.normalise(images, self.mean, self.std)

    def check(self) -> None:
        """Raises UserError for an invalid field, and names it."""
        bounds.check_fields('model', self)
        interface.check_precision(self)
        quantized.dot_general(self.quantize)
        if self.posemb_at != 'stem' and self.posemb not in ('learn', 'learn2d'):
            raise UserError(
                f"model.posemb_at is {self.posemb_at!r}; with model.posemb {self.posemb!r} it is "
                "'stem', as tables that are learnt alone have another place"
            )
        if self.posemb in embedding.FIXED and self.width % 4:
            raise UserError(
                f'model.posemb {self.posemb} needs a width divisible by 4, not {self.width}'
            )
        if self.width % self.num_heads:
            raise UserError(
                f'model.width {self.width} is not divisible by model.num_heads {self.num_heads}'
            )
        if self.style.rope is not None and self.width // self.num_heads % 4:
            raise UserError(
                'model.style.rope needs heads of a number of channels divisible by 4, not '
                f'{self.width // self.num_heads}'
            )
        if self.style.order == 'post' and self.layer_scale is not None:
            raise UserError("model.layer_scale has no place in blocks of model.style.order 'post'")
        if self.pool in ('cls', 'cls_gap') and 'cls' not in self.prefix:
            raise UserError(f'model.pool {self.pool!r} needs model.cls_token')
        if self.dist_head and not self.dist_token:
            raise UserError('model.dist_head needs model.dist_token')

    def flops(self, image_shape: tuple[int, ...]) -> int:
        """FLOPs of a forward pass over one image [H, W, C]: two per multiply-add of a product.

        Norms, softmax, GELU and biases are not counted, as is usual.
        """
        return vit_flops(self, image_shape)

    @nn.compact
    @interface.at_precision
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        capture: str | tuple[str, ...] = (),
        corrupt: stem.Corrupt | None = None,
        visible: jax.Array | None = None,
        attend: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes (output, named intermediates) of images; see the class.

        Args:
          images: normalised floats [B, H, W, C].
          train: whether dropout and stochastic depth are on.
          capture: names of further intermediates.
          corrupt: function of the embedded patches [B, N, D], called before positions are added.
          visible: int [B, V], the patches that blocks read; no others are in the intermediates.
            None: all.
          attend: bool [B, T, T] or [1, T, T], true where a token (row) attends to another (column).
            None: each attends to all.
        """
        self.check()
        interface.check_images(images, len(self.mean))
        capture = interface.captures(capture, self.captures)
        grid = self.grid(images.shape[1:])
        rows = self.prefix if self.posemb == 'relative' else self.prefix_posemb
        interface.check_size(images, grid, self.variables.get('params', {}), sum(rows.values()))
        patches, x = stem.sequence(self, images, corrupt, visible)
        out = {'tokens': patches}
        n = patches.shape[1]
        norm = self.style.norm, self.epsilon, self.dtype
        if self.pre_norm:
            x = layers.norm(*norm, 'pre_norm')(x)
        x = layers.Dropout(self.dropout, deterministic=not train)(x)
        # Separate, so that patches that no pooling reads are not normed.
        first, patches, by_block = encoder.encode(self, x, n, grid, attend, train, capture)
        out |= by_block
        last_norm = layers.norm(*norm, 'norm') if self.last_norm != 'none' else None
        if self.last_norm == 'tokens':
            if 'normed_by_block' in out:
                out['normed_by_block'] = last_norm(out['normed_by_block'])
            first, patches = last_norm(first), last_norm(patches)
        out['encoded'] = patches
        if 'cls' in self.prefix:
            out['cls'] = first[:, 0]
        dist = first[:, list(self.prefix).index('dist')] if self.dist_head else None
        x = memory.shard_batch(pooling.pooled(self, out, first))
        x = self.represented(last_norm(x) if self.last_norm == 'pooled' else x)
        out['pre_logits'] = x
        if self.num_classes is None:
            return x, out
        std = self.width**-0.5 if self.head_std is None else self.head_std
        head = self.num_classes, self.head_bias, self.dtype, std
        logits = memory.shard_batch(layers.head(*head)(x))
        if self.dist_head:
            out['logits_cls'] = logits
            out['logits_dist'] = memory.shard_batch(layers.head(*head, name='dist_head')(dist))
            logits = (logits + out['logits_dist']) / 2
        out['logits'] = logits
        return logits, out

    def represented(self, x: jax.Array) -> jax.Array:
        """The input of the head: x, or the representation layer applied to it."""
        if self.representation_size is None:
            return x
        return nn.tanh(nn.Dense(self.representation_size, dtype=self.dtype, name='pre_logits')(x))
