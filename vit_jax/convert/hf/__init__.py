"""Folders of Hugging Face transformers.

Each file here has a few of its model types: it tells their arrays from those of others, describes
the model, maps arrays to parameters and writes config.json.
"""

from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import Any

import flax.linen as nn
import numpy as np

from vit_jax.convert.hf import aimv2, beit, blip, clip, dinov3, siglip, siglip2, vit
from vit_jax.convert.pieces import Piece

# The first that matches is the family of a file, or of a model to save.
FAMILIES = (dinov3, aimv2, beit, siglip2, siglip, clip, blip, vit)


def family_of_file(names: Collection[str], config: Mapping[str, Any]) -> ModuleType | None:
    """The family whose models have these arrays and this config.json; None if none has."""
    return next((f for f in FAMILIES if f.matches(names, config)), None)


def family_of_model(model: nn.Module) -> ModuleType:
    """The family that a model is saved as."""
    return next((f for f in FAMILIES if f.expresses(model)), vit)


def pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays of the file that a model is saved as."""
    return family_of_model(model).pieces(model)


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    return family_of_model(model).limits(model)


def absent_biases(model: nn.Module) -> tuple[str, ...]:
    """Those of `style.unbiased` that the file lacks, too; it has zeros for the others."""
    return family_of_model(model).absent_biases(model)


def complete(model: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of the file, from those of the pieces."""
    return family_of_model(model).complete(model, arrays)


def model_config(
    model: nn.Module, size: tuple[int, int], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Content of config.json."""
    return family_of_model(model).model_config(model, size, classes)
