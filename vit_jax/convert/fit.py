"""Builds a model and its parameters from a parsed file, and accounts for every array."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import models
from vit_jax.convert import official, pieces, surgery, views
from vit_jax.convert.documents import Notes
from vit_jax.errors import UserError
from vit_jax.io.text import brief
from vit_jax.models import embedding
from vit_jax.models.interface import Metadata

WHOLE = (
    'num_classes', 'width', 'depth', 'num_heads', 'mlp_dim', 'tokens_mlp_dim',
    'representation_size',
)  # fmt: skip
MOST_PIXELS = 65_536  # a side, as bounds.Pixels
STATE_SIZE = (  # advice, for commands too: so rare a file has no flag
    'say which images it was made for, vit_jax.load(PATH, source_image_size=(height, width), ...), '
    'and save that'
)


class Loaded(NamedTuple):
    """A loaded checkpoint: model, parameters, and what is needed to use them."""

    model: Any
    params: Any
    account: list  # rows of `table`: (what was done, array or arrays, detail)
    source: str  # the family
    image_size: tuple | None  # (height, width) of the parameters, None where any fits
    classes: tuple | None  # names by label
    config: dict | None  # of the run that made the weights
    loss: str | None = None  # training loss of the head: 'softmax' or 'sigmoid'; None: unknown
    input_size: tuple | None = None  # (height, width) to which its documents resize images
    stated_view: str | dict | None = None  # their view at that size

    @property
    def view(self):
        """The view that turns an image into input, as `tasks.make_view` takes it.

        That of the first evaluation of the run that made the weights, else that of the documents
        beside them, else a central crop. A stated size before the crop is for the stated input
        size, and scales with it.
        """
        of_run = view_of(self.config)
        if of_run or isinstance(self.stated_view, str | None):
            return of_run or self.stated_view or 'central'
        return views.grown(self.stated_view, self.input_size, self.image_size)

    @property
    def metadata(self):
        """Metadata of the model that `load` returns."""
        return Metadata(self.image_size, self.view, self.classes, self.loss)


class Found(NamedTuple):
    """A parsed file: its model and its arrays, whose values are not read yet."""

    family: str
    kind: str  # one of models.KINDS
    fields: dict
    arrays: dict  # {name in the pieces: files.Array}
    pieces: Any  # model -> [Piece]
    rows: tuple | None  # (name, rows) of the position table
    unused: dict  # {name: why}
    image_size: tuple | None
    classes: tuple | None
    config: dict | None
    loss: str | None = None  # if the file states it; else that of the config
    notes: Notes = Notes()  # on what the documents leave open
    input_size: tuple | None = None
    view: str | dict | None = None


def loss_of(config: dict | None) -> str | None:
    """Training loss of a classifier, 'softmax' or 'sigmoid', from a run's config; None: unknown."""
    objective = (config or {}).get('objective')
    loss = objective.get('loss') if isinstance(objective, dict) else None
    return loss if loss in ('softmax', 'sigmoid') else None


def view_of(config: dict | None) -> str | dict | None:
    """The view of a run's first evaluation; None if the config has none."""
    evals = (config or {}).get('evals')
    first = next(iter(evals.values()), None) if isinstance(evals, dict) else None
    return views.checked(first.get('view', 'central')) if isinstance(first, dict) else None


def size_of(image_size, name='image_size'):
    """(height, width) from an int or a pair, None from None; raises UserError for other values."""
    if image_size is None:
        return None
    pair = image_size if isinstance(image_size, (list, tuple)) else (image_size,) * 2
    if len(pair) != 2 or not all(type(n) is int and 0 < n <= MOST_PIXELS for n in pair):
        value = brief(repr(image_size))
        raise UserError(f'{name} is {value}, not a number of pixels or (height, width)')
    return tuple(pair)


def fitted(found, path, *, fields, image_size, num_classes, keep_pre_logits, source_image_size,
           values):  # fmt: skip
    """Turns a `Found` into `Loaded`: changes heads, resizes the table, accounts for every array."""
    try:
        source, grid = understand(found, fields, source_image_size)
        model, fresh = with_head(source, num_classes, keep_pre_logits)
        target = target_grid(found, model, grid, image_size)
        used = [p for p in found.pieces(model) if p.ours.split('/')[0] not in fresh]
        unused = leftover(found, source, used, fresh)
        params, zeros = None, []
        if values:
            params, zeros = filled(model, found, used, fresh, grid, target)
    except UserError as e:
        raise UserError(e if path in str(e) else f'{path}: {e}') from e
    size = (image_size or found.image_size) if found.kind == 'bit' else None
    if target is not None:
        size = tuple(n * s for n, s in zip(target, model.stride, strict=True))
    account = [('loaded', p.theirs, p.ours) for p in used if p.theirs in found.arrays]
    if found.rows and target != grid:
        way = f'{grid[0]} x {grid[1]} -> {target[0]} x {target[1]}, {model.interpolation}'
        account.append(('resized', found.rows[0], way))
    account += [('re-initialised', name, 'zeros: the file has none') for name in zeros]
    for name in fresh:
        if name != 'pre_logits' and model.num_classes is not None:
            account.append(('re-initialised', name, f'zeros: {model.num_classes} classes'))
    account += [('unused', name, why) for name, why in sorted(unused.items())]
    classes = found.classes if not fresh else None
    if classes is not None and len(classes) != model.num_classes:
        more = (model.num_classes or 0) > len(classes)  # some outputs of a run have no name
        classes = classes if more and found.family == 'vit_jax' else None
    loss = None if 'head' in fresh else found.loss or loss_of(found.config)
    account += found.notes.rows(model, fields)
    return Loaded(
        model, params, account, found.family, size, classes, found.config, loss,
        found.input_size, found.view,
    )  # fmt: skip


def understand(found, fields, source_image_size):
    """(model of the file, grid (h, w) that its parameters fit or None: any).

    Raises UserError if the file is ambiguous.
    """
    values = {**found.fields, **fields}
    for field, why in found.notes.unsettled.items():
        if field not in fields:
            raise UserError(f'{why}; give {field}=..., as {found.fields[field]!r}')
    if values.get('num_heads', 1) is None:
        raise UserError(
            f'nothing tells how many heads the attention of width {values["width"]} has; give '
            'num_heads=... (on the command line --model.num_heads=...)'
        )
    size = source_image_size or found.image_size
    if found.kind == 'mixer':
        model = built('mixer', values)
        return model, grid_of(mixer_tokens(found), model, size)
    if found.rows is None:
        return built(found.kind, values), None
    name, rows = found.rows
    probe = built('vit', values)
    fits = []
    for cls, registers in prefixes(found, probe):
        model = built('vit', {'cls_posemb': cls, 'registers_posemb': registers, **values})
        before = sum(model.prefix_posemb.values())
        grid = grid_of(rows - before, model, size) if rows > before else None
        if before not in [b for b, *_ in fits]:
            fits.append((before, model, grid))
    known = [(model, grid) for _, model, grid in fits if grid is not None]
    if len(known) == 1 or (len(fits) == 1 and size is None):
        return known[0] if known else (fits[0][1], None)
    why = 'could be several' if known else 'is no grid'
    if size is not None and not known:
        why += f' of images of {size[0]} x {size[1]}'
    prefix = ' or '.join(str(before) for before, *_ in fits)
    raise UserError(
        f'array {name} has {rows} positions, {prefix} of them of the tokens {list(probe.prefix)}: '
        f'what is left {why}; {STATE_SIZE}'
    )


def mixer_tokens(found):
    """Number of patches that an MLP-Mixer is for."""
    if found.family == 'vit_jax':
        return found.arrays['encoder/token_mixing/fc1/kernel'].shape[1]
    return official.tokens(found.arrays)


def prefixes(found, model):
    """[(cls_posemb, registers_posemb)] that a file of this family may have, likeliest first."""
    if found.family in ('official', 'hf'):
        return [(True, False)]
    if found.family == 'big_vision':  # the second: older files, with a row for the class token
        return [(False, False), (True, False)]
    if model.dist_token:
        return [(True, True)]
    return [(False, False), (True, True)]


def grid_of(count, model, size):
    """(h, w) of `count` patches: for images of `size` if given, else a square, else None."""
    if size is not None:
        y, x = model.stride
        h, w = size[0] // y, size[1] // x
        return (h, w) if h * w == count else None
    side = math.isqrt(count)
    return (side, side) if side * side == count and count else None


def built(kind, values):
    """Builds the model from a file's fields; fields without effect get their defaults."""
    if 'name' in values:
        raise UserError('a file tells its model itself: name is no field to be given')
    if kind == 'bit':
        return models.build(kind, **values)
    for field in set(WHOLE) & values.keys():
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
    plain = model.clone(cls_token=None)
    changes = {'cls_token': None} if plain.prefix == model.prefix else {}
    if not {'cls', 'dist'} & model.prefix.keys() or model.posemb != 'learn':
        changes['cls_posemb'] = True
    if not model.registers or model.posemb != 'learn':
        changes['registers_posemb'] = False
    return model.clone(**changes)


def with_head(model, num_classes, keep_pre_logits):
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


def target_grid(found, model, grid, image_size):
    """The grid (h, w) that the parameters are to fit; None if they fit any.

    Raises UserError if they can't be resized to it.
    """
    if image_size is None or found.kind == 'bit':
        return grid
    target = embedding.grid(image_size, model.stride)
    check_positions(found, model, target)
    if found.kind == 'mixer' and target != grid:
        count = mixer_tokens(found)
        if math.prod(target) != count:
            raise UserError(
                f'an MLP-Mixer works with the {count} patches that it was trained with; an image '
                f'of {image_size[0]} x {image_size[1]} has {math.prod(target)}'
            )
    if found.rows is not None and grid is None:
        raise UserError(
            f'array {found.rows[0]} has {found.rows[1]} positions, which are no square; to resize '
            f'it, {STATE_SIZE}'
        )
    return target


def check_positions(found, model, target):
    """Raises UserError for positions that would be resized and are not a table of patches."""
    fixed = model.posemb in ('learn2d', 'relative') or getattr(model, 'posemb_at', '') == 'layers'
    if fixed and found.image_size and target != embedding.grid(found.image_size, model.stride):
        raise UserError(
            f'positions of model.posemb {model.posemb!r} at {model.posemb_at!r} are not resized; '
            f'the model works at {found.image_size[0]} x {found.image_size[1]} pixels alone'
        )


def leftover(found, source, used, fresh):
    """{unused array: reason}; raises UserError for an array without a reason."""
    taken = {piece.theirs for piece in used}
    unused = dict(found.unused)
    for piece in found.pieces(source):
        if piece.theirs not in taken and piece.theirs in found.arrays:
            dropped = piece.ours.startswith('pre_logits/')
            why = 'dropped with the head' if dropped else 'another head is asked for'
            unused[piece.theirs] = why
    for name, array in found.arrays.items():
        if name not in taken and name not in unused:
            raise UserError(
                f'array {name} {list(array.shape)} is nothing that a {found.family} model of '
                f'{describe(source)} has'
            )
    return unused


def describe(model):
    """Describes a model: 'vit-b/16 (width 768, depth 12)'."""
    depth = sum(model.units) if hasattr(model, 'units') else model.depth
    return f'{models.describe(model)["name"]} (width {model.width}, depth {depth})'


def filled(model, found, used, fresh, grid, target):
    """(parameters as JAX arrays, names of those that are zeros since the file lacks them)."""
    channels = len(model.mean)
    size = target or (1, 1)
    if target is None and found.rows is not None:  # not square, and not resized
        size = (1, found.rows[1] - sum(model.prefix_posemb.values()))
    image = [n * s for n, s in zip(size, model.stride, strict=True)]
    try:
        images = jax.ShapeDtypeStruct((1, *image, channels), jnp.float32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)['params']
    except Exception as e:  # Flax raises various errors for impossible sizes
        raise UserError(f'no model of {describe(model)} can be built ({brief(e)})') from e
    shapes = {name: x.shape for name, x in flatten_dict(shapes, sep='/').items()}
    if found.rows is not None:
        shapes['posemb'] = (1, found.rows[1], model.width)
    pieces.check(used, found.arrays, shapes)
    params = {name: aligned(shape) for name, shape in shapes.items()}
    for name in params.keys() - {piece.ours for piece in used}:
        if name.split('/')[0] not in fresh:
            raise UserError(f'the file has nothing for parameter {name} {list(shapes[name])}')
        params[name][...] = 0
    zeros = pieces.fill(used, found.arrays, params)
    if found.rows is not None and target != grid:
        params['posemb'] = surgery.resize(params['posemb'], grid, target, model.interpolation)
    arrays = {n: jax.device_put(x, may_alias=True) for n, x in params.items()}
    return unflatten_dict(arrays, sep='/'), zeros


def aligned(shape):
    """An uninitialised float32 array, aligned so that JAX on a CPU adopts it without a copy."""
    count = math.prod(shape)
    raw = np.empty(count * 4 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * 4].view(np.float32).reshape(shape)
