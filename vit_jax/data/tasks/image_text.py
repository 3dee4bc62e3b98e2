"""An image and a caption of it, as the ids of a tokenizer."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from vit_jax.data import captions, images
from vit_jax.data.sources import Source
from vit_jax.data.tasks import Task, fixed_view, is_fixed, make_view, size_of
from vit_jax.data.tokenizers import Named
from vit_jax.io.bounds import Positive, Size


def image_text(
    source: Source,
    *,
    view: str | dict,
    image_size: Size,
    augment: tuple[str | dict, ...] = (),
    tokenizer: str,
    length: Positive[int] | None = None,
    text: str | None = None,
) -> Task:
    """An image and a caption: `image` uint8 [H, W, 3], `text` int32 [L].

    Of several captions of an image each step draws one, by (seed, step, example). Labels are not
    read; source.label=None opens a data set without them.

    Args:
      view, image_size, augment: as in the task `classify`.
      tokenizer: path or address of a tokenizer, see `data.tokenizers.load`. A run keeps a copy of
        it, and when it resumes refuses one that makes other ids.
      length: number L of tokens of a text. None: that of the tokenizer.
      text: field of the captions, or path to it, such as json/caption: text, bytes in UTF-8 or
        several of them. None: the first of captions, caption, text, txt, captions/text that an
        example has, or in its json.
    """
    named = Named(tokenizer, length)
    blank = {
        'image': np.zeros((*size_of(image_size), 3), np.uint8),
        'text': np.zeros(named.length, np.int32),
    }
    caption = partial(caption_of, tokenizer=named, text=text)
    read = partial(image_and_caption, view=make_view(view, image_size, augment), caption=caption)
    rest = caption if is_fixed(view, augment) else None
    return Task(blank, read, tokenizer=named, rest=rest)


def caption_of(
    record: Mapping[str, Any], rng: np.random.Generator, *, tokenizer: Named, text: str | None
) -> dict[str, np.ndarray]:
    """Makes the `text` of `image_text`, of one of the captions."""
    found = captions.of_record(record, text)
    return {'text': tokenizer(found[int(rng.integers(len(found)))])[0]}


def image_and_caption(
    record: Mapping[str, Any],
    rng: np.random.Generator,
    out: Mapping[str, np.ndarray] | None = None,
    *,
    view: Callable,
    caption: Callable,
) -> dict[str, np.ndarray]:
    """Makes the arrays of `image_text`; `out` as in `Task`."""
    chosen = caption(record, rng)
    with images.naming('image'):
        image = view(images.read(record['image']), rng, out and out['image'])
    return {'image': image} | chosen


def all_captions(
    source: Source,
    *,
    view: str | dict,
    image_size: Size,
    tokenizer: Named,
    most: Positive[int],
    text: str | None = None,
) -> Task:
    """`image_text` for evaluation: the first C = `most` captions of an image, without chance.

    `image` uint8 [H, W, 3], `text` int32 [C, L], `captions` int32 [], how many of the rows are
    captions of the image; the others are of padding alone.

    Args:
      view: one that does not draw at random.
      tokenizer: the tokenizer, which may be that of the training task.
      image_size, text: as in `image_text`.
    """
    blank = {
        'image': np.zeros((*size_of(image_size), 3), np.uint8),
        'text': np.zeros((most, tokenizer.length), np.int32),
        'captions': np.int32(0),
    }
    read = partial(
        image_and_captions, view=fixed_view(view, image_size), tokenizer=tokenizer, most=most,
        text=text,
    )  # fmt: skip
    return Task(blank, read, tokenizer=tokenizer)


def image_and_captions(
    record: Mapping[str, Any], rng: np.random.Generator, *, view: Callable, tokenizer: Named,
    most: int, text: str | None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Makes the arrays of `all_captions`."""
    found = captions.of_record(record, text)[:most]
    ids = np.full((most, tokenizer.length), tokenizer.loaded.pad, np.int32)
    ids[: len(found)] = tokenizer(found)
    with images.naming('image'):
        image = view(images.read(record['image']), rng)
    return {'image': image, 'text': ids, 'captions': np.int32(len(found))}
