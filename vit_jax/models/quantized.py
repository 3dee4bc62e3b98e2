"""8-bit products of activations and kernels, by the library qwix."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError

# Types of activations and kernels, and of gradients; scaling by the largest magnitude. fp8:
# arXiv:2209.05433 section 3. qwix scales to 127.5 for int8, half way between two integers.
KINDS = {
    'none': None,
    'int8': (jnp.int8, jnp.int8, f'absmax,{127.5 / 127}'),
    'fp8': (jnp.float8_e4m3fn, jnp.float8_e5m2, 'absmax'),
}


@functools.cache
def dot_general(kind: str) -> Callable[..., jax.Array]:
    """A replacement for `jax.lax.dot_general` within a Flax module.

    Each token of the activations and each output of the kernel is divided by a scale of its own,
    which maps its largest magnitude to that of the 8-bit type, and rounded; the product is scaled
    back. The gradient of the activations is computed likewise. That of the kernel uses the rounded
    activations, but unrounded gradients: it sums over all tokens of a batch, too many for int32 and
    too unlike for one scale (arXiv:2304.13013 section 2). Rounding has the gradient of the
    identity. Scales have the operands' dtype, and nothing is kept between steps. Raises UserError
    if qwix is not installed.
    """
    if kind == 'none':
        return jax.lax.dot_general
    try:
        import qwix
    except ImportError as e:
        raise UserError(
            f'model.quantize {kind!r} needs {e.name}; install it with: '
            'pip install "vit_jax[quantize]"'
        ) from e
    forward, backward, calibration = KINDS[kind]
    rule = qwix.QtRule(
        weight_qtype=forward,
        act_qtype=forward,
        bwd_qtype=backward,
        weight_calibration_method=calibration,
        act_calibration_method=calibration,
        bwd_calibration_method=calibration,
        additional_qt_config={'drhs_grad_qtype': None},
    )
    return qwix.QtProvider([rule]).dot_general
