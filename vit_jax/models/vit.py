"""The Vision Transformer (arXiv:2010.11929), one module for every published variant.

Shapes: B batch, H W image, C channels, P patch, N patches, T tokens, D width, L depth, K classes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models import layers

# arXiv:2010.11929 table 1 (b, l, h); arXiv:2106.10270 table 2 (ti, s); arXiv:2106.04560 table 2
# (mu to G); arXiv:2305.13035 table 1 (so400m); arXiv:2209.06794 section 3.1 (e).
SIZES = {
    'mu': dict(width=32, depth=1, num_heads=2, mlp_dim=128),
    'ti': dict(width=192, depth=12, num_heads=3, mlp_dim=768),
    's': dict(width=384, depth=12, num_heads=6, mlp_dim=1536),
    'm': dict(width=512, depth=12, num_heads=8, mlp_dim=2048),
    'b': dict(width=768, depth=12, num_heads=12, mlp_dim=3072),
    'l': dict(width=1024, depth=24, num_heads=16, mlp_dim=4096),
    'so400m': dict(width=1152, depth=27, num_heads=16, mlp_dim=4304),
    'h': dict(width=1280, depth=32, num_heads=16, mlp_dim=5120),
    'g': dict(width=1408, depth=40, num_heads=16, mlp_dim=6144),
    'G': dict(width=1664, depth=48, num_heads=16, mlp_dim=8192),
    'e': dict(width=1792, depth=56, num_heads=16, mlp_dim=15360),
}

CHOICES = {
    'pool': ('cls', 'gap', 'map', 'none'),
    'posemb': ('learn', 'sincos2d', 'none'),
    'gelu': ('tanh', 'exact'),
    'remat': ('none', 'full', 'dots_saveable', 'dots_with_no_batch_dims_saveable'),
    'dtype': ('float32', 'bfloat16', 'float16'),
}


class Vit(nn.Module):
    """Images [B, H, W, C], normalised floats, to (output, named intermediates).

    The output is logits [B, K], or pre_logits [B, D] where `num_classes` is None; with
    `pool='none'` both keep the patches: [B, N, K] and [B, N, D]. The intermediates:

    tokens      [B, N, D]  embedded patches with their positions
    encoded     [B, N, D]  patches after the last norm
    cls         [B, D]     class token after the last norm, where there is one
    pre_logits  [B, D]     what the head reads
    logits      [B, K]     where there is a head
    attention   [L, B, heads, T, T]  with capture=('attention',); T counts the class token
                first, then the registers, then the patches
    """

    num_classes: int | None = 1000
    patch_size: tuple[int, int] = (16, 16)
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    pool: str = 'cls'
    posemb: str = 'learn'
    cls_posemb: bool = True  # the class token has a row in the position table
    registers: int = 0  # arXiv:2309.16588
    representation_size: int | None = None  # a dense layer with tanh before the head
    layer_scale: float | None = None
    qk_norm: bool = False
    gelu: str = 'tanh'
    epsilon: float = 1e-6
    head_bias: float = 0.0  # initial value; -log K starts sigmoid losses near zero
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0  # rate of the last block; rises linearly from 0 at the first
    remat: str = 'none'
    unroll: int = 1  # blocks a loop iteration: faster steps for longer compilation
    dtype: str = 'float32'  # of the computation; parameters are float32
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of images in [0, 1]
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def normalise(self, images):
        """uint8 [B, H, W, C] to the floats that this model was made for."""
        images = images.astype(jnp.float32) / 255
        return (images - jnp.asarray(self.mean)) / jnp.asarray(self.std)

    def check(self):
        """Says which field is wrong before anything is built from it."""
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                value = getattr(self, field)
                raise UserError(f'model.{field} is {value!r}, not one of {", ".join(choices)}')
        if self.width % self.num_heads:
            raise UserError(
                f'model.width {self.width} is not divisible by model.num_heads {self.num_heads}'
            )

    def flops(self, image_shape):
        """Of one forward pass over one image [H, W, C]: multiply-adds of all products, times two.

        Norms, softmax, GELU and biases are not counted, as the field does it.
        """
        h, w, c = image_shape
        p, d = self.patch_size, self.width
        n = (h // p[0]) * (w // p[1])
        t = n + self.registers + (self.pool == 'cls')
        adds = n * p[0] * p[1] * c * d
        adds += self.depth * t * (4 * d * d + 2 * t * d + 2 * d * self.mlp_dim)
        if self.pool == 'map':
            adds += n * (2 * d * d + 2 * d) + 2 * d * d + 2 * d * self.mlp_dim
        rows, features = (n if self.pool == 'none' else 1), d
        if self.representation_size is not None:
            adds += rows * d * self.representation_size
            features = self.representation_size
        return 2 * (adds + rows * features * (self.num_classes or 0))

    def embed(self, images):
        """Patches with their positions: [B, H, W, C] -> [B, N, D], and the table's first row."""
        h, w = images.shape[1:3]
        if h % self.patch_size[0] or w % self.patch_size[1]:
            raise UserError(
                f'image size {h} x {w} is not divisible by the patch size '
                f'{self.patch_size[0]} x {self.patch_size[1]}'
            )
        x = nn.Conv(
            self.width,
            self.patch_size,
            strides=self.patch_size,
            padding='VALID',
            dtype=self.dtype,
            name='embedding',
        )(images.astype(self.dtype))
        b, h, w, d = x.shape
        x = x.reshape(b, h * w, d)  # [B, h, w, D] -> [B, N, D]
        prefix = int(self.pool == 'cls' and self.cls_posemb)
        if self.posemb == 'none':
            return x, None
        if self.posemb == 'sincos2d':
            return x + layers.sincos2d(h, w, d).astype(self.dtype), None
        table = self.param(
            'posemb', nn.initializers.normal(d**-0.5), (1, prefix + h * w, d)
        ).astype(self.dtype)
        return x + table[:, prefix:], table[:, :1] if prefix else None

    @nn.compact
    def __call__(self, images, *, train=False, capture=()):
        self.check()
        out = {}
        x, cls_position = self.embed(images)
        out['tokens'] = x
        b, n, d = x.shape
        prefix = []
        if self.pool == 'cls':
            cls = self.param('cls', nn.initializers.zeros, (1, 1, d)).astype(self.dtype)
            prefix.append(cls if cls_position is None else cls + cls_position)
        if self.registers:
            init = nn.initializers.normal(0.02)
            prefix.append(
                self.param('registers', init, (1, self.registers, d)).astype(self.dtype)
            )
        x = jnp.concatenate([jnp.tile(p, (b, 1, 1)) for p in prefix] + [x], axis=1)  # [B, T, D]
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x, attention = self.encode(x, train, 'attention' in capture)
        if attention is not None:
            out['attention'] = attention
        x = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name='norm')(x)
        out['encoded'] = x[:, -n:]
        if self.pool == 'cls':
            out['cls'] = x[:, 0]
        x = out['pre_logits'] = self.pooled(out)
        if self.num_classes is None:
            return x, out
        head = nn.Dense(
            self.num_classes,
            kernel_init=nn.initializers.zeros,
            bias_init=nn.initializers.constant(self.head_bias),
            dtype=self.dtype,
            name='head',
        )
        out['logits'] = head(x)
        return out['logits'], out

    def encode(self, x, train, capture):
        """L blocks, their parameters stacked along a leading axis: [B, T, D] -> [B, T, D]."""
        block = layers.Block
        if self.remat != 'none':
            policy = None
            if self.remat != 'full':
                policy = getattr(jax.checkpoint_policies, self.remat)
            block = nn.remat(block, policy=policy, prevent_cse=False)
        stack = nn.scan(
            block,
            variable_axes={'params': 0},
            split_rngs={'params': True, 'dropout': True},
            length=self.depth,
            unroll=self.unroll,
        )
        encoder = stack(
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            gelu=self.gelu,
            epsilon=self.epsilon,
            qk_norm=self.qk_norm,
            layer_scale=self.layer_scale,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            stochastic_depth=self.drop_path > 0,
            deterministic=not train,
            capture=capture,
            dtype=self.dtype,
            name='encoder',
        )
        return encoder(x, jnp.linspace(0, self.drop_path, self.depth))

    def pooled(self, out):
        """What the head reads: [B, D], or [B, N, D] without pooling."""
        if self.pool == 'cls':
            x = out['cls']
        elif self.pool == 'gap':
            x = out['encoded'].mean(axis=1)
        elif self.pool == 'map':
            x = layers.MapHead(
                self.num_heads, self.mlp_dim, self.gelu, self.epsilon, self.dtype, name='map_head'
            )(out['encoded'])
        else:
            x = out['encoded']
        if self.representation_size is None:
            return x
        x = nn.Dense(self.representation_size, dtype=self.dtype, name='pre_logits')(x)
        return nn.tanh(x)
