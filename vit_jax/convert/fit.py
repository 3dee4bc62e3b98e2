"""Builds a model and its parameters from a parsed file, and accounts for every array."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import models
from vit_jax.convert import pieces, surgery
from vit_jax.convert.files import array_in_memory
from vit_jax.convert.infer import STATE_SIZE, build_model, infer_model, mixer_tokens
from vit_jax.convert.pieces import Piece
from vit_jax.convert.stages import Loaded, Parsed, Values, loss_of, size_of
from vit_jax.errors import UserError
from vit_jax.io.text import brief
from vit_jax.models import embedding, parameters, relative, resizing


def fit(
    parsed: Parsed,
    path: str,
    *,
    fields: dict[str, Any],
    image_size: tuple[int, int] | None,
    num_classes: int | None,
    keep_pre_logits: bool,
    source_image_size: tuple[int, int] | None,
    values: Values,
) -> Loaded:
    """Builds the model of a file: changes heads, resizes the table, accounts for every array.

    `path` is for messages. Without `values` no parameters are read, with 'shapes' their shapes and
    dtypes alone. Other arguments are those of `load.load`.
    """
    try:
        patch = new_patch(parsed, fields)
        own = {k: v for k, v in fields.items() if patch is None or k != 'patch_size'}
        parsed = with_table(parsed, own)
        source, grid = infer_model(parsed, own, source_image_size)
        model, fresh = with_head(source, num_classes, keep_pre_logits)
        used = [p for p in parsed.pieces(model) if p.ours.split('/')[0] not in fresh]
        unused = unused_arrays(parsed, source, used, fresh)
        if patch is not None:
            model, image_size = with_patch(model, patch, fields, grid, image_size)
        target = target_grid(parsed, model, grid, image_size)
        params, zeros = None, []
        if values:
            read = (model, source, parsed, used, fresh, grid, target)
            params, zeros = read_params(*read, shapes_alone=values == 'shapes')
    except UserError as e:
        raise UserError(e if path in str(e) else f'{path}: {e}') from e
    account = [('loaded', p.theirs, p.ours) for p in used if p.theirs in parsed.arrays]
    if target != grid:
        change = 'any' if grid is None else f'{grid[0]} x {grid[1]} -> {target[0]} x {target[1]}'
        if parsed.table:
            account.append(('resized', parsed.table[0], f'{change}, {model.interpolation}'))
        if parsed.offsets:
            change += f', {model.style.bias.interpolation}'
            account.append(('resized', parsed.offsets[0], change))
    if patch is not None:
        sides = [' x '.join(map(str, x.patch_size)) for x in (source, model)]
        account.append(('resized', 'embedding/kernel', f'{" -> ".join(sides)}, pseudo-inverse'))
    account += [('re-initialised', name, 'zeros: the file has none') for name in zeros]
    for name in fresh:
        if name != 'pre_logits' and model.num_classes is not None:
            account.append(('re-initialised', name, f'zeros: {model.num_classes} classes'))
    account += [('unused', name, why) for name, why in sorted(unused.items())]
    account += parsed.notes.rows(model, fields)
    size = (image_size or parsed.image_size) if grid is None and parsed.table is None else None
    if target is not None:
        size = tuple(n * s for n, s in zip(target, model.stride, strict=True))
    loss = None if 'head' in fresh else parsed.loss or loss_of(parsed.config)
    classes = None if fresh else classes_of(parsed, model)
    return Loaded(
        model, params, account, parsed.family, size, classes, parsed.config, loss,
        parsed.input_size, parsed.view,
    )  # fmt: skip


def with_table(parsed: Parsed, fields: dict[str, Any]) -> Parsed:
    """`parsed` with a table of its fixed positions if the model is to learn them from there on.

    If it is to have a table before each block and the file has that of the stem, it is that of the
    first block; others are zeros.
    """
    if fields.get('posemb_at') == 'layers' and parsed.fields.get('posemb_at', 'stem') == 'stem':
        return parsed._replace(pieces=lambda m: with_layers(parsed.pieces, m))
    kind = parsed.fields.get('posemb')
    if kind not in embedding.FIXED or fields.get('posemb') != 'learn' or not parsed.image_size:
        return parsed
    model = build_model(parsed.kind, {**parsed.fields, **fields})
    table = embedding.fixed(kind, *model.grid(parsed.image_size), model.width)
    table = np.pad(table, ((0, 0), (sum(model.prefix_posemb.values()), 0), (0, 0)))
    name = f'positions of {kind}'
    return parsed._replace(
        arrays=parsed.arrays | {name: array_in_memory(table)}, table=(name, table.shape[1]),
        pieces=lambda m: [*parsed.pieces(m), Piece(name, 'posemb')],
    )


def with_layers(pieces: Callable[[nn.Module], list[Piece]], model: nn.Module) -> list[Piece]:
    """Pieces of a model with a table before each block, of a file with that of the stem."""
    if getattr(model, 'posemb_at', '') != 'layers':
        return pieces(model)
    own, table = pieces(model.clone(posemb_at='stem')), 'encoder/posemb'
    first = [p._replace(ours=table, index=(0,)) if p.ours == 'posemb' else p for p in own]
    others = range(1, model.depth)
    return first + [Piece(f'positions of block {i}', table, (i,), optional=True) for i in others]


def classes_of(parsed: Parsed, model: nn.Module) -> tuple[str, ...] | None:
    """Class names of the file if they suit the model's head; None otherwise.

    Some outputs of a run have no name. Other files name each output.
    """
    names, outputs = parsed.classes, model.num_classes or 0
    if names is None or len(names) == outputs:
        return names
    return names if parsed.family == 'vit_jax' and len(names) < outputs else None


def with_head(
    model: nn.Module, num_classes: int | None, keep_pre_logits: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    """(model with the new head, names of the parameters to re-initialise)."""
    if num_classes is None:
        return model, ()
    if not isinstance(num_classes, int) or num_classes < 0:
        raise UserError(f'num_classes is {num_classes!r}, not a number of classes (0: no head)')
    changes = dict(num_classes=num_classes or None)
    fresh = ['head']
    if getattr(model, 'dist_head', False):
        fresh.append('dist_head')
        changes['dist_head'] = bool(num_classes)
    if getattr(model, 'representation_size', None) is not None and not keep_pre_logits:
        fresh.append('pre_logits')
        changes['representation_size'] = None
    return model.clone(**changes), tuple(fresh)


def new_patch(parsed: Parsed, fields: dict[str, Any]) -> tuple[int, int] | None:
    """The patch size that is asked for, where the kernel of the file has another one."""
    given, own = size_of(fields.get('patch_size'), 'patch_size'), parsed.fields.get('patch_size')
    if given is None or own is None or given == tuple(own):
        return None
    if parsed.kind != 'vit' or parsed.fields.get('resnet') is not None:
        raise UserError(
            f'patch_size is {given[0]} x {given[1]}, that of the file {own[0]} x {own[1]}; only '
            "the kernel of a ViT's patches is resized"
        )
    return given


def with_patch(
    model: nn.Module, patch: tuple[int, int], fields: dict[str, Any],
    grid: tuple[int, int] | None, image_size: tuple[int, int] | None,
) -> tuple[nn.Module, tuple[int, int] | None]:  # fmt: skip
    """(model of another patch size, its image size), as FlexiViT changes it (arXiv:2212.08013).

    Without `image_size` it is that of the file. Positions are interpolated as there, unless
    `fields` say how.
    """
    if image_size is None and grid is not None:
        image_size = tuple(n * s for n, s in zip(grid, model.stride, strict=True))
    how = fields.get('interpolation', 'bilinear_antialias')
    return model.clone(patch_size=patch, interpolation=how), image_size


def target_grid(
    parsed: Parsed,
    model: nn.Module,
    grid: tuple[int, int] | None,
    image_size: tuple[int, int] | None,
) -> tuple[int, int] | None:
    """The grid (h, w) that the parameters are to fit; None if they fit any.

    Raises UserError if they cannot be resized to it.
    """
    if image_size is None or parsed.kind == 'bit':
        return grid
    target = embedding.grid(image_size, model.stride)
    check_positions(parsed, model, target)
    if parsed.kind == 'mixer' and target != grid:
        count = mixer_tokens(parsed)
        if math.prod(target) != count:
            raise UserError(
                f'an MLP-Mixer works with the {count} patches that it was trained with; an image '
                f'of {image_size[0]} x {image_size[1]} has {math.prod(target)}'
            )
    if parsed.table is not None and grid is None:
        raise UserError(
            'array {} has {} positions, which are no square; to resize it, '.format(*parsed.table)
            + STATE_SIZE
        )
    return target


def check_positions(parsed: Parsed, model: nn.Module, target: tuple[int, int]) -> None:
    """Raises UserError for positions that would be resized and are not a table of patches."""
    fixed = model.posemb in ('learn2d', 'relative')
    if fixed and parsed.image_size and target != embedding.grid(parsed.image_size, model.stride):
        raise UserError(
            f'positions of model.posemb {model.posemb!r} are not resized; '
            f'the model works at {parsed.image_size[0]} x {parsed.image_size[1]} pixels only'
        )


def unused_arrays(
    parsed: Parsed, source: nn.Module, used: Sequence[Piece], fresh: Sequence[str]
) -> dict[str, str]:
    """{unused array: reason}; raises UserError for an array without a reason."""
    taken = {piece.theirs for piece in used}
    unused = dict(parsed.unused)
    for piece in parsed.pieces(source):
        if piece.theirs not in taken and piece.theirs in parsed.arrays:
            dropped = piece.ours.startswith('pre_logits/')
            why = 'dropped with the head' if dropped else 'replaced by the new head'
            unused[piece.theirs] = why
    for name, array in parsed.arrays.items():
        if name not in taken and name not in unused:
            raise UserError(
                f'array {name} {list(array.shape)} belongs to no parameter of a '
                f'{parsed.family} model {describe(source)}'
            )
    return unused


def describe(model: nn.Module) -> str:
    """Describes a model: 'vit-b/16 (width 768, depth 12)'."""
    depth = sum(model.units) if hasattr(model, 'units') else model.depth
    return f'{models.describe(model)["name"]} (width {model.width}, depth {depth})'


def read_params(
    model: nn.Module,
    source: nn.Module,
    parsed: Parsed,
    used: Sequence[Piece],
    fresh: Sequence[str],
    grid: tuple[int, int] | None,
    target: tuple[int, int] | None,
    shapes_alone: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """(parameters as JAX arrays, names of those that are zeros since the file lacks them).

    `source` is the model of the file, from which `model` differs in head and patch size. With
    `shapes_alone` values are not read, and the parameters are shapes and dtypes.
    """
    channels = len(model.mean)
    size = target or (1, 1)
    if target is None and parsed.table is not None:  # not square, and not resized
        size = (1, parsed.table[1] - sum(model.prefix_posemb.values()))
    image = [n * s for n, s in zip(size, model.stride, strict=True)]
    try:
        shapes = parameters.abstract(model, (1, *image, channels))
    except Exception as e:  # Flax raises various errors for impossible sizes
        raise UserError(f'the model {describe(model)} cannot be built ({brief(e)})') from e
    wanted, shapes = shapes, {n: x.shape for n, x in flatten_dict(shapes, sep='/').items()}
    if 'embedding/kernel' in shapes:
        shapes['embedding/kernel'] = (*source.patch_size, *shapes['embedding/kernel'][2:])
    by_layer = getattr(model, 'posemb_at', '') == 'layers'
    table = 'encoder/posemb' if by_layer else 'posemb'
    if parsed.table is not None:
        shapes[table] = (*shapes[table][:-2], parsed.table[1], model.width)
    offsets = [name for name in shapes if name.split('/')[-1] == 'bias_table']
    before = sum(model.prefix.values()) if offsets else 0
    for name in offsets:
        shapes[name] = (*shapes[name][:-2], relative.rows(grid, before), shapes[name][-1])
    pieces.check_shapes(used, parsed.arrays, shapes)
    absent = shapes.keys() - {piece.ours for piece in used}
    for name in sorted(absent):
        if name.split('/')[0] not in fresh:
            raise UserError(f'the file has no array for parameter {name} {list(shapes[name])}')
    if shapes_alone:
        return wanted, []
    params = {name: aligned_empty(shape) for name, shape in shapes.items()}
    for name in absent | params.keys() & {'encoder/attn/qkv/bias'}:  # a file may lack that of keys
        params[name][...] = 0
    zeros = pieces.fill_params(used, parsed.arrays, params)
    if parsed.table is not None and target != grid:
        method, square = model.interpolation, model.square_posemb
        each = params[table] if by_layer else [params[table]]
        resized = [surgery.resize(x, grid, target, method, square) for x in each]
        params[table] = np.stack(resized) if by_layer else resized[0]
    if 'embedding/kernel' in params and source.patch_size != model.patch_size:
        kernel = resizing.kernel(params['embedding/kernel'], model.patch_size)
        params['embedding/kernel'] = np.asarray(kernel)
    for name in offsets if target != grid else ():
        method = model.style.bias.interpolation
        params[name] = surgery.resize_offsets(params[name], grid, target, method)
    arrays = {n: jax.device_put(x, may_alias=True) for n, x in params.items()}
    return unflatten_dict(arrays, sep='/'), zeros


def aligned_empty(shape: Sequence[int]) -> np.ndarray:
    """An uninitialised float32 array, aligned so that JAX on a CPU adopts it without a copy."""
    count = math.prod(shape)
    raw = np.empty(count * 4 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * 4].view(np.float32).reshape(shape)
