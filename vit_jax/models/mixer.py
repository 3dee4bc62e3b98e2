"""MLP-Mixer (arXiv:2105.01601): alternates MLPs over patches and over channels.

Shapes: B batch, N patches, D width, L depth, K classes.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.io import bounds
from vit_jax.io.bounds import Finite, Float, Positive, Rate
from vit_jax.models import embedding, interface, layers, memory, quantized

# arXiv:2105.01601 table 1
SIZES = {
    's': dict(width=512, depth=8, tokens_mlp_dim=256, mlp_dim=2048),
    'b': dict(width=768, depth=12, tokens_mlp_dim=384, mlp_dim=3072),
    'l': dict(width=1024, depth=24, tokens_mlp_dim=512, mlp_dim=4096),
    'h': dict(width=1280, depth=32, tokens_mlp_dim=640, mlp_dim=5120),
}


class MixerBlock(nn.Module):
    """Mixes tokens [B, N, D] over patches, then over channels (arXiv:2105.01601 eq. 1).

    Initial values and stochastic depth, which scales nothing, are those of big_vision
    models/mlp_mixer.py:35 and 173.
    """

    tokens_mlp_dim: int
    mlp_dim: int
    gelu: str = 'tanh'
    epsilon: float = 1e-6
    dropout: float = 0.0
    stochastic_depth: bool = False
    deterministic: bool = True
    keep: bool = False
    dtype: Any = jnp.float32
    matmul_dtype: Any = jnp.float32
    quantize: str = 'none'

    @nn.compact
    def __call__(
        self, x: jax.Array, drop_path: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """(output, the output again if `keep`)."""
        norm = dict(epsilon=self.epsilon, dtype=self.dtype)
        mlp = dict(
            gelu=self.gelu, dropout=self.dropout, deterministic=self.deterministic,
            dtype=self.matmul_dtype, quantize=self.quantize,
            kernel_init=nn.initializers.lecun_normal(), bias_init=nn.initializers.zeros,
        )  # fmt: skip

        def residual(x, y):
            y = y.astype(x.dtype)
            if not self.stochastic_depth or self.deterministic:
                return x + y
            return x + layers.dropped(y, drop_path, self.make_rng('dropout'), scaled=False)

        x = memory.shard_batch(x)
        y = nn.LayerNorm(**norm, name='norm1')(x).swapaxes(1, 2)  # [B, N, D] -> [B, D, N]
        y = layers.Mlp(self.tokens_mlp_dim, **mlp, name='token_mixing')(y)
        x = residual(x, y.swapaxes(1, 2))
        y = nn.LayerNorm(**norm, name='norm2')(x)
        y = layers.Mlp(self.mlp_dim, **mlp, name='channel_mixing')(y)
        x = memory.rounded(residual(x, y))
        return x, x if self.keep else None


class Mixer(nn.Module):
    """Images [B, H, W, C], normalised floats, to (output, named intermediates).

    As for `vit.Vit`, the output is logits [B, K], or pre_logits [B, D] where `num_classes` is None.
    The intermediates are tokens, encoded [B, N, D], pre_logits, logits and, with their names in
    `capture`, tokens_by_block and normed_by_block [L + 1, B, N, D]. The parameters fit one image
    size, which sets N.
    """

    num_classes: Positive[int] | None = 1000  # outputs of the head; None: no head
    # size of a patch in pixels, (height, width) or one number
    patch_size: tuple[Positive[int], Positive[int]] = (16, 16)
    width: Positive[int] = 768  # size of a token
    depth: Positive[int] = 12  # number of blocks
    tokens_mlp_dim: Positive[int] = 384  # hidden size of the MLPs over patches
    mlp_dim: Positive[int] = 3072  # hidden size of the MLPs over channels
    gelu: layers.Gelu = 'tanh'  # exact GELU, its tanh approximation, or CLIP's quick one
    epsilon: Positive[float] = 1e-6  # term added to the variance in norms
    head_bias: Finite[float] = 0.0  # initial bias of the head; -log K starts sigmoid losses near 0
    dropout: Rate = 0.0  # dropout rate of the MLPs
    # stochastic depth rate of the last block; rises linearly from 0; other examples are not scaled
    drop_path: Rate = 0.0
    # blocks per iteration of the scan over depth; None: 1 on CPUs, with FSDP, else all
    unroll: Positive[int] | None = None
    dtype: Float = 'float32'  # dtype of the computation; parameters are float32
    # dtype of operands and results of the products in stem and blocks alone, while the residual
    # stream, norms and the head stay in `dtype`; None: `dtype`
    matmul_dtype: Float | None = None
    # precision of products of float32 values; None: float32 in evaluations, in training what the
    # device has: bfloat16 on TPUs, tensorfloat32 on NVIDIA's GPUs from Ampere on
    precision: interface.Precision | None = None
    # 8-bit matrix products in the blocks, see models/quantized.py
    quantize: Literal['none', 'int8', 'fp8'] = 'none'
    mean: tuple[Finite[float], ...] = (0.5, 0.5, 0.5)  # of each channel of images in [0, 1]
    std: tuple[Positive[float], ...] = (0.5, 0.5, 0.5)  # of each channel of images in [0, 1]
    metadata: interface.Metadata | None = interface.metadata()  # set by vit_jax.load

    pool = 'gap'
    posemb = 'none'
    captures = ('tokens_by_block', 'normed_by_block')

    def __post_init__(self) -> None:
        self.dtype = interface.dtype_name(self.dtype)
        self.matmul_dtype = interface.dtype_name(self.matmul_dtype)
        super().__post_init__()

    @property
    def product_dtype(self) -> str:
        """Dtype of the products in stem and blocks."""
        return self.matmul_dtype or self.dtype

    @property
    def stride(self) -> tuple[int, int]:
        """Pixels from one patch to the next: (vertical, horizontal)."""
        return self.patch_size

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

    def flops(self, image_shape: tuple[int, ...]) -> int:
        """FLOPs of a forward pass over one image [H, W, C], counted as in `vit.Vit.flops`."""
        h, w = self.grid(image_shape)
        n, d = h * w, self.width
        adds = n * self.patch_size[0] * self.patch_size[1] * image_shape[2] * d
        adds += self.depth * 2 * n * d * (self.tokens_mlp_dim + self.mlp_dim)
        return 2 * (adds + d * (self.num_classes or 0))

    @nn.compact
    @interface.at_precision
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        capture: str | tuple[str, ...] = (),
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(output, named intermediates) of normalised floats [B, H, W, C]; see the class."""
        self.check()
        interface.check_images(images, len(self.mean))
        capture = interface.captures(capture, self.captures)
        grid = self.grid(images.shape[1:])
        interface.check_size(images, grid, self.variables.get('params', {}))
        out = {}
        x = embedding.patches(images, self.width, self.patch_size, self.product_dtype)
        x = out['tokens'] = x.astype(self.dtype)
        encoder = memory.stacked(MixerBlock, self.depth, self.unroll, self.is_initializing())(
            self.tokens_mlp_dim, self.mlp_dim, self.gelu, self.epsilon, self.dropout,
            self.drop_path > 0, not train, bool(capture), self.dtype, self.product_dtype,
            self.quantize, name='encoder',
        )  # fmt: skip
        x, by_block = encoder(x, jnp.linspace(0, self.drop_path, self.depth))
        last_norm = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name='norm')
        if capture:
            by_block = jnp.concatenate([out['tokens'][None], by_block])
        if 'tokens_by_block' in capture:
            out['tokens_by_block'] = by_block
        if 'normed_by_block' in capture:
            out['normed_by_block'] = last_norm(by_block)
        x = last_norm(x)
        out['encoded'] = x
        x = out['pre_logits'] = memory.shard_batch(x.mean(axis=1))
        if self.num_classes is None:
            return x, out
        head = layers.head(self.num_classes, self.head_bias, self.dtype)
        out['logits'] = memory.shard_batch(head(x))
        return out['logits'], out
