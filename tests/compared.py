"""Outputs of models, ours and those of other libraries, and what an account says."""

import functools

import jax
import numpy as np


@functools.cache
def compiled(model, **options):
    """(params, images, **arrays) -> (output, intermediates), as one program."""
    return jax.jit(
        lambda params, images, **arrays: model.apply(
            {'params': params}, images, **options, **arrays
        ),
        compiler_options={'xla_backend_optimization_level': 0},  # compiles in half the time
    )


def outputs(model, params, images):
    """(output, intermediates) as NumPy arrays."""
    with jax.default_matmul_precision('highest'):
        return jax.device_get(compiled(model)(params, images))


def random_images(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def assert_close(ours, theirs, atol=1e-4):
    assert ours.shape == theirs.shape and np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def done(account):
    """{what was done: {arrays}} of an account."""
    groups = {}
    for what, name, _ in account:
        groups.setdefault(what, set()).add(name)
    return groups


def randomised(module):
    """A torch module whose every parameter is noise, those of norms around one."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            one = 'norm' in name and name.endswith('weight')
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + one)
    return module.eval()
