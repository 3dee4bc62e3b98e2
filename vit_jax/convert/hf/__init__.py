"""Folders of Hugging Face transformers.

Each file here has a few of its model types. It tells their arrays from those of others (`matches`)
and those of the encoder from others (`select`), describes the model (`describe`, `table_rows`,
`guess_normalisation`), maps arrays to parameters (`pieces`) and writes config.json (`expresses`,
`limits`, `model_config`). Those that need it have `offset_rows`, `count_channels`, `absent_biases`,
`complete` and the name of a PROCESSOR, too.
"""

from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

import flax.linen as nn

from vit_jax.convert.hf import aimv2, beit, blip, clip, dinov3, siglip, siglip2, vit

# The first that matches is the family of a file, or of a model to save.
FAMILIES = (dinov3, aimv2, beit, siglip2, siglip, clip, blip, vit)


def family_of_file(names: Collection[str], config: Mapping[str, Any]) -> ModuleType | None:
    """The family whose models have these arrays and this config.json; None if none has."""
    return next((f for f in FAMILIES if f.matches(names, config)), None)


def family_of_model(model: nn.Module) -> ModuleType:
    """The family that a model is saved as."""
    return next((f for f in FAMILIES if f.expresses(model)), vit)
