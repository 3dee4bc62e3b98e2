"""EoMT (arXiv:2503.19108): queries that join the last blocks of a plain ViT, each one mask.

Shapes: B batch, H W image, C channels, h w grid of patches, N patches, T tokens (those before the
patches, queries, patches), Q queries, D width, L depth, K classes.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError
from vit_jax.io import bounds
from vit_jax.io.bounds import Positive, Share
from vit_jax.models import block, encoder, interface, layers, memory, resizing, vit
from vit_jax.models.around import AroundVit, encoder_of
from vit_jax.models.flops import block_adds
from vit_jax.models.memory import shard_batch
from vit_jax.models.rotary import rotation

# Sharding of the parameters beside the encoder, as rows of models.parameters.RULES.
RULES = (
    (r'(class_head|mask_head/fc[123])/kernel', P('fsdp', None)),  # [D, K + 1] and [D, D]
    (r'upscale_\d+/larger/kernel', P(None, None, 'fsdp', None)),  # [2, 2, D, D]
    (r'upscale_\d+/spatial/kernel', P()),  # [3, 3, 1, D]
    (r'query', P()),
)
EPSILON = 1e-6  # of norms where features grow (tue-mps/eomt scale_block.py, as in timm)


class MaskClassifier(AroundVit):
    """Images [B, H, W, C], normalised floats, to (class logits [B, Q, K + 1], intermediates).

    The last class is that of no object. The intermediates, with y x the grid of patches, doubled
    `upscales` times:

    logits   [B, Q, K + 1]  the class logits, float32
    masks    [B, Q, y, x]   logits of masks, float32
    encoded  [B, N, D]      patches after the last norm
    logits_by_block, masks_by_block  [M, ...]  the same before each block that has masked attention
                                               (section 3.3), then after the last one

    In blocks with masked attention a query attends to the patches that its mask has there, or with
    the rest of the block's probability, drawn for each query, to all. Parameters of the encoder are
    in the subtree `vit`.
    """

    num_classes: Positive[int]  # K
    queries: Positive[int] = 100  # Q
    query_blocks: Positive[int] = 4  # blocks that queries pass, the last ones
    upscales: Positive[int] = 2  # how many times the grid of patches is doubled for masks
    # probability of masked attention in each of these blocks; (): in none, as after training
    masked: tuple[Share, ...] = ()
    metadata: interface.Metadata | None = interface.metadata()  # set by vit_jax.load

    def check(self) -> None:
        """Raises UserError for an invalid field, and names it."""
        bounds.check_fields('model', self)
        self.vit.check()
        if self.query_blocks >= self.vit.depth:
            raise UserError(
                f'queries pass the last {self.query_blocks} blocks, and the encoder has '
                f'{self.vit.depth}; at least one is to come before'
            )
        if len(self.masked) not in (0, self.query_blocks):
            raise UserError(
                f'masked is {self.masked}, not a probability for each of {self.query_blocks} blocks'
            )
        placed = {
            "model.posemb 'relative'": self.vit.posemb == 'relative',
            f'model.posemb_at {self.vit.posemb_at!r}': self.vit.posemb_at != 'stem',
            'model.style.bias': self.vit.style.bias is not None,
            'learnt frequencies of model.style.rope':
                self.vit.style.rotary is not None and self.vit.style.rotary.learnt,
        }  # fmt: skip
        for field in (name for name, given in placed.items() if given):
            raise UserError(f'{field} places tokens within the blocks, where queries have no place')

    def flops(self, image_shape: tuple[int, ...]) -> int:
        """FLOPs of a forward pass over one image, counted as `Vit.flops` does, without masking."""
        h, w = self.grid(image_shape)
        n, q, width = h * w, self.queries, self.vit.width
        mlp = (3 if self.vit.glu else 2) * width * self.vit.mlp_dim
        t = n + sum(self.vit.prefix.values())
        more = block_adds(t + q, width, mlp) - block_adds(t, width, mlp)
        adds = self.query_blocks * more + q * width * (3 * width + self.num_classes + 1)
        for i in range(self.upscales):
            adds += 4 ** (i + 1) * n * width * (width + 9)
        adds += 4**self.upscales * n * q * width
        return self.vit.flops(image_shape) + 2 * adds

    @nn.compact
    @interface.at_precision
    def __call__(
        self, images: jax.Array, *, train: bool = False, masked: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes (class logits, named intermediates) of images [B, H, W, C]; see the class.

        Args:
          images: normalised floats.
          train: whether dropout and stochastic depth are on.
          masked: probability of masked attention in each of `query_blocks`, in place of the field.
            Those other than 0 and 1 need an rng `mask`.
        """
        self.check()
        interface.check_images(images, len(self.mean))
        if self.is_initializing():
            self.vit(images)
        params, grid = self.vit.variables['params'], self.grid(images.shape[1:])
        interface.check_size(images, grid, params, sum(self.vit.prefix_posemb.values()))
        given = masked is not None
        shares = masked if given else self.masked or (0,) * self.query_blocks
        x = self.first_blocks(params, images, train)
        before = x.shape[1] - grid[0] * grid[1]
        query = self.param('query', nn.initializers.normal(1.0), (self.queries, self.vit.width))
        query = jnp.broadcast_to(query.astype(x.dtype), (len(x), *query.shape))
        x = shard_batch(jnp.concatenate([x[:, :before], query, x[:, before:]], axis=1))
        predict, made = self.mask_module(params['norm'], grid, before), []
        for i in range(self.query_blocks):
            attend = None
            if given or shares[i] > 0:
                made.append(predict(x)[:2])
                share = shares[i] if given or shares[i] < 1 else None
                attend = self.attend(made[-1][1], grid, before, share)
            x = self.last_block(params, i, x, attend, grid, train)
        logits, masks, encoded = predict(x)
        out = {'logits': logits, 'masks': masks, 'encoded': encoded}
        if made:
            made.append((logits, masks))
            both = zip(('logits_by_block', 'masks_by_block'), zip(*made, strict=True), strict=True)
            out |= {name: jnp.stack(arrays) for name, arrays in both}
        return logits, out

    def rates(self) -> jax.Array:
        """Rate of stochastic depth of each block, [L]."""
        first = 0 if self.vit.drop_path_rises else self.vit.drop_path
        return jnp.linspace(first, self.vit.drop_path, self.vit.depth)

    def first_blocks(
        self, params: Mapping[str, Any], images: jax.Array, train: bool
    ) -> jax.Array:
        """Tokens [B, T - Q, D] after the blocks that queries do not pass."""
        count = self.vit.depth - self.query_blocks
        rate = self.vit.drop_path
        if self.vit.drop_path_rises:
            rate *= (count - 1) / (self.vit.depth - 1)
        cut = self.vit.clone(depth=count, last_norm='none', drop_path=rate, parent=None, name=None)
        params = {name: x for name, x in params.items() if name != 'norm'}
        params['encoder'] = jax.tree.map(lambda x: x[:count], params['encoder'])
        rngs = {'dropout': self.make_rng('dropout')} if train else {}
        return cut.apply({'params': params}, images, train=train, rngs=rngs)[0]

    def last_block(
        self, params: Mapping[str, Any], i: int, x: jax.Array, attend: jax.Array | None,
        grid: tuple[int, int], train: bool,
    ) -> jax.Array:  # fmt: skip
        """Block i of those that queries pass, [B, T, D] -> [B, T, D]; `attend` is [B, Q, T]."""
        i += self.vit.depth - self.query_blocks
        one = jax.tree.map(lambda p: p[i], params['encoder'])
        rope, before = self.vit.style.rotary, x.shape[1] - grid[0] * grid[1]
        turned = rope and rotation(rope, grid, before, self.vit.width // self.vit.num_heads)
        kind = memory.recomputed(block.Block, self.vit.remat, False)
        module = kind(**encoder.fields_of_blocks(self.vit, grid, train), parent=None)
        rngs = {'dropout': self.make_rng('dropout')} if train else {}
        return module.apply(
            {'params': one}, x, self.rates()[i], None, turned, None, attend, rngs=rngs
        )[0]

    def mask_module(self, norm: Mapping[str, Any], grid: tuple[int, int], before: int) -> Any:
        """A function of x [B, T, D]: (class logits [B, Q, K + 1], masks [B, Q, y, x], patches).

        `norm` are parameters of the encoder's last norm, `before` counts the tokens before queries.
        With `remat`, all of it is computed again for the gradient: features of 4^upscales times the
        patches would be saved for each of the predictions.
        """
        style, dtype = self.vit.style, self.vit.dtype
        last = layers.norm(style.norm, self.vit.epsilon, dtype, None, parent=None)
        init = nn.initializers.xavier_uniform()
        classes = nn.Dense(self.num_classes + 1, kernel_init=init, dtype=dtype, name='class_head')
        head = MaskHead(self.vit.gelu, dtype, name='mask_head')
        larger = [Upscale(self.vit.gelu, dtype, name=f'upscale_{i}') for i in range(self.upscales)]

        def predict(run, norm, x):
            x = last.apply({'params': norm}, x)
            queries, patches = x[:, before : before + self.queries], x[:, before + self.queries :]
            logits = shard_batch(run(classes, queries)).astype(jnp.float32)
            y = patches.reshape(len(x), *grid, -1)
            for module in larger:
                y = run(module, y)
            masks = jnp.einsum('bqd,bhwd->bqhw', run(head, queries), y)
            return logits, shard_batch(masks.astype(jnp.float32)), patches

        if self.is_initializing() or self.vit.remat == 'none':
            return partial(predict, lambda module, x: module(x), norm)
        free = {module.name: module.clone(parent=None) for module in (classes, head, *larger)}

        def recompute(params, norm, x):
            return predict(
                lambda module, x: free[module.name].apply({'params': params[module.name]}, x),
                norm, x,
            )  # fmt: skip

        own = {name: self.variables['params'][name] for name in free}
        return partial(jax.checkpoint(recompute), own, norm)

    def attend(
        self, masks: jax.Array, grid: tuple[int, int], before: int, share: jax.Array | None
    ) -> jax.Array:
        """Where queries attend to, bool [B, Q, T]: to the patches in their masks and the others.

        Each query attends to all patches with probability 1 - `share`; None: never.
        """
        b, q, n = len(masks), self.queries, grid[0] * grid[1]
        small = resizing.maps(masks.transpose(0, 2, 3, 1), grid)  # [B, h, w, Q]
        patches = small.reshape(b, n, q).swapaxes(1, 2) > 0
        if share is not None and not self.is_initializing():
            if not self.has_rng('mask'):
                raise UserError(
                    f'masked is {self.masked}, a training that is not over; give masked=(0,) * '
                    f'{self.query_blocks}, or an rng `mask`'
                )
            drawn = jax.random.uniform(self.make_rng('mask'), (b, q, 1))
            patches = patches | (drawn > share)
        return jnp.pad(patches, ((0, 0), (0, 0), (before + q, 0)), constant_values=True)


class MaskHead(nn.Module):
    """MLP of three layers: [B, Q, D] -> [B, Q, D]."""

    gelu: layers.Gelu
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init, width = nn.initializers.xavier_uniform(), x.shape[-1]
        for i in (1, 2, 3):
            x = nn.Dense(width, kernel_init=init, dtype=self.dtype, name=f'fc{i}')(x)
            x = shard_batch(layers.gelu_of(self.gelu)(x) if i < 3 else x)
        return x


class Upscale(nn.Module):
    """Features [B, h, w, D] to [B, 2 h, 2 w, D]: a transposed and a depthwise convolution."""

    gelu: layers.Gelu
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = layers.gelu_of(self.gelu)(Larger(self.dtype, name='larger')(x))
        x = Spatial(self.dtype, name='spatial')(x)
        return shard_batch(layers.norm('layer', EPSILON, self.dtype, 'norm')(x))


class Spatial(nn.Module):
    """Depthwise convolution, 3 x 3, without a bias: [B, h, w, D] -> [B, h, w, D].

    It is a sum of shifted images: with features split over devices, XLA's partitioner (JAX 0.10.2)
    makes a wrong gradient of the kernel of a grouped convolution.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, h, w, d = x.shape
        kernel = self.param('kernel', nn.initializers.lecun_normal(), (3, 3, 1, d))
        kernel = kernel.astype(self.dtype)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifts = [(i, j) for i in range(3) for j in range(3)]
        return sum(x[:, i : i + h, j : j + w] * kernel[i, j, 0] for i, j in shifts)


class Larger(nn.Module):
    """Transposed convolution, kernel 2 x 2, stride 2: [B, h, w, D] -> [B, 2 h, 2 w, D].

    The kernel is [2, 2, D, D]: rows, columns, inputs, outputs.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, d = x.shape
        init = nn.initializers.variance_scaling(1.0, 'fan_in', 'uniform', (-2,), (-1,), (0, 1))
        kernel = self.param('kernel', init, (2, 2, d, d)).astype(self.dtype)
        bias = self.param('bias', nn.initializers.zeros, (d,)).astype(self.dtype)
        x = jnp.einsum('bhwc,yxcd->bhywxd', x.astype(self.dtype), kernel)
        return shard_batch(x.reshape(b, 2 * h, 2 * w, d) + bias)


def around_encoder(model: vit.Vit, **fields: Any) -> MaskClassifier:
    """The mask classifier of these fields around a ViT."""
    return MaskClassifier(encoder_of(model, 'a mask classifier'), **fields)
