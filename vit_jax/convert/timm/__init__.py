"""Checkpoints of timm: a folder with config.json, or one .safetensors file.

Each class of timm's models has a file here, which tells its arrays from those of others, describes
the model, maps arrays to parameters and writes config.json.
"""

from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import Any

import flax.linen as nn
import numpy as np

from vit_jax.convert.pieces import Piece
from vit_jax.convert.timm import beit, bit, eva, hybrid, mixer, naflex, relpos, vit

# The first that matches is the class of a file, or of a model to save.
CLASSES = (hybrid, naflex, mixer, bit, beit, relpos, eva, vit)


def class_of_file(names: Collection[str], config: Mapping[str, Any]) -> ModuleType | None:
    """The class whose model has these arrays and this config.json; None if none has."""
    return next((c for c in CLASSES if c.matches(names, config)), None)


def class_of_model(model: nn.Module) -> ModuleType:
    """The class that a model is saved as."""
    return next((c for c in CLASSES if c.expresses(model)), vit)


def pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays of the file that a model is saved as."""
    return class_of_model(model).pieces(model)


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    return class_of_model(model).limits(model)


def absent_biases(model: nn.Module) -> tuple[str, ...]:
    """Those of `style.unbiased` that the file lacks, too; it has zeros for the others."""
    return class_of_model(model).absent_biases(model)


def complete(model: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of the file: those of the pieces, but where the class has a `complete` of its own."""
    return getattr(class_of_model(model), 'complete', lambda _, arrays: arrays)(model, arrays)


def model_config(
    model: nn.Module, size: tuple[int, int], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Content of config.json for timm.create_model('local-dir:...')."""
    return class_of_model(model).model_config(model, size, classes)
