"""Parses opened files, arrays and documents, into `Found` by the rules of their family."""

import re

from vit_jax.convert import (
    big_vision,
    files,
    hf,
    hf_config,
    hf_processor,
    official,
    timm,
    timm_config,
    timm_model,
    views,
)
from vit_jax.convert.documents import (
    PROBLEMS,
    Notes,
    class_names,
    loss_said,
    option,
    size_option,
)
from vit_jax.convert.fit import Found
from vit_jax.errors import UserError
from vit_jax.io.storage import read_json


def in_folder(arrays, folder):
    """Parses .safetensors arrays and the documents in a folder; None if no family matches."""
    config = read_json(folder / 'config.json')
    record = read_json(folder / 'run_config.json') or None
    if timm.matches(arrays):
        return timm_folder(arrays, config, record)
    if hf.matches(arrays):
        names = 'processor_config.json', 'preprocessor_config.json'
        documents = (read_json(folder / name) for name in names)
        return hf_folder(arrays, config, hf_processor.section(*documents), record)
    return None


def read_sidecar(path):
    """Reads NAME.json beside NAME.npz; {} unless both were written together."""
    record = read_json(path.with_suffix('.json')) if path.with_suffix('.json').exists() else {}
    return record if record.get('arrays') == files.zip_digest(path) else {}


def in_npz(arrays, tower, path):
    """Parses an official or big_vision file, and the .json that `save` wrote beside it."""
    record = read_sidecar(path)
    size = size_option(record, 'image_size', 'the .json beside it')
    extra = dict(
        image_size=size, input_size=size, view=views.checked(record.get('view')),
        classes=class_names(record.get('classes')),
        config=option(record, 'config', 'an object', file='the .json beside it'),
        loss=next((loss for loss in PROBLEMS if loss == record.get('loss')), None),
        notes=npz_notes(record),
    )  # fmt: skip
    tidy = official.tidy(arrays) if tower is None else {}
    if official.matches(tidy):
        kind, fields = official.describe(tidy)
        return Found(
            'official', kind, fields, tidy, official.pieces, official.table_rows(tidy), {}, **extra
        )
    tidy, unused = big_vision.tidy(arrays, tower)
    if official.is_mixer(tidy):
        return Found(
            'big_vision', 'mixer', official.describe_mixer(tidy), tidy, official.pieces, None,
            unused, **extra,
        )  # fmt: skip
    if not big_vision.matches(tidy):
        raise UserError(f'no known family of ViTs has arrays named {", ".join(list(tidy)[:3])}')
    kind, fields = big_vision.describe(tidy)
    stacked = big_vision.is_stacked(tidy)
    return Found(
        'big_vision', kind, fields, tidy, lambda m: big_vision.pieces(m, stacked),
        big_vision.table_rows(tidy), unused, **extra,
    )  # fmt: skip


def npz_notes(record):
    """Notes on fields that an .npz does not state, unless `save` wrote it.

    They are guessed from the code that writes such files.
    """
    if record:
        return Notes()
    why = 'the value in the code that writes such files, which do not state it'
    return Notes(dict.fromkeys(('mean', 'std', 'gelu', 'epsilon'), why))


def timm_folder(arrays, config, record):
    """Parses a timm file and its config.json."""
    if config.get('model_type') is not None and 'architecture' not in config:
        raise UserError('config.json is one of transformers, the arrays are those of timm')
    kind, fields, notes = timm_model.describe(arrays, config)
    size, view = timm_model.image_size(config), None
    if timm_config.has_settings(config):
        view, ignored = timm_config.view(config, size or (224, 224))
        notes = notes._replace(ignored=notes.ignored + ignored)
    return Found(
        'timm', kind, fields, arrays, timm.pieces, timm.table_rows(arrays), {}, size,
        timm_config.label_names(config, fields['num_classes']), record,
        loss_said(config), notes, size, view,
    )  # fmt: skip


def hf_folder(arrays, config, processor, record):
    """Parses a folder of transformers; `processor` is (settings, name of their file)."""
    tidy = hf.tidy(arrays)
    kind, fields, guessed = hf.describe(tidy, config)
    channels = hf.channels(tidy)
    if processor[1] is None:
        images = hf_processor.Preprocessing(hf.guess(kind, channels))
        why = 'of the images; there is no preprocessor_config.json'
        guessed = guessed | {'mean': why, 'std': why}
    else:
        images = hf_processor.read(*processor, kind, channels)
    size, cut = in_patches(images.size, fields['patch_size'])
    unknown = (*hf_config.unknown_keys(config), *images.unknown)
    return Found(
        'hf', 'vit', fields | images.normalisation, tidy, hf.pieces, hf.table_rows(tidy),
        explained(tidy, hf.UNUSED), hf.image_size(config),
        hf_config.class_names(config, fields['num_classes']), record,
        loss_said(config), Notes(guessed, {}, (*images.ignored, *cut), unknown), size, images.view,
    )  # fmt: skip


def in_patches(size, patch):
    """(size rounded down to whole patches, [(key, why)] if that changes it)."""
    whole = size and tuple(n // p * p or n for n, p in zip(size, patch, strict=True))
    if whole == size:
        return size, []
    sides, cut = (' x '.join(map(str, pair)) for pair in (size, whole))
    return whole, [('size', f'images of {sides} are no whole number of patches: {cut} here')]


def explained(arrays, patterns):
    """{name: reason} of the arrays that the family does not use."""
    return {n: why for n in arrays for pattern, why in patterns if re.fullmatch(pattern, n)}
