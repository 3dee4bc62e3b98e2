"""How the kernel of `attention_tiled` cuts heads and tokens.

Shapes: B batch, T tokens, H heads, C channels of a head, L lanes of a group of heads, G groups.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.models.attention_kernel import available

ROWS = (256, 384)  # queries at a time; the larger one where it saves 10% of the padding
KEYS = 512  # keys at a time, so that intermediates stay on the chip
LANES = 128


class Plan(NamedTuple):
    """How heads and tokens are cut."""

    tokens: int
    channels: int  # of a head
    stride: int  # lanes from one head to the next
    lanes: int  # of a group
    heads: int  # of a group, without padding where there is one group
    groups: int
    rows: int

    @property
    def tiles(self) -> int:
        """Tiles of queries."""
        return -(-self.tokens // self.rows)

    def places(self) -> list[slice]:
        """Lanes of each head of a group."""
        return [slice(h * self.stride, h * self.stride + self.channels) for h in range(self.heads)]

    def keys(self) -> list[slice]:
        """Slices of about KEYS keys; the last one has the rest, too."""
        ends = [*range(KEYS, self.tokens - KEYS // 2, KEYS), self.tokens]
        return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def plan(tokens: int, heads: int, channels: int) -> Plan:
    """Cuts heads into groups of whole registers, and tokens into tiles.

    Channels are padded to a power of two or to whole registers, heads to whole groups.
    """
    stride = -(-channels // LANES) * LANES
    if channels < LANES:
        stride = 1 << (channels - 1).bit_length()
    lanes = max(LANES, stride)
    group = min(heads, lanes // stride)
    few, many = (-(-tokens // r) * r for r in ROWS)
    rows = ROWS[many < 0.91 * few]
    return Plan(tokens, channels, stride, lanes, group, -(-heads // group), rows)


def chip_bytes(cut: Plan, dtype: DTypeLike, rotary: bool, buffers: int) -> int:
    """Approximate bytes on the chip of the backward kernel: whole heads, tiles, intermediates.

    The latter grow with T, too, as the compiler loads ahead what it then has to spill.
    """
    size, tokens = jnp.dtype(dtype).itemsize, -(-cut.tokens // 16) * 16
    whole = 3 * buffers * size + 2 * 4  # keys, values and a gradient; sums in float32
    if rotary:
        whole += size + 4 * -(-2 * cut.channels // LANES) * LANES // cut.lanes
    tiles = cut.rows * (8 * cut.lanes * size + 8192) + (1.1 + 0.6 * size) * cut.rows * tokens
    return int(tokens * cut.lanes * whole + tiles)


def buffers(cut: Plan, dtype: DTypeLike, device: str, rotary: bool = False) -> int:
    """2 if the next heads can be loaded during computation, 1 if only one group fits, else 0."""
    sizes = {n: chip_bytes(cut, dtype, rotary, n) for n in (2, 1)}
    return next((n for n, size in sizes.items() if size <= available(device)), 0)


def padded(x: jax.Array, cut: Plan, heads: int) -> jax.Array:
    """Pads channels and heads: [B, T, n H C] -> [B, T, n G L], for any n."""
    missing = cut.lanes // cut.stride * cut.groups - heads, cut.stride - cut.channels
    if not any(missing):
        return x
    x = x.reshape(*x.shape[:2], -1, heads, cut.channels)
    return jnp.pad(x, [(0, 0)] * 3 + [(0, n) for n in missing]).reshape(*x.shape[:2], -1)


def unpadded(x: jax.Array, cut: Plan, heads: int) -> jax.Array:
    """The inverse of `padded`, but for its shape: [B, T, n G L] -> [B, T, n, H, C]."""
    x = x.reshape(*x.shape[:2], -1, cut.groups * cut.lanes // cut.stride, cut.stride)
    return x[..., :heads, : cut.channels]
