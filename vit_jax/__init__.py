"""Vision Transformers in JAX and Flax: `load` any public checkpoint, `save` it for others."""

from vit_jax import streams

__version__ = '0.1.0'

if streams.is_command():
    streams.begin()


def __getattr__(name):
    """`load` and `save`, imported when they are asked for: the step needs neither."""
    if name == 'load':
        from vit_jax.convert.load import load

        return load
    if name == 'save':
        from vit_jax.convert.save import save

        return save
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
