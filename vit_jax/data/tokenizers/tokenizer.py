"""A tokenizer: a vocabulary with all that belongs to the protocol of a model."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data.tokenizers.cleaning import clean, fixer
from vit_jax.errors import UserError, shown
from vit_jax.io import storage
from vit_jax.io.text import to_json

SETTINGS = 'vit_jax_tokenizer.json'
SAVED = ('length', 'pad', 'bos', 'eos', 'mask', 'sticky', 'side', 'steps', 'follows')
MOST_CHARACTERS = 2**20  # of a text


class Tokenizer(NamedTuple):
    """A pure function of texts to int32 [B, L]: `tokenizer(['a shoe', 'a bag'])`.

    Attributes:
      backend: what cuts a text, see `backends`; picklable.
      length: number L of tokens of every text.
      pad: id that shorter texts are filled with.
      bos, eos: ids before and after each text; None: there is none.
      mask: id of the token for hidden ones, if there is one.
      sticky: whether a text that is cut keeps its end, as in CLIP and as eos='sticky' in
        google-research/big_vision pp/ops_text.py.
      side: where padding is.
      steps: names of cleaning steps, see `cleaning`.
      follows: whose protocol this is, in words.
      documents: {file name: content} of what came beside it, for other libraries.
    """

    backend: Any
    length: int
    pad: int
    bos: int | None = None
    eos: int | None = None
    mask: int | None = None
    sticky: bool = True
    side: str = 'right'
    steps: tuple[str, ...] = ()
    follows: str = ''
    documents: dict[str, Any] = {}

    def __call__(self, texts: str | Iterable[str]) -> np.ndarray:
        """Ids int32 [B, L] of texts; one text is [1, L].

        Raises UserError for what is not a text.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = np.full((len(texts), self.length), self.pad, np.int32)
        for row, text in zip(ids, texts, strict=True):
            own = self.ids(text)
            place = slice(self.length - len(own), None) if self.side == 'left' else len(own)
            row[place if self.side == 'left' else slice(place)] = own
        return ids

    def ids(self, text: str) -> list[int]:
        """Ids of a text with its begin and end, at most L."""
        before, after = ([] if one is None else [one] for one in (self.bos, self.eos))
        ids = [*before, *self.backend.ids(clean(checked(text), self.steps))]
        if self.sticky:
            ids = ids[: self.length - len(after)]
        return [*ids, *after][: self.length]

    def count(self, text: str) -> int:
        """Number of tokens of a text that is not cut, its begin and end among them."""
        ends = (self.bos is not None) + (self.eos is not None)
        return ends + len(self.backend.ids(clean(checked(text), self.steps)))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of one row of ids, from its begin to its end or padding."""
        ids = [int(number) for number in ids]
        if self.side == 'left':
            ids = ids[next((k for k, one in enumerate(ids) if one != self.pad), len(ids)) :]
        ids = ids[1:] if ids[:1] == [self.bos] else ids
        if self.eos in ids:
            ids = ids[: ids.index(self.eos)]
        while ids and ids[-1] == self.pad:
            ids.pop()
        if wrong := [number for number in ids if not 0 <= number < self.vocab_size]:
            raise UserError(f'id {wrong[0]} is not in the vocabulary, 0 to {self.vocab_size - 1}')
        return self.backend.text(ids)

    @property
    def vocab_size(self) -> int:
        """The highest id and one."""
        return self.backend.size

    def with_length(self, length: int | None) -> 'Tokenizer':
        """The same for texts of another length; raises UserError if begin and end do not fit."""
        length = self.length if length is None else length
        if not length:
            raise UserError('nothing states the length of a text; give it: length=64')
        least = (self.bos is not None) + (self.eos is not None) or 1
        if not least <= length <= MOST_CHARACTERS:
            raise UserError(f'a text of length {length} has no room for begin and end')
        return self._replace(length=length)

    @property
    def fingerprint(self) -> str:
        """Hash of all that determines the ids, as 12 hexadecimal digits."""
        found = hashlib.sha256(to_json(self.settings()).encode())
        for name, data in sorted(self.backend.files().items()):
            found.update(name.encode() + data)
        if 'fix' in self.steps:
            found.update(b'ftfy' if fixer() else b'')
        return found.hexdigest()[:12]

    def settings(self) -> dict[str, Any]:
        """What is saved beside the vocabulary."""
        return {'kind': self.backend.kind, **{name: getattr(self, name) for name in SAVED}}

    def save(self, folder: str | os.PathLike) -> None:
        """Writes files from which `load` makes the same ids, to a folder or an address on gs://."""
        from etils import epath

        folder = epath.Path(folder)
        storage.make_folder(folder)
        for name, data in self.files().items():
            storage.write(folder / name, data)

    def files(self) -> dict[str, bytes]:
        """{name: content} of the files that `save` writes."""
        documents = self.documents | {SETTINGS: self.settings()}
        return self.backend.files() | {name: document(x) for name, x in documents.items()}


def document(content: Any) -> bytes:
    """A JSON file."""
    return (json.dumps(content, indent=2, ensure_ascii=True) + '\n').encode()


def checked(text: Any) -> str:
    """Returns a text; raises UserError, in one line, for anything else."""
    if not isinstance(text, str):
        raise UserError(f'{shown(text)} is not a text')
    if len(text) > MOST_CHARACTERS:
        raise UserError(f'a text of {len(text):,} characters is longer than {MOST_CHARACTERS:,}')
    try:
        text.encode()
    except UnicodeEncodeError as e:
        code = ord(text[e.start])
        raise UserError(
            f'character {e.start} of a text is half of a pair (U+{code:04X}), which is no character'
        ) from None
    return text
