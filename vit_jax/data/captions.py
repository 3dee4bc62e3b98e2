"""The captions of an image, each checked."""

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.data.images import Unreadable
from vit_jax.data.readers.record import field
from vit_jax.errors import UserError
from vit_jax.io.text import brief

# Fields that have captions where no setting names one: of json and parquet, a tar's .txt, and
# coco_captions of TFDS.
KNOWN = ('captions', 'caption', 'text', 'txt', 'captions/text')
OF_JSON = ('json/captions', 'json/caption', 'json/text')  # of a tar without .txt


def of_record(record: Mapping[str, Any], path: str | None = None) -> list[str]:
    """The captions of a record, at least one, in the order of its field.

    A field is text, bytes in UTF-8 (space around them is no part of a text), or several of these.
    Raises Unreadable, which says what is wrong.
    """
    if path is None:
        path = known(record)
        if path is None:
            raise Unreadable(
                f'it has no caption: none of the fields {", ".join(KNOWN)} among '
                f'{brief(", ".join(record))}; data.text names its field'
            )
    value = field(record, path)
    several = isinstance(value, (list, tuple)) or isinstance(value, np.ndarray) and value.ndim == 1
    found = list(value) if several else [value]
    if not found:
        raise Unreadable(f'it has no caption: its {path} are none')
    places = [f'caption {k} of {len(found)}' for k in range(len(found))] if several else ['caption']
    return [text_of(one, place) for one, place in zip(found, places, strict=True)]


def known(record: Mapping[str, Any]) -> str | None:
    """The first of KNOWN, or else of OF_JSON, that a record has; None if it has none."""
    found = next((name for name in KNOWN if name in record), None)
    if found is None and 'json' in record:
        for path in OF_JSON:
            with contextlib.suppress(UserError):
                field(record, path)
                return path
    return found


def text_of(value: Any, place: str) -> str:
    """A caption as text; raises Unreadable, with its place, if it is none or empty."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as e:
            raise Unreadable(f'its {place} is not UTF-8: byte {e.start} is {e.reason}') from None
    if not isinstance(value, str):
        raise Unreadable(f'its {place} is {brief(value)}, not text')
    if not value.strip():
        raise Unreadable(f'its {place} is empty')
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise Unreadable(f'its {place} is not Unicode: character {e.start} is {e.reason}') from None
    return value.strip()
