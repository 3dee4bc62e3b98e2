"""The BiT-style ResNet before a hybrid's transformer (arXiv:1912.11370, arXiv:2010.11929 sec. 3.1).

Group norm and weight-standardised convolutions (arXiv:1903.10520) in bottleneck units with the
strides in the 3 x 3 convolution. Shapes: B batch, H W image, C channels, F features.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models import layers

GROUPS = 32
ROOT_STRIDE = 4


def stride(units):
    """Pixels from one feature to the next, in both directions."""
    return ROOT_STRIDE * 2 ** max(len(units) - 1, 0)


def root_features(width):
    """Features of the root block."""
    return int(64 * width)


def channels(units, width):
    """Features of the last stage."""
    return root_features(width) * (4 * 2 ** (len(units) - 1) if units else 1)


def stages(units, width):
    """[(units, features of their 3 x 3 convolution, stride of the first)] of a network."""
    return [
        (count, root_features(width) * 2**i, 1 if i == 0 else 2) for i, count in enumerate(units)
    ]


def multiply_adds(image_shape, units, width):
    """Of the convolutions for one image [H, W, C]."""
    h, w, c = image_shape
    features = root_features(width)
    h, w = -(-h // 2), -(-w // 2)
    adds = h * w * 7 * 7 * c * features
    h, w, c = -(-h // 2), -(-w // 2), features
    for count, inner, first in stages(units, width):
        for i in range(count):
            by = first if i == 0 else 1
            oh, ow = -(-h // by), -(-w // by)
            adds += h * w * c * inner + oh * ow * (9 * inner * inner + 4 * inner * inner)
            if c != 4 * inner or by != 1:
                adds += oh * ow * c * 4 * inner
            h, w, c = oh, ow, 4 * inner
    return adds


class StdConv(nn.Module):
    """A convolution whose kernel has mean 0 and deviation 1 over its inputs; no bias."""

    features: int
    size: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param('kernel', nn.initializers.lecun_normal(), shape)
        kernel = kernel - kernel.mean(axis=(0, 1, 2))
        kernel = kernel / (kernel.std(axis=(0, 1, 2)) + 1e-5)
        return layers.by_example(jax.lax.conv_general_dilated(
            x.astype(self.dtype), kernel.astype(self.dtype), (self.stride,) * 2, 'SAME',
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        ))  # fmt: skip


class Unit(nn.Module):
    """Bottleneck: [B, H, W, C] -> [B, H / stride, W / stride, 4 * features]."""

    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        def conv(features, size, by, name):
            return StdConv(features, size, by, self.dtype, name=name)

        def norm(name, scale=nn.initializers.ones):
            return nn.GroupNorm(GROUPS, dtype=self.dtype, scale_init=scale, name=name)

        residual, outer = x, 4 * self.features
        if x.shape[-1] != outer or self.stride != 1:
            residual = norm('gn_proj')(conv(outer, 1, self.stride, 'conv_proj')(x))
        y = nn.relu(norm('gn1')(conv(self.features, 1, 1, 'conv1')(x)))
        y = nn.relu(norm('gn2')(conv(self.features, 3, self.stride, 'conv2')(y)))
        y = norm('gn3', nn.initializers.zeros)(conv(outer, 1, 1, 'conv3')(y))
        return nn.relu(residual + y)


class ResNet(nn.Module):
    """The root block and the stages: [B, H, W, C] -> [B, H / stride, W / stride, F]."""

    units: tuple[int, ...]
    width: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        features = root_features(self.width)
        x = StdConv(features, 7, 2, self.dtype, name='conv_root')(x)
        x = nn.relu(nn.GroupNorm(GROUPS, dtype=self.dtype, name='gn_root')(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding='SAME')
        for i, (count, inner, first) in enumerate(stages(self.units, self.width)):
            for j in range(count):
                by = first if j == 0 else 1
                x = Unit(inner, by, self.dtype, name=f'block{i + 1}_unit{j + 1}')(x)
        return x
