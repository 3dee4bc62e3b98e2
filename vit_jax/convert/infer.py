"""Infers the model of a parsed file, and the grid of patches that its parameters fit."""

import math
from typing import Any

import flax.linen as nn

from vit_jax import models
from vit_jax.convert import official
from vit_jax.convert.stages import Parsed, size_of
from vit_jax.errors import UserError
from vit_jax.io.text import brief
from vit_jax.models import relative
from vit_jax.models.prefix import prefix_rows

SIZES = (  # fields that are whole numbers above 0
    'num_classes', 'width', 'depth', 'num_heads', 'mlp_dim', 'tokens_mlp_dim',
    'representation_size',
)  # fmt: skip
STATE_SIZE = (  # advice, for commands too: so rare a file has no flag
    'say which images it was made for, vit_jax.load(PATH, source_image_size=(height, width), ...), '
    'and save that'
)


def infer_model(
    parsed: Parsed, fields: dict[str, Any], source_image_size: tuple[int, int] | None
) -> tuple[nn.Module, tuple[int, int] | None]:
    """(model of the file, grid (h, w) that its parameters fit or None: any).

    Raises UserError if the file is ambiguous.
    """
    values = {**parsed.fields, **fields}
    for field, why in parsed.notes.unsettled.items():
        if field not in fields:
            raise UserError(f'{why}; give {field}=..., as {parsed.fields[field]!r}')
    if values.get('num_heads', 1) is None:
        raise UserError(
            f'nothing states how many heads the attention of width {values["width"]} has; give '
            'num_heads=... (on the command line --model.num_heads=...)'
        )
    size = source_image_size or parsed.image_size
    model = build_model(parsed.kind, values)
    if parsed.kind == 'mixer':
        return model, infer_grid(mixer_tokens(parsed), model.stride, size)
    if parsed.offsets is not None:
        size = offset_size(parsed, model, size)
    if parsed.table is None:
        return model, None if parsed.offsets is None else model.grid(size)
    return infer_positions(parsed, model, values, size)


def offset_size(
    parsed: Parsed, model: nn.Module, size: tuple[int, int] | None
) -> tuple[int, int]:
    """Image size (height, width) whose offsets of patches a table has; UserError if none has."""
    name, rows = parsed.offsets
    before = sum(model.prefix.values())
    if size is None:
        side = relative.square_side(rows, before)
        size = side * model.stride[0], side * model.stride[1]
    grid = tuple(n // s for n, s in zip(size, model.stride, strict=True))
    if min(grid) < 1 or relative.rows(grid, before) != rows:
        raise UserError(
            f'array {name} has {rows} rows, which are not those of images of {size[0]} x {size[1]} '
            f'pixels; {STATE_SIZE}'
        )
    return grid[0] * model.stride[0], grid[1] * model.stride[1]


def infer_positions(
    parsed: Parsed, model: nn.Module, values: dict[str, Any], size: tuple[int, int] | None
) -> tuple[nn.Module, tuple[int, int] | None]:
    """(model with the prefix tokens that have positions, grid (h, w) of the position table).

    `values` are the model's fields as far as the file and the caller give them. Raises UserError
    unless one grid fits the rows of the table.
    """
    name, rows = parsed.table
    candidates = {}  # {rows of prefix tokens: (fields, grid)}
    for flags in positioned_prefixes(parsed.family, model.dist_token):
        flags = {field: values.get(field, flag) for field, flag in flags.items()}
        before = sum(prefix_rows(model.prefix, model.posemb, model.posemb_at, **flags).values())
        grid = infer_grid(rows - before, model.stride, size) if rows > before else None
        candidates.setdefault(before, (flags, grid))
    fitting = [(flags, grid) for flags, grid in candidates.values() if grid is not None]
    if len(candidates) == 1 and size is None:
        fitting = list(candidates.values())
    if len(fitting) == 1:
        flags, grid = fitting[0]
        return model.clone(**effective(model, **flags)), grid
    why = 'could be several' if fitting else 'is no grid'
    if size is not None and not fitting:
        why += f' of images of {size[0]} x {size[1]}'
    prefix = ' or '.join(map(str, candidates))
    raise UserError(
        f'array {name} has {rows} positions, {prefix} of them of the tokens {list(model.prefix)}: '
        f'what is left {why}; {STATE_SIZE}'
    )


def mixer_tokens(parsed: Parsed) -> int:
    """Number of patches that an MLP-Mixer is for."""
    if parsed.family == 'vit_jax':
        return parsed.arrays['encoder/token_mixing/fc1/kernel'].shape[1]
    if parsed.family == 'timm':
        return official.shape_of(parsed.arrays, 'blocks.0.mlp_tokens.fc1.weight', 2)[1]
    return official.mixer_tokens(parsed.arrays)


def positioned_prefixes(family: str, dist_token: bool) -> list[dict[str, bool]]:
    """Values of {cls_posemb, registers_posemb} that a file of the family may have, likeliest first.

    Args:
      family: of `Parsed`.
      dist_token: whether the model has a distillation token.
    """
    patches, with_cls, every = (False, False), (True, False), (True, True)
    if family in ('official', 'hf'):
        choices = [with_cls]
    elif family == 'big_vision':  # older files have a row for the class token
        choices = [patches, with_cls]
    else:
        choices = [every] if dist_token else [patches, every]
    return [dict(cls_posemb=cls, registers_posemb=registers) for cls, registers in choices]


def infer_grid(
    count: int, stride: tuple[int, int], size: tuple[int, int] | None
) -> tuple[int, int] | None:
    """(h, w) of `count` patches: for images of `size` if given, else a square; None if none fits.

    `stride` is the distance of patches in pixels, (vertical, horizontal).
    """
    if size is not None:
        h, w = size[0] // stride[0], size[1] // stride[1]
        return (h, w) if h * w == count else None
    side = math.isqrt(count)
    return (side, side) if side * side == count and count else None


def build_model(kind: str, values: dict[str, Any]) -> nn.Module:
    """Builds the model from a file's fields; fields without effect get their defaults."""
    if 'name' in values:
        raise UserError('name is not a field: a file tells which model it has')
    if kind == 'bit':
        return models.build(kind, **values)
    for field in set(SIZES) & values.keys():
        n = values[field]
        none = n is None and field in ('num_classes', 'representation_size')
        if not none and not (type(n) is int and n > 0):
            raise UserError(f'{field} is {brief(repr(n))}, not a whole number above 0')
    patch = size_of(values['patch_size'], 'patch_size')
    if patch is None:
        raise UserError('patch_size is None, not a number of pixels or (height, width)')
    model = models.build(f'{kind}/{patch[0]}', **values)
    if kind == 'mixer':
        return model
    changes = effective(model, model.cls_posemb, model.registers_posemb)
    if model.clone(cls_token=None).prefix == model.prefix:
        changes['cls_token'] = None
    return model.clone(**changes)


def effective(model: nn.Module, cls_posemb: bool, registers_posemb: bool) -> dict[str, bool]:
    """{field: value} of both fields for this ViT, with the default where it has no effect."""
    learnt = model.posemb == 'learn'
    return dict(
        cls_posemb=cls_posemb or not learnt or not {'cls', 'dist'} & model.prefix.keys(),
        registers_posemb=registers_posemb and learnt and bool(model.registers),
    )
