"""Tokens before the patches: how many, and which have rows in the position table."""

from collections.abc import Mapping


def prefix_counts(
    pool: str, cls_token: bool | None, dist_token: bool, registers: int
) -> dict[str, int]:
    """{parameter: number of tokens} of the fields of a `vit.Vit`: {'cls': 1, 'registers': 4}."""
    cls = pool in ('cls', 'cls_gap') if cls_token is None else cls_token
    numbers = {'cls': int(cls), 'dist': int(dist_token), 'registers': registers}
    return {name: number for name, number in numbers.items() if number}


def prefix_rows(
    tokens: Mapping[str, int], posemb: str, posemb_at: str, cls_posemb: bool,
    registers_posemb: bool,
) -> dict[str, int]:  # fmt: skip
    """Those of `tokens`, as `prefix_counts` returns them, that have rows in the position table."""
    if posemb != 'learn':
        return {}
    if posemb_at != 'stem':
        return dict(tokens)
    has_rows = {'cls': cls_posemb, 'dist': cls_posemb, 'registers': registers_posemb}
    return {name: number for name, number in tokens.items() if has_rows[name]}
