"""Which of timm's poolings a model has: config.json and arrays may leave that open."""

from collections.abc import Collection
from typing import Any

from vit_jax.convert.timm.config import POOLS, pretrained_setting
from vit_jax.errors import UserError
from vit_jax.io.text import brief


def fits_pooling(pool: str, args: dict[str, Any], arrays: Collection[str]) -> bool:
    """Whether a model with timm's pooling `pool` has these arrays."""
    fc_norm = args.get('fc_norm')
    fc_norm = pool in ('avg', 'avgmax', 'max') if fc_norm is None else fc_norm
    pooled = 'fc_norm.weight' in arrays
    return (
        (pool == 'map') == ('attn_pool.latent' in arrays)
        and (fc_norm == pooled or not (pooled or 'norm.weight' in arrays))
        and (pool != 'token' or 'cls_token' in arrays)
    )


def pooling(
    args: dict[str, Any], config: dict[str, Any], arrays: Collection[str]
) -> tuple[str, dict[str, str], dict[str, str]]:
    """(timm's pooling, {'pool': why it is a guess}, {'pool': why it must be given})."""
    given = (config.get('model_args') or {}).get('global_pool')
    stated = pretrained_setting(config, 'global_pool', 'a text')
    pool = args.get('global_pool', stated)
    for value in (pool, stated):
        if value is not None and value not in POOLS:
            names = ', '.join(map(repr, POOLS))
            raise UserError(f'config.json: global_pool {brief(repr(value))} is none of {names}')
    if pool is None:
        maps, cls = 'attn_pool.latent' in arrays, 'cls_token' in arrays
        pool = 'map' if maps else 'token' if cls and 'fc_norm.weight' not in arrays else 'avg'
        why = 'the arrays of a model with a class token are the same with another pooling'
        return pool, {} if maps or not cls else {'pool': why}, {}
    if given is None and stated not in (None, pool) and fits_pooling(stated, args, arrays):
        if fits_pooling(pool, args, arrays):
            why = (
                f'config.json: global_pool is {brief(repr(stated))}, but timm builds the '
                f'architecture with {pool!r}, and the arrays fit both'
            )
            return stated, {}, {'pool': why}
        pool = stated
    if not fits_pooling(pool, args, arrays):
        raise UserError(
            f'config.json: global_pool is {pool!r} with fc_norm {args.get("fc_norm")}, which '
            'the arrays (norm, fc_norm, attn_pool, cls_token) do not fit'
        )
    return pool, {}, {}
