"""Trains a tokenizer on captions: equal captions give equal files.

A byte-level BPE (arXiv:1508.07909; bytes as in GPT-2) is made by the library tokenizers, a unigram
model (arXiv:1804.10959) by SentencePiece, since tokenizers' own trainer gives other pieces each
time. Both know every text: characters that no caption has are spelled by bytes.
"""

import io
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from vit_jax.data.tokenizers.backends import Fast, Pieces, library
from vit_jax.data.tokenizers.tokenizer import Tokenizer, checked
from vit_jax.errors import UserError
from vit_jax.io.text import brief

PAD, END, UNKNOWN, MASK = SPECIAL = '<pad>', '</s>', '<unk>', '<mask>'
PART = '\N{REPLACEMENT CHARACTER}'  # the text of bytes that are no character
FOLLOWS = 'python -m vit_jax.data.tokenizers'
Kind = Literal['bpe', 'unigram']


def train(
    captions: Sequence[str], *, kind: Kind, vocab_size: int, length: int, lower: bool
) -> Tokenizer:
    """A tokenizer whose texts end with </s> and are padded with <pad>.

    Its vocabulary has `vocab_size` tokens, or fewer where the captions have no more. Raises
    UserError for too small a vocabulary, or captions from which nothing is learnt.
    """
    for text in captions:
        checked(text)
    least = len(SPECIAL) + 256  # bytes
    if vocab_size < least:
        raise UserError(f'a vocabulary of {vocab_size} is below {least}: bytes and special tokens')
    make = bpe if kind == 'bpe' else unigram
    backend = make(captions, vocab_size, lower)
    pad, end, mask = (backend.id_of(token) for token in (PAD, END, MASK))
    stated = dict(
        tokenizer_class='PreTrainedTokenizerFast', model_max_length=length, padding_side='right',
        pad_token=PAD, eos_token=END, unk_token=UNKNOWN, mask_token=MASK,
    )  # fmt: skip
    documents = {'tokenizer_config.json': stated} if kind == 'bpe' else {}
    found = Tokenizer(backend, length, pad, None, end, mask, follows=FOLLOWS, documents=documents)
    return found.with_length(length)


def bpe(captions: Sequence[str], vocab_size: int, lower: bool) -> Fast:
    """A byte-level BPE; spaces are collapsed."""
    tk: Any = library('tokenizers')
    normal = tk.normalizers
    steps = [normal.NFC(), normal.Replace(tk.Regex(r'\s+'), ' '), normal.Strip()]
    tokenizer = tk.Tokenizer(tk.models.BPE())
    tokenizer.normalizer = normal.Sequence(steps + ([normal.Lowercase()] if lower else []))
    tokenizer.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=sorted(tk.pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(iter(captions), trainer)
    tokenizer.post_processor = tk.processors.TemplateProcessing(
        single=f'$A {END}', special_tokens=[(END, SPECIAL.index(END))]
    )
    return Fast(tokenizer)


def unigram(captions: Sequence[str], vocab_size: int, lower: bool) -> Pieces:
    """A unigram model; texts are normalised by NFKC, and case-folded if `lower`."""
    sentencepiece, stream = library('sentencepiece'), io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions), model_writer=stream, vocab_size=vocab_size,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, control_symbols=[MASK], byte_fallback=True,
            normalization_rule_name='nmt_nfkc_cf' if lower else 'nmt_nfkc', character_coverage=1.0,
            max_sentence_length=4 * max(map(len, captions)) + 1, hard_vocab_limit=False,
            num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as e:
        raise UserError(f'SentencePiece makes no model of these captions: {brief(e)}') from e
    return Pieces(stream.getvalue())


class Report(NamedTuple):
    """How a tokenizer cuts captions."""

    captions: int
    vocab_size: int
    tokens: float  # of a caption, its end included, before it is cut
    cut: float  # share of the captions that are longer than the tokenizer's length
    spelled: float  # share of the tokens that are bytes of a character


def report(tokenizer: Tokenizer, captions: Sequence[str]) -> Report:
    """Counts the tokens of captions."""
    whole = tokenizer.with_length(2**20)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    lengths = []
    for text in captions:
        ids = whole.ids(text)
        lengths.append(len(ids))
        np.add.at(counts, ids, 1)
    parts = [n for n in np.flatnonzero(counts) if PART in tokenizer.backend.text([int(n)])]
    return Report(
        len(captions), tokenizer.vocab_size, sum(lengths) / len(captions),
        float(np.mean(np.array(lengths) > tokenizer.length)),
        float(counts[parts].sum() / counts.sum()),
    )  # fmt: skip


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """The parts into which a text is cut, each as text; a part that is none is an underscore."""
    ids = tokenizer.with_length(2**20).ids(text)
    return [tokenizer.backend.text([one]).strip() or '_' for one in ids if one != tokenizer.eos]
