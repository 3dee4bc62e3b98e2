"""Names of classes in the metadata of Hugging Face data sets."""

import contextlib
import json
import re
from collections.abc import Sequence
from typing import Any

from vit_jax.data.readers import shards


def class_names(
    records: Any, folders: Sequence[str], label: str | None
) -> tuple[str, ...] | None:
    """Names of a ClassLabel from the files, dataset_info.json or README.md, or None.

    Searches the folders in their order.
    """
    if records.names:
        return records.names
    for folder in folders:
        for name, parse in (('dataset_info.json', info_feature), ('README.md', card_feature)):
            text = shards.small_file(folder, name)
            if text is None:
                continue
            try:
                found = names_in(parse(text, label))
            except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
                continue
            if found:
                return found
    return None


def schema_names(schema: Any, label: str | None) -> tuple[str, ...] | None:
    """Class names that Hugging Face wrote into the schema of a file, or None."""
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        info = json.loads((schema.metadata or {}).get(b'huggingface', b'{}'))
        return names_in(info.get('info', {}).get('features', {}).get(label))
    return None


def names_in(feature: Any) -> tuple[str, ...] | None:
    """Class names of a Hugging Face feature, a ClassLabel or a list of them, or None."""
    if isinstance(feature, list) and len(feature) == 1:
        feature = feature[0]
    if isinstance(feature, dict) and isinstance(feature.get('feature'), dict):
        feature = feature['feature']
    found = feature.get('names') if isinstance(feature, dict) else None
    if isinstance(found, dict):  # of a README: {'0': 'ant', '1': 'bee'}
        found = [found[key] for key in sorted(found, key=int)]
    if not isinstance(found, list) or not found:
        return None
    return tuple(map(str, found))


def info_feature(text: bytes, label: str) -> Any:
    """Feature in a dataset_info.json."""
    return json.loads(text)['features'][label]


def card_feature(text: bytes, label: str) -> Any:
    """Feature in the YAML at the head of a README.md."""
    import yaml

    head = re.match(r'---\r?\n(.*?)\n---', text.decode('utf-8', 'replace'), re.DOTALL)
    if not head:
        return None
    try:
        info = yaml.safe_load(head[1])['dataset_info']
    except yaml.YAMLError as e:
        raise ValueError(str(e)) from e
    for one in info if isinstance(info, list) else [info]:
        for feature in one['features']:
            if feature['name'] == label:
                kind = feature.get('dtype', feature.get('list', feature.get('sequence')))
                return kind.get('class_label', kind) if isinstance(kind, dict) else None
    return None
