"""Loads a checkpoint of any family, from any address, as a model and its parameters."""

import contextlib
import difflib
import importlib.resources
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import flax.linen as nn
from absl import logging

from vit_jax.convert import families, files, run, shards
from vit_jax.convert.files import Array
from vit_jax.convert.fit import fit
from vit_jax.convert.stages import TWO_TOWERS, Loaded, Parsed, Values, size_of
from vit_jax.convert.towers import fit_text
from vit_jax.convert.whole import fit_whole
from vit_jax.errors import UserError, check_choice, shown
from vit_jax.io import fetch
from vit_jax.io.text import aligned, printable
from vit_jax.models import interface

ARGUMENTS = (
    'part', 'image_size', 'num_classes', 'keep_pre_logits', 'ema', 'source_image_size',
)  # fmt: skip
PARTS = ('encoder', 'image', 'text')
MOST_PATCHES = 2**18  # of an image, unless the caller asks for more


def load(
    path: str | os.PathLike,
    *,
    part: Literal['encoder', 'image', 'text'] | None = None,
    image_size: int | Sequence[int] | None = None,
    num_classes: int | None = None,
    keep_pre_logits: bool = False,
    ema: bool | None = None,
    **fields: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Loads a checkpoint as (model, float32 parameters); only its path is required.

        model, params = vit_jax.load(path)
        logits, out = model.apply({'params': params}, vit_jax.preprocess(model, files))

    `model.metadata` has image_size, view and classes (names by label) of the checkpoint. Other
    keywords override fields of the model, such as `num_heads`, `epsilon` or `dtype`; of a ViT,
    another `patch_size` resizes the kernel of the patches (FlexiViT, arXiv:2212.08013 eq. 3).
    Products are computed in float32 on every device, unless `precision` or `dtype` says otherwise.
    `source_image_size` is the image size that a position table is for, if it is not square.

    Args:
      path: a local path, a gs://, https:// or hf:// address or a name of the catalogue, of: an
        official or big_vision .npz ('FILE.npz:img' for one tower of several); a timm or Hugging
        Face folder or .safetensors; a run's workdir or one of its checkpoints.
      part: the part of a file that holds more than a ViT: 'encoder' is the bare ViT of any file,
        'image' or 'text' one tower of a file with both. None: all that it holds, a
        `models.two_towers.TwoTowers` of both (other keywords are then those of the image tower, and
        text={...} of the text tower), a `models.mae.Mae` of a masked autoencoder, a
        `models.detector.Detector` of a YOLOS, a `models.masks.MaskClassifier` of an EoMT, a
        `models.segmenter.Segmenter` or `models.patch_classifier.PatchClassifier` of a run of
        objective segment.
      image_size: int or (height, width) to which the position table is resized, by the method of
        its source. None: the size in preprocessor_config.json, as for every command, else that of
        the position table (224 and 518 for DINOv2 of transformers).
      num_classes: outputs of a new head of zeros, which also drops a representation layer
        (arXiv:2010.11929 section 3.2). 0: no head. None: the head of the checkpoint.
      keep_pre_logits: whether to keep the representation layer under a new head.
      ema: whether to load the moving average of a run's parameters. None: if the run saved one.
        True raises UserError for a checkpoint without one.

    Raises:
      UserError: something in the checkpoint is damaged, unknown or left unexplained.
    """
    for field in fields:
        near = difflib.get_close_matches(field, ARGUMENTS, 1, cutoff=0.8)
        if near and field not in ARGUMENTS:
            raise UserError(f'load has no argument {field!r}; the nearest is {near[0]!r}')
    loaded = read(
        path, part=part, image_size=image_size, num_classes=num_classes,
        keep_pre_logits=keep_pre_logits, ema=ema, as_input=True, whole=part is None, **fields,
    )  # fmt: skip
    logging.info('%s: %s\n%s', path, loaded.source, format_account(loaded.account))
    if image_size is None:
        for _, name, why in (row for row in loaded.account if row[0] == 'resized'):
            logging.warning('%s: %s is resized, %s', printable(path), printable(name), why)
    return loaded.model.clone(metadata=loaded.metadata), loaded.params


def read(
    path: str | os.PathLike,
    *,
    part: Literal['encoder', 'image', 'text'] | None = None,
    image_size: int | Sequence[int] | None = None,
    num_classes: int | None = None,
    keep_pre_logits: bool = False,
    ema: bool | None = None,
    values: Values = True,
    source_image_size: int | Sequence[int] | None = None,
    as_input: bool = False,
    whole: bool = False,
    towers: bool = False,
    **fields: Any,
) -> Loaded:
    """Loads a checkpoint as `Loaded`; arguments are those of `load`.

    Without `values` no parameters are read; 'shapes' gives their shapes and dtypes, every array of
    a file being checked. Without `image_size` positions stay as in the file or, `as_input`, are
    resized for the input size that the documents beside the weights state, and products of float32
    values are computed in float32 (`interface.exact`). Of a model around an encoder, such as a
    masked autoencoder, this is the encoder unless `whole`; of two towers it is the `part`,
    else both if `whole` or `towers`, else an error.
    """
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise UserError(f'the checkpoint is {shown(path)}, not a path, an address or a name')
    if part is not None:
        check_choice('part', part, PARTS)
    address, tower = split_tower(resolve(str(path)))
    if tower == 'txt':
        tower, part = None, 'text'
    options = dict(
        image_size=size_of(image_size), num_classes=num_classes, values=values,
        keep_pre_logits=keep_pre_logits, source_image_size=size_of(source_image_size),
        fields=fields,
    )  # fmt: skip
    make = fit_text if part == 'text' else fit_whole if whole else fit
    if run.is_run(address):
        parsed = run.parse_run(address, ema, bool(values) or whole)  # `fit_whole` fills arrays
        if parsed.kind == 'text':
            make = fit_text
        elif parsed.text is not None and part is None and not whole:
            if not towers:
                raise UserError(f'{path}: {TWO_TOWERS}')
            make = fit_whole
        loaded = make(parsed, str(path), **options)
        return in_float32(loaded) if as_input else loaded
    local = fetch.local(address)
    if ema:
        raise UserError(f'{path} is not a checkpoint of a run, so it has no moving average (ema)')
    both = part == 'text' or part is None and (whole or towers)
    with open_checkpoint(local, tower, part, both) as parsed:
        if parsed.kind == 'text':
            make = fit_text
        elif towers and part is None and parsed.text is not None:
            make = fit_whole
        if as_input and image_size is None and part != 'text':
            options['image_size'] = stated_size(parsed, path)
        loaded = make(parsed, str(path), **options)
        if as_input and image_size is None:
            account = [explain_resize(row, parsed) for row in loaded.account]
            loaded = loaded._replace(account=account)
    log_notes(path, parsed, loaded.account)
    view = catalogue().get(str(path), {}).get('view')
    if view and not loaded.stated_view:
        loaded = loaded._replace(stated_view=view)
    return in_float32(loaded) if as_input else loaded


def in_float32(loaded: Loaded) -> Loaded:
    """The same with a model that computes in float32 on any device, see `interface.exact`."""
    return loaded._replace(model=interface.exact(loaded.model))


def stated_size(parsed: Parsed, path: str | os.PathLike) -> tuple[int, int] | None:
    """The input size that the documents state, if any.

    Raises UserError for more than MOST_PATCHES patches, since positions would be resized to them.
    """
    size, patch = parsed.input_size, parsed.fields.get('patch_size')
    if size is None or patch is None:
        return size
    count = math.prod(n // max(p, 1) for n, p in zip(size, patch, strict=True))
    if count > MOST_PATCHES:
        raise UserError(
            f'{path}: the settings beside it are for images of {size[0]} x {size[1]} pixels, '
            f'{count:,} patches; if that is meant, give image_size=({size[0]}, {size[1]})'
        )
    return size


def explain_resize(row: tuple[str, str, str], parsed: Parsed) -> tuple[str, str, str]:
    """Adds the reason to a row of the account on a resize that the caller did not ask for."""
    what, name, detail = row
    if what != 'resized':
        return row
    why = '{} x {} images by the settings beside it'.format(*parsed.input_size)
    size = parsed.image_size
    keep = '; image_size=({}, {}) keeps the table'.format(*size) if size else ''
    return what, name, f'{detail}, for {why}{keep}'


def log_notes(
    path: str | os.PathLike, parsed: Parsed, account: Sequence[tuple[str, str, str]]
) -> None:
    """Logs keys without effect, unknown keys and guesses, in one line."""
    guesses = [name for what, name, _ in account if what == 'guessed']
    parts = [f'{name}: {why}' for name, why in parsed.notes.ignored]
    if parsed.notes.unknown:
        parts.append(f'unknown and ignored: {", ".join(parsed.notes.unknown)}')
    if guesses and parsed.family in ('timm', 'hf', 'open_clip'):
        parts.append(f'guessed, as nothing states them: {", ".join(guesses)}')
    if parts:
        logging.warning('%s: %s', printable(path), '; '.join(map(printable, parts)))


def resolve(path: str) -> str:
    """The address of a name of the catalogue; returns anything else unchanged.

    Raises UserError for what is neither a file nor an address and resembles a name.
    """
    names = catalogue()
    if path in names:
        return names[path]['address']
    group, *rest = path.split('/')
    if not os.path.exists(os.path.expanduser(path)) and '://' not in path:
        near = difflib.get_close_matches(path, names, 3)
        groups = {name.split('/')[0] for name in names}
        if near and (difflib.get_close_matches(group, groups) or not rest and '.' not in path):
            raise UserError(f'no file {path}, and no such name; the nearest: {", ".join(near)}')
    return path


def catalogue() -> dict[str, dict[str, Any]]:
    """{name: {address, family, image_size, source, metric, accuracy, licence}} of checkpoints.

    What no public source states is None. A row may have `tokenizer`, the address of that of two
    towers whose file has none, and `view`, how images become input where the file does not say it.
    """
    file = importlib.resources.files('vit_jax.convert') / 'catalogue.json'
    return json.loads(file.read_text(encoding='utf-8'))


def split_tower(address: str) -> tuple[str, str | None]:
    """Splits 'file.npz:img' into ('file.npz', 'img'); the tower is None if none is given."""
    match = re.fullmatch(r'(.*\.npz):(\w+)', address)
    return (match[1], match[2]) if match else (address, None)


@contextlib.contextmanager
def open_checkpoint(
    local: str | os.PathLike, tower: str | None = None, part: str | None = None,
    towers: bool = False,
) -> Iterator[Parsed]:  # fmt: skip
    """Opens a local file or folder of any family; its arrays can be read while it is open.

    `tower` names one tower of an .npz with several, `part` is that of `load`; with `towers` a text
    tower beside an image tower is parsed, too.
    """
    with contextlib.ExitStack() as stack:
        yield parse(pathlib.Path(local), tower, part, stack, towers)


def parse(
    local: pathlib.Path, tower: str | None, part: str | None, stack: contextlib.ExitStack,
    towers: bool = False,
) -> Parsed:  # fmt: skip
    """Parses local files by their family, which the names of the arrays determine.

    The files are open until `stack` closes. Other arguments are those of `open_checkpoint`.
    """
    paths, folder, ignored = shards.weight_files(local)
    try:
        arrays = open_shards(paths, stack)
        if str(paths[0]).endswith('.npz'):
            return families.parse_npz(arrays, tower, part, paths[0], towers)
        parsed = families.parse_folder(arrays, folder, part, towers)
    except UserError as e:
        raise UserError(e if str(local) in str(e) else f'{local}: {e}') from e
    if parsed is None:
        names = ', '.join(list(arrays)[:3])
        raise UserError(f'{local}: no known family of ViTs has arrays named {names}, ...')
    notes = parsed.notes
    return parsed._replace(notes=notes._replace(ignored=(*notes.ignored, *ignored.items())))


def open_shards(
    paths: Sequence[pathlib.Path], stack: contextlib.ExitStack
) -> dict[str, Array]:
    """{name: Array} of one or several files, which are open until `stack` closes."""
    arrays = {}
    for path in paths:
        manager = files.open_arrays(path)
        shard = manager.__enter__()
        stack.callback(manager.__exit__, None, None, None)  # it explains errors of opening alone
        shards.check_index(path, shard)
        if arrays.keys() & shard.keys():
            raise UserError(f'{path}: array {min(arrays.keys() & shard.keys())} occurs twice')
        arrays |= shard
    return arrays


def format_account(account: Sequence[tuple[str, str, str]]) -> str:
    """Formats the account: a line for each kind of change, one for all arrays that are loaded."""
    lines = []
    loaded = [row for row in account if row[0] == 'loaded']
    if loaded:
        places = len({row[2] for row in loaded})
        lines.append(('loaded', f'{len(loaded)} arrays', f'into {places} parameters'))
    groups = {}
    for what, name, detail in account:
        if what != 'loaded':
            groups.setdefault((what, detail), []).append(name)
    for (what, detail), members in groups.items():
        names = ', '.join(members[:3]) + (f', ... ({len(members)})' if len(members) > 3 else '')
        lines.append((what, names, detail))
    return aligned([tuple(map(printable, line)) for line in lines])
