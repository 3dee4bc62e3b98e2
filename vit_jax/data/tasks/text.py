"""Text alone, with or without its class."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from vit_jax.data import captions
from vit_jax.data.sources import Source
from vit_jax.data.tasks import Task
from vit_jax.data.tokenizers import Named
from vit_jax.errors import UserError
from vit_jax.io.bounds import Positive


def text(
    source: Source,
    *,
    tokenizer: str,
    length: Positive[int] | None = None,
    text: str | None = None,
    labels: bool = False,
) -> Task:
    """A text: `text` int32 [L]; with `labels`, its class: `label` int32 [].

    Of several texts of an example each step draws one, by (seed, step, example).

    Args:
      tokenizer, length, text: as in the task `image_text`.
      labels: whether examples have the class of the data set's label.
    """
    named = Named(tokenizer, length)
    if labels:
        return with_labels(source, named, text)
    blank = {'text': np.zeros(named.length, np.int32)}
    return Task(blank, partial(ids_of, tokenizer=named, text=text), tokenizer=named)


def with_labels(
    source: Source, tokenizer: Named, text: str | None, draw: bool = True
) -> Task:
    """The task with labels, for a tokenizer; arguments are those of `text`.

    Of several texts the first one is read unless `draw`, as in evaluations.
    """
    if not source.classes:
        raise UserError('the data set has no labels; data.labels=False reads texts alone')
    read = partial(
        ids_and_label, tokenizer=tokenizer, text=text, classes=len(source.classes), draw=draw
    )
    blank = {'text': np.zeros(tokenizer.length, np.int32), 'label': np.int32(0)}
    return Task(blank, read, {'classes': tuple(source.classes)}, tokenizer)


def ids_of(
    record: Mapping[str, Any], rng: np.random.Generator, *, tokenizer: Named, text: str | None,
    draw: bool = True,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Makes the array `text`."""
    found = captions.of_record(record, text)
    return {'text': tokenizer(found[int(rng.integers(len(found))) if draw else 0])[0]}


def ids_and_label(
    record: Mapping[str, Any], rng: np.random.Generator, *, tokenizer: Named, text: str | None,
    classes: int, draw: bool,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Makes the arrays `text` and `label`."""
    label = record['label']
    if np.ndim(label) or not 0 <= label < classes:
        raise UserError(f'label {label} is not one of {classes} classes')
    ids = ids_of(record, rng, tokenizer=tokenizer, text=text, draw=draw)
    return ids | {'label': np.int32(label)}
