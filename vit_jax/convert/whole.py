"""Builds the model that a file has around its encoder, such as a detector."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.convert import pieces, surgery
from vit_jax.convert.fit import aligned_empty, fit
from vit_jax.convert.infer import STATE_SIZE, infer_model
from vit_jax.convert.stages import Loaded, Parsed
from vit_jax.convert.towers import fit_towers
from vit_jax.errors import UserError
from vit_jax.models import embedding, parameters
from vit_jax.models.mae import Mae

FIXED = 'sincos2d_moco'  # the positions of arXiv:2111.06377
MOST = 1e-5  # by which a table that was computed in another precision differs


def fit_whole(parsed: Parsed, path: str, *, fields: dict[str, Any], **options: Any) -> Loaded:
    """As `fit`, for the whole model of a file with more than an encoder.

    Tables of positions that equal fixed ones are replaced by them.
    """
    if parsed.text is not None:
        return fit_towers(parsed, path, fields=fields, **options)
    if parsed.around is None:
        return fit(parsed, path, fields=fields, **options)
    if options['num_classes'] is not None:
        raise UserError(
            f"{path} is of {parsed.around.name}, which takes no other head; part='encoder' is its "
            'encoder, which takes one'
        )
    own = {name: fields[name] for name in parsed.around.fields if name in fields}
    fields = {name: value for name, value in fields.items() if name not in own}
    loaded = fit(parsed, path, fields=fields, **options)
    _, grid = infer_model(parsed, fields, options['source_image_size'])
    try:
        model = parsed.around.build(loaded.model, **own)
        model.check()
        beside = read_beside(model, parsed, loaded, grid)
    except UserError as e:
        raise UserError(e if path in str(e) else f'{path}: {e}') from e
    rows = {p.theirs: p.ours for p in parsed.around.pieces}
    account = [
        ('loaded', name, rows[name]) if what == 'unused' and name in rows else (what, name, detail)
        for what, name, detail in loaded.account
    ]
    account += [
        ('loaded', name, ours) for name, ours in rows.items()
        if name not in {row[1] for row in account}
    ]  # fmt: skip
    params = loaded.params and {'vit': loaded.params, **beside}
    if isinstance(model, Mae):
        model, params = with_fixed_positions(model, params, loaded.image_size)
    return loaded._replace(
        model=model, params=params, account=account, classes=parsed.around.classes
    )


def read_beside(
    model: nn.Module, parsed: Parsed, loaded: Loaded, grid: tuple[int, int] | None
) -> dict[str, Any]:
    """The parameters of a model beside its encoder, an autoencoder's table as that of the encoder.

    `grid` (h, w) is that of the patches in the file.
    """
    before = sum(model.vit.prefix.values())
    target = model.grid(loaded.image_size) if loaded.image_size else grid
    if target is None:
        raise UserError(f'nothing states the image size of {parsed.around.name}; {STATE_SIZE}')
    size = [n * s for n, s in zip(target, model.stride, strict=True)]
    shapes = parameters.abstract(model, (1, *size, len(model.mean)))
    shapes = {n: x.shape for n, x in flatten_dict(shapes, sep='/').items() if 'vit/' not in n}
    resized = 'decoder_posemb' in shapes and grid is not None and grid != target
    if resized:
        rows = before + grid[0] * grid[1]
        shapes['decoder_posemb'] = (1, rows, model.decoder_width)
    pieces.check_shapes(parsed.around.pieces, parsed.arrays, shapes)
    absent = shapes.keys() - {p.ours for p in parsed.around.pieces}
    if absent:
        raise UserError(f'the file has no array for parameter {min(absent)}')
    params = {name: aligned_empty(shape) for name, shape in shapes.items()}
    for name in params.keys() & {'decoder/attn/qkv/bias'}:  # a file may lack that of keys
        params[name][...] = 0
    pieces.fill_params(parsed.around.pieces, parsed.arrays, params)
    if resized:
        method, square = model.vit.interpolation, model.vit.square_posemb
        table = surgery.resize(params['decoder_posemb'], grid, target, method, square)
        params['decoder_posemb'] = table
    return unflatten_dict({n: jnp.asarray(x) for n, x in params.items()}, sep='/')


def with_fixed_positions(
    model: Mae, params: dict[str, Any] | None, size: tuple[int, int] | None
) -> tuple[Mae, dict[str, Any] | None]:
    """(model, params) without tables that equal FIXED to rounding, positions of prefixes being 0.

    `size` is that of the images, (height, width).
    """
    if params is None or size is None:
        return model, params
    grid, encoder = model.grid(size), model.vit
    if encoder.posemb == 'learn' and encoder.posemb_at == 'stem':
        rows = sum(encoder.prefix_posemb.values())
        if is_fixed(params['vit']['posemb'], grid, rows):
            weights = {n: x for n, x in params['vit'].items() if n != 'posemb'}
            encoder = encoder.clone(posemb=FIXED, cls_posemb=True, registers_posemb=False)
            model, params = model.clone(vit=encoder), params | {'vit': weights}
    if model.decoder_posemb == 'learn':
        if is_fixed(params['decoder_posemb'], grid, sum(encoder.prefix.values())):
            params = {n: x for n, x in params.items() if n != 'decoder_posemb'}
            model = model.clone(decoder_posemb=FIXED)
    return model, params


def is_fixed(table: jax.Array, grid: tuple[int, int], before: int) -> bool:
    """Whether a table [1, before + N, D] is zeros, then FIXED, to rounding."""
    if table.shape[-1] % 4:
        return False
    fixed = embedding.fixed(FIXED, *grid, table.shape[-1])
    wanted = np.pad(np.asarray(fixed), ((0, 0), (before, 0), (0, 0)))
    return wanted.shape == table.shape and np.abs(wanted - np.asarray(table)).max() < MOST
