"""Attention by chunks of queries in plain JAX, for many tokens on any device.

Shapes: B batch, T tokens, H heads, C channels of a head, R rows of queries, S chunks.
"""

import functools

import jax
import jax.numpy as jnp

from vit_jax.models.layers import kept

ROWS = 256  # queries at a time


def chunks(x: jax.Array, count: int, rows: int) -> jax.Array:
    """Cuts the last dimension but one, padded: [..., T, C] -> [S, ..., R, C]."""
    *first, t, last = x.shape
    x = jnp.pad(x, [(0, 0)] * len(first) + [(0, count * rows - t), (0, 0)])
    return jnp.moveaxis(x.reshape(*first, count, rows, last), -3, 0)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """softmax(q k^T / sqrt(C) + bias) v: q, k, v [B, H, T, C] -> [B, H, T, C].

    `bias` is [H, T, T] or [B or 1, H or 1, T, T]. Drops probabilities at `rate`, drawn from `key`.
    Has probabilities of one chunk of queries at a time, [B, H, R, T], and computes them again for
    the gradient. Gradients of keys and values are summed over chunks in float32.
    """
    tokens, dtype = q.shape[2], q.dtype
    count = -(-tokens // ROWS)
    rows = -(-tokens // count)
    q = q * q.shape[-1] ** -0.5
    keys = [jax.random.split(key, count)] if rate else []
    added = [chunks(bias, count, rows)] if bias is not None else []

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(k, v, q, bias, key):
        logits = jnp.einsum('bhqc,bhkc->bhqk', q, k.astype(dtype))
        for x in bias:
            logits += x.astype(dtype)
        probs = jax.nn.softmax(logits.astype(jnp.float32)).astype(dtype)
        for x in key:
            probs = kept(probs, rate, x)
        return jnp.einsum('bhqk,bhkc->bhqc', probs, v.astype(dtype))

    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    out = jax.lax.scan(
        lambda _, x: (None, one(k, v, *x)), None, (chunks(q, count, rows), added, keys)
    )[1]
    out = jnp.moveaxis(out, 0, 2)  # [B, H, S, R, C]
    return out.reshape(*q.shape[:2], count * rows, -1)[:, :, :tokens]
