"""What cuts a text into tokens: the library tokenizers, or sentencepiece.

A backend has `ids(text)` (without begin and end), `text(ids)`, `id_of(token)`, `size`, the highest
id and one, and `files()`, {name: bytes} of what it is read from. It can be pickled.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from vit_jax.errors import UserError
from vit_jax.io import storage
from vit_jax.io.text import brief

MOST_BYTES = 2**27  # of a vocabulary; Gemma's tokenizer.json has 34 million
MOST_TOKENS = 2**24
PROBE = 'a \N{SNOWMAN}'  # at which a broken tokenizer fails, one without unknown tokens too
VOCABULARY, PIECES = 'tokenizer.json', 'spiece.model'


def library(name: str) -> Any:
    """Imports tokenizers or sentencepiece; without it raises UserError that names the extra."""
    try:
        return __import__(name)
    except ImportError as e:
        raise UserError(
            f'texts need {name}; install it with: pip install "vit_jax[text]"'
        ) from e


def content(path: pathlib.Path) -> bytes:
    """Bytes of a file of a vocabulary; raises UserError."""
    data = storage.read(path, MOST_BYTES)
    if data is None:
        raise UserError(f'no file {path}')
    return data


@contextlib.contextmanager
def explained(file: object, what: str) -> Iterator[None]:
    """Turns whatever a library raises for a broken file into UserError, in one line."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as e:
        raise UserError(f'{file} is not {what}: {brief(e)}') from e
    except BaseException as e:
        if type(e).__name__ != 'PanicException':  # Rust's, which is no Exception
            raise
        raise UserError(f'{file} is not {what}: {brief(e)}') from e


class Fast:
    """A tokenizers.Tokenizer; `ends` are (ids before, ids after) that it adds to a text."""

    kind = 'tokenizers'

    def __init__(self, tokenizer: Any):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.word_end = getattr(tokenizer.model, 'end_of_word_suffix', None)  # of BPE: </w>
        numbers = tokenizer.get_vocab(with_added_tokens=True).values()
        self.size = max(numbers, default=-1) + 1
        if not 0 < self.size <= MOST_TOKENS:
            raise ValueError(f'its ids end at {self.size - 1:,}')
        processor = tokenizer.post_processor
        self.ends = added(json.loads(processor.__getstate__())) if processor else ([], [])
        self.ids(PROBE)

    @classmethod
    def parse(cls, data: bytes, file: object) -> 'Fast':
        """Parses a tokenizer.json; raises UserError with the name of the file."""
        with explained(file, 'a tokenizer.json of Hugging Face'):
            return cls(library('tokenizers').Tokenizer.from_str(data.decode()))

    def ids(self, text: str) -> list[int]:
        """Ids of the tokens of a text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def text(self, ids: Sequence[int]) -> str:
        """The text that ids stand for."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return (text.replace(self.word_end, ' ') if self.word_end else text).strip()

    def id_of(self, token: str) -> int | None:
        """Id of a token, None if there is none."""
        return self.tokenizer.token_to_id(token)

    def files(self) -> dict[str, bytes]:
        return {VOCABULARY: self.tokenizer.to_str().encode()}


def added(processor: Any) -> tuple[list[int], list[int]]:
    """(ids before, ids after) of a post-processor, as tokenizer.json has it."""
    kind = processor['type']
    if kind == 'Sequence':
        pairs = [added(one) for one in processor['processors']]
        return sum((one[0] for one in reversed(pairs)), []), sum((one[1] for one in pairs), [])
    if kind in ('RobertaProcessing', 'BertProcessing'):
        return [processor['cls'][1]], [processor['sep'][1]]
    before, after, found = [], [], None
    for piece in processor['single'] if kind == 'TemplateProcessing' else ():
        if 'Sequence' in piece:
            found = after
        else:
            ids = processor['special_tokens'][piece['SpecialToken']['id']]['ids']
            (before if found is None else found).extend(ids)
    return before, after


class Pieces:
    """A sentencepiece.SentencePieceProcessor, from the bytes of its model."""

    kind = 'sentencepiece'

    def __init__(self, data: bytes, file: object = PIECES):
        self.data = data
        with explained(file, 'a model of SentencePiece'):
            self.processor = library('sentencepiece').SentencePieceProcessor(model_proto=data)
            self.size = self.processor.get_piece_size()
            self.ids(PROBE)

    def __reduce__(self):
        return Pieces, (self.data,)

    def ids(self, text: str) -> list[int]:
        """Ids of the pieces of a text; names of control symbols in it are text like any other."""
        return self.processor.encode(text)

    def text(self, ids: Sequence[int]) -> str:
        """The text that ids stand for."""
        return self.processor.decode(list(ids))

    def id_of(self, token: str) -> int | None:
        """Id of a piece, None if there is none."""
        found = self.processor.piece_to_id(token)
        return found if self.processor.id_to_piece(found) == token else None

    def files(self) -> dict[str, bytes]:
        return {PIECES: self.data}
