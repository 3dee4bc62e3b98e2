"""Finds the files of a folder with a model's weights: one file, or the shards of an index."""

import re

from vit_jax.convert.documents import option
from vit_jax.errors import UserError
from vit_jax.io.storage import read_json
from vit_jax.io.text import brief

WHOLE = ('model.safetensors', 'open_clip_model.safetensors')
INDEX = 'model.safetensors.index.json'
SHARD = r'model-(\d+)-of-(\d+)\.safetensors'
KINDS = ('.npz', '.safetensors')


def weight_files(local):
    """(files with arrays, folder of the JSON files beside them, {ignored file: reason}).

    As in transformers, a whole file precedes an index, and an index precedes names of shards.
    Raises UserError for pickled, missing or ambiguous weights.
    """
    if not local.is_dir():
        if local.suffix not in KINDS:
            pickled = local.suffix in ('.bin', '.pt', '.pth', '.pkl', '.ckpt')
            why = 'pickled weights are refused' if pickled else 'no known kind of file'
            raise UserError(f'{local}: {why}; give an .npz, a .safetensors or a folder with one')
        return [local], local.parent, {}
    found = sorted(local.glob('*.safetensors'))
    names = {path.name for path in found}
    whole = [p for p in found if p.name in WHOLE]
    whole.sort(key=lambda p: WHOLE.index(p.name))
    shards = [p for p in found if re.fullmatch(SHARD, p.name)]
    if whole:
        chosen, why = whole[:1], f'{whole[0].name} is the whole model'
    elif (local / INDEX).exists():
        chosen = [local / name for name in sorted(set(weight_map(local).values()))]
        why = f'{INDEX} does not name it'
        for path in chosen:
            if path.name not in names:
                raise UserError(f'{local}: {INDEX} names {path.name}, which is not there')
    elif shards:
        complete(local, shards)
        chosen, why = shards, 'no shard by its name'
    else:
        chosen, why = found, ''
        if len(chosen) > 1:
            some = ', '.join(p.name for p in chosen)
            raise UserError(f'{local} has several files of weights, name one: {some}')
    if not chosen:
        raise UserError(
            f'{local} is no run and has no .safetensors file; pickled weights are refused'
        )
    return chosen, local, {n: why for n in sorted(names - {p.name for p in chosen})}


def weight_map(folder):
    """{array: file name} of the index in a folder; raises UserError for a path as a name."""
    mapping = option(read_json(folder / INDEX), 'weight_map', 'an object', file=INDEX)
    if not mapping:
        raise UserError(f'{folder / INDEX} has no weight_map, which tells where arrays are')
    for array, name in mapping.items():
        if not isinstance(name, str) or not re.fullmatch(r'[^/\\]+\.safetensors', name):
            raise UserError(
                f'{folder / INDEX}: weight_map has {brief(repr(name))} for {brief(array)}, '
                'which is no name of a .safetensors file beside it'
            )
    return mapping


def complete(folder, shards):
    """Raises UserError unless files without an index are all the shards of one model."""
    counts = {re.fullmatch(SHARD, p.name)[2] for p in shards}
    numbers = sorted(int(re.fullmatch(SHARD, p.name)[1]) for p in shards)
    if len(counts) > 1 or numbers != list(range(1, int(min(counts)) + 1)):
        some = ', '.join(p.name for p in shards)
        raise UserError(
            f'{folder} has shards that are not 1 to n of n ({some}), and no {INDEX} that tells '
            'which are meant'
        )


def check_index(path, part):
    """Raises UserError if the arrays of a shard are not those that the index lists for it."""
    if not (path.parent / INDEX).exists() or path.name in WHOLE:
        return
    mapping = weight_map(path.parent)
    if path.name not in mapping.values():
        return  # the caller names this file
    for name, file in mapping.items():
        if file == path.name and name not in part:
            raise UserError(f'{path}: {INDEX} has array {brief(name)} in it, which it has not')
    for name in part:
        if mapping.get(name) != path.name:
            where = f'in {mapping[name]}' if name in mapping else 'nowhere'
            raise UserError(f'{path} has array {name}, which {INDEX} has {where}')
