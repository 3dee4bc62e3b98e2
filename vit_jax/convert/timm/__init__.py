"""Checkpoints of timm: a folder with config.json, or one .safetensors file.

Each class of timm's models has a file here, which tells its arrays from those of others, describes
the model, maps arrays to parameters and writes config.json.
"""

from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

import flax.linen as nn

from vit_jax.convert.timm import beit, bit, eva, hybrid, mixer, naflex, relpos, vit

# The first that matches is the class of a file, or of a model to save.
CLASSES = (hybrid, naflex, mixer, bit, beit, relpos, eva, vit)


def class_of_file(names: Collection[str], config: Mapping[str, Any]) -> ModuleType | None:
    """The class whose model has these arrays and this config.json; None if none has."""
    return next((c for c in CLASSES if c.matches(names, config)), None)


def class_of_model(model: nn.Module) -> ModuleType:
    """The class that a model is saved as."""
    return next((c for c in CLASSES if c.expresses(model)), vit)
