"""Builds both towers of a file with an image and a text tower, or its text tower alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.convert import pieces
from vit_jax.convert.fit import aligned_empty, fit
from vit_jax.convert.pieces import Piece
from vit_jax.convert.stages import NO_TEXT, Loaded, Parsed, TextTower, Values
from vit_jax.errors import UserError
from vit_jax.io import bounds
from vit_jax.models import parameters, text
from vit_jax.models.two_towers import build_towers

OWN = ('temperature_max',)  # fields of TwoTowers that a caller may give
BOTH = (  # fields that a caller gives to both towers
    'dtype', 'matmul_dtype', 'precision', 'quantize', 'attention', 'remat', 'unroll', 'dropout',
    'attention_dropout', 'drop_path', 'drop_path_rises',
)  # fmt: skip


def fit_towers(parsed: Parsed, path: str, *, fields: dict[str, Any], **options: Any) -> Loaded:
    """As `fit`, for both towers of a file: a `TwoTowers` of parameters image, text and scalars.

    `fields` are those of the image tower; BOTH are of the text tower, too, and a section `text`
    {field: value} of it alone.
    """
    if options['num_classes'] is not None:
        raise UserError(
            f"{path} has two towers, which take no other head; part='image' and part='text' are "
            'each of them alone, which take one'
        )
    own = parsed.text.own | {name: fields[name] for name in OWN if name in fields}
    of_image = {k: v for k, v in fields.items() if k not in (*OWN, 'text')}
    image = fit(parsed, path, fields=of_image, **options)
    tower = parsed.text
    try:
        words = text_model(tower, fields)
        has_bias = any(p.ours == 'bias' for p in tower.scalars)
        model = build_towers(image.model, words, use_bias=has_bias, **own)
        params, account = read_text(tower, words, tower.scalars, options['values'])
    except UserError as e:
        raise UserError(e if path in str(e) else f'{path}: {e}') from e
    if params is not None:
        scalars = {p.ours: params.pop(p.ours) for p in tower.scalars}
        params = {'image': image.params, 'text': params, **scalars}
    of_text = {name for _, name, _ in account}
    rows = [row for row in image.account if row[0] != 'unused' or row[1] not in of_text]
    rows = [in_tower('image', *row) for row in rows]
    notes = tower.notes.rows(words, fields.get('text', {}))
    account = rows + account + [in_tower('text', *row) for row in notes]
    return image._replace(model=model, params=params, account=account, classes=None)


def in_tower(name: str, what: str, first: str, detail: str) -> tuple[str, str, str]:
    """A row of the account of one tower, with parameters and guessed fields as both have them."""
    if what == 'loaded':
        return what, first, f'{name}/{detail}'
    if what == 're-initialised':
        return what, f'{name}/{first}', detail
    if what == 'guessed' and name == 'text':
        why = detail.partition(';')[0]
        return what, f'text.{first}', f"{why}; text={{'{first.partition('=')[0]}': ...}} settles it"
    return what, first, detail


def fit_text(parsed: Parsed, path: str, *, fields: dict[str, Any], **options: Any) -> Loaded:
    """As `fit`, for the text tower of a file; `fields` are its own."""
    tower = parsed.text
    if tower is None:
        raise UserError(f'{path}: {NO_TEXT}')
    for name in ('image_size', 'source_image_size'):
        if options[name] is not None:
            raise UserError(f'{path}: {name} is that of images, which a text tower does not take')
    try:
        words = text_model(tower, {'text': fields})
        params, account = read_text(tower, words, (), options['values'])
        if options['num_classes'] is not None:
            words, params, account = with_head(words, params, account, options['num_classes'])
    except UserError as e:
        raise UserError(e if path in str(e) else f'{path}: {e}') from e
    account += [('unused', p.theirs, 'of both towers') for p in tower.scalars]
    others = (parsed.arrays.keys() | parsed.unused.keys()) - {name for _, name, _ in account}
    account += [('unused', name, 'outside of the text tower') for name in sorted(others)]
    account += tower.notes.rows(words, fields)
    classes = parsed.classes if parsed.kind == 'text' and options['num_classes'] is None else None
    return Loaded(words, params, account, parsed.family, None, classes, parsed.config)


def text_model(tower: TextTower, fields: Mapping[str, Any]) -> text.Text:
    """The text tower of a file, with what the caller gives in place of its fields."""
    given = fields.get('text', {})
    if not bounds.is_section(given):
        raise UserError(f'text is {given!r}, not a section {{field: value}} of the text tower')
    shared = {name: fields[name] for name in BOTH if name in fields}
    model = text.of_fields(tower.fields | shared | dict(given))
    model.check()
    return model


def read_text(
    tower: TextTower, model: text.Text, scalars: Sequence[Piece], values: Values
) -> tuple[dict[str, Any] | None, list[tuple[str, str, str]]]:
    """(parameters, account) of a text tower and of `scalars` beside it; none without `values`.

    With values='shapes' the parameters are shapes and dtypes. Raises UserError for an array that is
    missing, has another shape or belongs to nothing.
    """
    used = [*tower.pieces(model), *scalars]
    shapes = parameters.abstract(model, (1, model.length), jnp.int32)
    shapes = {n: x.shape for n, x in flatten_dict(shapes, sep='/').items()}
    shapes |= {p.ours: () for p in scalars}
    pieces.check_shapes(used, tower.arrays, shapes)
    taken = {p.theirs for p in used} | {p.theirs for p in tower.scalars} | tower.unused.keys()
    for name, array in tower.arrays.items():
        if name not in taken:
            raise UserError(f'array {name} {list(array.shape)} belongs to neither tower')
    absent = shapes.keys() - {p.ours for p in used}
    if absent:
        raise UserError(f'the file has no array for parameter {min(absent)} of the text tower')
    prefix = 'text/' if scalars else ''
    account = [
        ('loaded', p.theirs, p.ours if p in scalars else prefix + p.ours)
        for p in used if p.theirs in tower.arrays
    ]  # fmt: skip
    account += [('unused', n, why) for n, why in tower.unused.items()]
    if not values:
        return None, account
    if values == 'shapes':
        found = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in shapes.items()}
        return unflatten_dict(found, sep='/'), account
    params = {n: aligned_empty(shape) for n, shape in shapes.items()}
    zeros = pieces.fill_params(used, tower.arrays, params)
    account += [('re-initialised', prefix + n, 'zeros: the file has none') for n in zeros]
    arrays = {n: jax.device_put(x, may_alias=True) for n, x in params.items()}
    return unflatten_dict(arrays, sep='/'), account


def with_head(
    model: text.Text, params: dict[str, Any] | None, account: list, num_classes: int
) -> tuple[text.Text, dict[str, Any] | None, list]:
    """The text tower with a new head of zeros, or none for 0 classes."""
    account = [
        ('unused', name, 'replaced by the new head') if ours.startswith('head/')
        else (what, name, ours) for what, name, ours in account
    ]  # fmt: skip
    model = model.clone(num_classes=num_classes or None, head_bias=0.0)
    if params is not None:
        params = {n: x for n, x in params.items() if n != 'head'}
    if num_classes:
        account.append(('re-initialised', 'head', f'zeros: {num_classes} classes'))
        if params is not None:
            kernel = np.zeros((model.width, num_classes), np.float32)
            head = dict(kernel=kernel, bias=kernel[0])
            params = params | {'head': jax.tree.map(jnp.asarray, head)}
    return model, params, account

