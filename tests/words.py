"""Small tokenizers in the files of their families, trained on a few captions, and strange texts."""

import gzip
import io
import json
import random

import sentencepiece
import tokenizers as tk

WORDS = (
    "a photo of the dog cat shoe bag above below next to red blue sneaker dress dog's 12 coat"
).split()
STRANGE = (
    '', ' ', 'A photo of a dog.', '  a   cat\n\tshoe ', 'it\'s a "dog"', "DOG'S 12", "'S 's", '...',
    '! dog', 'café CAFÉ cafe\u0301', '日本語 の 写真', '😀\U0001f469\u200d\U0001f467 dog',
    'x' * 300, 'a dog ' * 1700, 'a\0b', '▁a▁b', 'a_b', 'ΑΣ İ ſ', '\u200bdog', 'dog\u3000cat',
    'dog\u2028cat', 'ﬁ ligature ①', '</w>', '&amp; &lt;b&gt;', '&amp;amp;', 'n\u0303\u0323',
    '\ufeffdog', '\x1c\x85dog', '𝒟og',
)  # fmt: skip


def captions(count=300):
    draw = random.Random(5)
    return [' '.join(draw.choices(WORDS, k=draw.randint(2, 8))) for _ in range(count)]


def merges_of_clip(count=150):
    """Merges of a BPE of bytes with CLIP's end of words, from the trainer of tokenizers."""
    split = tk.pre_tokenizers
    tokenizer = tk.Tokenizer(tk.models.BPE(end_of_word_suffix='</w>'))
    tokenizer.pre_tokenizer = split.Sequence([split.Whitespace(), split.ByteLevel(False)])
    trainer = tk.trainers.BpeTrainer(
        vocab_size=count, end_of_word_suffix='</w>', show_progress=False
    )
    tokenizer.train_from_iterator(captions(), trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())['model']['merges']]


def symbols():
    """Characters of the bytes in CLIP's order, by the table of tokenizers."""
    plain = [chr(k) for k in range(256) if chr(k) in tk.pre_tokenizers.ByteLevel.alphabet()]
    return [*plain, *sorted(set(tk.pre_tokenizers.ByteLevel.alphabet()) - set(plain))]


def vocabulary_of_clip(merges):
    tokens = [*symbols(), *(one + '</w>' for one in symbols()), *map(''.join, merges)]
    tokens += ['<|startoftext|>', '<|endoftext|>']
    return {token: number for number, token in enumerate(tokens)}


def write(folder, **documents):
    """Writes JSON documents, by their names without the suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in documents.items():
        (folder / f'{name}.json').write_text(json.dumps(content))
    return folder


def clip(folder, length=16, **stated):
    """A folder with vocab.json and merges.txt."""
    merges = merges_of_clip()
    stated = dict(tokenizer_class='CLIPTokenizer', model_max_length=length) | stated
    write(folder, vocab=vocabulary_of_clip(merges), tokenizer_config=stated)
    lines = ['#version: 0.2', *map(' '.join, merges), '']
    (folder / 'merges.txt').write_text('\n'.join(lines), encoding='utf-8')
    return folder


def openai(folder):
    """The path of a list of merges as OpenAI has it."""
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *map(' '.join, merges_of_clip()), '']
    path = folder / 'bpe_simple_vocab_16e6.txt.gz'
    path.write_bytes(gzip.compress('\n'.join(lines).encode()))
    return path


def pieces(**settings):
    """Bytes of a model of SentencePiece with the special ids of c4_en."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*captions(), 'café über 日本語 😀']), model_writer=stream,
        **dict(vocab_size=110, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
               character_coverage=1.0, hard_vocab_limit=False, num_threads=1) | settings,
    )  # fmt: skip
    return stream.getvalue()


def siglip(folder, length=12, **stated):
    write(folder, tokenizer_config=dict(tokenizer_class='SiglipTokenizer') | stated, config=dict(
        model_type='siglip', text_config=dict(max_position_embeddings=length)
    ))  # fmt: skip
    (folder / 'spiece.model').write_bytes(pieces())
    return folder


def siglip2(folder, length=12):
    """Gemma's kind of BPE, with bytes for what is unknown; written by transformers.

    As in the published files the class is Gemma's and nothing in them lower-cases.
    """
    from transformers import Siglip2Tokenizer

    special = ['<pad>', '<eos>', '<bos>', '<unk>', '<mask>']
    letters = sorted({*''.join(WORDS), '▁', 'A', 'P'})
    tokens = [*special, *(f'<0x{k:02X}>' for k in range(256)), *letters, '▁a', 'do', 'dog']
    merges = [('▁', 'a'), ('d', 'o'), ('do', 'g')]
    made = Siglip2Tokenizer(
        {token: number for number, token in enumerate(tokens)}, merges, padding_side='right',
        add_bos_token=False, add_eos_token=True,
    )  # fmt: skip
    made.save_pretrained(folder)
    stated, whole = (
        json.loads((folder / f'{name}.json').read_text())
        for name in ('tokenizer_config', 'tokenizer')
    )
    whole['normalizer'] = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}
    write(folder, tokenizer=whole, tokenizer_config=stated | {'tokenizer_class': 'GemmaTokenizer'})
    text_config = dict(max_position_embeddings=length)
    write(folder, config=dict(model_type='siglip2', text_config=text_config))
    return folder


def bert(folder, length=12):
    """BERT's WordPiece; written by transformers."""
    from transformers import BertTokenizer

    tokens = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *WORDS, '##s', '##es', 'x', "'", '.']
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    BertTokenizer(vocabulary, model_max_length=length).save_pretrained(folder)
    return folder
