"""A linear segmenter: batch norm and a class for each patch, on a plain ViT (arXiv:2304.07193).

Shapes: B batch, H W image, C channels, h w grid of patches, N patches, D width, K classes.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.io import bounds
from vit_jax.io.bounds import Positive
from vit_jax.models import interface, vit
from vit_jax.models.around import AroundVit, encoder_of

FIRST = 0.01  # deviation of the head's first weights (facebookresearch/dinov2 linear_head.py)
WITHOUT_NORM = 0.02  # and without batch norm, truncated (rstrudel/segmenter model/utils.py)


class PatchClassifier(AroundVit):
    """Images [B, H, W, C], normalised floats, to (class logits [B, h, w, K], intermediates).

    Batch norm has a scale and a bias alone: those of training are by its batches, and its moving
    averages are multiplied into these afterwards, see `objectives.segment`. The intermediate is
    `encoded` [B, N, D], patches after the encoder's last norm. Of several `blocks` the head reads
    the patches of each after that norm, side by side.

    Parameters of the encoder are in the subtree `vit`.
    """

    num_classes: Positive[int]  # K
    blocks: Positive[int] = 1  # number of the last blocks whose patches the head reads
    batch_norm: bool = True  # whether there is batch norm before the linear layer
    metadata: interface.Metadata | None = interface.metadata()  # set by vit_jax.load

    def check(self) -> None:
        """Raises UserError for an invalid field, and names it."""
        bounds.check_fields('model', self)
        self.vit.check()
        if self.blocks > self.vit.depth:
            raise UserError(f'objective.blocks is {self.blocks}, above {self.vit.depth} blocks')

    @property
    def features(self) -> int:
        """Number of channels that the head reads."""
        return self.blocks * self.vit.width

    def flops(self, image_shape: tuple[int, ...]) -> int:
        """FLOPs of a forward pass over one image, counted as `Vit.flops` does."""
        h, w = self.grid(image_shape)
        return self.vit.flops(image_shape) + 2 * h * w * self.features * self.num_classes

    @nn.compact
    @interface.at_precision
    def __call__(
        self, images: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes (class logits, named intermediates) of images [B, H, W, C]; see the class.

        `train` says whether dropout and stochastic depth are on.
        """
        self.check()
        capture = ('normed_by_block',) if self.blocks > 1 else ()
        out = self.vit(images, train=train, capture=capture)[1]
        params = {'head': Linear(self.features, self.num_classes, self.batch_norm, name='head')()}
        if self.batch_norm:
            params['batch_norm'] = Affine(self.features, name='batch_norm')()
        logits = logits_of(params, patches_of(out, self.blocks))
        return logits.reshape(-1, *self.grid(images.shape[1:]), self.num_classes), {
            'encoded': out['encoded']
        }


class Affine(nn.Module):
    """A scale and a bias for each channel."""

    width: int

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        return {
            'scale': self.param('scale', nn.initializers.ones, (self.width,)),
            'bias': self.param('bias', nn.initializers.zeros, (self.width,)),
        }


class Linear(nn.Module):
    """The parameters of a linear layer."""

    inputs: int
    outputs: int
    normed: bool  # whether its inputs have passed batch norm

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        plain = nn.initializers.truncated_normal(WITHOUT_NORM)
        init = nn.initializers.normal(FIRST) if self.normed else plain
        return {
            'kernel': self.param('kernel', init, (self.inputs, self.outputs)),
            'bias': self.param('bias', nn.initializers.zeros, (self.outputs,)),
        }


def patches_of(out: Mapping[str, jax.Array], blocks: int) -> jax.Array:
    """Patches of the last blocks after the last norm, side by side: float32 [B, N, blocks * D].

    `out` are the intermediates of a ViT, `normed_by_block` among them unless `blocks` is 1.
    """
    encoded = out['encoded'].astype(jnp.float32)
    if blocks == 1:
        return encoded
    tokens = out['normed_by_block'][-blocks:].astype(jnp.float32)  # [n, B, T, D]
    tokens = tokens[:, :, tokens.shape[2] - encoded.shape[1] :]
    return jnp.concatenate(list(tokens), axis=-1)


def logits_of(params: Mapping[str, Any], patches: jax.Array) -> jax.Array:
    """Class logits [B, N, K] of patches [B, N, F], float32, by `head` and, if any, `batch_norm`."""
    if 'batch_norm' in params:
        patches = patches * params['batch_norm']['scale'] + params['batch_norm']['bias']
    return patches @ params['head']['kernel'] + params['head']['bias']


def around_encoder(model: vit.Vit, **fields: Any) -> PatchClassifier:
    """The linear segmenter of these fields around a ViT."""
    return PatchClassifier(encoder_of(model, 'a segmenter'), **fields)
