"""Masked words: what is hidden, what is predicted, and the loss in NumPy."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.objectives import Examples, corruption, mlm

LENGTH, WORDS = 12, 30
PAD, BOS, EOS, MASK = 0, 1, 2, 3
TOKENIZER = types.SimpleNamespace(
    pad=PAD, bos=BOS, eos=EOS, mask=MASK, vocab_size=WORDS, length=LENGTH
)
MODEL = models.build(
    'text', num_classes=None, vocab_size=32, length=LENGTH, width=16, depth=1, num_heads=2,
    mlp_dim=32,
)  # fmt: skip
SPEC = {'text': jax.ShapeDtypeStruct((LENGTH,), np.int32)}


def made(model=MODEL, tokenizer=TOKENIZER):
    named = tokenizer and types.SimpleNamespace(loaded=tokenizer)
    return mlm.mlm(model, Examples(SPEC, tokenizer=named), corrupt=0.4)


def batch(size=8, seed=0):
    rng = np.random.default_rng(seed)
    words = rng.integers(4, WORDS, (size, LENGTH), dtype=np.int32)
    words[:, 0] = BOS
    for row, end in zip(words, rng.integers(1, LENGTH, size), strict=True):
        row[end], row[end + 1 :] = EOS, PAD
    return {'text': words, 'mask': (np.arange(size) != 1).astype(np.float32)}


def test_loss_is_that_of_numpy_on_corrupted_words(monkeypatch):
    objective, one = made(), batch()
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32),
        jax.jit(objective.init)(jax.random.key(0)),
    )
    key, read = jax.random.key(5), []
    apply = type(MODEL).apply

    def recorded(model, variables, x, **settings):
        if settings.get('train'):
            read.append(np.asarray(x))
        return apply(model, variables, x, **settings)

    monkeypatch.setattr(type(MODEL), 'apply', recorded)
    _, (metrics, _) = objective.loss(params, {}, {}, one, key, 0)
    words, (seen,) = one['text'], read
    real = words >= 4
    kinds, _ = (np.asarray(x) for x in corruption.draw(key, words.shape, 0.4, jnp.asarray(real)))
    assert (seen[kinds == 0] == MASK).all() and (seen[kinds >= 2] == words[kinds >= 2]).all()
    assert not (kinds[~real] < 3).any() and (kinds < 3).any()
    out = apply(MODEL, {'params': params['text']}, seen)[1]
    table = np.asarray(params['text']['vocabulary'], np.float64)
    logits = np.asarray(out['encoded'], np.float64) @ table.T
    logits += np.asarray(params['vocabulary_bias'])
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    own = np.take_along_axis(log, words[..., None], axis=-1)[..., 0]
    hits, chosen = logits.argmax(axis=-1) == words, kinds < 3
    counted = chosen.any(axis=1) & (one['mask'] > 0)
    each = [(x * chosen).sum(axis=1)[counted] / chosen.sum(axis=1)[counted] for x in (-own, hits)]
    assert np.isclose(metrics['loss'], each[0].mean(), rtol=1e-5)
    assert np.isclose(metrics['accuracy'], each[1].mean())


def test_texts_without_words_count_for_nothing():
    objective = made()
    params, one = jax.jit(objective.init)(jax.random.key(0)), batch()
    one['text'][:] = PAD
    value, _ = objective.loss(params, {}, {}, one, jax.random.key(0), 0)
    assert value == 0


def test_what_it_does_not_train_is_named():
    unmasked = types.SimpleNamespace(**vars(TOKENIZER) | {'mask': None})
    for model, tokenizer, words in [
        (models.build('vit/4', num_classes=None), TOKENIZER, 'text tower'),
        (MODEL, None, 'data.task'),
        (MODEL, unmasked, 'mask token'),
        (MODEL.clone(vocab_size=29), TOKENIZER, 'model.vocab_size is 29'),
        (MODEL.clone(causal=True), TOKENIZER, 'model.causal'),
    ]:
        with pytest.raises(UserError, match=words):
            made(model, tokenizer)
