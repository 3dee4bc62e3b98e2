"""Muon: momentum whose matrices are orthogonalised (Jordan et al., 2024, KellerJordan/Muon).

The matrices are the kernels of attention and MLPs in the blocks. Each layer of a stack is a matrix
of its own, and so are query, key and value within it. Embeddings, heads, norms, biases and
positions take Adam's updates.
"""

import re
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax.models.parameters import map_by_name

# Steps X <- a X + (b A + c A^2) X with A = X X^T, which drive all singular values into about
# [0.7, 1.2]; the coefficients are those of KellerJordan/Muon muon.py.
COEFFICIENTS, STEPS = (3.4445, -4.7750, 2.0315), 5
RMS = 0.2  # of an update, as AdamW's typically is: arXiv:2502.16982 section 2.2

# Ends of names, and the form [batch..., inputs, outputs] in which an array has its matrices. D is
# the width, H heads of C channels, M the hidden size of an MLP, N the number of patches.
MATRICES = (
    # [L, D, 3, H, C] -> [L, 3, D, H C]
    (r'attn/qkv/kernel', lambda s: (s[0], s[1], s[2], s[3] * s[4]), (0, 2, 1, 3)),
    # [L, H, C, D] -> [L, H C, D]
    (r'attn/out/kernel', lambda s: (s[0], s[1] * s[2], s[3]), (0, 1, 2)),
    # [L, D, M], [L, M, D], [L, N, M] and [L, M, N]
    (r'(mlp|channel_mixing|token_mixing)/(fc1|fc2|gate)/kernel', lambda s: s, (0, 1, 2)),
)


def form_of(name: str) -> tuple | None:
    """(shape -> shape of the matrices, permutation of its axes) of a row of MATRICES, or None."""
    for pattern, shape, axes in MATRICES:
        if re.search(f'(^|/){pattern}$', name):
            return shape, axes
    return None


def matrix_names(stacks: Collection[str]) -> set[str]:
    """Those names of stacks whose arrays are matrices for Muon."""
    return {name for name in stacks if form_of(name)}


def orthogonal(x: jax.Array) -> jax.Array:
    """Matrices [..., M, N] with about the same singular vectors, and singular values near 1.

    These are five quintic Newton-Schulz steps; they run in the dtype of x.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def orthogonalise(name: str, update: jax.Array) -> jax.Array:
    """Orthogonalises the matrices of a parameter's update, and gives them the deviation RMS.

    The factor RMS sqrt(max(M, N)) of a matrix [M, N] is that of arXiv:2502.16982 eq. 4, with which
    learning rate and weight decay are those of AdamW.
    """
    shape, axes = form_of(name)
    split = update.reshape(shape(update.shape))
    matrices = split.transpose(axes)
    made = RMS * max(matrices.shape[-2:]) ** 0.5 * orthogonal(matrices)
    back = sorted(range(len(axes)), key=axes.__getitem__)
    return made.transpose(back).reshape(update.shape)


def scale_by_muon(
    stacks: Collection[str],
    others: optax.GradientTransformation,
    *,
    momentum: float,
    momentum_dtype: str | None,
) -> optax.GradientTransformation:
    """Muon with Nesterov momentum for the matrices among `stacks`, and `others` for the rest."""
    names = matrix_names(stacks)

    def chosen(inside: bool):
        return lambda tree: map_by_name(lambda name, _: (name in names) == inside, tree)

    def matrices(updates: Any, params: Any) -> Any:
        return map_by_name(orthogonalise, updates)

    muon = optax.chain(
        optax.trace(momentum, nesterov=True, accumulator_dtype=momentum_dtype),
        optax.stateless(matrices),
    )
    return optax.chain(optax.masked(muon, chosen(True)), optax.masked(others, chosen(False)))
