"""Vocabularies that are not a tokenizer.json, as tokenizers of the library tokenizers."""

import gzip
import io
import json
from collections.abc import Sequence
from typing import Any

from vit_jax.data.tokenizers.backends import MOST_BYTES, Fast, explained, library
from vit_jax.errors import UserError

START, END = '<|startoftext|>', '<|endoftext|>'
WORD_END = '</w>'
MERGES = 'bpe_simple_vocab_16e6.txt.gz'
# How CLIP splits a text into words (openai/CLIP clip/simple_tokenizer.py SimpleTokenizer.pat).
CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
WORDS = r'<\|startoftext\|>|<\|endoftext\|>|{}|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+'


def byte_symbols() -> list[str]:
    """The character that stands for each byte in a BPE of bytes, printable ones first.

    The order is that of CLIP's first 256 ids: bytes that are printable in Latin-1 stand for
    themselves, the others for the characters from U+0100 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*map(chr, plain), *(chr(0x100 + k) for k in range(256 - len(plain)))]


def clip(
    vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], openai: bool, file: object
) -> Fast:
    """CLIP's BPE of bytes, as openai/CLIP or as transformers' CLIPTokenizer has it.

    Openai's code cleans a text by itself; contractions are found in any case.
    """
    tk = library('tokenizers')
    normal, before = tk.normalizers, tk.pre_tokenizers
    pattern = WORDS.format(f'(?i:{CONTRACTIONS})' if openai else CONTRACTIONS)
    with explained(file, "a vocabulary of CLIP's"):
        tokenizer = tk.Tokenizer(tk.models.BPE(
            vocab=vocabulary, merges=list(merges), end_of_word_suffix=WORD_END, unk_token=END
        ))  # fmt: skip
        if not openai:
            steps = [normal.NFC(), normal.Replace(tk.Regex(r'\s+'), ' '), normal.Lowercase()]
            tokenizer.normalizer = normal.Sequence(steps)
        tokenizer.pre_tokenizer = before.Sequence([
            before.Split(tk.Regex(pattern), behavior='removed', invert=True),
            before.ByteLevel(add_prefix_space=False, use_regex=False),
        ])
        tokenizer.decoder = tk.decoders.ByteLevel()
        numbers = [tokenizer.token_to_id(token) for token in (START, END)]
        if None in numbers:
            raise ValueError(f'it has no {START} and {END}')
        tokenizer.add_special_tokens([START, END])
        tokenizer.post_processor = tk.processors.RobertaProcessing(
            (END, numbers[1]), (START, numbers[0]), trim_offsets=False, add_prefix_space=False
        )
        return Fast(tokenizer)


def clip_of_json(vocabulary: bytes, merges: bytes, file: object) -> Fast:
    """CLIP's BPE from vocab.json and merges.txt, as transformers reads them."""
    with explained(file, "a vocab.json of CLIP's"):
        numbers = json.loads(vocabulary)
        if not isinstance(numbers, dict) or not all(type(n) is int for n in numbers.values()):
            raise ValueError('not {token: number}')
    return clip(numbers, pairs(merges, file), openai=False, file=file)


def clip_of_merges(data: bytes, file: object) -> Fast:
    """CLIP's BPE from OpenAI's bpe_simple_vocab_16e6.txt.gz, whose first 48,894 merges it uses."""
    with explained(file, "a list of CLIP's merges"):
        with gzip.open(io.BytesIO(data)) as stream:
            text = stream.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f'more than {MOST_BYTES:,} bytes')
    merges = pairs(text, file)[: 49152 - 256 - 2]
    symbols = byte_symbols()
    tokens = [*symbols, *(one + WORD_END for one in symbols), *map(''.join, merges), START, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return clip(vocabulary, merges, openai=True, file=file)


def pairs(data: bytes, file: object) -> list[tuple[str, str]]:
    """Merges, one a line, from a file whose first line may be its version."""
    with explained(file, 'a list of merges'):
        lines = data.decode().split('\n')
        lines = lines[1:] if '#version' in lines[0] else lines
        found = [tuple(line.split()) for line in lines if line.strip()]
        if wrong := [merge for merge in found if len(merge) != 2]:
            raise ValueError(f'{" ".join(wrong[0])!r} is not a pair')
    return found


def bert(data: bytes, file: object) -> Fast:
    """BERT's WordPiece, lower-cased, from a vocab.txt with one token a line."""
    tk: Any = library('tokenizers')
    with explained(file, "a vocab.txt of BERT's"):
        lines = data.decode().splitlines()
        vocabulary = {token: number for number, token in enumerate(lines)}
        if lacking := [token for token in ('[PAD]', '[UNK]', '[CLS]') if token not in vocabulary]:
            raise UserError(f'{file} is not a vocab.txt of BERT: it has no {lacking[0]}')
        tokenizer = tk.Tokenizer(tk.models.WordPiece(vocabulary, unk_token='[UNK]'))
        tokenizer.normalizer = tk.normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = tk.pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = tk.decoders.WordPiece()
        return Fast(tokenizer)
