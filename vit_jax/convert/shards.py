"""Finds the files of a folder with a model's weights: one file, or the shards of an index."""

import pathlib
import re
from collections.abc import Collection, Sequence

from vit_jax.convert.documents import option
from vit_jax.errors import UserError
from vit_jax.io.storage import read_json
from vit_jax.io.text import brief

WHOLE = ('model.safetensors', 'open_clip_model.safetensors')
INDEX = 'model.safetensors.index.json'
SHARD = r'model-(\d+)-of-(\d+)\.safetensors'
KINDS = ('.npz', '.safetensors')


def weight_files(local: pathlib.Path) -> tuple[list[pathlib.Path], pathlib.Path, dict[str, str]]:
    """(files with arrays, folder of the JSON files beside them, {ignored file: reason}).

    As in transformers, a whole file precedes an index, and an index precedes names of shards.
    Raises UserError for pickled, missing or ambiguous weights.
    """
    if not local.is_dir():
        if local.suffix not in KINDS:
            pickled = local.suffix in ('.bin', '.pt', '.pth', '.pkl', '.ckpt')
            why = 'pickled weights are refused' if pickled else 'not a known kind of file'
            raise UserError(f'{local}: {why}; give an .npz, a .safetensors or a folder with one')
        return [local], local.parent, {}
    files = sorted(local.glob('*.safetensors'))
    names = {path.name for path in files}
    whole_models = [p for p in files if p.name in WHOLE]
    whole_models.sort(key=lambda p: WHOLE.index(p.name))
    shards = [p for p in files if re.fullmatch(SHARD, p.name)]
    if whole_models:
        chosen, why = whole_models[:1], f'{whole_models[0].name} is the whole model'
    elif (local / INDEX).exists():
        chosen = [local / name for name in sorted(set(weight_map(local).values()))]
        why = f'{INDEX} does not name it'
        for path in chosen:
            if path.name not in names:
                raise UserError(f'{local}: {INDEX} names {path.name}, which is not there')
    elif shards:
        check_complete(local, shards)
        chosen, why = shards, 'no shard by its name'
    else:
        chosen, why = files, ''
        if len(chosen) > 1:
            several = ', '.join(p.name for p in chosen)
            raise UserError(f'{local} has several files of weights, name one of them: {several}')
    if not chosen:
        raise UserError(
            f'{local} is not a run and has no .safetensors file; pickled weights are refused'
        )
    return chosen, local, {n: why for n in sorted(names - {p.name for p in chosen})}


def weight_map(folder: pathlib.Path) -> dict[str, str]:
    """{array: file name} of the index in a folder; raises UserError for a path as a name."""
    mapping = option(read_json(folder / INDEX), 'weight_map', 'an object', file=INDEX)
    if not mapping:
        raise UserError(f'{folder / INDEX} has no weight_map')
    for array, name in mapping.items():
        if not isinstance(name, str) or not re.fullmatch(r'[^/\\]+\.safetensors', name):
            raise UserError(
                f'{folder / INDEX}: weight_map has {brief(repr(name))} for {brief(array)}, '
                'which is not the name of a .safetensors file beside it'
            )
    return mapping


def check_complete(folder: pathlib.Path, shards: Sequence[pathlib.Path]) -> None:
    """Raises UserError unless files without an index are all the shards of one model."""
    counts = {re.fullmatch(SHARD, p.name)[2] for p in shards}
    numbers = sorted(int(re.fullmatch(SHARD, p.name)[1]) for p in shards)
    if len(counts) > 1 or numbers != list(range(1, int(min(counts)) + 1)):
        names = ', '.join(p.name for p in shards)
        raise UserError(
            f'{folder} has shards that are not 1 to n of n ({names}), and no {INDEX}'
        )


def check_index(path: pathlib.Path, part: Collection[str]) -> None:
    """Raises UserError if the arrays of a shard are not those that the index lists for it."""
    if not (path.parent / INDEX).exists() or path.name in WHOLE:
        return
    mapping = weight_map(path.parent)
    if path.name not in mapping.values():
        return  # the caller names this file
    for name, file in mapping.items():
        if file == path.name and name not in part:
            raise UserError(f'{path} lacks array {brief(name)}, which {INDEX} lists for it')
    for name in part:
        if mapping.get(name) != path.name:
            where = f'in {mapping[name]}' if name in mapping else 'nowhere'
            raise UserError(f'{path} has array {name}, which {INDEX} lists {where}')
