"""Tokenizers of checkpoints: what documents beside them say, and what their families do else.

The documents are those of transformers (tokenizer_config.json, special_tokens_map.json,
config.json) and of OpenCLIP (open_clip_config.json). They are untrusted.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vit_jax.data.tokenizers import cleaning, vocabularies
from vit_jax.data.tokenizers.backends import PIECES, VOCABULARY, Fast, Pieces, content, library
from vit_jax.data.tokenizers.tokenizer import Tokenizer
from vit_jax.errors import UserError
from vit_jax.io import storage
from vit_jax.io.text import brief

CONFIG, TOKENS, MODEL = 'tokenizer_config.json', 'special_tokens_map.json', 'config.json'
OPEN_CLIP = 'open_clip_config.json'
MODELS = (PIECES, 'sentencepiece.model', 'tokenizer.model')
MOST_LENGTH = 2**16


class Family(NamedTuple):
    """What the tokenizer of a model does where its files do not say it."""

    length: int | None
    pad: str | None
    steps: tuple[str, ...]
    follows: str


FAMILIES = {
    'CLIPTokenizer': Family(77, vocabularies.END, (), "transformers' CLIPTokenizer"),
    'SiglipTokenizer': Family(64, '</s>', cleaning.SIGLIP, "transformers' SiglipTokenizer"),
    'Siglip2Tokenizer': Family(64, '<pad>', (), "transformers' Siglip2Tokenizer"),
    'BertTokenizer': Family(None, '[PAD]', (), "transformers' BertTokenizer"),
}
OTHERS = Family(None, None, (), 'its tokenizer.json')
OF_MODELS = {
    'clip': 'CLIPTokenizer', 'siglip': 'SiglipTokenizer', 'siglip2': 'Siglip2Tokenizer',
    'bert': 'BertTokenizer',
}  # fmt: skip


def read(path: pathlib.Path, there: Sequence[str]) -> Tokenizer | None:
    """The tokenizer of the folder of a checkpoint with these files; None if it has none.

    Of a folder of both transformers and OpenCLIP it is that of transformers.
    """
    stated, model = documents_of(path).get(CONFIG, {}), storage.read_json(path / MODEL)
    name = class_of(stated, model)
    models = [file for file in MODELS if file in there]
    if models and name == 'SiglipTokenizer':
        backend: Any = Pieces(content(path / models[0]), path / models[0])
    elif VOCABULARY in there:
        backend = Fast.parse(content(path / VOCABULARY), path / VOCABULARY)
    elif {'vocab.json', 'merges.txt'} <= set(there) and name in ('CLIPTokenizer', ''):
        parts = (content(path / file) for file in ('vocab.json', 'merges.txt'))
        backend, name = vocabularies.clip_of_json(*parts, path / 'vocab.json'), 'CLIPTokenizer'
    else:
        return None
    found = made(path, backend, name, model)
    return of_open_clip(path, found) if OPEN_CLIP in there and MODEL not in there else found


def of_vocabulary(path: pathlib.Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json alone, with the documents in its folder."""
    folder, backend = path.parent, Fast.parse(content(path), path)
    model = storage.read_json(folder / MODEL)
    return made(folder, backend, class_of(documents_of(folder).get(CONFIG, {}), model), model)


def documents_of(path: pathlib.Path) -> dict[str, Any]:
    """{file name: content} of transformers' documents on the tokenizer."""
    found = {name: storage.read_json(path / name) for name in (CONFIG, TOKENS)}
    return {name: content for name, content in found.items() if content}


def class_of(stated: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Name of transformers' class, a key of FAMILIES where it matters; '' where nothing says it.

    Gemma's tokenizer beside a SigLIP is SigLIP 2's, which lower-cases.
    """
    name = str(stated.get('tokenizer_class') or '').removesuffix('Fast')
    kind = model.get('model_type')
    kind = kind if isinstance(kind, str) else ''
    if kind.startswith('siglip') and (name == 'GemmaTokenizer' or not name and kind == 'siglip2'):
        return 'Siglip2Tokenizer'
    return name or OF_MODELS.get(kind, '')


def made(
    path: pathlib.Path, backend: Any, name: str, model: Mapping[str, Any]
) -> Tokenizer:
    """The tokenizer of a backend, for the class `name` of transformers."""
    documents = documents_of(path)
    stated, family = documents.get(CONFIG, {}), FAMILIES.get(name, OTHERS)
    token = token_finder(path, backend, documents)
    if name == 'Siglip2Tokenizer':
        lower_cased(backend)
    steps = family.steps
    if stated.get('do_lower_case') is False:
        steps = tuple(step for step in steps if step != 'lower')
    side = stated.get('padding_side', 'right')
    if side not in ('left', 'right'):
        raise UserError(f'{path / CONFIG}: padding_side is {brief(side)}, not left or right')
    text = model.get('text_config', model)
    text = text if isinstance(text, dict) else {}
    pad = token('pad_token', family.pad)
    if pad is None:
        pad = text.get('pad_token_id', 0)
        if type(pad) is not int or not 0 <= pad < backend.size:
            raise UserError(f'{path / MODEL}: pad_token_id is {brief(pad)}, no token')
    length, mask = length_of(path, stated, text, family), token('mask_token', '[MASK]')
    return Tokenizer(
        backend, length, pad, *ends_of(path, backend, name, stated, token), mask, side=side,
        steps=steps, follows=family.follows, documents=documents,
    )  # fmt: skip


def token_finder(
    path: pathlib.Path, backend: Any, documents: Mapping[str, Any]
) -> Callable[[str, str | None], int | None]:
    """Makes a function (key, default) -> id of the token that the documents have for the key.

    It raises UserError for one that is not in the vocabulary; a default that isn't there is None.
    """

    def find(key: str, default: str | None) -> int | None:
        for file in (CONFIG, TOKENS):
            value = documents.get(file, {}).get(key)
            value = value.get('content') if isinstance(value, dict) else value
            if value is None:
                continue
            text = isinstance(value, str) and value.encode(errors='ignore').decode() == value
            number = backend.id_of(value) if text else None
            if number is None:
                raise UserError(f'{path / file}: {key} is {brief(value)}, no token')
            return number
        return None if default is None else backend.id_of(default)

    return find


def ends_of(
    path: pathlib.Path, backend: Any, name: str, stated: Mapping[str, Any], token: Callable
) -> tuple[int | None, int | None]:
    """(id before, id after) each text, as the class adds them."""
    if isinstance(backend, Pieces):
        return None, token('eos_token', '</s>')
    before, after = map(list, backend.ends)
    if name in ('GemmaTokenizer', 'Siglip2Tokenizer', 'LlamaTokenizer'):
        flags = [stated.get(f'add_{end}_token') for end in ('bos', 'eos')]
        if name == 'Siglip2Tokenizer' and flags == [None, None] and not before + after:
            flags = [False, True]
        ends = [token('bos_token', '<bos>'), token('eos_token', '<eos>')]
        for k, (flag, ids) in enumerate(zip(flags, (before, after), strict=True)):
            if isinstance(flag, bool):
                ids[:] = [ends[k]] if flag and ends[k] is not None else []
    for ids in (before, after):
        if len(ids) > 1:
            raise UserError(f'{path / VOCABULARY} adds {len(ids)} tokens before or after a text')
        if any(number >= backend.size for number in ids):
            raise UserError(f'{path / VOCABULARY} adds token {ids[0]}, which is not in it')
    return (*before, None)[0], (*after, None)[0]


def length_of(
    path: pathlib.Path, stated: Mapping[str, Any], text: Mapping[str, Any], family: Family
) -> int:
    """The number of tokens of a text: the lower of what documents state; 0 where none does.

    transformers writes 10^30 where there is no limit.
    """
    found = []
    places = ((CONFIG, stated, 'model_max_length'), (MODEL, text, 'max_position_embeddings'))
    for file, values, key in places:
        value = values.get(key)
        if value is None:
            continue
        if type(value) not in (int, float) or not value >= 1:
            raise UserError(f'{path / file}: {key} is {brief(value)}, not a number of tokens')
        found += [int(value)] if value <= MOST_LENGTH else []
    return min([*found, family.length] if family.length and not found else found, default=0)


def lower_cased(backend: Fast) -> None:
    """Puts lower-casing before what normalises texts, as transformers' Siglip2Tokenizer does."""
    normalizers, tokenizer = library('tokenizers').normalizers, backend.tokenizer
    others = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *others])


def of_open_clip(path: pathlib.Path, found: Tokenizer) -> Tokenizer:
    """The tokenizer with length and cleaning of an open_clip_config.json.

    OpenCLIP (src/open_clip/tokenizer.py HFTokenizer, SimpleTokenizer) collapses spaces before it
    calls transformers' tokenizer, and its own pads CLIP's texts with 0.
    """
    file = path / OPEN_CLIP
    model = storage.read_json(file).get('model_cfg')
    text = model.get('text_cfg') if isinstance(model, dict) else None
    if not isinstance(text, dict):
        raise UserError(f'{file} has no model_cfg.text_cfg')
    options = text.get('tokenizer_kwargs') or {}
    if not isinstance(options, dict) or options.get('strip_sep_token'):
        raise UserError(f'{file}: tokenizer_kwargs are {brief(options)}, which is not known here')
    whole = not text.get('hf_tokenizer_name')
    steps = cleaning.OPEN_CLIP.get(options.get('clean', 'lower' if whole else 'whitespace'))
    length = text.get('context_length', 77)
    if steps is None or type(length) is not int or not 0 < length <= MOST_LENGTH:
        raise UserError(f'{file}: text_cfg is {brief(text)}, which is not known here')
    change = {'pad': 0} if whole else {}
    return found._replace(
        length=length, steps=steps, follows=cleaning.named('mlfoundations/open_clip'), **change
    )
