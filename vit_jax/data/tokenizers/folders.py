"""Finds the tokenizer of a file or a folder."""

import os
import pathlib
from typing import Any

from vit_jax.data.tokenizers import cleaning, families, vocabularies
from vit_jax.data.tokenizers.backends import PIECES, VOCABULARY, Fast, Pieces, content
from vit_jax.data.tokenizers.tokenizer import SAVED, SETTINGS, Tokenizer
from vit_jax.errors import UserError
from vit_jax.io import fetch, storage
from vit_jax.io.text import brief

HOLDING = (VOCABULARY, *families.MODELS, 'vocab.json', vocabularies.MERGES, 'vocab.txt')
DOCUMENTS = (families.CONFIG, families.TOKENS, families.MODEL, families.OPEN_CLIP)
FILES = (*HOLDING, 'merges.txt', SETTINGS, *DOCUMENTS)
INSIDE = 'tokenizer'  # folder of a run's tokenizer
WEIGHTS = ('.safetensors', '.npz')
ALONE = ('.json', '.model', '.gz', '.txt')  # suffixes of files of a tokenizer alone


def local(address: str) -> str:
    """Local path of a tokenizer at an address: of the file it names, or of a folder with FILES."""
    if '://' not in address:
        return os.path.expanduser(address)
    before, _, name = address.rpartition('/')
    if name.endswith(WEIGHTS):
        address = before
    elif name.endswith(ALONE):
        return f'{fetch.named(before, [name])}/{name}'
    error = None
    for place in (address.rstrip('/'), f'{address.rstrip("/")}/{INSIDE}'):
        try:
            found = fetch.named(place, FILES)
        except UserError as e:
            error = error or e
            continue
        if any((found / name).exists() for name in HOLDING):
            return str(found)
    raise error or UserError(f'{address} has no tokenizer: none of {", ".join(HOLDING)}')


def read(path: pathlib.Path) -> Tokenizer:
    """The tokenizer of a local file or folder, see `load`; raises UserError if there is none."""
    if path.suffix in WEIGHTS and path.is_file():
        path = path.parent
    if path.is_file():
        return read_file(path)
    if not path.is_dir():
        raise UserError(f'no tokenizer at {path}: there is no such file or folder')
    if (path / INSIDE / SETTINGS).exists():
        path = path / INSIDE
    if (path / SETTINGS).exists():
        return saved(path)
    there = [name for name in FILES if (path / name).is_file()]
    found = families.read(path, there)
    if found is None:
        alone = [name for name in HOLDING if name in there and name != 'vocab.json']
        if not alone:
            raise UserError(f'{path} has no tokenizer: none of {", ".join(HOLDING)}')
        return read_file(path / alone[0])
    return found


def read_file(path: pathlib.Path) -> Tokenizer:
    """The tokenizer of one file, by the protocol of those who publish it alone."""
    if path.name == SETTINGS:
        return read(path.parent)
    if path.suffix == '.json':
        return families.of_vocabulary(path)
    if path.suffix == '.model':
        return of_pieces(path)
    if path.suffix == '.gz':
        backend = vocabularies.clip_of_merges(content(path), path)
        start, end = (backend.id_of(name) for name in (vocabularies.START, vocabularies.END))
        follows = cleaning.named('openai/CLIP')
        return Tokenizer(backend, 77, 0, start, end, steps=cleaning.OPENAI, follows=follows)
    if path.suffix == '.txt':
        backend = vocabularies.bert(content(path), path)
        pad, cls, mask = (backend.id_of(name) for name in ('[PAD]', '[CLS]', '[MASK]'))
        follows = "google-research/big_vision's bert_tokenize"
        return Tokenizer(backend, 16, pad, cls, None, mask, follows=follows)
    raise UserError(
        f'{path} is no tokenizer: give a folder, a tokenizer.json, a .model of SentencePiece, '
        f'{vocabularies.MERGES} or a vocab.txt'
    )


def of_pieces(path: pathlib.Path) -> Tokenizer:
    """A model of SentencePiece as google-research/big_vision uses it for SigLIP and SigLIP 2.

    SigLIP (c4_en, mc4) pads with its end, SigLIP 2 (Gemma's) with its padding; both keep the end of
    a text that is cut, and lower A to Z alone (TensorFlow's strings.lower).
    """
    backend = Pieces(content(path), path)
    end = next((n for n in map(backend.id_of, ('</s>', '<eos>')) if n is not None), None)
    if end is None:
        raise UserError(f'{path} has no end of a text, </s> or <eos>')
    pad = end if backend.id_of('</s>') == end else backend.id_of('<pad>')
    return Tokenizer(
        backend, 64, end if pad is None else pad, None, end, steps=cleaning.BIG_VISION,
        follows="google-research/big_vision's tokenize",
    )  # fmt: skip


def saved(path: pathlib.Path) -> Tokenizer:
    """What `Tokenizer.save` wrote; each of its values is checked."""
    found, file = storage.read_json(path / SETTINGS), path / SETTINGS
    kinds = {Fast.kind: VOCABULARY, Pieces.kind: PIECES}
    if found.get('kind') not in list(kinds):
        raise UserError(f'{file}: kind is {brief(found.get("kind"))}, not {" or ".join(kinds)}')
    of = path / kinds[found['kind']]
    backend = Pieces(content(of), of) if of.name == PIECES else Fast.parse(content(of), of)
    checks = {
        'length': lambda v: type(v) is int and v > 0,
        'sticky': lambda v: isinstance(v, bool),
        'side': lambda v: v in ('left', 'right'),
        'steps': lambda v: isinstance(v, list) and all(step in list(cleaning.STEPS) for step in v),
        'follows': lambda v: isinstance(v, str),
        'pad': lambda v: is_id(v, backend),
    }
    for name in SAVED:
        valid = checks.get(name, lambda v: v is None or is_id(v, backend))
        if name not in found or not valid(found[name]):
            raise UserError(f'{file}: {name} is {brief(found.get(name))}')
    settings = {name: found[name] for name in SAVED} | {'steps': tuple(found['steps'])}
    return Tokenizer(backend, documents=families.documents_of(path), **settings)


def is_id(value: Any, backend: Any) -> bool:
    """Whether a value is the number of a token."""
    return type(value) is int and 0 <= value < backend.size
