"""Writes the files of a checkpoint, each in the place of a former one in one step."""

import pathlib
import stat
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from vit_jax.convert.files import zip_digest
from vit_jax.errors import UserError
from vit_jax.io import atomic, storage
from vit_jax.io.text import to_json

FOLDER_FILES = (
    'model.safetensors', 'config.json', 'preprocessor_config.json', 'run_config.json',
    'tokenizer.json', 'spiece.model', 'tokenizer_config.json', 'special_tokens_map.json',
    'vit_jax_tokenizer.json',
)  # fmt: skip


def write_npz(path: pathlib.Path, arrays: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    """Writes the .json and then the .npz; each replaces the former file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.remove_leftovers(path.parent, path.name)
    with storage.writing(path), atomic.replace_file(path) as part:
        with part.open('wb') as file:
            np.savez(file, **arrays)
        record = record | {'arrays': zip_digest(part)}
        text = to_json(record, indent=2) + '\n'
        storage.write(path.with_suffix('.json'), text.encode(), sync=True)


def write_folder(
    path: pathlib.Path,
    arrays: dict[str, np.ndarray],
    documents: dict[str, Any],
    others: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Writes a folder with model.safetensors, its JSON files and `others`, in one step."""
    if path.exists():
        strange = [p.name for p in path.iterdir() if p.name not in FOLDER_FILES] if path.is_dir() \
            else [path.name]  # fmt: skip
        if strange:
            raise UserError(
                f'{path} holds {strange[0]!r}, which no export wrote; name another folder'
            )
    path = path.absolute()
    atomic.remove_leftovers(path.parent, path.name)
    try:
        with storage.writing(path), atomic.replace_folder(path) as part:
            save_file(arrays, part / 'model.safetensors', metadata={'format': 'pt'})
            for name, value in documents.items():
                (part / name).write_text(to_json(value, indent=2) + '\n')
            for name, data in others.items():
                (part / name).write_bytes(data)
            # safetensors makes files for their owner alone; config.json has the umask's mode
            mode = stat.S_IMODE((part / 'config.json').stat().st_mode)
            (part / 'model.safetensors').chmod(mode)
    except SafetensorError as e:
        raise UserError(f'cannot write {path}: {e}') from e
