"""Patches of sides that steps draw at random (FlexiViT, arXiv:2212.08013)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models import resizing
from vit_jax.models.vit import Vit


def predicted_side(sides: Sequence[int], given: int | None) -> int:
    """The side of the patches in predictions: the one that is `given`, else the median."""
    return given or sorted(set(sides))[len(set(sides)) // 2]


class Patches:
    """How a method applies a model whose patches have one of several sides.

    Attributes:
      drawn: sides in pixels, smallest first, of which each step has one; (None,) for the model's
        own patches.
      predicted: the side in predictions; None for the model's own.
    """

    def __init__(
        self, model: nn.Module, shape: Sequence[int], sides: tuple[int, ...], grid: int,
        predicted: int | None,
    ):  # fmt: skip
        """Raises UserError for a model or images that have no such patches.

        Args:
          model: its own patch size is that of the kernel that is resized.
          shape: [H, W, C] of an image.
          sides: sides in pixels. Empty: the model's own patches.
          grid: side of the table of positions that is resized.
          predicted: the side in predictions. None: the median of `sides`.
        """
        self.model, self.shape = model, tuple(shape)
        self.drawn, self.predicted, self.grid = (None,), predicted, None
        if not sides:
            if predicted is not None:
                raise UserError('objective.predict_side is for objective.patch_sides, which is ()')
            return
        self.drawn, self.grid = tuple(sorted(set(sides))), grid
        self.predicted = predicted_side(sides, predicted)
        if not isinstance(model, Vit) or model.resnet is not None or model.posemb == 'relative':
            raise UserError(
                'objective.patch_sides resizes the kernel of the patches and a table of positions '
                'before the blocks; the model has others'
            )
        for side in {*self.drawn, self.predicted}:
            model.clone(patch_size=(side, side)).grid(self.shape)

    def model_of(self, side: int | None) -> nn.Module:
        """The model with patches of a side."""
        return self.model if side is None else self.model.clone(patch_size=(side, side))

    def blank(self) -> jax.Array:
        """Images of zeros, for which the parameters are made."""
        if self.grid is None:
            return jnp.zeros((1, *self.shape))
        height, width = (self.grid * n for n in self.model.patch_size)
        return jnp.zeros((1, height, width, self.shape[-1]))

    def apply(
        self, params: Mapping[str, Any], images: jax.Array, side: int | None, **settings: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`model.apply` with patches of a side."""
        model = self.model
        if side is not None:
            model, params = resizing.with_patches(model, params, side, images.shape[1:])
        return model.apply({'params': params}, images, **settings)

    def variants(self, loss: Callable[[int | None], Callable]) -> dict[str, Any]:
        """The fields of an Objective for its loss, of which `loss` is a function of the side."""
        if self.drawn == (None,):
            return {'loss': loss(None)}
        losses = {side: loss(side) for side in self.drawn}
        return {'loss': losses[self.drawn[0]], 'variants': losses, 'variant': self.draw}

    def draw(self, seed: int, step: int) -> int:
        """The side of a step, each with the same probability."""
        return int(np.random.default_rng((seed, step)).choice(self.drawn))
