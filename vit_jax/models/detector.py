"""YOLOS (arXiv:2106.00666): detection tokens beside the patches of a plain ViT, each one box.

Shapes: B batch, H W image, C channels, N patches, Q detection tokens, D width, L depth, K classes.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError
from vit_jax.io import bounds
from vit_jax.io.bounds import Positive
from vit_jax.models import interface, vit
from vit_jax.models.around import AroundVit, encoder_of
from vit_jax.models.memory import shard_batch

# Sharding of the parameters beside the encoder, as rows of models.parameters.RULES.
RULES = (
    (r'(class|box)_head/fc[123]/kernel', P('fsdp', None)),  # [D, D], [D, K + 1] and [D, 4]
    (r'detection(_posemb)?', P()),
)


class Detector(AroundVit):
    """Images [B, H, W, C], normalised floats, to (class logits [B, Q, K + 1], intermediates).

    The last class is that of no object. The intermediates are:

    logits   [B, Q, K + 1]  the class logits, float32
    boxes    [B, Q, 4]      centre x, y, width and height, in shares of the image's, float32
    encoded  [B, N, D]      patches after the last norm

    Blocks see detection tokens as they see registers. These have positions of their own:
    `detection_posemb` [1, Q, D] or, where a table is added before each block (`vit.posemb_at`
    'layers', the mid-position embeddings of the paper), [L, 1, Q, D]. Parameters of the encoder are
    in the subtree `vit`.
    """

    num_classes: Positive[int]  # K
    queries: Positive[int] = 100  # Q
    metadata: interface.Metadata | None = interface.metadata()  # set by vit_jax.load

    @property
    def in_tables(self) -> bool:
        """Whether positions of detection tokens are rows in the encoder's tables."""
        return self.vit.posemb == 'learn' and self.vit.posemb_at != 'stem'

    def check(self) -> None:
        """Raises UserError for an invalid field, and names it."""
        bounds.check_fields('model', self)
        self.vit.check()
        if self.vit.posemb == 'relative':
            raise UserError(
                "model.posemb 'relative' places tokens in a sequence, in which detection tokens "
                "have no place; 'learn' and the fixed ones place patches alone"
            )

    def flops(self, image_shape: tuple[int, ...]) -> int:
        """FLOPs of a forward pass over one image, counted as `Vit.flops` does."""
        width, outputs = self.vit.width, self.num_classes + 1 + 4
        heads = 2 * self.queries * (4 * width**2 + width * outputs)
        return self.with_queries().flops(image_shape) + heads

    def with_queries(self) -> vit.Vit:
        """The encoder with detection tokens as its last registers."""
        return self.vit.clone(registers=self.vit.registers + self.queries, parent=None, name=None)

    @nn.compact
    @interface.at_precision
    def __call__(
        self, images: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes (class logits, named intermediates) of images [B, H, W, C]; see the class.

        `train` says whether dropout and stochastic depth are on.
        """
        self.check()
        interface.check_images(images, len(self.mean))
        if self.is_initializing():
            self.vit(images)
        params = self.vit.variables['params']
        before = sum(self.vit.prefix_posemb.values())
        grid = self.grid(images.shape[1:])
        interface.check_size(images, grid, params, before)
        rngs = {'dropout': self.make_rng('dropout')} if train else {}
        joined = {'params': self.with_detection(params, before)}
        x, out = self.with_queries().apply(joined, images, train=train, rngs=rngs)  # [B, T, D]
        end = x.shape[1] - grid[0] * grid[1]
        x = x[:, end - self.queries : end]
        dtype = self.vit.dtype
        logits = Mlp(self.num_classes + 1, dtype, name='class_head')(x).astype(jnp.float32)
        boxes = nn.sigmoid(Mlp(4, dtype, name='box_head')(x).astype(jnp.float32))
        return logits, {'logits': logits, 'boxes': boxes, 'encoded': out['encoded']}

    def with_detection(self, params: Mapping[str, Any], before: int) -> dict[str, Any]:
        """Parameters of `with_queries`, of those of the encoder.

        `before` counts the rows of a table of positions before those of patches.
        """
        init = nn.initializers.truncated_normal(0.02)
        shape = (1, self.queries, self.vit.width)
        layers = self.in_tables and self.vit.posemb_at == 'layers'
        tokens = self.param('detection', init, shape)
        rows = self.param('detection_posemb', init, (self.vit.depth, *shape) if layers else shape)
        params = dict(params)
        if not self.in_tables:
            tokens, rows = tokens + rows, jnp.zeros_like(rows)
        if layers:
            table = inserted(params['encoder']['posemb'], rows, before)
            params['encoder'] = dict(params['encoder'], posemb=table)
        elif self.in_tables or 'registers' in self.vit.prefix_posemb:
            params['posemb'] = inserted(params['posemb'], rows, before)
        if 'registers' in params:
            tokens = jnp.concatenate([params['registers'], tokens], axis=1)
        return params | {'registers': tokens}


def inserted(table: jax.Array, rows: jax.Array, before: int) -> jax.Array:
    """A table [..., T, D] with `rows` [..., Q, D] after its first `before` ones."""
    return jnp.concatenate([table[..., :before, :], rows, table[..., before:, :]], axis=-2)


class Mlp(nn.Module):
    """Head of three layers with ReLU between them: [B, Q, D] -> [B, Q, outputs]."""

    outputs: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init, width = nn.initializers.xavier_uniform(), x.shape[-1]
        for i, features in enumerate((width, width, self.outputs), 1):
            x = nn.Dense(features, kernel_init=init, dtype=self.dtype, name=f'fc{i}')(x)
            x = shard_batch(nn.relu(x) if i < 3 else x)
        return x


def around_encoder(model: vit.Vit, **fields: Any) -> Detector:
    """The detector of these fields around a ViT."""
    return Detector(encoder_of(model, 'a detector'), **fields)
