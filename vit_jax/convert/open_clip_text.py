"""The text tower of OpenCLIP's files, and the scalars beside both towers.

Its arrays are at the top of a file, or below `text.` where `text_cfg` of open_clip_config.json is
that of a custom tower. A key that it leaves out has its default in open_clip 3.3. Towers of
transformers (`text.transformer.*` of BERT and others) and of CoCa are refused.
"""

from collections.abc import Mapping
from typing import Any

from vit_jax.convert.assumed import guess_heads
from vit_jax.convert.documents import Notes, check_agreement, check_mlp_ratio, option
from vit_jax.convert.files import Array
from vit_jax.convert.official import shape_of
from vit_jax.convert.open_clip import FILE, epsilon_of, gelu_of, sections
from vit_jax.convert.pieces import Piece, count_numbered, linear_pieces, norm_pieces
from vit_jax.convert.stages import TWO_TOWERS, TextTower
from vit_jax.errors import UserError
from vit_jax.io.text import brief
from vit_jax.models.text import Text

VOCABULARY, TABLE = 'token_embedding.weight', 'positional_embedding'
BLOCKS, PROJECTION = 'transformer.resblocks.', 'text_projection'
SCALARS = {'temperature': 'logit_scale', 'bias': 'logit_bias'}
POOLS = {'first': 'first', 'last': 'last', 'argmax': 'eos', 'eos': 'eos'}
ONLY = {  # the only supported values of text_cfg
    'hf_model_name': (None,), 'embed_cls': (False,), 'final_ln_after_pool': (False,),
    'block_type': (None, 'default'), 'proj_type': ('linear', 'none'),
    **dict.fromkeys(
        ('qk_norm', 'scaled_cosine_attn', 'scale_heads', 'scale_attn_inner', 'scale_attn',
         'scale_fc'), (False,),
    ),
}  # fmt: skip
READ = {
    *ONLY, 'context_length', 'vocab_size', 'width', 'heads', 'layers', 'mlp_ratio',
    'ls_init_value', 'pad_id', 'eos_id', 'no_causal_mask', 'pool_type', 'proj_bias', 'act_kwargs',
    'norm_kwargs',
}  # fmt: skip
# Of the tokenizer, or without effect on the pooled output.
IRRELEVANT = {
    'hf_tokenizer_name', 'tokenizer_mode', 'tokenizer_kwargs', 'output_tokens',
    'hf_model_pretrained', 'hf_proj_type', 'hf_pooler_type',
}  # fmt: skip


def prefix_of(names: Mapping[str, Array]) -> str | None:
    """What precedes the names of the text tower's arrays; None if there is no such tower."""
    return next((p for p in ('', 'text.') if f'{p}{TABLE}' in names), None)


def has_tower(names: Mapping[str, Array]) -> bool:
    """Whether a file has a text tower; raises UserError for one of another library."""
    return 'logit_scale' in names and any(not n.startswith('visual.') for n in names)


def tower(arrays: Mapping[str, Array], config: dict[str, Any]) -> TextTower:
    """The text tower of a file; `arrays` are all that are outside of its image tower."""
    prefix = prefix_of(arrays)
    if prefix is None:
        other = min(n for n in arrays if n not in SCALARS.values())
        raise UserError(f'array {other} is of a text tower that is not supported; {TWO_TOWERS}')
    own = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    fields, unknown = describe(own, config)
    biased, scaled = f'{PROJECTION}.weight' in own, f'{BLOCKS}0.ls_1.gamma' in own
    scalars = [
        Piece(theirs, ours, (...,), 'vector' if arrays[theirs].shape else 'same')
        for ours, theirs in SCALARS.items() if theirs in arrays
    ]  # fmt: skip
    unused = {n: 'the causal mask' for n in arrays if n == f'{prefix}attn_mask'}
    why = f'there is no {FILE}'
    guessed = () if config else ('num_heads', 'gelu', 'epsilon', 'causal', 'pool')
    return TextTower(
        fields, dict(arrays), lambda model: pieces(model, prefix, biased, scaled), scalars, unused,
        Notes(dict.fromkeys(guessed, why), {}, (), unknown),
    )  # fmt: skip


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """({field: value} of the `Text`, keys of the config that are unknown)."""
    stated, _, _ = sections(config)
    text = option(stated, 'text_cfg', 'an object', {}, FILE)
    for key, values in ONLY.items():
        if text.get(key, values[0]) not in values:
            raise UserError(
                f'{FILE}: {key} of text_cfg is {brief(repr(text[key]))}, which is not supported; '
                + TWO_TOWERS
            )
    vocabulary, width = shape_of(arrays, VOCABULARY, 2)
    depth = count_numbered(arrays, r'transformer\.resblocks\.(\d+)\.')
    scaled, pool = f'{BLOCKS}0.ls_1.gamma' in arrays, pool_of(text)
    fields = dict(
        vocab_size=vocabulary, width=width, length=shape_of(arrays, TABLE, 2)[0], depth=depth,
        mlp_dim=shape_of(arrays, f'{BLOCKS}0.mlp.c_fc.weight', 2)[0], num_heads=heads_of(
            text, width, depth, known=bool(config)
        ),
        causal=not option(text, 'no_causal_mask', 'true or false', False, FILE),
        pool=POOLS[pool], pad_id=option(text, 'pad_id', 'a whole number', 0, FILE),
        eos_id=option(text, 'eos_id', 'a whole number', 2, FILE) if pool == 'eos' else None,
        layer_scale=float(option(text, 'ls_init_value', 'a number', 1e-5, FILE))
        if scaled else None,
        gelu=gelu_of(stated, text), epsilon=epsilon_of(text), **outputs(arrays),
    )  # fmt: skip
    if config:
        check_config(text, fields)
    unknown = [k for k in text if k not in READ | IRRELEVANT]
    return fields, tuple(f'{FILE}: text_cfg.{brief(key)}' for key in unknown)


def pool_of(text: dict[str, Any]) -> str:
    """The pool_type of text_cfg; raises UserError for one that gives no single vector."""
    pool = option(text, 'pool_type', 'a text', 'argmax', FILE)
    if pool not in POOLS:
        names = ', '.join(POOLS)
        raise UserError(f'{FILE}: pool_type of text_cfg {brief(repr(pool))} is none of {names}')
    return pool


def heads_of(text: dict[str, Any], width: int, depth: int, known: bool) -> int:
    """The number of heads; a guess where no config is known."""
    guess = 8 if known else guess_heads(width, depth) or max(width // 64, 1)
    return option(text, 'heads', 'a whole number above 0', guess, FILE)


def outputs(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """{num_classes, head_bias} of the projection."""
    if f'{PROJECTION}.weight' in arrays:
        bias = 0.0 if f'{PROJECTION}.bias' in arrays else None
        return dict(num_classes=shape_of(arrays, f'{PROJECTION}.weight', 2)[0], head_bias=bias)
    if PROJECTION in arrays:
        return dict(num_classes=shape_of(arrays, PROJECTION, 2)[1], head_bias=None)
    return dict(num_classes=None)


def check_config(text: dict[str, Any], fields: dict[str, Any]) -> None:
    """Raises UserError if the arrays contradict text_cfg."""
    defaults = dict(context_length=77, vocab_size=49_408, width=512, layers=12)
    count = 'a whole number above 0'
    stated = {key: option(text, key, count, n, FILE) for key, n in defaults.items()}
    check_agreement(stated, dict(
        context_length=fields['length'], vocab_size=fields['vocab_size'], width=fields['width'],
        layers=fields['depth'],
    ), FILE)  # fmt: skip
    ratio = option(text, 'mlp_ratio', 'a number above 0', 4.0, FILE)
    check_mlp_ratio(ratio, int(fields['width'] * ratio), fields['mlp_dim'], file=FILE)


def pieces(model: Text, prefix: str, biased: bool, scaled: bool) -> list[Piece]:
    """Pieces of all arrays of a text tower; `biased`: its projection is a linear layer."""
    rows = [Piece(prefix + VOCABULARY, 'vocabulary'), Piece(prefix + TABLE, 'posemb', (0,))]
    for i in range(model.depth):
        theirs, index = f'{prefix}{BLOCKS}{i}', (i,)
        for n in (1, 2):
            rows += norm_pieces(f'{theirs}.ln_{n}.', f'encoder/norm{n}', index, model=model)
            if scaled:
                rows.append(Piece(f'{theirs}.ls_{n}.gamma', f'encoder/scale{n}', index))
        rows += [
            Piece(f'{theirs}.attn.in_proj_weight', 'encoder/attn/qkv/kernel', index, 1),
            Piece(f'{theirs}.attn.in_proj_bias', 'encoder/attn/qkv/bias', index, 'vector'),
            *linear_pieces(f'{theirs}.attn.out_proj', 'encoder/attn/out', index, inputs=2),
            *linear_pieces(f'{theirs}.mlp.c_fc', 'encoder/mlp/fc1', index),
            *linear_pieces(f'{theirs}.mlp.c_proj', 'encoder/mlp/fc2', index),
        ]
    rows += norm_pieces(f'{prefix}ln_final.', 'norm', model=model)
    if model.num_classes is None:
        return rows
    if biased:
        bias = model.head_bias is not None
        return rows + linear_pieces(f'{prefix}{PROJECTION}', 'head', bias=bias)
    return [*rows, Piece(prefix + PROJECTION, 'head/kernel')]
