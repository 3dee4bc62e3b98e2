"""Checkpoints of timm: a folder with config.json, or one .safetensors file.

Each class of timm's models has a file here. It tells its arrays from those of others (`matches`),
describes the model (`describe`, `table_rows`), maps arrays to parameters (`pieces`) and writes
config.json (`expresses`, `limits`, `model_config`). Those that need it have `current_arrays` with
`table_size`, `pieces_of`, `offset_rows`, `absent_biases` and `complete`, too.
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
