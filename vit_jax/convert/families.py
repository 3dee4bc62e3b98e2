"""Parses opened files, arrays and documents, into `Parsed` by the rules of their family."""

import pathlib
import re
from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Any

from vit_jax.convert import (
    big_vision,
    big_vision_text,
    files,
    hf,
    official,
    open_clip,
    open_clip_text,
    timm,
    views,
)
from vit_jax.convert.documents import (
    PROBLEMS,
    Notes,
    class_names,
    option,
    size_option,
    stated_loss,
)
from vit_jax.convert.files import Array
from vit_jax.convert.hf import config as hf_config
from vit_jax.convert.hf import eomt as hf_eomt
from vit_jax.convert.hf import inside as hf_inside
from vit_jax.convert.hf import mae as hf_mae
from vit_jax.convert.hf import processor as hf_processor
from vit_jax.convert.hf import text as hf_text
from vit_jax.convert.hf import yolos as hf_yolos
from vit_jax.convert.official import shape_of
from vit_jax.convert.stages import Around, Parsed
from vit_jax.convert.timm import config as timm_config
from vit_jax.errors import UserError
from vit_jax.io.storage import read_json
from vit_jax.io.text import brief


def parse_folder(
    arrays: dict[str, Array], folder: pathlib.Path, part: str | None = None, towers: bool = False
) -> Parsed | None:
    """Parses .safetensors arrays and the documents in a folder; None if no family matches.

    `part` is that of `load`; with `towers` a text tower beside an image tower is parsed, too.
    """
    if open_clip.matches(arrays):
        return parse_open_clip(arrays, read_json(folder / open_clip.FILE), part, towers)
    config = read_json(folder / 'config.json')
    record = read_json(folder / 'run_config.json') or None
    arrays, config = hf_inside.without_wrapper(arrays, config)
    timm_class = timm.class_of_file(arrays, config)
    if timm_class is not None:
        return parse_timm(timm_class, arrays, config, record)
    if (words := hf_text.alone(arrays, config)) is not None:
        return Parsed(
            'hf', 'text', {}, {}, lambda model: [], None, {}, None, None, record,
            text=hf_text.tower(words, config),
        )  # fmt: skip
    whole = arrays, config
    arrays, config, others = hf_inside.encoder_of(arrays, config, part)
    family = hf.family_of_file(arrays, config)
    if family is not None:
        names = 'processor_config.json', 'preprocessor_config.json'
        documents = (read_json(folder / name) for name in names)
        settings = hf_processor.processor_settings(*documents)
        parsed = parse_hf(family, arrays, config, settings, record, part, towers)
        if whole[1].get('model_type') == hf_inside.WHOLE:
            inside = parsed.arrays | {name: whole[0][name] for name in others}
            parsed = parsed._replace(arrays=inside, around=hf_eomt.around(*whole))
        return parsed._replace(unused=parsed.unused | others)
    return None


def read_sidecar(path: pathlib.Path) -> dict[str, Any]:
    """Reads NAME.json beside NAME.npz; {} unless both were written together."""
    record = read_json(path.with_suffix('.json')) if path.with_suffix('.json').exists() else {}
    return record if record.get('arrays') == files.zip_digest(path) else {}


def parse_npz(
    arrays: dict[str, Array], tower: str | None, part: str | None, path: pathlib.Path,
    towers: bool = False,
) -> Parsed:  # fmt: skip
    """Parses an official or big_vision file, and the .json that `save` wrote beside it.

    `tower` names one tower of several, `part` is that of `load`; with `towers` a text tower beside
    an image tower is parsed, too.
    """
    record = read_sidecar(path)
    size = size_option(record, 'image_size', 'the .json beside it')
    extra = dict(
        image_size=size, input_size=size, view=views.valid_view(record.get('view')),
        classes=class_names(record.get('classes')),
        config=option(record, 'config', 'an object', file='the .json beside it'),
        loss=next((loss for loss in PROBLEMS if loss == record.get('loss')), None),
        notes=npz_notes(record),
    )  # fmt: skip
    renamed = official.current_names(arrays) if tower is None else {}
    if official.matches(renamed):
        kind, fields = official.describe(renamed)
        table = official.table_rows(renamed)
        return Parsed('official', kind, fields, renamed, official.pieces, table, {}, **extra)
    text = big_vision_text.tower(arrays, record) if towers and tower is None else None
    renamed, unused = big_vision.select_arrays(arrays, tower, part if text is None else 'image')
    extra['text'] = text
    if official.is_mixer(renamed):
        return Parsed(
            'big_vision', 'mixer', official.describe_mixer(renamed), renamed, official.pieces, None,
            unused, **extra,
        )  # fmt: skip
    if not big_vision.matches(renamed):
        raise UserError(f'no known family of ViTs has arrays named {", ".join(list(renamed)[:3])}')
    kind, fields = big_vision.describe(renamed)
    stacked = big_vision.is_stacked(renamed)
    return Parsed(
        'big_vision', kind, fields, renamed, lambda m: big_vision.pieces(m, stacked),
        big_vision.table_rows(renamed), unused, **extra,
    )  # fmt: skip


def npz_notes(record: dict[str, Any]) -> Notes:
    """Notes on fields that an .npz does not state, unless `save` wrote it.

    They are guessed from the code that writes such files.
    """
    if record:
        return Notes()
    why = 'the value in the code that writes such files, which do not state it'
    return Notes(dict.fromkeys(('mean', 'std', 'gelu', 'epsilon'), why))


def parse_timm(
    family: ModuleType,
    arrays: dict[str, Array],
    config: dict[str, Any],
    record: dict[str, Any] | None,
) -> Parsed:
    """Parses a timm file and its config.json."""
    if config.get('model_type') is not None and 'architecture' not in config:
        raise UserError('config.json is one of transformers, the arrays are those of timm')
    size = input_size = timm_config.image_size(config)
    view = None
    if hasattr(family, 'current_arrays'):
        size, arrays = family.table_size(arrays, config), family.current_arrays(arrays)
    kind, fields, notes = family.describe(arrays, config)
    if timm_config.has_settings(config):
        view, ignored = timm_config.evaluation_view(config, input_size or (224, 224))
        notes = notes._replace(ignored=notes.ignored + ignored)
    pieces = getattr(family, 'pieces_of', lambda names: family.pieces)(arrays)
    return Parsed(
        'timm', kind, fields, arrays, pieces, family.table_rows(arrays), {}, size,
        timm_config.label_names(config, fields['num_classes']), record,
        stated_loss(config), notes, input_size, view,
        getattr(family, 'offset_rows', no_offsets)(arrays),
    )  # fmt: skip


def parse_open_clip(
    arrays: dict[str, Array], config: dict[str, Any], part: str | None, towers: bool = False
) -> Parsed:
    """Parses the image tower of a file of OpenCLIP and its open_clip_config.json.

    With `towers` the text tower is parsed, too.
    """
    towers = towers and open_clip_text.has_tower(arrays)
    tower, others = open_clip.select(arrays, 'image' if towers else part)
    text = open_clip_text.tower({n: arrays[n] for n in others}, config) if towers else None
    unknown = open_clip.unknown_keys(config)
    if open_clip.PATCHES not in tower:
        parsed = parse_trunk(tower, config)
        notes = parsed.notes._replace(unknown=unknown)
        return parsed._replace(unused=others, notes=notes, text=text)
    fields, guessed = open_clip.describe(tower, config)
    size = open_clip.image_size(config)
    view, ignored = timm_config.evaluation_view(
        open_clip.view_settings(config), size or (224, 224)
    )
    return Parsed(
        'open_clip', 'vit', fields, tower, open_clip.pieces, open_clip.table_rows(tower), others,
        size, None, None, None, Notes(guessed, {}, ignored, unknown), size, view, text=text,
    )  # fmt: skip


def parse_trunk(tower: dict[str, Array], config: dict[str, Any]) -> Parsed:
    """Parses an image tower of OpenCLIP that is a model of timm, with a projection or not."""
    trunk = {
        n.removeprefix(open_clip.TRUNK): a for n, a in tower.items()
        if n.startswith(open_clip.TRUNK)
    }  # fmt: skip
    projection = {n: a for n, a in tower.items() if not n.startswith(open_clip.TRUNK)}
    try:
        trunk_config = open_clip.trunk_config(tower, config)
        family = timm.class_of_file(trunk, trunk_config)
        if family is None:
            name = brief(repr(trunk_config['architecture']))
            raise UserError(f'{open_clip.FILE}: timm_model_name {name} is not supported')
        parsed = parse_timm(family, trunk, trunk_config, None)
    except UserError as e:
        text = str(e)
        if open_clip.FILE not in text:
            text = text.replace('config.json', open_clip.FILE)
        raise UserError(text) from e
    if open_clip.PROJECTION not in projection:
        return parsed._replace(family='open_clip')
    count, of_trunk = shape_of(tower, open_clip.PROJECTION, 2)[0], parsed.pieces
    return parsed._replace(
        family='open_clip', arrays=trunk | projection,
        fields=parsed.fields | dict(num_classes=count),
        pieces=lambda model: open_clip.projected_pieces(of_trunk, model),
    )  # fmt: skip


def no_offsets(arrays: dict[str, Array]) -> None:
    """None, for families without a table of biases by offset."""


def parse_hf(
    family: ModuleType,
    arrays: dict[str, Array],
    config: dict[str, Any],
    processor: tuple[dict[str, Any], str | None],
    record: dict[str, Any] | None,
    part: str | None,
    towers: bool = False,
) -> Parsed:
    """Parses a folder of transformers; `processor` is (settings, name of their file).

    With `towers` a text tower beside an image tower is parsed, too.
    """
    arrays, whole = hf_mae.current_names(arrays), config
    towers = towers and hf_text.has_tower(arrays, config)
    renamed, config, others = family.select(arrays, config, 'image' if towers else part)
    text = hf_text.tower({n: arrays[n] for n in others}, whole) if towers else None
    kind, fields, guessed = family.describe(renamed, config)
    if hasattr(family, 'count_channels'):
        channels = family.count_channels(renamed, config)
    else:
        channels = shape_of(renamed, family.PATCHES, 4)[1]
    if processor[1] is None:
        images = hf_processor.Preprocessing(family.guess_normalisation(kind, channels))
        why = 'of the images; there is no preprocessor_config.json'
        guessed = guessed | {'mean': why, 'std': why}
    else:
        images = hf_processor.read(*processor, kind, channels)
    size, cut = whole_patches(images.size, fields['patch_size'])
    unknown = (*hf_config.unknown_keys(config, family.READ), *images.unknown)
    notes = Notes(guessed, {}, (*images.ignored, *cut), unknown)
    return Parsed(
        'hf', 'vit', fields | images.normalisation, renamed, family.pieces,
        family.table_rows(renamed), unused_arrays(renamed, family.UNUSED) | others,
        size_option(config, 'image_size'),
        hf_config.class_names(config, fields['num_classes']), record,
        stated_loss(config), notes, size, images.view,
        getattr(family, 'offset_rows', no_offsets)(renamed),
        around=around_of(renamed, config), text=text,
    )  # fmt: skip


def around_of(arrays: dict[str, Array], config: dict[str, Any]) -> Around | None:
    """What a file of transformers has around its encoder."""
    module = next((m for m in (hf_mae, hf_yolos) if m.matches(arrays)), None)
    return module and module.around(arrays, config)


def whole_patches(
    size: tuple[int, int] | None, patch: tuple[int, int]
) -> tuple[tuple[int, int] | None, list[tuple[str, str]]]:
    """(size rounded down to whole patches, [(key, why)] if that changes it)."""
    rounded = size and tuple(n // p * p or n for n, p in zip(size, patch, strict=True))
    if rounded == size:
        return size, []
    sides, cut = (' x '.join(map(str, pair)) for pair in (size, rounded))
    return rounded, [('size', f'images of {sides} are not whole patches: {cut} here')]


def unused_arrays(arrays: Collection[str], patterns: Sequence[tuple[str, str]]) -> dict[str, str]:
    """{name: reason} of the arrays that the family does not use."""
    return {n: why for n in arrays for pattern, why in patterns if re.fullmatch(pattern, n)}
