"""Masked autoencoding (arXiv:2111.06377): most patches are hidden, and their pixels are restored.

A batch is {image: uint8 [B, H, W, C], mask: [B]}. Shapes: N patches of h w, P * P * C pixels each.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.io.bounds import Positive, Rate
from vit_jax.models import embedding
from vit_jax.models.mae import RULES, around_encoder
from vit_jax.models.vit import Vit
from vit_jax.objectives import Examples, Objective, headless, masked_mean, targets

NOISE = 0x6D6165  # folded into the key for what is hidden; dropout uses the key itself
METRICS = {'loss': 'min'}
BLOCKS = 64  # drawn for 'block', of which the first that are needed count


def mae(
    model: Vit,
    examples: Examples,
    *,
    hide: Rate = 0.75,
    sampling: Literal['random', 'block', 'grid'] = 'random',
    normalise: bool = True,
    mask_tokens: Literal['decoder', 'encoder'] = 'decoder',
    decoder_width: Positive[int] = 512,
    decoder_depth: Positive[int] = 8,
    decoder_heads: Positive[int] = 16,
    decoder_mlp_dim: Positive[int] | None = None,
) -> Objective:
    """Trains the ViT as encoder of a masked autoencoder.

    Its parameters are in the subtree `vit`, beside those of the decoder. The loss is the mean
    squared error of the pixels of hidden patches. Evaluations read the ViT's outputs for whole
    images.

    Args:
      model: ViT, as `models.build` makes it; the head is left out.
      examples: the training examples, with `image` [H, W, C] in the spec.
      hide: share of the patches that are hidden. N (1 - hide), rounded down, stay visible.
      sampling: which patches are hidden: any, blocks of neighbours as in arXiv:2106.08254
        algorithm 1, or all but the first of each cell of 2 x 2 patches (figure 6). Grids hide other
        shares than 0.75 by more patches at random, or by fewer.
      normalise: whether each patch to restore has mean 0 and variance 1 (section 3), or the scale
        of the normalised image.
      mask_tokens: whether the decoder alone reads them, or the encoder, too, which then reads all
        patches (table 1c).
      decoder_width: size of a token in the decoder.
      decoder_depth: number of blocks of the decoder.
      decoder_heads: attention heads of each.
      decoder_mlp_dim: hidden size of the decoder's MLPs. None: four times its width.
    """
    model = headless(model, examples, 'mae')
    net = around_encoder(
        model, hide=hide, normalised=normalise, mask_tokens=mask_tokens,
        decoder_width=decoder_width, decoder_depth=decoder_depth, decoder_heads=decoder_heads,
        decoder_mlp_dim=decoder_mlp_dim,
    )  # fmt: skip
    shape = examples.spec['image'].shape
    grid = net.grid(shape)
    net.check()
    if net.visible_count(grid[0] * grid[1]) == grid[0] * grid[1]:
        raise UserError(
            f'objective.hide is {hide:g}, which hides none of {grid[0] * grid[1]} patches'
        )

    def init(key):
        return net.init(key, jnp.zeros((1, *shape)))['params']

    def loss(params, extra, frozen, batch, key, step):
        images = net.normalise(batch['image'])
        noise = draw_noise(jax.random.fold_in(key, NOISE), len(images), grid, sampling)
        prediction, out = net.apply(
            {'params': params}, images, noise=noise, train=True, rngs={'dropout': key}
        )
        wanted = patch_targets(images, model.patch_size, normalise)
        errors = hidden_error(prediction, wanted, out['mask'])
        mean = masked_mean(errors, batch['mask'].astype(jnp.float32))
        return mean, ({'loss': mean}, {})

    def predict(params, batch):
        return model.apply({'params': params['vit']}, model.normalise(batch['image']))[1]

    return Objective(init, loss, predict, rules=RULES, flops=net.flops(shape))


def patch_targets(
    images: jax.Array, patch_size: tuple[int, int], normalise: bool
) -> jax.Array:
    """What is to be restored of normalised images [B, H, W, C]: [B, N, P * P * C].

    With `normalise`, each patch has mean 0 and unbiased variance 1, as in the authors' code.
    """
    patches = embedding.cut(images, patch_size)
    return targets.normalised(patches) if normalise else patches


def hidden_error(prediction: jax.Array, wanted: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean squared error of each example [B] over its hidden patches, where mask [B, N] is 1."""
    errors = jnp.mean((prediction.astype(jnp.float32) - wanted) ** 2, axis=-1)  # [B, N]
    return jnp.sum(errors * mask, axis=1) / jnp.sum(mask, axis=1)


def draw_noise(
    key: jax.Array, count: int, grid: tuple[int, int], sampling: str = 'random'
) -> jax.Array:
    """Noise [B, N] of `count` images, whose largest values are hidden; `sampling` as in `mae`.

    It is a function of the key and its shape, so it does not depend on the devices.
    """
    h, w = grid
    noise = jax.random.uniform(key, (count, h * w))
    if sampling == 'grid':
        y, x = jnp.mgrid[:h, :w]
        noise += ((y % 2 + x % 2) > 0).reshape(-1)
    if sampling == 'block':
        noise -= first_block(jax.random.fold_in(key, 1), count, grid)
    return noise


def first_block(key: jax.Array, count: int, grid: tuple[int, int]) -> jax.Array:
    """Number of the first of BLOCKS random blocks that covers each patch, [B, N]; BLOCKS if none.

    Area and aspect ratio of a block are those of arXiv:2106.08254 algorithm 1: uniform from 16
    patches (on 14 x 14; in proportion on other grids) to 0.4 N; log-uniform from 0.3 to 1 / 0.3.
    """
    h, w = grid
    area, aspect, top, left = jax.random.uniform(key, (4, count, BLOCKS, 1))
    area = h * w * (16 / 196 + area * (0.4 - 16 / 196))
    aspect = jnp.exp((2 * aspect - 1) * jnp.log(1 / 0.3))
    tall = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 1, h)
    wide = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 1, w)
    top, left = jnp.floor(top * (h - tall + 1)), jnp.floor(left * (w - wide + 1))
    y, x = (a.reshape(-1) for a in jnp.mgrid[:h, :w])
    covered = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)  # [B, BLOCKS, N]
    return jnp.where(covered.any(1), jnp.argmax(covered, axis=1), BLOCKS)
