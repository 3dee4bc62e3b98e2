"""Sharpness-aware minimisation (SAM), arXiv:2010.01412."""

from typing import Any

import jax
import optax


def ascended(params: Any, grads: Any, rho: float) -> Any:
    """Parameters at distance `rho` uphill: p + rho * g / norm(g) (arXiv:2010.01412 eq. 2).

    The norm is that of the whole gradient, which is of the global batch. big_vision
    (trainers/proj/gsam/gsam.py) instead moves each worker's copy along the gradient of that
    worker's own examples, so its results depend on the number of devices.
    """
    scale = rho / (optax.tree.norm(grads) + 1e-12)
    return jax.tree.map(lambda p, g: p + (scale * g).astype(p.dtype), params, grads)
