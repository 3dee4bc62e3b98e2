"""The masked autoencoder (arXiv:2111.06377): a ViT reads a few patches, a decoder restores all.

Shapes: B batch, H W image, C channels, P patch, N patches, V visible patches, T tokens that the
encoder reads (class token and visible patches), D width of the encoder, W that of the decoder.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError
from vit_jax.io import bounds
from vit_jax.io.bounds import Positive, Rate
from vit_jax.models import block, embedding, interface, layers, memory, vit
from vit_jax.models.around import AroundVit, encoder_of
from vit_jax.models.flops import block_adds, vit_flops
from vit_jax.models.memory import shard_batch

# Sharding of the decoder's own parameters, as rows of models.parameters.RULES.
RULES = (
    (r'decoder_(embedding|head)/kernel', P('fsdp', None)),  # [D, W] and [W, P * P * C]
    (r'mask_token|decoder_posemb', P()),
)
FIELDS = ('hide', 'normalised')  # that may change without a change of the parameters


class Mae(AroundVit):
    """Images [B, H, W, C], normalised floats, to (predicted patches, named intermediates).

    Of each image the patches of least noise are visible. The encoder reads these alone; the decoder
    reads its output, a mask token in place of each other patch, and fixed positions. The prediction
    [B, N, P * P * C] is of all patches, rows first, channels last. The intermediates are:

    mask     [B, N]     1 where a patch is hidden, 0 where it is visible
    visible  [B, T, D]  the encoder's output after its last norm: class token, then visible
                        patches, those of least noise first

    With `mask_tokens` 'encoder' it reads a mask token in place of each hidden patch (table 1c), and
    its output, which is then of all patches in their places, is what the decoder reads.

    Parameters of the encoder are in the subtree `vit`. Raises UserError for a share of hidden
    patches that leaves none visible.
    """

    decoder_width: Positive[int] = 512  # size of a token in the decoder
    decoder_depth: Positive[int] = 8  # number of its blocks
    decoder_heads: Positive[int] = 16  # attention heads of each
    decoder_mlp_dim: Positive[int] | None = None  # hidden size of its MLPs; None: 4 times its width
    # positions in the decoder: fixed, or a table with a row for each prefix token and patch
    decoder_posemb: Literal['sincos2d_moco', 'learn'] = 'sincos2d_moco'
    mask_tokens: Literal['decoder', 'encoder'] = 'decoder'  # which of them reads mask tokens first
    hide: Rate = 0.75  # share of patches that are hidden; N (1 - hide), rounded down, are visible
    normalised: bool = True  # each predicted patch has been trained to have mean 0 and variance 1
    metadata: interface.Metadata | None = interface.metadata()  # set by vit_jax.load

    @property
    def mlp_dim(self) -> int:
        """Hidden size of the decoder's MLPs."""
        return self.decoder_mlp_dim or 4 * self.decoder_width

    def check(self) -> None:
        """Raises UserError for an invalid field, and names it."""
        bounds.check_fields('model', self)
        self.vit.check()
        if self.decoder_width % self.decoder_heads:
            raise UserError(
                f'the decoder width {self.decoder_width} is not divisible by its number of heads, '
                f'{self.decoder_heads}'
            )
        if self.decoder_posemb in embedding.FIXED and self.decoder_width % 4:
            raise UserError(f'the decoder width {self.decoder_width} is not divisible by 4')

    def visible_count(self, patches: int) -> int:
        """Number of visible patches V of N: N (1 - hide), rounded down; UserError if it is 0."""
        count = int(patches * (1 - self.hide))
        if not count:
            raise UserError(f'hide is {self.hide:g}: none of {patches} patches would be visible')
        return count

    def flops(self, image_shape: tuple[int, ...]) -> int:
        """FLOPs of a forward pass over one image, counted as `Vit.flops` does."""
        h, w = self.grid(image_shape)
        visible, prefix = self.visible_count(h * w), sum(self.vit.prefix.values())
        visible = h * w if self.mask_tokens == 'encoder' else visible
        width, tokens = self.decoder_width, h * w + prefix
        pixels = self.stride[0] * self.stride[1] * image_shape[-1]
        adds = (visible + prefix) * self.vit.width * width + tokens * width * pixels
        adds += self.decoder_depth * block_adds(tokens, width, 2 * width * self.mlp_dim)
        return vit_flops(self.vit, image_shape, visible) + 2 * adds

    @nn.compact
    @interface.at_precision
    def __call__(
        self, images: jax.Array, *, noise: jax.Array | None = None, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes (prediction, named intermediates) of images [B, H, W, C]; see the class.

        Args:
          images: normalised floats.
          noise: [B, N]; argsort of it is the order of the patches, of which the first are visible.
            None: only to initialise parameters.
          train: whether dropout and stochastic depth of the encoder are on.
        """
        self.check()
        interface.check_images(images, len(self.mean))
        grid = self.grid(images.shape[1:])
        n = grid[0] * grid[1]
        if noise is None and self.is_initializing():
            noise = jnp.zeros((len(images), n))
        shape = None if noise is None else [*jnp.shape(noise)]
        if shape != [len(images), n]:
            raise UserError(
                f'noise is {shape}, not {[len(images), n]}: a number for each patch, of which the '
                'largest are hidden'
            )
        count = self.visible_count(n)
        order = shard_batch(jnp.argsort(noise, axis=1))
        rank = shard_batch(jnp.argsort(order, axis=1))  # of each patch in this order
        hidden, first = rank >= count, self.mask_tokens == 'encoder'
        size = self.vit.width if first else self.decoder_width
        token = self.param('mask_token', nn.initializers.normal(0.02), (1, 1, size))

        def masked(patches):
            return shard_batch(jnp.where(hidden[..., None], token.astype(patches.dtype), patches))

        read = dict(corrupt=masked) if first else dict(visible=order[:, :count])
        visible, _ = self.vit(images, train=train, **read)
        x = dense(self.decoder_width, self.vit.dtype, 'decoder_embedding')(visible)
        x = x if first else self.in_places(x, token, rank)
        return self.decode(x, grid, train), {'mask': hidden.astype(jnp.float32), 'visible': visible}

    def in_places(self, x: jax.Array, token: jax.Array, rank: jax.Array) -> jax.Array:
        """Inserts a token [1, 1, W] for each hidden patch: [B, T, W] to all N patches' places."""
        (b, n), before = rank.shape, sum(self.vit.prefix.values())
        hidden = jnp.tile(token.astype(x.dtype), (b, n + before - x.shape[1], 1))
        patches = shard_batch(jnp.concatenate([x[:, before:], hidden], axis=1))
        patches = shard_batch(jnp.take_along_axis(patches, rank[:, :, None], axis=1))
        return jnp.concatenate([x[:, :before], patches], axis=1)

    def decode(self, x: jax.Array, grid: tuple[int, int], train: bool) -> jax.Array:
        """Restores patches [B, N, P * P * C] from class token and all patches [B, T, W]."""
        dtype, before = self.vit.dtype, sum(self.vit.prefix.values())
        x = shard_batch(x + self.positions(grid, before).astype(dtype))
        scan = self.is_initializing() or self.vit.remat != 'none'
        style = block.Style(unbiased=self.vit.style.unbiased)
        blocks = memory.stacked(
            block.Block, self.decoder_depth, self.vit.unroll, scan, self.vit.remat
        )(
            self.decoder_heads, self.mlp_dim, style, gelu=self.vit.gelu, epsilon=self.vit.epsilon,
            attention=self.vit.attention, dtype=dtype, matmul_dtype=self.vit.product_dtype,
            quantize=self.vit.quantize, deterministic=not train, name='decoder',
        )  # fmt: skip
        x, _ = blocks(x, jnp.zeros(self.decoder_depth))
        x = layers.norm('layer', self.vit.epsilon, dtype, 'decoder_norm')(x[:, before:])
        pixels = self.stride[0] * self.stride[1] * len(self.mean)
        return shard_batch(dense(pixels, dtype, 'decoder_head')(x))

    def positions(self, grid: tuple[int, int], before: int) -> jax.Array:
        """Positions in the decoder, [1, T, W], of `before` prefix tokens and of all patches."""
        if self.decoder_posemb == 'learn':
            shape = (1, before + grid[0] * grid[1], self.decoder_width)
            return self.param('decoder_posemb', nn.initializers.normal(0.02), shape)
        table = embedding.fixed(self.decoder_posemb, *grid, self.decoder_width)
        return jnp.pad(table, ((0, 0), (before, 0), (0, 0)))


def dense(features: int, dtype: Any, name: str) -> nn.Dense:
    """Linear layer, within a module, initialised as all of arXiv:2111.06377 (table 8)."""
    init = nn.initializers.xavier_uniform()
    return nn.Dense(features, kernel_init=init, dtype=dtype, name=name)


def around_encoder(model: vit.Vit, **fields: Any) -> Mae:
    """The autoencoder of these fields around a ViT."""
    return Mae(encoder_of(model), **fields)
