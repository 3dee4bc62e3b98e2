"""Tokenizers: texts to numbers [B, L], with all that belongs to a model's protocol.

Length, padding, begin and end, lower-casing and cleaning come with the vocabulary, as a checkpoint
has them; nothing of it is left to the caller. `load` reads the files of all kinds.
"""

import functools
import os
import pathlib
from collections.abc import Iterable

import numpy as np
from absl import logging

from vit_jax.data.tokenizers import folders
from vit_jax.data.tokenizers.tokenizer import Tokenizer
from vit_jax.errors import UserError, shown

__all__ = ['Named', 'Tokenizer', 'load', 'warn_of_another']


def load(address: str | os.PathLike, *, length: int | None = None) -> Tokenizer:
    """Reads a tokenizer from a path, or from an address (gs://, https://, hf://).

    These are known, see `folders`: a folder that `save` or `python -m vit_jax.data.tokenizers`
    wrote, or one that has such a folder as tokenizer/, as a run's workdir; the folder of a
    checkpoint of Hugging Face or OpenCLIP; a tokenizer.json; a model of SentencePiece
    (spiece.model, sentencepiece.model); CLIP's bpe_simple_vocab_16e6.txt.gz; a vocab.txt of BERT.

    Args:
      address: where it is.
      length: number of tokens of a text, in place of its own.

    Raises:
      UserError: there is none, or a file of it is broken or does not say what it must.
    """
    return of_its_length(address).with_length(length)


def of_its_length(address: str | os.PathLike) -> Tokenizer:
    """The tokenizer at an address, of length 0 where its files state none; see `load`."""
    if not isinstance(address, (str, os.PathLike)) or not str(address):
        raise UserError(f'the tokenizer is {shown(address)}, not a path or an address')
    return folders.read(pathlib.Path(folders.local(str(address))))


class Named:
    """The tokenizer at an address, read at its first use: a plan needs the length alone.

    Attributes:
      address: where it is, see `load`.
      length: number L of tokens of a text.
      fits: (tokens in the vocabulary of the model, tokens of its longest text), None if unknown.
      otherwise: what the user can do where there is none.
    """

    def __init__(
        self,
        address: str,
        length: int | None = None,
        fits: tuple[int, int] | None = None,
        otherwise: str = '',
    ):
        self.address, self.given, self.fits, self.otherwise = address, length, fits, otherwise
        self.warned = False  # of texts that are cut

    @functools.cached_property
    def loaded(self) -> Tokenizer:
        """The tokenizer, of texts that the model takes.

        Raises UserError as `load` does, and where the model has embeddings for fewer tokens.
        """
        try:
            found = of_its_length(self.address)
        except UserError as e:
            raise UserError(f'{e}; {self.otherwise}') if self.otherwise else e from e
        if self.fits is None:
            return found.with_length(self.given)
        vocabulary, longest = self.fits
        if found.vocab_size > vocabulary:
            raise UserError(
                f'tokenizer {self.address} has {found.vocab_size} tokens, and the model '
                f'{vocabulary} (vocab_size); name the tokenizer that it was trained with'
            )
        return found.with_length(min(self.given or found.length or longest, longest))

    def check(self) -> None:
        """Reads the tokenizer, to fail before a run begins; raises UserError as `loaded` does."""
        assert self.loaded

    @property
    def length(self) -> int:
        return self.given or self.loaded.length

    def __call__(self, texts: str | Iterable[str]) -> np.ndarray:
        """Ids int32 [B, L] of texts; logs once how many are cut, with one of them."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = self.loaded(texts)
        if not self.warned:
            self.warn_of_cut(texts, ids)
        return ids

    def warn_of_cut(self, texts: list[str], ids: np.ndarray) -> None:
        """Logs if some of the texts have more tokens than their ids, [B, L]."""
        # Of the last two one may be the end, which may be the padding; texts may have it, too.
        last = ids[:, :2] if self.loaded.side == 'left' else ids[:, -2:]
        full = (last != self.loaded.pad).any(axis=1)
        counts = {k: self.loaded.count(texts[k]) for k in np.flatnonzero(full)}
        cut = [k for k, count in counts.items() if count > self.length]
        if not cut:
            return
        self.warned = True
        how_many = f'{len(cut):,} of {len(texts):,} texts are' if len(texts) > 1 else 'a text is'
        logging.warning(
            '%s cut to the %d tokens of the tokenizer (%s), such as %s of %d tokens', how_many,
            self.length, self.address, shown(texts[cut[0]]), counts[cut[0]],
        )  # fmt: skip


def warn_of_another(own: str, named: Named) -> None:
    """Logs if a tokenizer makes other ids than the one at the address `own`, if one is there."""
    try:
        found = load(own, length=named.length)
    except UserError:  # a checkpoint without one
        return
    if found.fingerprint != named.loaded.fingerprint:
        logging.warning(
            'the tokenizer %s, that of the checkpoint, makes other ids than %s', own, named.address
        )
