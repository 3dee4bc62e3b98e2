"""Segmenter (arXiv:2105.05633): a decoder of patches and class tokens around a plain ViT.

Shapes: B batch, H W image, C channels, h w grid of patches, N patches, D width of the encoder and
of the decoder, K classes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError
from vit_jax.io import bounds
from vit_jax.io.bounds import Positive, Rate
from vit_jax.models import block, interface, layers, memory, parameters, vit
from vit_jax.models.around import AroundVit, encoder_of
from vit_jax.models.flops import block_adds
from vit_jax.models.memory import shard_batch

# Sharding of the parameters beside the encoder, as rows of models.parameters.RULES. To layer-wise
# decay the decoder's blocks are a part of the head, and have the whole learning rate.
RULES = (
    (r'(decoder_embedding|(patch|class)_projection)/kernel', P('fsdp', None)),  # [D, D]
    (r'class_tokens', P()),
    *((row.pattern.replace('(en|de)coder', 'decoder'), row.spec, 'head')
      for row in parameters.RULES if row.pattern.startswith('(en|de)coder')),
)  # fmt: skip
EPSILON = 1e-5  # of the decoder's norms, that of PyTorch (rstrudel/segmenter decoder.py)
TINY = 1e-12  # squared length below which a vector is not made longer


class Segmenter(AroundVit):
    """Images [B, H, W, C], normalised floats, to (class logits [B, h, w, K], intermediates).

    Patches of the encoder and a token for each class pass the blocks of the decoder. The logits of
    a patch are its products with all class tokens, both projected and of unit length, after a norm
    over the classes (section 3.2, and `MaskTransformer` of the authors' code). The intermediate is
    `encoded` [B, N, D], patches after the encoder's last norm.

    Parameters of the encoder are in the subtree `vit`.
    """

    num_classes: Positive[int]  # K
    depth: Positive[int] = 2  # blocks of the decoder
    dropout: Rate = 0.1  # dropout rate of its attention probabilities, attention outputs and MLPs
    metadata: interface.Metadata | None = interface.metadata()  # set by vit_jax.load

    @property
    def num_heads(self) -> int:
        """Attention heads of the decoder, of 64 channels each."""
        return max(self.vit.width // 64, 1)

    def check(self) -> None:
        """Raises UserError for an invalid field, and names it."""
        bounds.check_fields('model', self)
        self.vit.check()
        if self.vit.width % self.num_heads:
            raise UserError(
                f'model.width {self.vit.width} is not divisible by {self.num_heads} heads of 64 '
                'channels in the decoder'
            )

    def flops(self, image_shape: tuple[int, ...]) -> int:
        """FLOPs of a forward pass over one image, counted as `Vit.flops` does."""
        h, w = self.vit.grid(image_shape)
        n, k, width = h * w, self.num_classes, self.vit.width
        adds = self.depth * block_adds(n + k, width, 8 * width**2)
        adds += n * width**2 + (n + k) * width**2 + n * k * width
        return self.vit.flops(image_shape) + 2 * adds

    @nn.compact
    @interface.at_precision
    def __call__(
        self, images: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes (class logits, named intermediates) of images [B, H, W, C]; see the class.

        `train` says whether dropout and stochastic depth are on.
        """
        self.check()
        out = self.vit(images, train=train)[1]
        x, dtype, width = out['encoded'], self.vit.dtype, self.vit.width
        (b, n, _), (h, w) = x.shape, self.vit.grid(images.shape[1:])
        init = nn.initializers.truncated_normal(0.02)
        x = nn.Dense(width, kernel_init=init, dtype=dtype, name='decoder_embedding')(x)
        tokens = self.param('class_tokens', init, (1, self.num_classes, width)).astype(dtype)
        x = shard_batch(jnp.concatenate([jnp.tile(tokens, (b, 1, 1)), x], axis=1))
        scan = self.is_initializing() or self.vit.remat != 'none'
        blocks = memory.stacked(block.Block, self.depth, self.vit.unroll, scan, self.vit.remat)(
            self.num_heads, 4 * width, gelu='exact', epsilon=EPSILON, dropout=self.dropout,
            attention_dropout=self.dropout, attention=self.vit.attention, dtype=dtype,
            matmul_dtype=self.vit.product_dtype, quantize=self.vit.quantize,
            deterministic=not train, name='decoder',
        )  # fmt: skip
        x, _ = blocks(x, jnp.zeros(self.depth))
        x = layers.norm('layer', EPSILON, dtype, 'decoder_norm')(x)
        classes, patches = x[:, :-n], x[:, -n:]
        projected = nn.initializers.normal(width**-0.5)
        classes, patches = (
            unit(nn.Dense(width, False, dtype, kernel_init=projected, name=f'{name}_projection')(y))
            for name, y in (('class', classes), ('patch', patches))
        )
        logits = shard_batch(jnp.einsum('bnd,bkd->bnk', patches, classes))
        logits = layers.norm('layer', EPSILON, jnp.float32, 'mask_norm')(logits)
        return logits.reshape(b, h, w, -1), {'encoded': out['encoded']}


def unit(x: jax.Array) -> jax.Array:
    """Vectors x [..., D] scaled to unit length."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), TINY))


def around_encoder(model: vit.Vit, **fields: Any) -> Segmenter:
    """The Segmenter of these fields around a ViT."""
    return Segmenter(encoder_of(model, 'a segmenter'), **fields)
