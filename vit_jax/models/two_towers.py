"""Two towers, of images and of texts, into one space (arXiv:2103.00020, arXiv:2303.15343).

Shapes: B batch, H W image, C channels, L tokens of a text, E dimensions of the space.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.io import bounds
from vit_jax.io.bounds import Finite, Positive
from vit_jax.models import interface, text, vit
from vit_jax.models.around import TakesImages


class TwoTowers(TakesImages, nn.Module):
    """Images [B, H, W, C] and token ids [B, L] to (logits [B, B], intermediates).

    The logits are of image (row) by text (column), float32: temperature times the product of the
    embeddings, plus the bias. Without images or without texts they are None. The intermediates are:

    image_embedding, text_embedding  [B, E]  outputs of the towers at unit length, float32
    temperature                      []      what products of embeddings are multiplied by
    bias                             []      what is added to them; 0 of a model without
    image, text                              intermediates of the towers, by name

    Parameters of the towers are in the subtrees `image` and `text`, beside `temperature` [], its
    logarithm, and `bias` []. `temperature_max` bounds the temperature, whose logarithm then has no
    gradient above that. CLIP's is at most 100 in training alone (arXiv:2103.00020 section 2.5;
    OpenCLIP open_clip_train/train.py clamps the parameter after each update), so that no model has
    the bound that is loaded from a file.
    """

    image: vit.Vit
    text: text.Text
    use_bias: bool = True  # whether a bias is learnt, as for the sigmoid loss
    temperature_init: Positive[float] = 10.0  # arXiv:2303.15343 section 3.2; 1 / 0.07 for CLIP
    bias_init: Finite[float] = -10.0  # likewise
    temperature_max: Positive[float] | None = None  # 100 for CLIP; None: none
    metadata: interface.Metadata | None = interface.metadata()  # set by vit_jax.load

    captures = vit.Vit.captures

    @property
    def vit(self) -> vit.Vit:
        """The tower of images."""
        return self.image

    def check(self) -> None:
        """Raises UserError for an invalid field, and names it."""
        bounds.check_fields('towers', self)
        self.image.check()
        self.text.check()
        sizes = [output_size(tower) for tower in (self.image, self.text)]
        for name in ('image', 'text'):
            if getattr(self, name).pool == 'none':
                raise UserError(f"{name}.pool is 'none', which gives no vector of the whole {name}")
        if sizes[0] != sizes[1]:
            raise UserError(
                f'the image tower gives vectors of {sizes[0]}, the text tower of {sizes[1]}; '
                'num_classes is the output of either (None: its width)'
            )

    def flops(self, image_shape: tuple[int, ...], length: int | None = None) -> int:
        """FLOPs of a forward pass over one image and one text, counted as `Vit.flops` does."""
        return self.image.flops(image_shape) + self.text.flops(length)

    @nn.compact
    @interface.at_precision
    def __call__(
        self,
        images: jax.Array | None,
        tokens: jax.Array | None,
        *,
        train: bool = False,
        capture: str | tuple[str, ...] = (),
    ) -> tuple[jax.Array | None, dict[str, Any]]:
        """Computes (logits, named intermediates) of images and token ids; see the class.

        `train` says whether dropout and stochastic depth are on; `capture` names intermediates of
        both towers.
        """
        self.check()
        if self.is_initializing() and (images is None or tokens is None):
            raise UserError('parameters of two towers are made of images and tokens, not of one')
        capture = interface.captures(capture, self.captures)
        out = {}
        for name, tower, inputs in (
            ('image', self.image, images), ('text', self.text, tokens),
        ):  # fmt: skip
            if inputs is not None:
                x, out[name] = tower(inputs, train=train, capture=capture)
                out[f'{name}_embedding'] = unit_length(x)
        scalar = nn.initializers.constant
        log = self.param('temperature', scalar(math.log(self.temperature_init)), ())
        if self.temperature_max is not None:
            log = jnp.minimum(log, math.log(self.temperature_max))
        out['temperature'] = jnp.exp(log)
        out['bias'] = jnp.zeros(())
        if self.use_bias:
            out['bias'] = self.param('bias', scalar(self.bias_init), ())
        if images is None or tokens is None:
            return None, out
        products = out['image_embedding'] @ out['text_embedding'].T
        return out['temperature'] * products + out['bias'], out


def output_size(tower: vit.Vit | text.Text) -> int:
    """Size of the vector that a tower gives."""
    pooled = tower.width * (2 if tower.pool == 'cls_gap' else 1)
    return tower.num_classes or getattr(tower, 'representation_size', None) or pooled


def unit_length(x: jax.Array) -> jax.Array:
    """Vectors [B, E] at unit length, in float32; zeros stay, with a gradient that is finite."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def build_towers(image: vit.Vit, text_fields: Any, **fields: Any) -> TwoTowers:
    """The two towers of a ViT and a text tower, checked.

    Args:
      image: the image tower. Without a head (num_classes None) its pooled tokens are the embedding.
      text_fields: a `text.Text`, or a section {field: value} of it. Without `num_classes` the text
        tower has a projection to the dimensions of the image tower's output.
      **fields: further fields of `TwoTowers`.

    Heads are projections here, which start from a deviation of width^-0.5: of zeros, no embedding
    would have a direction. Raises UserError for an invalid field.
    """
    tower = text.of_fields(text_fields)
    if tower.num_classes is None and not isinstance(text_fields, text.Text):
        tower = tower.clone(num_classes=output_size(image))
    towers = [t.clone(head_std=None) if t.head_std == 0 else t for t in (image, tower)]
    model = TwoTowers(*towers, **fields)
    model.check()
    return model
