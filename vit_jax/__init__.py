"""Vision Transformers in JAX and Flax.

    model, params = vit_jax.load(path)                  # any public checkpoint, or a run
    images = vit_jax.preprocess(model, ['a.jpg'])       # paths, PIL images or arrays
    logits, out = model.apply({'params': params}, images)
    vit_jax.class_names(model)                          # indexed by label
    vit_jax.tokenizer(path)(['a shoe', 'a bag'])        # int32 [2, L]
    vit_jax.save('mine', model, params, format='hf')    # official, big_vision, timm or hf
    vit_jax.models.build('vit-b/16', num_classes=10)    # a model without a checkpoint
"""

import importlib
from typing import TYPE_CHECKING

from vit_jax.io import large_pages, streams

if TYPE_CHECKING:
    from vit_jax import models
    from vit_jax.convert.inputs import class_names, preprocess
    from vit_jax.convert.load import load
    from vit_jax.convert.save import save
    from vit_jax.convert.tokenizers import tokenizer
    from vit_jax.errors import UserError

__version__ = '0.1.0'
__all__ = ['UserError', 'class_names', 'load', 'models', 'preprocess', 'save', 'tokenizer']

# Imported on first use: training needs none of them.
MODULES = {
    'UserError': 'vit_jax.errors',
    'class_names': 'vit_jax.convert.inputs',
    'load': 'vit_jax.convert.load',
    'preprocess': 'vit_jax.convert.inputs',
    'save': 'vit_jax.convert.save',
    'tokenizer': 'vit_jax.convert.tokenizers',
}

if streams.is_command():  # before the other imports, which take seconds
    large_pages.restart()
    streams.begin()


def __getattr__(name: str) -> object:
    if name == 'models':
        return importlib.import_module('vit_jax.models')
    if name in MODULES:
        return getattr(importlib.import_module(MODULES[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*__all__, '__version__', '__doc__'})
