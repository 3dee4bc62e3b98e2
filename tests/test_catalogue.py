"""Names of public files with two towers: their tokenizers, and how images become their input."""

import numpy as np
import pytest
import tiny_towers
import words

import vit_jax
from vit_jax.convert import load
from vit_jax.errors import UserError
from vit_jax.models.text import Text
from vit_jax.models.two_towers import TwoTowers


def test_files_of_two_towers_have_a_tokenizer():
    rows = load.catalogue()
    towers = {name: row for name, row in rows.items() if name.endswith('-towers')}
    assert len(towers) > 20
    for name, row in towers.items():
        assert row['tokenizer'].startswith(('gs://', 'hf://')) and row['view'] == 'resize', name
        image = rows[name.removesuffix('-towers')]
        assert image['address'] == row['address'] + ':img' and 'tokenizer' not in image, name


def test_a_name_brings_its_tokenizer_and_its_view(tmp_path, monkeypatch):
    words.clip(tmp_path / 'tokens', length=12)
    size = vit_jax.tokenizer(tmp_path / 'tokens').vocab_size
    tiny_towers.save(tmp_path / 'towers.npz', size)
    (tmp_path / 'towers.json').unlink()
    row = dict(address=f'{tmp_path}/towers.npz', tokenizer=f'{tmp_path}/tokens', view='resize')
    monkeypatch.setattr(load, 'catalogue', lambda: {'mine': row})
    model, _ = vit_jax.load('mine')
    assert isinstance(model, TwoTowers) and model.metadata.view == 'resize'
    assert vit_jax.load(tmp_path / 'towers.npz')[0].metadata.view == 'central'
    assert vit_jax.tokenizer('mine').vocab_size == size
    text = load.read('mine', part='text', towers=True, values=False).model  # as convert asks for it
    assert isinstance(text, Text) and text.vocab_size == size


def test_a_text_tower_of_bert_is_named(tmp_path):
    tiny_towers.save(tmp_path / 'towers.npz', 9)
    with np.load(tmp_path / 'towers.npz') as file:
        arrays = {n: x for n, x in file.items() if '/txt/' not in n}
    name = 'params/txt/BertEncoder_0/embedder/embedders_token_ids/embedding'
    np.savez(tmp_path / 'lit.npz', **arrays, **{name: np.ones((9, 16), np.float32)})
    with pytest.raises(UserError, match=r"BERT, whose norms follow the blocks: .*part='image'"):
        vit_jax.load(tmp_path / 'lit.npz')
    assert vit_jax.load(tmp_path / 'lit.npz', part='image')[0].width == 16
