"""Recall of texts by images and the other way, beside a search by sorting."""

import itertools

import numpy as np
import pytest

from vit_jax.evaluators import retrieval


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def by_sorting(similarities, own, k):
    """Recall at k of queries [n] among answers [m], over all orders of equal similarities."""
    found = []
    for row, mine in zip(similarities, own, strict=True):
        orders = {}
        for value in row:
            orders[value] = np.flatnonzero(row == value)
        hits = []
        for parts in itertools.product(
            *(itertools.permutations(orders[value]) for value in sorted(orders, reverse=True))
        ):
            hits.append(mine[list(itertools.chain(*parts))[:k]].any())
        found.append(np.mean(hits))
    return np.mean(found)


@pytest.mark.parametrize('levels', [None, 2, 3])
def test_recalls_are_those_of_sorting_in_any_order_of_ties(levels, monkeypatch):
    monkeypatch.setattr(retrieval, 'CHUNK', 10)  # two rows at a time
    rng = np.random.default_rng(0 if levels is None else levels)
    images, texts = rng.standard_normal((5, 6)), rng.standard_normal((7, 6))
    if levels:  # few values, so that many are equal
        images, texts = (np.eye(6)[rng.integers(0, levels, len(x))] for x in (images, texts))
    owners = np.array([0, 0, 1, 2, 2, 2, 4])  # image 3 has no text
    found = retrieval.recalls(images, texts, owners, (1, 2, 5))
    similarities = images @ texts.T
    own = owners == np.arange(5)[:, None]
    for k in (1, 2, 5):
        kept = own.any(axis=1)
        assert np.isclose(found[f'image_to_text@{k}'], by_sorting(similarities[kept], own[kept], k))
        assert np.isclose(found[f'text_to_image@{k}'], by_sorting(similarities.T, own.T, k))


def test_a_collapsed_model_has_the_numbers_of_chance():
    images = np.ones((200, 1), np.float32)
    owners = np.repeat(np.arange(200), 5)
    found = retrieval.recalls(images, np.ones((1000, 1), np.float32), owners, (1, 10))
    assert np.isclose(found['text_to_image@10'], 10 / 200)
    assert np.isclose(found['image_to_text@1'], 5 / 1000)
    others = np.prod([(995 - i) / (1000 - i) for i in range(10)])
    assert np.isclose(found['image_to_text@10'], 1 - others)


def test_a_perfect_model_finds_all():
    images = unit(np.random.default_rng(0).standard_normal((50, 32)))
    owners = np.repeat(np.arange(50), 2)
    found = retrieval.recalls(images, images[owners], owners, (1, 5))
    assert set(found.values()) == {1.0}
