"""How the model of a checkpoint differs from that of a config, by the settings to change."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from vit_jax.errors import UserError, shown
from vit_jax.io import bounds
from vit_jax.models import parameters
from vit_jax.models.text import Fields, Text

# Fields by which models of equal parameters compute different outputs, and those of texts.
FUNCTION = ('num_heads', 'style', 'gelu', 'epsilon', 'mean', 'std')
OF_TEXT = ('causal', 'pool', 'eos_id', 'pad_id', 'mask_padding')
OUTSIDE = ('parent', 'name', 'metadata', 'patch_size')  # of which the last is resized
PATCHES = 4  # a side, in patches, of the images that parameters are counted with


def text_of(section: Any, names: Mapping[str, Any], prefix: str) -> Text:
    """The text tower of a section of a config whose parameters {name: array} have a prefix."""
    known = {field.name for field in dataclasses.fields(Fields)}
    given = {k: v for k, v in ConfigDict(section).to_dict().items() if k in known}
    given['vocab_size'] = names[f'{prefix}vocabulary'].shape[0]
    if f'{prefix}posemb' in names:
        given['length'] = names[f'{prefix}posemb'].shape[1]
    kernel = names.get(f'{prefix}head/kernel')
    given['num_classes'] = None if kernel is None else kernel.shape[1]
    fields = bounds.grouped(Fields, given)
    return Text(**{f.name: getattr(fields, f.name) for f in dataclasses.fields(fields)})


def warn(path: str, stated: nn.Module, own: nn.Module, setting: str) -> None:
    """Logs by which fields `own` computes otherwise than `stated`, the model of a checkpoint.

    `setting` is the section of the config that has the fields of `own`.
    """
    names = FUNCTION + (OF_TEXT if isinstance(own, Text) else ())
    ours, theirs = fields_of(own), fields_of(stated)
    found = {n for n in ours.keys() & theirs.keys() if n.partition('.')[0] in names}
    if not (own.mask_padding or stated.mask_padding if isinstance(own, Text) else True):
        found -= {'pad_id'}
    if getattr(own, 'pool', None) != 'eos':
        found -= {'eos_id'}
    text = differing(found, own, stated, setting)
    if text:
        tower = 'text tower' if isinstance(own, Text) else 'model of images'
        logging.warning('%s: its %s computes otherwise: %s', path, tower, text)


def of_structure(stated: nn.Module, own: nn.Module, setting: str, head: bool = False) -> str:
    """The fields that differ and change names or shapes of parameters, as `warn` logs them.

    With `head` that is counted, too. Models of two kinds differ in all of them.
    """
    ours, theirs = fields_of(own), fields_of(stated)
    if type(own) is not type(stated):
        kinds = type(stated).__name__, type(own).__name__
        return f'the model there is a {kinds[0]}, that of {setting} a {kinds[1]}'
    plain = shapes_of(stated)
    outside = () if head else ('num_classes', 'head_bias', 'representation_size')
    found = {
        name for name, value in ours.items()
        if name not in outside and value != theirs[name]
        and shapes_of(with_field(stated, name, value)) != plain
    }  # fmt: skip
    return differing(found, own, stated, setting)


def differing(names: set[str], own: nn.Module, stated: nn.Module, setting: str) -> str:
    """'model.width is 64, there 32; ...' of those of the fields that differ, in their order."""
    ours, theirs = fields_of(own), fields_of(stated)
    return '; '.join(
        f'{setting}.{name} is {shown(ours[name])}, there {shown(theirs[name])}'
        for name in ours if name in names and ours[name] != theirs[name]
    )  # fmt: skip


def fields_of(model: nn.Module) -> dict[str, Any]:
    """{field: value} of a model, of a group of fields each: {'style.norm': 'layer'}."""
    found = {}
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if dataclasses.is_dataclass(value) and field.name not in OUTSIDE:
            inner = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            found |= {f'{field.name}.{name}': x for name, x in inner.items()}
        elif field.name not in OUTSIDE:
            found[field.name] = value
    return found


def with_field(model: nn.Module, name: str, value: Any) -> nn.Module:
    """The model with another value of a field of `fields_of`."""
    group, _, inner = name.rpartition('.')
    if group:
        name, value = group, dataclasses.replace(getattr(model, group), **{inner: value})
    return model.clone(**{name: value})


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]] | None:
    """{name: shape} of a model's parameters; None if there is no such model."""
    if isinstance(model, Text):
        inputs = (1, model.length), jnp.int32
    else:
        sides = (PATCHES * n for n in model.stride)
        inputs = (1, *sides, len(model.mean)), jnp.float32
    try:
        params = parameters.abstract(model, *inputs)
    except UserError:
        return None
    return {name: x.shape for name, x in parameters.named_leaves(params).items()}
