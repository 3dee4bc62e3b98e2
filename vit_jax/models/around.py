"""What models around a plain ViT have in common: the encoder and how it takes images."""

import flax.linen as nn
import jax

from vit_jax.errors import UserError
from vit_jax.models import vit


class TakesImages:
    """How a model takes images, of one that has a ViT as `vit`."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel of images in [0, 1]."""
        return self.vit.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel of images in [0, 1]."""
        return self.vit.std

    @property
    def stride(self) -> tuple[int, int]:
        """Pixels from one patch to the next: (vertical, horizontal)."""
        return self.vit.stride

    def grid(self, image_shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of patches of an image [H, W, ...]; raises UserError if not whole."""
        return self.vit.grid(image_shape)

    def normalise(self, images: jax.Array) -> jax.Array:
        """Normalises images, uint8 [B, H, W, C], to the floats that this model takes."""
        return self.vit.normalise(images)


class AroundVit(TakesImages, nn.Module):
    """A model whose encoder is a ViT without a head, its parameters in the subtree `vit`."""

    vit: vit.Vit  # the encoder, as `encoder_of` returns it


def encoder_of(model: vit.Vit, method: str = 'a masked autoencoder') -> vit.Vit:
    """The encoder of a model around it, from a ViT: no head, its output that of all tokens.

    Parameters are the same. Raises UserError for a ViT with parameters or norms after its tokens,
    and names the `method`.
    """
    if model.pool == 'map' or model.last_norm != 'tokens':
        field = 'pool' if model.pool == 'map' else 'last_norm'
        raise UserError(
            f'model.{field} is {getattr(model, field)!r}, which {method} does not train; '
            "model.pool is 'cls' or 'gap', model.last_norm 'tokens'"
        )
    cls = 'cls' in model.prefix
    return model.clone(
        pool='none', cls_token=cls, num_classes=None, representation_size=None, dist_head=False
    )
