"""Retrieval of texts by images and of images by texts.

Shapes: N images, M texts, C texts at most of an image, E dimensions of the space of both.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from vit_jax import evaluators
from vit_jax.data import mixture
from vit_jax.data.tasks import image_text
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.evaluators import Subject, embeddings
from vit_jax.io.bounds import Positive, Prefetch, Rate, Size, Threads, Workers

CHUNK = 2**24  # similarities that are compared at a time


def metrics(*, k: Sequence[int] = (1, 5, 10), **settings: Any) -> dict[str, str]:
    """Names the recalls that an evaluation with these settings measures, {metric: 'max'}."""
    return {f'{way}@{n}': 'max' for way in ('image_to_text', 'text_to_image') for n in k}


class Retrieval:
    """Measures how often a text of an image, or the image of a text, is among the K most similar.

    - image_to_text@K: share of the images with a text of theirs among the K most similar texts
    - text_to_image@K: share of the texts with their image among the K most similar images

    All pairs of the data set are compared by the cosine of their embeddings (arXiv:2103.00020
    appendix E). Ties are broken at random, in expectation, so a model with the same embedding for
    all inputs scores at chance.

    Args:
      source: the data set, see Data sets.
      image_size: size of the images in pixels: one number, or (height, width).
      batch_size: images in a batch, over all devices and processes.
      view: how an image is cropped and resized, see Views.
      text: field of the captions, as in the task `image_text`.
      captions: number of captions of an image that count, the first ones: 5 for COCO.
      k: the numbers K.
      tokenizer: an address as for vit_jax.tokenizer. None: that of the run.
      threads, workers, prefetch, tolerance: as in the section `data`.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        source: dict,
        image_size: Size,
        batch_size: Positive[int],
        view: str | dict = 'resize',
        text: str | None = None,
        captions: Positive[int] = 5,
        k: tuple[Positive[int], ...] = (1, 5, 10),
        tokenizer: str | None = None,
        threads: Threads | None = None,
        workers: Workers = 0,
        prefetch: Prefetch = 8,
        tolerance: Rate = 0.0,
    ) -> None:
        embeddings.check_outputs(subject, 'image_embedding', 'text_embedding')
        self.mesh, self.k = subject.mesh, k
        self.source = mixture.load(**source)
        self.sources, self.metrics = {'source': self.source}, metrics(k=k)
        task = image_text.all_captions(
            self.source, view=view, image_size=image_size, most=captions, text=text,
            tokenizer=embeddings.tokenizer_of(subject, tokenizer),
        )  # fmt: skip
        read = evaluators.reader(
            self.mesh, batch_size, threads=threads, workers=workers, prefetch=prefetch,
            tolerance=tolerance,
        )  # fmt: skip
        self.feed = partial(read, self.source, task)
        self.step = evaluators.compiled(partial(embedded, subject.predict), self.mesh)

    def __call__(
        self,
        params: Any,
        stop: Stop | None = None,
        set_phase: Callable[[str], None] = lambda phase: None,
        advance: Callable[[int], None] = lambda images: None,
    ) -> dict[str, float] | None:
        """Measures {metric: recall}; returns None if `stop` becomes true.

        Calls `set_phase` and `advance` as `evaluators.totals` does.
        """
        stop = Stop() if stop is None else stop
        parts = list(evaluators.results(
            self.step, self.feed, params, self.mesh, stop, set_phase, advance
        ))  # fmt: skip
        if stop:
            return None
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        images = whole['images'][whole['mask'] > 0]
        real = whole['real'][whole['mask'] > 0]
        if not len(images):
            raise UserError('evals: no image of the data set can be read')
        owners = np.repeat(np.arange(len(images)), real.sum(axis=1))
        texts = whole['texts'][whole['mask'] > 0][real]
        set_phase('comparison of images and texts')
        return recalls(images, texts, owners, self.k) | {
            'examples': len(images), 'texts': len(texts),
        }  # fmt: skip


retrieval = Retrieval  # by its name in a config


def embedded(predict: Callable, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Embeddings of `images` [B, E] and `texts` [B, C, E], and which texts are `real` [B, C]."""
    words = batch['text']
    flat = words.reshape(-1, words.shape[-1])
    out = predict(params, {'image': batch['image'], 'text': flat})
    return {
        'images': out['image_embedding'],
        'texts': out['text_embedding'].reshape(*words.shape[:2], -1),
        'real': np.arange(words.shape[1]) < batch['captions'][:, None],
        'mask': batch['mask'],
    }


def recalls(
    images: np.ndarray, texts: np.ndarray, owners: np.ndarray, k: Sequence[int]
) -> dict[str, float]:
    """Recalls both ways at each K of `k`, of embeddings of unit length.

    Args:
      images: float [N, E].
      texts: float [M, E].
      owners: int [M], the image of each text; an image may have none, and then counts for nothing.
      k: numbers of texts or images among which one is looked for.
    """
    found = {}
    columns = np.arange(len(images))
    for way, queries, answers, own in (
        ('image_to_text', images, texts, lambda rows: owners == rows[:, None]),
        ('text_to_image', texts, images, lambda rows: owners[rows][:, None] == columns),
    ):  # fmt: skip
        counts = [count_ranks(*chunk) for chunk in compared(queries, answers, own)]
        greater, ties, others = np.concatenate(counts, axis=1)
        valid = ties > 0
        for n in k:
            chances = chance(greater[valid], ties[valid], others[valid], n)
            found[f'{way}@{n}'] = float(np.mean(chances)) if valid.any() else 0.0
    return found


def compared(
    queries: np.ndarray, answers: np.ndarray, own: Callable
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (similarities [n, A], which answers are the queries' own [n, A]), some at a time."""
    size = max(1, CHUNK // max(len(answers), 1))
    for start in range(0, len(queries), size):
        rows = np.arange(start, min(start + size, len(queries)))
        yield queries[rows] @ answers.T, own(rows)


def count_ranks(similarities: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, ...]:
    """Counts answers [n]: more similar than the best own one, equal and own, equal and not own."""
    best = np.max(np.where(own, similarities, -np.inf), axis=1, keepdims=True)
    equal = similarities == best
    greater = np.sum(similarities > best, axis=1)
    return greater, np.sum(equal & own, axis=1), np.sum(equal & ~own, axis=1)


def chance(greater: np.ndarray, own: np.ndarray, others: np.ndarray, k: int) -> np.ndarray:
    """Chance [n] that one of the `own` ties is among the first k, in a random order of all ties.

    Of m = k - `greater` places left and t ties, none is with chance C(t - own, m) / C(t, m).
    """
    ties = own + others
    places, missed = np.clip(k - greater, 0, ties), np.ones(len(own))
    for i in range(own.max(initial=0)):
        factor = np.maximum(ties - places - i, 0) / np.maximum(ties - i, 1)
        missed *= np.where(i < own, factor, 1)
    return 1 - missed
