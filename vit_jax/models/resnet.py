"""ResNets with group norm and weight-standardised convolutions (arXiv:1903.10520).

`ResNet` is the stem of a hybrid (arXiv:2010.11929 section 3.1), with norms after convolutions.
`Bit` is BiT (arXiv:1912.11370), the convolutional baseline of that paper, with norms before them
(arXiv:1603.05027). Both consist of bottleneck units with the stride in the 3 x 3 convolution.
Shapes: B batch, H W image, C channels, F features, K classes.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.io import bounds
from vit_jax.io.bounds import Finite, Float, Positive
from vit_jax.models import embedding, interface, layers, memory

GROUPS = 32
ROOT_STRIDE = 4

# Units by stage: arXiv:1512.03385 table 1 (50 to 152 layers), arXiv:1603.05027 table 5 (200).
DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}
# {source: (term added to the variance of kernels, to that of groups)}; None: 1e-5 to the deviation
EPSILONS = {'official': (None, 1e-6), 'timm': (1e-8, 1e-5)}


def stride(units: tuple[int, ...]) -> int:
    """Pixels from one feature to the next, in both directions."""
    return ROOT_STRIDE * 2 ** max(len(units) - 1, 0)


def root_features(width: float) -> int:
    """Features of the root block."""
    return int(64 * width)


def channels(units: tuple[int, ...], width: float) -> int:
    """Features of the last stage."""
    return root_features(width) * (4 * 2 ** (len(units) - 1) if units else 1)


def stages(units: tuple[int, ...], width: float) -> list[tuple[int, int, int]]:
    """[(units, features of their 3 x 3 convolution, stride of the first)] by stage."""
    return [
        (count, root_features(width) * 2**i, 1 if i == 0 else 2) for i, count in enumerate(units)
    ]


def taps(length: int, size: int, by: int, centred: bool) -> int:
    """Counts kernel elements that lie on the image, over all outputs along one axis.

    Products with padding are not counted, as in XLA and in the exaFLOPs of arXiv:2010.11929 table
    6.
    """
    places = -(-length // by)
    before = size // 2 if centred else max((places - 1) * by + size - length, 0) // 2
    starts = (i * by - before for i in range(places))
    return sum(min(start + size, length) - max(start, 0) for start in starts)


def multiply_adds(
    image_shape: tuple[int, ...], units: tuple[int, ...], width: float, centred: bool = False
) -> int:
    """Multiply-adds of the convolutions for one image [H, W, C]."""
    h, w, c = image_shape
    features = root_features(width)
    adds = taps(h, 7, 2, centred) * taps(w, 7, 2, centred) * c * features
    h, w, c = -(-h // ROOT_STRIDE), -(-w // ROOT_STRIDE), features
    for count, inner, first in stages(units, width):
        for i in range(count):
            by = first if i == 0 else 1
            oh, ow = -(-h // by), -(-w // by)
            adds += h * w * c * inner + oh * ow * 4 * inner * inner
            adds += taps(h, 3, by, centred) * taps(w, 3, by, centred) * inner * inner
            if c != 4 * inner or by != 1:
                adds += oh * ow * c * 4 * inner
            h, w, c = oh, ow, 4 * inner
    return adds


class StdConv(nn.Module):
    """Convolution without bias; its kernel is scaled to mean 0, deviation 1 over its inputs.

    Computes in `matmul_dtype` and returns `dtype`. What keeps the scale finite is `epsilon`, added
    to the variance as in big_vision models/bit_paper.py:33 and in timm, or if it is None 1e-5,
    added to the deviation as in vision_transformer models_resnet.py:26.
    """

    features: int
    size: int
    stride: int = 1
    dtype: Any = jnp.float32
    matmul_dtype: Any = jnp.float32
    centred: bool = False  # BiT's: the same padding on both sides for any stride, as in PyTorch
    epsilon: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param('kernel', nn.initializers.lecun_normal(), shape)
        kernel = kernel - kernel.mean(axis=(0, 1, 2))
        variance = kernel.var(axis=(0, 1, 2))
        if self.epsilon is None:
            kernel /= jnp.sqrt(variance) + 1e-5
        else:
            kernel /= jnp.sqrt(variance + self.epsilon)
        padding = ((self.size // 2,) * 2,) * 2 if self.centred else 'SAME'
        return memory.shard_batch(jax.lax.conv_general_dilated(
            x.astype(self.matmul_dtype), kernel.astype(self.matmul_dtype), (self.stride,) * 2,
            padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )).astype(self.dtype)  # fmt: skip


class Unit(nn.Module):
    """Bottleneck: [B, H, W, C] -> [B, H / stride, W / stride, 4 * features]."""

    features: int
    stride: int = 1
    dtype: Any = jnp.float32
    matmul_dtype: Any = jnp.float32
    epsilon: tuple[float | None, float] = EPSILONS['official']  # of kernels, of norms

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(
            StdConv, dtype=self.dtype, matmul_dtype=self.matmul_dtype, epsilon=self.epsilon[0]
        )

        def norm(name, scale=nn.initializers.ones):
            return nn.GroupNorm(
                GROUPS, epsilon=self.epsilon[1], dtype=self.dtype, scale_init=scale, name=name
            )

        residual, outer = x, 4 * self.features
        if x.shape[-1] != outer or self.stride != 1:
            residual = norm('gn_proj')(conv(outer, 1, self.stride, name='conv_proj')(x))
        y = nn.relu(norm('gn1')(conv(self.features, 1, name='conv1')(x)))
        y = nn.relu(norm('gn2')(conv(self.features, 3, self.stride, name='conv2')(y)))
        y = norm('gn3', nn.initializers.zeros)(conv(outer, 1, name='conv3')(y))
        return nn.relu(residual + y)


class ResNet(nn.Module):
    """The root block and the stages: [B, H, W, C] -> [B, H / stride, W / stride, F]."""

    units: tuple[int, ...]
    width: float = 1.0
    dtype: Any = jnp.float32
    matmul_dtype: Any = jnp.float32
    epsilon: tuple[float | None, float] = EPSILONS['official']  # of kernels, of norms

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features, (of_kernels, of_norms) = root_features(self.width), self.epsilon
        dtypes = self.dtype, self.matmul_dtype
        x = StdConv(features, 7, 2, *dtypes, epsilon=of_kernels, name='conv_root')(x)
        norm = nn.GroupNorm(GROUPS, epsilon=of_norms, dtype=self.dtype, name='gn_root')
        x = nn.relu(norm(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding='SAME')
        for i, (count, inner, first) in enumerate(stages(self.units, self.width)):
            for j in range(count):
                by = first if j == 0 else 1
                x = Unit(inner, by, *dtypes, self.epsilon, name=f'block{i + 1}_unit{j + 1}')(x)
        return x


class PreActUnit(nn.Module):
    """Bottleneck with norms first: [B, H, W, C] -> [B, H / stride, W / stride, 4 * features]."""

    features: int
    stride: int = 1
    dtype: Any = jnp.float32
    matmul_dtype: Any = jnp.float32
    epsilon: float = 1e-10  # of kernels

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(
            StdConv, dtype=self.dtype, matmul_dtype=self.matmul_dtype, centred=True,
            epsilon=self.epsilon,
        )  # fmt: skip

        def normed(x, name):
            return nn.relu(nn.GroupNorm(GROUPS, epsilon=1e-5, dtype=self.dtype, name=name)(x))

        outer = 4 * self.features
        y = normed(x, 'gn1')
        if x.shape[-1] != outer or self.stride != 1:
            x = conv(outer, 1, self.stride, name='conv_proj')(y)
        y = normed(conv(self.features, 1, name='conv1')(y), 'gn2')
        y = normed(conv(self.features, 3, self.stride, name='conv2')(y), 'gn3')
        return x + conv(outer, 1, name='conv3')(y)


class Bit(nn.Module):
    """BiT: images [B, H, W, C], normalised floats, to (output, named intermediates).

    As for `vit.Vit`, the output is logits [B, K], or pre_logits [B, F] where `num_classes` is None.
    `encoded` [B, N, F] has the features after the last norm, `tokens` those before it. Takes images
    of any size.
    """

    num_classes: Positive[int] | None = 1000  # outputs of the head; None: no head
    units: tuple[Positive[int], ...] = DEPTHS[50]  # bottleneck units in each stage
    width: Positive[float] = 1.0  # factor of the features, of which the root block has 64
    kernel_epsilon: Positive[float] = 1e-10  # added to the variance of kernels that it scales
    head_bias: Finite[float] = 0.0  # initial bias of the head; -log K starts sigmoid losses near 0
    dtype: Float = 'float32'  # dtype of the computation; parameters are float32
    # dtype of operands and results of the convolutions alone, while the residual stream, norms and
    # the head stay in `dtype`; None: `dtype`
    matmul_dtype: Float | None = None
    # precision of products of float32 values; None: float32 in evaluations, in training what the
    # device has: bfloat16 on TPUs, tensorfloat32 on NVIDIA's GPUs from Ampere on
    precision: interface.Precision | None = None
    mean: tuple[Finite[float], ...] = (0.5, 0.5, 0.5)  # of each channel of images in [0, 1]
    std: tuple[Positive[float], ...] = (0.5, 0.5, 0.5)  # of each channel of images in [0, 1]
    metadata: interface.Metadata | None = interface.metadata()  # set by vit_jax.load

    pool = 'gap'
    posemb = 'none'
    captures = ()  # its blocks differ in shape

    def __post_init__(self) -> None:
        self.dtype = interface.dtype_name(self.dtype)
        self.matmul_dtype = interface.dtype_name(self.matmul_dtype)
        super().__post_init__()

    @property
    def product_dtype(self) -> str:
        """Dtype of the convolutions."""
        return self.matmul_dtype or self.dtype

    @property
    def stride(self) -> tuple[int, int]:
        """Pixels from one feature to the next: (vertical, horizontal)."""
        return (stride(self.units),) * 2

    def grid(self, image_shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of features of an image [H, W, ...]."""
        y, x = self.stride
        return -(-image_shape[0] // y), -(-image_shape[1] // x)

    def normalise(self, images: jax.Array) -> jax.Array:
        """Normalises images, uint8 [B, H, W, C], to the floats that this model takes."""
        return embedding.normalise(images, self.mean, self.std)

    def check(self) -> None:
        """Raises UserError for an invalid field, and names it."""
        bounds.check_fields('model', self)
        interface.check_precision(self)
        if not self.units:
            raise UserError(f'model.units is {self.units!r}, not units by stage, as (3, 4, 6, 3)')
        if not root_features(self.width) or root_features(self.width) % GROUPS:
            raise UserError(
                f'model.width {self.width} gives {root_features(self.width)} features in the root '
                f'block, which do not divide into {GROUPS} groups; multiples of 0.5 do'
            )

    def flops(self, image_shape: tuple[int, ...]) -> int:
        """FLOPs of a forward pass over one image [H, W, C], counted as in `vit.Vit.flops`."""
        adds = multiply_adds(image_shape, self.units, self.width, centred=True)
        return 2 * (adds + channels(self.units, self.width) * (self.num_classes or 0))

    @nn.compact
    @interface.at_precision
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        capture: str | tuple[str, ...] = (),
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(output, named intermediates) of normalised floats [B, H, W, C]; see the class."""
        self.check()
        interface.check_images(images, len(self.mean))
        interface.captures(capture, self.captures)
        features = root_features(self.width)
        dtypes = self.dtype, self.product_dtype
        x = StdConv(features, 7, 2, *dtypes, True, self.kernel_epsilon, name='conv_root')(images)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2))
        for i, (count, inner, first) in enumerate(stages(self.units, self.width)):
            for j in range(count):
                unit = PreActUnit(
                    inner, first if j == 0 else 1, *dtypes, self.kernel_epsilon,
                    name=f'block{i + 1}_unit{j + 1}',
                )  # fmt: skip
                x = unit(x)
        b, h, w, f = x.shape
        out = {'tokens': memory.shard_batch(x.reshape(b, h * w, f))}
        x = nn.relu(nn.GroupNorm(GROUPS, epsilon=1e-5, dtype=self.dtype, name='norm')(x))
        x = out['encoded'] = memory.shard_batch(x.reshape(b, h * w, f))  # [B, H, W, F] -> [B, N, F]
        x = out['pre_logits'] = memory.shard_batch(x.mean(axis=1))
        if self.num_classes is None:
            return x, out
        head = layers.head(self.num_classes, self.head_bias, self.dtype)
        out['logits'] = memory.shard_batch(head(x))
        return out['logits'], out
