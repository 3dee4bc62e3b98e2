"""The text tower in a checkpoint of a run: beside an image tower, or alone."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from vit_jax.convert.files import array_in_memory
from vit_jax.convert.pieces import Piece
from vit_jax.convert.stages import TextTower
from vit_jax.models.text import Fields, Text

SCALARS = ('temperature', 'bias')


def tower(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> TextTower | None:
    """The text tower of a run with this config, whose parameters are {name: array}; None without.

    Raises KeyError or TypeError for what is not the config of a run.
    """
    prefix = next((p for p in ('text/', '') if f'{p}vocabulary' in arrays), None)
    if prefix is None:
        return None
    both = config['objective']['name'] == 'contrastive'
    section = config['objective']['text'] if both else config['model']
    fields = stated(section or {}) | inferred(arrays, prefix)
    if 'length' not in fields:
        fields['length'] = config['data']['length']
    own = {n for n in arrays if n.startswith(prefix)}
    scalars = [Piece(n, n, (...,)) for n in SCALARS if both and n in arrays]
    chosen = own | {p.theirs for p in scalars}
    chosen |= set() if both else arrays.keys()
    unused = {} if both else dict.fromkeys(arrays.keys() - own, 'beside the model')
    settings = {'temperature_max': config['objective']['temperature_max']} if both else {}
    return TextTower(
        fields, {n: array_in_memory(arrays[n]) for n in chosen},
        lambda model: pieces(model, own, prefix), scalars, unused, own=settings,
    )  # fmt: skip


def stated(section: Mapping[str, Any]) -> dict[str, Any]:
    """Those values of a section of a config that are fields of a `Text`."""
    known = {field.name for field in dataclasses.fields(Fields)}
    return {name: value for name, value in section.items() if name in known}


def inferred(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """{field: value} of a `Text` that shapes tell, which a config may leave to the data."""
    fields = dict(vocab_size=arrays[f'{prefix}vocabulary'].shape[0])
    if f'{prefix}posemb' in arrays:
        fields['length'] = arrays[f'{prefix}posemb'].shape[1]
    kernel = arrays.get(f'{prefix}head/kernel')
    return fields | dict(num_classes=None if kernel is None else kernel.shape[1])


def pieces(model: Text, names: Collection[str], prefix: str) -> list[Piece]:
    """A `Piece` for each of the arrays `names` that the model has, by its name after `prefix`."""
    ours = {n: n.removeprefix(prefix) for n in names}
    return [
        Piece(n, o) for n, o in ours.items()
        if model.num_classes is not None or not o.startswith('head/')
    ]  # fmt: skip
