"""The text towers of CLIP and SigLIP in transformers, and the scalars beside both towers.

CLIP's tokens attend to those before them; the output is that of the first end token, or where
eos_token_id is 2, as in configs of before July 2023, of the highest id (CLIPTextModel). SigLIP's
tokens attend to all, padding included, and the last one is the output. A key that config.json
leaves out has the default of its class in transformers 5.24.
"""

from collections.abc import Collection, Mapping
from typing import Any

from vit_jax.convert.assumed import guess_heads
from vit_jax.convert.documents import Notes, check_agreement, option
from vit_jax.convert.files import Array
from vit_jax.convert.hf import config as hf_config
from vit_jax.convert.hf import towers
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import (
    Piece,
    count_numbered,
    linear_pieces,
    norm_pieces,
    rename_arrays,
)
from vit_jax.convert.stages import TextTower
from vit_jax.errors import UserError
from vit_jax.io.text import brief
from vit_jax.models.text import Text

VOCABULARY = 'embeddings.token_embedding.weight'
TABLE = 'embeddings.position_embedding.weight'
PREFIX, PROJECTION, HEAD = 'text_model.', 'text_projection.weight', 'text_model.head.weight'
SCALARS = {'temperature': 'logit_scale', 'bias': 'logit_bias'}
LEGACY_EOS = 2  # in place of the id of the end token, which the tokenizer alone knew
TYPES = ('clip', 'metaclip_2', 'siglip', 'siglip2')
DEFAULTS = {  # of the keys that CLIP's and SigLIP's text configs have
    'clip': dict(
        vocab_size=49_408, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=8, max_position_embeddings=77, hidden_act='quick_gelu',
        layer_norm_eps=1e-5, pad_token_id=1, eos_token_id=49_407,
    ),
    'siglip': dict(
        vocab_size=32_000, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=64, hidden_act='gelu_pytorch_tanh',
        layer_norm_eps=1e-6, pad_token_id=1, eos_token_id=49_407,
    ),
}  # fmt: skip
READ = {*DEFAULTS['clip'], 'model_type', 'projection_dim', 'projection_size', 'bos_token_id'}


def has_tower(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether a file has a text tower of this kind beside an image tower."""
    kind = config.get('model_type')
    return PREFIX + VOCABULARY in names and 'logit_scale' in names and kind in (None, *TYPES)


def alone(arrays: Mapping[str, Array], config: Mapping[str, Any]) -> dict[str, Array] | None:
    """Arrays of a file of a text tower alone, by their names beside an image tower; else None."""
    kind = str(config.get('model_type', '_text_model'))
    starts = [p for p in ('', PREFIX) if p + VOCABULARY in arrays and p + TABLE in arrays]
    if not kind.endswith('_text_model') or 'logit_scale' in arrays or not starts:
        return None
    names = {n for n in arrays if n.startswith(PREFIX) or n == PROJECTION}
    return rename_arrays(arrays, {n: n if n in names else PREFIX + n for n in arrays})


def is_siglip(names: Collection[str]) -> bool:
    """Whether the tower has SigLIP's head, and not CLIP's projection."""
    return HEAD in names


def tower(arrays: Mapping[str, Array], config: dict[str, Any]) -> TextTower:
    """The text tower of a file; `arrays` are all that are outside of its image tower."""
    stated = {k: v for k, v in config.items() if k == 'model_type'}
    if stated:
        stated['model_type'] = str(stated['model_type']).removesuffix('_text_model')
    kind = hf_config.stated_type(stated, *TYPES[is_siglip(arrays) * 2 :][:2])
    fields, unknown = describe(arrays, config, kind)
    layouts = {theirs: shape_layout(arrays, theirs) for theirs in SCALARS.values()}
    both = 'logit_scale' in arrays
    scalars = scalar_pieces('logit_bias' in arrays, layouts) if both else []
    unused = {n: 'indices of positions' for n in arrays if n.endswith('embeddings.position_ids')}
    guesses = hf_config.guessed(config, 'num_heads', 'gelu', 'epsilon')
    if not config and kind == 'clip':
        guesses['eos_id'] = 'the place of the highest id, as there is no config.json'
    return TextTower(
        fields, dict(arrays), pieces, scalars, unused, Notes(guesses, {}, (), unknown)
    )


def shape_layout(arrays: Mapping[str, Array], name: str) -> str:
    """How a file stores a scalar: 'same' as [], or 'vector' as [1]."""
    return 'same' if name in arrays and arrays[name].shape == () else 'vector'


def scalar_pieces(bias: bool, layouts: Mapping[str, str]) -> list[Piece]:
    """Pieces of `temperature` and `bias`, in layouts by their names in a file."""
    names = SCALARS if bias else {'temperature': SCALARS['temperature']}
    return [Piece(theirs, ours, (...,), layouts[theirs]) for ours, theirs in names.items()]


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the text tower, for which CLIP's classes prefer text_config_dict."""
    if str(config.get('model_type')).endswith('_text_model'):
        return config
    inner = option(config, 'text_config_dict', 'an object')
    return option(config, 'text_config', 'an object', {}) if inner is None else inner


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any], kind: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """({field: value} of the `Text`, keys of the config that are unknown)."""
    siglip, inner = is_siglip(arrays), text_config(config)
    defaults, layer = DEFAULTS['siglip' if siglip else 'clip'], f'{PREFIX}encoder.layers.0.'
    vocabulary, width = shape_of(arrays, PREFIX + VOCABULARY, 2)
    head = HEAD if siglip else PROJECTION
    fields = dict(
        vocab_size=vocabulary, width=width, length=shape_of(arrays, PREFIX + TABLE, 2)[0],
        depth=count_numbered(arrays, r'text_model\.encoder\.layers\.(\d+)\.'),
        mlp_dim=shape_of(arrays, f'{layer}mlp.fc1.weight', 2)[0],
        num_classes=shape_of(arrays, head, 2)[0] if head in arrays else None,
        causal=not siglip, pool='last' if siglip else 'eos', head_bias=0.0 if siglip else None,
    )  # fmt: skip
    keys = dict(
        vocab_size='vocab_size', width='hidden_size', length='max_position_embeddings',
        depth='num_hidden_layers', mlp_dim='intermediate_size',
    )  # fmt: skip
    if config:
        count = 'a whole number above 0'
        stated = {key: option(inner, key, count, defaults[key]) for key in keys.values()}
        check_agreement(stated, {key: fields[field] for field, key in keys.items()})
    heads = guess_heads(width, fields['depth']) if not config else None
    fields |= dict(
        num_heads=option(inner, 'num_attention_heads', 'a whole number above 0',
                         heads or defaults['num_attention_heads']),
        gelu=hf_config.gelu_of(option(inner, 'hidden_act', 'a text', defaults['hidden_act'])),
        epsilon=option(inner, 'layer_norm_eps', 'a number above 0', defaults['layer_norm_eps']),
        **special_ids(inner, defaults, kind, vocabulary, known=bool(config)),
    )  # fmt: skip
    known = READ | towers.GENERATION
    return fields, hf_config.unknown_keys({k: v for k, v in inner.items() if v is not None}, known)


def special_ids(
    inner: dict[str, Any], defaults: dict[str, Any], kind: str, vocabulary: int, known: bool
) -> dict[str, int | None]:
    """{eos_id, pad_id} of a text config; None for an id that no token has."""
    whole = 'a whole number'
    pad = option(inner, 'pad_token_id', whole, defaults['pad_token_id'])
    pad = pad if pad < vocabulary else None
    if kind.startswith('siglip'):
        return dict(eos_id=None, pad_id=pad)
    ids = inner.get('eos_token_id')
    if isinstance(ids, list) and len(ids) == 1:
        inner = inner | {'eos_token_id': ids[0]}
    eos = option(inner, 'eos_token_id', whole, defaults['eos_token_id'])
    if not known or eos == LEGACY_EOS and kind == 'clip':
        eos = None
    if eos is not None and eos >= vocabulary:
        raise UserError(
            f'config.json: eos_token_id of the text tower is {brief(repr(eos))}, outside of the '
            f'vocabulary of {vocabulary}'
        )
    return dict(eos_id=eos, pad_id=pad)


def pieces(model: Text) -> list[Piece]:
    """Pieces of all arrays of a text tower."""
    rows = [Piece(PREFIX + VOCABULARY, 'vocabulary'), Piece(PREFIX + TABLE, 'posemb', (0,))]
    for i in range(model.depth):
        rows += towers.block_pieces(f'{PREFIX}encoder.layers.{i}', (i,), model)
    rows += norm_pieces(f'{PREFIX}final_layer_norm.', 'norm', model=model)
    if model.num_classes is None:
        return rows
    if model.head_bias is None:
        return [*rows, Piece(PROJECTION, 'head/kernel', layout=1)]
    return rows + linear_pieces(HEAD.removesuffix('.weight'), 'head')


def limits(siglip: bool) -> dict[str, tuple]:
    """{field of the `Text`: values that the format can express} for `save`."""
    return dict(
        causal=(not siglip,), pool=('last',) if siglip else ('eos',), mask_padding=(False,),
        posemb=('learn',), layer_scale=(None,), glu=(False,),
    )


def model_config(model: Text, siglip: bool, kind: str) -> dict[str, Any]:
    """The section `text_config` of config.json of the type `kind`."""
    pad, eos = model.pad_id, model.eos_id
    output = {'projection_size' if siglip else 'projection_dim': model.num_classes}
    return dict(
        model_type=f'{kind}_text_model', vocab_size=model.vocab_size, hidden_size=model.width,
        intermediate_size=model.mlp_dim, num_hidden_layers=model.depth,
        num_attention_heads=model.num_heads, max_position_embeddings=model.length,
        hidden_act=hf_config.ACTS[model.gelu], layer_norm_eps=model.epsilon, attention_dropout=0.0,
        **output, **({} if pad is None else dict(pad_token_id=pad)),
        **({} if siglip else dict(eos_token_id=LEGACY_EOS if eos is None else eos)),
    )  # fmt: skip
