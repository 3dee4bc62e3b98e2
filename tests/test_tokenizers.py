"""Texts to ids: equal to the libraries that the files are of; lengths, ends and padding hold."""

import gzip
import html
import itertools
import json
import pickle
import re
import subprocess
import sys
import unicodedata

import fsspec
import hypothesis
import numpy as np
import pytest
import regex
import words
from hypothesis import strategies as st

import vit_jax
from vit_jax.data import tokenizers
from vit_jax.data.tokenizers import cleaning, training
from vit_jax.errors import UserError

FOLDERS = {'clip': words.clip, 'siglip': words.siglip, 'siglip2': words.siglip2, 'bert': words.bert}
TEXTS = st.text(st.characters(exclude_categories=['Cs']), max_size=60)


@pytest.fixture(scope='module', params=FOLDERS)
def folder(request, tmp_path_factory):
    return FOLDERS[request.param](tmp_path_factory.mktemp(request.param) / 'model')


@pytest.fixture(scope='module')
def peer(folder):
    from transformers import AutoTokenizer, Siglip2Tokenizer

    if folder.parent.name.startswith('siglip2'):
        return Siglip2Tokenizer.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_ids_are_those_of_transformers(folder, peer):
    tokenizer = vit_jax.tokenizer(folder)
    expected = peer(
        list(words.STRANGE), padding='max_length', truncation=True, max_length=tokenizer.length,
        return_tensors='np',
    )['input_ids']  # fmt: skip
    found = tokenizer(words.STRANGE)
    assert found.dtype == np.int32 and found.shape == (len(words.STRANGE), tokenizer.length)
    for text, one, other in zip(words.STRANGE, found, expected, strict=True):
        assert one.tolist() == other.tolist(), text[:30]


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(TEXTS)
def test_any_text_has_the_ids_of_transformers(folder, peer, text):
    hypothesis.assume(not any(token in text for token in peer.all_special_tokens))
    tokenizer = tokenizers.load(folder)
    expected = peer(text, padding='max_length', truncation=True, max_length=tokenizer.length)
    assert tokenizer(text)[0].tolist() == expected['input_ids']


def test_the_length_of_a_model_is_stated_beside_it(tmp_path):
    """model_max_length, max_position_embeddings, or what the family has; the given one wins."""
    folder = words.clip(tmp_path / 'clip')
    assert tokenizers.load(folder).length == 16
    words.write(folder, config={'text_config': {'max_position_embeddings': 9}})
    assert tokenizers.load(folder).length == 9
    words.write(folder, tokenizer_config={'model_max_length': 10**30}, config={})
    assert tokenizers.load(folder).length == 77
    assert tokenizers.load(folder, length=5)('a dog ' * 9).shape == (1, 5)
    with pytest.raises(UserError, match='length 1 has no room'):
        tokenizers.load(folder, length=1)


def test_padding_is_what_the_documents_say(tmp_path):
    folder = words.clip(tmp_path, pad_token='!', padding_side='left')
    ids = tokenizers.load(folder)('a dog')[0]
    start, end = tokenizers.load(folder).bos, tokenizers.load(folder).eos
    assert ids[-1] == end and ids[0] == 0 and ids.tolist().index(start) > 1
    assert tokenizers.load(folder).decode(ids) == 'a dog'
    with pytest.raises(UserError, match='pad_token is none-such, no token'):
        tokenizers.load(words.clip(tmp_path, pad_token='none-such'))


def reference(text, merges):
    """OpenAI's ids, by the definition: the earliest merge first, wherever it applies."""
    fixes = {0xFB01: 'fi', 0x3000: ' ', 0x85: '\u2026', 0xFEFF: None, 0x1C: None, 0: None}
    text = html.unescape(html.unescape(unicodedata.normalize('NFC', text.translate(fixes))))
    text = ' '.join(regex.split(r'\s+', text)).strip().lower()
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    vocabulary, ids = words.vocabulary_of_clip(merges), []
    ranks = {merge: k for k, merge in enumerate(merges)}
    for word in regex.findall(pattern, text, regex.IGNORECASE)[:100]:
        plain = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
        others = [k for k in range(256) if k not in plain]
        parts = [chr(k if k in plain else 256 + others.index(k)) for k in word.encode()]
        parts[-1] += '</w>'
        while len(parts) > 1:
            pairs = enumerate(itertools.pairwise(parts))
            rank, k = min((ranks.get(pair, 10**9), k) for k, pair in pairs)
            if rank == 10**9:
                break
            parts[k : k + 2] = [parts[k] + parts[k + 1]]
        ids += [vocabulary[part] for part in parts]
    return [vocabulary['<|startoftext|>'], *ids, vocabulary['<|endoftext|>']]


def test_openai_files_follow_openai_code(tmp_path, monkeypatch):
    """HTML is unescaped twice, and padding is 0; the end is kept when a text is cut."""
    monkeypatch.setattr(cleaning, 'fixer', lambda: None)
    tokenizer = tokenizers.load(words.openai(tmp_path))
    merges = words.merges_of_clip()
    for text in words.STRANGE:
        ids = reference(text, merges)
        ids = [*ids[:76], ids[-1]] if len(ids) > 77 else ids + [0] * (77 - len(ids))
        assert tokenizer(text)[0].tolist() == ids, text[:30]
    assert 'without ftfy' in tokenizer.follows


@pytest.mark.parametrize('side', ['left', 'right'])
def test_texts_that_are_cut_are_logged_whatever_they_have(side, tmp_path, caplog):
    """The padding of OpenAI's files, 0, is the token of '!', and that of big_vision's the end."""
    (tmp_path / 'c4_en.model').write_bytes(words.pieces())
    for path in words.openai(tmp_path), tmp_path / 'c4_en.model':
        named = tokenizers.Named(str(path), 8)
        named.loaded = named.loaded._replace(side=side)
        texts = ['dog ' * n for n in range(4, 10)] + ['!' * n + ' dog' for n in range(4, 10)]
        for text in (*texts, *words.STRANGE):
            named.warned = False
            caplog.clear()
            named(text)
            cut = any('a text is cut to the 8 tokens' in r.getMessage() for r in caplog.records)
            assert cut == (named.loaded.count(text) > 8), text[:30]


@pytest.mark.parametrize('text, fixed', [
    ('\u201cit\u2019s\u201d', '"it\'s"'), ('\u02bcx', "'x"), ('\ufb01\ufb05', 'fi\u017ft'),
    ('\uff21\uff11\u3000', 'A1 '), ('\x85\x99', '\u2026\u2122'), ('e\u0301', '\xe9'),
    ('\x07a', 'a'), ('\u0149', "'n"), ('a\u2028b\r\nc', 'a\nb\nc'), ('\uff71', '\u30a2'),
    ('\u2460\xbd\u200d', '\u2460\xbd\u200d'),
])  # fmt: skip
def test_texts_are_fixed_as_ftfy_fixes_them(text, fixed, monkeypatch):
    """The expected texts are ftfy 6.3's; `fix` without it equals it on every character alone."""
    monkeypatch.setattr(cleaning, 'fixer', lambda: None)
    assert cleaning.fix(text) == fixed


def test_openai_code_uses_some_of_the_merges_of_its_file(tmp_path):
    """The file has 262,144; the vocabulary of CLIP is 49,408, its ends the last two."""
    pairs = itertools.product(words.symbols(), repeat=2)
    lines = ['#version', *map(' '.join, itertools.islice(pairs, 50_000))]
    path = tmp_path / 'merges.txt.gz'
    path.write_bytes(gzip.compress('\n'.join(lines).encode()))
    tokenizer = tokenizers.load(path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (49_406, 49_407, 49_408)


@pytest.mark.parametrize('clean, text, same', [
    ('canonicalize', 'A_dog&amp;#33;', 'a dog'), ('lower', 'A  DOG &amp;amp;', 'a dog &'),
    ('whitespace', 'A&nbsp;&nbsp;dog', 'A dog'),
])  # fmt: skip
def test_open_clip_cleans_before_the_tokenizer(tmp_path, clean, text, same):
    folder = words.clip(tmp_path)
    text_config = dict(context_length=7, hf_tokenizer_name='x', tokenizer_kwargs={'clean': clean})
    words.write(folder, open_clip_config={'model_cfg': {'text_cfg': text_config}})
    tokenizer = tokenizers.load(folder)
    assert tokenizer.length == 7 and tokenizer.follows.startswith('mlfoundations/open_clip')
    plain = tokenizer._replace(steps=())
    assert tokenizer(text).tolist() == plain(same).tolist() != plain(text).tolist()


def test_big_vision_models_keep_the_end_and_lower_ascii(tmp_path):
    """eos='sticky', pad_value=1 of c4_en: the end is the padding."""
    path = tmp_path / 'c4_en.model'
    path.write_bytes(words.pieces())
    tokenizer = tokenizers.load(path, length=4)
    dog, cat = (tokenizer(text)[0, 0] for text in ('dog', 'cat'))
    assert tokenizer(['', 'dog', 'DOG cat dog', 'dog ' * 9]).tolist() == [
        [1] * 4, [dog, 1, 1, 1], [dog, cat, dog, 1], [dog, dog, dog, 1]
    ]  # fmt: skip
    assert tokenizer('É').tolist() != tokenizer('é').tolist()
    cut = tokenizer._replace(sticky=False)
    assert cut('dog ' * 9).tolist() == [[dog] * 4] and cut('dog').tolist() == [[dog, 1, 1, 1]]


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
    st.lists(TEXTS, max_size=3), st.integers(2, 9), st.sampled_from(['left', 'right'])
)
def test_every_row_has_its_end_once_and_then_padding(folder, texts, length, side):
    tokenizer = tokenizers.load(folder, length=length)._replace(side=side, pad=3)
    rows = tokenizer(texts)
    assert rows.shape == (len(texts), length) and rows.dtype == np.int32
    for text, row in zip(texts, rows.tolist(), strict=True):
        content = len(tokenizer.ids(text))
        own = row[:content] if side == 'right' else row[length - content :]
        assert own == tokenizer.ids(text) and own[-1] == tokenizer.eos
        assert tokenizer.bos is None or own[0] == tokenizer.bos
        assert sorted([*own, *[3] * (length - content)]) == sorted(row)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(st.lists(st.sampled_from(['a', 'dog', 'red', 'shoe', 'bag']), max_size=8))
def test_known_words_are_decoded(folder, known):
    tokenizer = tokenizers.load(folder, length=70)
    assert tokenizer.decode(tokenizer(' '.join(known).upper())[0]).strip() == ' '.join(known)


def test_saved_files_and_pickles_give_the_same_ids(folder, tmp_path):
    tokenizer = tokenizers.load(folder)
    tokenizer.save(tmp_path / 'run' / 'tokenizer')
    for other in (tokenizers.load(tmp_path / 'run'), pickle.loads(pickle.dumps(tokenizer))):
        assert other.fingerprint == tokenizer.fingerprint
        assert other(words.STRANGE).tolist() == tokenizer(words.STRANGE).tolist()
    for other in (tokenizer._replace(side='left'), tokenizer.with_length(5)):
        assert other.fingerprint != tokenizer.fingerprint


def test_an_address_is_fetched_without_its_weights(tmp_path, monkeypatch):
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'cache'))
    local = words.siglip(tmp_path / 'model')
    store = fsspec.filesystem('memory')
    for path in local.iterdir():
        store.pipe(f'/siglip/{path.name}', path.read_bytes())
    store.pipe('/siglip/model.safetensors', bytes(99))
    expected = tokenizers.load(local)(words.STRANGE).tolist()
    for address in ('memory://siglip', 'memory://siglip/model.safetensors'):
        assert vit_jax.tokenizer(address)(words.STRANGE).tolist() == expected
    vit_jax.tokenizer(local).save(tmp_path / 'saved')
    store.pipe('/run/config.json', b'{}')
    for path in (tmp_path / 'saved').iterdir():
        store.pipe(f'/run/tokenizer/{path.name}', path.read_bytes())
    assert tokenizers.load('memory://run')(words.STRANGE).tolist() == expected
    assert not [path for path in tmp_path.glob('cache/*/*') if path.suffix == '.safetensors']
    with pytest.raises(UserError, match='memory://none has none of'):
        tokenizers.load('memory://none')


@pytest.mark.parametrize('text, error', [
    ('a\udcff', 'character 1 of a text is half of a pair'), (b'dog', "b'dog' is not a text"),
    (None, 'None is not a text'), ('a' * (2**20 + 1), 'longer than 1,048,576'),
])  # fmt: skip
def test_what_is_no_text_is_named(folder, text, error):
    with pytest.raises(UserError, match=error) as caught:
        tokenizers.load(folder)([text])
    assert '\n' not in str(caught.value)


BROKEN = {
    'no': ({}, 'has no tokenizer: none of tokenizer.json'),
    'json': ({'tokenizer.json': b'{"model": 3}'}, 'tokenizer.json is not a tokenizer.json'),
    'bytes': ({'tokenizer.json': b'\xff\x00'}, 'tokenizer.json is not a tokenizer.json'),
    'model': ({'spiece.model': b'\x00' * 99}, 'spiece.model is not a model of SentencePiece'),
    'gz': ({'bpe_simple_vocab_16e6.txt.gz': b'\x1f\x8b\x08junk'}, "not a list of CLIP's merges"),
    'merges': ({'vocab.json': b'{"a": 0}', 'merges.txt': b'a b\n'}, "not a vocabulary of CLIP's"),
    'vocab': ({'vocab.json': b'[1]', 'merges.txt': b''}, 'not {token: number}'),
    'bert': ({'vocab.txt': b'dog\ncat\n'}, 'it has no .PAD.'),
    'saved': ({'vit_jax_tokenizer.json': b'{"kind": "pickle"}'}, 'kind is pickle, not'),
    'steps': (
        {'vit_jax_tokenizer.json': b'{"kind": "sentencepiece", "length": 3, "pad": 0, "bos": 0, '
         b'"eos": 1, "mask": 0, "sticky": true, "side": "left", "steps": [[]]}',
         'spiece.model': None}, 'vit_jax_tokenizer.json: steps is',
    ),
    'length': (
        {'vit_jax_tokenizer.json': b'{"kind": "sentencepiece"}', 'spiece.model': None},
        'vit_jax_tokenizer.json: length is None',
    ),
}


@pytest.mark.parametrize('name', BROKEN)
def test_broken_files_are_one_line(tmp_path, name):
    files, error = BROKEN[name]
    for file, content in files.items():
        (tmp_path / file).write_bytes(words.pieces() if content is None else content)
    with pytest.raises(UserError, match=re.escape(error).replace('\\.PAD\\.', '.PAD.')) as caught:
        tokenizers.load(tmp_path)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('lacking', ['tokenizers', 'sentencepiece'])
def test_a_missing_library_is_named_with_its_extra(tmp_path, lacking):
    folder = (words.clip if lacking == 'tokenizers' else words.siglip)(tmp_path)
    text = (
        f'import sys; sys.modules[{lacking!r}] = None\nfrom vit_jax.data import tokenizers\n'
        f'try: tokenizers.load({str(folder)!r})\nexcept ValueError as e: print(e)\n'
        'print("jax" in sys.modules, "flax" in sys.modules)'
    )
    done = subprocess.run([sys.executable, '-c', text], capture_output=True, text=True, timeout=200)
    assert f'texts need {lacking}; install it with: pip install "vit_jax[text]"' in done.stdout
    assert done.stdout.endswith('False False\n'), done.stdout + done.stderr


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_a_trained_tokenizer_is_a_function_of_its_captions(kind, tmp_path):
    captions = [*words.captions(), 'Caf\u00e9 \U0001f600']
    (tmp_path / 'a.txt').write_text('\n'.join(captions), encoding='utf-8')
    command = [sys.executable, '-m', 'vit_jax.data.tokenizers', '--captions', tmp_path / 'a.txt',
               '--vocab_size=330', '--length=9', f'--kind={kind}', '--json', '--out']  # fmt: skip
    done = subprocess.run([*command, tmp_path / 'b'], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    settings = dict(kind=kind, vocab_size=330, length=9, lower=True)
    own = training.train(captions, **settings)
    tokenizer = tokenizers.load(tmp_path / 'b')
    assert tokenizer.fingerprint == own.fingerprint  # another process, another seed of hashes
    other = training.train([*captions, 'another word'], **settings)
    assert other.fingerprint != own.fingerprint
    assert tokenizer.length == 9 and tokenizer.eos == 1 and tokenizer.mask is not None
    for text in ('a dog', 'red shoe', 'caf\u00e9 \U0001f600', '\u65e5\u672c'):
        ids = tokenizer.with_length(60)(f'  {text.upper()} ')[0]
        assert tokenizer.decode(ids) == text
    found = json.loads(done.stdout)
    counts = [len(tokenizer.with_length(99).ids(text)) for text in captions]
    assert found['captions'] == len(captions) and found['vocab_size'] == tokenizer.vocab_size <= 330
    assert found['tokens'] == pytest.approx(np.mean(counts))
    assert found['cut'] == pytest.approx(np.mean(np.array(counts) > 9))
    assert len(found['examples']) == 5 and found['spelled'] == 0
    # a, dog, </s>; a space, three bytes, </s>
    assert training.report(tokenizer, ['a dog', '\u65e5']).spelled == 3 / 8
    assert all(''.join(parts) in text.replace(' ', '') for text, parts in found['examples'].items())


def test_transformers_reads_a_trained_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    settings = dict(kind='bpe', vocab_size=330, length=9, lower=True)
    tokenizer = training.train(words.captions(), **settings)
    tokenizer.save(tmp_path)
    peer = AutoTokenizer.from_pretrained(tmp_path)
    texts = list(words.STRANGE)
    expected = peer(texts, padding='max_length', truncation=True, max_length=9)['input_ids']
    assert tokenizer(texts).tolist() == expected


def test_what_trains_no_tokenizer_is_refused(tmp_path):
    settings = dict(kind='bpe', vocab_size=330, length=9, lower=True)
    for change, error in (
        (dict(vocab_size=9), 'a vocabulary of 9 is below 260'), (dict(length=0), 'nothing states'),
    ):  # fmt: skip
        with pytest.raises(UserError, match=error):
            training.train(['a dog'], **settings | change)
    with pytest.raises(UserError, match='half of a pair'):
        training.train(['\udcff'], **settings)
