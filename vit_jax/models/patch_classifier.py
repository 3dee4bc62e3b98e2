"""A linear segmenter: batch norm and a class for each patch, on a plain ViT (arXiv:2304.07193).

Shapes: B batch, H W image, C channels, h w grid of patches, N patches, D width, K classes.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.io import bounds
from vit_jax.io.bounds import Positive
from vit_jax.models import interface, vit
from vit_jax.models.around import AroundVit, encoder_of

FIRST = 0.01  # deviation of the head's first weights (facebookresearch/dinov2 linear_head.py)


class PatchClassifier(AroundVit):
    """Images [B, H, W, C], normalised floats, to (class logits [B, h, w, K], intermediates).

    Batch norm has a scale and a bias alone: those of training are by its batches, and its moving
    averages are multiplied into these afterwards, see `objectives.segment`. The intermediate is
    `encoded` [B, N, D], patches after the encoder's last norm.

    Parameters of the encoder are in the subtree `vit`.
    """

    num_classes: Positive[int]  # K
    metadata: interface.Metadata | None = interface.metadata()  # set by vit_jax.load

    def check(self) -> None:
        """Raises UserError for an invalid field, and names it."""
        bounds.check_fields('model', self)
        self.vit.check()

    def flops(self, image_shape: tuple[int, ...]) -> int:
        """FLOPs of a forward pass over one image, counted as `Vit.flops` does."""
        h, w = self.grid(image_shape)
        return self.vit.flops(image_shape) + 2 * h * w * self.vit.width * self.num_classes

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes (class logits, named intermediates) of images [B, H, W, C]; see the class.

        `train` says whether dropout and stochastic depth are on.
        """
        self.check()
        encoded = self.vit(images, train=train)[1]['encoded']
        params = {
            'batch_norm': Affine(self.vit.width, name='batch_norm')(),
            'head': Linear(self.vit.width, self.num_classes, name='head')(),
        }
        logits = logits_of(params, encoded.astype(jnp.float32))
        return logits.reshape(-1, *self.grid(images.shape[1:]), self.num_classes), {
            'encoded': encoded
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

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        init = nn.initializers.normal(FIRST)
        return {
            'kernel': self.param('kernel', init, (self.inputs, self.outputs)),
            'bias': self.param('bias', nn.initializers.zeros, (self.outputs,)),
        }


def logits_of(params: Mapping[str, Any], patches: jax.Array) -> jax.Array:
    """Class logits [B, N, K] of patches [B, N, D], float32, by `batch_norm` and `head`."""
    patches = patches * params['batch_norm']['scale'] + params['batch_norm']['bias']
    return patches @ params['head']['kernel'] + params['head']['bias']


def around_encoder(model: vit.Vit, **fields: Any) -> PatchClassifier:
    """The linear segmenter of these fields around a ViT."""
    return PatchClassifier(encoder_of(model, 'a segmenter'), **fields)
