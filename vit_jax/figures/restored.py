"""Draws what a masked autoencoder sees of images and what it makes of them.

Nothing in these two pictures depends on a hidden pixel. A model of normalised patches does not
predict the mean and deviation of a patch; for hidden patches these are guessed from the visible
ones, as their averages weighted by the inverse square of the distance.

Shapes: B images, H W pixels, N patches, P patch.
"""

import io
import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vit_jax.convert import load as weights
from vit_jax.data import files, tasks
from vit_jax.errors import UserError
from vit_jax.io import storage
from vit_jax.models import embedding, interface
from vit_jax.models.mae import Mae

GREY = 128  # of hidden patches
GAP = 8  # pixels of white between pictures


def write(
    path: os.PathLike,
    checkpoint: str,
    images: Sequence[str],
    *,
    hide: float,
    seed: int = 0,
    image_size: int | None = None,
    view: str | None = None,
    ema: bool | None = None,
) -> str:
    """Draws a row for each image: the image, what is seen of it, what is restored.

    Args:
      path: the PNG to write.
      checkpoint: as for vit_jax.load; UserError unless it is a masked autoencoder.
      images: paths or addresses of images.
      hide: share of the patches that are hidden.
      seed: decides which; each image has its own.
      image_size: pixels per side. None: that of the checkpoint.
      view: how an image is made square. None: that of the checkpoint.
      ema: whether to read the moving average of a run's parameters. None: if the run saved one.

    Returns:
      What was drawn, in a line.
    """
    found = weights.read(checkpoint, image_size=image_size, ema=ema, as_input=True, whole=True)
    if not isinstance(found.model, Mae):
        raise UserError(
            f'{checkpoint} is not a masked autoencoder with its decoder, so it restores nothing: '
            '--hide is for runs of objective mae, and ViTMAEForPreTraining of transformers'
        )
    model, size = found.model.clone(hide=hide), found.image_size
    resize = tasks.fixed_view(found.view if view is None else view, size)
    patches, rows = math.prod(model.grid(size)), []
    count = model.visible_count(patches)
    for i, image in enumerate(images):
        pixels = files.pixels(image, resize)
        noise = jax.random.uniform(jax.random.fold_in(jax.random.key(seed), i), (1, patches))
        pictures = restore(model, found.params, pixels[None], noise)
        rows.append((pixels, *(np.asarray(x[0]) for x in pictures)))
    draw(path, rows)
    guess = '; mean and deviation of hidden patches are guessed from visible ones'
    return f'image, {count} of {patches} patches, restored{guess if model.normalised else ""}'


@partial(jax.jit, static_argnums=0)
@interface.at_precision
def restore(
    model: Mae, params: Any, images: jax.Array, noise: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(images with grey hidden patches, images with predicted ones), both uint8 [B, H, W, 3].

    Args:
      model: masked autoencoder.
      params: its parameters.
      images: uint8 [B, H, W, 3].
      noise: [B, N]; patches of the largest noise are hidden.
    """
    grid, patch = model.grid(images.shape[1:]), model.vit.patch_size
    count = model.visible_count(noise.shape[1])
    rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    hidden = (rank >= count)[:, :, None]  # [B, N, 1]
    seen = jnp.where(hidden, GREY, embedding.cut(images, patch)).astype(jnp.uint8)
    blind = embedding.joined(seen, grid, patch)
    prediction, _ = model.apply({'params': params}, model.normalise(blind), noise=noise)
    prediction = prediction.astype(jnp.float32)
    if model.normalised:
        visible = embedding.cut(model.normalise(blind), patch)
        deviation = jnp.sqrt(visible.var(-1, ddof=1) + 1e-6)
        weights = closeness(grid) * (rank < count)[:, None]  # [B, N, N]
        mean, deviation = (
            jnp.einsum('bnm,bm->bn', weights, x) / weights.sum(-1)
            for x in (visible.mean(-1), deviation)
        )
        prediction = prediction * deviation[..., None] + mean[..., None]
    pixels = embedding.joined(prediction, grid, patch) * jnp.asarray(model.std)
    pixels = jnp.round(255 * jnp.clip(pixels + jnp.asarray(model.mean), 0, 1)).astype(jnp.uint8)
    restored = jnp.where(hidden, embedding.cut(pixels, patch), seen)
    return blind, embedding.joined(restored, grid, patch)


def closeness(grid: tuple[int, int]) -> jax.Array:
    """Inverse squares of the distances of patches [N, N], and 1 of a patch to itself."""
    y, x = (a.reshape(-1) for a in jnp.mgrid[: grid[0], : grid[1]])
    distance = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    return 1 / jnp.maximum(distance, 1)


def draw(path: os.PathLike, rows: Sequence[Sequence[np.ndarray]]) -> None:
    """Writes rows of pictures, uint8 [H, W, 3] and of one size, as a PNG."""
    h, w = rows[0][0].shape[:2]
    sheet = np.full(
        (len(rows) * (h + GAP) - GAP, len(rows[0]) * (w + GAP) - GAP, 3), 255, np.uint8
    )
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            y, x = i * (h + GAP), j * (w + GAP)
            sheet[y : y + h, x : x + w] = picture
    png = io.BytesIO()
    Image.fromarray(sheet).save(png, format='PNG')
    storage.write(path, png.getvalue())
