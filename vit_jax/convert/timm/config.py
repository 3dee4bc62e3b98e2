"""Reads config.json of timm: preprocessing of images, classes, unknown keys."""

import math
from typing import Any

from vit_jax.convert.assumed import IMAGENET
from vit_jax.convert.documents import (
    KINDS,
    Notes,
    channel_values,
    check_class_names,
    option,
    size_option,
)
from vit_jax.errors import UserError
from vit_jax.io.text import brief

POOLS = {'token': 'cls', 'avg': 'gap', 'map': 'map', '': 'none'}
POOL_NAMES = {ours: theirs for theirs, ours in POOLS.items()}
GELUS = {'gelu': 'exact', 'gelu_tanh': 'tanh', 'quick_gelu': 'quick'}
MOST_PIXELS = 16_384  # a side of the image before the crop
# Keys of the top level and of pretrained_cfg without effect here: the origin of the weights, other
# evaluations of timm, and names of layers to replace for another head.
IRRELEVANT = {
    'url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'tag', 'custom_load',
    'test_input_size', 'min_input_size', 'fixed_input_size', 'test_crop_pct', 'label_offset',
    'label_descriptions', 'pool_size', 'test_pool_size', 'first_conv', 'classifier', 'license',
    'description', 'origin_url', 'paper_name', 'paper_ids', 'notes', 'library_name',
}  # fmt: skip
READ = {
    'architecture', 'num_classes', 'num_features', 'global_pool', 'model_args', 'pretrained_cfg',
    'label_names', 'labels', 'problem_type', 'input_size', 'interpolation', 'crop_pct',
    'crop_mode', 'mean', 'std',
}  # fmt: skip


def pretrained_setting(
    config: dict[str, Any], key: str, kind: str | None = None, default: Any = None
) -> Any:
    """A value of pretrained_cfg, else of the top level, as in older files, else `default`."""
    inner = option(config, 'pretrained_cfg', 'an object', {})
    section = inner if inner.get(key) is not None else config
    return section.get(key, default) if kind is None else option(section, key, kind, default)


def stated_classes(config: dict[str, Any]) -> int | None:
    """num_classes outside of model_args; as in timm, the top level precedes pretrained_cfg."""
    section = config if config.get('num_classes') is not None else option(
        config, 'pretrained_cfg', 'an object', {}
    )  # fmt: skip
    return option(section, 'num_classes', 'a whole number')


def input_size(config: dict[str, Any]) -> tuple[int, int, int] | None:
    """(channels, height, width) of pretrained_cfg, None where it has none."""
    size = pretrained_setting(config, 'input_size', 'a list')
    if size is None:
        return None
    if len(size) != 3 or not all(map(KINDS['a number of pixels'], size)):
        raise UserError(
            f'config.json: input_size is {brief(size)}, not [channels, height, width] of an image '
            'of at most 16384 pixels a side'
        )
    return tuple(size)


def unknown_keys(config: dict[str, Any]) -> tuple[str, ...]:
    """Keys of the config, and of its pretrained_cfg, that are neither read nor irrelevant."""
    inner = option(config, 'pretrained_cfg', 'an object', {})
    keys = [*config, *(key for key in inner if key not in config)]
    return tuple(f'config.json: {brief(key)}' for key in keys if key not in READ | IRRELEVANT)


def has_settings(config: dict[str, Any]) -> bool:
    """Whether timm would take preprocessing from the config, if only by timm's defaults."""
    keys = ('pretrained_cfg', 'input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std')
    stated = any(config.get(key) is not None for key in keys)
    return bool(config) and (stated or 'model_args' not in config)


def stated_normalisation(config: dict[str, Any], channels: int) -> dict[str, tuple[float, ...]]:
    """{mean, std}, as far as the config states them."""
    stated = {}
    for key, kind in (('mean', 'a number'), ('std', 'a number above 0')):
        values = pretrained_setting(config, key)
        if values is not None:
            stated[key] = channel_values({key: values}, key, kind, channels)
    return stated


def evaluation_view(
    config: dict[str, Any], size: tuple[int, int]
) -> tuple[dict[str, Any], tuple[tuple[str, str], ...]]:
    """(view of timm's evaluation at (height, width), ((key, why), ...) that it leaves out)."""
    crop = pretrained_setting(config, 'crop_pct', 'a number above 0') or 0.875
    mode = pretrained_setting(config, 'crop_mode', 'a text', 'center')
    method = pretrained_setting(config, 'interpolation', 'a text', 'bicubic')
    ignored = []
    method = {'box': 'area'}.get(method, method)
    if method not in ('bilinear', 'bicubic', 'area'):
        ignored.append(('interpolation', f'no view here has {brief(repr(method))}, but bicubic'))
        method = 'bicubic'
    resampling = dict(method=method, antialias=True)
    resized = [min(math.floor(n / crop), MOST_PIXELS + 1) for n in size]
    supported = crop <= 1 and max(resized) <= MOST_PIXELS
    if not supported or mode not in ('center', 'squash'):
        what, value = ('crop_mode', mode) if supported else ('crop_pct', crop)
        ignored.append((what, f'no view here has {brief(repr(value))}, but the whole image'))
        return dict(name='resize', **resampling), tuple(ignored)
    if mode == 'squash':
        crop_argument = dict(crop=size[0] / resized[0], rounding='torchvision') if crop < 1 else {}
        return dict(name='resize', **crop_argument, **resampling), tuple(ignored)
    if size[0] != size[1]:
        return dict(name='central', crop=crop, **resampling), tuple(ignored)
    resampling['rounding'] = 'torchvision'
    return dict(name='small_central', smaller=resized[0], **resampling), tuple(ignored)


def label_names(config: dict[str, Any], count: int | None) -> tuple[str, ...] | None:
    """Class names by label; None if the config has none. Older files call them `labels`."""
    for key in ('label_names', 'labels'):
        for section in (config, option(config, 'pretrained_cfg', 'an object', {})):
            if section.get(key) is not None:
                return check_class_names(section[key], count, key)
    return None


def with_normalisation(
    fields: dict[str, Any],
    config: dict[str, Any],
    channels: int,
    default: dict[str, tuple[float, ...]],
    guessed: dict[str, str],
    unsettled: dict[str, str],
) -> tuple[dict[str, Any], Notes]:
    """(fields with mean and std of the images, Notes); `default` where nothing states them."""
    why = 'of the images; nothing states it'
    if has_settings(config) and channels == 3:
        default, why = IMAGENET, "of the images; config.json leaves it out: timm's default"
    stated = stated_normalisation(config, channels)
    guessed = guessed | {key: why for key in default if key not in stated}
    notes = Notes(guessed, unsettled, (), unknown_keys(config))
    return fields | default | stated, notes


def image_size(config: dict[str, Any]) -> tuple[int, int] | None:
    """Image size (height, width) of the checkpoint; None if the config does not state it."""
    size = size_option(option(config, 'model_args', 'an object', {}), 'img_size')
    if size is None:
        stated = input_size(config)
        size = stated and stated[1:]
    return size
