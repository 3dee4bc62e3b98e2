"""Attention by hand, and the names of devices that it is chosen for."""

import numpy as np

HOPPER = ('gpu', 'NVIDIA H100 80GB HBM3')
V4 = ('tpu', 'TPU v4')


def exact(qkv, weights, shift=0.0):
    """Output and gradients of sum(weights * output) by qkv and shift, by hand, in float64."""
    q, k, v = np.moveaxis(np.asarray(qkv, np.float64), 2, 0)  # [B, T, H, C]
    scale = q.shape[-1] ** -0.5
    e = np.einsum('bqhc,bkhc->bhqk', q, k) * scale + shift
    e = np.exp(e - e.max(-1, keepdims=True))
    probs = e / e.sum(-1, keepdims=True)
    d_probs = np.einsum('bqhc,bkhc->bhqk', weights, v)
    d_logits = probs * (d_probs - (probs * d_probs).sum(-1, keepdims=True))
    grads = (
        np.einsum('bhqk,bkhc->bqhc', scale * d_logits, k),
        np.einsum('bhqk,bqhc->bkhc', scale * d_logits, q),
        np.einsum('bhqk,bqhc->bkhc', probs, weights),
    )  # fmt: skip
    return np.einsum('bhqk,bkhc->bqhc', probs, v), np.stack(grads, axis=2), d_logits.sum(0)
