"""Writes positions that a format lacks in a way that it has; outputs stay the same."""

import flax.linen as nn
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models import embedding, vit


def fold_positions(
    model: nn.Module, params: dict[str, np.ndarray], format: str, size: tuple[int, int] | None
) -> tuple[nn.Module, dict[str, np.ndarray]]:
    """(model, params) with positions as the format has them; float32 outputs stay bitwise equal."""
    if not isinstance(model, vit.Vit):
        return model, params
    params = dict(params)
    kept = 'sincos2d' if format == 'big_vision' else None
    if model.posemb in embedding.FIXED and model.posemb != kept:
        if size is None:
            raise UserError('a table of sin-cos positions needs image_size=...')
        table = embedding.fixed(model.posemb, *model.grid(size), model.width)
        params['posemb'] = np.asarray(table)
        model = model.clone(posemb='learn', cls_posemb=False, registers_posemb=False)
    wants = {'official': True, 'hf': True, 'big_vision': False}.get(format)
    if format == 'timm' and model.registers and not model.registers_posemb:
        wants = False
    if model.posemb == 'learn' and 'cls' in model.prefix and wants is not None:
        rows = sum(model.prefix[n] for n in ('cls', 'dist') if n in model.prefix)
        if wants and not model.cls_posemb:
            zeros = np.zeros((1, rows, model.width), np.float32)
            params['posemb'] = np.concatenate([zeros, params['posemb']], axis=1)
            model = model.clone(cls_posemb=True)
        elif model.cls_posemb and not wants and rows == 1:
            params['cls'] = params['cls'] + params['posemb'][:, :1]
            params['posemb'] = params['posemb'][:, 1:]
            model = model.clone(cls_posemb=False)
    return model, params
