"""Mixup and CutMix of a batch, on the device.

Each example is mixed with its partner: the one before it in the batch, and for the first one the
last (as in big_vision). Neighbours in a shuffled batch are unrelated, and of a batch split over
devices only one example per device crosses to the next. Indices are those of the global batch, so
the result does not depend on the number of devices. If examples are repeated in succession, `shift`
is the distance from an example to its partner.
"""

from typing import Literal

import jax
import jax.numpy as jnp


def mix(
    images: jax.Array, labels: jax.Array, key: jax.Array, *, mixup: float = 0.0,
    cutmix: float = 0.0, by: Literal['batch', 'example'] = 'batch', shift: int = 1,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Mixes images [B, H, W, C] and label weights [B, K] with those of their partners; float32.

    `mixup` and `cutmix` are the alphas of Beta(alpha, alpha); 0 turns one of them off. With both,
    each is taken with probability 1/2. Random numbers are drawn once for the batch, or for each
    example with by='example'. An example is not changed if its mask or its partner's is 0.

    Mixup (arXiv:1710.09412) gives the partner the weight min(lambda, 1 - lambda), so the example
    itself always has the larger one; as partners are symmetric, the distribution of mixtures is the
    same.
    """
    count = images.shape[0] if by == 'example' else 1
    choice, weight_key, centre_key = jax.random.split(key, 3)
    # with both, each has probability 1/2, as in timm
    cut = jax.random.bernoulli(choice, 0.5 if mixup and cutmix else float(cutmix > 0), (count,))
    alpha = jnp.where(cut, cutmix, mixup)
    weight = jax.random.beta(weight_key, alpha, alpha, (count,))
    share = jnp.minimum(weight, 1 - weight)  # [N], N = B or 1
    area = share[:, None, None, None]
    if cutmix:
        box, box_share = box_mask(centre_key, 1 - weight, images.shape[1:3])
        area = jnp.where(cut[:, None, None, None], box, area)  # [N, H, W, 1]
        share = jnp.where(cut, box_share, share)
    if mask is not None:
        both = (mask * partners(mask, shift) > 0).astype(jnp.float32)  # [B]
        area, share = area * both[:, None, None, None], share * both
    share = share[:, None]
    images, labels = images.astype(jnp.float32), labels.astype(jnp.float32)
    images = (1 - area) * images + area * partners(images, shift)
    return images, (1 - share) * labels + share * partners(labels, shift)


def partners(x: jax.Array, shift: int) -> jax.Array:
    """Values [B, ...] of each example's partner, which is `shift` places before it."""
    return jnp.roll(x, shift, axis=0)


def box_mask(
    key: jax.Array, area: jax.Array, size: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """CutMix (arXiv:1905.04899): (1 inside the partner's box [N, H, W, 1], share of the image [N]).

    `area` [N] is the share of the box before clipping, `size` (H, W). The sides of the box are
    sqrt(area) times those of the image, truncated to even numbers of pixels as in the paper's code,
    around a pixel that is uniform over the image. The box is clipped to the image, and the share is
    that of the clipped box.
    """
    extent = jnp.array(size)
    half = (jnp.sqrt(area)[:, None] * extent).astype(jnp.int32) // 2  # [N, 2]
    centre = jax.random.randint(key, (len(area), 2), 0, extent)
    low, high = jnp.maximum(centre - half, 0), jnp.minimum(centre + half, extent)
    share = jnp.prod(high - low, axis=1) / (size[0] * size[1])
    rows, columns = (
        (jnp.arange(size[i]) >= low[:, i, None]) & (jnp.arange(size[i]) < high[:, i, None])
        for i in range(2)
    )
    box = rows[:, :, None, None] & columns[:, None, :, None]
    return box.astype(jnp.float32), share
